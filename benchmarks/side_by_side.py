"""onepass beside its peers on this machine: `python benchmarks/side_by_side.py`. A result that is wrong has no speed.

Every time is a median over rounds in which all providers take turns; ratios are medians of the rounds' own ratios, so that a
machine whose speed drifts does not bend them. `--bars` adds peak memory and scaling over threads.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.progress import track
from torch import Tensor
from workloads import SHAPES, Workload, expected, providers, workloads

import onepass
from onepass import _probe


def wrong(workload: Workload, results: dict[str, tuple[Tensor, ...]]) -> dict[str, str]:
    """Providers of which an element of the context or a gradient is off by more than twice what eager is off at most, plus one rounding
    of the sum of the magnitudes of that element's terms."""
    problems: dict[str, str] = {}
    for position, (exact, size) in enumerate(expected(workload)):
        rounding = size * torch.finfo(torch.float32).eps
        eager = float((results["eager"][position].double() - exact).abs().max())
        for name, got in results.items():
            over = float(((got[position].double() - exact).abs() - rounding).max())
            if not over <= 2 * eager:
                problems.setdefault(name, f"output {position}: off by {over:.1e} beyond a rounding, allowed {2 * eager:.1e}")
    return problems


def as_tensors(result: object) -> tuple[Tensor, ...]:
    """One result or several, of torch or jax, as tensors."""
    import numpy as np

    parts = result if isinstance(result, (tuple, list)) else (result,)
    return tuple(x.detach() if isinstance(x, Tensor) else torch.from_numpy(np.array(x)) for x in parts)


def rounds(runs: dict[str, Callable[[], object]], count: int, turn: float = 0.5) -> dict[str, list[float]]:
    """Seconds of each provider in each round, after one round of warming up.

    In its turn a provider runs once untimed, to put up with what its predecessor left (its data in the caches, its threads spinning:
    jax's do, for milliseconds), then again and again for `turn` seconds, at least once; the median counts.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(count + 1):
        for name, run in runs.items():
            run()
            times: list[float] = []
            while sum(times) < turn:
                start = time.perf_counter()
                run()
                times.append(time.perf_counter() - start)
            if i >= 1:
                seconds[name].append(statistics.median(times))
    return seconds


def compare(workload: Workload, count: int, ceiling: float) -> Iterator[dict[str, Any]]:
    """A record for forward and one for forward and backward."""
    there, _ = providers(workload.family)
    workload.make()
    forward = {name: prepare(workload, False) for name, prepare in there.items()}
    both = {name: prepare(workload, True) for name, prepare in there.items()}
    problems = wrong(workload, {name: (*as_tensors(forward[name]()), *as_tensors(both[name]())) for name in there})
    for direction, runs in (("forward", forward), ("forward + backward", both)):
        seconds = rounds({name: run for name, run in runs.items() if name not in problems}, count)
        median = {name: statistics.median(times) for name, times in seconds.items()}
        peers = [name for name in median if name != "onepass"]
        record: dict[str, Any] = {
            "family": workload.family,
            "direction": direction,
            "shape": [workload.B, workload.T, workload.S, workload.A, workload.D],
            "milliseconds": {name: 1e3 * value for name, value in median.items()},
            "wrong": problems,
        }
        if "onepass" in median:
            best = min(peers, key=median.__getitem__)
            record["best peer"] = best
            for title, peer in (("over best peer", best), ("over eager", "eager")):
                record[title] = statistics.median(b / a for a, b in zip(seconds["onepass"], seconds[peer], strict=True))
            record["elements per multiply-add"] = workload.elements / median["onepass"] / ceiling
        yield record


def show(record: dict[str, Any]) -> str:
    times = "  ".join(f"{name} {value:8.2f}" for name, value in record["milliseconds"].items())
    line = f"  {record['direction']:<19} ms: {times}"
    if "best peer" in record:
        line += f"   {record['over best peer']:6.1f}x best peer, {record['over eager']:6.1f}x eager"
        line += f", {record['elements per multiply-add']:.3f} of the multiply-adds' rate"
    return line + "".join(f"\n    {name} is WRONG, so not timed: {why}" for name, why in record["wrong"].items())


MEMORY = """
import sys, torch, onepass
sys.path.insert(0, {folder!r})
from workloads import Workload
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
shape = {shape}
w = Workload("additive", *shape).make()
small = Workload("additive", 2, 2, 2, 16, 16).make()
def run(w):
    context, _ = onepass.additive_attention(*w.inputs, backend="cpu")
    return context, torch.autograd.grad(context, w.inputs, w.tensors["upstream"])
run(small)
open("/proc/self/clear_refs", "w").write("5")
before = peak()
context, grads = run(w)
print(peak() - before - 4 * (context.numel() + sum(g.numel() for g in grads)))
"""


def memory_rows() -> Iterator[dict[str, Any]]:
    """Peak memory of additive forward + backward over inputs, outputs and gradients, against 4 BTS + B (T + S) A floats."""
    for B, T, S, A, D in SHAPES:
        script = MEMORY.format(folder=os.path.dirname(os.path.abspath(__file__)), shape=(B, T, S, A, D))
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        budget = 4 * (4 * B * T * S + B * (T + S) * A)
        yield {"shape": [B, T, S, A, D], "bytes": int(done.stdout), "over budget": int(done.stdout) / budget}


def scaling_rows(count: int) -> Iterator[dict[str, Any]]:
    """How much faster all threads are than one."""
    threads = torch.get_num_threads()
    for family in ("additive", "multiplicative"):
        there, _ = providers(family)
        for workload in workloads(family):
            workload.make()
            for direction, backward in (("forward", False), ("forward + backward", True)):
                run = there["onepass"](workload, backward)

                def on(n: int, run: Callable[[], object] = run) -> Callable[[], object]:
                    def timed() -> object:
                        torch.set_num_threads(n)
                        return run()

                    return timed

                seconds = rounds({"one": on(1), "all": on(threads)}, count)
                torch.set_num_threads(threads)
                ratio = statistics.median(a / b for a, b in zip(seconds["one"], seconds["all"], strict=True))
                yield {"family": family, "shape": str(workload), "direction": direction, "threads": threads, "speed-up": ratio}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=7, help="rounds per row (default 7)")
    parser.add_argument("--family", choices=("additive", "multiplicative"), help="one family alone")
    parser.add_argument("--bars", action="store_true", help="also peak memory and scaling over threads")
    parser.add_argument("--json", help="write all records to this file")
    options = parser.parse_args()

    threads = torch.get_num_threads()
    roof = _probe.ceilings(threads)
    machine = f"{platform.machine()}, {threads} threads, {_probe.isa()}, torch {torch.__version__}, onepass {onepass.__version__}"
    print(f"{machine}\nceilings: {roof['fma'] / 1e9:.1f} G fp32 multiply-adds/s, {roof['reciprocal'] / 1e9:.1f} G reciprocals/s, "
          f"{roof['read'] / 1e9:.1f} GB/s read from memory")  # fmt: skip
    everything: dict[str, Any] = {"machine": machine, "ceilings": roof, "speed": [], "memory": [], "scaling": []}
    families = [options.family] if options.family else ["additive", "multiplicative"]
    for family in families:
        for name, reason in providers(family)[1].items():
            print(f"without {name}: {reason}")
        for workload in track(workloads(family), description=family, transient=True):
            records = list(compare(workload, options.rounds, _probe.ceilings(threads)["fma"]))
            everything["speed"] += records
            print(f"{family}  {workload}")
            for record in records:
                print(show(record))
    if options.bars:
        print("peak memory of additive forward + backward, over 4 BTS + B (T + S) A floats")
        for row in memory_rows():
            everything["memory"].append(row)
            print(f"  {row['shape']}: {row['bytes'] / 2**20:.1f} MiB, {row['over budget']:.2f} of it")
        print(f"{threads} threads over one")
        for row in track(scaling_rows(options.rounds), description="scaling", transient=True):
            everything["scaling"].append(row)
            print(f"  {row['family']:<15} {row['shape']}  {row['direction']:<19} {row['speed-up']:.2f}x")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(everything, file, indent=1)
    return 1 if any(record["wrong"].get("onepass") for record in everything["speed"]) else 0


if __name__ == "__main__":
    sys.exit(main())
