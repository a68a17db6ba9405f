"""The formulae in plain torch: what every kernel is checked against, and what runs where nothing compiled is there.

Shapes: ``B`` batch, ``H`` heads (optional), ``T`` queries, ``S`` source positions, ``A`` attention width, ``D`` value width.
Each function has the signature of its namesake in :mod:`onepass`, without ``backend``. They materialise what the kernels avoid, a
``[B, T, S, A]`` tensor in the additive case, and are as slow and as large as that suggests.
"""

import torch
from torch import Tensor


def visible_positions(
    keys: Tensor, steps: int, lengths: Tensor | None, mask: Tensor | None, spans: Tensor | None = None
) -> Tensor | None:
    """Which source positions each query sees: boolean, broadcastable to ``[B, (H,) T, S]``; None where all are seen."""
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


def _check_range(name: str, numbers: Tensor, source: int) -> None:
    if numbers.numel() and not torch.compiler.is_compiling() and not 0 <= int(numbers.min()) <= int(numbers.max()) <= source:
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
    visible = visible_positions(keys, query.shape[-2], lengths, mask, spans)
    keys = without_unseen(keys, visible)
    column = v[:, None] if v.dim() == 1 else v[:, None, :, None]
    scores = (torch.tanh(query.unsqueeze(-2) + keys.unsqueeze(-3)) @ column).squeeze(-1)
    return scores if visible is None else scores.masked_fill(~visible, float("-inf"))


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
    visible = visible_positions(keys, query.shape[-2], lengths, mask, spans)
    scores = additive_scores(query, keys, v, lengths=lengths, mask=mask, spans=spans)
    return attend(scores, values, visible, need_weights)


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
    visible = visible_positions(keys, query.shape[-2], lengths, mask, spans)
    scores = scale * (query @ without_unseen(keys, visible).transpose(-1, -2))
    return attend(scores, values, visible, need_weights)


def weighted_values(weights: Tensor, values: Tensor, visible: Tensor | None) -> Tensor:
    """``sum_s weights[t, s] values[s]`` over the visible positions; whatever else is in ``weights`` is taken as 0."""
    if visible is None:
        return weights @ values
    return weights.masked_fill(~visible, 0.0) @ without_unseen(values, visible)


def attend(scores: Tensor, values: Tensor, visible: Tensor | None, need_weights: bool) -> tuple[Tensor, Tensor | None]:
    """Softmax over the visible scores and the weighted sum of the values; a row that sees nothing gives zeros."""
    if visible is None:
        weights = torch.softmax(scores, -1)
    else:
        sees_nothing = ~visible.any(-1, keepdim=True)
        scores = scores.masked_fill(~visible & ~sees_nothing, float("-inf")).masked_fill(sees_nothing, 0.0)
        weights = torch.softmax(scores, -1).masked_fill(~visible, 0.0)
        values = without_unseen(values, visible)
    return weights @ values, weights if need_weights else None


def without_unseen(rows: Tensor, visible: Tensor | None) -> Tensor:
    """Source rows that no query sees, set to zero: whatever the padding holds, NaN included, must not reach a result."""
    return rows if visible is None else rows.masked_fill(~visible.any(-2)[..., None], 0.0)
