"""Which races the PTX machine sees, against a list of all accesses and events: random histories up to their first race."""

from dataclasses import dataclass

import numpy as np
from ptx.races import BlockRaces, Clock, ThreadRaces

THREADS, UNITS = 80, 5
CELLS = 60
LANES = np.array([0, 1, 2, 31, 32, 33, 64, 79])


@dataclass
class Past:
    """An access: who, what, how, and how many events of either sort came before."""

    thread: int
    unit: int
    writes: bool
    atomic: bool
    place: int
    barriers: int
    warp_syncs: int


def races(first: Past, second: Past) -> bool:
    if (
        first.unit != second.unit
        or first.thread == second.thread
        or not (first.writes or second.writes)
        or (first.atomic and second.atomic)
    ):
        return False
    if first.barriers != second.barriers:
        return False
    return first.thread // 32 != second.thread // 32 or first.warp_syncs == second.warp_syncs


def test_threads_of_a_block() -> None:
    """Loads, stores and atomics of a few lanes among barriers of the block and of single warps."""
    rng = np.random.default_rng(0)
    ends = {"race": 0, "clean": 0}
    for _ in range(1500):
        clock, tracker = Clock(THREADS, int(rng.integers(0, 50))), ThreadRaces(UNITS)
        history: list[Past] = []
        barriers, warp_syncs = 0, np.zeros(3, int)
        for place in range(14):
            event = rng.choice(["barrier", "warp", "read", "write", "atomic"], p=[0.2, 0.3, 0.32, 0.12, 0.06])
            if event == "barrier":
                clock.barrier(np.ones(THREADS, bool))
                barriers += 1
                continue
            if event == "warp":
                warp = int(rng.integers(0, 3))
                clock.warp_sync(np.arange(THREADS) // 32 == warp)
                warp_syncs[warp] += 1
                continue
            lanes = np.sort(rng.choice(LANES, rng.integers(1, 5), replace=False))
            units = rng.choice(UNITS, lanes.size, replace=event == "read")  # lanes of one instruction that write meet elsewhere
            made = [
                Past(int(lane), int(unit), event != "read", event == "atomic", place, barriers, int(warp_syncs[lane // 32]))
                for lane, unit in zip(lanes, units, strict=True)
            ]
            expected = {(now.thread, before.place) for now in made for before in history if races(before, now)}
            if event == "read":
                found = tracker.read(units, lanes, place, clock)
            else:
                found = tracker.write(units, lanes, place, clock, event == "atomic")
            assert (found is not None) == bool(expected), (history, made)
            if found is not None:
                assert found.lane in {thread for thread, _ in expected}
                ends["race"] += 1
                break
            history += made
        else:
            ends["clean"] += 1
    assert min(ends.values()) > 100, ends


def test_a_warp_of_readers() -> None:
    """Lanes that read together may be overwritten by their own warp after a warp's barrier, by another only after the block's."""
    for writer, sync, clean in ((0, "warp", True), (5, "warp", True), (40, "warp", False), (40, "block", True), (5, "none", False)):
        clock, tracker = Clock(THREADS, 0), ThreadRaces(1)
        lanes = np.arange(32)
        assert tracker.read(np.zeros(32, int), lanes, 1, clock) is None
        if sync == "warp":
            clock.warp_sync(np.arange(THREADS) < 64)
        elif sync == "block":
            clock.barrier(np.ones(THREADS, bool))
        assert (tracker.write(np.array([0]), np.array([writer]), 2, clock) is None) == clean


def test_readers_of_several_warps() -> None:
    """A reader of another warp is not forgotten over several of the writer's own."""
    clock, tracker = Clock(THREADS, 0), ThreadRaces(1)
    assert tracker.read(np.zeros(3, int), np.array([0, 40, 41]), 1, clock) is None
    clock.warp_sync(np.arange(THREADS) // 32 == 1)
    assert tracker.write(np.array([0]), np.array([40]), 2, clock) is not None


def test_partial_barriers() -> None:
    """A barrier orders those who were at it, and nobody else."""
    half = np.arange(THREADS) < 40
    for writer, reader, clean in ((3, 7, True), (3, 60, False), (60, 3, False), (60, 61, False)):
        clock, tracker = Clock(THREADS, 0), ThreadRaces(1)
        assert tracker.write(np.array([0]), np.array([writer]), 1, clock) is None
        clock.barrier(half)
        assert (tracker.read(np.array([0]), np.array([reader]), 2, clock) is None) == clean


def test_blocks_of_a_launch() -> None:
    """Nothing orders blocks."""
    rng = np.random.default_rng(1)
    ends = {"race": 0, "clean": 0}
    for _ in range(600):
        tracker = BlockRaces(CELLS)
        history: list[tuple[int, int, str]] = []
        for block in range(3):
            for place in range(3):
                event = str(rng.choice(["read", "write", "atomic"], p=[0.6, 0.1, 0.3]))
                units = rng.choice(CELLS, 3, replace=False)
                conflicts = [
                    (other, unit, how)
                    for other, unit, how in history
                    if other != block and unit in units and not (how == event and event in ("read", "atomic"))
                ]
                access = (units, np.arange(3), place, block)
                found = tracker.read(*access) if event == "read" else tracker.write(*access, event == "atomic")
                assert (found is not None) == bool(conflicts)
                history += [(block, int(unit), event) for unit in units]
                if found is not None:
                    ends["race"] += 1
                    break
            else:
                continue
            break
        else:
            ends["clean"] += 1
    assert min(ends.values()) > 50, ends
