"""What fences and atomics put in order between the blocks of a launch: PTX's release and acquire patterns.

A thread that fences and then makes an atomic access leaves there that what it wrote before the fence, and what others of its block wrote
before a barrier in front of it, is done. A thread that meets it there by an atomic access of its own and then fences comes after all that,
and so do the threads of its block behind their next barrier. What a block has met in this way it does not pass on to a third one.
"""

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

from .races import Clock
from .rounding import Array


@dataclass(frozen=True)
class Release:
    """Accesses of ``block`` before the time ``met`` are done, and those of its thread ``lane`` up to ``fenced``."""

    block: int
    met: int
    lane: int
    fenced: int

    def covers(self, blocks: Array, lanes: Array, times: Array) -> Array:
        return np.asarray((blocks == self.block) & ((times < self.met) | ((lanes == self.lane) & (times <= self.fenced))))


@dataclass
class Order:
    """``fenced``, ``met`` and ``acquired`` are of the block that runs; the last with the lane and the time from which it counts."""

    left: dict[int, list[Release]] = field(default_factory=lambda: defaultdict(list))  # by address
    block: int = -1
    fenced: dict[int, Release] = field(default_factory=dict)
    met: dict[int, list[Release]] = field(default_factory=lambda: defaultdict(list))
    acquired: list[tuple[int, int, Release]] = field(default_factory=list)

    def enter(self, block: int) -> None:
        if block != self.block:
            self.block = block
            self.fenced.clear()
            self.met.clear()
            self.acquired.clear()

    def fence(self, block: int, lanes: Array, clock: Clock) -> None:
        self.enter(block)
        for lane in lanes.tolist():
            self.fenced[lane] = Release(block, clock.floor, lane, clock.now)
            self.acquired += [(lane, clock.now, release) for release in self.met.pop(lane, ())]
        clock.now += 1

    def atomic(self, block: int, lanes: Array, addresses: Array) -> None:
        self.enter(block)
        for lane, address in zip(lanes.tolist(), addresses.tolist(), strict=True):
            self.met[lane] += [release for release in self.left[address] if release.block != block]
            if lane in self.fenced:
                self.left[address].append(self.fenced[lane])

    def before(self, block: int, lanes: Array, clock: Clock, others: tuple[Array, Array, Array]) -> Array:
        """Whether accesses of others, by block, lane and time, come before what ``lanes`` of this block do now."""
        found = np.zeros(lanes.shape, bool)
        if block == self.block:
            for lane, time, release in self.acquired:
                found |= ((lanes == lane) | (clock.floor > time)) & release.covers(*others)
        return found
