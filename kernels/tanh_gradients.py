"""Backward of additive scores: ``dq[t] = sum_s g 4 v x r^2``, ``dk[s] = sum_t`` of the same, ``dv = sum g (1 - 2 r)``, where ``g`` is the
gradient of a score, ``x = e^(2q) e^(2k)`` and ``r = 1 / (1 + x)``.

As ``x`` is a product, half of it leaves each sum: ``dq = 4 v e^(2q) sum_s (g r^2) e^(2k)``, and nothing cancels. A thread has a few
channels and a run of source positions, so that all three sums are its own; two reciprocals merge into one.
"""

import triton
import triton.language as tl

from onepass.kernels.arithmetic import SMALL, exponential, half_of_one_minus_tanh, reciprocal, tangent

WIDEST = tl.constexpr(20.0)  # |q| + |k| up to which two denominators multiply, and exponentials and their sums stay, within float32


@triton.jit
def size(x):
    return tl.where(x == x, tl.abs(x), float("inf"))


@triton.jit
def channels_of(p_row, m_a, EVEN: tl.constexpr):
    """The program's channels of a row; EVEN where all are within A."""
    if EVEN:
        return tl.load(p_row)
    else:
        return tl.load(p_row, m_a, 0.0)


@triton.jit
def merged(b_q, b_g0, b_g1, x_0, x_1, dk_0, dk_1, dw, HIDES: tl.constexpr, UNIT: tl.constexpr):
    """One query and two runs of positions, given as ``e^(2k)``: dq without ``4 v``; ``sum g r^2 e^(2q)`` and ``sum g r`` added to.
    With HIDES a position whose g is 0 has no part in the reciprocal of the other's."""
    b_x = exponential(b_q, 2.0, UNIT)[None, :]
    ones = tl.full(x_0.shape, 1.0, x_0.dtype)
    d_0 = tl.fma(x_0, b_x, ones)
    d_1 = tl.fma(x_1, b_x, ones)
    if HIDES:
        d_0 = tl.where((b_g0 != 0.0)[:, None], d_0, 1.0)
        d_1 = tl.where((b_g1 != 0.0)[:, None], d_1, 1.0)
    inverse = reciprocal(d_0 * d_1, UNIT)
    r_0 = inverse * d_1
    r_1 = inverse * d_0
    w_0 = b_g0[:, None] * r_0
    w_1 = b_g1[:, None] * r_1
    h_0 = w_0 * r_0
    h_1 = w_1 * r_1
    dq = (tl.sum(h_0 * x_0, 0) + tl.sum(h_1 * x_1, 0)) * exponential(b_q, 2.0, UNIT)
    return dq, tl.fma(h_0, b_x, dk_0), tl.fma(h_1, b_x, dk_1), dw + (tl.sum(w_0, 0) + tl.sum(w_1, 0))


@triton.jit
def direct(b_q, b_g, b_k, dk, dw, UNIT: tl.constexpr):
    """One query and a run of positions, for any numbers: the same, of whole terms, and of ``g (r - 1/2)``."""
    x = b_q[None, :] + b_k
    counts = b_g[:, None] != 0.0
    r = half_of_one_minus_tanh(x, UNIT)
    terms = tl.where(counts, b_g[:, None] * r * half_of_one_minus_tanh(-x, UNIT), 0.0)
    return tl.sum(terms, 0), dk + terms, dw - 0.5 * tl.sum(tl.where(counts, b_g[:, None] * tangent(x, r), 0.0), 0)


@triton.jit
def sums_of_tile(
    p_q, p_gradients, p_totals, p_limits, p_dq, q_t, g_t, limits_t, b_v, b_k0, b_k1, m_0, m_1, m_a, dw, s, T, A,
    MERGE: tl.constexpr, LIMITS: tl.constexpr, KEYS: tl.constexpr, HIDES: tl.constexpr, EVEN: tl.constexpr, FULL: tl.constexpr,
    UNIT: tl.constexpr, ACC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """All queries with those of the source positions ``[s, s + BS)`` that ``m_0`` and ``m_1`` name: adds to dq in memory, gives dk
    without ``4 v``, and dw added to."""
    HALF: tl.constexpr = BS // 2
    o_0 = s + tl.arange(0, HALF)
    o_1 = s + HALF + tl.arange(0, HALF)
    dk_0 = tl.zeros_like(b_k0)
    dk_1 = tl.zeros_like(b_k1)
    if MERGE:
        b_k0 = exponential(b_k0, 2.0, UNIT)
        b_k1 = exponential(b_k1, 2.0, UNIT)
    if MERGE and KEYS:
        dw -= 0.5 * (tl.sum(tl.load(p_totals + o_0, m_0, 0.0), 0) + tl.sum(tl.load(p_totals + o_1, m_1, 0.0), 0))
    for _ in range(0, T):
        meets = True
        if LIMITS == 2:
            meets = tl.load(p_limits) > s
        if LIMITS == 3:
            meets = (tl.load(p_limits) < s + BS) & (tl.load(p_limits + 1) > s)
        if meets:
            b_q = channels_of(p_q, m_a, EVEN).to(ACC)
            if FULL:
                b_g0 = tl.load(p_gradients + o_0)
                b_g1 = tl.load(p_gradients + o_1)
            else:
                b_g0 = tl.load(p_gradients + o_0, m_0, 0.0)
                b_g1 = tl.load(p_gradients + o_1, m_1, 0.0)
            if MERGE:
                dq, dk_0, dk_1, dw = merged(b_q, b_g0, b_g1, b_k0, b_k1, dk_0, dk_1, dw, HIDES, UNIT)
            else:
                dq, dk_0, dw = direct(b_q, b_g0, b_k0, dk_0, dw, UNIT)
                more, dk_1, dw = direct(b_q, b_g1, b_k1, dk_1, dw, UNIT)
                dq += more
            dq = tl.fma(dq, b_v, channels_of(p_dq, m_a, EVEN))
            if tl.float64 == ACC:
                tl.debug_barrier()  # other lanes store it than those that loaded it
            if EVEN:
                tl.store(p_dq, dq)
            else:
                tl.store(p_dq, dq, m_a)
        p_q += q_t
        p_gradients += g_t
        p_dq += A
        p_limits += limits_t
    tl.debug_barrier()  # the next tile adds to the same dq, perhaps in other lanes
    if MERGE:
        dk_0 = dk_0 * b_k0
        dk_1 = dk_1 * b_k1
    return dk_0, dk_1, dw


@triton.jit
def tanh_gradients(
    p_q, p_k, p_v, p_gradients, p_totals, p_limits, p_dq, p_dk, p_dw,
    q_b, q_h, q_t, k_b, k_h, k_s, v_h, g_b, g_h, g_t, limits_b, limits_t, H, T, S, A, per_group, groups,
    LIMITS: tl.constexpr, HIDES: tl.constexpr, KEYS: tl.constexpr, EVEN: tl.constexpr, FULL: tl.constexpr, DIRECT: tl.constexpr,
    UNIT: tl.constexpr, ACC: tl.constexpr, BS: tl.constexpr, BA: tl.constexpr,
):  # fmt: skip
    """A program has BA channels and, of the source, ``per_group`` positions: ``p_dq [groups, B, H, T, A]``, zero at first, and
    ``p_dw [groups, B, H, A]``, of ``sum g (r - 1/2)``, are its parts, to be added in order; ``p_dk [B, H, S, A]`` is whole; ``p_totals
    [B, H, S]`` are the gradients' sums over T. Without KEYS only dq is asked for. Gradients of scores, and what q and k hold where nothing
    is visible, must be 0 but beyond ``lengths [B]``, which is not read; HIDES says that other positions may be hidden. Grid: tiles of A, by
    groups by H by B.
    """
    tiles = tl.cdiv(A, BA)
    o_a = tl.program_id(0) % tiles * BA + tl.arange(0, BA)
    i_group = tl.program_id(0) // tiles % groups
    i_bh = (tl.program_id(0) // tiles // groups).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    m_a = o_a < A
    HALF: tl.constexpr = BS // 2
    p_q += i_b * q_b + i_h * q_h + o_a
    p_k += i_b * k_b + i_h * k_h
    p_gradients += i_b * g_b + i_h * g_h
    p_dq += (i_group * (tl.num_programs(0) // tiles // groups).to(tl.int64) + i_bh) * T * A + o_a
    p_dk += i_bh * S * A
    p_totals += i_bh * S
    p_limits += i_b * limits_b
    b_v = tl.load(p_v + i_h * v_h + o_a, m_a, 0.0).to(ACC) * 4.0
    dw = tl.zeros((BA,), ACC)
    end = S
    if LIMITS == 1:
        end = tl.minimum(tl.maximum(tl.load(p_limits), 0), S).to(tl.int32)
    tops = tl.zeros((BA,), ACC)
    if not DIRECT:
        for t in range(0, T):
            tops = tl.maximum(tops, size(channels_of(p_q + tl.cast(t, tl.int64) * q_t, m_a, EVEN).to(ACC)))
    top_q = tl.max(tops, 0)
    for s in range(i_group * per_group, tl.minimum((i_group + 1) * per_group, S), BS):
        o_0 = s + tl.arange(0, HALF)
        o_1 = s + HALF + tl.arange(0, HALF)
        m_0 = (o_0 < end)[:, None] & m_a[None, :]
        m_1 = (o_1 < end)[:, None] & m_a[None, :]
        b_k0 = tl.load(p_k + o_0.to(tl.int64)[:, None] * k_s + o_a[None, :], m_0, 0.0).to(ACC)  # [HALF, BA]
        b_k1 = tl.load(p_k + o_1.to(tl.int64)[:, None] * k_s + o_a[None, :], m_1, 0.0).to(ACC)
        dk_0 = tl.zeros((HALF, BA), ACC)
        dk_1 = tl.zeros((HALF, BA), ACC)
        top_k = tl.max(tl.maximum(tl.max(size(b_k0), 0), tl.max(size(b_k1), 0)), 0)
        if s < end:
            if DIRECT:
                dk_0, dk_1, dw = sums_of_tile(p_q, p_gradients, p_totals, p_limits, p_dq, q_t, g_t, limits_t, b_v, b_k0, b_k1,
                                              o_0 < end, o_1 < end, m_a, dw, s, T, A,
                                              False, LIMITS, KEYS, HIDES, EVEN, FULL, UNIT, ACC, BS)  # fmt: skip
            elif (top_q + (0.0 if HIDES else top_k) >= SMALL) & (top_q + top_k <= WIDEST):
                dk_0, dk_1, dw = sums_of_tile(p_q, p_gradients, p_totals, p_limits, p_dq, q_t, g_t, limits_t, b_v, b_k0, b_k1,
                                              o_0 < end, o_1 < end, m_a, dw, s, T, A,
                                              True, LIMITS, KEYS, HIDES, EVEN, FULL, UNIT, ACC, BS)  # fmt: skip
            elif HIDES:  # each position by itself, so that it changes no bit of a query that does not see it
                top_0 = top_q + tl.max(size(b_k0), 1)
                top_1 = top_q + tl.max(size(b_k1), 1)
                near_0 = (top_0 >= SMALL) & (top_0 <= WIDEST)
                near_1 = (top_1 >= SMALL) & (top_1 <= WIDEST)
                if top_q <= WIDEST:
                    near_k0 = tl.where(near_0[:, None], b_k0, 0.0)
                    near_k1 = tl.where(near_1[:, None], b_k1, 0.0)
                    dk_0, dk_1, dw = sums_of_tile(p_q, p_gradients, p_totals, p_limits, p_dq, q_t, g_t, limits_t, b_v, near_k0, near_k1,
                                                  near_0 & (o_0 < end), near_1 & (o_1 < end), m_a, dw, s, T, A,
                                                  True, LIMITS, KEYS, HIDES, EVEN, FULL, UNIT, ACC, BS)  # fmt: skip
                far_0, far_1, dw = sums_of_tile(p_q, p_gradients, p_totals, p_limits, p_dq, q_t, g_t, limits_t, b_v, b_k0, b_k1,
                                                (near_0 == 0) & (o_0 < end), (near_1 == 0) & (o_1 < end), m_a, dw, s, T, A,
                                                False, LIMITS, KEYS, HIDES, EVEN, FULL, UNIT, ACC, BS)  # fmt: skip
                dk_0 += far_0
                dk_1 += far_1
            else:
                dk_0, dk_1, dw = sums_of_tile(p_q, p_gradients, p_totals, p_limits, p_dq, q_t, g_t, limits_t, b_v, b_k0, b_k1,
                                              o_0 < end, o_1 < end, m_a, dw, s, T, A,
                                              False, LIMITS, KEYS, HIDES, EVEN, FULL, UNIT, ACC, BS)  # fmt: skip
        if KEYS:
            tl.store(p_dk + o_0.to(tl.int64)[:, None] * A + o_a[None, :], dk_0 * b_v[None, :], (o_0 < S)[:, None] & m_a[None, :])
            tl.store(p_dk + o_1.to(tl.int64)[:, None] * A + o_a[None, :], dk_1 * b_v[None, :], (o_1 < S)[:, None] & m_a[None, :])
    if KEYS:
        tl.store(p_dw + (i_group * (tl.num_programs(0) // tiles // groups).to(tl.int64) + i_bh) * A + o_a, dw, m_a)
