"""The formulae in plain torch: what every kernel is checked against, and what runs where nothing compiled is there.

Shapes: ``B`` batch, ``H`` heads (optional), ``T`` queries, ``S`` source positions, ``A`` attention width, ``D`` value width.
Each function has the signature of its namesake in :mod:`onepass`, without ``backend``. They materialise what the kernels avoid, a
``[B, T, S, A]`` tensor in the additive case, and are as slow and as large as that suggests.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch._C import _functorch

from onepass._validate import Inputs, check_inputs, check_scale


def visible_positions(keys: Tensor, steps: int, lengths: Tensor | None, mask: Tensor | None, spans: Tensor | None = None) -> Tensor | None:
    """Which source positions each query sees, of arguments in canonical form: boolean ``[B, (H,) T, S]``, or None where all are seen."""
    source = keys.shape[-2]
    visible = None
    if lengths is not None:
        _check_range("lengths", lengths, source)
        per_query = lengths if lengths.dim() == 2 else lengths[:, None]
        visible = torch.arange(source, device=keys.device) < per_query[..., None]  # [B, T or 1, S]
        if keys.dim() == 4:
            visible = visible.unsqueeze(1)
    if spans is not None:
        _check_range("spans", spans, source)
        positions = torch.arange(source, device=keys.device)
        within = (spans[..., :1] <= positions) & (positions < spans[..., 1:])  # [B, T, S]
        if keys.dim() == 4:
            within = within.unsqueeze(1)
        visible = within if visible is None else visible & within
    if mask is not None:
        visible = mask if visible is None else visible & mask
    return None if visible is None else visible.expand(*keys.shape[:-2], steps, source)


def visible_to(inputs: Inputs) -> Tensor | None:
    """:func:`visible_positions` of a call."""
    return visible_positions(inputs.keys, inputs.query.shape[-2], inputs.lengths, inputs.mask, inputs.spans)


def _blind(tensor: Tensor) -> bool:
    """Whether nobody may look at its numbers: in compiled and transformed code, and where it has none."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or tensor.is_meta


def _check_range(name: str, numbers: Tensor, source: int) -> None:
    unknown = torch.compiler.is_compiling() or numbers.is_meta or _functorch.is_batchedtensor(numbers)
    if unknown or not numbers.numel():
        return
    if not 0 <= int(numbers.min()) <= int(numbers.max()) <= source:
        raise RuntimeError(f"{name} must lie in [0, {source}], got {int(numbers.min())} to {int(numbers.max())}")


def additive_scores(
    query: Tensor,
    keys: Tensor,
    v: Tensor,
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    spans: Tensor | None = None,
) -> Tensor:
    """``score[t, s] = v . tanh(q[t] + k[s])`` (Bahdanau et al. 2015, appendix A.1.2); ``-inf`` where not visible."""
    return additive_scores_of(check_inputs(query, keys, None, v, lengths, mask, spans, lacks="values"), v)


def additive_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    v: Tensor,
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    spans: Tensor | None = None,
    need_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Softmax of :func:`additive_scores`, then the context ``sum_s weights[t, s] values[s]`` (equations 5 and 6)."""
    return additive_attention_of(check_inputs(query, keys, values, v, lengths, mask, spans), values, v, need_weights)


def multiplicative_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float = 1.0,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    spans: Tensor | None = None,
    need_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``score[t, s] = scale * q[t] . k[s]`` (Luong et al. 2015, equation 8), softmax (7) and context."""
    inputs = check_inputs(query, keys, values, None, lengths, mask, spans, lacks="v")
    return multiplicative_attention_of(inputs, values, check_scale(scale), need_weights)


def additive_scores_of(inputs: Inputs, v: Tensor) -> Tensor:
    """:func:`additive_scores` of arguments that are checked."""
    return inputs.output(seen_scores(inputs.query, inputs.keys, v, visible_to(inputs)))


def additive_attention_of(inputs: Inputs, values: Tensor, v: Tensor, need_weights: bool) -> tuple[Tensor, Tensor | None]:
    """:func:`additive_attention` of arguments that are checked."""
    visible = visible_to(inputs)
    context, weights = attend(seen_scores(inputs.query, inputs.keys, v, visible), values, visible, need_weights)
    return inputs.output(context), None if weights is None else inputs.output(weights)


def multiplicative_attention_of(inputs: Inputs, values: Tensor, scale: float, need_weights: bool) -> tuple[Tensor, Tensor | None]:
    """:func:`multiplicative_attention` of arguments that are checked."""
    visible = visible_to(inputs)
    context, weights = attend(multiplicative_scores(inputs.query, inputs.keys, scale, visible), values, visible, need_weights)
    return inputs.output(context), None if weights is None else inputs.output(weights)


def seen_scores(query: Tensor, keys: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """``v . tanh(q[t] + k[s])``; ``-inf`` where not visible."""
    column = v[:, None] if v.dim() == 1 else v[:, None, :, None]
    sums = query.unsqueeze(-2) + keys.unsqueeze(-3)  # [B, (H,) T, S, A]
    if visible is None:
        return (torch.tanh(sums) @ column).squeeze(-1)
    scores = torch.tanh(sums.masked_fill(~visible[..., None], 0.0)) @ column
    return scores.squeeze(-1).masked_fill(~visible, float("-inf"))


def multiplicative_scores(query: Tensor, keys: Tensor, scale: float, visible: Tensor | None) -> Tensor:
    """``scale * q[t] . k[s]``; ``-inf`` where not visible."""
    scores = scale * _over_seen(lambda rows, columns: rows @ columns.transpose(-1, -2), query, keys, visible)
    return scores if visible is None else scores.masked_fill(~visible, float("-inf"))


def weighted_values(weights: Tensor, values: Tensor, visible: Tensor | None) -> Tensor:
    """``sum_s weights[t, s] values[s]`` over the visible positions; whatever else is in ``weights`` is taken as 0."""
    return _over_seen(torch.matmul, weights if visible is None else weights.masked_fill(~visible, 0.0), values, visible)


def attend(scores: Tensor, values: Tensor, visible: Tensor | None, need_weights: bool) -> tuple[Tensor, Tensor | None]:
    """Softmax over the visible scores and the weighted sum of the values; a row that sees nothing gives zeros."""
    if visible is None:
        weights = torch.softmax(scores, -1)
    else:
        sees_nothing = ~visible.any(-1, keepdim=True)
        scores = scores.masked_fill(~visible & ~sees_nothing, float("-inf")).masked_fill(sees_nothing, 0.0)
        weights = torch.softmax(scores, -1).masked_fill(~visible, 0.0)
    return weighted_values(weights, values, visible), weights if need_weights else None


def without_unseen(rows: Tensor, visible: Tensor | None) -> Tensor:
    """Source rows that no query sees, set to zero: whatever the padding holds, NaN included, must not reach a result."""
    return rows if visible is None else rows.masked_fill(~visible.any(-2)[..., None], 0.0)


def _over_seen(product: Callable[[Tensor, Tensor], Tensor], left: Tensor, right: Tensor, visible: Tensor | None) -> Tensor:
    """``product(left, right)`` of queries' rows and source rows, in which no query takes anything from a source row that it does not see.

    Where all is finite, a factor of 0 is enough for that. But ``0 * NaN`` is NaN: queries that have or see such numbers get products of
    their own, with zeros for what they do not see. Compiled and transformed functions, which cannot look at numbers, have plain products.
    """
    right = without_unseen(right, visible)
    if visible is None or _blind(right) or (left.isfinite().all() and right.isfinite().all()):
        return product(left, right)
    spoilt = ~right.isfinite().all(-1)  # [B, (H,) S]
    apart = (~left.isfinite().all(-1) | (visible & spoilt.unsqueeze(-2)).any(-1)).unsqueeze(-1)  # [B, (H,) T, 1]
    together = product(left.masked_fill(apart, 0.0), right.masked_fill(spoilt.unsqueeze(-1), 0.0))
    as_seen = right.unsqueeze(-3).masked_fill(~visible.unsqueeze(-1), 0.0)  # [B, (H,) T, S, W]
    return torch.where(apart, product(left.unsqueeze(-2), as_seen).squeeze(-2), together)
