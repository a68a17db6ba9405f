"""The peers' own layers, as installed (``make peers``): `python -m onepass.benchmarks.peers` says which are there.

Each is given the workload's weights and made to compute that family's function: what it has besides is set to nothing, as said at each.
Those that take one query at a time are called in a loop, as their users' decoders do.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .installed import module
from .layer_providers import ADDITIVE, GENERAL, Parts, attentional, layer
from .workloads import Shape, Workload

MAKE = "make peers"


def one_width(workload: Workload) -> list[str]:
    shape = workload.shape
    return [] if shape.A == shape.D else [f"its layer has one width for all states; got {shape.A} and {shape.D}"]


class Context(nn.Module):
    """Of ``[context; query]`` the context: in place of an output projection that the family does not have."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, features: Tensor) -> Tensor:
        return features[..., : self.width]


@layer("OpenNMT-py", ADDITIVE, needs={"onmt": MAKE}, more_reasons=one_width)
def opennmt_mlp(shape: Shape) -> Parts:
    """Without the projection ``linear_out`` of context and query; the keys are projected in every call."""
    attention = module("onmt.modules.global_attention").GlobalAttention(shape.A, attn_type="mlp")
    attention.linear_out = Context(shape.A)
    names = {"W_q": "linear_query.weight", "W_k": "linear_context.weight", "v": "v.weight"}
    return Parts(attention, names, lambda memory: lambda query: attention(query, memory)[0], lambda *states: attention(*states)[0])


@layer("OpenNMT-py", GENERAL, needs={"onmt": MAKE}, more_reasons=one_width)
def opennmt_general(shape: Shape) -> Parts:
    attention = module("onmt.modules.global_attention").GlobalAttention(shape.A, attn_type="general")
    names = {"W_a": "linear_in.weight", "W_c": "linear_out.weight"}
    return Parts(attention, names, lambda memory: lambda query: attention(query, memory)[0], lambda *states: attention(*states)[0])


@layer("ESPnet", ADDITIVE, needs={"espnet": MAKE})
def espnet(shape: Shape) -> Parts:
    """With ``scaling=1`` where its users have 2, and the bias of ``gvec``, which no softmax sees, zero."""
    attention = module("espnet.nets.pytorch_backend.rnn.attentions").AttAdd(shape.D, shape.A, shape.A)
    lengths = torch.full((shape.B,), shape.S)

    def begin(memory: Tensor) -> Callable[[Tensor], Tensor]:
        attention.reset()
        return lambda query: attention(memory, lengths, query, None, scaling=1.0)[0]

    return Parts(attention, {"W_q": "mlp_dec.weight", "W_k": "mlp_enc.weight", "v": "gvec.weight"}, begin)


@layer("SpeechBrain", ADDITIVE, needs={"speechbrain": MAKE})
def speechbrain(shape: Shape) -> Parts:
    """Without the projection ``mlp_out`` of the context."""
    found = module("speechbrain.nnet.attention", without=("packaging", "soundfile", "torchaudio", "tqdm", "yaml"))
    attention = found.ContentBasedAttention(shape.D, shape.A, shape.A, shape.D)
    attention.mlp_out = nn.Identity()

    def begin(memory: Tensor) -> Callable[[Tensor], Tensor]:
        attention.reset()
        lengths = torch.full((shape.B,), shape.S, device=memory.device)
        return lambda query: attention(memory, lengths, query)[0]

    return Parts(attention, {"W_q": "mlp_dec.weight", "W_k": "mlp_enc.weight", "v": "mlp_attn.weight"}, begin)


@layer("AllenNLP", ADDITIVE, needs={"allennlp": MAKE})
def allennlp(shape: Shape) -> Parts:
    """It returns weights, of which ``weighted_sum`` makes the context; the keys are projected in every call."""
    without = ("base58", "cached_path", "dill", "lmdb", "spacy")
    attention = module("allennlp.modules.attention.additive_attention", without).AdditiveAttention(shape.A, shape.D)
    weighted_sum = module("allennlp.nn.util", without).weighted_sum
    names = {"W_q": "_w_matrix", "W_k": "_u_matrix", "v": "_v_vector"}
    return Parts(
        attention, names, lambda memory: lambda query: weighted_sum(memory, attention(query, memory)), transposed=("W_q", "W_k")
    )


@layer("d2l", ADDITIVE, needs={"d2l": MAKE})
def d2l(shape: Shape) -> Parts:
    """The keys are projected in every call."""
    without = ("IPython", "PIL", "matplotlib", "matplotlib_inline", "pandas", "requests", "scipy", "torchvision")
    attention = module("d2l.torch", without).AdditiveAttention(shape.A, dropout=0.0)

    def at_once(query: Tensor, memory: Tensor) -> Tensor:
        context: Tensor = attention(query, memory, memory, None)
        return context

    at_once(torch.empty(1, 1, shape.A), torch.empty(1, 1, shape.D))  # its projections take their widths from the first call
    names = {"W_q": "W_q.weight", "W_k": "W_k.weight", "v": "w_v.weight"}
    return Parts(attention, names, lambda memory: lambda query: at_once(query.unsqueeze(1), memory).squeeze(1), at_once)


@layer("Joey NMT", ADDITIVE, needs={"joeynmt": MAKE})
def joey_bahdanau(shape: Shape) -> Parts:
    attention = module("joeynmt.attention").BahdanauAttention(shape.A, shape.D, shape.A)
    names = {"W_q": "query_layer.weight", "W_k": "key_layer.weight", "v": "energy_layer.weight"}
    return Parts(attention, names, _joey(attention, shape))


@layer("Joey NMT", GENERAL, needs={"joeynmt": MAKE})
def joey_luong(shape: Shape) -> Parts:
    """It projects the memory, by the transposed matrix; its decoder makes the attentional vector, by a layer of its own."""
    attention = module("joeynmt.attention").LuongAttention(shape.A, shape.D)
    output, begin = nn.Linear(shape.D + shape.A, shape.A, bias=False), _joey(attention, shape)

    def begin_attentional(memory: Tensor) -> Callable[[Tensor], Tensor]:
        step = begin(memory)
        return lambda query: attentional(output, step(query), query)

    names = {"W_a": "0.key_layer.weight", "W_c": "1.weight"}
    return Parts(nn.ModuleList((attention, output)), names, begin_attentional, transposed=("W_a",))


def _joey(attention: Any, shape: Shape) -> Callable[[Tensor], Callable[[Tensor], Tensor]]:
    def begin(memory: Tensor) -> Callable[[Tensor], Tensor]:
        attention.compute_proj_keys(memory)
        mask = torch.ones(shape.B, 1, shape.S, dtype=torch.bool, device=memory.device)
        return lambda query: attention(query.unsqueeze(1), mask, memory)[0].squeeze(1)

    return begin
