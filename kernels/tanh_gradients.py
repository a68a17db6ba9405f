"""Backward of additive scores: ``dq[t] = sum_s g 4 v x r^2``, ``dk[s] = sum_t`` of the same, ``dv = sum g (1 - 2 r)``, where ``g`` is the
gradient of a score, ``x = e^(2q) e^(2k)`` and ``r = 1 / (1 + x)``.

As ``x`` is a product, half of it leaves each sum: ``dq = 4 v e^(2q) sum_s (g r^2) e^(2k)``, and nothing cancels. A thread has one channel
of a tile of queries, whose sums stay in its registers while the source passes by: all three sums are its own. Reciprocals merge by pairs of
queries at one position, so that a position has no part in what happens at another.
"""

import triton
import triton.language as tl

from onepass.kernels.arithmetic import SMALL, exponential, half_of_one_minus_tanh, reciprocal, tangent
from onepass.kernels.visible import reach, window

WIDEST = tl.constexpr(20.0)  # |q| + |k| up to which two denominators multiply, and exponentials and their sums stay, within float32


@triton.jit
def size(x):
    return tl.where(x == x, tl.abs(x), float("inf"))


@triton.jit
def rows(p_rows, o_row, row, count, m_a, ACC: tl.constexpr):
    """Rows of the program's channels, 0 beyond ``count``: ``[rows, BA]``."""
    return tl.load(p_rows + o_row.to(tl.int64)[:, None] * row, (o_row < count)[:, None] & m_a, 0.0).to(ACC)


@triton.jit
def merged(x_0, x_1, g_0, g_1, x_k, dq_0, dq_1, dk, dw, UNIT: tl.constexpr):
    """Two runs of queries and a position, given as ``e^(2q)`` and ``e^(2k)``: ``sum g r^2 e^(2k)``, ``sum g r^2 e^(2q)``, ``sum g r``."""
    ones = tl.full(x_0.shape, 1.0, x_0.dtype)
    d_0 = tl.fma(x_0, x_k, ones)
    d_1 = tl.fma(x_1, x_k, ones)
    inverse = reciprocal(d_0 * d_1, UNIT)
    r_0 = inverse * d_1
    r_1 = inverse * d_0
    w_0 = g_0 * r_0
    w_1 = g_1 * r_1
    h_0 = w_0 * r_0
    h_1 = w_1 * r_1
    return tl.fma(h_0, x_k, dq_0), tl.fma(h_1, x_k, dq_1), tl.fma(h_1, x_1, tl.fma(h_0, x_0, dk)), dw + tl.sum(w_0 + w_1, 0)


@triton.jit
def near_sums(
    p_q, p_k, p_gradients, p_totals, p_dq, p_dk, q_t, k_s, g_t, g_s, b_v, m_a, t, firsts, lasts, begin, end, T, A, tiles_t,
    LIMITS: tl.constexpr, QUERY: tl.constexpr, KEYS: tl.constexpr, UNIT: tl.constexpr, ACC: tl.constexpr, BT: tl.constexpr,
    BS: tl.constexpr, BA: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """BT queries from ``t`` on with the positions from ``begin`` to ``end`` whose channels are in range: writes dq, adds to dk. Those that
    are not count with ``r = 1`` and nothing else. Gives the sizes of the channels of q and of k, and ``sum g (r - 1/2)``. Sums that are not
    asked for are stored nowhere, and compile to nothing."""
    HALF: tl.constexpr = RUN // 2
    o_h = tl.arange(0, HALF)
    top_q = tl.zeros((BA,), ACC)
    for i in range(0, BT, HALF):
        top_q = tl.maximum(top_q, tl.max(size(rows(p_q, t + i + o_h, q_t, T, m_a, ACC)), 0))
    x_q = ()
    dq = ()
    for i in tl.static_range(BT // HALF):
        b_q = rows(p_q, t + i * HALF + o_h, q_t, T, m_a, ACC)
        x_q += (exponential(tl.where(top_q <= WIDEST, b_q, 0.0), 2.0, UNIT),)
        dq += (tl.zeros((HALF, BA), ACC),)
    top_k = tl.zeros((BA,), ACC)
    dw = tl.zeros((BA,), ACC)
    i_s = tl.cast(begin, tl.int64)
    p_k += i_s * k_s
    p_gradients += i_s * g_s + (tl.cast(t, tl.int64) + o_h) * g_t
    p_totals += i_s * tiles_t
    p_dk += i_s * A
    for s in range(begin, end, BS):
        b_k = ()
        for j in tl.static_range(BS):
            ahead = 0 if j == 0 else tl.minimum(j, end - 1 - s).to(tl.int64) * k_s
            b_k += (tl.load(p_k + ahead, m_a, 0.0).to(ACC),)
        for j in tl.static_range(BS):
            within = True
            if j > 0:
                within = s + j < end
            if within:
                top_k = tl.maximum(top_k, size(b_k[j]))
                x_k = tl.where(top_q + size(b_k[j]) <= WIDEST, exponential(b_k[j], 2.0, UNIT), 0.0)
                dk = tl.zeros((HALF, BA), ACC)
                sums = ()
                for i in tl.static_range(BT // RUN):
                    dq_0 = dq[2 * i]
                    dq_1 = dq[2 * i + 1]
                    meets = True
                    if i == BT // RUN // 2:  # the second half may have no queries; all of a tile in one block of code would spill
                        meets = t + i * RUN < T
                    if LIMITS >= 2:
                        meets = (firsts[i] <= s + j) & (s + j < lasts[i])
                    if meets:
                        p_row = p_gradients + i * RUN * g_t
                        if KEYS:
                            g_0 = tl.load(p_row)
                            g_1 = tl.load(p_row + HALF * g_t)
                        else:
                            g_0 = tl.load(p_row, t + i * RUN + o_h < T, 0.0)
                            g_1 = tl.load(p_row + HALF * g_t, t + i * RUN + HALF + o_h < T, 0.0)
                        dq_0, dq_1, dk, dw = merged(
                            x_q[2 * i], x_q[2 * i + 1], g_0[:, None], g_1[:, None], x_k[None, :], dq_0, dq_1, dk, dw, UNIT
                        )
                    sums += (dq_0, dq_1)
                dq = sums
                if KEYS:
                    dw -= 0.5 * tl.load(p_totals)
                    dk_before = tl.zeros((BA,), ACC)
                    if t > 0:
                        dk_before = tl.load(p_dk, m_a, 0.0)
                    tl.store(p_dk, tl.fma(tl.sum(dk, 0) * x_k, b_v, dk_before), m_a)
                p_gradients += g_s
                p_totals += tiles_t
                p_dk += A
        p_k += BS * tl.cast(k_s, tl.int64)
    if QUERY:
        p_row = p_dq + (tl.cast(t, tl.int64) + o_h)[:, None] * A
        for i in tl.static_range(BT // HALF):
            tl.store(p_row, dq[i] * x_q[i] * b_v[None, :], (t + i * HALF + o_h < T)[:, None] & m_a)
            p_row += HALF * A
    return top_q, top_k, dw


@triton.jit
def far_sums(
    p_q, p_k, p_gradients, p_dq, p_dk, q_t, k_s, g_t, g_s, b_v, m_a, t_begin, t_end, begin, end, top_q, widest, widest_dw, dw, A,
    QUERY: tl.constexpr, KEYS: tl.constexpr, DIRECT: tl.constexpr, UNIT: tl.constexpr, ACC: tl.constexpr, BA: tl.constexpr,
):  # fmt: skip
    """Adds what is out of range to dq and dk, term by term, for any numbers; and to dw, for which :func:`near_sums` has taken r as 1. Where
    everything is ``small``, dw is of all positions: sums of tanh itself."""
    for t in range(t_begin, t_end, 8):
        o_t = t + tl.arange(0, 8)
        b_q = rows(p_q, o_t, q_t, t_end, m_a, ACC)
        p_sums = p_dq + o_t.to(tl.int64)[:, None] * A
        m_sums = (o_t < t_end)[:, None] & m_a
        dq = tl.zeros((8, BA), ACC)
        if QUERY and not DIRECT:
            dq = tl.load(p_sums, m_sums, 0.0)
        for s in range(begin, end):
            i_s = tl.cast(s, tl.int64)
            b_k = tl.load(p_k + i_s * k_s, m_a, 0.0).to(ACC)
            b_g = tl.load(p_gradients + o_t.to(tl.int64) * g_t + i_s * g_s, o_t < t_end, 0.0)[:, None]
            far = ((top_q + size(b_k) <= widest) == 0)[None, :]
            x = b_q + b_k[None, :]
            r = half_of_one_minus_tanh(x, UNIT)
            terms = tl.where((b_g != 0.0) & far, b_g * r * half_of_one_minus_tanh(-x, UNIT), 0.0)
            dq = tl.fma(terms, tl.broadcast_to(b_v[None, :], terms.shape), dq)
            if KEYS:
                far = ((top_q + size(b_k) <= widest_dw) == 0)[None, :]
                shift = tl.where(widest_dw < 0.0, 0.0, 1.0)
                dw -= 0.5 * tl.sum(tl.where((b_g != 0.0) & far, b_g * (tangent(x, r) + shift), 0.0), 0)
                dk = tl.zeros((BA,), ACC)
                if t > 0 or not DIRECT:
                    dk = tl.load(p_dk + i_s * A, m_a, 0.0)
                tl.store(p_dk + i_s * A, tl.fma(tl.sum(terms, 0), b_v, dk), m_a)
        if QUERY:
            tl.store(p_sums, dq, m_sums)
    return dw


@triton.jit
def clear(p_dk, begin, end, A, m_a, ACC: tl.constexpr, BA: tl.constexpr):
    for s in range(begin, end):
        tl.store(p_dk + tl.cast(s, tl.int64) * A, tl.zeros((BA,), ACC), m_a)


@triton.jit
def tanh_gradients(
    p_q, p_k, p_v, p_gradients, p_totals, p_limits, p_dq, p_dk, p_dw,
    q_b, q_h, q_t, k_b, k_h, k_s, v_h, g_b, g_h, g_t, g_s, limits_b, limits_t, H, T, S, A, per_group, groups,
    LIMITS: tl.constexpr, HIDES: tl.constexpr, QUERY: tl.constexpr, KEYS: tl.constexpr, DIRECT: tl.constexpr, UNIT: tl.constexpr,
    ACC: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, BA: tl.constexpr,
):  # fmt: skip
    """A program has BA channels and, of the source, ``per_group`` positions: ``p_dq [groups, B, H, T, A]`` and ``p_dw [groups, B, H, A]``,
    of ``sum g (r - 1/2)``, are its parts, to be added in order; ``p_dk [B, H, S, A]`` is whole. QUERY asks for dq, KEYS for dk and dw; with
    KEYS, ``p_totals [B, H, S, tiles of T]`` are the gradients' sums, and gradients are 0 from T to a multiple of BT. Gradients of scores,
    and what q holds where nothing is visible, must be 0 but beyond ``lengths [B]``, which is not read; HIDES says that other positions may
    be hidden. Grid: tiles of A, by groups by H by B.
    """
    RUN: tl.constexpr = 8 if BT % 8 == 0 else 2
    tiles_a = tl.cdiv(A, BA)
    tiles_t = tl.cdiv(T, BT)
    # A lane has one channel, also where it could load four: sums over queries and positions stay its own.
    o_a = tl.max_contiguous(tl.program_id(0) % tiles_a * BA + tl.arange(0, BA), 1)
    i_group = tl.program_id(0) // tiles_a % groups
    i_bh = (tl.program_id(0) // tiles_a // groups).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    i_part = i_group * (tl.num_programs(0) // tiles_a // groups).to(tl.int64) + i_bh
    m_a = o_a < A
    p_q += i_b * q_b + i_h * q_h + o_a
    p_k += i_b * k_b + i_h * k_h + o_a
    p_gradients += i_b * g_b + i_h * g_h
    p_totals += i_bh * S * tiles_t
    p_dq += i_part * T * A + o_a
    p_dk += i_bh * S * A + o_a
    b_v = tl.load(p_v + i_h * v_h + o_a, m_a, 0.0).to(ACC) * 4.0
    s_begin = i_group * per_group
    s_end = tl.minimum(s_begin + per_group, S)
    dw = tl.zeros((BA,), ACC)
    for t in range(0, T, BT):
        firsts = ()
        lasts = ()
        begin, end = 0, S
        if LIMITS == 1:
            begin, end = window(p_limits, limits_b, limits_t, i_b, t, T, S, LIMITS)
        if LIMITS >= 2:
            begin, end = S, 0
            for i in tl.static_range(BT // RUN):
                o_t = t + i * RUN + tl.arange(0, RUN)
                first, last = window(p_limits, limits_b, limits_t, i_b, o_t, T, S, LIMITS)
                first, last = reach(first, last, S, LIMITS)
                firsts += (first,)
                lasts += (last,)
                begin = tl.minimum(begin, first)
                end = tl.maximum(end, last)
        begin = tl.maximum(begin, s_begin)
        end = tl.maximum(tl.minimum(end, s_end), begin)
        if KEYS and LIMITS > 0 and t == 0:
            clear(p_dk, s_begin, tl.minimum(begin, s_end), A, m_a, ACC, BA)
            clear(p_dk, end, s_end, A, m_a, ACC, BA)
        t_end = tl.minimum(t + BT, T)
        top_q = tl.zeros((BA,), ACC)
        if DIRECT:
            dw = far_sums(p_q, p_k, p_gradients, p_dq, p_dk, q_t, k_s, g_t, g_s, b_v, m_a, t, t_end, begin, end, top_q, -1.0, -1.0, dw,
                          A, QUERY, KEYS, True, UNIT, ACC, BA)  # fmt: skip
        else:
            top_q, top_k, near = near_sums(p_q, p_k, p_gradients, p_totals + t // BT, p_dq, p_dk, q_t, k_s, g_t, g_s, b_v, m_a, t, firsts,
                                           lasts, begin, end, T, A, tiles_t, LIMITS, QUERY, KEYS, UNIT, ACC, BT, BS, BA, RUN)  # fmt: skip
            small = tl.max(top_q, 0) + (0.0 if HIDES else tl.max(top_k, 0)) < SMALL
            dw += tl.where(small, 0.0, near)
            if (tl.max(top_q + top_k, 0) > WIDEST) | (small & KEYS):
                tl.debug_barrier()
                dw = far_sums(p_q, p_k, p_gradients, p_dq, p_dk, q_t, k_s, g_t, g_s, b_v, m_a, t, t_end, begin, end, top_q, WIDEST,
                              tl.where(small, -1.0, WIDEST), dw, A, QUERY, KEYS, False, UNIT, ACC, BA)  # fmt: skip
    if KEYS:
        tl.store(p_dw + i_part * A + o_a, dw, m_a)
