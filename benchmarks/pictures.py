"""Results as pictures, each an SVG and a PNG: speed beside eager, memory over S, the roofline, scaling over threads."""

import itertools
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import ceilings
from .providers import EAGER, mine
from .records import Results, caption
from .report import compared, ordered, sizes
from .workloads import FORWARD

COLOURS = {
    "onepass": "#d1495b",
    "onepass cpu": "#d1495b",
    "onepass triton": "#e9724c",
    "onepass cuda": "#9e2a2b",
    "onepass reference": "#edafb8",
    EAGER: "#8d99ae",
    "torch.compile": "#5c677d",
    "jax.jit": "#33415c",
    "SDPA": "#a3b18a",
    "FlexAttention": "#588157",
}
OTHERS = ("#bc8a5f", "#6d597a", "#4a7c8c", "#c9a227", "#7f9172", "#8e7dbe")  # peers, in the order of their names
MARKERS = "osD^vPX*<>hpd"
GREY = "#6b7280"


def colours(names: Iterable[str]) -> dict[str, str]:
    unknown = sorted(set(names) - COLOURS.keys())
    return {**COLOURS, **{name: OTHERS[i % len(OTHERS)] for i, name in enumerate(unknown)}}


def draw(results: Results, folder: Path) -> list[Path]:
    """Writes what the results have the data for; the SVG files."""
    import matplotlib

    matplotlib.use("agg")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    style: Any = {
        "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#c9cedb", "axes.titlesize": 10,
        "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.labelcolor": GREY, "xtick.color": GREY, "ytick.color": GREY,
        "legend.frameon": False, "legend.fontsize": 8, "svg.hashsalt": "onepass", "svg.fonttype": "path",
    }  # fmt: skip
    with matplotlib.rc_context(style):
        for picture in (speed, memory, roofline, threads):
            for name, figure in picture(results):
                text = textwrap.fill(caption(results), int(15 * figure.get_figwidth()))
                figure.supxlabel(text, fontsize=7, color=GREY)
                figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
                figure.savefig(folder / f"{name}.png", dpi=160)
                matplotlib.pyplot.close(figure)
                written.append(folder / f"{name}.svg")
    return written


def panels(count: int, width: float, height: float) -> tuple[Any, list[Any]]:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(count, 1, figsize=(width, 0.35 + height * count), layout="constrained", squeeze=False)
    return figure, list(axes[:, 0])


def speed(results: Results) -> Iterator[tuple[str, Any]]:
    """Of every kernel: how many times as fast as eager, on a logarithmic scale; a group of bars for each shape."""
    timed = [record for record in compared(results) if "over eager" in record.metrics and record.provider != EAGER]
    for kernel in dict.fromkeys(record.kernel for record in timed):
        of_kernel = [record for record in timed if record.kernel == kernel]
        names = ordered(record.provider for record in of_kernel)
        directions = list(dict.fromkeys(record.direction for record in of_kernel))
        shapes = list(dict.fromkeys((record.shape, record.dtype) for record in of_kernel))
        several = len({dtype for _, dtype in shapes}) > 1
        figure, axes = panels(len(directions), max(6.5, 1.35 * len(shapes) + 0.8), 2.4)
        for axis, direction in zip(axes, directions, strict=True):
            found = {(r.shape, r.dtype, r.provider): r.metrics["over eager"] for r in of_kernel if r.direction == direction}
            _bars(axis, {name: [found.get((*shape, name)) for shape in shapes] for name in names})
            labels = [f"{shape.name}\n{sizes(shape)}" + (f"\n{dtype}" if several else "") for shape, dtype in shapes]
            axis.set_xticks(range(len(shapes)), labels, fontsize=7)
            axis.set_title(f"{kernel}, {direction}" + ("" if several else f", {shapes[0][1]}"))
        figure.supylabel("times as fast as eager PyTorch", fontsize=8, color=GREY)
        palette = colours(names)
        handles = [axes[0].plot([], [], "s", color=palette[name], label=name)[0] for name in names]
        figure.legend(handles=handles, loc="outside upper center", ncols=len(names), handletextpad=0.1)
        yield f"speed-{kernel.replace(' ', '-')}", figure


def _bars(axis: Any, columns: Mapping[str, Sequence[float | None]]) -> None:
    """Up or down from 1, which is eager; what was not timed has none."""
    palette, width = colours(columns), min(0.86 / len(columns), 0.2)
    for i, (name, values) in enumerate(columns.items()):
        for group, value in enumerate(values):
            if value is not None:
                place = group + (i - (len(columns) - 1) / 2) * width
                axis.bar(place, value - 1, 0.94 * width, bottom=1, color=palette[name])
                text, weight = f"{value:.1f}" if value < 10 else f"{value:.0f}", "bold" if mine(name) else "normal"
                side, gap = ("bottom", 1) if value >= 1 else ("top", -1)
                look = {"ha": "center", "va": side, "fontsize": 6, "fontweight": weight, "color": palette[name]}
                axis.annotate(text, (place, value), (0, gap), textcoords="offset points", **look)
    axis.set_xlim(-0.5, max(map(len, columns.values())) - 0.5)
    axis.axhline(1, color=COLOURS[EAGER], linewidth=1, zorder=0)
    axis.set_yscale("log")
    _logarithmic(axis.yaxis)
    axis.margins(y=0.16)
    axis.tick_params(axis="x", length=0)


def _logarithmic(axis: Any) -> None:
    """Ticks at 1, 2 and 5 of each decade, as plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:g}")


def memory(results: Results) -> Iterator[tuple[str, Any]]:
    """Peak memory over S, a line for each provider, where at least two S were measured at sizes that are otherwise equal."""
    lines: dict[tuple[str, str, str], dict[str, dict[int, float]]] = {}
    for record in results.records:
        if "peak bytes" in record.metrics:
            fixed = "  ".join(f"{name} {getattr(record.shape, name)}" for name in "BTAD")
            points = lines.setdefault((record.kernel, fixed, record.direction), {}).setdefault(record.provider, {})
            points[record.shape.S] = record.metrics["peak bytes"] / 2**20
    found = {key: of for key, of in lines.items() if any(len(points) > 1 for points in of.values())}
    if not found:
        return
    figure, axes = panels(len(found), 6.5, 3.4)
    for axis, ((kernel, fixed, direction), of) in zip(axes, found.items(), strict=True):
        palette = colours(of)
        for name in ordered(of):
            line = sorted(of[name].items())
            axis.plot(*zip(*line, strict=True), "o-", label=name, color=palette[name], linewidth=2 if mine(name) else 1.3, markersize=4)
        axis.set_xscale("log")
        axis.set_yscale("log")
        _logarithmic(axis.yaxis)
        axis.set_xticks(sorted({S for points in of.values() for S in points}), minor=False)
        axis.minorticks_off()
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_xlabel("S, source positions")
        axis.set_ylabel("MiB beyond inputs and results")
        axis.set_title(f"peak memory, {kernel}, {direction}: {fixed}")
        axis.grid(axis="y", color="#eef0f4")
        last = {name: max(points.items())[1] for name, points in of.items()}
        handles, labels = axis.get_legend_handles_labels()
        order = sorted(range(len(labels)), key=lambda i: -last[labels[i]])
        axis.legend([handles[i] for i in order], [labels[i] for i in order], loc="upper left")
    yield "memory", figure


def roofline(results: Results) -> Iterator[tuple[str, Any]]:
    """Every kernel of every provider under what the machine can do; but for what measures calls alone."""
    working = [record for record in compared(results) if record.metrics.get("bytes/s") and "microseconds a step" not in record.metrics]
    for of, rates in results.ceilings.items():
        device, dtype = of.split()
        timed = [record for record in working if (record.device, record.dtype) == (device, dtype)]
        if not timed or not rates:
            continue
        figure, (axis,) = panels(1, 8, 4.6)
        kernels = list(dict.fromkeys(record.kernel for record in timed))
        markers = dict(zip(kernels, itertools.cycle(MARKERS), strict=False))
        palette = colours(record.provider for record in timed)
        intensities = []
        for record in sorted(timed, key=lambda record: mine(record.provider)):
            own, colour, rate = mine(record.provider), palette[record.provider], record.metrics["FLOP/s"] / 2
            intensities.append(rate / record.metrics["bytes/s"])
            face = "white" if record.direction == FORWARD else colour
            look = {"markersize": 6.5 if own else 4, "alpha": 0.95 if own else 0.5, "color": colour, "markerfacecolor": face}
            axis.plot(intensities[-1], rate / 1e9, markers[record.kernel], **look)
        _roofs(axis, min(intensities) / 2, max(intensities) * 2, rates)
        for name in ordered(record.provider for record in timed):
            axis.plot([], [], "s", color=palette[name], label=name)
        for kernel in kernels:
            axis.plot([], [], markers[kernel], color=GREY, markerfacecolor="white", label=kernel)
        axis.plot([], [], "o", color=GREY, label="filled: with backward")
        axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        axis.set_xlabel("multiply-adds per byte of inputs and results")
        axis.set_ylabel("G multiply-adds/s")
        axis.set_title(f"roofline, {dtype}")
        yield f"roofline-{device}-{dtype}", figure


def _roofs(axis: Any, low: float, high: float, rates: dict[str, float]) -> None:
    axis.loglog()
    _logarithmic(axis.xaxis)
    _logarithmic(axis.yaxis)
    for read, style in (("cache", ":"), ("read", "-")):
        if read in rates:
            points = sorted({low, min(max(rates["fma"] / rates[read], low), high), high})
            heights = [ceilings.attainable(point, rates, read) / 1e9 for point in points]
            place = "cache" if read == "cache" else "memory"
            axis.plot(points, heights, style, color="#1f2430", linewidth=1.2, label=f"{rates[read] / 1e9:.0f} GB/s from {place}")
    text = f"{rates['fma'] / 1e9:.0f} G multiply-adds/s"
    axis.annotate(text, (high, rates["fma"] / 1e9), (0, 4), textcoords="offset points", ha="right", fontsize=7, color=GREY)
    axis.set_xlim(low, high)


def threads(results: Results) -> Iterator[tuple[str, Any]]:
    """Speed-up over one thread: a panel for each kernel and direction, a line for each shape."""
    import matplotlib.pyplot as plt

    scaled = [record for record in results.records if "over one thread" in record.metrics]
    most = max((record.threads for record in scaled), default=1)
    titles = list(dict.fromkeys((record.kernel, record.direction) for record in scaled))
    if most == 1:
        return
    columns = min(2, len(titles))
    rows = -(-len(titles) // columns)
    figure = plt.figure(figsize=(7.5, 0.4 + 2.7 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axis in axes.flat[len(titles) :]:
        axis.set_visible(False)
    names = {record.provider for record in scaled}
    for axis, title in zip(axes.flat, titles, strict=False):
        lines: dict[tuple[str, str], dict[int, float]] = {}
        for record in scaled:
            if (record.kernel, record.direction) == title:
                lines.setdefault((record.provider, record.shape.name), {})[record.threads] = record.metrics["over one thread"]
        axis.plot([1, most], [1, most], "--", color="#c9cedb", linewidth=1, label="ideal")
        for marker, ((name, shape), points) in zip(itertools.cycle(MARKERS), lines.items(), strict=False):
            label = shape if len(names) == 1 else f"{name}, {shape}"
            axis.plot(*zip(*sorted(points.items()), strict=True), f"{marker}-", color=colours([name])[name], label=label, markersize=5)
        axis.set_xticks(sorted({record.threads for record in scaled}))
        axis.set_title(", ".join(title))
        axis.legend()
    figure.supylabel(f"times as fast as one thread ({', '.join(sorted(names))})", fontsize=8, color=GREY)
    for axis in axes[-1]:
        axis.set_xlabel("threads")
    yield "threads", figure
