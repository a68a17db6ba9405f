"""ld, st, atom, red, cp.async, mapa and fences."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeAlias

import numpy as np

from .block import Block
from .memory import Access, Space
from .operation import unsupported
from .parse import Address, Immediate, Instruction, Operand, Register, Symbol, Vector
from .registers import Reader, Step, mask_lanes, reader, writer
from .rounding import Array
from .values import CLUSTER_SHIFT, GLOBAL_WINDOW, LOCAL_WINDOW, SHARED_WINDOW, UNSIGNED, WIDTH, decode, encode, is_signed

SPACES = ("global", "shared", "shared_cluster", "param", "local", "const")
STRONG = {"relaxed", "acquire", "release", "volatile", "mmio"}
UNCACHED = {"cg", "cv", "L1::no_allocate", *STRONG}  # loads that leave nothing in L1


def space_of(instruction: Instruction) -> str:
    """The state space that the opcode names, or generic."""
    return next((part for part in instruction.parts if part in SPACES), "generic")


def elements(instruction: Instruction) -> int:
    vector = next((part for part in instruction.parts if re.fullmatch(r"v[248]", part)), "v1")
    return int(vector[1:])


def address_reader(operand: Operand) -> Reader:
    """Addresses as int64, one per thread or one for all."""
    assert isinstance(operand, Address)
    base, offset = operand.base, np.int64(operand.offset)
    if isinstance(base, Symbol | Immediate):
        fixed = np.array((base.address if isinstance(base, Symbol) else int(base.text, 0)) + operand.offset)
        return lambda block: fixed
    assert isinstance(base, Register)
    read = reader(base, f"u{8 * WIDTH[base.type]}")
    if WIDTH[base.type] == 4:
        return lambda block: (read(block).astype(np.int64) + offset) & 0xFFFFFFFF
    return lambda block: read(block).astype(np.int64) + offset


Request: TypeAlias = tuple[Space, Access, Array]


def requests(block: Block, space: str, addresses: Array, mask: Array | None, size: int, width: int) -> Iterator[Request]:
    """The accesses of one instruction by space, each with the positions of its lanes: generic addresses may go to several."""
    lanes = block.active(mask)
    wanted = block.spread(addresses)[lanes]
    everyone = np.arange(lanes.size)
    if space == "shared_cluster":
        for owner in np.unique(wanted >> CLUSTER_SHIFT):
            if owner > len(block.cluster):
                raise block.fault("no such block", f"an address of block {owner - 1} of a cluster of {len(block.cluster)}", int(lanes[0]))
            inside = wanted >> CLUSTER_SHIFT == owner
            shared = block.shared if owner == 0 else block.cluster[int(owner) - 1].shared
            yield shared, Access(block, lanes[inside], wanted[inside] - (owner << CLUSTER_SHIFT), size, width), everyone[inside]
        return
    if space != "generic":
        memory, start = home(block, space)
        yield memory, Access(block, lanes, wanted - start, size, width), everyone
        return
    window = wanted >> 48
    for space_window, name in ((SHARED_WINDOW, "shared"), (LOCAL_WINDOW, "local")):
        inside = window == space_window >> 48
        if inside.any():
            memory, _ = home(block, name)
            yield memory, Access(block, lanes[inside], wanted[inside] - space_window, size, width), everyone[inside]
    inside = (window != SHARED_WINDOW >> 48) & (window != LOCAL_WINDOW >> 48)
    if inside.any():
        yield block.global_, Access(block, lanes[inside], wanted[inside] - GLOBAL_WINDOW, size, width), everyone[inside]


def home(block: Block, space: str) -> tuple[Space, int]:
    """A space and the address at which it starts."""
    if space in ("global", "const"):
        return block.global_, GLOBAL_WINDOW
    spaces: dict[str, Space] = {"shared": block.shared, "local": block.local, "param": block.parameters}
    return spaces[space], 0


def load(instruction: Instruction) -> Step:
    target, source = instruction.operands[:2]
    type_, count, space = instruction.type, elements(instruction), space_of(instruction)
    strong = bool(STRONG & set(instruction.parts))
    bits = f"s{8 * WIDTH[type_]}" if is_signed(type_) else f"b{8 * WIDTH[type_]}"
    uncached = bool(UNCACHED & set(instruction.parts))
    writers = [writer(item, bits) for item in (target.items if isinstance(target, Vector) else (target,))]
    addresses, width = address_reader(source), WIDTH[type_]

    def step(block: Block, mask: Array | None) -> None:
        where = addresses(block)
        if space == "param" and where.ndim == 0:
            found = block.parameters.load(Access(block, block.lanes[:1], where.reshape(1), count * width, width))
            for index, write in enumerate(writers):
                write(block, found[0, index], mask)
            return
        lanes = block.active(mask)
        values = np.zeros((lanes.size, count), UNSIGNED[width])
        for memory, access, chosen in requests(block, space, where, mask, count * width, width):
            values[chosen] = memory.load(replace(access, cached=False) if uncached else access, strong)
        for index, write in enumerate(writers):
            write(block, mask_lanes(block, mask, lanes, values[:, index]), mask)

    return step


def store(instruction: Instruction) -> Step:
    target, source = instruction.operands[:2]
    type_, count, space = instruction.type, elements(instruction), space_of(instruction)
    strong = bool(STRONG & set(instruction.parts))
    bits = f"b{8 * WIDTH[type_]}"
    readers = [reader(item, bits) for item in (source.items if isinstance(source, Vector) else (source,))]
    addresses, width = address_reader(target), WIDTH[type_]

    def step(block: Block, mask: Array | None) -> None:
        lanes = block.active(mask)
        values = np.stack([block.spread(read(block)) for read in readers], 1)[lanes]
        for memory, access, chosen in requests(block, space, addresses(block), mask, count * width, width):
            memory.store(access, values[chosen], strong)

    return step


ATOMICS: dict[str, Callable[[Array, Array], Array]] = {
    "add": lambda old, b: old + b,
    "min": np.minimum,
    "max": np.maximum,
    "and": lambda old, b: old & b,
    "or": lambda old, b: old | b,
    "xor": lambda old, b: old ^ b,
    "exch": lambda old, b: b,
    "inc": lambda old, b: np.where(old >= b, old.dtype.type(0), old + old.dtype.type(1)),
    "dec": lambda old, b: np.where((old == 0) | (old > b), b, old - old.dtype.type(1)),
}


def atomic(instruction: Instruction) -> Step:
    """atom and red, lane after lane."""
    returns = instruction.opcode == "atom"
    operands = list(instruction.operands)
    write = writer(operands.pop(0), f"b{8 * WIDTH[instruction.type]}") if returns else None
    type_, width, space = instruction.type, WIDTH[instruction.type], space_of(instruction)
    name = next((part for part in instruction.parts if part in ATOMICS or part == "cas"), "")
    if not name or any(isinstance(operand, Vector) for operand in operands):
        raise unsupported(instruction)
    addresses, sources = address_reader(operands[0]), [reader(operand, f"b{8 * width}") for operand in operands[1:]]

    def step(block: Block, mask: Array | None) -> None:
        lanes = block.active(mask)
        arguments = [block.spread(read(block)) for read in sources]
        old = np.zeros(lanes.size, UNSIGNED[width])
        for memory, access, chosen in requests(block, space, addresses(block), mask, width, width):
            memory.check(access)
            memory.check_initialised(access, *memory.units(access))
            memory.update(access)
            if memory is block.global_:
                block.global_.order.atomic(block.number, access.lanes, access.offsets)
            block.counts[f"{memory.name} atomics"] += access.lanes.size
            for number, lane in enumerate(access.lanes):
                one = access.part(np.array([number]))
                before = memory.gather(one)[0]
                old[chosen[number]] = before[0]
                value = decode(before, type_)
                own = [decode(argument[lane], type_) for argument in arguments]
                after = np.where(value == own[0], own[1], value) if name == "cas" else ATOMICS[name](value, own[0])
                memory.scatter(one, encode(np.asarray(after), type_).reshape(1, 1))
        if write is not None:
            write(block, mask_lanes(block, mask, lanes, old), mask)

    return step


def fence(instruction: Instruction) -> Step:
    """Fences of the whole device or more order blocks; within a block it is barriers that order threads."""
    wide = bool({"gl", "sys", "gpu"} & set(instruction.parts))

    def step(block: Block, mask: Array | None) -> None:
        if wide:
            block.global_.order.fence(block.number, block.active(mask), block.clock)

    return step


def mapa(instruction: Instruction) -> Step:
    """The address, in the window of the cluster, of what lies in another block's shared memory where an address lies in this one's."""
    target, source, rank = instruction.operands
    if instruction.parts != ("shared_cluster", "u32"):
        raise unsupported(instruction)
    write, read, read_rank = writer(target, "u32"), reader(source, "u32"), reader(rank, "u32")

    def step(block: Block, mask: Array | None) -> None:
        lanes = block.active(mask)
        ranks = block.spread(read_rank(block)).astype(np.int64)
        strangers = ranks[lanes] >= len(block.cluster)
        if strangers.any():
            lane = int(lanes[strangers.argmax()])
            raise block.fault("no such block", f"block {ranks[lane]} of a cluster of {len(block.cluster)}", lane)
        write(block, (((ranks + 1) << CLUSTER_SHIFT) + block.spread(read(block))).astype(np.uint32), mask)

    return step


class CopyQueue:
    """cp.async of one block. A copy arrives when a wait of its thread demands it and not before; groups are counted per thread."""

    def __init__(self, threads: int) -> None:
        self.committed = np.zeros(threads, np.int64)
        self.waiting: list[tuple[Access, Array, Array, int]] = []  # access, values, each lane's group, instruction

    def issue(self, access: Access, values: Array) -> None:
        self.waiting.append((access, values, self.committed[access.lanes], access.block.here))

    def commit(self, mask: Array | None) -> None:
        self.committed += 1 if mask is None else mask

    def wait(self, mask: Array | None, allowed: int) -> None:
        """Finishes the copies of all but each thread's ``allowed`` latest groups."""
        still = []
        for access, values, groups, place in self.waiting:
            due = groups < self.committed[access.lanes] - allowed
            if mask is not None:
                due &= mask[access.lanes]
            if due.any():
                access.block.shared.end_copy(access.part(due), values[due], place)
            if not due.all():
                still.append((access.part(~due), values[~due], groups[~due], place))
        self.waiting = still


def asynchronous_copy(instruction: Instruction) -> Step:
    parts = instruction.parts
    if "commit_group" in parts:
        return lambda block, mask: block.copies.commit(mask)
    if "wait_group" in parts:
        (allowed,) = instruction.operands
        assert isinstance(allowed, Immediate)
        count = int(allowed.text, 0)
        return lambda block, mask: block.copies.wait(mask, count)
    if "wait_all" in parts:
        return wait_all
    if parts[0] != "async" or "mbarrier" in parts or "bulk" in parts:
        raise unsupported(instruction)
    return copy(instruction)


def wait_all(block: Block, mask: Array | None) -> None:
    block.copies.commit(mask)
    block.copies.wait(mask, 0)


def copy(instruction: Instruction) -> Step:
    """16, 8 or 4 bytes per lane from global to shared memory; with a fourth operand, only so many are read and the rest is zero."""
    hinted = "L2::cache_hint" in instruction.parts
    target, source, size_operand, *rest = instruction.operands[:-1] if hinted else instruction.operands
    assert isinstance(size_operand, Immediate)
    size, cached = int(size_operand.text, 0), "ca" in instruction.parts
    to, from_ = address_reader(target), address_reader(source)
    used = reader(rest[0], "u32") if rest else None

    def step(block: Block, mask: Array | None) -> None:
        lanes = block.active(mask)
        targets, sources = (block.spread(read(block))[lanes] for read in (to, from_))
        counts = np.full(lanes.size, size) if used is None else np.minimum(block.spread(used(block))[lanes], size)
        shared = Access(block, lanes, targets, size, 4)
        if (sources % size).any():
            lane = int((sources % size != 0).argmax())
            raise block.fault(
                "misaligned global access",
                f"{size} bytes at {block.global_.describe(int(sources[lane]) - GLOBAL_WINDOW)}",
                int(lanes[lane]),
            )
        words = np.zeros((lanes.size, size // 4), np.uint32)
        for count in np.unique(counts[counts > 0]):
            chosen = counts == count
            words[chosen] = partial_words(block, lanes[chosen], sources[chosen] - GLOBAL_WINDOW, int(count), size, cached)
        block.shared.begin_copy(shared)
        block.copies.issue(shared, words)

    return step


def partial_words(block: Block, lanes: Array, offsets: Array, count: int, size: int, cached: bool) -> Array:
    """``count`` bytes per lane, filled up with zeros to ``size``."""
    if count == size:
        return block.global_.load(Access(block, lanes, offsets, size, 4, cached))
    found = np.zeros((lanes.size, size), np.uint8)
    found[:, :count] = block.global_.load(Access(block, lanes, offsets, count, 1, cached))
    return found.view(np.uint32)


BUILDERS: dict[str, Callable[[Instruction], Step]] = {
    "ld": load,
    "ldu": load,
    "st": store,
    "atom": atomic,
    "red": atomic,
    "cp": asynchronous_copy,
    "mapa": mapa,
    "membar": fence,
    "fence": fence,
}
