"""Scores of a tile of queries and source positions, ``[BT, BS]``: additive (Bahdanau et al. 2015, appendix A.1.2), multiplicative (Luong
et al. 2015, equation 8).

Additive scores use ``tanh(q + k) = 1 - 2r`` with ``r = 1 / (1 + e^(2q) e^(2k))``: exponentials are taken of rows, not of pairs, and four
reciprocals merge into one. With ``u = 1 / v`` folded into the denominators ``d = u + u e^(2q) e^(2k)`` the merging is
``1/d0 + 1/d1 = (d0 + d1) / (d0 d1)``. Where such a product could leave float32, the tile is computed without merging.
"""

import triton
import triton.language as tl

from onepass.kernels.arithmetic import LOG2_E, exponential, half_of_one_minus_tanh, multiply_add, reciprocal, wide

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
    return total, scale, unscale, blanks, tl.where((1e-30 < largest) & (largest < 1e30), limit, -1.0)


@triton.jit
def channels(x, N: tl.constexpr):
    """The columns of ``[N, 4]``."""
    even, odd = tl.split(tl.reshape(x, (N, 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def merged_sums(p_q, p_k, p_v, v_scale, A, BT: tl.constexpr, BS: tl.constexpr, EVEN: tl.constexpr, UNIT: tl.constexpr):
    """``sum_a v r`` of scaled v with its blanks, and the largest ``|q| + |k|`` met. ``p_q [BT]`` and ``p_k [BS]`` point to rows."""
    o_c = tl.arange(0, 4)
    sums = tl.zeros((BT, BS), tl.float32)
    top_q = tl.zeros((BT, 4), tl.float32)
    top_k = tl.zeros((BS, 4), tl.float32)
    for a in range(0, A, 4):
        if EVEN:
            b_q = wide(tl.load(p_q[:, None] + (a + o_c)[None, :]))  # [BT, 4]
            b_k = wide(tl.load(p_k[:, None] + (a + o_c)[None, :]))  # [BS, 4]
            b_v = wide(tl.load(p_v + a + o_c)) * v_scale
        else:
            b_q = wide(tl.load(p_q[:, None] + (a + o_c)[None, :], (a + o_c < A)[None, :], 0.0))
            b_k = wide(tl.load(p_k[:, None] + (a + o_c)[None, :], (a + o_c < A)[None, :], 0.0))
            b_v = wide(tl.load(p_v + a + o_c, a + o_c < A, 0.0)) * v_scale
        top_q = tl.maximum(top_q, tl.abs(b_q))
        top_k = tl.maximum(top_k, tl.abs(b_k))
        inverse = reciprocal(b_v, UNIT)
        inverse = tl.fma(inverse, tl.fma(-inverse, b_v, 1.0), inverse)
        b_x = tl.where(b_v == 0.0, 0.0, inverse)[None, :] * exponential(b_k, 2.0, UNIT)
        b_u = tl.broadcast_to(tl.where(b_v == 0.0, 1.0 / BLANK, inverse)[None, :], (BS, 4))
        q0, q1, q2, q3 = channels(exponential(b_q, 2.0, UNIT), BT)
        x0, x1, x2, x3 = channels(b_x, BS)
        u0, u1, u2, u3 = channels(b_u, BS)
        d0 = tl.fma(q0[:, None], x0[None, :], tl.broadcast_to(u0[None, :], (BT, BS)))  # [BT, BS]
        d1 = tl.fma(q1[:, None], x1[None, :], tl.broadcast_to(u1[None, :], (BT, BS)))
        d2 = tl.fma(q2[:, None], x2[None, :], tl.broadcast_to(u2[None, :], (BT, BS)))
        d3 = tl.fma(q3[:, None], x3[None, :], tl.broadcast_to(u3[None, :], (BT, BS)))
        d01 = d0 * d1
        d23 = d2 * d3
        sums = tl.fma(tl.fma(d0 + d1, d23, (d2 + d3) * d01), reciprocal(d01 * d23, UNIT), sums)
    return sums, tl.max(tl.max(top_q, 1), 0) + tl.max(tl.max(top_k, 1), 0)


@triton.jit
def direct_scores(p_q, p_k, p_v, A, BT: tl.constexpr, BS: tl.constexpr, ACC: tl.constexpr, UNIT: tl.constexpr):
    """Exact for all finite q and k, and for others what the formula gives."""
    scores = tl.zeros((BT, BS), ACC)
    for a in range(0, A):
        x = wide(tl.load(p_q + a))[:, None] + wide(tl.load(p_k + a))[None, :]
        scores += wide(tl.load(p_v + a)) * tl.fma(half_of_one_minus_tanh(x, UNIT), -2.0, 1.0)
    return scores


@triton.jit
def additive_scores(p_q, p_k, p_v, weights_of_v, A, BT: tl.constexpr, BS: tl.constexpr, EVEN: tl.constexpr, DIRECT: tl.constexpr,
                    ACC: tl.constexpr, UNIT: tl.constexpr):  # fmt: skip
    """``v . tanh(q + k)`` of rows ``p_q [BT]`` and ``p_k [BS]``."""
    if DIRECT:
        scores = direct_scores(p_q, p_k, p_v, A, BT, BS, ACC, UNIT)
    else:
        total, scale, unscale, blanks, limit = weights_of_v
        sums, top = merged_sums(p_q, p_k, p_v, scale, A, BT, BS, EVEN, UNIT)
        scores = tl.fma(sums - blanks * BLANK, -2.0 * unscale, total)
        if not (top <= limit):
            scores = direct_scores(p_q, p_k, p_v, A, BT, BS, ACC, UNIT)
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
    return scores * scale
