"""What lanes of a warp do together: shfl, vote, match, redux, activemask, bar.warp.sync, ldmatrix, mma.

A step runs for whole warps at once; the scheduler sees to it that the lanes that an instruction names have all come.
"""

import re
from collections.abc import Callable

import numpy as np

from .access import address_reader
from .block import Block
from .memory import Access
from .operation import unsupported
from .parse import Instruction, Operand, Pair, Register, Vector
from .registers import Reader, Step, reader, writer
from .rounding import Array
from .values import encode, from_bf16, from_f16, halves, join

EVERY_LANE = np.array(0xFFFFFFFF, np.uint32)


def by_warp(block: Block, values: Array) -> Array:
    """[warps, 32], with zeros for lanes that a last, incomplete warp lacks."""
    full = np.zeros(32 * block.clock.warps, values.dtype)
    full[: block.threads] = block.spread(values)
    return full.reshape(-1, 32)


def by_thread(block: Block, values: Array) -> Array:
    """The inverse: [warps] or [warps, 32] to one value per thread."""
    wide = np.repeat(values, 32) if values.ndim == 1 else values.reshape(-1)
    return wide[: block.threads]


def lane_bits(block: Block, flags: Array) -> Array:
    """One word per warp with a bit for each lane whose flag is set."""
    return np.asarray((by_warp(block, flags).astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1)).astype(np.uint32)


def present(block: Block, mask: Array | None) -> Array:
    return np.ones(block.threads, bool) if mask is None else mask


def members(instruction: Instruction) -> Reader:
    """The mask of lanes that an instruction names; those without an operand for it name all."""
    takes_mask = instruction.opcode in ("shfl", "vote", "redux", "match") or instruction.parts[:1] == ("warp",)
    if takes_mask and "sync" in instruction.parts:
        return reader(instruction.operands[-1], "b32")
    return lambda block: EVERY_LANE


def shfl(instruction: Instruction) -> Step:
    target, value, lane, clamp = instruction.operands[:4]
    first, second = (target.first, target.second) if isinstance(target, Pair) else (target, None)
    write, write_found = writer(first, "b32"), writer(second, "pred") if second is not None else None
    read, read_lane, read_clamp = reader(value, "b32"), reader(lane, "b32"), reader(clamp, "b32")
    mode = next(part for part in instruction.parts if part in ("up", "down", "bfly", "idx"))

    def step(block: Block, mask: Array | None) -> None:
        own = block.lanes % 32
        b, c = (block.spread(source(block)).astype(np.int64) for source in (read_lane, read_clamp))
        b, limit, segment = b & 31, c & 31, c >> 8 & 31
        low = own & segment
        high = low | (limit & ~segment)
        source = {"up": own - b, "down": own + b, "bfly": own ^ b, "idx": low | (b & ~segment)}[mode]
        found = source >= high if mode == "up" else source <= high
        source = block.lanes - own + np.where(found, source, own)
        active = present(block, mask)
        absent = active & ((source >= block.threads) | ~active[np.minimum(source, block.threads - 1)])
        if absent.any():
            lane = int(absent.argmax())
            raise block.fault("shuffle from an inactive lane", f"lane {source[lane] % 32} does not take part", lane)
        write(block, block.spread(read(block))[source], mask)
        if write_found is not None:
            write_found(block, found, mask)

    return step


def vote(instruction: Instruction) -> Step:
    target, predicate = instruction.operands[:2]
    mode = next(part for part in instruction.parts if part in ("ballot", "all", "any", "uni"))
    write, read = writer(target, "b32" if mode == "ballot" else "pred"), reader(predicate, "pred")

    def step(block: Block, mask: Array | None) -> None:
        lanes = present(block, mask)
        wanted = block.spread(members(instruction)(block)) if "sync" in instruction.parts else by_thread(block, lane_bits(block, lanes))
        said = by_thread(block, lane_bits(block, block.spread(read(block)) & lanes)) & wanted
        result = {"ballot": said, "any": said != 0, "all": said == wanted, "uni": (said == 0) | (said == wanted)}[mode]
        write(block, result, mask)

    return step


def match(instruction: Instruction) -> Step:
    """Which named lanes hold the same value (any), or whether all do (all)."""
    target, value, _ = instruction.operands
    first, second = (target.first, target.second) if isinstance(target, Pair) else (target, None)
    write, write_all = writer(first, "b32"), writer(second, "pred") if second is not None else None
    read, wanted = reader(value, instruction.type), members(instruction)

    def step(block: Block, mask: Array | None) -> None:
        values, named = by_warp(block, read(block)), by_warp(block, wanted(block))
        bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
        same = (values[:, :, None] == values[:, None, :]) & ((named[:, :, None] & bits) != 0)
        equal = (same * bits.astype(np.uint64)).sum(2).astype(np.uint32)
        if "any" in instruction.parts:
            write(block, by_thread(block, equal), mask)
            return
        everywhere = equal == named
        write(block, by_thread(block, np.where(everywhere, named, np.uint32(0))), mask)
        if write_all is not None:
            write_all(block, by_thread(block, everywhere), mask)

    return step


def redux(instruction: Instruction) -> Step:
    target, value, _ = instruction.operands
    type_ = instruction.type
    write, read, wanted = writer(target, type_), reader(value, type_), members(instruction)
    name = next(part for part in instruction.parts if part in ("add", "min", "max", "and", "or", "xor"))
    reduce = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[name]

    def step(block: Block, mask: Array | None) -> None:
        values, named = block.spread(read(block)), block.spread(wanted(block))
        result = np.zeros(block.threads, values.dtype)
        groups = block.lanes // 32 * (1 << 32) + named.astype(np.int64)
        for group in np.unique(groups[present(block, mask)]):
            chosen = present(block, mask) & (groups == group)
            result[chosen] = reduce.reduce(values[chosen])
        write(block, result, mask)

    return step


def activemask(instruction: Instruction) -> Step:
    write = writer(instruction.operands[0], "b32")
    return lambda block, mask: write(block, by_thread(block, lane_bits(block, present(block, mask))), mask)


def warp_barrier(instruction: Instruction) -> Step:
    return lambda block, mask: block.clock.warp_sync(present(block, mask))


def ldmatrix(instruction: Instruction) -> Step:
    """8x8 matrices of 16-bit elements: lanes 8i to 8i+7 give the rows of matrix i, every lane gets two neighbours of a row."""
    target, source = instruction.operands
    count = int(next(part for part in instruction.parts if re.fullmatch(r"x[124]", part))[1:])
    if "m8n8" not in instruction.parts or instruction.type != "b16":
        raise unsupported(instruction)
    transposed = "trans" in instruction.parts
    writers = [writer(item, "b32") for item in (target.items if isinstance(target, Vector) else (target,))]
    addresses = address_reader(source)

    def step(block: Block, mask: Array | None) -> None:
        lanes = np.flatnonzero(present(block, mask) & (block.lanes % 32 < 8 * count))
        rows = block.shared.load(Access(block, lanes, block.spread(addresses(block))[lanes], 16, 4))
        matrices = halves(rows.reshape(-1, count, 8, 4)).reshape(-1, count, 8, 8)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        pairs = join(matrices.reshape(-1, count, 32, 2))
        for index, write in enumerate(writers):
            full = np.zeros(block.threads, np.uint32)
            full[block.active(mask)] = pairs[:, index].reshape(-1)
            write(block, full, mask)

    return step


class Fragment:
    """Where the lanes of a warp hold the elements of a matrix of an mma.

    ``rows`` and ``columns`` are [registers, 32, elements of a register]. Lane l is in group l // 4 and is its thread l % 4 (PTX ISA,
    "Matrix fragments for mma.m16n8k8" and the like).
    """

    def __init__(self, kind: str, registers: int, packed: int) -> None:
        register, lane, element = np.ogrid[:registers, :32, :packed]
        group, thread = lane // 4, lane % 4
        step = 4 * packed
        if kind == "a":
            self.rows, self.columns = group + 8 * (register % 2), thread * packed + element + step * (register // 2)
        elif kind == "b":
            self.rows, self.columns = thread * packed + element + step * register, group
        elif packed == 2:
            self.rows, self.columns = group + 8 * register, thread * 2 + element
        else:
            self.rows, self.columns = group + 8 * (register // 2), thread * 2 + register % 2

    def gather(self, registers: Array, shape: tuple[int, int]) -> Array:
        """[warps, registers, 32, elements] to [warps, rows, columns]."""
        matrix = np.zeros((registers.shape[0], *shape), np.float64)
        matrix[:, self.rows, self.columns] = registers
        return matrix

    def scatter(self, matrix: Array) -> Array:
        return np.asarray(matrix[:, self.rows, self.columns])


def unpack(words: Array, type_: str) -> Array:
    """Registers to float32 elements on a last axis; of tf32 the low 13 bits do not count."""
    if type_ == "tf32":
        return (words & np.uint32(0xFFFFE000)).view(np.float32)[..., None]
    if type_ == "f32":
        return words.view(np.float32)[..., None]
    return (from_f16 if type_ == "f16" else from_bf16)(halves(words))


def mma_f64(instruction: Instruction) -> Step:
    """``d = a b + c`` of m8n8k4: products are added one after another, each with a rounding."""
    target, *operands = (register_list(operand) for operand in instruction.operands)
    readers = [[reader(item, "f64") for item in items] for items in operands]
    writers = [writer(item, "f64") for item in target]
    group, thread = np.arange(32) // 4, np.arange(32) % 4

    def step(block: Block, mask: Array | None) -> None:
        if block.threads % 32:
            raise block.fault("incomplete warp", "mma needs all 32 lanes", block.threads - 1)
        (a,), (b,), c = ([by_warp(block, read(block)) for read in items] for items in readers)
        first, second = np.empty((2, len(a), 8, 4))
        first[:, group, thread], second[:, group, thread] = a, b
        for index, write in enumerate(writers):
            total = c[index]
            for k in range(4):
                total = total + first[:, group, k] * second[:, 2 * thread + index, k]
            write(block, total.reshape(-1), mask)

    return step


def mma(instruction: Instruction) -> Step:
    """``d = a b + c``: the sum of each element is rounded once here, where the hardware rounds in an order of its own."""
    if "m8n8k4" in instruction.parts and instruction.parts[-4:] == ("f64",) * 4:
        return mma_f64(instruction)
    shape = next((part for part in instruction.parts if re.fullmatch(r"m16n8k(4|8|16)", part)), "")
    type_d, type_a, type_b, type_c = instruction.parts[-4:]
    if not shape or type_a != type_b or type_a not in ("f16", "bf16", "tf32") or not {type_c, type_d} <= {"f16", "f32"}:
        raise unsupported(instruction)
    depth = int(shape[6:])
    target, *operands = (register_list(operand) for operand in instruction.operands)
    packed = 1 if type_a == "tf32" else 2
    layout_a, layout_b = Fragment("a", len(operands[0]), packed), Fragment("b", len(operands[1]), packed)
    layout_c, layout_d = (
        Fragment("c", len(items), 1 if type_ == "f32" else 2) for items, type_ in ((operands[2], type_c), (target, type_d))
    )
    readers = [[reader(item, "b32") for item in items] for items in operands]
    writers = [writer(item, "b32") for item in target]

    def step(block: Block, mask: Array | None) -> None:
        if block.threads % 32:
            raise block.fault("incomplete warp", "mma needs all 32 lanes", block.threads - 1)
        words = [np.stack([by_warp(block, read(block)) for read in group], 1) for group in readers]
        a = layout_a.gather(unpack(words[0], type_a), (16, depth))
        b = layout_b.gather(unpack(words[1], type_b), (depth, 8))
        c = layout_c.gather(unpack(words[2], type_c), (16, 8))
        result = layout_d.scatter(a @ b + c)
        if type_d == "f32":
            bits = encode(result[..., 0].astype(np.float32), "f32")
        else:
            bits = encode(result, "f16x2")
        for index, write in enumerate(writers):
            write(block, bits[:, index].reshape(-1), mask)

    return step


def register_list(operand: Operand) -> tuple[Operand, ...]:
    assert isinstance(operand, Vector | Register)
    return operand.items if isinstance(operand, Vector) else (operand,)


BUILDERS: dict[str, Callable[[Instruction], Step]] = {
    "shfl": shfl,
    "vote": vote,
    "match": match,
    "redux": redux,
    "ldmatrix": ldmatrix,
    "mma": mma,
}
