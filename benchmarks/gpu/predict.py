"""How long a launch would take at least, by published rates. No more than that: latencies, bank conflicts, the tensor cores' rate and the
launch itself are not in it.
"""

from dataclasses import dataclass

from .compiled import Entry
from .devices import Device
from .sass import Issue


@dataclass(frozen=True)
class Prediction:
    """Seconds that each resource is busy with the launch; the longest is the prediction, and its resource the limit.

    ``elements_per_second`` is what the hot loop does with blocks on all SMs and no wait for memory.
    """

    seconds: dict[str, float]
    elements_per_second: float | None

    @property
    def limit(self) -> str:
        return max(self.seconds, key=self.seconds.__getitem__)


def predict(device: Device, entry: Entry, issue: Issue | None, elements: float | None, moved: int | None) -> Prediction:
    """``elements`` are of one trip of the machine code's hot loop, which issues ``issue``; ``moved`` are bytes past the L1s, if known.

    What does not fit into L2 counts as often as it is moved; what fits comes from memory once.
    """
    traffic = entry.necessary if moved is None or entry.necessary <= device.l2 else moved
    seconds = {"bytes": traffic / device.bandwidth}
    if issue is None or elements is None or entry.work is None:
        return Prediction(seconds, None)
    clocks = {  # of one SM, per element
        "issue": issue.total / elements / (32 * device.schedulers),
        "mufu": issue.slots["mufu"] / elements / device.mufu,
        "fp32": issue.fp32 / elements / device.fp32,
    }
    x, y, z = entry.grid
    busy = min(device.sms, x * y * z)
    seconds |= {name: entry.work * each / busy / device.clock for name, each in clocks.items()}
    return Prediction(seconds, device.sms * device.clock / max(clocks.values()))
