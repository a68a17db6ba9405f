"""Two results of a benchmark: what got slower by more than the noise.

Noise is twofold. Within a run, a median lies somewhere in an interval of order statistics (``timing.interval``); two medians differ
where their intervals do not overlap. Between runs the machine itself changes: peers whose versions are the same in both files ran the
same code, so the median of their ratios is the machine's, and is divided out, and the most that one of them still moved is noise: of n that
did not change, a row like them would move further with probability 1 / (n + 1).
"""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from .providers import REFERENCE, mine, variant
from .records import Record, Results
from .timing import interval

SAME, SLOWER, FASTER = "same", "slower", "faster"


@dataclass(frozen=True)
class Change:
    """``ratio`` is the time of the second over that of the first, the machine's drift divided out."""

    before: Record
    after: Record
    ratio: float
    verdict: str


@dataclass(frozen=True)
class Comparison:
    changes: list[Change]
    drift: float
    scatter: float  # the most that an unchanged peer moved beyond the drift, as a factor
    only_before: int
    only_after: int

    def slower(self) -> list[Change]:
        return [change for change in self.changes if change.verdict == SLOWER]


def best_of_onepass(records: Iterable[Record]) -> Record | None:
    """The fastest of its kernels, variants aside: what stands for onepass beside peers. The reference does where there is nothing else."""
    own = (record for record in records if mine(record.provider) and not variant(record.provider))
    return min(own, key=lambda record: (record.provider == REFERENCE, record.median), default=None)


def compare(before: Results, after: Results) -> Comparison:
    first, second = ({record.key: record for record in results.timed()} for results in (before, after))
    both = [(first[key], second[key]) for key in first if key in second]
    same_peers = {name: v for name, v in before.versions.items() if name != "onepass"} == {
        name: v for name, v in after.versions.items() if name != "onepass"
    }
    controls = [new.median / old.median for old, new in both if same_peers and not mine(old.provider)]
    drift = statistics.median(controls) if controls else 1.0
    scatter = max((max(ratio / drift, drift / ratio) for ratio in controls), default=1.0)
    changes = [Change(old, new, new.median / old.median / drift, _verdict(old, new, drift, scatter)) for old, new in both]
    return Comparison(changes, drift, scatter, len(first) - len(both), len(second) - len(both))


def _verdict(old: Record, new: Record, drift: float, scatter: float) -> str:
    if not mine(old.provider):
        return SAME  # the control: what it moves by is noise
    (old_low, old_high), (new_low, new_high) = interval(old.seconds), interval(new.seconds)
    if new_low / drift > old_high * scatter:
        return SLOWER
    return FASTER if new_high / drift < old_low / scatter else SAME
