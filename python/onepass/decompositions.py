"""The forward ops ``onepass::*`` in plain torch: for ONNX, and for compilers and devices that know no ops but torch's own.

    program = torch.export.export(model, inputs)
    torch.onnx.export(program.run_decompositions(onepass.decompositions.table()), f="model.onnx")

Layers, memories and whole decoders stay as they are. The formulae are those of :mod:`onepass.reference`, and as large.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from onepass import reference
from onepass._autograd import accumulator, prepared_like
from onepass._library import NAMESPACES

Op = Callable[..., Any]


def table() -> dict[OpOverload, Op]:
    """For ``ExportedProgram.run_decompositions``, which takes no others beside them then. The ops of backwards are not among them: export
    in evaluation mode, or under ``torch.no_grad()``."""
    return {getattr(getattr(torch.ops, namespace), op.__name__).default: op for namespace in NAMESPACES for op in _OPS}


def _visible(keys: Tensor, steps: int, limits: Tensor | None, mask: Tensor | None) -> Tensor | None:
    lengths, spans = (None, limits) if limits is not None and limits.dim() == 3 else (limits, None)
    return reference.visible_positions(keys, steps, lengths, mask, spans)


def _several(tensor: Tensor, like: Tensor) -> Tensor:
    """What belongs to one query per source, with the dimension of several."""
    return tensor if tensor.dim() == like.dim() else tensor.unsqueeze(-2)


def _seen_scores(query: Tensor, keys: Tensor, v: Tensor | None, scale: float, visible: Tensor | None) -> Tensor:
    keys = keys.to(query.dtype)
    return reference.multiplicative_scores(query, keys, scale, visible) if v is None else reference.seen_scores(query, keys, v, visible)


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, v: Tensor | None, scale: float, limits: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Of one query per source, or of several."""
    rows = _several(query, keys)
    visible = _visible(keys, rows.shape[-2], limits, mask)
    context, weights = reference.attend(_seen_scores(rows, keys, v, scale, visible), values.to(query.dtype), visible, True)
    assert weights is not None
    sizes = query.shape[:-1]
    return context.reshape(*sizes, values.shape[-1]), weights.reshape(*sizes, keys.shape[-2]).to(accumulator(query.dtype))


def _scores(query: Tensor, keys: Tensor, v: Tensor | None, scale: float, limits: Tensor | None, mask: Tensor | None) -> Tensor:
    """Of one query per source, or of several."""
    rows = _several(query, keys)
    scores = _seen_scores(rows, keys, v, scale, _visible(keys, rows.shape[-2], limits, mask))
    return scores.reshape(*query.shape[:-1], keys.shape[-2])


def additive_forward(
    query: Tensor, keys: Tensor, values: Tensor, v: Tensor, lengths: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _attend(query, keys, values, v, 1.0, lengths, mask)


def additive_scores(query: Tensor, keys: Tensor, v: Tensor, lengths: Tensor | None, mask: Tensor | None) -> Tensor:
    return _scores(query, keys, v, 1.0, lengths, mask)


def multiplicative_forward(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, lengths: Tensor | None, mask: Tensor | None, keep_weights: bool
) -> tuple[Tensor, Tensor]:
    context, weights = _attend(query, keys, values, None, scale, lengths, mask)
    return context, weights if keep_weights else weights.new_empty(0)


def additive_prepare(keys: Tensor, v: Tensor, lengths: Tensor | None, mask: Tensor | None, half: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Nothing: the steps below read the keys."""
    exponentials, sizes, weighting = (torch.zeros_like(tensor) for tensor in prepared_like(keys, v, lengths, mask, half))
    return exponentials, sizes, weighting


def additive_step(query: Tensor, keys: Tensor, values: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *_, lengths, mask = rest  # after what was prepared
    return _attend(query, keys, values, v, 1.0, lengths, mask)


def additive_step_scores(query: Tensor, keys: Tensor, v: Tensor, *rest: Any) -> Tensor:
    *_, lengths, mask = rest  # after what was prepared
    return _scores(query, keys, v, 1.0, lengths, mask)


def multiplicative_step(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, lengths: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _attend(query, keys, values, None, scale, lengths, mask)


def multiplicative_step_scores(query: Tensor, keys: Tensor, scale: float, lengths: Tensor | None, mask: Tensor | None) -> Tensor:
    return _scores(query, keys, None, scale, lengths, mask)


def weighted_values(weights: Tensor, values: Tensor, lengths: Tensor | None, mask: Tensor | None) -> Tensor:
    rows = _several(weights, values)
    context = reference.weighted_values(rows, values.to(weights.dtype), _visible(values, rows.shape[-2], lengths, mask))
    return context.reshape(*weights.shape[:-1], values.shape[-1])


_OPS: tuple[Op, ...] = (
    additive_forward, additive_scores, multiplicative_forward, additive_prepare, additive_step, additive_step_scores, multiplicative_step,
    multiplicative_step_scores, weighted_values,
)  # fmt: skip
