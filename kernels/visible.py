"""Which source positions a tile of queries sees.

``LIMITS`` is the rank of the ops' argument ``lengths``, 0 without one: ``[B]``, ``[B, T]`` or, as spans, ``[B, T, 2]``, int64. They may lie
anywhere: here they are clamped to ``[0, S]``. ``MASK`` says whether there is a mask ``[B, H, T, S]``.
"""

import triton
import triton.language as tl

from onepass.kernels.arithmetic import multiply_add, spread, wide


@triton.jit
def window(p_limits, limits_b, limits_t, i_b, o_t, T, S, LIMITS: tl.constexpr):
    """The first position that each query sees and the one after the last: numbers where they are the same for all, else ``[BT]``."""
    if LIMITS == 0:
        return 0, S
    elif LIMITS == 1:
        return 0, tl.minimum(tl.maximum(tl.load(p_limits + i_b * limits_b), 0), S).to(tl.int32)
    else:
        p_rows = p_limits + i_b * limits_b + o_t.to(tl.int64) * limits_t
        m_t = o_t < T
        if LIMITS == 2:
            return tl.zeros_like(o_t), spread(tl.minimum(tl.maximum(tl.load(p_rows, m_t, 0), 0), S).to(tl.int32))
        else:
            first = tl.minimum(tl.maximum(tl.load(p_rows, m_t, 0), 0), S).to(tl.int32)
            return spread(first), spread(tl.minimum(tl.maximum(tl.load(p_rows + 1, m_t, 0), 0), S).to(tl.int32))


@triton.jit
def reach(first, last, S, LIMITS: tl.constexpr):
    """From where to where the queries of a tile see anything."""
    if LIMITS < 2:
        return first, last
    else:
        return tl.min(tl.where(first < last, first, S), 0), tl.max(tl.where(first < last, last, 0), 0)


@triton.jit
def visible(first, last, p_mask, mask_t, mask_s, o_t, o_s, T, LIMITS: tl.constexpr, MASK: tl.constexpr):
    """Whether each query sees each position: ``[BT, BS]``, or ``[1, BS]`` for all. ``p_mask`` points to the batch and head."""
    if LIMITS < 2:
        seen = (o_s < last)[None, :]
    else:
        seen = (first[:, None] <= o_s[None, :]) & (o_s[None, :] < last[:, None])
    if MASK:
        seen = seen & (o_t < T)[:, None]
        p_tile = p_mask + o_t.to(tl.int64)[:, None] * mask_t + o_s.to(tl.int64)[None, :] * mask_s
        seen = seen & (tl.load(p_tile, seen, 0) != 0)
    return seen


@triton.jit
def add_rows(b_w, sees, b_rows, total, LIMITS: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr):
    """``total + b_w @ b_rows``, where what is not finite in a row reaches only those that see it, as their weights of 0 cannot hide it."""
    if LIMITS > 1 or MASK:
        bad = (tl.abs(wide(b_rows)) < float("inf")) == 0
        if tl.max(tl.max(bad.to(tl.int32), 1), 0) > 0:
            # 256 times how many such factors each sum meets, and the sum of the signs of their products, which is as many where all agree.
            dtype = b_rows.dtype
            signs = tl.where(wide(b_w) > 0.0, 1.0, tl.where(wide(b_w) < 0.0, -1.0, 0.0)).to(dtype)
            row_signs = tl.where(bad, tl.where(wide(b_rows) > 0.0, 1.0, tl.where(wide(b_rows) < 0.0, -1.0, 0.0)), 0.0).to(dtype)
            marks = tl.where(bad, 1.0, 0.0).to(dtype)
            met = multiply_add(tl.where(sees, 256.0, 0.0).to(dtype), marks, tl.zeros_like(total), PRECISION, UNIT)
            met = multiply_add(signs, row_signs, met, PRECISION, UNIT)
            count = tl.floor((met + 128.0) * 0.00390625)
            sign = met - 256.0 * count
            ends = tl.where(sign == count, float("inf"), tl.where(sign == -count, float("-inf"), float("nan")))
            total += tl.where(count == 0.0, 0.0, ends)
            b_rows = tl.where(bad, tl.zeros_like(b_rows), b_rows)
    return multiply_add(b_w, b_rows, total, PRECISION, UNIT)


@triton.jit
def bounded(b_rows):
    """The rows with 0 for what is not finite in them, and in which of them that was: a weight of 0 could not hide it."""
    finite = tl.abs(wide(b_rows)) < float("inf")
    return tl.where(finite, b_rows, tl.zeros_like(b_rows)), tl.max((finite == 0).to(tl.int32), 1)


@triton.jit
def add_unbounded(b_w, sees, b_row, total):
    """``total + b_w b_row`` of what is not finite in one row ``[1, BD]``, for those that see it: ``b_w`` and ``sees [BT, 1]``."""
    finite = tl.abs(wide(b_row)) < float("inf")
    return total + tl.where(sees & (finite == 0), wide(b_w.to(b_row.dtype)) * wide(b_row), 0.0)


@triton.jit
def any_of(seen, AXIS: tl.constexpr):
    return tl.max(seen.to(tl.int32), AXIS) > 0
