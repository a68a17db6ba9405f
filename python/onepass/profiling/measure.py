"""Calls a target: to warm up, with a clock, and under torch's profiler."""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from onepass.profiling.events import Profile, sort_events


@dataclass(frozen=True)
class Measured:
    """Seconds of a call: the median of ``repeat`` without the profiler, and the mean of as many with it."""

    repeat: int
    seconds: float
    profiled_seconds: float
    profile: Profile


def measure(run: Callable[[], object], repeat: int, warmup: int, trace: Path | None, advance: Callable[[], None]) -> Measured:
    """``advance`` is called after every call; ``trace``: where to write what Chrome's tracing and Perfetto show."""
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it says on standard error that it starts and stops

    def timed() -> float:
        start = time.perf_counter()
        run()
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        advance()
        return seconds

    for _ in range(warmup):
        timed()
    seconds = statistics.median(timed() for _ in range(repeat))
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        profiled = sum(timed() for _ in range(repeat))
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    return Measured(repeat, seconds, profiled / repeat, sort_events(profiler.events() or ()))
