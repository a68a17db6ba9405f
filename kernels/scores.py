"""Scores of a tile of queries and source positions, ``[BT, BS]``: additive (Bahdanau et al. 2015, appendix A.1.2), multiplicative (Luong
et al. 2015, equation 8).

Additive scores use ``tanh(q + k) = 1 - 2r`` with ``r = 1 / (1 + e^(2q) e^(2k))``: exponentials are taken of rows, not of pairs, and four
reciprocals merge into one. With ``u = 1 / v`` folded into the denominators ``d = u + u e^(2q) e^(2k)`` they merge one after another:
``1 / d0 + 1 / d1 = (d0 + d1) / (d0 d1)``, ``n / p + 1 / d = (n d + p) / (p d)``. Where such a product could leave float32, the tile is
computed without merging.
"""

import triton
import triton.language as tl

from onepass.kernels.arithmetic import LOG2_E, SMALL, exponential, hyperbolic_tangent, multiply_add, reciprocal, spread, times, wide

BLANK = tl.constexpr(2.0**-12)  # what a channel whose v is 0 is computed with, at e^(2k) = 0, so that it adds a constant
BLANK_BITS = tl.constexpr(12.0)
BITS = tl.constexpr(122.0)  # of float32's 127, which the product of four denominators may take: their sums of products take more
WIDEST = tl.constexpr(20.0)  # |q| + |k| beyond which exponentials are not multiplied


@triton.jit
def weighting(p_v, A):
    """``sum v``; the power of 2 that brings v below 2, and its inverse; how many channels, up to a multiple of 4, have v = 0; and up to
    which ``|q| + |k|`` four reciprocals merge."""
    o_a = tl.arange(0, 64)[:, None] * 4 + tl.arange(0, 4)[None, :]
    total = 0.0
    largest = 0.0
    for a in range(0, A, 256):
        b_v = wide(tl.load(p_v + a + o_a, a + o_a < A, 0.0))  # [64, 4]
        total += tl.sum(tl.sum(b_v, 1), 0)
        largest = tl.maximum(largest, tl.max(tl.max(tl.abs(tl.where(b_v == b_v, b_v, float("inf"))), 1), 0))
    exponent = largest.to(tl.int32, bitcast=True) & 0x7F800000
    scale = (0x7F000000 - exponent).to(tl.float32, bitcast=True)
    unscale = exponent.to(tl.float32, bitcast=True)
    blanks = 0.0
    most_bits = 0.0
    for a in range(0, A, 256):
        b_v = tl.abs(wide(tl.load(p_v + a + o_a, a + o_a < A, 0.0))) * scale
        group = a + tl.arange(0, 64) * 4 < A
        blank = b_v == 0.0
        bits = tl.where(blank, BLANK_BITS, -tl.log2(tl.where(blank, 1.0, b_v)))
        blanks += tl.sum(tl.where(group, tl.sum(tl.where(blank, 1.0, 0.0), 1), 0.0), 0)
        most_bits = tl.maximum(most_bits, tl.max(tl.where(group, tl.sum(bits, 1), 0.0), 0))
    limit = tl.minimum(((BITS - most_bits) * 0.25 - 1.0) / (2.0 * LOG2_E), WIDEST)
    return total, scale, unscale, blanks, tl.where((largest > 1e-30) & (largest < 1e30), limit, -1.0)


@triton.jit
def channels(x, N: tl.constexpr):
    """The columns of ``[N, 4]``."""
    even, odd = tl.split(tl.reshape(x, (N, 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def add_reciprocals(sums, d0, d1, d2, d3, UNIT: tl.constexpr):
    """``sums + 1 / d0 + 1 / d1 + 1 / d2 + 1 / d3``."""
    d01 = d0 * d1
    d012 = d01 * d2
    return tl.fma(tl.fma(tl.fma(d0 + d1, d2, d01), d3, d012), reciprocal(d012 * d3, UNIT), sums)


@triton.jit
def channel_sums(p_q, p_k, p_v, v_scale, A, BT: tl.constexpr, BS: tl.constexpr, EVEN: tl.constexpr, MERGE: tl.constexpr,
                 ACC: tl.constexpr, UNIT: tl.constexpr):  # fmt: skip
    """With MERGE ``sum_a v r`` of scaled v with its blanks, else the score, exact for all finite q and k and for others what the formula
    gives; and the largest ``|q|`` and ``|k|`` of each row. ``p_q [BT]`` and ``p_k [BS]`` point to rows."""
    o_c = tl.arange(0, 4)
    sums = tl.zeros((BT, BS), ACC)
    top_q = tl.zeros((BT, 4), ACC)
    top_k = tl.zeros((BS, 4), ACC)
    for a in range(0, A, 4):
        if EVEN:
            b_q = wide(tl.load(p_q[:, None] + (a + o_c)[None, :]))  # [BT, 4]
            b_k = wide(tl.load(p_k[:, None] + (a + o_c)[None, :]))  # [BS, 4]
            b_v = wide(tl.load(p_v + a + o_c))
        else:
            b_q = wide(tl.load(p_q[:, None] + (a + o_c)[None, :], (a + o_c < A)[None, :], 0.0))
            b_k = wide(tl.load(p_k[:, None] + (a + o_c)[None, :], (a + o_c < A)[None, :], 0.0))
            b_v = wide(tl.load(p_v + a + o_c, a + o_c < A, 0.0))
        if MERGE:
            top_q = tl.maximum(top_q, tl.abs(b_q))
            top_k = tl.maximum(top_k, tl.abs(b_k))
            b_v *= v_scale
            inverse = reciprocal(b_v, UNIT)
            inverse = tl.fma(inverse, tl.fma(-inverse, b_v, 1.0), inverse)
            b_q = exponential(b_q, 2.0, UNIT)
            b_k = tl.where(b_v == 0.0, 0.0, inverse)[None, :] * exponential(b_k, 2.0, UNIT)
            b_v = tl.where(b_v == 0.0, 1.0 / BLANK, inverse)
        q0, q1, q2, q3 = channels(b_q, BT)
        k0, k1, k2, k3 = channels(b_k, BS)
        v0, v1, v2, v3 = channels(tl.broadcast_to(b_v[None, :], (BS, 4)), BS)
        if MERGE:
            d0 = tl.fma(q0[:, None], k0[None, :], tl.broadcast_to(v0[None, :], (BT, BS)))
            d1 = tl.fma(q1[:, None], k1[None, :], tl.broadcast_to(v1[None, :], (BT, BS)))
            d2 = tl.fma(q2[:, None], k2[None, :], tl.broadcast_to(v2[None, :], (BT, BS)))
            d3 = tl.fma(q3[:, None], k3[None, :], tl.broadcast_to(v3[None, :], (BT, BS)))
            sums = add_reciprocals(sums, d0, d1, d2, d3, UNIT)
        else:
            sums += v0[None, :] * hyperbolic_tangent(q0[:, None] + k0[None, :], UNIT)
            sums += v1[None, :] * hyperbolic_tangent(q1[:, None] + k1[None, :], UNIT)
            sums += v2[None, :] * hyperbolic_tangent(q2[:, None] + k2[None, :], UNIT)
            sums += v3[None, :] * hyperbolic_tangent(q3[:, None] + k3[None, :], UNIT)
    return sums, tl.max(top_q, 1), tl.max(top_k, 1)


@triton.jit
def additive_scores(p_q, p_k, p_v, weights_of_v, A, BT: tl.constexpr, BS: tl.constexpr, EVEN: tl.constexpr, DIRECT: tl.constexpr,
                    ACC: tl.constexpr, UNIT: tl.constexpr):  # fmt: skip
    """``v . tanh(q + k)`` of rows ``p_q [BT]`` and ``p_k [BS]``."""
    if DIRECT:
        scores, _, _ = channel_sums(p_q, p_k, p_v, 1.0, A, BT, BS, EVEN, False, ACC, UNIT)
    else:
        total, scale, unscale, blanks, limit = weights_of_v
        sums, top_q, top_k = channel_sums(p_q, p_k, p_v, scale, A, BT, BS, EVEN, True, ACC, UNIT)
        scores = tl.fma(sums - blanks * BLANK, -2.0 * unscale, total)
        if not ((tl.max(top_q, 0) + tl.max(top_k, 0) <= limit) & (tl.min(top_q, 0) + tl.min(top_k, 0) >= SMALL)):
            exact, _, _ = channel_sums(p_q, p_k, p_v, 1.0, A, BT, BS, EVEN, False, ACC, UNIT)
            # Pair by pair, so that a key changes no bit of a query that does not see it.
            top = spread(top_q)[:, None] + spread(top_k)[None, :]
            scores = tl.where((top >= SMALL) & (top <= limit), scores, exact)
    return scores


@triton.jit
def multiplicative_scores(p_q, p_k, scale, A, BT: tl.constexpr, BS: tl.constexpr, BA: tl.constexpr, ACC: tl.constexpr,
                          PRECISION: tl.constexpr, UNIT: tl.constexpr):  # fmt: skip
    """``scale q . k`` of rows ``p_q [BT]`` and ``p_k [BS]``."""
    o_a = tl.arange(0, BA)
    scores = tl.zeros((BT, BS), ACC)
    for a in range(0, A, BA):
        m_a = (a + o_a < A)[None, :]
        b_q = tl.load(p_q[:, None] + (a + o_a)[None, :], m_a, 0.0)  # [BT, BA]
        b_k = tl.load(p_k[:, None] + (a + o_a)[None, :], m_a, 0.0)  # [BS, BA]
        scores = multiply_add(b_q, tl.trans(b_k.to(b_q.dtype)), scores, PRECISION, UNIT)
    return times(scores, scale)
