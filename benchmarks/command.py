"""``python -m onepass bench``."""

import importlib.util
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from .plan import Job
    from .records import Results
    from .study import Study

TURN, QUICK_TURN = 0.2, 0.05  # seconds


def bench(
    quick: Annotated[
        bool, typer.Option("--quick", help="Under a minute: functions alone, smallest shapes, nothing that compiles.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    family: Annotated[list[str] | None, typer.Option(help="Repeatable.", show_default="all")] = None,
    shapes: Annotated[
        list[str] | None, typer.Option(help="A name, as NMT, or sizes BxTxSxAxD. Repeatable.", show_default="all named ones")
    ] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Repeatable.", show_default="float32")] = None,
    provider: Annotated[list[str] | None, typer.Option(help="Repeatable; onepass is all of its backends.", show_default="all")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="In each, every provider has a turn.", show_default="5; quick 3")] = None,
    bars: Annotated[bool, typer.Option("--bars", help="What the README's tables show: its shapes, memory, threads.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write the results.", show_default=False)] = None,
    html: Annotated[Path | None, typer.Option(help="Write a report that needs no other file.", show_default=False)] = None,
    pictures: Annotated[Path | None, typer.Option(help="Draw into this folder.", show_default=False)] = None,
    load: Annotated[Path | None, typer.Option(help="Show these results; measure nothing.", show_default=False)] = None,
    compare: Annotated[tuple[Path, Path] | None, typer.Option(help="Two files of results: what got slower?", show_default=False)] = None,
) -> None:
    """Measure onepass beside its peers. A result that is wrong has no speed. Ctrl-C or SIGTERM shows what was measured until then.

    Status 1: a result of onepass is wrong, or, with --compare, something of it got slower by more than the noise."""
    if (html or pictures) and importlib.util.find_spec("matplotlib") is None:
        raise typer.BadParameter("--html and --pictures need `pip install matplotlib`")
    check_files(json, html, pictures)
    from rich.console import Console

    from . import catalogue, report
    from .comparison import compare as compared
    from .plan import jobs
    from .providers import mine, named
    from .records import FAILED, WRONG, Results
    from .records import load as loaded
    from .study import Study

    assert catalogue
    console = Console()
    if compare:
        with usage_errors():
            comparison = compared(*map(loaded, compare))
        report.show_comparison(comparison, console)
        raise typer.Exit(1 if comparison.slower() else 0)
    complete = True
    if load:
        with usage_errors():
            results = loaded(load)
    else:
        with usage_errors():
            check_device(device)
            study = Study(named(provider, compiling=not quick), rounds or (3 if quick else 5), QUICK_TURN if quick else TURN)
            todo = jobs(study, device, family, shapes, dtype or ["float32"], quick, bars)
        results = Results.here(device)
        complete = run(todo, study, results, device, dtype or ["float32"])
    report.show(results, console)
    write(results, json, html, pictures)
    if not complete:
        console.print("interrupted: the above is what was measured until then", style="bold yellow")
        raise typer.Exit(130)
    raise typer.Exit(any(mine(record.provider) and record.status in (WRONG, FAILED) for record in results.records))


def check_files(json: Path | None, html: Path | None, pictures: Path | None) -> None:
    """Before the work, not after it."""
    for path in filter(None, (json, html)):
        if path.is_dir():
            raise typer.BadParameter(f"{path} is a folder; a file is wanted")
        if not path.absolute().parent.is_dir():
            raise typer.BadParameter(f"there is no folder {path.parent}")
    if pictures and any(place.exists() and not place.is_dir() for place in (pictures, *pictures.parents)):
        raise typer.BadParameter(f"{pictures} is no folder")


@contextmanager
def usage_errors() -> Iterator[None]:
    try:
        yield
    except ValueError as problem:
        raise typer.BadParameter(str(problem)) from problem


def check_device(device: str) -> None:
    import torch

    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device is cpu or cuda, not {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        why = "was built without CUDA" if torch.version.cuda is None else "sees no GPU"
        raise ValueError(f"--device cuda needs a GPU: torch {torch.__version__} {why}")


def run(todo: "Sequence[Job]", study: "Study", results: "Results", device: str, dtypes: Sequence[str]) -> bool:
    """Adds to the results; False if it was interrupted."""
    import torch

    from . import ceilings
    from .progress import Bar

    with Bar(len(todo), sum(job.steps for job in todo), "ceilings of the machine") as bar:
        study.after_round = bar.step
        study.ceilings = results.ceilings
        try:
            for name in dtypes:
                results.ceilings[f"{device} {name}"] = ceilings.measure(device, getattr(torch, name))
            done = 0
            for job in todo:
                bar.begin(job.title, done)
                for record in job.records():
                    results.add(record)
                done += job.steps
        except KeyboardInterrupt:
            return False
    return True


def write(results: "Results", json: Path | None, html: Path | None, pictures: Path | None) -> None:
    from .page import page
    from .pictures import draw

    if json:
        results.save(json)
    if html or pictures:
        with tempfile.TemporaryDirectory() as folder:
            drawn = draw(results, pictures or Path(folder))
            if html:
                html.write_text(page(results, drawn))
