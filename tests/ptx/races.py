"""Which accesses are ordered, and which are races: between the threads of a block, and between the blocks of a launch.

Two accesses of one unit of memory by two threads of a block race, if one of them writes, unless a barrier that both passed lies between;
for lanes of one warp bar.warp.sync will do. Two blocks race wherever one writes what the other touches, unless fences and atomics put the
accesses in order (``order.py``). Atomics never race with atomics. A unit is as wide as the narrowest access that the kernel makes to the
space.

Each unit remembers its last writers and its last readers. That is enough for the first race of a unit; behind it others may go unseen.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from .rounding import Array

NOBODY, SEVERAL_BLOCKS = -1, -2
Ordered: TypeAlias = Callable[[Array, Array, Array, bool], Array]


@dataclass(frozen=True)
class Race:
    """``lane`` touched what the instruction at ``other`` had touched before; ``before`` and ``now`` say how."""

    lane: int
    other: int
    before: str
    now: str


class Clock:
    """When the threads of a block last synchronised.

    Beside a thread's number there are codes for several threads: ``threads + w`` for lanes of warp ``w`` and ``several`` for threads of
    any warps. Their time is that of their last common event, or -1.
    """

    def __init__(self, threads: int, start: int) -> None:
        self.threads, self.warps = threads, -(-threads // 32)
        self.several = threads + self.warps
        self.now = start
        self.warp = np.concatenate([np.arange(threads) // 32, np.arange(self.warps), [-1]])
        self.block_time = np.full(self.several + 1, start)
        self.warp_time = np.full(self.several + 1, -1)

    def start(self, now: int) -> None:
        """What other blocks of the cluster did until now lies before all to come."""
        self.now = now
        self.barrier(np.ones(self.threads, bool))

    def barrier(self, members: Array) -> None:
        """The threads of a mask have met."""
        self.now += 1
        self.block_time[: self.threads][members] = self.now
        self._update(self.block_time)
        times = self.block_time[: self.threads]
        self.block_time[self.several] = times[0] if (times == times[0]).all() else -1

    def warp_sync(self, members: Array) -> None:
        """Lanes of a mask have met those of their own warp."""
        lanes = np.flatnonzero(members)
        self.warp_time[lanes] = self.now + 1 + self.warp[lanes]
        self.now += self.warps
        self._update(self.warp_time)

    def _update(self, times: Array) -> None:
        for warp in range(self.warps):
            lanes = times[32 * warp : min(32 * warp + 32, self.threads)]
            times[self.threads + warp] = lanes[0] if (lanes == lanes[0]).all() else -1

    @property
    def floor(self) -> int:
        """Accesses before this time are ordered before everything from now on."""
        return int(self.block_time[self.several])

    def ordered(self, code: Array, time: Array, lanes: Array) -> Array:
        """Whether accesses by ``code`` at ``time`` come before what ``lanes`` do now."""
        mine = self.block_time[lanes]
        met = (self.block_time[code] == mine) & (mine > time)
        own = self.warp_time[lanes]
        return np.asarray(met | ((self.warp[code] == self.warp[lanes]) & (self.warp_time[code] == own) & (own > time)))


class ThreadRaces:
    """The last writers and readers of each unit of a space, as codes of a :class:`Clock`."""

    def __init__(self, units: int) -> None:
        self.writer, self.reader = np.zeros(units, np.int64), np.zeros(units, np.int64)
        self.write_time, self.read_time = np.full(units, -1), np.full(units, -1)
        self.write_place, self.read_place = np.zeros(units, np.int32), np.zeros(units, np.int32)
        self.atomic = np.zeros(units, bool)

    def read(self, units: Array, lanes: Array, place: int, clock: Clock, atomic: bool = False) -> Race | None:
        """Lanes read units at the instruction ``place``. Atomic reads are checked, not remembered."""
        race = self._written(units, lanes, "reads", clock, atomic)
        if atomic:
            return race
        self._join_in(self.reader, self.read_time, units, lanes, clock)
        self.read_time[units] = clock.now
        self.read_place[units] = place
        return race

    def write(self, units: Array, lanes: Array, place: int, clock: Clock, atomic: bool = False) -> Race | None:
        race = self._written(units, lanes, "updates" if atomic else "writes", clock, atomic) or self._read(units, lanes, clock)
        self.note_write(units, lanes, place, clock, atomic)
        return race

    def note_write(self, units: Array, lanes: Array, place: int, clock: Clock, atomic: bool = False) -> None:
        if atomic:  # it joins others that are under way, and stays plain beside a plain write that not all threads are past
            self.atomic[units] |= self.write_time[units] < max(clock.floor, 0)
            self._join_in(self.writer, self.write_time, units, lanes, clock)
        else:
            self.atomic[units] = False
            self.writer[units] = lanes
        self.write_time[units] = clock.now
        self.write_place[units] = place

    def _written(self, units: Array, lanes: Array, now: str, clock: Clock, atomic: bool) -> Race | None:
        time = self.write_time[units]
        if (time < max(clock.floor, 0)).all():
            return None
        writer = self.writer[units]
        races = (time >= 0) & (writer != lanes) & ~clock.ordered(writer, time, lanes)
        if atomic:
            races &= ~self.atomic[units]
        return self._race(races, units, lanes, self.write_place, "wrote", now)

    def _read(self, units: Array, lanes: Array, clock: Clock) -> Race | None:
        time = self.read_time[units]
        if (time < max(clock.floor, 0)).all():
            return None
        reader = self.reader[units]
        races = (time >= 0) & (reader != lanes) & ~clock.ordered(reader, time, lanes)
        return self._race(races, units, lanes, self.read_place, "read", "writes")

    @staticmethod
    def _race(races: Array, units: Array, lanes: Array, places: Array, before: str, now: str) -> Race | None:
        if not races.any():
            return None
        first = int(races.argmax())
        return Race(int(lanes[first]), int(places[units[first]]), before, now)

    def _join_in(self, codes: Array, times: Array, units: Array, lanes: Array, clock: Clock) -> None:
        """Adds lanes to those who touch a unit and are not in order yet: one, several of a warp, or several."""
        added = lanes
        before, time = codes[units], times[units]
        if (time >= max(clock.floor, 0)).any():
            together = (time >= 0) & (before != lanes) & ~clock.ordered(before, time, lanes)
            added = np.where(together, self._join(before, lanes, clock), lanes)
        codes[units] = added
        lost = np.flatnonzero(codes[units] != added)  # another lane of this same access touches the unit
        if lost.size:
            joined = self._join(codes[units[lost]], added[lost], clock)
            codes[units[lost]] = joined
            codes[units[lost[joined == clock.several]]] = clock.several

    @staticmethod
    def _join(first: Array, second: Array, clock: Clock) -> Array:
        warp = clock.warp[second]
        return np.where((clock.warp[first] == warp) & (warp >= 0), clock.threads + warp, clock.several)


class BlockRaces:
    """The blocks that wrote and read each unit of global memory. ``ordered`` says which of the other accesses of units are known to come
    before: given the blocks that made them, the units, the lanes that touch these now, and whether the others were writes."""

    def __init__(self, units: int) -> None:
        self.writer, self.reader = np.full(units, NOBODY), np.full(units, NOBODY)
        self.write_place, self.read_place = np.zeros(units, np.int32), np.zeros(units, np.int32)
        self.atomic = np.zeros(units, bool)

    def read(
        self, units: Array, lanes: Array, place: int, block: int, atomic: bool = False, ordered: Ordered | None = None
    ) -> Race | None:
        writer = np.where(self.atomic[units] & atomic, NOBODY, self._others(self.writer, units, lanes, block, True, ordered))
        race = self._other(writer, units, lanes, block, self.write_place, "wrote", "reads")
        if atomic:
            return race
        self.reader[units] = self._added(self._others(self.reader, units, lanes, block, False, ordered), block)
        self.read_place[units] = place
        return race

    def write(
        self, units: Array, lanes: Array, place: int, block: int, atomic: bool = False, ordered: Ordered | None = None
    ) -> Race | None:
        writer, both_atomic = self._others(self.writer, units, lanes, block, True, ordered), self.atomic[units] & atomic
        reader = self._others(self.reader, units, lanes, block, False, ordered)
        now = "updates" if atomic else "writes"
        race = self._other(np.where(both_atomic, NOBODY, writer), units, lanes, block, self.write_place, "wrote", now)
        race = race or self._other(reader, units, lanes, block, self.read_place, "read", now)
        self.writer[units] = self._added(writer, block)
        self.reader[units] = reader
        self.atomic[units] = atomic & (both_atomic | (writer == NOBODY))
        self.write_place[units] = place
        return race

    def forget(self) -> None:
        """All accesses so far come before those to come."""
        self.writer[:] = self.reader[:] = NOBODY

    @staticmethod
    def _others(blocks: Array, units: Array, lanes: Array, block: int, wrote: bool, ordered: Ordered | None) -> Array:
        """The blocks of units, without those that are known to be done with them."""
        found = blocks[units]
        if ordered is None or not ((found >= 0) & (found != block)).any():
            return found
        return np.where((found != block) & ordered(found, units, lanes, wrote), NOBODY, found)

    @staticmethod
    def _added(blocks: Array, block: int) -> Array:
        return np.where((blocks == NOBODY) | (blocks == block), block, SEVERAL_BLOCKS)

    @staticmethod
    def _other(blocks: Array, units: Array, lanes: Array, block: int, places: Array, before: str, now: str) -> Race | None:
        races = (blocks != NOBODY) & (blocks != block)
        return ThreadRaces._race(races, units, lanes, places, before, now)
