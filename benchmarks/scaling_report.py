"""What ``scaling`` measured: a page of Markdown, and a picture of every sweep."""

import math
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .exponents import MEMORY, TIME, Curve, Loss, axis_of, curves, fit, losses, place, theory
from .pictures import GREY, colours
from .providers import mine
from .records import FAILED, MISSING, WRONG, Record, Results, caption
from .report import ordered

COMMAND = "python -m onepass.benchmarks.scaling --json scaling.json --pictures docs --page docs/scaling.md"
INTRODUCTION = f"""# How time and memory grow

`{COMMAND}` made this page: {{conditions}}.

Every result was checked against float64 before it was timed. An exponent is the slope of a line by least squares through the logarithms
of the upper half of the range, with its standard error; theory is what the operation count says, or the largest tensor that is kept. Below
the upper half calls cost more than work. Memory is the peak beyond inputs and results; where it stays under a MiB it has no exponent.
"""


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown(results: Results, pictures: Sequence[str] = ()) -> str:
    """With pictures by their addresses as seen from the page."""
    found = [curve for curve in curves(results) if len(curve.points) > 1]
    parts = [INTRODUCTION.format(conditions=caption(results)), *(f"![{Path(picture).stem}]({picture})\n" for picture in pictures)]
    parts += ["## Exponents\n", table(EXPONENTS, list(exponent_rows(found)))]
    parts += ["\n## Where a peer is faster\n", table(LOSSES, list(loss_rows(results))) if any(losses(results)) else "Nowhere."]
    if left := list(left_out_rows(results)):
        parts += ["\n## Left out\n", table(("kernel", "axis", "provider", "from", "why"), left)]
    if wrong := list(wrong_rows(results)):
        parts += ["\n## Wrong, so without times\n", table(("kernel", "direction", "axis", "at", "provider", "why"), wrong)]
    for (axis, quantity, kernel, direction), of in _sweeps(found).items():
        unit = "MiB" if quantity == MEMORY else "milliseconds"
        shape = next(r.shape for r in results.records if axis_of(r) == axis and r.kernel == kernel)
        fixed = ", ".join(f"{name} {size}" for name, size in zip("BTSAD", shape[1:], strict=True) if name not in axis.split(" = "))
        parts += [f"\n## {kernel}, {direction}, over {axis}: {unit}\n", f"{fixed}\n", table(*_values(axis, of))]
    return "\n".join(parts) + "\n"


EXPONENTS = ("over", "of", "kernel", "direction", "provider", "range", "exponent", "theory", "difference")
LOSSES = ("kernel", "direction", "over", "at", "at worst", "why")


def exponent_rows(found: Sequence[Curve]) -> Iterator[list[str]]:
    for curve in sorted(found, key=lambda c: (c[:4], not mine(c.provider))):
        fitted, expected = fit(curve), theory(curve)
        head = [curve.axis, curve.quantity, curve.kernel, curve.direction, curve.provider]
        if fitted is None:
            yield [*head, "", "too little to fit", f"{expected:g}", ""]
            continue
        error = "" if math.isnan(fitted.error) else f" ± {fitted.error:.2f}"
        span = f"{fitted.low} to {fitted.high}"
        yield [*head, span, f"{fitted.exponent:.2f}{error}", f"{expected:g}", f"{fitted.exponent - expected:+.2f}"]


def loss_rows(results: Results) -> Iterator[list[str]]:
    """One for each sweep and reason."""
    groups: dict[tuple[str, str, str, str], list[Loss]] = {}
    for loss in losses(results):
        groups.setdefault((loss.own.kernel, loss.own.direction, axis_of(loss.own) or "", loss.reason), []).append(loss)
    for (kernel, direction, axis, reason), of in groups.items():
        own, peer, _ = max(of, key=lambda loss: loss.own.median / loss.peer.median)
        times = f"{1e3 * own.median:.3g} ms, {peer.provider} {1e3 * peer.median:.3g}"
        yield [kernel, direction, axis, ", ".join(str(place(loss.own)) for loss in of), f"{place(own)}: {times}", reason]


def left_out_rows(results: Results) -> Iterator[list[str]]:
    """Each provider's first of a sweep."""
    first: dict[tuple[str, str, str], Record] = {}
    for record in results.records:
        if record.status == MISSING and (axis := axis_of(record)):
            first.setdefault((record.kernel, axis, record.provider), record)
    for (kernel, axis, name), record in first.items():
        yield [kernel, axis, name, str(place(record)), record.reason]


def wrong_rows(results: Results) -> Iterator[list[str]]:
    for record in results.records:
        if record.status in (WRONG, FAILED) and (axis := axis_of(record)):
            why = f"{record.status}: {record.reason}"
            yield [record.kernel, record.direction, axis, str(place(record)), record.provider, why]


def _sweeps(found: Sequence[Curve]) -> dict[tuple[str, str, str, str], list[Curve]]:
    of: dict[tuple[str, str, str, str], list[Curve]] = {}
    for curve in found:
        of.setdefault((curve.axis, curve.quantity, curve.kernel, curve.direction), []).append(curve)
    return of


def _values(axis: str, of: Sequence[Curve]) -> tuple[list[str], list[list[str]]]:
    by_name = {curve.provider: dict(curve.points) for curve in of}
    names, unit = ordered(by_name), 2.0**-20 if of[0].quantity == MEMORY else 1e3
    places = sorted({x for points in by_name.values() for x in points})
    rows = [[str(x), *(f"{unit * by_name[name][x]:.3g}" if x in by_name[name] else "" for name in names)] for x in places]
    return [axis, *names], rows


def draw(results: Results, folder: Path) -> list[Path]:
    """A picture for time and one for memory, with a panel for every sweep, as PNG and SVG."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for quantity in (TIME, MEMORY):
        sweeps = {key: of for key, of in _sweeps([c for c in curves(results) if len(c.points) > 1]).items() if key[1] == quantity}
        if not sweeps:
            continue
        columns = min(3, len(sweeps))
        lines = -(-len(sweeps) // columns)
        figure, axes = plt.subplots(lines, columns, figsize=(4.2 * columns, 3.2 * lines), layout="constrained", squeeze=False)
        for axis, (key, of) in zip(axes.flat, sweeps.items(), strict=False):
            _panel(axis, key[0], quantity, of)
            axis.set_title(f"{key[2]}, {key[3]}, over {key[0]}", fontsize=8, fontweight="bold", loc="left")
        for axis in axes.flat[len(sweeps) :]:
            axis.axis("off")
        palette = colours([curve.provider for of in sweeps.values() for curve in of])
        for name in ordered(curve.provider for of in sweeps.values() for curve in of):
            axes.flat[0].plot([], [], "o-", color=palette[name], label=name)
        figure.legend(loc="outside upper center", ncols=6, frameon=False, fontsize=8)
        figure.supxlabel(textwrap.fill(caption(results), 75 * columns), fontsize=7, color=GREY)
        for suffix, more in ((".svg", {"metadata": {"Date": None}}), (".png", {"dpi": 130})):
            figure.savefig(folder / f"scaling-{quantity}{suffix}", **more)
        plt.close(figure)
        written.append(folder / f"scaling-{quantity}.svg")
    return written


def _panel(axis: Any, name: str, quantity: str, of: Sequence[Curve]) -> None:
    """Logarithmic; in grey the slope that theory gives onepass, through its last point."""
    unit, palette = 2.0**-20 if quantity == MEMORY else 1e3, colours([curve.provider for curve in of])
    for curve in sorted(of, key=lambda c: mine(c.provider)):
        own = mine(curve.provider)
        points = [(x, unit * y) for x, y in curve.points if y > 0]
        if not points:
            continue
        axis.plot(*zip(*points, strict=True), "o-", color=palette[curve.provider], linewidth=2 if own else 1.2, markersize=4 if own else 3)
        if own:
            (first, _), (last, at_last) = points[0], points[-1]
            axis.plot([first, last], [at_last * (first / last) ** theory(curve), at_last], "--", color="#c9cedb", linewidth=1, zorder=0)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_minor_formatter(lambda value, _: "")
    axis.set_xlabel(name, fontsize=8, color=GREY)
    axis.set_ylabel("MiB" if quantity == MEMORY else "milliseconds", fontsize=8, color=GREY)
    axis.tick_params(labelsize=7, colors=GREY)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="#eef0f4")
