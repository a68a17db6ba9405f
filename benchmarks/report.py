"""Results as tables on a terminal."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from .comparison import FASTER, SLOWER, Comparison, best_of_onepass
from .providers import mine
from .records import MEASURED, MISSING, Record, Results, caption
from .workloads import Shape

SIZES = "BxTxSxAxD"
PLACE = ("kernel", "shape", SIZES, "direction", "provider")
TEXT = (*PLACE, "dtype", "verdict")
FIGURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "over best peer": ("over best peer", lambda x: f"{x:.1f}x"),
    "over eager": ("over eager", lambda x: f"{x:.1f}x"),
    "of ceiling": ("of ceiling", lambda x: f"{100 * x:.0f} %"),
    "elements/s": ("G elements/s", lambda x: f"{x / 1e9:.2f}"),
    "FLOP/s": ("GFLOP/s", lambda x: f"{x / 1e9:.1f}"),
    "bytes/s": ("GB/s", lambda x: f"{x / 1e9:.1f}"),
    "compile seconds": ("compile s", lambda x: f"{x:.1f}"),
    "peak bytes": ("peak MiB", lambda x: f"{x / 2**20:.1f}"),
    "of budget": ("of budget", lambda x: f"{x:.2f}"),
    "over one thread": ("over one thread", lambda x: f"{x:.2f}x"),
}
SUMMARY = ("over best peer", "over eager", "of ceiling")


class Grid(NamedTuple):
    """A table before it is drawn."""

    title: str
    columns: Sequence[str]
    rows: list[list[str]]
    note: str = ""


def sizes(shape: Shape) -> str:
    """As ``--shapes`` takes them."""
    return "x".join(str(size) for size in shape[1:] if size)


def figure(metric: str) -> tuple[str, Callable[[float], str]]:
    """A metric's title, and how a number of it is written."""
    return FIGURES.get(metric, (metric, "{:.3g}".format))


def added(records: Iterable[Record]) -> list[str]:
    """The metrics that a family has of its own, but for parts of its times."""
    found = dict.fromkeys(metric for record in records for metric in record.metrics if metric not in FIGURES)
    return [metric for metric in found if not metric.endswith(" seconds")]


def cell(record: Record | None, metric: str) -> str:
    if record is None or metric not in record.metrics:
        return ""
    return figure(metric)[1](record.metrics[metric])


def place(record: Record) -> list[str]:
    """The cells of the columns ``PLACE``."""
    return [record.kernel, record.shape.name, sizes(record.shape), record.direction, record.provider]


def ordered(names: Iterable[str]) -> list[str]:
    """Without repetition; onepass first."""
    return sorted(dict.fromkeys(names), key=lambda name: not mine(name))


def compared(results: Results) -> list[Record]:
    """What was timed beside others; scaling over threads has a table of its own."""
    return [record for record in results.timed() if "elements/s" in record.metrics]


def pivots(records: Sequence[Record]) -> Iterator[Grid]:
    """For each kernel and direction milliseconds of every provider, a row for each shape; the summary is of the best of onepass."""
    groups: dict[tuple[str, str, str, str], dict[Shape, dict[str, Record]]] = {}
    for record in records:
        of_group = groups.setdefault((record.kernel, record.direction, record.dtype, record.device), {})
        of_group.setdefault(record.shape, {})[record.provider] = record
    for (kernel, direction, dtype, device), shapes in groups.items():
        names = ordered(name for of_shape in shapes.values() for name in of_shape)
        summary = [*SUMMARY, *added(record for of_shape in shapes.values() for record in of_shape.values())]
        rows = []
        for shape, found in shapes.items():
            own = best_of_onepass(found.values())
            times = [f"{1e3 * found[name].median:.3g}" if name in found else "" for name in names]
            rows.append([shape.name, *times, *(cell(own, metric) for metric in summary)])
        columns = ["shape", *names, *(figure(metric)[0] for metric in summary)]
        note = f"{SIZES}: " + ", ".join(f"{shape.name} {sizes(shape)}" for shape in shapes)
        yield Grid(f"{kernel}, {direction}, {dtype} on {device}: milliseconds", columns, rows, note)


def everything(records: Sequence[Record]) -> Grid:
    """A row for each record, with all of its metrics."""
    measured = [record for record in records if record.status == MEASURED]
    metrics = list(dict.fromkeys([*FIGURES, *(metric for record in measured for metric in record.metrics)]))
    metrics = [metric for metric in metrics if any(metric in record.metrics for record in measured)]
    rows = [
        [
            *place(record),
            record.dtype,
            str(record.threads),
            f"{1e3 * record.median:.3g}" if record.seconds else "",
            f"{1e3 * record.quantiles['0.05']:.3g} to {1e3 * record.quantiles['0.95']:.3g}" if record.quantiles else "",
            *(cell(record, metric) for metric in metrics),
        ]
        for record in measured
    ]
    titles = [figure(metric)[0] for metric in metrics]
    return Grid("Everything", [*PLACE, "dtype", "threads", "ms", "5 to 95 % of calls, ms", *titles], rows)


def grids(results: Results) -> list[Grid]:
    """Times of every kernel, then memory, then threads."""
    found = list(pivots(compared(results)))
    if peaks := [record for record in results.records if "peak bytes" in record.metrics]:
        shown = [metric for metric in ("peak bytes", "of budget") if any(metric in r.metrics for r in peaks)]
        rows = [[*place(r), *(cell(r, metric) for metric in shown)] for r in peaks]
        found.append(Grid("peak memory beyond inputs and results", [*PLACE, *(FIGURES[metric][0] for metric in shown)], rows))
    if scaled := [record for record in results.records if "over one thread" in record.metrics and record.threads > 1]:
        rows = [[*place(r), str(r.threads), cell(r, "over one thread")] for r in scaled]
        found.append(Grid("threads", [*PLACE, "threads", "over one thread"], rows))
    return found


def notes(results: Results) -> list[tuple[str, str]]:
    """Who has no times and why, each reason once: the status and a sentence."""
    places: dict[tuple[str, str, str], list[str]] = {}
    for record in results.records:
        if record.status != MEASURED:
            of_reason = places.setdefault((record.status, record.provider, record.reason), [])
            of_reason.append(f"{record.kernel} {record.direction} {record.shape.name}")
    return [
        (status, f"without {name}: {reason}")
        if status == MISSING
        else (status, f"{name} is {status.upper()}, so it has no time ({', '.join(where)}): {reason}")
        for (status, name, reason), where in places.items()
    ]


def conditions(results: Results) -> list[str]:
    """Where, of what, and under which ceilings."""
    rates = [(of, ", ".join(f"{name} {rate / 1e9:.1f} G/s" for name, rate in found.items())) for of, found in results.ceilings.items()]
    return [caption(results), *(f"ceilings, {of}: {text}" for of, text in rates if text)]


def show(results: Results, console: Console) -> None:
    for line in conditions(results):
        console.print(line, style="dim", highlight=False)
    for grid in grids(results):
        console.print(table(grid))
    for status, note in notes(results):
        console.print(note, style="yellow" if status == MISSING else "bold red", highlight=False, markup=False)


def table(grid: Grid) -> Table:
    drawn = Table(title=grid.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, header_style="dim", padding=0)
    drawn.caption, drawn.caption_justify = grid.note or None, "left"
    for column in grid.columns:
        look = "bold red" if mine(column) else ""
        drawn.add_column(column, justify="left" if column in TEXT else "right", style=look, overflow="fold", no_wrap=column == "shape")
    for row in grid.rows:
        drawn.add_row(*row)
    return drawn


def show_comparison(found: Comparison, console: Console) -> None:
    own = [change for change in found.changes if mine(change.after.provider)]
    rows = [[*place(c.after), f"{1e3 * c.before.median:.3g}", f"{1e3 * c.after.median:.3g}", f"{c.ratio:.2f}", c.verdict] for c in own]
    grid = Grid("after over before, the machine's drift divided out", [*PLACE, "before, ms", "after, ms", "ratio", "verdict"], rows)
    console.print(table(grid))
    slower, faster = (sum(change.verdict == verdict for change in own) for verdict in (SLOWER, FASTER))
    console.print(
        f"{slower} slower, {faster} faster of {len(own)}; the machine's drift {found.drift:.2f}, the most that an unchanged peer moved "
        f"beyond it {found.scatter:.2f}; {found.only_before} rows are in the first file alone, {found.only_after} in the second",
        style="bold red" if slower else "",
        highlight=False,
    )
