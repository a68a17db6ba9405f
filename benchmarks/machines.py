"""What ``bench --bars`` found on several machines, side by side and then whole: ``python -m onepass.benchmarks.machines``."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from .command import usage_errors
from .comparison import best_of_onepass
from .providers import mine, variant
from .records import Record, Results, load
from .report import FIGURES, SUMMARY, conditions, grids, notes
from .scaling_report import table

COMMAND = "python -m onepass.benchmarks.machines docs/machines/*.json --page docs/machines.md"
INTRODUCTION = f"""# On which processor, how fast

`{COMMAND}` made this page of what
`python -m onepass bench --bars --json ...` found on each machine, left alone, at the commit named. Every result was checked against float64
before it was timed. Of several shapes the least and the most are shown; all of them follow, by machine.

- *of ceiling*: the least time that the machine's measured rates allow, over the time taken. Above 100 % a cache serves what is counted as
  memory's.
- *of the limit*: the same of a decoding step, whose keys and values are read from where they lie.
- *of budget*: peak memory over what is promised; above 1 only where that is less than 1.6 MB.
"""


def markdown(machines: Mapping[str, Results]) -> str:
    """Results by the machine's name."""
    parts = [INTRODUCTION, table(["", *machines], list(side_by_side(machines)))]
    for name, results in machines.items():
        parts += [f"\n## {name}\n", "\n\n".join(conditions(results))]
        for grid in grids(results):
            parts += [f"\n{grid.title}:\n", table(grid.columns, grid.rows)]
            if grid.note:
                parts.append(f"\n{grid.note}")
        if without := notes(results):
            parts.append("\n" + "; ".join(note for _, note in without) + ".")
    return "\n".join(parts) + "\n"


def side_by_side(machines: Mapping[str, Results]) -> Iterator[list[str]]:
    """A row for each ceiling, then for each figure of a kernel and direction."""
    yield ["commit", *((results.commit or "")[:7] for results in machines.values())]
    rates = {name: {rate: f for of in results.ceilings.values() for rate, f in of.items()} for name, results in machines.items()}
    for rate in dict.fromkeys(rate for found in rates.values() for rate in found):
        yield [f"{rate}, G/s", *(f"{found[rate] / 1e9:.0f}" if rate in found else "" for found in rates.values())]
    spans = {name: dict(_spans(results)) for name, results in machines.items()}
    for row in dict.fromkeys(row for found in spans.values() for row in found):
        yield [row, *(found.get(row, "") for found in spans.values())]


def _spans(results: Results) -> Iterator[tuple[str, str]]:
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in results.records:
        if mine(record.provider) and not variant(record.provider) and record.metrics:
            groups.setdefault((record.kernel, record.direction), []).append(record)
    for (kernel, direction), records in groups.items():
        there = dict.fromkeys(metric for record in records for metric in record.metrics)
        added = [metric for metric in there if metric not in FIGURES and not metric.endswith(" seconds")]  # by the family
        for metric in ["over best peer", *added] if added else [*SUMMARY, "over one thread", "of budget"]:
            if found := list(_best(records, metric)):
                title, text = FIGURES.get(metric, (metric, "{:.3g}".format))
                least, most = text(min(found)), text(max(found))
                yield f"{kernel}, {direction}: {title}", least if least == most else f"{least} to {most}"


def _best(records: Sequence[Record], metric: str) -> Iterator[float]:
    """Of each shape, of the fastest where there are times."""
    for shape in dict.fromkeys(record.shape for record in records):
        found = [r for r in records if r.shape == shape and metric in r.metrics and (metric != "over one thread" or r.threads > 1)]
        best = best_of_onepass(record for record in found if record.seconds)
        if best is not None or found:
            yield (best or found[0]).metrics[metric]


def main(
    results: Annotated[list[Path], typer.Argument(help="Files of bench --json, each named after its machine.")],
    page: Annotated[Path | None, typer.Option(help="Write there, not to the terminal.", show_default=False)] = None,
) -> None:
    """Set what the benchmark found on several machines side by side, in Markdown."""
    with usage_errors():
        text = markdown({path.stem: load(path) for path in results})
    if page:
        page.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    typer.run(main)
