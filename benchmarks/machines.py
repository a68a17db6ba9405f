"""What ``bench --bars`` found on several machines, side by side and then whole: ``python -m onepass.benchmarks.machines``."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from .command import usage_errors
from .comparison import best_of_onepass
from .providers import mine, variant
from .records import Record, Results, load
from .report import SUMMARY, added, conditions, figure, grids, notes
from .scaling_report import table
from .workloads import Shape

COMMAND = "python -m onepass.benchmarks.machines docs/machines/*.json --page docs/machines.md"
INTRODUCTION = f"""# On which processor, how fast

`{COMMAND}` made this page of what
`python -m onepass bench --bars --json ...` found on each machine, in one run, at the commit named. Every result was checked against float64
before it was timed. Side by side stand the least and the most of the shapes that all of them have; all shapes follow, by machine.

- *of ceiling*: the least time that the machine's measured rates allow, over the time taken. It is above 100 % where a cache serves what is
  counted as memory's, or where the rates were measured in a busier minute than the times. An element of additive attention counts as 3
  multiply-adds forward and 7 backward; before commit 5a8b3a7, as on all machines but AMD's, forward counted as 4.
- *of the limit*: the same of a decoding step, whose keys and values are read from where they lie.
- *of budget*: peak memory over what README grants, of additive attention without its factor of 1.2; above 1 only where that is less than
  1.6 MB, and in training loops measured before 2026-12.
- Before commit ae08247, as on all machines but Zen 3 and Zen 4, SDPA was given tensors without a dimension of heads, for which torch takes
  its formula in the place of a fused kernel, and a peer's beams went over copies of the keys and values.
- *identity*: what onepass's own formula gives in plain torch or jax, compiled; it is no peer, as it is not right for all inputs.
- A peer whose result is off by more than the check allows has no time there and is not *best*; the end of a machine's tables names it.
"""

Row = tuple[str, str, str, str, str]  # kernel, direction, dtype, device, metric


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
    rates = [
        {f"{of}: {rate}, G/s": f / 1e9 for of, found in results.ceilings.items() for rate, f in found.items()}
        for results in machines.values()
    ]
    for title in dict.fromkeys(title for found in rates for title in found):
        yield [title, *(f"{found[title]:.0f}" if title in found else "" for found in rates)]
    figures = [_figures(results) for results in machines.values()]
    for row in dict.fromkeys(row for found in figures for row in found):
        having = [found[row] for found in figures if row in found]
        common = set(having[0]).intersection(*having)
        kernel, direction, dtype, device, metric = row
        title, text = figure(metric)
        cells = (_span([found[row][shape] for shape in common], text) if row in found and common else "" for found in figures)
        yield [f"{kernel}, {direction}, {dtype} on {device}: {title}", *cells]


def _span(values: Sequence[float], text: Callable[[float], str]) -> str:
    least, most = text(min(values)), text(max(values))
    return least if least == most else f"{least} to {most}"


def _figures(results: Results) -> dict[Row, dict[Shape, float]]:
    """Of each shape, of the fastest of onepass where there are times."""
    groups: dict[tuple[str, str, str, str], list[Record]] = {}
    for record in results.records:
        if mine(record.provider) and not variant(record.provider) and record.metrics:
            groups.setdefault((record.kernel, record.direction, record.dtype, record.device), []).append(record)
    found: dict[Row, dict[Shape, float]] = {}
    for group, records in groups.items():
        own = added(records)
        for metric in ["over best peer", *own] if own else [*SUMMARY, "over one thread", "of budget"]:
            if of_shapes := dict(_best(records, metric)):
                found[(*group, metric)] = of_shapes
    return found


def _best(records: Sequence[Record], metric: str) -> Iterator[tuple[Shape, float]]:
    for shape in dict.fromkeys(record.shape for record in records):
        having = [r for r in records if r.shape == shape and metric in r.metrics and (metric != "over one thread" or r.threads > 1)]
        best = best_of_onepass(record for record in having if record.seconds)
        if best is not None or having:
            yield shape, (best or having[0]).metrics[metric]


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
