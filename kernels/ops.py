"""The ops ``onepass::*`` on these kernels: one function per op, which says what launches of ``parts.py`` it is made of, and their table.

Nothing in either waits for the device or depends on what tensors hold, so that CUDA graphs can record it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from onepass.kernels.parts import OVER_QUERIES, OVER_SOURCE, accumulator, attend, attend_online, score_gradients, sums, tanh_sums
from onepass.kernels.tuning import tuned

CHUNK = 16  # queries, of which a multiple is taken at a time where weights are computed again


def additive_forward(
    query: Tensor, keys: Tensor, values: Tensor, v: Tensor, lengths: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    return attend(query, keys, values, v, 1.0, lengths, mask)


def additive_scores(query: Tensor, keys: Tensor, v: Tensor, lengths: Tensor | None, mask: Tensor | None) -> Tensor:
    return attend(query, keys, None, v, 1.0, lengths, mask)[1]


def multiplicative_forward(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, lengths: Tensor | None, mask: Tensor | None, keep_weights: bool
) -> tuple[Tensor, Tensor]:
    if keep_weights or keys.shape[-2] == 0:
        context, weights = attend(query, keys, values, None, scale, lengths, mask)
        return context, weights if keep_weights else weights.new_empty((0,))
    return attend_online(query, keys, values, scale, lengths, mask), query.new_empty((0,), dtype=accumulator(query.dtype))


def additive_backward(
    grad_context: Tensor | None,
    grad_weights: Tensor | None,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    v: Tensor,
    weights: Tensor,
    lengths: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, ...]:
    gradients = score_gradients(grad_context, grad_weights, values, weights, lengths, mask, by_source=True)
    grad_query, grad_keys, grad_v = tanh_sums(gradients, query, keys, v, lengths, mask)
    return grad_query, grad_keys, values_gradient(weights, grad_context, values, lengths, mask), grad_v


def values_gradient(weights: Tensor, grad_context: Tensor | None, values: Tensor, lengths: Tensor | None, mask: Tensor | None) -> Tensor:
    if grad_context is None:
        return values.new_zeros(values.shape)
    return sums(OVER_QUERIES, weights, grad_context, lengths, mask)


def additive_scores_backward(
    grad_scores: Tensor, query: Tensor, keys: Tensor, v: Tensor, lengths: Tensor | None, mask: Tensor | None, of_query: bool
) -> tuple[Tensor, ...]:
    # What arrives where nothing is visible does not count.
    gradients = score_gradients(None, grad_scores.to(accumulator(query.dtype)), keys, None, lengths, mask, of_weights=True, by_source=True)
    return tanh_sums(gradients, query, keys, v, lengths, mask, of_query=of_query)


def multiplicative_backward(
    grad_context: Tensor | None,
    grad_weights: Tensor | None,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    weights: Tensor,
    lengths: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, ...]:
    if weights.dim() == 1:
        return without_weights(grad_context, grad_weights, query, keys, values, scale, lengths, mask)
    gradients = score_gradients(grad_context, grad_weights, values, weights, lengths, mask)
    return (
        sums(OVER_SOURCE, gradients, keys, lengths, mask, scale),
        sums(OVER_QUERIES, gradients, query, lengths, mask, scale),
        values_gradient(weights, grad_context, values, lengths, mask),
    )


def without_weights(
    grad_context: Tensor | None,
    grad_weights: Tensor | None,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    lengths: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, ...]:
    """:func:`multiplicative_backward` where weights are computed again, for as many queries at a time as take no more memory than keys and
    values; what keys and values get is added up in the queries' order."""
    T, count = query.shape[-2], max(CHUNK, (keys.shape[-1] + values.shape[-1]) // 2 // CHUNK * CHUNK)
    grad_query = query.new_empty(query.shape)
    of_source: list[Tensor] = []
    for t in range(0, max(T, 1), count):
        some = slice(t, t + count)
        limits = lengths[:, some] if lengths is not None and lengths.dim() > 1 else lengths
        shown = None if mask is None else mask[..., some, :]
        context, more = (None if gradient is None else gradient[..., some, :] for gradient in (grad_context, grad_weights))
        rows = query[..., some, :]
        weights = attend(rows, keys, values[..., :0], None, scale, limits, shown)[1]
        gradients = score_gradients(context, more, values, weights, limits, shown)
        grad_query[..., some, :] = sums(OVER_SOURCE, gradients, keys, limits, shown, scale)
        parts = [sums(OVER_QUERIES, gradients, rows, limits, shown, scale, wide=True)]
        if context is not None:
            parts.append(sums(OVER_QUERIES, weights, context, limits, shown, wide=True))
        of_source = [total.add_(part) for total, part in zip(of_source, parts, strict=True)] if of_source else parts
    grad_keys, *of_values = (total.to(keys.dtype) for total in of_source)
    return grad_query, grad_keys, of_values[0] if of_values else values.new_zeros(values.shape)


def several(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    """What belongs to one query of a memory, with the dimension of several."""
    return tensor.unsqueeze(-2) if tensor is not None and tensor.dim() < like.dim() else tensor


def additive_step(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    v: Tensor,
    exponentials: Tensor,
    sizes: Tensor,
    weighting: Tensor,
    lengths: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """On a GPU a step reads the keys themselves: their exponentials cost less than what it waits for."""
    rows = several(query, keys)
    assert rows is not None
    context, weights = attend(rows, keys, values, v, 1.0, lengths, mask)
    return context.view(*query.shape[:-1], values.shape[-1]), weights.view(*query.shape[:-1], keys.shape[-2])


def additive_step_scores(
    query: Tensor,
    keys: Tensor,
    v: Tensor,
    exponentials: Tensor,
    sizes: Tensor,
    weighting: Tensor,
    lengths: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    return step_scores(query, keys, v, 1.0, lengths, mask)


def multiplicative_step_scores(query: Tensor, keys: Tensor, scale: float, lengths: Tensor | None, mask: Tensor | None) -> Tensor:
    return step_scores(query, keys, None, scale, lengths, mask)


def step_scores(query: Tensor, keys: Tensor, v: Tensor | None, scale: float, lengths: Tensor | None, mask: Tensor | None) -> Tensor:
    rows = several(query, keys)
    assert rows is not None
    return attend(rows, keys, None, v, scale, lengths, mask)[1].view(*query.shape[:-1], keys.shape[-2])


def multiplicative_step(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, lengths: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    rows = several(query, keys)
    assert rows is not None
    context, weights = attend(rows, keys, values, None, scale, lengths, mask)
    return context.view(*query.shape[:-1], values.shape[-1]), weights.view(*query.shape[:-1], keys.shape[-2])


def step_score_gradients(
    grad_context: Tensor | None,
    grad_weights: Tensor | None,
    values: Tensor,
    weights: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    arriving, rows = several(grad_weights, values), several(weights, values)
    return score_gradients(several(grad_context, values), arriving, values, rows, lengths, mask, of_weights=weights is None)


def additive_step_backward(
    grad_context: Tensor | None,
    grad_weights: Tensor | None,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    exponentials: Tensor,
    sizes: Tensor,
    weighting: Tensor,
    weights: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    gradients = step_score_gradients(grad_context, grad_weights, values, weights, lengths, mask)
    rows = several(query, keys)
    assert rows is not None
    grad_query, _, _ = tanh_sums(gradients, rows, keys, weighting, lengths, mask, of_source=False)
    return grad_query.view(query.shape), gradients.view(*query.shape[:-1], keys.shape[-2])


def multiplicative_step_backward(
    grad_context: Tensor | None,
    grad_weights: Tensor | None,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    weights: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    gradients = step_score_gradients(grad_context, grad_weights, values, weights, lengths, mask)
    grad_query = sums(OVER_SOURCE, gradients, keys, lengths, mask, scale, query.dtype)
    return grad_query.view(query.shape), gradients.view(*query.shape[:-1], keys.shape[-2]).mul_(scale)


def source_sums(weights: Tensor, rows: Tensor, lengths: Tensor | None, mask: Tensor | None) -> Tensor:
    return sums(OVER_QUERIES, weights, rows, lengths, mask)


def weighted_values(weights: Tensor, values: Tensor, lengths: Tensor | None, mask: Tensor | None) -> Tensor:
    rows = several(weights, values)
    assert rows is not None
    return sums(OVER_SOURCE, rows, values, lengths, mask, 1.0, weights.dtype).view(*weights.shape[:-1], values.shape[-1])


def weighted_values_backward(grad_context: Tensor, values: Tensor, lengths: Tensor | None, mask: Tensor | None) -> Tensor:
    gradients = score_gradients(several(grad_context, values), None, values, None, lengths, mask, of_weights=True)
    return gradients.view(*grad_context.shape[:-1], values.shape[-2]).to(grad_context.dtype)


def stack_steps(steps: list[Tensor], several: bool) -> Tensor:
    return torch.cat(steps, -2) if several else torch.stack(steps, -2)


OPS: dict[str, Callable[..., Any]] = {
    function.__name__: tuned(function)
    for function in (
        additive_forward, additive_backward, additive_scores, additive_scores_backward, multiplicative_forward, multiplicative_backward,
        additive_step, additive_step_scores, additive_step_backward, multiplicative_step, multiplicative_step_scores,
        multiplicative_step_backward, source_sums, weighted_values, weighted_values_backward, stack_steps,
    )
}  # fmt: skip
