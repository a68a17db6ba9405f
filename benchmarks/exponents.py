"""How results grow: exponents by least squares in log-log, beside theory, and where onepass loses to a peer.

Reads records of ``scaling``, whose shapes are named for what they vary: ``over S`` and so on.
"""

import math
import statistics
from collections.abc import Iterator
from typing import NamedTuple

from .comparison import best_of_onepass
from .providers import mine
from .records import MEASURED, Record, Results
from .timing import interval

AXES = ("S", "T", "A", "T = S", "threads")
TIME, MEMORY = "time", "memory"
FUSED_PEERS = ("SDPA", "FlexAttention")
RESIDENT = 1 << 20  # bytes that a process takes or not by itself: less than that has no exponent
NEAR = 3.0  # times the smallest of all: calls, not work, may be most of it


class Curve(NamedTuple):
    """Seconds or bytes of one provider over the axis."""

    axis: str
    quantity: str
    kernel: str
    direction: str
    provider: str
    points: tuple[tuple[int, float], ...]


class Fit(NamedTuple):
    """``y ~ x^exponent`` from ``low`` on; ``error`` is the exponent's standard error."""

    exponent: float
    error: float
    low: int
    high: int


def axis_of(record: Record) -> str | None:
    axis = record.shape.name.removeprefix("over ")
    return axis if axis in AXES and axis != record.shape.name else None


def place(record: Record) -> int:
    axis = axis_of(record)
    if axis == "threads":
        return record.threads
    return int(getattr(record.shape, (axis or "S")[0]))


def curves(results: Results) -> list[Curve]:
    found: dict[tuple[str, str, str, str, str], dict[int, float]] = {}
    for record in results.records:
        axis = axis_of(record)
        if axis is None or record.status != MEASURED:
            continue
        key = (record.kernel, record.direction, record.provider)
        if record.seconds:
            found.setdefault((axis, TIME, *key), {})[place(record)] = record.median
        if "peak bytes" in record.metrics:
            found.setdefault((axis, MEMORY, *key), {})[place(record)] = record.metrics["peak bytes"]
    return [Curve(*key, tuple(sorted(points.items()))) for key, points in found.items()]


def fit(curve: Curve) -> Fit | None:
    """Over the upper half of the range, in logarithms; None of fewer than three points there; over all numbers of threads."""
    low, high = curve.points[0][0], curve.points[-1][0]
    least = RESIDENT if curve.quantity == MEMORY else 0.0
    of_threads = curve.axis == "threads"  # of which there are few numbers
    upper = [(x, y) for x, y in curve.points if (of_threads or x * x >= low * high) and y > least]
    if len(upper) < (2 if of_threads else 3):
        return None
    logs = [(math.log(x), math.log(y)) for x, y in upper]
    mean_x, mean_y = (statistics.fmean(values) for values in zip(*logs, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in logs)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in logs) / spread
    rest = sum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in logs)
    error = math.sqrt(rest / (len(logs) - 2) / spread) if len(logs) > 2 else math.nan
    return Fit(slope, error, upper[0][0], upper[-1][0])


def theory(curve: Curve) -> float:
    """Work is B T S A, shared by all threads. Beyond inputs and results additive attention keeps B T S numbers, or, unfused, B T S A of
    them; multiplicative attention B T S where it is not fused, else what does not grow with S."""
    if curve.axis == "threads":
        return -1.0
    if curve.quantity == TIME or not (curve.kernel.startswith("multiplicative") and fused(curve.provider)):
        return 2.0 if curve.axis == "T = S" else 1.0
    return 0.0 if curve.axis == "S" else 1.0


def fused(provider: str) -> bool:
    return mine(provider) or provider in FUSED_PEERS


class Loss(NamedTuple):
    own: Record
    peer: Record
    reason: str


def losses(results: Results) -> Iterator[Loss]:
    """Where a peer is faster than the best of onepass, and what accounts for it, as far as the records say."""
    timed = [record for record in results.timed() if axis_of(record) is not None]
    smallest: dict[tuple[str, str, str], float] = {}
    groups: dict[object, list[Record]] = {}
    for record in timed:
        key = record.kernel, record.direction, record.provider
        smallest[key] = min(record.median, smallest.get(key, math.inf))
        groups.setdefault((*key[:2], record.shape, record.threads), []).append(record)
    for of in groups.values():
        own = best_of_onepass(of)
        peer = min((r for r in of if not mine(r.provider)), key=lambda record: record.median, default=None)
        if own is not None and peer is not None and peer.median < own.median:
            yield Loss(own, peer, _reason(own, peer, smallest[own.kernel, own.direction, own.provider]))


def _reason(own: Record, peer: Record, smallest: float) -> str:
    if interval(own.seconds)[0] <= interval(peer.seconds)[1]:
        return "within the noise of the rounds"
    if own.median < NEAR * smallest:
        return f"calls cost more than work: the smallest of all takes {1e6 * smallest:.0f} microseconds"
    if own.kernel.startswith(("multiplicative", "general")):
        return "two matrix products, which the peer's library runs faster"
    return "not accounted for"
