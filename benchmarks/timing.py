"""Seconds: providers take turns, a machine whose speed drifts does so for all of them."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from .workloads import Run

Clock = Callable[[Run], float]
CYCLES, LEAST_QUEUEING = 2e9, 5e-4  # of a GPU, at most about, in a second; seconds
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def wall_clock(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def cuda_clock() -> Clock:
    """By events on the stream. Before each run a buffer of twice the L2 cache is zeroed, so that no run finds its inputs there; then the
    GPU sleeps twice as long as the host took to queue the last run, so that what it queues meanwhile does not wait for the host."""
    flush = torch.empty(2 * torch.cuda.get_device_properties().L2_cache_size, dtype=torch.int8, device="cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]

    queueing = LEAST_QUEUEING

    def clock(run: Run) -> float:
        nonlocal queueing
        flush.zero_()
        torch.cuda._sleep(int(2 * queueing * CYCLES))  # type: ignore[no-untyped-call]
        start.record()
        before = time.perf_counter()
        run()
        queueing = max(LEAST_QUEUEING, time.perf_counter() - before)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    return clock


def clock_of(device: str) -> Clock:
    return cuda_clock() if device == "cuda" else wall_clock


def rounds(
    runs: Mapping[str, Run], count: int, turn: float = 0.5, clock: Clock = wall_clock, after_round: Callable[[], None] = lambda: None
) -> dict[str, list[list[float]]]:
    """Seconds of every call of each run, by round, after one round of warming up.

    In its turn a run is called once untimed, to put up with what its predecessor left (its data in the caches, its threads spinning:
    jax's do, for milliseconds), then again and again for ``turn`` seconds, at least once.
    """
    seconds: dict[str, list[list[float]]] = {name: [] for name in runs}
    for number in range(count + 1):
        for name, run in runs.items():
            run()
            times: list[float] = []
            while sum(times) < turn:
                times.append(clock(run))
            if number >= 1:
                seconds[name].append(times)
        after_round()
    return seconds


def medians(seconds: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, list[float]]:
    """Of each round."""
    return {name: [statistics.median(times) for times in of_rounds] for name, of_rounds in seconds.items()}


def ratio(seconds: Mapping[str, Sequence[float]], name: str, over: str) -> float:
    """How many times as fast ``name`` is as ``over``: the median of the rounds' own ratios."""
    return statistics.median(b / a for a, b in zip(seconds[name], seconds[over], strict=True))


def quantile(values: Sequence[float], q: float) -> float:
    """Linear between the order statistics."""
    ordered, place = sorted(values), q * (len(values) - 1)
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """The narrowest pair of order statistics that holds the median with this probability, whatever the distribution; the whole range
    where there are too few values for any pair to (the range of n does with probability 1 - 2^(1-n))."""
    ordered, n = sorted(values), len(values)
    outside, skipped = 2 * 0.5**n, 0  # beyond the pair that leaves out `skipped` values on each side
    while skipped + 1 < n - 1 - skipped - 1 and (wider := outside + 2 * math.comb(n, skipped + 1) * 0.5**n) <= 1 - level:
        outside, skipped = wider, skipped + 1
    return ordered[skipped], ordered[n - 1 - skipped]
