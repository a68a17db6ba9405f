"""What the machine reports: findings that it collects, and faults that end a launch."""

from dataclasses import dataclass, replace
from typing import TypeAlias

Position: TypeAlias = tuple[int, int, int]


@dataclass(frozen=True)
class Finding:
    """One defect, where it showed first.

    ``kind`` is a short fixed phrase for tests to compare; ``other`` is the line and text of the earlier access of a race; ``count`` is
    how often the same instruction showed the same defect.
    """

    kind: str
    detail: str
    instruction: str
    line: str
    block: Position
    thread: int
    other: str = ""
    count: int = 1

    def __str__(self) -> str:
        earlier = f"; the other access is at {self.other}" if self.other else ""
        where = f"at `{self.instruction}` [{self.line}], block {self.block}, thread {self.thread}"
        return f"{self.kind}: {self.detail}\n  {where}{earlier} ({self.count}x)"


class PTXError(Exception):
    """The text is not PTX that this machine can read or run."""


class Fault(Exception):  # noqa: N818 - the field's word for it
    """A defect after which there is nothing sensible to go on with; ``finding`` says what and where."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(str(finding))
        self.finding = finding


class Findings(list[Finding]):
    """Findings in the order in which they showed; the same defect of the same instructions is one finding with a count."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[tuple[str, str, str, str], int] = {}

    def report(self, finding: Finding) -> None:
        key = (finding.kind, finding.instruction, finding.line, finding.other)
        if key in self._seen:
            place = self._seen[key]
            self[place] = replace(self[place], count=self[place].count + finding.count)
        else:
            self._seen[key] = len(self)
            self.append(finding)
