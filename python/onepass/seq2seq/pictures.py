"""Pictures: alignments as heat maps, error rates over the length of the source. They need matplotlib and no display."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from onepass.seq2seq.data import DataError


def draw_alignments(path: Path, source: Sequence[str], panels: Sequence[tuple[str, Sequence[str], Tensor]]) -> None:
    """Save the weights ``[T, S]`` of each panel ``(title, target symbols, weights)`` as a PNG, three panels to a row."""
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    height = 0.26 * max(len(symbols) for _, symbols, _ in panels) + 0.9
    figure = _figure((0.26 * len(source) + 0.8) * columns + 1.0, height * rows)
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for axes, (title, symbols, weights) in zip(grid, panels, strict=False):
        image = axes.imshow(weights.cpu().numpy(), cmap="magma", vmin=0.0, vmax=1.0)
        axes.set_anchor("N")
        axes.set_xticks(range(len(source)), _plain(source), fontsize=10)
        axes.set_yticks(range(len(symbols)), _plain(symbols), fontsize=8)
        axes.tick_params(length=0)
        axes.xaxis.tick_top()
        axes.set_title(title, fontsize=11, pad=6)
    figure.colorbar(image, ax=list(grid), label="attention weight", fraction=0.02, pad=0.01)
    figure.savefig(path, dpi=110, format="png")


def draw_error_by_length(path: Path, series: Mapping[str, Sequence[tuple[float, float]]], trained_to: float) -> None:
    """Save lines of ``(mean source length, symbol error rate)``; ``trained_to``: the longest source seen in training."""
    figure = _figure(7.2, 4.2)
    axes = figure.subplots()
    for name, points in series.items():
        axes.plot([length for length, _ in points], [100.0 * rate for _, rate in points], marker="o", label=name)
    axes.axvline(trained_to, color="grey", linestyle="--", linewidth=1.0)
    axes.annotate("longest trained on", (trained_to, axes.get_ylim()[1]), xytext=(4, -12), textcoords="offset points", color="grey")
    axes.set_xlabel("source symbols")
    axes.set_ylabel("symbol error rate, %")
    axes.set_ylim(bottom=0.0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130, format="png")


def _plain(symbols: Sequence[str]) -> list[str]:
    """Symbols as labels: a dollar sign would begin a formula."""
    return [symbol.replace("$", r"\$") for symbol in symbols]


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as missing:
        raise DataError("pictures need matplotlib: `pip install matplotlib`") from missing
    return Figure(figsize=(width, height), layout="constrained")
