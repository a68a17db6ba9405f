"""What fences and atomics put in order between the blocks of a launch: PTX's release and acquire patterns.

A thread that fences and then makes an atomic access leaves there that what it wrote before the fence, and what others of its block wrote
before a barrier in front of it, is done. A thread that meets it there by an atomic access of its own and then fences comes after all that,
and so do the threads of its block behind their next barrier. The blocks of a cluster come after all that the others did before a barrier of
the cluster. What a block has met in either way it does not pass on to a third one.
"""

from collections import defaultdict
from collections.abc import Sequence
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
class Known:
    """Of one block: what its threads fenced, what they met at addresses, and what comes before them, with the lane (-1: any) and the time
    from which that counts."""

    fenced: dict[int, Release] = field(default_factory=dict)
    met: dict[int, list[Release]] = field(default_factory=lambda: defaultdict(list))
    acquired: list[tuple[int, int, Release]] = field(default_factory=list)


@dataclass
class Order:
    left: dict[int, list[Release]] = field(default_factory=lambda: defaultdict(list))  # by address
    known: dict[int, Known] = field(default_factory=lambda: defaultdict(Known))  # by block

    def fence(self, block: int, lanes: Array, clock: Clock) -> None:
        known = self.known[block]
        for lane in lanes.tolist():
            known.fenced[lane] = Release(block, clock.floor, lane, clock.now)
            known.acquired += [(lane, clock.now, release) for release in known.met.pop(lane, ())]
        clock.now += 1

    def atomic(self, block: int, lanes: Array, addresses: Array) -> None:
        known = self.known[block]
        for lane, address in zip(lanes.tolist(), addresses.tolist(), strict=True):
            known.met[lane] += [release for release in self.left[address] if release.block != block]
            if lane in known.fenced:
                self.left[address].append(known.fenced[lane])

    def meet(self, blocks: Sequence[int], now: int) -> None:
        """Blocks of a cluster at their barrier; what they did until now is done."""
        for block in blocks:
            self.known[block].acquired += [(-1, now, Release(other, now + 1, -1, -1)) for other in blocks if other != block]

    def before(self, block: int, lanes: Array, clock: Clock, others: tuple[Array, Array, Array]) -> Array:
        """Whether accesses of others, by block, lane and time, come before what ``lanes`` of this block do now."""
        found = np.zeros(lanes.shape, bool)
        for lane, time, release in self.known[block].acquired:
            found |= ((lanes == lane) | (clock.floor > time)) & release.covers(*others)
        return found
