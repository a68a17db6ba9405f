"""What can be known about the GPU kernels without a GPU: `python benchmarks/gpuless.py`. All times are predictions; none is measured.

Every kernel of the catalogue is compiled for every target, in the tile that it has there, and its machine code is taken apart. Triton's, as
they are for sm_80, are executed on the PTX machine of `tests/ptx`, which also has to find nothing wrong with them; the CUDA kernels are
executed where they are tested, `tests/test_cuda_*.py`. Exit status 1 says that some kernel failed.

`--json FILE` writes what the tables are made from:

    {"triton": version,
     "kernels": [{
       "name", "tile", "shape", "elements" (of one thread and trip), "work" (elements of the launch), "necessary" (bytes), "grid", "warps",
                                                               the launch on sm_80, which is the one that is executed
       "targets": {target: {
         "error": text                                         alone, where the kernel did not compile; else
         "tile", "warps",                                      the target's own
         "registers", "spills", "stack", "shared",             per thread, instructions (AMD: registers), bytes per thread, per block
         "occupancy": {"blocks", "warps", "limit"},            per SM; NVIDIA alone, as what follows
         "loop": {                                             where there is a hot loop
           "unrolled": trips of the source's loop in one trip, "slots": {class: per trip}, "fp32": results per thread and trip,
           "elements", "per_element": {class: slots}, "slots_per_element"},
         "prediction": {"device", "seconds": {resource: s}, "limit": resource, "elements_per_second"}}},
       "execution": {                                          without --no-execution, where the catalogue has arguments for it
         "error": text                                         alone, where it failed; else
         "findings": [text], "l1": bytes of L1 that a block was given,
         "arguments": {name: {"loaded", "stored", "fetched", "written"}},   bytes that lanes asked for; that moved past the L1
         "asked", "moved", "ratio" (moved over necessary),
         "hot_share": part of the executed arithmetic that the hot loop has if "elements" and "work" are right, never above 1}}]}
"""

import argparse
import json
import multiprocessing
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed

from gpu.compiled import Entry
from gpu.devices import DEVICES
from gpu.sass import CLASSES
from gpu.study import EXECUTION, Record, entries, prediction, run
from gpu.tables import progress, show

CATALOGUES = ("gpu.catalogue", "gpu.cuda_catalogue")
TARGETS = (*(device.target for device in DEVICES), "gfx942")
WORKERS = 2


def described(entry: Entry) -> Record:
    kept = ("name", "tile", "shape", "elements", "work", "necessary", "grid", "warps")
    return {**{name: getattr(entry, name) for name in kept}, "targets": {}}


def results(jobs: list[tuple[str, int, str]]) -> Iterator[tuple[tuple[str, int, str], Record]]:
    """As they come. New processes, not forked ones: Triton and torch have threads."""
    with ProcessPoolExecutor(min(WORKERS, len(jobs)), multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(run, job): job for job in jobs}
        for done in as_completed(waiting):
            yield waiting[done], done.result()


def study(catalogue: str, only: str | None, targets: list[str], execution: bool) -> list[Record]:
    targets = [target for target in targets if entries(catalogue, target)]
    listed = entries(catalogue)
    chosen = [number for number, entry in enumerate(listed) if only is None or only in entry.name]
    kernels = {number: described(listed[number]) for number in chosen}
    jobs = [(catalogue, number, EXECUTION) for number in chosen if execution and listed[number].arguments is not None]
    jobs += [(catalogue, number, target) for number in chosen for target in targets]
    for (_, number, target), record in progress(results(jobs), len(jobs), "kernels") if jobs else ():
        (kernels[number] if target == EXECUTION else kernels[number]["targets"])[target] = record
    for number, kernel in kernels.items():
        moved = kernel.get("execution", {}).get("moved")
        kernel["targets"] = {target: kernel["targets"][target] for target in targets}
        for target, record in kernel["targets"].items():
            found = prediction(entries(catalogue, target)[number], record, target, moved)
            if found is not None:
                record["prediction"] = found
    return list(kernels.values())


def failures(kernels: list[Record]) -> list[str]:
    """What went wrong, a line each."""
    found = []
    for kernel in kernels:
        name = f"{kernel['name']} ({kernel['tile']})"
        found += [f"{name}, {target}: {record['error']}" for target, record in kernel["targets"].items() if "error" in record]
        if kernel["elements"] is not None:
            found += [
                f"{kernel['name']} ({tile_of(kernel, record)}), {target}: no hot loop"
                for target, record in kernel["targets"].items()
                if "occupancy" in record and "loop" not in record
            ]
        execution = kernel.get("execution", {})
        found += [f"{name}, executed: {text}" for text in (*execution.get("findings", ()), execution.get("error")) if text]
        if (execution.get("hot_share") or 0) > 1.01:
            share = f"{execution['hot_share']:.2f}"
            found.append(f"{name}: the hot loop alone would be {share} of what was executed, so elements or work are off")
    return found


def tile_of(kernel: Record, record: Record) -> str:
    """A target's; sm_80's where the kernel did not compile."""
    return str(record.get("tile", kernel["tile"]))


def titled(kernel: Record, part: str | None = None) -> Iterator[tuple[str, str, Record]]:
    """Targets, their records (or that part of those that have it), and what stands in front: kernel and tile, where these are news."""
    before = None
    for target, record in kernel["targets"].items():
        if part is None or part in record:
            tile = tile_of(kernel, record)
            yield f"{kernel['name']}: {tile}" if tile != before else "", target, record if part is None else record[part]
            before = tile


def number(value: float | None) -> str:
    return "" if value is None else f"{value:,.2f}" if isinstance(value, float) else f"{value:,}"


def show_compiled(kernels: list[Record]) -> None:
    records = [record for kernel in kernels for record in kernel["targets"].values()]
    splits = [record["loop"]["per_element"] for record in records if "per_element" in record.get("loop", {})]
    classes = [name for name in CLASSES if any(split[name] for split in splits)]
    rows = []
    for kernel in kernels:
        for title, target, record in titled(kernel):
            fits, loop = record.get("occupancy"), record.get("loop", {})
            cells = [title, target, *(number(record.get(name)) for name in ("registers", "spills", "shared"))]
            cells += [f"{fits['blocks']} x {record['warps']}", fits["limit"]] if fits else ["", "FAILED" if "error" in record else ""]
            split = loop.get("per_element", {})
            rows.append([*cells, number(loop.get("slots_per_element")), *(number(split.get(name)) for name in classes)])
    columns = ["kernel", "target", "registers", "spills", "shared", "blocks x warps", "limited by", "slots", *classes]
    show("Compiled; issue slots per element of the hot loop, in all and by class", columns, rows)


def show_predictions(kernels: list[Record]) -> None:
    rows = []
    for kernel in kernels:
        shape = kernel["shape"]
        for title, _, found in titled(kernel, "prediction"):
            micro = {name: f"{1e6 * seconds:.3g}" for name, seconds in found["seconds"].items()}
            rate = found["elements_per_second"]
            cells = [title, shape, found["device"], micro[found["limit"]], found["limit"]]
            cells += [micro.get(name, "") for name in ("issue", "mufu", "fp32", "bytes")]
            rows.append([*cells, "" if rate is None else number(round(rate / 1e9))])
            shape = ""
    columns = ["kernel", "launch", "device", "prediction", "limited by", "issue", "mufu", "fp32", "bytes", "full device"]
    title = "Prediction, not measured: microseconds at least, by published rates; with all SMs busy, G elements per second at most"
    show(title, columns, rows)


def show_traffic(kernels: list[Record]) -> None:
    rows = []
    for kernel in kernels:
        execution = kernel.get("execution", {})
        title, shape = f"{kernel['name']}: {kernel['tile']}", kernel["shape"]
        for name, bytes_ in execution.get("arguments", {}).items():
            rows.append([title, shape, name, *(number(bytes_[key]) for key in ("loaded", "fetched", "stored", "written")), "", "", ""])
            title = shape = ""
        if "ratio" in execution:
            asked, moved = number(execution["asked"]), number(execution["moved"])
            ratio, share = number(execution["ratio"]), number(execution["hot_share"])
            rows.append(["", "", "both ways", asked, moved, "", "", number(kernel["necessary"]), ratio, share])
    columns = ["kernel", "launch", "argument", "loaded", "past L1", "stored", "past L1", "necessary", "ratio", "in hot loop"]
    title = "Executed as compiled for sm_80: bytes of global memory, moved over necessary, part of the arithmetic in the hot loop"
    show(title, columns, rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", help="write everything to this file")
    parser.add_argument("--only", help="kernels with this in their name alone")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="compile for these (default: all)")
    parser.add_argument("--no-execution", action="store_true", help="do not run kernels on the PTX machine")
    parser.add_argument(
        "--catalogue", nargs="+", default=CATALOGUES, help=f"modules whose entries() list the kernels (default {' '.join(CATALOGUES)})"
    )
    options = parser.parse_args()

    import triton

    execution = not options.no_execution
    kernels = [kernel for name in options.catalogue for kernel in study(name, options.only, options.targets, execution)]
    show_compiled(kernels)
    show_predictions(kernels)
    if not options.no_execution:
        show_traffic(kernels)
    problems = failures(kernels)
    print(*(f"FAILED  {problem}" for problem in problems), sep="\n")
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"triton": triton.__version__, "kernels": kernels}, file, indent=1)
    return 1 if problems or not kernels else 0


if __name__ == "__main__":
    sys.exit(main())
