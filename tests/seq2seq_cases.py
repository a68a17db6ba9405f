"""Encoders, decoders and whole models to test: how they are made, what they are given, and what comes out of them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from seq2seq_formulae import bahdanau, luong, plain
from torch import Tensor, nn

from onepass.seq2seq import BahdanauDecoder, Decoder, Encoded, Encoder, LuongDecoder, PlainDecoder, Seq2Seq
from onepass.seq2seq.data import BOS, EOS, PAD

V, E, H, M, A, U = 9, 5, 6, 8, 10, 12  # symbols, embedding, decoder and encoder states, attention width, symbols of the source
Formula = Callable[..., tuple[Tensor, Tensor | None]]


class Kind:
    """A decoder to test: how it is made, and its formula."""

    def __init__(self, formula: Formula, family: type[Decoder], *sizes: int, hidden: int = H, **options: Any) -> None:
        self.family, self.sizes, self.hidden, self.options = family, sizes, hidden, options
        told = {name: options[name] for name in ("window", "half_width", "input_feeding") if name in options}
        self.formula = functools.partial(formula, score=options.get("score", "general"), **told) if formula is luong else formula

    def make(self, num_symbols: int = V, **options: Any) -> Decoder:
        return self.family(num_symbols, E, self.hidden, M, *self.sizes, **{**self.options, **options})


def luong_kind(score: str = "general", **options: Any) -> Kind:
    return Kind(luong, LuongDecoder, hidden=M if score == "dot" else H, score=score, **options)


GLOBAL = {
    "plain": Kind(plain, PlainDecoder),
    "plain, 2 LSTM layers": Kind(plain, PlainDecoder, cell="lstm", num_layers=2),
    "bahdanau": Kind(bahdanau, BahdanauDecoder, A),
    "bahdanau, maxout": Kind(bahdanau, BahdanauDecoder, A, maxout_dim=4),
    "dot": luong_kind("dot"),
    "general, 2 LSTM layers": luong_kind("general", cell="lstm", num_layers=2),
    "concat": luong_kind("concat", attention_dim=A),
    "general, no feeding": luong_kind("general", input_feeding=False, num_layers=2),
    "concat, no feeding": luong_kind("concat", input_feeding=False, cell="lstm"),
}
LOCAL = {
    f"{window}, {score}{'' if feeding else ', no feeding'}": luong_kind(score, window=window, half_width=2, input_feeding=feeding)
    for window, score in (("local-m", "general"), ("local-m", "concat"), ("local-p", "dot"), ("local-p", "concat"))
    for feeding in (True, False)
}
DECODERS = {**GLOBAL, **LOCAL}
each_decoder = pytest.mark.parametrize("kind", DECODERS)


def randomise(module: nn.Module, seed: int, spread: float = 0.6) -> nn.Module:
    """Every parameter, biases too, drawn anew: none is zero, and weights are far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def make_decoder(kind: "str | Kind", dtype: torch.dtype = torch.float64, seed: int = 0, **options: Any) -> Any:
    made = (DECODERS[kind] if isinstance(kind, str) else kind).make(**options)
    return randomise(made.to(dtype), seed).eval()


def make_encoder(dtype: torch.dtype = torch.float64, seed: int = 1, **options: Any) -> Any:
    return randomise(Encoder(U, E, M // 2, **options).to(dtype), seed).eval()


def make_model(kind: "str | Kind", seed: int = 0, *, num_symbols: int = V, peak: float = 1.0, end: float = 0.0, **options: Any) -> Any:
    """A model in evaluation mode, in float64; ``peak`` multiplies its logits, ``end`` is added to that of the end symbol."""
    decoder = make_decoder(kind, seed=seed, num_symbols=num_symbols, **options)
    with torch.no_grad():
        decoder.output.weight.mul_(peak)
        decoder.output.bias.mul_(peak)
        decoder.output.bias[EOS] += end
    return Seq2Seq(make_encoder(seed=seed + 1), decoder).eval()


def make_sources(lengths: Sequence[int], seed: int = 2, source: int | None = None) -> tuple[Tensor, Tensor]:
    """``(source [B, S], lengths [B])``, with PAD beyond the lengths."""
    generator = torch.Generator().manual_seed(seed)
    counts, width = torch.tensor(lengths), max(lengths) if source is None else source
    symbols = torch.randint(3, U, (len(lengths), width), generator=generator)
    return symbols.masked_fill(torch.arange(width) >= counts[:, None], PAD), counts


def make_encoded(lengths: Sequence[int], dtype: torch.dtype = torch.float64, seed: int = 3, *, grad: bool = False) -> Encoded:
    """What an encoder might give, as leaves."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.tensor(lengths)
    states = torch.randn(len(lengths), max(lengths), M, generator=generator, dtype=torch.float64).clamp(-2, 2) / 2
    states = states.masked_fill((torch.arange(max(lengths)) >= counts[:, None])[..., None], 0.0).to(dtype)
    final = (torch.randn(len(lengths), M, generator=generator, dtype=torch.float64) / 2).to(dtype)
    return Encoded(states.requires_grad_(grad), counts, final.requires_grad_(grad))


def make_symbols(*shape: int, seed: int = 4, num_symbols: int = V) -> Tensor:
    """What a decoder reads: BOS, then ordinary symbols."""
    symbols = torch.randint(3, num_symbols, shape, generator=torch.Generator().manual_seed(seed))
    symbols[:, 0] = BOS
    return symbols


def some(encoded: Encoded, rows: list[int]) -> Encoded:
    """Some sources by themselves, without the padding that they do not need."""
    lengths = encoded.lengths[rows]
    return Encoded(encoded.states[rows, : int(lengths.max())], lengths, encoded.final[rows])


def by_steps(decoder: Any, encoded: Encoded, symbols: Tensor) -> tuple[Tensor, Any]:
    """Teacher forcing of one hypothesis by single steps: ``(logits [B, T, V], weights [B, T, S] or None)``."""
    state, logits, rows = decoder.start(encoded), [], []
    for t in range(symbols.shape[1]):
        step_logits, state, weights = decoder.step(symbols[:, t : t + 1], state)
        logits.append(step_logits)
        rows.append(weights)
    return torch.cat(logits, 1), None if rows[0] is None else torch.cat(rows, 1)


def at_once(decoder: Any, encoded: Encoded, symbols: Tensor) -> tuple[Tensor, Any]:
    """Teacher forcing in one call."""
    logits, weights = decoder(encoded, symbols)
    return logits, weights


def gradients(outputs: tuple[Any, ...], leaves: list[Tensor]) -> list[Tensor]:
    """The gradients of a random weighing of the outputs, the same for outputs of the same shapes."""
    loss = torch.zeros(())
    for number, output in enumerate(outputs):
        if output is not None:
            weighing = torch.randn(output.shape, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
            loss = loss + (output * weighing.to(output.dtype)).sum()
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found, strict=True)]


def close(found: Any, expected: Any, what: str = "") -> None:
    """Equal but for the rounding of float64; None only where None is expected."""
    assert (found is None) == (expected is None), what
    if expected is not None:
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11, msg=lambda text: f"{what}: {text}")


def same(found: Any, expected: Any) -> None:
    """Bitwise equal."""
    assert (found is None) == (expected is None)
    if expected is not None:
        assert torch.equal(found, expected)
