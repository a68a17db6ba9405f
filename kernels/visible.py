"""Which source positions a tile of queries sees.

``LIMITS`` is the rank of the ops' argument ``lengths``, 0 without one: ``[B]``, ``[B, T]`` or, as spans, ``[B, T, 2]``, int64. They may lie
anywhere: here they are clamped to ``[0, S]``. ``MASK`` says whether there is a mask ``[B, H, T, S]``.
"""

import triton
import triton.language as tl


@triton.jit
def window(p_limits, limits_b, limits_t, i_b, o_t, T, S, LIMITS: tl.constexpr):
    """The first position that each query sees, and the one after the last; an empty window for queries beyond ``T``."""
    m_t = o_t < T
    first = tl.zeros_like(o_t)
    if LIMITS == 0:
        last = tl.where(m_t, S, 0)
    elif LIMITS == 1:
        last = tl.where(m_t, tl.minimum(tl.maximum(tl.load(p_limits + i_b * limits_b), 0), S).to(tl.int32), 0)
    else:
        p_rows = p_limits + i_b * limits_b + o_t.to(tl.int64) * limits_t
        if LIMITS == 3:
            first = tl.minimum(tl.maximum(tl.load(p_rows, m_t, 0), 0), S).to(tl.int32)
            p_rows += 1
        last = tl.minimum(tl.maximum(tl.load(p_rows, m_t, 0), 0), S).to(tl.int32)
    return first, last


@triton.jit
def visible(first, last, p_mask, mask_t, mask_s, o_t, o_s, T, S, MASK: tl.constexpr):
    """Whether each query sees each position, ``[BT, BS]``. ``p_mask`` points to the batch and head."""
    seen = (first[:, None] <= o_s[None, :]) & (o_s[None, :] < last[:, None])
    if MASK:
        p_tile = p_mask + o_t.to(tl.int64)[:, None] * mask_t + o_s.to(tl.int64)[None, :] * mask_s
        seen = seen & (tl.load(p_tile, seen, 0) != 0)
    return seen
