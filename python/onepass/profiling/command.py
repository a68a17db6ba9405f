"""``python -m onepass profile``."""

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from onepass._info import probe
from onepass._version import __version__
from onepass.profiling import gpu
from onepass.profiling.events import KERNELS
from onepass.profiling.measure import Measured, measure
from onepass.profiling.report import figures, rows, table
from onepass.profiling.targets import WORKLOADS, Run, find
from onepass.seq2seq.checkpoint import write_bytes
from onepass.seq2seq.data import DataError

notes = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)


def profile(
    target: Annotated[
        str | None, typer.Argument(help="A workload, or module:function of your own; left out: list the workloads.", show_default=False)
    ] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Calls to measure.")] = 5,
    warmup: Annotated[int, typer.Option(min=0, help="Calls before that.")] = 2,
    device: Annotated[str, typer.Option(help="Where workloads run.", show_default="cuda where there is one, else cpu")] = "",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch.", show_default="torch's own choice")] = None,
    trace: Annotated[Path | None, typer.Option(help="File for a Chrome trace: .json or .json.gz.", show_default=False)] = None,
    output: Annotated[Path | None, typer.Option("--json", help="File for the figures.", show_default=False)] = None,
    bare: Annotated[bool, typer.Option("--bare", help="Warm up and call once, for another profiler; NVTX ranges on a GPU.")] = False,
) -> None:
    """Where the time of a workload or of your own function goes, and how far onepass's kernels are from what the machine allows."""
    console = Console(highlight=False, markup=False, emoji=False)
    console.width = console.width if console.is_terminal else max(console.width, 120)
    if target is None:
        width = max(map(len, WORKLOADS))
        console.print("\n".join(f"{name:<{width}}  {workload.title}" for name, workload in WORKLOADS.items()), soft_wrap=True)
        return
    _check_files(trace, output)
    place = _device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    run = find(target, place)
    if bare:
        _call_once(run, warmup, place)
        return
    with _bar(warmup + 2 * repeat) as (advance, more):
        measured = measure(run, repeat, warmup, trace, advance)
        more(sum(1 for work in measured.profile.works if work.of_sizes))
        lines = rows(measured, torch.get_num_threads(), advance)
    where = _where(place if measured.profile.on_gpu else torch.device("cpu"))
    console.print(f"{target}: {1e3 * measured.seconds:.2f} ms a call, {where}")
    console.print(f"under the profiler {1e3 * measured.profiled_seconds:.2f} ms, in which (means of {measured.repeat}):\n")
    console.print(table(lines))
    if not any(row.kind == KERNELS for row in lines):
        notes.print("no kernel of onepass ran: `python -m onepass info` says which backends there are")
    if place.type == "cuda" and not measured.profile.on_gpu:
        notes.print("no kernel of the GPU was seen: either none ran, or the profiler may not read the GPU's counters")
    if measured.profile.on_gpu:
        _print_gpu(console, target, place, measured)
    if trace is not None:
        notes.print(f"trace in {trace}: open it in https://ui.perfetto.dev or chrome://tracing")
    if output is not None:
        made = {"target": target, "onepass": __version__, "torch": torch.__version__, "where": where}
        write_bytes(output, (json.dumps(made | figures(lines, measured), indent=2) + "\n").encode())


def _check_files(trace: Path | None, output: Path | None) -> None:
    """Before the work, not after it."""
    if trace is not None and not trace.name.endswith((".json", ".json.gz")):
        raise DataError(f"--trace takes a file .json or .json.gz; got {trace}")
    for path in (trace, output):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                raise DataError(f"{path} is a folder; a file is wanted")


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as problem:
        raise DataError(f"--device: {str(problem).splitlines()[0]}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DataError("--device cuda: torch sees no GPU")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # which is waited for, and whose ceilings are shown
    return device


def _call_once(run: Run, warmup: int, device: torch.device) -> None:
    """Of the calls the last has NVTX ranges, and is the one that a profiler sees which starts when it is told to."""
    for _ in range(warmup):
        run()
    with ExitStack() as watched:
        if device.type == "cuda":
            watched.enter_context(torch.cuda.profiler.profile())
            watched.enter_context(torch.autograd.profiler.emit_nvtx())  # type: ignore[no-untyped-call]
        run()


def _where(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads, found = torch.get_num_threads(), probe()
    return f"{threads} thread{'' if threads == 1 else 's'} of the cpu" + (f", {found.isa()}" if found is not None else "")


def _print_gpu(console: Console, target: str, device: torch.device, measured: Measured) -> None:
    with tempfile.TemporaryDirectory() as folder:
        console.print(gpu.proton_tree(target, str(device), Path(folder)))
    if measured.profile.kernels:
        command = gpu.ncu(measured.profile.kernels, gpu.bare_command(target, str(device)))
        console.print(f"\nto look into the kernels:\n  {command}", soft_wrap=True)


@contextmanager
def _bar(total: int) -> Iterator[tuple[Callable[[], None], Callable[[int], None]]]:
    """A progress bar on a terminal alone, gone when it is full: one step more done, and so many steps more to do. It is drawn between
    calls only, so that it takes no part in them."""
    text = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*text, console=notes, disable=not notes.is_terminal, transient=True, auto_refresh=False) as progress:
        task = progress.add_task("profiling", total=total)

        def advance() -> None:
            progress.update(task, advance=1, refresh=True)

        yield advance, lambda more: progress.update(task, total=total + more, refresh=True)
