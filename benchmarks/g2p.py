"""A whole training step of examples/g2p's Bahdanau system, on words made up: with onepass, and with the plain formula in its place.

``A`` is the attention width, ``D`` that of an encoder state (both directions) and of the decoder's; other sizes are the example's.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from onepass.modules import AdditiveAttention
from onepass.seq2seq import BahdanauDecoder, Encoder, Seq2Seq

from .families import elements
from .providers import EAGER, eager_scores, provider
from .workloads import BOTH, Cost, Exact, Family, Run, Shape, Workload, register

NAME = "G2P training step"
LETTERS, PHONEMES, EMBEDDING = 30, 42, 64  # padding, begin and end included
PAD, BEGIN, END = 0, 1, 2
PARTS = 16  # of a batch, in float64


def model_of(shape: Shape) -> Seq2Seq:
    encoder = Encoder(LETTERS, EMBEDDING, shape.D // 2)
    return Seq2Seq(encoder, BahdanauDecoder(PHONEMES, EMBEDDING, shape.D, shape.D, shape.A, maxout_dim=shape.A))


class PlainMemory(NamedTuple):
    keys: Tensor
    values: Tensor
    beyond: Tensor  # [B, 1, S], True where there is no symbol


class PlainAttention(nn.Module):
    """The layer as a framework without onepass writes it, with the parameters of onepass's."""

    def __init__(self, layer: AdditiveAttention, attend: Callable[..., tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.query_layer, self.key_layer, self.v, self._attend = layer.query_layer, layer.key_layer, layer.v, attend

    def memory(self, states: Tensor, *, lengths: Tensor) -> PlainMemory:
        beyond = torch.arange(states.shape[1], device=states.device) >= lengths[:, None, None]
        return PlainMemory(self.key_layer(states), states, beyond)

    def forward(self, query: Tensor, memory: PlainMemory, *, need_weights: bool) -> tuple[Tensor, Tensor]:
        return self._attend(self.query_layer(query), *memory, self.v)


def plain(query: Tensor, keys: Tensor, values: Tensor, beyond: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = torch.softmax(eager_scores(query, keys, v).masked_fill(beyond, float("-inf")), -1)
    return weights @ values, weights


def make_plain(model: Seq2Seq, attend: Callable[..., tuple[Tensor, Tensor]] = plain) -> PlainAttention:
    """Swaps the attention of the model, and returns the new one."""
    layer = model.decoder.attention
    assert isinstance(layer, AdditiveAttention)
    attention = model.decoder.attention = PlainAttention(layer, attend)
    return attention


class Words(NamedTuple):
    source: Tensor  # [B, S]
    lengths: Tensor  # [B]
    target: Tensor  # [B, T + 1], from begin to end


def loss_of(model: Seq2Seq, words: Words, symbols: int) -> Tensor:
    """The mean over ``symbols`` symbols, smoothed as the example does it."""
    source, lengths, target = words
    logits, _ = model(source, lengths, target[:, :-1])
    nats = nn.functional.cross_entropy(
        logits.flatten(0, 1), target[:, 1:].flatten(), ignore_index=PAD, reduction="sum", label_smoothing=0.1
    )
    return nats / symbols


class Trace:
    """What each step attended from, its scores, and the encoder states."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.states: list[Tensor] = []
        self.scores: list[Tensor] = []

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, beyond: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.values = values
        self.scores.append(eager_scores(query, keys, v).masked_fill(beyond, float("-inf")))
        weights = torch.softmax(self.scores[-1], -1)
        return weights @ values, weights

    @torch.no_grad()
    def sizes(self, v: Tensor, of_scores: Sequence[Tensor]) -> dict[str, Tensor]:
        """Of the gradients of the attention's parameters: the sums of their terms' magnitudes."""
        g, states = torch.cat(tuple(of_scores), 1).abs(), torch.cat(self.states, 1).abs()  # [B, T, S], [B, T, D]
        to_query, to_keys = g.sum(2)[..., None] * v.abs(), g.sum(1)[..., None] * v.abs()
        return {
            "decoder.attention.v": g.sum().expand_as(v),
            "decoder.attention.query_layer.weight": torch.einsum("bta,btd->ad", to_query, states),
            "decoder.attention.query_layer.bias": to_query.sum((0, 1)),
            "decoder.attention.key_layer.weight": torch.einsum("bsa,bsd->ad", to_keys, self.values.abs()),
        }


class TrainingStep(Family):
    """Forward, backward, clipping and Adam. The results are the loss and the gradients of all parameters."""

    name, directions = NAME, (BOTH,)
    shapes = (Shape("G2P", 128, 8, 8, 160, 320),)  # B words of S letters and T - 1 phonemes
    bars = ("G2P",)

    def outputs_apart(self, workload: Workload, direction: str) -> int:
        return 0

    def make(self, workload: Workload, generator: torch.Generator) -> dict[str, Tensor]:
        _, B, T, S, _, _ = workload.shape
        with torch.random.fork_rng():
            torch.manual_seed(int(torch.randint(1 << 31, (), generator=generator)))
            model = model_of(workload.shape)
        ends = torch.full((B, 1), END)
        source = torch.randint(3, LETTERS, (B, S), generator=generator)
        target = torch.cat((torch.full((B, 1), BEGIN), torch.randint(3, PHONEMES, (B, T - 1), generator=generator), ends), 1)
        words = Words(source, torch.full((B,), S), target)._asdict()
        weights = {name: x.detach().to(workload.dtype).requires_grad_() for name, x in model.named_parameters()}
        return {name: x.detach().to(workload.device).requires_grad_(x.requires_grad) for name, x in (words | weights).items()}

    def expected(self, workload: Workload) -> dict[str, list[Exact]]:
        """With plain attention in float64, a few words at a time. The sums of their gradients' magnitudes are the least that those of all
        terms can be, but for the attention's own parameters: the gradients of scores sum to 0 over a source."""
        model, words = model_and_words(workload, "cpu", torch.float64)
        trace = Trace()
        attention = make_plain(model, trace.attend)
        attention.query_layer.register_forward_hook(lambda module, args, result: trace.states.append(args[0]))
        names, parameters = zip(*model.named_parameters(), strict=True)
        parts = []
        for few in zip(*(x.chunk(PARTS) for x in words), strict=True):
            trace.clear()
            loss = loss_of(model, Words(*few), words.target[:, 1:].numel())
            found = torch.autograd.grad(loss, (*parameters, *trace.scores))
            sizes = {name: x.abs() for name, x in zip(names, found, strict=False)} | trace.sizes(attention.v, found[len(names) :])
            parts.append([(loss.detach(),) * 2, *((x, sizes[name]) for name, x in zip(names, found, strict=False))])
        return {BOTH: [Exact(*(torch.stack(x).sum(0) for x in zip(*of_result, strict=True))) for of_result in zip(*parts, strict=True)]}

    def cost(self, workload: Workload, direction: str) -> Cost:
        """Matrices of the encoder and of the keys meet every letter, others every phoneme, once forward and twice backward. Adam reads
        and writes a parameter and its two moments."""
        _, B, T, S, _, D = workload.shape
        matrices = {name: x.numel() for name, x in workload.tensors.items() if x.dim() == 2 and x.requires_grad and "embedding" not in name}
        products = sum(size * B * (S if "encoder" in name or "key_layer" in name else T) for name, size in matrices.items())
        attention = 11 * elements(workload) + 3 * B * T * S * D
        return Cost(elements(workload), 3 * products + attention, 6 * sum(x.nbytes for x in workload.inputs))


def model_and_words(workload: Workload, device: str, dtype: torch.dtype) -> tuple[Seq2Seq, Words]:
    model = model_of(workload.shape)
    model.load_state_dict({name: x.detach() for name, x in workload.tensors.items() if x.requires_grad})
    return model.to(device, dtype), Words(*(workload.tensors[name].to(device) for name in Words._fields))


def training_step(workload: Workload, change: Callable[[Seq2Seq], object]) -> Run:
    """Of the model as changed, at a learning rate of 0, which is as much work and leaves every call the same problem."""
    model, words = model_and_words(workload, workload.device, workload.dtype)
    change(model)
    parameters = list(model.parameters())
    optimizer = torch.optim.Adam(parameters, lr=0.0, betas=(0.9, 0.98), fused=True)
    symbols = words.target[:, 1:].numel()

    def run() -> object:
        optimizer.zero_grad()
        loss = loss_of(model, words, symbols)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1e9)  # which nothing reaches
        optimizer.step()
        return loss.detach(), *(parameter.grad for parameter in parameters)

    return run


@provider("onepass", {NAME})
def fused(workload: Workload, direction: str) -> Run:
    return training_step(workload, lambda model: None)


@provider(EAGER, {NAME})
def eager(workload: Workload, direction: str) -> Run:
    return training_step(workload, make_plain)


@provider("torch.compile", {NAME}, compiles=True)
def compiled(workload: Workload, direction: str) -> Run:
    """Of the attention alone."""
    return training_step(workload, lambda model: make_plain(model, torch.compile(plain, dynamic=False)))


register(TrainingStep())
