"""``python -m onepass train | decode | evaluate``."""

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from onepass.seq2seq import training
from onepass.seq2seq.checkpoint import write_bytes
from onepass.seq2seq.cmudict import phrases
from onepass.seq2seq.config import Config, SearchConfig, load_config
from onepass.seq2seq.data import DataError, Example, Symbols, naming, read_pairs, split_symbols
from onepass.seq2seq.scoring import ErrorRates, error_by_length, error_rates
from onepass.seq2seq.system import Decoded, System, load_splits

notes = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)  # standard output is for results

RunPath = Annotated[Path, typer.Argument(help="Folder of a run, or its model.safetensors.", show_default=False)]
Beams = Annotated[int | None, typer.Option(min=1, help="Hypotheses in the search; 1 is greedy.", show_default="the configuration's")]
LengthPenalty = Annotated[float | None, typer.Option(min=0.0, help="Favours long hypotheses.", show_default="the configuration's")]
CoveragePenalty = Annotated[float | None, typer.Option(min=0.0, help="Against skipped source.", show_default="the configuration's")]
MaxLength = Annotated[int | None, typer.Option(min=1, help="Symbols of a hypothesis at most.", show_default="the configuration's")]


def train(
    configuration: Annotated[Path, typer.Argument(help="TOML file.", show_default=False)],
    output: Annotated[Path | None, typer.Option(help="Folder of the run.", show_default="runs/NAME of NAME.toml")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder, to the same last bit.")] = False,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Before the file: training.steps=100. Repeatable.", show_default=False)
    ] = None,
    checkpoint_every: Annotated[float, typer.Option(min=0.0, help="Seconds between checkpoints.")] = 30.0,
) -> None:
    """Train a system. Ctrl-C leaves a checkpoint; --resume goes on from it."""
    config = load_config(configuration, settings or ())
    folder = output or Path("runs") / configuration.stem
    with notes.status("reading the data"):
        splits = load_splits(config)
        run = training.Run.resume(config, splits, folder) if resume else training.Run.start(config, splits, folder)
    size = sum(parameter.numel() for parameter in run.system.model.parameters())
    notes.print(f"{len(run.pairs):,} pairs to learn from, {len(run.validation):,} for validation; {size:,} parameters; run in {folder}")
    with _training_bar(run.progress.step, config.training.steps) as report:
        outcome = run.train(checkpoint_every, report)
    progress = outcome.progress
    step, loss = progress.best
    if outcome.reason == "interrupted":
        notes.print(f"interrupted after {progress.step:,} of {config.training.steps:,} steps; the same command with --resume goes on")
        raise typer.Exit(130)
    if outcome.reason == "stopped":
        notes.print(f"stopped early: no validation after step {step:,} was better")
    notes.print(f"trained for {progress.seconds:.0f} s; best validation loss {loss:.4f} nats per symbol, at step {step:,}")
    notes.print(f"weights in {folder / training.MODEL}; now `python -m onepass evaluate {folder}`")


def decode(
    run: RunPath,
    sources: Annotated[Path | None, typer.Argument(help="File with a source per line.", show_default="standard input")] = None,
    beams: Beams = None,
    n_best: Annotated[int, typer.Option(min=1, help="Hypotheses per source.")] = 1,
    length_penalty: LengthPenalty = None,
    coverage_penalty: CoveragePenalty = None,
    max_length: MaxLength = None,
    scores: Annotated[bool, typer.Option("--scores", help="Also print each hypothesis' score.")] = False,
    alignments: Annotated[Path | None, typer.Option(help="Folder for a picture of each best alignment.", show_default=False)] = None,
) -> None:
    """Decode sources, a line each: source, tab, hypothesis, with --scores a tab and the score."""
    system = _load(run)
    search = _search(system.config, beams, length_penalty, coverage_penalty, max_length)
    if n_best > search.beams:
        raise DataError(f"--n-best {n_best} needs as many beams; got {search.beams}: add --beams {n_best}")
    if alignments is not None:
        _refuse_without_attention(system)
        alignments.mkdir(parents=True, exist_ok=True)
    lines = _source_lines(sources)
    parsed = []
    for place, line in lines:
        with naming(place):
            symbols = split_symbols(line, system.config.data.source)
            system.source.numbers(symbols)
        parsed.append(symbols)
    decoded = _decode(system, parsed, search, n_best=n_best, need_weights=alignments is not None)
    between = "" if system.config.data.target == "characters" and system.config.data.task == "pairs" else " "
    for (_, line), hypotheses in zip(lines, decoded, strict=True):
        for one in hypotheses:
            print("\t".join([line, between.join(one.symbols), *([f"{one.score:.4f}"] if scores else [])]))
    if alignments is not None:
        _draw(alignments, parsed, [hypotheses[0] for hypotheses in decoded])


def evaluate(
    run: RunPath,
    split: Annotated[str, typer.Option(help="test, validation or train.")] = "test",
    data: Annotated[Path | None, typer.Option(help="A file of pairs, instead of a split.", show_default=False)] = None,
    phrase_words: Annotated[int, typer.Option(min=1, help="Join so many words of the split to each source.")] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many.", show_default=False)] = None,
    drop_stress: Annotated[bool, typer.Option("--drop-stress", help="Score phonemes without their stress digits.")] = False,
    beams: Beams = None,
    length_penalty: LengthPenalty = None,
    coverage_penalty: CoveragePenalty = None,
    max_length: MaxLength = None,
    picture: Annotated[Path | None, typer.Option(help="PNG of the longest right alignment.", show_default=False)] = None,
    edges: Annotated[str, typer.Option(help="Also by source length, up to each of these: 5,10,15.")] = "",
    show: Annotated[int, typer.Option(min=0, help="Examples to print.")] = 10,
    output: Annotated[Path | None, typer.Option("--json", help="File for the figures.", show_default=False)] = None,
) -> None:
    """Decode held-out examples and count errors, each against the nearest reference."""
    system = _load(run)
    search = _search(system.config, beams, length_penalty, coverage_penalty, max_length)
    bounds = _edges(edges)
    for path in (output, picture):
        if path is not None:  # before the work, not after it
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                raise DataError(f"{path} is a folder; a file is wanted")
    if picture is not None:
        _refuse_without_attention(system)
    if data is not None:
        examples = read_pairs(data, system.config.data.source, system.config.data.target)
    else:
        splits = load_splits(system.config)
        if split not in ("test", "validation", "train"):
            raise DataError(f"--split must be test, validation or train; got {split}")
        examples = list(getattr(splits, split))
    if phrase_words > 1:
        examples = phrases(examples, phrase_words, max(1, len(examples) // phrase_words), seed=0)
    examples = examples[:limit]
    with naming(data or split):
        decoded = _decode(system, [example.source for example in examples], search)
    predictions = [hypotheses[0].symbols for hypotheses in decoded]
    if drop_stress:
        examples = [Example(one.source, tuple(map(_without_stress, one.references))) for one in examples]
        predictions = [_without_stress(prediction) for prediction in predictions]
    rates = error_rates(examples, predictions)
    by_length = error_by_length(examples, predictions, bounds) if bounds else []
    console = Console(highlight=False, markup=False, emoji=False)
    console.print(_rates_table([("all", rates), *by_length]))
    if show:
        console.print(_examples_table(examples[:show], predictions[:show]))
    if picture is not None:
        _draw_longest(picture, system, search, examples, predictions)
    if output is not None:
        figures = {
            "config": asdict(system.config),
            "parameters": sum(parameter.numel() for parameter in system.model.parameters()),
            "search": asdict(search),
            "examples": {"split": str(data or split), "phrase_words": phrase_words, "drop_stress": drop_stress},
            "mean_source_length": sum(len(example.source) for example in examples) / max(1, len(examples)),
            **_figures(rates),
            "by_length": {name: _figures(one) for name, one in by_length},
        }
        write_bytes(output, (json.dumps(figures, indent=2) + "\n").encode())


def _load(run: Path) -> System:
    return System.load(run / training.MODEL if run.is_dir() else run)


def _search(
    config: Config, beams: int | None, length_penalty: float | None, coverage_penalty: float | None, max_length: int | None
) -> SearchConfig:
    given = {"beams": beams, "length_penalty": length_penalty, "coverage_penalty": coverage_penalty, "max_length": max_length}
    search = replace(config.search, **{key: value for key, value in given.items() if value is not None})  # type: ignore[arg-type]
    return replace(config, search=search).search  # the whole configuration is checked


def _source_lines(path: Path | None) -> list[tuple[str, str]]:
    """Place and text of every line."""
    name = "standard input" if path is None else str(path)
    try:
        if path is None and sys.stdin is None:
            raise DataError("standard input is closed: name a file")
        content = sys.stdin.buffer.read() if path is None else path.read_bytes()
        lines = content.decode("utf-8-sig").removesuffix("\n").split("\n") if content else []
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not UTF-8 at byte {error.start + 1}; convert it to UTF-8") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise DataError(f"{name}:{number}: the source is empty")
    return [(f"{name}:{number}", line.removesuffix("\r")) for number, line in enumerate(lines, 1)]


def _decode(
    system: System, sources: Sequence[Symbols], search: SearchConfig, n_best: int = 1, need_weights: bool = False
) -> list[list[Decoded]]:
    with _bar("decoding", len(sources), "") as advance:
        decoded = system.decode(sources, search, n_best=n_best, need_weights=need_weights, progress=lambda done: advance(done, ""))
    if any(not hypotheses or math.isnan(hypotheses[0].score) for hypotheses in decoded):
        raise DataError("the model's probabilities are no numbers (NaN): its weights are spoilt")
    return decoded


def _without_stress(symbols: Symbols) -> Symbols:
    return tuple(symbol.rstrip("012") for symbol in symbols)


def _edges(text: str) -> list[int]:
    try:
        bounds = [int(part) for part in text.split(",") if part.strip()]
        error_by_length([], [], bounds)
    except ValueError:
        raise DataError(f"--edges takes ascending lengths like 5,10,15; got {text!r}") from None
    return bounds


def _figures(rates: ErrorRates) -> dict[str, float]:
    return {**asdict(rates), "symbol_error_rate": rates.symbol_error_rate, "sequence_error_rate": rates.sequence_error_rate}


def _rates_table(rows: list[tuple[str, ErrorRates]]) -> Table:
    table = Table("source length", "sequences", "wrong", "sequence error rate", "symbols", "edits", "symbol error rate")
    for name, rates in rows:
        counts = (f"{rates.sequences:,}", f"{rates.sequence_errors:,}", f"{rates.sequence_error_rate:.2%}")
        table.add_row(name, *counts, f"{rates.symbols:,}", f"{rates.symbol_errors:,}", f"{rates.symbol_error_rate:.2%}")
    return table


def _examples_table(examples: list[Example], predictions: list[Symbols]) -> Table:
    table = Table("source", "", "decoded", "references")
    for example, predicted in zip(examples, predictions, strict=True):
        apart = "" if all(len(symbol) == 1 for symbol in example.source) else " "
        verdict = "=" if predicted in example.references else "x"
        table.add_row(apart.join(example.source), verdict, " ".join(predicted), " | ".join(map(" ".join, example.references)))
    return table


def _draw(folder: Path, sources: list[Symbols], hypotheses: list[Decoded]) -> None:
    for number, (source, one) in enumerate(zip(sources, hypotheses, strict=True), 1):
        _draw_alignment(folder / f"{number:04}.png", source, one)


def _draw_longest(path: Path, system: System, search: SearchConfig, examples: list[Example], predictions: list[Symbols]) -> None:
    """The alignment of the longest source that was decoded right, of the longest of all if none was."""
    outcomes = zip(examples, predictions, strict=True)
    example, _ = max(outcomes, key=lambda outcome: (outcome[1] in outcome[0].references, len(outcome[0].source)))
    [[best]] = system.decode([example.source], search, need_weights=True)
    _draw_alignment(path, example.source, best)
    notes.print(f"alignment of {''.join(example.source)!r}: {path}")


def _draw_alignment(path: Path, source: Symbols, one: Decoded) -> None:
    from onepass.seq2seq.pictures import draw_alignments

    assert one.alignment is not None
    draw_alignments(path, source, [("", [*one.symbols, *(["end"] if one.ended else [])], one.alignment)])


def _refuse_without_attention(system: System) -> None:
    if system.config.model.decoder == "plain":
        raise DataError("this system has no attention, and so no alignment to draw")


@contextmanager
def _bar(name: str, total: int, shown: str) -> Iterator[Callable[[int, str], None]]:
    """A progress bar, set to how many are done; on a terminal alone."""
    text = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*text, TextColumn("{task.fields[shown]}"), console=notes, disable=not notes.is_terminal) as progress:
        task = progress.add_task(name, total=total, shown=shown)
        yield lambda done, shown: progress.update(task, completed=done, shown=shown)


@contextmanager
def _training_bar(begun: int, steps: int) -> Iterator[Callable[[training.Progress], None]]:
    """The bar of a run; where there is no terminal, a line per validation."""
    with _bar("training", steps, "") as advance:
        printed = begun

        def report(progress: training.Progress) -> None:
            nonlocal printed
            validation = f", validation {progress.history[-1][1]:.4f}" if progress.history else ""
            advance(progress.step, f"loss {progress.loss:.3f}{validation}")
            if not notes.is_terminal and progress.history and progress.history[-1][0] > printed:
                printed = progress.history[-1][0]
                notes.print(f"step {printed:,} of {steps:,}, {progress.seconds:.0f} s: loss {progress.loss:.3f}{validation}")

        yield report
