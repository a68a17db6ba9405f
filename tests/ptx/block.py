"""One running block: its registers, its memory, where it is, and what it reports."""

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .findings import Fault, Finding, Findings, Position
from .parse import Instruction
from .races import Clock, Race
from .rounding import Array

if TYPE_CHECKING:
    from .access import CopyQueue
    from .cache import SectorCache
    from .memory import GlobalMemory, LocalMemory, ParameterMemory, SharedMemory


@dataclass
class Block:
    """Registers are never changed in place, so they may share arrays; one that all threads share has no axis."""

    position: Position
    number: int
    threads: int
    instructions: list[Instruction]
    findings: Findings
    counts: Counter[str]
    clock: Clock
    special: dict[str, Array]
    registers: dict[str, Array]
    shared: "SharedMemory"
    local: "LocalMemory"
    global_: "GlobalMemory"
    parameters: "ParameterMemory"
    copies: "CopyQueue"
    cache: "SectorCache | None" = None
    here: int = 0
    cluster: "list[Block]" = field(default_factory=list)  # its blocks by rank, this one among them
    lanes: Array = field(init=False)

    def __post_init__(self) -> None:
        self.lanes = np.arange(self.threads)

    def finding(self, kind: str, detail: str, thread: int, other: int | None = None) -> Finding:
        instruction = self.instructions[self.here]
        earlier = "" if other is None else f"{self.instructions[other].line} `{self.instructions[other].text}`"
        return Finding(kind, detail, instruction.text, instruction.line, self.position, thread, earlier)

    def report(self, kind: str, detail: str, thread: int, other: int | None = None) -> None:
        self.findings.report(self.finding(kind, detail, thread, other))

    def report_race(self, race: Race | None, kind: str) -> None:
        if race is not None:
            self.report(kind, f"it {race.now} what another {race.before}", race.lane, race.other)

    def fault(self, kind: str, detail: str, thread: int) -> Fault:
        """The exception to raise; it is among the findings too."""
        finding = self.finding(kind, detail, thread)
        self.findings.report(finding)
        return Fault(finding)

    def active(self, mask: Array | None) -> Array:
        """The numbers of the threads of a mask; without one, all."""
        return self.lanes if mask is None else np.flatnonzero(mask)

    def spread(self, values: Array) -> Array:
        """One value per thread, also of a register that all share."""
        return values if np.ndim(values) else np.broadcast_to(values, (self.threads,))

    def warps(self, mask: Array | None) -> int:
        """How many warps have a thread in the mask."""
        if mask is None:
            return self.clock.warps
        return int(np.unique(np.flatnonzero(mask) // 32).size)
