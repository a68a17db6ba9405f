"""Results as pictures, each an SVG and a PNG: speed beside eager, memory over S, the roofline, scaling over threads."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from . import ceilings
from .providers import EAGER, mine
from .records import Results, caption
from .report import compared, ordered, sizes
from .workloads import BOTH, FORWARD

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
MARKERS = "osD^vPX*"
GREY = "#6b7280"


def colours(names: Sequence[str]) -> dict[str, str]:
    unknown = sorted(name for name in names if name not in COLOURS)
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
                figure.supxlabel(caption(results), fontsize=7, color=GREY)
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
    """Of every kernel: grouped bars on a logarithmic scale, how many times as fast as eager, a group for each shape."""
    timed = [record for record in compared(results) if "over eager" in record.metrics]
    for kernel in dict.fromkeys(record.kernel for record in timed):
        of_kernel = [record for record in timed if record.kernel == kernel]
        names = ordered(record.provider for record in of_kernel)
        directions = list(dict.fromkeys(record.direction for record in of_kernel))
        shapes = list(dict.fromkeys((record.shape, record.dtype) for record in of_kernel))
        figure, axes = panels(len(directions), max(6.5, 1.2 * len(shapes) + 1.5), 2.6)
        for axis, direction in zip(axes, directions, strict=True):
            found = {(r.shape, r.dtype, r.provider): r.metrics["over eager"] for r in of_kernel if r.direction == direction}
            _bars(axis, [[found.get((*shape, name)) for shape in shapes] for name in names], names)
            dtypes = {dtype for _, dtype in shapes}
            labels = [f"{shape.name}\n{sizes(shape)}" + ("" if len(dtypes) == 1 else f"\n{dtype}") for shape, dtype in shapes]
            axis.set_xticks(range(len(shapes)), labels, fontsize=7)
            axis.set_title(f"{kernel}, {direction}" + (f", {next(iter(dtypes))}" if len(dtypes) == 1 else ""))
        figure.supylabel("times as fast as eager PyTorch", fontsize=8, color=GREY)
        axes[0].legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=len(names))
        yield f"speed-{kernel.replace(' ', '-')}", figure


def _bars(axis: Any, columns: Sequence[Sequence[float | None]], names: Sequence[str]) -> None:
    """From 1, which is eager, up or down; what was not timed has no bar."""
    palette, width = colours(names), 0.86 / len(names)
    for i, (name, values) in enumerate(zip(names, columns, strict=True)):
        for group, value in enumerate(values):
            if value is None:
                continue
            place = group + (i - (len(names) - 1) / 2) * width
            label = name if group == next(g for g, v in enumerate(values) if v is not None) else None
            axis.bar(place, value - 1, width, bottom=1, color=palette[name], label=label)
            text = f"{value:.1f}" if value < 10 else f"{value:.0f}"
            axis.annotate(
                text, (place, max(value, 1)), (0, 2), textcoords="offset points", ha="center", fontsize=6.5,
                color=palette[name], fontweight="bold" if mine(name) else "normal",
            )  # fmt: skip
    axis.set_yscale("log")
    axis.axhline(1, color="#c9cedb", linewidth=0.8, zorder=0)
    axis.yaxis.set_major_formatter(_plain_numbers())
    axis.margins(y=0.12)
    axis.tick_params(axis="x", length=0)


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
        palette = colours(list(of))
        for name in ordered(of):
            line = sorted(of[name].items())
            axis.plot(*zip(*line, strict=True), "o-", label=name, color=palette[name], linewidth=2 if mine(name) else 1.3, markersize=4)
            axis.annotate(name, line[-1], (6, 0), textcoords="offset points", va="center", fontsize=8, color=palette[name])
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.xaxis.set_major_formatter(_plain_numbers())
        axis.yaxis.set_major_formatter(_plain_numbers())
        axis.set_xlabel("S, source positions")
        axis.set_ylabel("MiB beyond inputs and results")
        axis.set_title(f"peak memory, {kernel}, {direction}; {fixed}")
        axis.margins(x=0.16)
        axis.grid(axis="y", color="#eef0f4")
    yield "memory", figure


def roofline(results: Results) -> Iterator[tuple[str, Any]]:
    """Every kernel of onepass, and its best peer, under what the machine can do."""
    for of, rates in results.ceilings.items():
        device, dtype = of.split()
        timed = [r for r in compared(results) if (r.device, r.dtype) == (device, dtype) and r.metrics.get("bytes/s")]
        if not timed or not rates:
            continue
        figure, (axis,) = panels(1, 7.5, 4.6)
        kernels = list(dict.fromkeys(record.kernel for record in timed))
        palette = colours([record.provider for record in timed])
        for record in sorted(timed, key=lambda record: mine(record.provider)):
            own = mine(record.provider)
            axis.plot(
                record.metrics["FLOP/s"] / record.metrics["bytes/s"] / 2, record.metrics["FLOP/s"] / 2e9,
                MARKERS[kernels.index(record.kernel) % len(MARKERS)], color=palette[record.provider], markersize=6 if own else 4,
                alpha=0.9 if own else 0.45, markerfacecolor=palette[record.provider] if record.direction != FORWARD else "white",
            )  # fmt: skip
        low, high = axis.get_xlim()
        _roof(axis, (low, high), rates)
        for name in ordered(record.provider for record in timed):
            axis.plot([], [], "s", color=palette[name], label=name)
        for number, kernel in enumerate(kernels):
            axis.plot([], [], MARKERS[number % len(MARKERS)], color=GREY, markerfacecolor="white", label=kernel)
        if any(record.direction == BOTH for record in timed):
            axis.plot([], [], "o", color=GREY, label="filled: forward + backward")
        axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        axis.set_xlabel("multiply-adds per byte that must be moved")
        axis.set_ylabel("G multiply-adds/s")
        axis.set_title(f"roofline, {dtype}")
        yield f"roofline-{device}-{dtype}", figure


def _roof(axis: Any, span: tuple[float, float], rates: dict[str, float]) -> None:
    axis.set_xscale("log")
    axis.set_yscale("log")
    low, high = max(span[0], 1e-2), span[1] * 1.5
    for read, style in (("cache", ":"), ("read", "-")):
        if read in rates:
            ridge = rates["fma"] / rates[read]
            xs = sorted({low, min(max(ridge, low), high), high})
            axis.plot(xs, [ceilings.attainable(x, rates, read) / 1e9 for x in xs], style, color="#1f2430", linewidth=1.2)
            text = f"{rates[read] / 1e9:.0f} GB/s from {'cache' if read == 'cache' else 'memory'}"
            axis.annotate(
                text, (low, ceilings.attainable(low, rates, read) / 1e9), (2, 6), textcoords="offset points", fontsize=7, color=GREY
            )
    text = f"{rates['fma'] / 1e9:.0f} G multiply-adds/s"
    axis.annotate(text, (high, rates["fma"] / 1e9), (0, 4), textcoords="offset points", ha="right", fontsize=7, color=GREY)


def threads(results: Results) -> Iterator[tuple[str, Any]]:
    """Speed-up over one thread, a line for each kernel, direction and shape."""
    lines: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
    for record in results.records:
        if "over one thread" in record.metrics:
            of = lines.setdefault((record.kernel, record.direction), {})
            of.setdefault(f"{record.provider}, {record.shape.name}", {})[record.threads] = record.metrics["over one thread"]
    most = max((max(points) for of in lines.values() for points in of.values()), default=1)
    if most == 1:
        return
    import matplotlib.pyplot as plt

    columns = min(2, len(lines))
    figure, axes = plt.subplots(-(-len(lines) // columns), columns, figsize=(7.5, 3.2 * -(-len(lines) // columns)), layout="constrained")
    for axis, ((kernel, direction), of) in zip(_flat(axes), lines.items(), strict=False):
        axis.plot([1, most], [1, most], "--", color="#c9cedb", linewidth=1, label="as many times as threads")
        for number, (label, points) in enumerate(of.items()):
            line = sorted(points.items())
            shade = colours([label.split(",")[0]])[label.split(",")[0]]
            axis.plot(*zip(*line, strict=True), f"{MARKERS[number % len(MARKERS)]}-", color=shade, label=label, markersize=5, linewidth=1.2)
        axis.set_xticks(sorted({count for points in of.values() for count in points}))
        axis.set_xlabel("threads")
        axis.set_ylabel("times as fast as one")
        axis.set_title(f"{kernel}, {direction}")
        axis.legend()
    yield "threads", figure


def _flat(axes: Any) -> list[Any]:
    return list(axes.flat) if hasattr(axes, "flat") else [axes]


def _plain_numbers() -> Callable[[float, int], str]:
    return lambda value, _: f"{value:g}"
