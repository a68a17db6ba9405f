"""Backward of what both families share: the gradients of weights and of scores, and sums over queries and over the source."""

import triton
import triton.language as tl

from onepass.kernels.arithmetic import multiply_add, times, wide
from onepass.kernels.visible import add_rows, any_of, reach, visible, window


@triton.jit(do_not_specialize=["splits"])
def weight_gradients(
    p_rows, p_values, p_weights, p_more, p_limits, p_mask, p_gradients, p_inner,
    rows_b, rows_h, rows_t, values_b, values_h, values_s, weights_b, weights_h, weights_t, more_b, more_h, more_t,
    g_t, g_s, limits_b, limits_t, mask_b, mask_h, mask_t, mask_s, H, T, S, D, columns, per_split, splits,
    LIMITS: tl.constexpr, MASK: tl.constexpr, ROWS: tl.constexpr, MORE: tl.constexpr, INNER: tl.constexpr, UNIT: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """``dweights[t, s] = dcontext[t] . values[s]`` (ROWS) ``+ more[t, s]`` (MORE), 0 where not visible, and with INNER each split's part of
    ``sum_s weights dweights``, ``p_inner [splits, B, H, T]``. Gradients have a stride of 1 by s or by t, and so many ``columns`` of t, 0
    from T on. Grid: tiles of these, by splits by H by B.
    """
    tiles = tl.cdiv(columns, BT)
    i_t = tl.program_id(0) % tiles
    i_split = tl.program_id(0) // tiles % splits
    i_bh = (tl.program_id(0) // tiles // splits).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    o_t = i_t * BT + tl.arange(0, BT)
    m_t = o_t < T
    wide_t = o_t.to(tl.int64)[:, None]
    o_d = tl.arange(0, BD)
    first, last = window(p_limits, limits_b, limits_t, i_b, o_t, T, S, LIMITS)
    p_values += i_b * values_b + i_h * values_h
    p_mask += i_b * mask_b + i_h * mask_h
    o_row = i_bh * T + o_t
    inner = tl.zeros((BT,), ACC)
    for s in range(i_split * per_split, tl.minimum((i_split + 1) * per_split, S), BS):
        o_s = s + tl.arange(0, BS)
        sees = visible(first, last, p_mask, mask_t, mask_s, o_t, o_s, T, LIMITS, MASK)  # [BT, BS]
        gradients = tl.zeros((BT, BS), ACC)
        if tl.max(any_of(sees, 1).to(tl.int32), 0) > 0:
            if ROWS:
                s_seen = any_of(sees, 0)[:, None]
                p_tile = p_rows + i_b * rows_b + i_h * rows_h + wide_t * rows_t
                for d in range(0, D, BD):
                    m_d = (d + o_d < D)[None, :]
                    b_rows = tl.load(p_tile + (d + o_d)[None, :], m_t[:, None] & m_d, 0.0)  # [BT, BD]
                    b_values = tl.load(p_values + o_s.to(tl.int64)[:, None] * values_s + (d + o_d)[None, :], s_seen & m_d, 0.0)
                    gradients = multiply_add(b_rows, tl.trans(b_values.to(b_rows.dtype)), gradients, PRECISION, UNIT)
            m_seen = sees & m_t[:, None]
            if MORE:
                gradients += wide(tl.load(p_more + i_b * more_b + i_h * more_h + wide_t * more_t + o_s[None, :], m_seen, 0.0))
            gradients = tl.where(m_seen, gradients, 0.0)
            if INNER:
                b_w = tl.load(p_weights + i_b * weights_b + i_h * weights_h + wide_t * weights_t + o_s[None, :], m_seen, 0.0)
                # Not b_w * gradients: contracted with the sum's first addition, it would leave each lane with other last bits.
                inner += tl.sum(tl.fma(b_w, gradients, tl.zeros_like(gradients)), 1)
        p_tile = p_gradients + i_bh * columns * S + wide_t * g_t + o_s.to(tl.int64)[None, :] * g_s
        tl.store(p_tile, gradients, (o_t < columns)[:, None] & (o_s < S)[None, :])
    if INNER:
        o_row += i_split * (tl.num_programs(0) // tiles // splits).to(tl.int64) * T
        tl.store(p_inner + o_row, inner, m_t)


@triton.jit(do_not_specialize=["rows", "splits"])
def softmax_gradients(
    p_weights, p_inner, p_limits, p_mask, p_gradients, weights_b, weights_h, weights_t, g_t, g_s, limits_b, limits_t,
    mask_b, mask_h, mask_t, mask_s, H, T, S, columns, rows, splits,
    LIMITS: tl.constexpr, MASK: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """``dscores = weights (dweights - sum_s weights dweights)``, in place of dweights, as :func:`weight_gradients` leaves them; the sum's
    parts, of ``rows`` = B H T, are added in order. Grid: tiles of T, by tiles of S by H by B."""
    tiles_t = tl.cdiv(T, BT)
    tiles_s = tl.cdiv(S, BS)
    o_t = tl.program_id(0) % tiles_t * BT + tl.arange(0, BT)
    o_s = tl.program_id(0) // tiles_t % tiles_s * BS + tl.arange(0, BS)
    i_bh = (tl.program_id(0) // tiles_t // tiles_s).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    m_t = o_t < T
    first, last = window(p_limits, limits_b, limits_t, i_b, o_t, T, S, LIMITS)
    p_mask += i_b * mask_b + i_h * mask_h
    sees = visible(first, last, p_mask, mask_t, mask_s, o_t, o_s, T, LIMITS, MASK) & m_t[:, None]  # [BT, BS]
    p_row = p_inner + i_bh * T + o_t
    inner = tl.load(p_row, m_t, 0.0)
    for i in range(1, splits):
        inner += tl.load(p_row + i * tl.cast(rows, tl.int64), m_t, 0.0)
    wide_t = o_t.to(tl.int64)[:, None]
    b_w = tl.load(p_weights + i_b * weights_b + i_h * weights_h + wide_t * weights_t + o_s[None, :], sees, 0.0)
    p_tile = p_gradients + i_bh * columns * S + wide_t * g_t + o_s.to(tl.int64)[None, :] * g_s
    b_g = tl.load(p_tile, sees, 0.0)
    tl.store(p_tile, tl.where(sees, b_w * (b_g - inner[:, None]), 0.0), m_t[:, None] & (o_s < S)[None, :])


@triton.jit
def sums(
    p_weights, p_rows, p_limits, p_mask, p_sums, factor: tl.float64,
    weights_b, weights_h, weights_t, rows_b, rows_h, rows_n, limits_b, limits_t, mask_b, mask_h, mask_t, mask_s, H, T, S, D, per_program,
    OVER_SOURCE: tl.constexpr, LIMITS: tl.constexpr, MASK: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr, FACTOR: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """``sums[t] = factor sum_s weights[t, s] rows[s]`` over the positions that t sees (OVER_SOURCE), or ``sums[s] = factor sum_t
    weights[t, s] rows[t]`` over the queries that see s, of factors that are rounded to FACTOR. Grid: groups of tiles of D,
    ``per_program`` columns in all, by tiles of T or S by H by B."""
    BN: tl.constexpr = BT if OVER_SOURCE else BS
    N = T if OVER_SOURCE else S
    groups = tl.cdiv(D, per_program)
    tiles_n = tl.cdiv(N, BN)
    i_d = tl.program_id(0) % groups * per_program
    o_n = tl.program_id(0) // groups % tiles_n * BN + tl.arange(0, BN)
    i_bh = (tl.program_id(0) // groups // tiles_n).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    p_mask += i_b * mask_b + i_h * mask_h
    p_weights += i_b * weights_b + i_h * weights_h
    p_rows += i_b * rows_b + i_h * rows_h
    p_tile = p_sums + (i_bh * N + o_n)[:, None] * D
    if OVER_SOURCE:
        o_t = o_n
        first, last = window(p_limits, limits_b, limits_t, i_b, o_t, T, S, LIMITS)
        begin, end = reach(first, last, S, LIMITS)
        begin = begin // BS * BS
    else:
        o_s = o_n
        begin, end = 0, T
    for d in range(i_d, tl.minimum(i_d + per_program, D), BD):
        o_d = d + tl.arange(0, BD)
        m_d = (o_d < D)[None, :]
        total = tl.zeros((BN, BD), ACC)
        for i in range(begin, end, BS if OVER_SOURCE else BT):
            if OVER_SOURCE:
                o_s = i + tl.arange(0, BS)
            else:
                o_t = i + tl.arange(0, BT)
                first, last = window(p_limits, limits_b, limits_t, i_b, o_t, T, S, LIMITS)
            m_t = (o_t < T)[:, None]
            sees = visible(first, last, p_mask, mask_t, mask_s, o_t, o_s, T, LIMITS, MASK)  # [BT, BS]
            p_w = p_weights + o_t.to(tl.int64)[:, None] * weights_t + o_s[None, :]
            b_w = tl.load(p_w, sees & m_t, 0.0, cache_modifier=".ca").to(FACTOR)
            if OVER_SOURCE:
                s_seen = any_of(sees, 0)[:, None]
                b_rows = tl.load(p_rows + o_s.to(tl.int64)[:, None] * rows_n + o_d[None, :], s_seen & m_d, 0.0)  # [BS, BD]
                total = add_rows(b_w, sees, b_rows.to(FACTOR), total, LIMITS, MASK, PRECISION, UNIT)
            else:
                t_sees = any_of(sees, 1)[:, None] & m_t
                b_rows = tl.load(p_rows + o_t.to(tl.int64)[:, None] * rows_n + o_d[None, :], t_sees & m_d, 0.0)  # [BT, BD]
                total = multiply_add(tl.trans(b_w), b_rows.to(FACTOR), total, PRECISION, UNIT)
        tl.store(p_tile + o_d[None, :], times(total, factor).to(p_tile.dtype.element_ty), (o_n < N)[:, None] & m_d)
