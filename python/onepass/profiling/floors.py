"""The least that a call can take: its arithmetic over the machine's rate, or the bytes that it must move over theirs."""

from dataclasses import dataclass
from functools import cache

import torch

from onepass._calls import Call
from onepass._info import probe

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
# Fused multiply-adds' worth of issue slots for one (b, h, t, s): so many per channel of A and of D. An additive element takes one for
# 1 + e^(2q) e^(2k) and two to merge it with others; the reciprocal that many share is not counted. Its gradient takes what `onepass bench`
# counts as well: x, two for what shares a reciprocal, r - r^2 and three sums, of which a step, whose keys wait for the others, does one.
SLOTS = {
    "additive_forward": (3, 1),
    "additive_scores": (3, 0),
    "additive_step": (3, 1),
    "additive_step_scores": (3, 0),
    "additive_backward": (7, 2),
    "additive_scores_backward": (7, 0),
    "additive_step_backward": (5, 1),
    "multiplicative_forward": (1, 1),
    "multiplicative_step": (1, 1),
    "multiplicative_step_scores": (1, 0),
    "multiplicative_backward": (2, 2),
    "multiplicative_step_backward": (1, 1),
    "source_sums": (0, 1),
    "weighted_values": (0, 1),
    "weighted_values_backward": (0, 1),
}
WITHOUT_PAIRS = {"additive_prepare", "stack_steps"}  # ops that have no such arithmetic
RECIPROCALS = 1  # more per channel of A in the additive backwards of a CPU, which has no unit for them as a GPU has
BOTH_WAYS = ("additive_backward", "additive_scores_backward", "multiplicative_backward", "additive_prepare", "stack_steps")


@dataclass(frozen=True)
class Ceilings:
    """Per second: fused multiply-adds of float32, and bytes read from a working set of so many bytes."""

    multiply_adds: float
    read: float


@dataclass(frozen=True)
class Floor:
    """Seconds, and what takes them: ``"arithmetic"`` or ``"read bandwidth"``."""

    seconds: float
    limit: str


def slots(call: Call) -> float:
    """Multiply-adds' worth of arithmetic; where the visible pairs are not known, of all."""
    of_A, of_D = SLOTS.get(call.op, (0, 0))
    merging = call.device == "cpu" and call.op.startswith("additive_") and call.op.endswith("_backward")
    return _pairs(call) * ((of_A + merging * RECIPROCALS) * call.A + of_D * call.D)


def elements(call: Call) -> float:
    """Terms ``v tanh(q + k)``; 0 of a call that has none."""
    return _pairs(call) * call.A if call.op.startswith("additive_") and slots(call) else 0


def moved(call: Call) -> float:
    """Bytes: each visible source and each query once, with what is between them, and in a backward the gradient of each too."""
    size = BYTES[call.dtype]
    sources = _pairs(call) / max(call.T, 1) if call.S else 0
    queries = call.B * call.H * call.T * (call.A + call.D)
    once = sources * (call.A + call.D) * BYTES[call.kept] + (queries + _pairs(call)) * size
    return once * (2 if call.op in BOTH_WAYS else 1)


def floor(call: Call, threads: int) -> Floor | None:
    """None where there is nothing to measure the ceilings with."""
    if call.device == "cpu" and probe() is None:
        return None
    ceilings = ceilings_of(call.device, threads, _power_of_two(moved(call)))
    rate = ceilings.multiply_adds / (2 if call.dtype == "float64" else 1)
    arithmetic, reading = slots(call) / rate, moved(call) / ceilings.read
    return Floor(arithmetic, "arithmetic") if arithmetic > reading else Floor(reading, "read bandwidth")


@cache
def ceilings_of(device: str, threads: int, size: int) -> Ceilings:
    """A CPU's are measured, on the instruction set in use and memory of that size, so that it lies in the cache where the call's does; a
    GPU's are what its clocks allow."""
    if device == "cuda":
        found = torch.cuda.get_device_properties(device)
        lanes = 64 if (found.major, found.minor) == (8, 0) or torch.version.hip else 128  # of float32 per processor
        clock, memory_clock = 1e3 * found.clock_rate, 1e3 * found.memory_clock_rate
        return Ceilings(found.multi_processor_count * lanes * clock, 2 * memory_clock * found.memory_bus_width / 8)
    measured = probe().ceilings(threads, seconds=0.02, bytes=max(size, 4096 * threads))
    return Ceilings(measured["fma"], measured["read"])


def _pairs(call: Call) -> int:
    return call.B * call.H * call.T * call.S if call.pairs is None else call.pairs


def _power_of_two(size: float) -> int:
    return 1 << max(int(size) - 1, 1).bit_length()
