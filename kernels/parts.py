"""What the ops share: the one way to launch a kernel, what kernels are given, and the launches that ops are made of, with their outputs."""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from onepass.kernels import backward, forward, tiles
from onepass.kernels.tanh_gradients import tanh_gradients
from onepass.kernels.tuning import chosen

INTERPRETED = bool(triton.knobs.runtime.interpret)
OVER_SOURCE, OVER_QUERIES = True, False  # what is summed over
NARROW = 8  # channels up to which merging reciprocals gains nothing, and would cost accuracy
TYPES = {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Limits(NamedTuple):
    """What queries see, as kernels take it."""

    lengths: Tensor
    mask: Tensor
    strides: tuple[int, ...]  # of lengths by B and T, of the mask by B, H, T, S
    constants: dict[str, Any]

    @property
    def hide(self) -> bool:
        """Whether some queries may see what others do not."""
        return self.constants["LIMITS"] > 1 or bool(self.constants["MASK"])


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


@functools.cache
def device_of(device: torch.device) -> tiles.Device:
    if INTERPRETED:
        return tiles.INTERPRETER
    found = torch.cuda.get_device_properties(device)
    return tiles.Device(found.multi_processor_count, found.warp_size, "gcn" if torch.version.hip else "ptx", 10 * found.major + found.minor)


def arithmetic(query: Tensor) -> dict[str, Any]:
    """The constants that the dtype and the device decide; matrix products of float32 follow torch's own, where there is TF32."""
    double, unit = query.dtype == torch.float64, device_of(query.device).unit
    tf32 = query.dtype == torch.float32 and unit != "gcn" and torch.backends.cuda.matmul.fp32_precision == "tf32"
    unit = "plain" if double else unit
    return {"UNIT": unit, "PRECISION": "tf32" if tf32 else "ieee", "ACC": tl.float64 if double else tl.float32}


def limits_of(lengths: Tensor | None, mask: Tensor | None, like: Tensor) -> Limits:
    strides: tuple[int, ...] = (0, 0) if lengths is None else (lengths.stride(0), lengths.stride(1) if lengths.dim() > 1 else 0)
    if lengths is not None and lengths.dim() == 3 and lengths.stride(2) != 1:
        lengths = lengths.contiguous()
        strides = lengths.stride()[:2]
    if mask is not None:
        by_head = mask if mask.dim() == 4 else mask.unsqueeze(1)
        strides += tuple(0 if size == 1 else stride for size, stride in zip(by_head.shape, by_head.stride(), strict=True))
        mask = mask.view(torch.uint8)
    else:
        strides += (0, 0, 0, 0)
    constants = {"LIMITS": 0 if lengths is None else lengths.dim(), "MASK": mask is not None}
    return Limits(like if lengths is None else lengths, like if mask is None else mask, strides, constants)


def rows_of(tensor: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """A tensor ``[B, (H,) N, W]`` with a last stride of 1, and its strides by B, H and N."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        tensor = tensor.contiguous()
    strides = tensor.stride()
    return tensor, (strides[0], strides[1] if tensor.dim() == 4 else 0, strides[-2])


def heads_of(tensor: Tensor) -> int:
    return tensor.shape[1] if tensor.dim() == 4 else 1


def launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    if programs > 0:
        kernel[(programs,)](*arguments, **constants, **({} if INTERPRETED else {"enable_fp_fusion": True}))


def blocks(tile: tiles.Tile, *names: str) -> dict[str, int]:
    sizes = {name: getattr(tile, name) for name in names}
    if INTERPRETED:
        return sizes
    registers = {"maxnreg": tile.registers} if tile.registers else {}
    return {**sizes, "num_warps": tile.warps, "num_stages": tile.stages, **registers}


def attend(
    query: Tensor, keys: Tensor, values: Tensor | None, v: Tensor | None, scale: float, lengths: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Context and weights; without values, scores in place of weights. Additive with ``v``."""
    B, H, T, S, A = query.shape[0], heads_of(query), query.shape[-2], keys.shape[-2], query.shape[-1]
    D = 0 if values is None else values.shape[-1]
    lead, wide = query.shape[:-1], accumulator(query.dtype)
    context = query.new_empty((*lead, D))
    weights = query.new_empty((*lead, S), dtype=query.dtype if values is None else wide)
    if S == 0:
        return context.zero_(), weights
    limits = limits_of(lengths, mask, query)
    query, q_strides = rows_of(query)
    keys, k_strides = rows_of(keys)
    scores_only = values is None
    values, values_strides = (keys, (0, 0, 0)) if values is None else rows_of(values)
    constants = {**limits.constants, **arithmetic(query)}
    rule = tiles.attend_tile(B * H, T, S, D, query.dtype, v is not None, limits.hide, device_of(query.device))
    tile = chosen("attend", rule, "BT", "BS", "BD")
    per_split = -(-S // (tile.BS * (1 if scores_only else tile.parts))) * tile.BS
    splits = -(-S // per_split)
    highest = sums = parts = context
    if splits > 1:
        highest, sums = query.new_empty((2, splits, *lead), dtype=wide)
        parts = query.new_empty((splits, *lead, D), dtype=wide)
    programs = -(-T // tile.BT) * splits * B * H
    launch(
        forward.attend, programs, query, keys, values, query if v is None else v.contiguous(), limits.lengths, limits.mask,
        context, weights, highest, sums, parts, scale, *q_strides, *k_strides, *values_strides, A, *limits.strides,
        H, T, S, A, D, per_split, splits, **constants, ADDITIVE=v is not None, SCORES=scores_only, SPLIT=splits > 1,
        EVEN=A % 4 == 0, DIRECT=A <= NARROW or query.dtype == torch.float64, **blocks(tile, "BT", "BS", "BA", "BK", "BD"),
    )  # fmt: skip
    if splits > 1:
        launch(
            forward.combine, B * H * T, limits.lengths, limits.mask, context, weights, highest, sums, parts, *limits.strides,
            H, T, S, D, B * H * T, splits, **limits.constants, UNIT=constants["UNIT"], ACC=constants["ACC"], BS=256, BD=128,
        )  # fmt: skip
    return context, weights


def attend_online(query: Tensor, keys: Tensor, values: Tensor, scale: float, lengths: Tensor | None, mask: Tensor | None) -> Tensor:
    """The context of multiplicative attention, of at least one position, whose weights are not kept."""
    B, H, T, S, A, D = query.shape[0], heads_of(query), query.shape[-2], keys.shape[-2], query.shape[-1], values.shape[-1]
    context = query.new_empty((*query.shape[:-1], D))
    limits = limits_of(lengths, mask, query)
    (query, q_strides), (keys, k_strides), (values, values_strides) = rows_of(query), rows_of(keys), rows_of(values)
    tile = chosen("attend_online", tiles.online_tile(T, D, query.dtype, limits.hide, device_of(query.device)), "BT", "BS")
    programs = max(1, -(-D // tile.BD)) * -(-T // tile.BT) * B * H
    launch(
        forward.attend_online, programs, query, keys, values, limits.lengths, limits.mask, context, scale,
        *q_strides, *k_strides, *values_strides, *limits.strides, H, T, S, A, D,
        **limits.constants, **arithmetic(query), **blocks(tile, "BT", "BS", "BA", "BD"),
    )  # fmt: skip
    return context


def score_gradients(
    grad_context: Tensor | None,
    grad_weights: Tensor | None,
    values: Tensor,
    weights: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    *,
    of_weights: bool = False,
    by_source: bool = False,
) -> Tensor:
    """The gradients of scores, ``[B, (H,) T, S]``; or those of weights. ``by_source``: as ``tanh_gradients`` takes them,
    ``[B, (H,) S, T]``, with zeros up to whole tiles of T and vectors of any width."""
    rows = grad_weights if grad_context is None else grad_context
    assert rows is not None
    B, H, T, S, D = rows.shape[0], heads_of(values), rows.shape[-2], values.shape[-2], values.shape[-1]
    wide = accumulator(rows.dtype)
    whole = -(-T // tiles.queries_together(T)) * tiles.queries_together(T)
    columns = -(-whole // 16) * 16 if by_source else T
    gradients = rows.new_empty((*rows.shape[:-2], *((S, columns) if by_source else (T, S))), dtype=wide)
    strides = (1, columns) if by_source else (S, 1)
    limits = limits_of(lengths, mask, rows)
    none = (rows, (0, 0, 0))
    (values, values_strides), (dense_weights, weights_strides) = rows_of(values), none if weights is None else rows_of(weights)
    context, context_strides = none if grad_context is None else rows_of(grad_context)
    more, more_strides = none if grad_weights is None else rows_of(grad_weights)
    by_query = lengths is not None and lengths.dim() > 1
    rule = tiles.products_tile(B * H, T, S, rows.dtype, limits.hide, by_query, device_of(rows.device))
    tile = chosen("weight_gradients", rule, "BT", "BS", "BD")
    per_split = max(1, -(-S // (tile.BS * tile.parts))) * tile.BS
    splits = max(1, -(-S // per_split))
    inner = rows.new_empty((splits, B, H, T), dtype=wide)
    constants = {**limits.constants, **arithmetic(rows)}
    launch(
        backward.weight_gradients, -(-columns // tile.BT) * splits * B * H if S else 0, context, values, dense_weights, more,
        limits.lengths, limits.mask, gradients, inner, *context_strides, *values_strides, *weights_strides, *more_strides, *strides,
        *limits.strides,
        H, T, S, D, columns, per_split, splits, **constants, ROWS=grad_context is not None, MORE=grad_weights is not None,
        INNER=not of_weights, **blocks(tile, "BT", "BS", "BD"),
    )  # fmt: skip
    if not of_weights:
        BT = min(16, tiles.power_of_2(T))
        launch(
            backward.softmax_gradients, -(-T // BT) * -(-S // (1024 // BT)) * B * H, dense_weights, inner, limits.lengths, limits.mask,
            gradients, *weights_strides, *strides, *limits.strides, H, T, S, columns, B * H * T, splits,
            **limits.constants, BT=BT, BS=1024 // BT,
        )  # fmt: skip
    return gradients


def sums(
    over_source: bool,
    weights: Tensor,
    rows: Tensor,
    lengths: Tensor | None,
    mask: Tensor | None,
    factor: float = 1.0,
    dtype: torch.dtype | None = None,
    *,
    wide: bool = False,
) -> Tensor:
    """Of ``weights [B, (H,) T, S]`` times rows, of S or of T, with factors in the rows' dtype or the one that is given; so are the sums, or
    as they accumulate."""
    dtype = dtype or rows.dtype
    B, H, (T, S), D = weights.shape[0], heads_of(weights), weights.shape[-2:], rows.shape[-1]
    out = rows.new_empty((*weights.shape[:-2], T if over_source else S, D), dtype=accumulator(dtype) if wide else dtype)
    limits = limits_of(lengths, mask, rows)
    (weights, weights_strides), (rows, rows_strides) = rows_of(weights), rows_of(rows)
    rule = tiles.sums_tile(over_source, B * H, T, S, D, out.dtype, limits.hide, device_of(rows.device))
    tile = chosen("sums over the source" if over_source else "sums over queries", rule, "BT", "BS", "BD")
    tiles_of_out = -(-T // tile.BT) if over_source else -(-S // tile.BS)
    per_program = tile.BD * max(1, -(-D // (tile.BD * tile.parts)))
    launch(
        backward.sums, -(-D // per_program) * tiles_of_out * B * H, weights, rows, limits.lengths, limits.mask, out, factor,
        *weights_strides, *rows_strides, *limits.strides, H, T, S, D, per_program, OVER_SOURCE=over_source,
        **limits.constants, **arithmetic(out), FACTOR=TYPES[dtype], **blocks(tile, "BT", "BS", "BD"),
    )  # fmt: skip
    return out


def tanh_sums(
    gradients: Tensor,
    query: Tensor,
    keys: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    mask: Tensor | None,
    *,
    of_query: bool = True,
    of_source: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the query and of the source, keys and v, from those of scores: 0 where not visible, and by source where the source's are
    asked for. What is not asked for has no elements."""
    B, H, T, S, A = query.shape[0], heads_of(query), query.shape[-2], keys.shape[-2], query.shape[-1]
    dtype, wide = query.dtype, accumulator(query.dtype)
    hides = mask is not None or (lengths is not None and lengths.dim() > 1)
    if hides:
        counts = (gradients != 0).any(-2 if of_source else -1)[..., :T]
        query = query.masked_fill(~counts[..., None], 0)
    limits = limits_of(lengths, None, query)
    tile = chosen("tanh_gradients", tiles.tanh_gradients_tile(B * H, T, S, A, device_of(query.device)), "BA")
    per_group = max(1, -(-S // (tile.BS * tile.parts))) * tile.BS
    groups = max(1, -(-S // per_group))
    gradients, (*g_lead, g_row) = rows_of(gradients)
    dq = dk = dw = totals = gradients  # in place of what the kernel makes no use of
    if of_query:
        dq = query.new_empty((groups, B, H, T, A), dtype=wide)
    if of_source:
        dk = (keys.new_empty if T else keys.new_zeros)(keys.shape, dtype=wide)
        dw = query.new_empty((groups, B, H, A), dtype=wide)
        totals = gradients[..., : -(-T // tile.BT) * tile.BT].unflatten(-1, (-(-T // tile.BT), tile.BT)).sum(-1)
    (query, q_strides), (keys, k_strides) = rows_of(query), rows_of(keys)
    launch(
        tanh_gradients, -(-A // tile.BA) * groups * B * H, query, keys, v.contiguous(), gradients, totals, limits.lengths, dq, dk, dw,
        *q_strides, *k_strides, A, *g_lead, *((1, g_row) if of_source else (g_row, 1)), *limits.strides[:2], H, T, S, A, per_group, groups,
        LIMITS=limits.constants["LIMITS"], HIDES=hides, QUERY=of_query, KEYS=of_source, DIRECT=A <= NARROW or dtype == torch.float64,
        UNIT=arithmetic(query)["UNIT"], ACC=arithmetic(query)["ACC"], **blocks(tile, "BT", "BS", "BA"),
    )  # fmt: skip
    grad_query = grad_keys = grad_v = query.new_empty(0)
    if of_query:
        grad_query = (dq[0] if groups == 1 else dq.sum(0)).view(query.shape).to(dtype)
    if of_source:
        grad_keys, grad_v = dk.to(dtype), (-2 * dw.sum((0, 1))).view(v.shape).to(dtype)
    return grad_query, grad_keys, grad_v
