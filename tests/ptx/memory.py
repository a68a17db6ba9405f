"""Shared, local, parameter and global memory: data, bounds, alignment, initialisation, races and accounting."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .block import Block
from .cache import SECTOR
from .order import Order
from .races import BlockRaces, Ordered, ThreadRaces
from .rounding import Array
from .values import GLOBAL_WINDOW, UNSIGNED

MODULE = "module variables"
RED_ZONE, ALIGNMENT = 1024, 512
GARBAGE = 0xFF  # what uninitialised bytes hold: NaN as any float


@dataclass
class Buffer:
    """An array argument that starts ``offset`` bytes past a well-aligned address. Arrays that numpy may not write, the kernel may not."""

    array: npt.NDArray[Any]
    offset: int = 0
    uninitialised: bool = False


def Output(array: npt.NDArray[Any], offset: int = 0) -> Buffer:  # noqa: N802 - reads as a kind of Buffer
    """An array argument whose contents do not count before the kernel has written them; it starts as NaN."""
    return Buffer(array, offset, True)


@dataclass
class Traffic:
    """Bytes that lanes asked for, those that several lanes of a warp share counted once; without atomics.

    Of a machine with a cache, also what that cannot give: whole sectors that miss it, and those that each store instruction touches.
    """

    loaded: int = 0
    stored: int = 0
    fetched: int = 0
    written: int = 0

    def add(self, other: "Traffic") -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass(frozen=True)
class Access:
    """What lanes of a block ask for in one instruction: ``size`` bytes each, in elements of ``width``, at offsets into a space."""

    block: Block
    lanes: Array
    offsets: Array
    size: int
    width: int
    cached: bool = True  # whether it goes by way of the L1

    @property
    def alignment(self) -> int:
        """Accesses are aligned to their size; a copy of an odd number of bytes is checked by who asks for it."""
        return self.width if self.size & (self.size - 1) else self.size

    def part(self, chosen: Array) -> "Access":
        return Access(self.block, self.lanes[chosen], self.offsets[chosen], self.size, self.width, self.cached)


class Space(ABC):
    """Bytes with bounds. ``unit`` is the granule of what is known about them: no access is narrower."""

    def __init__(self, name: str, size: int, unit: int) -> None:
        self.name, self.size, self.unit = name, size, unit
        self.bytes = np.full(-(-size // 16) * 16, GARBAGE, np.uint8)
        self.views: dict[int, Array] = {width: self.bytes.view(dtype) for width, dtype in UNSIGNED.items()}
        self.initialised = np.zeros(-(-size // unit), bool)

    def units(self, access: Access) -> tuple[Array, Array]:
        """The units that an access covers, and the lane of each."""
        first, count = access.offsets // self.unit, -(-access.size // self.unit)
        if count <= 1:
            return first, access.lanes
        return (first[:, None] + np.arange(count)).reshape(-1), np.repeat(access.lanes, count)

    def check(self, access: Access) -> None:
        """Alignment and bounds."""
        if (access.offsets % access.alignment).any():
            lane = int((access.offsets % access.alignment != 0).argmax())
            detail = f"{access.size} bytes at {self.describe(int(access.offsets[lane]))}"
            raise access.block.fault(f"misaligned {self.name} access", detail, int(access.lanes[lane]))
        outside = self.outside(access)
        if outside.any():
            lane = int(outside.argmax())
            detail = f"{access.size} bytes at {self.describe(int(access.offsets[lane]))}"
            raise access.block.fault(f"{self.name} access out of bounds", detail, int(access.lanes[lane]))

    def outside(self, access: Access) -> Array:
        return (access.offsets < 0) | (access.offsets + access.size > self.size)

    def describe(self, offset: int) -> str:
        return f"offset {offset} of {self.size}"

    def gather(self, access: Access) -> Array:
        """Elements as [lanes, elements]."""
        view = self.views[access.width]
        first = access.offsets // access.width
        return view[first[:, None] + np.arange(access.size // access.width)]

    def scatter(self, access: Access, values: Array) -> None:
        view = self.views[access.width]
        places = (access.offsets // access.width)[:, None] + np.arange(access.size // access.width)
        view[places] = values
        if len(access.lanes) > 1:
            lost = (view[places] != values).any(1)
            if lost.any():
                lane = int(access.lanes[lost.argmax()])
                access.block.report(f"{self.name} race", "lanes of one instruction write different values to one address", lane)

    def check_initialised(self, access: Access, units: Array, lanes: Array) -> None:
        if not self.initialised[units].all():
            first = int((~self.initialised[units]).argmax())
            where = self.describe(int(units[first]) * self.unit)
            access.block.report(f"uninitialised {self.name} read", where, int(lanes[first]))

    @abstractmethod
    def load(self, access: Access, strong: bool = False) -> Array:
        """Elements as [lanes, elements], after all checks. Strong accesses do not race with each other."""

    @abstractmethod
    def store(self, access: Access, values: Array, strong: bool = False) -> None: ...

    def update(self, access: Access, strong: bool = True) -> None:
        """Checks what is about to be written, and by atomics read before."""
        self.initialised[self.units(access)[0]] = True


def distinct_per_warp(lanes: Array, keys: Array) -> Array:
    """The distinct pairs of warp and key, as sorted numbers with the key in the low 48 bits."""
    pairs = np.sort((lanes // 32 << 48) + keys)
    return without_repeats(pairs)


def without_repeats(ordered: Array) -> Array:
    return np.compress(np.concatenate([[True], ordered[1:] != ordered[:-1]]), ordered)


class SharedMemory(Space):
    """Shared memory of one block, with the asynchronous copies that are on their way into it. In a cluster, other blocks read and write it
    too: between barriers of the cluster, one may write only what no other touches, and only while the block is there."""

    def __init__(self, size: int, unit: int) -> None:
        super().__init__("shared", size, unit)
        self.races = ThreadRaces(len(self.initialised))
        self.pending = np.full(len(self.initialised), -1)  # the instruction of the copy, or -1
        self.copies_under_way = 0  # counted by lanes
        self.blocks: BlockRaces | None = None  # where there is a cluster
        self.visited, self.left = False, False  # by another block since the last barrier of the cluster; by its own for good

    def load(self, access: Access, strong: bool = False) -> Array:
        self.check(access)
        units, lanes = self.units(access)
        self._check_pending(access, units, lanes)
        self.check_initialised(access, units, lanes)
        block = access.block
        self._visit(access)
        if self.blocks is not None:
            block.report_race(self.blocks.read(units, lanes, block.here, block.number, strong), "race between blocks")
        block.report_race(self.races.read(units, lanes, block.here, block.clock, strong), "shared race")
        self._count(access)
        return self.gather(access)

    def store(self, access: Access, values: Array, strong: bool = False) -> None:
        self.check(access)
        self.update(access, strong)
        self.scatter(access, values)
        self._count(access)

    def update(self, access: Access, strong: bool = True) -> None:
        units, lanes = self.units(access)
        self._check_pending(access, units, lanes)
        self._race_write(access, units, lanes, strong)
        self.initialised[units] = True

    def begin_copy(self, access: Access) -> None:
        """From now on a copy may arrive at any time: it is a write already."""
        self.check(access)
        units, lanes = self.units(access)
        block = access.block
        self._check_pending(access, units, lanes)
        self._race_write(access, units, lanes)
        self.pending[units] = block.here
        self.copies_under_way += access.lanes.size

    def end_copy(self, access: Access, values: Array, place: int) -> None:
        units, lanes = self.units(access)
        self.pending[units] = -1
        self.initialised[units] = True
        self.races.note_write(units, lanes, place, access.block.clock)
        if self.blocks is not None:
            access.block.report_race(self.blocks.write(units, lanes, place, access.block.number), "race between blocks")
        self.scatter(access, values)
        self._count(access)
        self.copies_under_way -= access.lanes.size

    def meet(self) -> None:
        """The blocks of the cluster are at their barrier."""
        self.visited = False
        if self.blocks is not None:
            self.blocks.forget()

    def _race_write(self, access: Access, units: Array, lanes: Array, atomic: bool = False) -> None:
        block = access.block
        self._visit(access)
        if self.blocks is not None:
            block.report_race(self.blocks.write(units, lanes, block.here, block.number, atomic), "race between blocks")
        block.report_race(self.races.write(units, lanes, block.here, block.clock, atomic), "shared race")

    def _visit(self, access: Access) -> None:
        if access.block.shared is not self and access.lanes.size:
            self.visited = True
            if self.left:
                access.block.report("shared memory of a block that has left", self.describe(int(access.offsets[0])), int(access.lanes[0]))

    def _check_pending(self, access: Access, units: Array, lanes: Array) -> None:
        if not self.copies_under_way:
            return
        early = self.pending[units] >= 0
        if early.any():
            first = int(early.argmax())
            copy = int(self.pending[units[first]])
            access.block.report("shared access during a copy", "no wait covers the copy that is under way", int(lanes[first]), copy)

    def _count(self, access: Access) -> None:
        """Wavefronts: how often the fullest of the 32 banks is needed. Wider accesses go by half or quarter warps."""
        if not access.lanes.size:
            return
        if access.block.shared is not self:
            access.block.counts["cluster bytes"] += access.lanes.size * access.size
            return
        width = max(access.size, 4)
        group = access.lanes * width // 128
        banks = 128 // width
        places = without_repeats(np.sort((group << 48) + access.offsets // width))
        uses = np.bincount((places >> 48) * banks + places % banks, minlength=banks)
        padded = np.zeros(-(-uses.size // banks) * banks, np.int64)
        padded[: uses.size] = uses
        fullest = padded.reshape(-1, banks).max(1)
        access.block.counts["shared wavefronts"] += int(fullest.sum())
        access.block.counts["shared wavefronts at least"] += int((fullest > 0).sum())


class LocalMemory(Space):
    """Stacks of the threads, one behind the other."""

    def __init__(self, threads: int, size: int, unit: int) -> None:
        self.stack = -(-size // 16) * 16
        super().__init__("local", threads * self.stack, unit)

    def _own(self, access: Access) -> Access:
        outside = (access.offsets < 0) | (access.offsets + access.size > self.stack)
        if outside.any():
            lane = int(outside.argmax())
            raise access.block.fault(
                "local access out of bounds", f"offset {access.offsets[lane]} of {self.stack}", int(access.lanes[lane])
            )
        return Access(access.block, access.lanes, access.offsets + access.lanes * self.stack, access.size, access.width)

    def load(self, access: Access, strong: bool = False) -> Array:
        own = self._own(access)
        self.check(own)
        self.check_initialised(own, *self.units(own))
        return self.gather(own)

    def store(self, access: Access, values: Array, strong: bool = False) -> None:
        own = self._own(access)
        self.check(own)
        self.update(own)
        self.scatter(own, values)


class ParameterMemory(Space):
    """The arguments of a launch, read-only."""

    def __init__(self, content: bytes) -> None:
        super().__init__("param", len(content), 1)
        self.bytes[: len(content)] = np.frombuffer(content, np.uint8)

    def load(self, access: Access, strong: bool = False) -> Array:
        self.check(access)
        return self.gather(access)

    def store(self, access: Access, values: Array, strong: bool = False) -> None:
        raise access.block.fault("store to a parameter", "parameters are read-only", int(access.lanes[0]))


class GlobalMemory(Space):
    """All buffers of a launch in one space with red zones between, so that an overrun meets nobody's bytes."""

    def __init__(
        self, variables: Sequence[tuple[int, bytes]], variable_bytes: int, buffers: Sequence[tuple[str, Buffer]], unit: int
    ) -> None:
        starts, size = [0], variable_bytes
        for _, buffer in buffers:
            start = -(-(size + RED_ZONE) // ALIGNMENT) * ALIGNMENT + buffer.offset
            starts.append(start)
            size = start + buffer.array.nbytes
        super().__init__("global", size, unit)
        self.starts = np.array(starts)
        self.ends = self.starts + np.array([variable_bytes, *(buffer.array.nbytes for _, buffer in buffers)])
        self.names = [MODULE, *(name for name, _ in buffers)]
        self.buffers = [buffer for _, buffer in buffers]
        self.threads, self.blocks = ThreadRaces(len(self.initialised)), BlockRaces(len(self.initialised))
        self.several_blocks = False
        self.order = Order()
        self.read_only = np.array([False, *(not buffer.array.flags.writeable for buffer in self.buffers)])
        self.traffic = {name: Traffic() for name in self.names if name != MODULE or variable_bytes}
        for offset, content in variables:
            self.bytes[offset : offset + len(content)] = np.frombuffer(content, np.uint8)
        self.initialised[: -(-variable_bytes // unit)] = True
        for start, buffer in zip(starts[1:], self.buffers, strict=True):
            if not buffer.uninitialised:
                stop = start + buffer.array.nbytes
                self.bytes[start:stop] = raw_bytes(buffer.array)
                self.initialised[start // unit : -(-stop // unit)] = True

    def address(self, number: int) -> int:
        """Of the buffer ``number``."""
        return GLOBAL_WINDOW + int(self.starts[1 + number])

    def write_back(self) -> None:
        """The arrays get what the kernel left; what an output's kernel did not write becomes NaN or its like."""
        for start, buffer in zip(self.starts[1:], self.buffers, strict=True):
            if buffer.array.flags.writeable:
                raw_bytes(buffer.array)[:] = self.bytes[start : start + buffer.array.nbytes]

    def owner(self, offsets: Array) -> Array:
        return np.asarray(np.searchsorted(self.starts, offsets, "right") - 1)

    def outside(self, access: Access) -> Array:
        owner = self.owner(access.offsets)
        return np.asarray((owner < 0) | (access.offsets + access.size > self.ends[owner]))

    def describe(self, offset: int) -> str:
        number = int(self.owner(np.array([offset]))[0])
        if number < 0 or offset > self.ends[number] + RED_ZONE:
            return f"address {GLOBAL_WINDOW + offset:#x}, outside every buffer"
        return f"offset {offset - self.starts[number]} of {self.ends[number] - self.starts[number]} in {self.names[number]}"

    def load(self, access: Access, strong: bool = False) -> Array:
        self.check(access)
        units, lanes = self.units(access)
        self.check_initialised(access, units, lanes)
        block = access.block
        if self.several_blocks:  # before threads, who know of the accesses so far
            race = self.blocks.read(units, lanes, block.here, block.number, strong, self.ordered(block))
            block.report_race(race, "race between blocks")
        block.report_race(self.threads.read(units, lanes, block.here, block.clock, strong), "global race")
        self._count(access, "loaded")
        return self.gather(access)

    def store(self, access: Access, values: Array, strong: bool = False) -> None:
        self.check(access)
        self.update(access, strong)
        self.scatter(access, values)
        self._count(access, "stored")

    def update(self, access: Access, strong: bool = True) -> None:
        refused = self.read_only[self.owner(access.offsets)]
        if refused.any():
            lane = int(refused.argmax())
            raise access.block.fault("write to a read-only buffer", self.describe(int(access.offsets[lane])), int(access.lanes[lane]))
        units, lanes = self.units(access)
        self._race_write(access.block, units, lanes, strong)
        self.initialised[units] = True

    def _race_write(self, block: Block, units: Array, lanes: Array, atomic: bool) -> None:
        if self.several_blocks:
            race = self.blocks.write(units, lanes, block.here, block.number, atomic, self.ordered(block))
            block.report_race(race, "race between blocks")
        block.report_race(self.threads.write(units, lanes, block.here, block.clock, atomic), "global race")

    def ordered(self, block: Block) -> Ordered:
        """Which accesses of other blocks come before what lanes of this one do now."""

        def before(blocks: Array, units: Array, lanes: Array, wrote: bool) -> Array:
            past = self.threads
            threads, times = (past.writer, past.write_time) if wrote else (past.reader, past.read_time)
            return self.order.before(block.number, lanes, block.clock, (blocks, threads[units], times[units]))

        return before

    def _count(self, access: Access, direction: str) -> None:
        if not access.lanes.size:
            return
        counts: Counter[str] = access.block.counts
        counts[f"global requests {direction}"] += int(np.unique(access.lanes // 32).size)
        distinct = distinct_per_warp(access.lanes, access.offsets)
        counts[f"global sectors {direction}"] += int(np.unique(distinct // SECTOR).size)
        owners = np.bincount(self.owner(distinct & ((1 << 48) - 1)), minlength=len(self.names))
        for number in np.flatnonzero(owners):
            traffic = self.traffic[self.names[number]]
            setattr(traffic, direction, getattr(traffic, direction) + int(owners[number]) * access.size)
        if access.block.cache is not None:
            self._count_moved(access, direction)

    def _count_moved(self, access: Access, direction: str) -> None:
        """Sectors that move on the far side of the L1. Without its help each warp asks for its own."""
        assert access.block.cache is not None
        warps = np.tile(access.lanes // 32, 2)
        sectors = np.concatenate([access.offsets, access.offsets + access.size - 1]) // SECTOR  # no access is wider than one
        if direction == "loaded" and access.cached:
            sectors = access.block.cache.misses(sectors)
        else:
            sectors = np.unique((warps << 48) + sectors) & ((1 << 48) - 1)
        last = sectors * SECTOR + SECTOR - 1  # the first byte may lie before the buffer
        owners = np.bincount(self.owner(last), minlength=len(self.names))
        moved = "fetched" if direction == "loaded" else "written"
        for number in np.flatnonzero(owners):
            traffic = self.traffic[self.names[number]]
            setattr(traffic, moved, getattr(traffic, moved) + int(owners[number]) * SECTOR)


def raw_bytes(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """The array's bytes, as a view."""
    if not array.flags.c_contiguous:
        raise ValueError("array arguments must be contiguous")
    return array.reshape(-1).view(np.uint8)
