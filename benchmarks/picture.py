"""The README's picture from a side-by-side run: `python benchmarks/picture.py results.json docs/speed.svg`."""

import json
import sys
from typing import Any

import matplotlib
import matplotlib.pyplot as plt

matplotlib.use("svg")
COLOURS = {"onepass": "#d1495b", "eager": "#8d99ae", "torch.compile": "#5c677d", "jax.jit": "#33415c", "SDPA": "#a3b18a"}


def panel(axis: Any, records: list[dict[str, Any]], title: str) -> None:
    """Grouped bars: how many times faster than eager each provider is, per shape."""
    names = list(records[0]["milliseconds"])
    for i, name in enumerate(names):
        speed = [r["milliseconds"]["eager"] / r["milliseconds"].get(name, float("inf")) for r in records]  # 0: not timed
        places = [group + (i - (len(names) - 1) / 2) * 0.8 / len(names) for group in range(len(records))]
        bars = axis.bar(places, speed, 0.8 / len(names), label=name, color=COLOURS[name])
        axis.bar_label(bars, [f"{value:.1f}" for value in speed], fontsize=7, padding=1)
    labels = ["B {} T {} S {}\nA {} D {}".format(*r["shape"]) for r in records]
    axis.set_xticks(range(len(records)), labels, fontsize=7)
    axis.set_title(title, fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)


def main(source: str, target: str) -> None:
    with open(source) as file:
        run = json.load(file)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    for axis, family in zip(axes, ("additive", "multiplicative"), strict=True):
        records = [r for r in run["speed"] if r["family"] == family and r["direction"] == "forward + backward"]
        panel(axis, records, f"{family} attention, forward + backward, fp32")
        axis.legend(fontsize=7, frameon=False, loc="upper left", ncols=3)
        axis.margins(y=0.3)
    axes[0].set_ylabel("times as fast as eager PyTorch", fontsize=8)
    figure.supxlabel(run["machine"], fontsize=7)
    plt.rcParams["svg.hashsalt"] = "onepass"
    figure.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    main(*sys.argv[1:])
