"""What was measured as rows, and rows as a table."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from onepass.profiling import floors
from onepass.profiling.events import KERNELS, OTHER, PRODUCTS, REST, Work
from onepass.profiling.measure import Measured

SHOWN = 5  # rows of a kind at most, the rest in one


@dataclass(frozen=True)
class Row:
    """One line: how often a call of the target does this and for how long. Of a kernel of onepass also its rate and the share of the
    ceiling that ``limit`` names: floor over time."""

    kind: str
    name: str
    sizes: str
    calls: float
    milliseconds: float
    share: float
    rate: str = ""
    of_ceiling: float | None = None
    limit: str = ""


def rows(measured: Measured, threads: int, advance: Callable[[], None]) -> list[Row]:
    """``advance`` is called after every kernel: their ceilings take a moment to measure."""
    whole, repeat = 1e6 * measured.profiled_seconds, measured.repeat

    def row(kind: str, name: str, sizes: str, calls: float, time: float, **of_kernel: Any) -> Row:
        return Row(kind, name, sizes, calls / repeat, time / repeat / 1e3, time / repeat / whole, **of_kernel)

    out = []
    for kind in (KERNELS, PRODUCTS, OTHER):
        works = [work for work in measured.profile.works if work.kind == kind]
        for work in works[: len(works) if kind == KERNELS else SHOWN]:
            against = _against_ceiling(work, threads)
            out.append(row(kind, work.name, _sizes(work), work.calls, work.time, **against))
            if kind == KERNELS:
                advance()
        if kind != KERNELS and (others := works[SHOWN:]):
            calls, time = sum(work.calls for work in others), sum(work.time for work in others)
            out.append(row(kind, f"{len(others)} more", "", calls, time))
    rest = f"{REST}: GPU idle" if measured.profile.on_gpu else REST
    out.append(row(rest, "", "", 0, repeat * whole - measured.profile.busy))
    return out


def _sizes(work: Work) -> str:
    if not work.of_sizes:
        return ""
    call = max(work.of_sizes, key=lambda call: work.of_sizes[call][1])
    text = f"{call.sizes}, {call.dtype if call.kept == call.dtype else f'{call.dtype} over {call.kept}'}"
    return text if len(work.of_sizes) == 1 else f"{text} and {len(work.of_sizes) - 1} more"


def _against_ceiling(work: Work, threads: int) -> dict[str, Any]:
    """A kernel's rate, and its floor over its time; what limits it is what makes up most of the floor."""
    elements = operations = moved = 0.0
    of_limit = {"arithmetic": 0.0, "read bandwidth": 0.0}
    for call, (calls, _) in work.of_sizes.items():
        if (floor := floors.floor(call, threads)) is None:
            return {}
        of_limit[floor.limit] += calls * floor.seconds
        moved += calls * floors.moved(call)
        operations += 2 * calls * floors.slots(call)
        elements += calls * floors.elements(call)
    seconds = work.time / 1e6
    if moved == 0 or seconds == 0:
        return {}
    limit = max(of_limit, key=lambda name: of_limit[name])
    if limit == "read bandwidth":
        rate = f"{moved / seconds / 1e9:.1f} GB/s"
    elif elements:
        rate = f"{elements / seconds / 1e9:.1f} G elements/s"
    else:
        rate = f"{operations / seconds / 1e9:.1f} GFLOP/s"
    unknown = any(call.pairs is None for call in work.of_sizes)
    return {"rate": rate, "of_ceiling": sum(of_limit.values()) / seconds, "limit": limit + (" at most" if unknown else "")}


def table(lines: list[Row]) -> Table:
    found = Table("", box=None, pad_edge=False, header_style="bold")
    for title in ("calls", "ms", "share", "of its ceiling"):
        found.add_column(title, justify="right", no_wrap=True)
    for kind in dict.fromkeys(row.kind for row in lines):
        of_kind = [row for row in lines if row.kind == kind]
        time, share = sum(row.milliseconds for row in of_kind), sum(row.share for row in of_kind)
        found.add_row(kind, "", f"{time:.3f}", f"{share:.0%}", "", style="bold")
        for row in of_kind:
            if row.name:
                ceiling = "" if row.of_ceiling is None else f"{row.of_ceiling:.0%} of {row.limit}"
                found.add_row(f"  {row.name}", f"{row.calls:,.10g}", f"{row.milliseconds:.3f}", f"{row.share:.0%}", ceiling)
            if row.sizes:
                found.add_row(f"    {row.sizes}", "", "", "", row.rate, style="dim")
    return found


def figures(lines: list[Row], measured: Measured) -> dict[str, Any]:
    """The same for programs."""
    return {
        "milliseconds": 1e3 * measured.seconds,
        "milliseconds under the profiler": 1e3 * measured.profiled_seconds,
        "repeat": measured.repeat,
        "rows": [asdict(row) for row in lines],
    }
