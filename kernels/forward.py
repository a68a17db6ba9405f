"""Forward: scores, softmax and context of a tile of queries in one launch; for few queries the source is split over programs, and
``combine`` puts the parts together in their order.
"""

import triton
import triton.language as tl

from onepass.kernels.arithmetic import multiply_add, softmax_term, spread, times, wide
from onepass.kernels.scores import additive_scores, multiplicative_scores, weighting
from onepass.kernels.visible import add_unbounded, any_of, bounded, reach, visible, window


@triton.jit
def softmax_sums(scores, sees, highest, sums, UNIT: tl.constexpr):
    """The highest score so far and the sum of ``e^(score - highest)``, and what corrects a sum over earlier ones."""
    higher = tl.maximum(highest, tl.max(scores, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    terms = tl.where(sees, softmax_term(scores, base[:, None], UNIT), 0.0)
    correction = softmax_term(highest, base, UNIT)
    return higher, tl.fma(sums, correction, tl.sum(terms, 1)), correction


@triton.jit
def softmax_part(scores, sees, UNIT: tl.constexpr):
    """Of a tile, the highest score of each row, and the sum of ``e^(score - highest)``."""
    highest = tl.max(scores, 1)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    terms = tl.where(sees, softmax_term(scores, base[:, None], UNIT), 0.0)
    return spread(highest), spread(tl.sum(terms, 1))


@triton.jit
def joined(highest, sums, part_highest, part, UNIT: tl.constexpr):
    """The highest of two parts, and the sum of both from there."""
    higher = tl.maximum(highest, part_highest)
    base = tl.where(higher == float("-inf"), 0.0, higher)
    return higher, tl.fma(sums, softmax_term(highest, base, UNIT), part * softmax_term(part_highest, base, UNIT))


@triton.jit
def rows_of_values(p_values, values_s, o_s, o_d, m_tile):
    """Past the L1, which has what is read more than once: a program reads each value once."""
    return tl.load(p_values + o_s.to(tl.int64)[:, None] * values_s + o_d[None, :], m_tile, 0.0, cache_modifier=".cg")


@triton.jit
def fill_outside(p_weights, o_w, value, begin, end, low, high, m_t, BS: tl.constexpr):
    """The value where the tiles from ``begin`` on that reach ``end`` leave ``[low, high)``, in rows at ``o_w [BT]``."""
    for s in range(low, high, BS):
        o_s = s + tl.arange(0, BS)
        outside = ((o_s < begin) | (o_s >= begin + tl.cdiv(tl.maximum(end - begin, 0), BS) * BS)) & (o_s < high)
        tile = tl.full((o_w.shape[0], BS), value, p_weights.dtype.element_ty)
        tl.store(p_weights + (o_w[:, None] + o_s[None, :]), tile, m_t[:, None] & outside[None, :])


@triton.jit(do_not_specialize=["p_highest", "p_sums", "T", "splits"])
def attend(
    p_q, p_k, p_values, p_v, p_limits, p_mask, p_context, p_weights, p_highest, p_sums, p_parts, scale: tl.float64,
    q_b, q_h, q_t, k_b, k_h, k_s, values_b, values_h, values_s, v_h, limits_b, limits_t, mask_b, mask_h, mask_t, mask_s,
    H, T, S, A, D, per_split, splits,
    ADDITIVE: tl.constexpr, LIMITS: tl.constexpr, MASK: tl.constexpr, SCORES: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr,
    DIRECT: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BT: tl.constexpr, BS: tl.constexpr, BA: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Scores go to ``p_weights [B, H, T, S]`` and become weights there. With SCORES, scores are all that is asked for. With SPLIT a program
    has ``per_split`` positions, leaves scores, and the sums over them that ``combine`` takes: ``p_highest`` and ``p_sums
    [splits, B, H, T]``, ``p_parts [splits, B, H, T, D]``. Grid: tiles of T, fastest, by splits by H by B.
    """
    tiles = tl.cdiv(T, BT)
    i_t = tl.program_id(0) % tiles
    i_split = tl.program_id(0) // tiles % splits
    i_bh = (tl.program_id(0) // tiles // splits).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    o_t = i_t * BT + tl.arange(0, BT)
    m_t = o_t < T
    first, last = window(p_limits, limits_b, limits_t, i_b, o_t, T, S, LIMITS)
    begin, end = reach(first, last, S, LIMITS)
    begin = tl.maximum(i_split * per_split, begin)
    end = tl.minimum((i_split + 1) * per_split, end)
    begin_of_tiles = begin // BS * BS
    p_q += i_b * q_b + i_h * q_h
    p_k += i_b * k_b + i_h * k_h
    p_v += i_h * v_h
    p_values += i_b * values_b + i_h * values_h
    p_mask += i_b * mask_b + i_h * mask_h
    o_row = i_bh * T + o_t  # [BT], of [B, H, T]
    p_weights += (i_bh * T + i_t * BT) * S
    o_w = tl.arange(0, BT) * S  # [BT], of weights from there

    highest = tl.full((BT,), float("-inf"), ACC)
    sums = tl.zeros((BT,), ACC)
    seen = tl.zeros((BT,), tl.int32)
    weights_of_v = 0
    if ADDITIVE and not DIRECT:
        weights_of_v = weighting(p_v, A)
    for s in range(begin_of_tiles, end, BS):
        o_s = s + tl.arange(0, BS)
        # The limits are read again wherever they are wanted: kept, they would take registers from the scores.
        limits = window(p_limits, limits_b, limits_t, i_b, o_t, T, S, LIMITS)
        # Rows that see nothing or are not seen are not read: others of the tile stand in for them, and their scores are dropped.
        row_t = tl.minimum(o_t, T - 1)
        row_s = tl.minimum(tl.maximum(o_s, begin), end - 1)
        meets = True
        if LIMITS > 1 or MASK:
            if MASK:
                sees = visible(*limits, p_mask, mask_t, mask_s, o_t, o_s, T, LIMITS, MASK)
                t_sees = any_of(sees, 1)
                s_seen = any_of(sees, 0)
                row_s = tl.where(s_seen, o_s, tl.max(tl.where(s_seen, o_s, 0), 0))
            else:
                t_sees = tl.maximum(limits[0], s) < tl.minimum(limits[1], s + BS)
            row_t = tl.where(t_sees, o_t, tl.max(tl.where(t_sees, o_t, 0), 0))
            meets = tl.max(t_sees.to(tl.int32), 0) > 0
        scores = tl.full((BT, BS), float("-inf"), ACC)
        if meets:
            p_rows_q = p_q + row_t.to(tl.int64) * q_t
            p_rows_k = p_k + row_s.to(tl.int64) * k_s
            if ADDITIVE:
                scores = additive_scores(p_rows_q, p_rows_k, p_v, weights_of_v, A, BT, BS, EVEN, DIRECT, ACC, UNIT)
            else:
                scores = multiplicative_scores(p_rows_q, p_rows_k, scale, A, BT, BS, BA, ACC, PRECISION, UNIT)
        sees = visible(*limits, p_mask, mask_t, mask_s, o_t, o_s, T, LIMITS, MASK)  # [BT, BS] or [1, BS]
        scores = tl.where(sees, scores, float("-inf"))
        tl.store(p_weights + (o_w[:, None] + o_s[None, :]), scores, m_t[:, None] & (o_s < S)[None, :])
        if not SCORES:
            part_highest, part = softmax_part(scores, sees, UNIT)
            seen = tl.maximum(seen, spread(tl.max(sees.to(tl.int32), 1)))
            highest, sums = joined(highest, sums, part_highest, part, UNIT)
    if SCORES:
        low = i_split * per_split
        fill_outside(p_weights, o_w, float("-inf"), begin_of_tiles, end, low, tl.minimum(low + per_split, S), m_t, BS)
    elif not SPLIT:
        fill_outside(p_weights, o_w, 0.0, begin_of_tiles, end, 0, S, m_t, BS)
    if not SCORES:
        tl.debug_barrier()
        base = tl.where(highest == float("-inf"), 0.0, highest)
        inverse = tl.where(seen > 0, 1.0 / sums, 0.0)
        end_of_tiles = begin_of_tiles + tl.cdiv(tl.maximum(end - begin_of_tiles, 0), BS) * BS  # scores are to be replaced up to there
        if SPLIT:
            o_row += i_split * (tl.num_programs(0) // tiles // splits).to(tl.int64) * T
            tl.store(p_highest + o_row, highest, m_t)
            tl.store(p_sums + o_row, tl.where(seen > 0, sums, -1.0), m_t)
            p_context = p_parts
            inverse = tl.full((BT,), 1.0, ACC)
        limits = window(p_limits, limits_b, limits_t, i_b, o_t, T, S, LIMITS)
        unbounded = tl.zeros((BK,), tl.int32)
        for d in range(0, tl.maximum(D, 1), BD):
            o_d = d + tl.arange(0, BD)
            m_d = (o_d < D)[None, :]
            context = tl.zeros((BT, BD), ACC)
            for s in range(begin_of_tiles, end_of_tiles, BK):
                o_s = s + tl.arange(0, BK)
                sees = visible(*limits, p_mask, mask_t, mask_s, o_t, o_s, T, LIMITS, MASK)
                p_tile = p_weights + (o_w[:, None] + o_s[None, :])
                scores = tl.load(p_tile, sees & m_t[:, None], float("-inf"))
                b_w = tl.where(sees, softmax_term(scores, base[:, None], UNIT) * inverse[:, None], 0.0)
                b_values = rows_of_values(p_values, values_s, o_s, o_d, any_of(sees, 0)[:, None] & m_d)
                b_values = b_values.to(p_q.dtype.element_ty)  # [BK, BD]
                if LIMITS > 1 or MASK:
                    b_values, found = bounded(b_values)
                    unbounded = tl.maximum(unbounded, found)
                context = multiply_add(b_w.to(b_values.dtype), b_values, context, PRECISION, UNIT)
                if not SPLIT and d + BD >= D:  # scores are not read again
                    tl.store(p_tile, b_w, m_t[:, None] & (o_s < S)[None, :])
            p_tile = p_context + o_row[:, None] * D + o_d[None, :]
            tl.store(p_tile, context.to(p_tile.dtype.element_ty), m_t[:, None] & m_d)
        met = 0
        if LIMITS > 1 or MASK:
            met = tl.max(unbounded, 0)
        if met > 0:
            tl.debug_barrier()
            limits = window(p_limits, limits_b, limits_t, i_b, o_t, T, S, LIMITS)
            for d in range(0, D, BD):
                o_d = d + tl.arange(0, BD)
                p_tile = p_context + o_row[:, None] * D + o_d[None, :]
                m_tile = m_t[:, None] & (o_d < D)[None, :]
                context = wide(tl.load(p_tile, m_tile, 0.0))
                for s in range(begin, end):
                    o_s = s + tl.arange(0, 1)
                    sees = visible(*limits, p_mask, mask_t, mask_s, o_t, o_s, T, LIMITS, MASK)  # [BT, 1]
                    b_w = tl.load(p_weights + (o_w[:, None] + o_s[None, :]), sees & m_t[:, None], 0.0)
                    if SPLIT:
                        b_w = softmax_term(b_w, base[:, None], UNIT)
                    b_values = rows_of_values(p_values, values_s, o_s, o_d, any_of(sees, 0)[:, None] & (o_d < D)[None, :])
                    context = add_unbounded(b_w, sees, b_values.to(p_q.dtype.element_ty), context)
                tl.store(p_tile, context.to(p_tile.dtype.element_ty), m_tile)


@triton.jit(do_not_specialize=["T", "S"])
def attend_online(
    p_q, p_k, p_values, p_limits, p_mask, p_context, scale: tl.float64,
    q_b, q_h, q_t, k_b, k_h, k_s, values_b, values_h, values_s, limits_b, limits_t, mask_b, mask_h, mask_t, mask_s, H, T, S, A, D,
    LIMITS: tl.constexpr, MASK: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BT: tl.constexpr, BS: tl.constexpr, BA: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Multiplicative attention that keeps no weights: the softmax is corrected as it goes on. Grid: tiles of D, each of which computes the
    scores again, by tiles of T by H by B."""
    tiles_d = tl.maximum(tl.cdiv(D, BD), 1)
    tiles_t = tl.cdiv(T, BT)
    i_d = tl.program_id(0) % tiles_d
    o_d = i_d * BD + tl.arange(0, BD)
    o_t = tl.program_id(0) // tiles_d % tiles_t * BT + tl.arange(0, BT)
    i_bh = (tl.program_id(0) // tiles_d // tiles_t).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    m_t = o_t < T
    m_d = (o_d < D)[None, :]
    first, last = window(p_limits, limits_b, limits_t, i_b, o_t, T, S, LIMITS)
    begin, end = reach(first, last, S, LIMITS)
    p_q += i_b * q_b + i_h * q_h + tl.minimum(o_t, T - 1).to(tl.int64) * q_t
    p_k += i_b * k_b + i_h * k_h
    p_values += i_b * values_b + i_h * values_h
    p_mask += i_b * mask_b + i_h * mask_h
    highest = tl.full((BT,), float("-inf"), ACC)
    sums = tl.zeros((BT,), ACC)
    seen = tl.zeros((BT,), tl.int32)
    met = 0
    context = tl.zeros((BT, BD), ACC)
    for s in range(begin // BS * BS, end, BS):
        o_s = s + tl.arange(0, BS)
        sees = visible(first, last, p_mask, mask_t, mask_s, o_t, o_s, T, LIMITS, MASK)  # [BT, BS] or [1, BS]
        row_s = tl.minimum(o_s, S - 1)
        scores = multiplicative_scores(p_q, p_k + row_s.to(tl.int64) * k_s, scale, A, BT, BS, BA, ACC, PRECISION, UNIT)
        scores = tl.where(sees, scores, float("-inf"))
        seen = tl.maximum(seen, tl.max(sees.to(tl.int32), 1))
        highest, sums, correction = softmax_sums(scores, sees, highest, sums, UNIT)
        base = tl.where(highest == float("-inf"), 0.0, highest)
        terms = tl.where(sees, softmax_term(scores, base[:, None], UNIT), 0.0)
        b_values = rows_of_values(p_values, values_s, row_s, o_d, any_of(sees, 0)[:, None] & m_d)
        b_values = b_values.to(p_context.dtype.element_ty)  # [BS, BD]
        if LIMITS > 1 or MASK:
            b_values, found = bounded(b_values)
            met = tl.maximum(met, tl.max(found, 0))
        context *= correction[:, None]
        context = multiply_add(terms.to(b_values.dtype), b_values, context, PRECISION, UNIT)
    inverse = tl.where(seen > 0, 1.0 / sums, 0.0)
    o_row = i_bh * T + o_t
    p_tile = p_context + o_row[:, None] * D + o_d[None, :]
    tl.store(p_tile, tl.where((seen > 0)[:, None], context * inverse[:, None], 0.0).to(p_tile.dtype.element_ty), m_t[:, None] & m_d)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    if met > 0:
        tl.debug_barrier()
        context = wide(tl.load(p_tile, m_t[:, None] & m_d, 0.0))
        for s in range(begin, end):
            o_s = s + tl.arange(0, 1)
            sees = visible(first, last, p_mask, mask_t, mask_s, o_t, o_s, T, LIMITS, MASK)  # [BT, 1]
            scores = tl.zeros((BT,), ACC)
            for a in range(0, A, BA):
                o_a = a + tl.arange(0, BA)[None, :]
                b_q = wide(tl.load(p_q[:, None] + o_a, o_a < A, 0.0))
                b_k = wide(tl.load(p_k + o_s.to(tl.int64)[:, None] * k_s + o_a, o_a < A, 0.0))
                scores += tl.sum(b_q * b_k, 1)
            b_w = softmax_term(times(scores, scale), base, UNIT) * inverse
            b_values = rows_of_values(p_values, values_s, o_s, o_d, any_of(sees, 0)[:, None] & m_d)
            context = add_unbounded(b_w[:, None], sees, b_values.to(p_context.dtype.element_ty), context)
        tl.store(p_tile, context.to(p_tile.dtype.element_ty), m_t[:, None] & m_d)


@triton.jit(do_not_specialize=["p_highest", "p_sums", "T", "rows", "splits"])
def combine(
    p_limits, p_mask, p_context, p_weights, p_highest, p_sums, p_parts, limits_b, limits_t, mask_b, mask_h, mask_t, mask_s,
    H, T, S, D, rows, splits,
    LIMITS: tl.constexpr, MASK: tl.constexpr, UNIT: tl.constexpr, ACC: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Puts what ``attend`` left of each split together, in their order. Grid: ``rows`` = B H T."""
    i_row = tl.program_id(0).to(tl.int64)
    i_bh = i_row // T
    i_b = i_bh // H
    o_t = (i_row % T).to(tl.int32) + tl.arange(0, 1)
    highest = tl.load(p_highest + i_row)
    for i in range(1, splits):
        highest = tl.maximum(highest, tl.load(p_highest + i * rows + i_row))
    base = tl.where(highest == float("-inf"), 0.0, highest)
    sums = tl.zeros((), ACC)
    seen = 0
    for i in range(0, splits):
        part = tl.load(p_sums + i * rows + i_row)
        seen += tl.where(part < 0, 0, 1)
        sums += tl.where(part < 0, 0.0, part * softmax_term(tl.load(p_highest + i * rows + i_row), base, UNIT))
    inverse = tl.where(seen > 0, 1.0 / sums, 0.0)
    for d in range(0, D, BD):
        o_d = d + tl.arange(0, BD)
        context = tl.zeros((BD,), ACC)
        for i in range(0, splits):
            b_part = tl.load(p_parts + (i * rows + i_row) * D + o_d, o_d < D, 0.0)
            context += softmax_term(tl.load(p_highest + i * rows + i_row), base, UNIT) * b_part
        tl.store(p_context + i_row * D + o_d, (context * inverse).to(p_context.dtype.element_ty), o_d < D)
    first, last = window(p_limits, limits_b, limits_t, i_b, o_t, T, S, LIMITS)
    p_mask += i_b * mask_b + (i_bh % H) * mask_h
    for s in range(0, S, BS):
        o_s = s + tl.arange(0, BS)
        sees = visible(first, last, p_mask, mask_t, mask_s, o_t, o_s, T, LIMITS, MASK)
        p_tile = p_weights + i_row * S + o_s[None, :]
        scores = tl.load(p_tile, sees, float("-inf"))
        tl.store(p_tile, tl.where(sees, softmax_term(scores, base, UNIT) * inverse, 0.0), (o_s < S)[None, :])
