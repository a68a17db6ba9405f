"""Results as tables for a terminal and as one HTML file that needs no other."""

import base64
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .comparison import SAME, Comparison
from .providers import mine
from .records import MEASURED, MISSING, Record, Results, caption
from .workloads import Shape

Rows = list[list[str]]
OWN_COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "over eager": ("over eager", lambda x: f"{x:.1f}x"),
    "over best peer": ("over best peer", lambda x: f"{x:.1f}x"),
    "elements/s": ("G elements/s", lambda x: f"{x / 1e9:.2f}"),
    "FLOP/s": ("GFLOP/s", lambda x: f"{x / 1e9:.1f}"),
    "bytes/s": ("GB/s", lambda x: f"{x / 1e9:.1f}"),
    "of ceiling": ("of ceiling", lambda x: f"{100 * x:.0f} %"),
    "compile seconds": ("compile s", lambda x: f"{x:.1f}"),
    "peak bytes": ("peak MiB", lambda x: f"{x / 2**20:.1f}"),
    "of budget": ("of budget", lambda x: f"{x:.2f}"),
    "over one thread": ("over one thread", lambda x: f"{x:.2f}x"),
}
TEXT = ("kernel", "shape", "sizes", "dtype", "direction", "provider")
SUMMARY = ("over best peer", "over eager", "of ceiling")


def sizes(shape: Shape) -> str:
    return "  ".join(f"{name} {value}" for name, value in zip("BTSAD", shape[1:], strict=True) if value)


def cell(record: Record, metric: str) -> str:
    title_and_text = OWN_COLUMNS.get(metric, (metric, "{:.3g}".format))
    return title_and_text[1](record.metrics[metric]) if metric in record.metrics else ""


def ordered(names: Iterable[str]) -> list[str]:
    """Without repetition; onepass first."""
    return sorted(dict.fromkeys(names), key=lambda name: not mine(name))


def main_records(results: Results) -> list[Record]:
    """What was timed on all threads: what scaling over threads adds has a table of its own."""
    return [record for record in results.timed() if "over eager" in record.metrics or "elements/s" in record.metrics]


def pivot(records: Sequence[Record]) -> tuple[list[str], Rows]:
    """A row for each shape and direction, milliseconds of each provider; the summary is of the best of onepass."""
    names = ordered(record.provider for record in records)
    rows: Rows = []
    groups: dict[tuple[str, Shape, str, str], dict[str, Record]] = {}
    for record in records:
        groups.setdefault((record.dtype, record.shape, record.direction, record.device), {})[record.provider] = record
    for (dtype, shape, direction, _), of in groups.items():
        times = [f"{1e3 * of[name].median:.3g}" if name in of else "" for name in names]
        own = min((record for record in of.values() if mine(record.provider)), key=lambda record: record.median, default=None)
        rows.append([shape.name, sizes(shape), dtype, direction, *times, *(cell(own, metric) if own else "" for metric in SUMMARY)])
    return ["shape", "sizes", "dtype", "direction", *names, *(OWN_COLUMNS[metric][0] for metric in SUMMARY)], rows


def full(records: Sequence[Record]) -> tuple[list[str], Rows]:
    """A row for each record, with all of its metrics."""
    metrics = [m for m in OWN_COLUMNS if any(m in record.metrics for record in records)]
    metrics += [m for m in dict.fromkeys(m for record in records for m in record.metrics) if m not in OWN_COLUMNS]
    rows = [
        [record.kernel, record.shape.name, sizes(record.shape), record.dtype, record.direction, record.provider, str(record.threads)]
        + ([f"{1e3 * record.median:.3g}"] if record.seconds else [""])
        + ([f"{1e3 * record.quantiles['0.05']:.3g} to {1e3 * record.quantiles['0.95']:.3g}"] if record.quantiles else [""])
        + [cell(record, metric) for metric in metrics]
        for record in records
        if record.status == MEASURED
    ]
    titles = ["kernel", "shape", "sizes", "dtype", "direction", "provider", "threads", "ms", "5 to 95 % of calls, ms"]
    return [*titles, *(OWN_COLUMNS.get(metric, (metric,))[0] for metric in metrics)], rows


def tables(results: Results) -> list[tuple[str, list[str], Rows]]:
    """Title, columns and rows: milliseconds of every kernel, then memory, then threads."""
    timed = main_records(results)
    found = [(f"{kernel}, ms", *pivot([r for r in timed if r.kernel == kernel])) for kernel in dict.fromkeys(r.kernel for r in timed)]
    peaks = [record for record in results.records if "peak bytes" in record.metrics]
    if peaks:
        rows = [
            [r.kernel, r.shape.name, sizes(r.shape), r.direction, r.provider, cell(r, "peak bytes"), cell(r, "of budget")] for r in peaks
        ]
        columns = ["kernel", "shape", "sizes", "direction", "provider", "peak MiB", "of budget"]
        found.append(("peak memory beyond inputs and results", columns, rows))
    scaled = [record for record in results.records if "over one thread" in record.metrics and record.threads > 1]
    if scaled:
        rows = [
            [r.kernel, r.shape.name, sizes(r.shape), r.direction, r.provider, str(r.threads), cell(r, "over one thread")] for r in scaled
        ]
        found.append(("threads", ["kernel", "shape", "sizes", "direction", "provider", "threads", "over one"], rows))
    return found


def notes(results: Results) -> list[str]:
    """Who has no times, and why, once for each reason."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for record in results.records:
        if record.status != MEASURED:
            places = reasons.setdefault((record.status, record.provider, record.reason), [])
            places.append(f"{record.kernel} {record.direction} {record.shape.name}")
    found = []
    for (status, name, reason), places in reasons.items():
        where = "" if status == MISSING else f" ({', '.join(places)})"
        found.append(f"{name}{where}: {reason}" if status == MISSING else f"{name} is {status.upper()}, so not timed{where}: {reason}")
    return found


def ceilings_line(results: Results) -> list[str]:
    return [
        f"ceilings, {of}: " + ", ".join(f"{name} {rate / 1e9:.1f} G/s" for name, rate in rates.items())
        for of, rates in results.ceilings.items()
        if rates
    ]


def show(results: Results, console: Console) -> None:
    for line in (caption(results), *ceilings_line(results)):
        console.print(line, style="dim", highlight=False)
    for title, columns, rows in tables(results):
        console.print(rich_table(title, columns, rows))
    for note in notes(results):
        console.print(note, style="yellow" if "so not timed" not in note else "bold red", highlight=False, markup=False)


def rich_table(title: str, columns: Sequence[str], rows: Rows) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold")
    for column in columns:
        table.add_column(column, justify="left" if column in TEXT else "right", style="bold" if mine(column) else "", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def show_comparison(found: Comparison, console: Console) -> None:
    rows = [
        [
            c.after.kernel,
            c.after.provider,
            c.after.direction,
            c.after.shape.name,
            f"{1e3 * c.before.median:.3g}",
            f"{1e3 * c.after.median:.3g}",
        ]
        + [f"{c.ratio:.2f}", c.verdict]
        for c in found.changes
        if mine(c.after.provider)
    ]
    columns = ["kernel", "provider", "direction", "shape", "before, ms", "after, ms", "ratio", "verdict"]
    console.print(rich_table("after over before, the machine's drift divided out", columns, rows))
    moved = sum(change.verdict != SAME for change in found.changes)
    console.print(
        f"{len(found.slower())} slower, {moved - len(found.slower())} faster of {len(rows)}; "
        f"the machine's drift {found.drift:.2f}, the most that an unchanged peer moved {found.scatter:.2f}; "
        f"{found.only_before} rows are in the first alone, {found.only_after} in the second",
        highlight=False,
    )


STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:76rem;padding:0 1rem;color:#1f2430}
h1{font-size:1.6rem;margin:0}h2{font-size:1.15rem;margin:2.2rem 0 .6rem}.conditions{color:#5c677d;font-size:.85rem}
table{border-collapse:collapse;font-size:.8rem;font-variant-numeric:tabular-nums}.wide{overflow-x:auto}
th,td{padding:.25rem .6rem;text-align:right;white-space:nowrap;border-bottom:1px solid #e6e8ee}
th{font-weight:600;border-bottom:2px solid #c9cedb}td.text,th.text{text-align:left}tr:hover td{background:#f5f6fa}
.own{color:#b3364a;font-weight:600}figure{margin:1.5rem 0}img{max-width:100%}li{margin:.2rem 0}"""


def page(results: Results, pictures: Sequence[Path]) -> str:
    """Pictures are SVG files, and become part of it."""

    def table(columns: Sequence[str], rows: Rows) -> str:
        def row(tag: str, cells: Sequence[str]) -> str:
            kinds = ["text" if column in TEXT else "own" if mine(column) else "" for column in columns]
            return "<tr>" + "".join(f'<{tag} class="{kind}">{escape(c)}</{tag}>' for c, kind in zip(cells, kinds, strict=True)) + "</tr>"

        body = "".join(row("td", cells) for cells in rows)
        return f'<div class="wide"><table><thead>{row("th", columns)}</thead><tbody>{body}</tbody></table></div>'

    parts = [f"<h1>onepass {escape(results.versions['onepass'])}: measured</h1>"]
    parts += [f'<p class="conditions">{escape(line)}</p>' for line in (caption(results), *ceilings_line(results))]
    for picture in pictures:
        data = base64.b64encode(picture.read_bytes()).decode()
        parts.append(f'<figure><img alt="{escape(picture.stem)}" src="data:image/svg+xml;base64,{data}"></figure>')
    parts += [f"<h2>{escape(title)}</h2>{table(columns, rows)}" for title, columns, rows in tables(results)]
    if found := notes(results):
        parts.append("<h2>Without times</h2><ul>" + "".join(f"<li>{escape(note)}</li>" for note in found) + "</ul>")
    parts.append(f"<h2>Everything</h2>{table(*full(results.records))}")
    return f'<!doctype html><html lang="en"><meta charset="utf-8"><title>onepass benchmark</title><style>{STYLE}</style>{"".join(parts)}</html>'
