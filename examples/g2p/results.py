"""Train and score every system of this folder: the tables and pictures of README.md.

    python examples/g2p/results.py                      # all of it; hours on two cores, and it goes on where it was stopped
    python examples/g2p/results.py --only general dot   # some of the systems

Each run is a `python -m onepass train` and `evaluate` of its own, on one thread, as many at a time as there are cores; their commands are
printed. What is there already is not run again.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from onepass.seq2seq.checkpoint import read_tensors
from onepass.seq2seq.cmudict import load
from onepass.seq2seq.pictures import draw_alignments, draw_error_by_length
from onepass.seq2seq.system import System
from onepass.seq2seq.training import CHECKPOINT, MODEL

CONFIGS = Path(__file__).parent / "configs"
NAMES = {
    "plain": "plain, no attention",
    "bahdanau": "Bahdanau",
    "dot": "Luong, dot",
    "general": "Luong, general",
    "concat": "Luong, concat",
    "local-p": "Luong, local-p",
}
PHRASES = {"phrases-plain": "plain, no attention", "phrases-bahdanau": "Bahdanau"}
WORDS_EACH = range(1, 9)  # of the phrases that are decoded; training has up to 4
PHRASES_SCORED = 500
LONGEST = 200  # words to choose the picture's from

console = Console(highlight=False, markup=False)


@dataclass(frozen=True)
class Job:
    """A run of one configuration, and the evaluations of it: ``(file, options)``."""

    config: str
    folder: Path
    settings: tuple[str, ...]
    evaluations: tuple[tuple[Path, tuple[str, ...]], ...]

    def commands(self) -> list[list[str]]:
        settings = [part for setting in self.settings for part in ("--set", setting)]
        resume = ["--resume"] if (self.folder / CHECKPOINT).exists() else []
        train = ["train", str(CONFIGS / f"{self.config}.toml"), "--output", str(self.folder), *settings, *resume]
        evaluate = [["evaluate", str(self.folder), "--json", str(path), "--show", "0", *options] for path, options in self.evaluations]
        missing = [command for command, (path, _) in zip(evaluate, self.evaluations, strict=True) if not path.exists()]
        return [train, *missing] if missing else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("g2p-results"), help="folder of the runs (default g2p-results)")
    parser.add_argument("--only", nargs="+", choices=[*NAMES, *PHRASES], default=[*NAMES, *PHRASES], metavar="NAME")
    parser.add_argument("--stress", choices=("dropped", "kept", "both"), default="both", help="of the phonemes (default both)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tables-only", action="store_true", help="run nothing; make tables and pictures of what is there")
    options = parser.parse_args()
    jobs = [job for name in options.only for job in jobs_of(name, options.output, options.stress, options.seed)]
    if not options.tables_only:
        run_all([job for job in jobs if job.commands()])
    write_tables(options.output, options.seed)
    draw_pictures(options.output, options.seed)


def jobs_of(name: str, output: Path, stress: str, seed: int) -> list[Job]:
    if name in PHRASES:
        folder = output / f"{name}-seed{seed}"
        scored = tuple(
            (folder / f"words{n}.json", ("--phrase-words", str(n), "--limit", str(PHRASES_SCORED), "--max-length", str(20 * n + 20)))
            for n in WORDS_EACH
        )
        return [Job(name, folder, (f"seed={seed}",), scored)]
    kinds = ("dropped", "kept") if stress == "both" else (stress,)
    folders = {kind: output / f"{name}-{kind}-seed{seed}" for kind in kinds}
    return [
        Job(name, folder, (f"seed={seed}", f"data.stress={str(kind == 'kept').lower()}"), ((folder / "test.json", ()),))
        for kind, folder in folders.items()
    ]


def run_all(jobs: list[Job]) -> None:
    """All jobs, one thread each; an error of one stops what has not begun."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with Progress(console=console) as progress, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        bar = progress.add_task("runs", total=len(jobs))

        def run(job: Job) -> None:
            job.folder.parent.mkdir(parents=True, exist_ok=True)
            for command in job.commands():
                console.print("python -m onepass", *command)
                with open(f"{job.folder}.log", "a") as log:
                    subprocess.run([sys.executable, "-m", "onepass", *command], check=True, env=environment, stdout=log, stderr=log)
            progress.advance(bar)

        for future in [pool.submit(run, job) for job in jobs]:
            try:
                future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def write_tables(output: Path, seed: int) -> None:
    """Print the table in Markdown."""
    rows = [
        "| system | parameters | stress | training, s | phoneme error rate | word error rate |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, shown in NAMES.items():
        for job in jobs_of(name, output, "both", seed):
            path = job.evaluations[0][0]
            if path.exists():
                figures = json.loads(path.read_text())
                kept = "kept" if figures["config"]["data"]["stress"] else "dropped"
                _, run = read_tensors(job.folder / CHECKPOINT)
                seconds = run["progress"]["seconds"]
                rates = f"{figures['symbol_error_rate']:.2%} | {figures['sequence_error_rate']:.2%}"
                rows.append(f"| {shown} | {figures['parameters']:,} | {kept} | {seconds:,.0f} | {rates} |")
    print("\n".join(rows))


def draw_pictures(output: Path, seed: int) -> None:
    """Alignments of one long held-out word under every attention, and errors over the length of the input."""
    folders = {shown: output / f"{name}-dropped-seed{seed}" for name, shown in NAMES.items() if name != "plain"}
    systems = {shown: System.load(folder / MODEL) for shown, folder in folders.items() if (folder / "test.json").exists()}
    if systems:
        longest = sorted(load(stress=False, seed=seed).test, key=lambda example: -len(example.source))[:LONGEST]
        decoded = {shown: system.decode([word.source for word in longest], need_weights=True) for shown, system in systems.items()}
        right = [all(rows[i][0].symbols in word.references for rows in decoded.values()) for i, word in enumerate(longest)]
        chosen = right.index(True) if any(right) else 0  # the longest word that every system gets right
        panels = []
        for shown, rows in decoded.items():
            [best] = rows[chosen]
            assert best.alignment is not None
            panels.append((shown, [*best.symbols, *(["end"] if best.ended else [])], best.alignment))
        source = longest[chosen].source
        draw_alignments(output / "alignments.png", source, panels)
        console.print(f"alignments of {''.join(source)}: {output / 'alignments.png'}")
    series: dict[str, list[tuple[float, float]]] = {}
    for name, shown in PHRASES.items():
        found = [path for path, _ in jobs_of(name, output, "dropped", seed)[0].evaluations if path.exists()]
        if found:
            series[shown] = [_point(json.loads(path.read_text())) for path in found]
    if series:
        trained_to = max(len(example.source) for example in load(stress=False, seed=seed, phrase_words=4).train)
        draw_error_by_length(output / "error-by-length.png", series, trained_to)
        console.print(f"errors over length: {output / 'error-by-length.png'}")
        for shown, points in series.items():
            console.print(shown, " ".join(f"{length:.1f}: {rate:.2%}" for length, rate in points))


def _point(figures: dict[str, Any]) -> tuple[float, float]:
    return figures["mean_source_length"], figures["symbol_error_rate"]


if __name__ == "__main__":
    main()
