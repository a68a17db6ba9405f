"""Runs one block: of the threads that can run, those at the lowest instruction go first, so that diverged paths meet again.

All warps move together where they agree. Threads wait at barriers for the block or its cluster, and at warp operations for the lanes that
these name.
"""

from collections import defaultdict

import numpy as np

from .block import Block
from .logic import bit_length
from .program import Barrier, Line
from .rounding import Array
from .warp import by_thread, by_warp, lane_bits

RUNNING, AT_BARRIER, AT_WARP_OPERATION, AT_CLUSTER, EXITED = range(5)


class Scheduler:
    """``place`` is where each thread is, ``state`` what it does there. ``limit`` ends kernels that never do, in steps of this block."""

    def __init__(self, block: Block, lines: list[Line], limit: int) -> None:
        self.block, self.lines, self.left = block, lines, limit
        self.place = np.zeros(block.threads, np.int64)
        self.state = np.full(block.threads, RUNNING)
        self.barrier = np.full(block.threads, -1)  # the number of the barrier at which a thread waits
        self.arrived: dict[int, Array] = defaultdict(lambda: np.zeros(block.threads, bool))  # by bar.arrive, without waiting

    def run(self) -> bool:
        """To the end; or, and False, until all threads that are left wait for the other blocks of the cluster."""
        while True:
            running = self.state == RUNNING
            if running.any():
                self.advance(running)
            elif (self.state >= AT_CLUSTER).all():
                return bool((self.state == EXITED).all())
            elif not self.release():
                self.deadlock()

    def go_on(self) -> None:
        """The other blocks of the cluster have come too."""
        waiting = self.state == AT_CLUSTER
        for place in np.unique(self.place[waiting]):
            self.block.here = int(place)
            barrier = self.lines[int(place)].barrier
            if barrier is not None and barrier.aligned:
                self.check_whole_warps(waiting & (self.place == place))
        self.state[waiting] = RUNNING
        self.place[waiting] += 1

    def advance(self, running: Array) -> None:
        """Takes the group at the lowest instruction on until it splits, waits, or comes to where others are."""
        places = self.place[running]
        here = int(places.min())
        group = running & (self.place == here)
        whole = bool(group.all())
        others = places[places > here]
        horizon = int(others.min()) if others.size else len(self.lines)
        block, lines, count = self.block, self.lines, self.block.warps(group)
        if here == len(lines):
            self.state[group] = EXITED
            return
        while here < horizon:
            line = lines[here]
            block.here = here
            self.left -= 1
            if self.left < 0:
                raise block.fault("no end", "the limit of steps is reached", int(np.flatnonzero(group)[0]))
            active = group if line.guard is None else group & line.guard(block)
            if active is not group:
                if not active.any():
                    here += 1
                    continue
                if (active == group).all():
                    active = group
            everyone = whole and active is group
            block.counts[line.name] += count if active is group else block.warps(active)
            if line.step is not None and (line.members is None or (everyone and self.complete(line))):
                line.step(block, None if everyone else active)
                here += 1
            elif line.target is not None and active is group:
                here = line.target
            else:
                self.split(line, here, group, active)
                return
        self.place[group] = here

    def complete(self, line: Line) -> bool:
        """Whether a warp operation to which all threads have come can go on at once: its warps are whole and it names all lanes."""
        assert line.members is not None
        return self.block.threads % 32 == 0 and bool(np.all(line.members(self.block) == np.uint32(0xFFFFFFFF)))

    def split(self, line: Line, here: int, group: Array, active: Array) -> None:
        """Threads go apart, leave or wait."""
        self.place[group] = here + 1
        if line.target is not None:
            self.place[active] = line.target
        elif line.leaves:
            self.state[active] = EXITED
        elif line.barrier is not None:
            self.arrive(line.barrier, here, active)
        else:
            self.gather(line, here, active)

    def gather(self, line: Line, here: int, active: Array) -> None:
        """A warp operation runs in the lanes whose companions have all come; the others wait."""
        block = self.block
        assert line.members is not None
        assert line.step is not None
        present = active | ((self.state == AT_WARP_OPERATION) & (self.place == here))
        named = block.spread(line.members(block))
        own = np.uint32(1) << (block.lanes % 32).astype(np.uint32)
        stranger = active & (named & own == 0)
        if stranger.any():
            raise block.fault("lane outside its mask", "a lane executes a warp operation that does not name it", int(stranger.argmax()))
        self.check_exited(present, named)
        here_bits = by_thread(block, lane_bits(block, present))
        ready = present & (named & ~here_bits == 0)
        differs = ready & by_thread(block, self.disagreement(by_warp(block, named)))
        if differs.any():
            raise block.fault("warp operation with different masks", "lanes that name each other disagree", int(differs.argmax()))
        waiting = present & ~ready
        self.state[waiting], self.place[waiting] = AT_WARP_OPERATION, here
        self.state[ready], self.place[ready] = RUNNING, here + 1
        if ready.any():
            line.step(block, None if ready.all() else ready)

    @staticmethod
    def disagreement(named: Array) -> Array:
        """For the masks of lanes as [warps, 32]: which lanes name one whose mask is another."""
        names = named[:, :, None] >> np.arange(32, dtype=np.uint32) & np.uint32(1) == 1
        return np.asarray((names & (named[:, :, None] != named[:, None, :])).any(2))

    def check_exited(self, present: Array, named: Array) -> None:
        """No lane may be waited for that has left, or that the block never had."""
        block = self.block
        there = by_thread(block, lane_bits(block, self.state != EXITED))
        gone = present & (named & ~there != 0)
        if gone.any():
            thread = int(gone.argmax())
            lane = int(bit_length(named[thread : thread + 1] & ~there[thread : thread + 1])[0]) - 1
            raise block.fault("warp operation names an exited lane", f"lane {lane} is not there any more", thread)

    def arrive(self, barrier: Barrier, here: int, active: Array) -> None:
        if barrier.cluster:
            self.state[active], self.place[active] = AT_CLUSTER, here
            return
        numbers = self.block.spread(barrier.number(self.block))
        if barrier.waits:
            self.state[active], self.place[active] = AT_BARRIER, here
            self.barrier[active] = numbers[active]
        else:
            for number in np.unique(numbers[active]):
                self.arrived[int(number)] |= active & (numbers == number)
        if (self.state == RUNNING).any():
            return
        self.release()

    def release(self) -> bool:
        """Opens the barriers to which all have come whom they wait for; whether there was one."""
        opened = False
        waiting = self.state == AT_BARRIER
        for number in np.unique(self.barrier[waiting]):
            here = waiting & (self.barrier == number)
            arrived = self.arrived[int(number)]
            first = int(here.argmax())
            barrier = self.lines[int(self.place[first])].barrier
            assert barrier is not None
            if barrier.threads is None:
                met = (here | (self.state == EXITED)).all()
                members = np.ones_like(here)
            else:
                wanted = int(self.block.spread(barrier.threads(self.block))[first])
                met = int((here | arrived).sum()) >= wanted
                members = here | arrived
            if met:
                self.open(here, members)
                arrived[:] = False
                opened = True
        return opened

    def open(self, here: Array, members: Array) -> None:
        block = self.block
        for place in np.unique(self.place[here]):
            barrier = self.lines[int(place)].barrier
            assert barrier is not None
            block.here = int(place)
            if barrier.aligned:
                self.check_whole_warps(here & (self.place == place))
        for place in np.unique(self.place[here]):
            barrier = self.lines[int(place)].barrier
            if barrier is not None and barrier.reduce is not None:
                barrier.reduce(block, here)
        block.clock.barrier(members)
        self.state[here] = RUNNING
        self.place[here] += 1

    def check_whole_warps(self, here: Array) -> None:
        """All threads of a warp have to come to the same aligned barrier; lanes that have left are missing too."""
        block = self.block
        for warp in range(block.clock.warps):
            lanes = here[32 * warp : 32 * warp + 32]
            if lanes.any() and not lanes.all():
                thread = 32 * warp + int((~lanes).argmax())
                block.report("divergent barrier", f"thread {thread} of the warp is not at it", 32 * warp + int(lanes.argmax()))

    def deadlock(self) -> None:
        """Nobody can go on: says where all wait."""
        block = self.block
        for place in np.unique(self.place[self.state == AT_WARP_OPERATION]):
            line = self.lines[int(place)]
            assert line.members is not None
            block.here = int(place)
            self.check_exited((self.state == AT_WARP_OPERATION) & (self.place == place), block.spread(line.members(block)))
        waiting = self.state != EXITED
        places = np.unique(self.place[waiting])
        block.here = int(places[0])
        where = "; ".join(
            f"{int((waiting & (self.place == place)).sum())} at `{self.lines[int(place)].instruction.text}`" for place in places
        )
        raise block.fault("deadlock", f"threads wait for ever: {where}", int(waiting.argmax()))
