"""The alignment of one word as a heat map."""

from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor


def draw_alignment(path: Path, spelling: str, phonemes: list[str], alignment: Tensor) -> None:
    """Save the weights ``[T, S]`` of every letter for every phoneme as a PNG; needs no display."""
    figure = Figure(figsize=(0.42 * len(spelling) + 2.2, 0.42 * len(phonemes) + 1.4), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(alignment.cpu().numpy(), cmap="magma", vmin=0.0, vmax=1.0)
    axes.set_xticks(range(len(spelling)), list(spelling), fontsize=13)
    axes.set_yticks(range(len(phonemes)), phonemes, fontsize=11)
    axes.tick_params(length=0)
    axes.xaxis.tick_top()
    axes.set_xlabel("letters (encoder)", labelpad=8)
    axes.xaxis.set_label_position("top")
    axes.set_ylabel("phonemes (decoder)")
    figure.colorbar(image, label="attention weight", shrink=0.85)
    figure.savefig(path, dpi=150)
