"""One query at a time over one memory, beside its peers: `python benchmarks/steps.py`. A result that is wrong has no speed.

Five tables: training loops, greedy decoding, beams, peak memory and the overhead of a step. Times are medians over rounds in which all
providers take turns, ratios medians of the rounds' own ratios; the bar of a column stands in its title.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from rich.progress import track
from side_by_side import rounds
from torch import Tensor
from workloads import Attention, Workload, eager_additive, eager_multiplicative, expected, sdpa

import onepass
from onepass import _probe

Attend = Callable[[Tensor], Tensor]  # a step's query to its context
Provider = Callable[..., Attend]  # keys, values and v to that
Row = dict[str, Any]

TRAIN = ((64, 50, 50, 512, 1024), (32, 100, 200, 256, 512), (16, 200, 800, 128, 512))  # B, T, S, A, D
SHAPES = {
    "train": TRAIN,
    "decode": ((64, 1, 50, 512, 1024), (32, 1, 200, 256, 512), (16, 1, 800, 128, 512), (1, 1, 400, 512, 512), (256, 1, 400, 512, 512)),
    "beams": ((32, 5, 200, 256, 512), (8, 5, 100, 512, 1024)),  # T queries at once
    "memory": TRAIN,
    "overhead": ((1, 1, 1, 16, 16),),
}
TITLES = {
    "train": "training loop: T steps, then one backward to queries, keys, values and v; milliseconds of the whole",
    "decode": "greedy decoding: one step without gradients; milliseconds. limit: what takes longer, reading keys and values once from\n"
    "where they lie or the multiply-adds (additive: 4 BSA + BSD, multiplicative: BSA + BSD)",
    "beams": "beams: T queries over one memory, or one query over each of T copies of it; milliseconds of a step",
    "memory": "peak memory of the training loop. extra: growth of the resident set at its peak, less the T contexts and all gradients;\n"
    "the inputs (queries, keys, values, v, upstream) are there before and not in it. budget: 1.3 (memory + T B (A + 2S + D)) floats,\n"
    "memory = B S (2A + D): keys, exponentials and values (multiplicative: B S (A + D)). The budget thus has keys and values in it;\n"
    "the last column adds them to extra too",
    "overhead": "overhead: microseconds of one attend on one thread; eager's step is its plain formula",
}
PROVIDERS = ("onepass", "eager", "torch.compile", "SDPA")


def workloads(section: str, family: str) -> list[Workload]:
    """Those of a section; in multiplicative training values are as wide as keys."""
    narrow = family == "multiplicative" and SHAPES[section] is TRAIN
    return [Workload(family, B, T, S, A, A if narrow else D) for B, T, S, A, D in SHAPES[section]]


def providers(family: str) -> dict[str, Provider]:
    """Who takes a step, and over what: `onepass` makes a memory, the others keep the tensors and see one query at a time."""
    memory = onepass.additive_memory if family == "additive" else onepass.multiplicative_memory
    eager = eager_additive if family == "additive" else eager_multiplicative

    def one_query(attention: Attention) -> Attention:
        return lambda query, *tensors: attention(query.unsqueeze(1), *tensors).squeeze(1)

    def plain(step: Attention) -> Provider:
        return lambda *tensors: lambda query: step(query, *tensors)

    def onepass_provider(*tensors: Tensor) -> Attend:
        over = memory(*tensors, backend="cpu")
        return lambda query: over.attend(query)[0]

    there = {
        "onepass": onepass_provider,
        "eager": plain(one_query(eager)),
        "torch.compile": plain(torch.compile(one_query(eager), dynamic=False)),
    }
    return there if family == "additive" else {**there, "SDPA": plain(one_query(sdpa))}


def training(provider: Provider, workload: Workload) -> Callable[[], tuple[list[Tensor], tuple[Tensor, ...]]]:
    """The loop, memory included: the contexts of all steps, and the gradients of all queries, then of keys, values and v."""
    queries = [q.contiguous().requires_grad_() for q in workload.tensors["query"].detach().unbind(1)]
    upstream = [u.contiguous() for u in workload.tensors["upstream"].unbind(1)]
    tensors = workload.inputs[1:]

    def run() -> tuple[list[Tensor], tuple[Tensor, ...]]:
        attend = provider(*tensors)
        contexts = [attend(query) for query in queries]
        return contexts, torch.autograd.grad(contexts, (*queries, *tensors), upstream)

    return run


def wrong(exact: Sequence[tuple[Tensor, Tensor]], results: dict[str, Sequence[Tensor]]) -> dict[str, str]:
    """Who is off by more than twice eager's largest error plus a rounding of the sum of the element's terms, as in side_by_side."""
    problems: dict[str, str] = {}
    for position, (value, size) in enumerate(exact):
        off = {name: (got[position].detach().double() - value).abs() for name, got in results.items()}
        allowed = 2 * float(off["eager"].max())
        for name, error in off.items():
            over = float((error - size * torch.finfo(torch.float32).eps).max())
            if not over <= allowed:
                problems.setdefault(name, f"output {position}: off by {over:.1e} beyond a rounding, allowed {allowed:.1e}")
    return problems


def ratio(seconds: dict[str, list[float]], name: str, over: str) -> float:
    return statistics.median(b / a for a, b in zip(seconds[over], seconds[name], strict=True))


def times(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {name: 1e3 * statistics.median(of) for name, of in seconds.items()}


def best_peer(seconds: dict[str, list[float]]) -> str:
    return min((name for name in seconds if name != "onepass"), key=lambda name: statistics.median(seconds[name]))


def train(workload: Workload, count: int) -> Row:
    runs = {name: training(provider, workload) for name, provider in providers(workload.family).items()}
    results: dict[str, Sequence[Tensor]] = {}
    for name, run in runs.items():
        contexts, gradients = run()
        results[name] = (torch.stack(contexts, 1), torch.stack(gradients[: workload.T], 1), *gradients[workload.T :])
    problems = wrong(expected(workload), results)
    seconds = rounds({name: run for name, run in runs.items() if name not in problems}, count)
    row: Row = {**times(seconds), "wrong": problems}
    if "onepass" in seconds:
        row["over best peer (bar 4)"] = ratio(seconds, best_peer(seconds), "onepass")
        row["over eager (bar 8)"] = ratio(seconds, "eager", "onepass")
    return row


def decode(workload: Workload, count: int) -> Row:
    exact, query = expected(workload)[:1], workload.tensors["query"].detach()[:, 0].contiguous()
    B, S, A, D = workload.B, workload.S, workload.A, workload.D
    size, slots = 4 * B * S * (A + D), B * S * ((4 if workload.family == "additive" else 1) * A + D)
    with torch.no_grad():
        there = {name: provider(*workload.inputs[1:]) for name, provider in providers(workload.family).items()}
        problems = wrong(exact, {name: (attend(query).unsqueeze(1),) for name, attend in there.items()})
        there = {name: attend for name, attend in there.items() if name not in problems}
        buffer = torch.ones(size // 4)
        seconds: dict[str, list[float]] = {name: [] for name in (*there, "read", "arithmetic", "limit")}
        for _ in range(count):  # the limit is measured anew in every round
            new = rounds({**{name: partial(attend, query) for name, attend in there.items()}, "sum": buffer.sum}, 1)
            roof = _probe.ceilings(torch.get_num_threads(), bytes=size)
            new["read"] = [min(size / roof["read"], *new.pop("sum"))]
            new["arithmetic"] = [slots / roof["fma"]]
            new["limit"] = max(new["read"], new["arithmetic"])
            for name, times_of in new.items():
                seconds[name] += times_of
    row: Row = {"MiB": size / 2**20, **times(seconds), "wrong": problems}
    if "onepass" in there:
        row["of the limit (bar 0.8)"] = ratio(seconds, "limit", "onepass")
        row["over best peer"] = ratio(seconds, best_peer({name: seconds[name] for name in there}), "onepass")
    return row


def beams(workload: Workload, count: int) -> Row:
    exact, query = expected(workload)[:1], workload.tensors["query"].detach()
    B, K, A = query.shape
    make, (keys, values, *v) = providers(workload.family), workload.inputs[1:]
    with torch.no_grad():
        together = partial(make["onepass"](keys, values, *v), query)
        copies = (keys.repeat_interleave(K, 0), values.repeat_interleave(K, 0), *v)
        apart = {name: partial(make[name](*copies), query.reshape(B * K, A)) for name in ("onepass", "eager")}
        results = {name: (run().view(B, K, -1),) for name, run in apart.items()}
        problems = wrong(exact, {"one memory": (together(),), "copies": results["onepass"], "eager": results["eager"]})
        if problems:
            return {"wrong": problems}
        seconds = rounds({"one memory": together, "copies": apart["onepass"]}, count)
    return {**times(seconds), "over copies (bar 2.5)": ratio(seconds, "copies", "one memory"), "wrong": {}}


PEAK = """
import ctypes, sys
sys.path.insert(0, {folder!r})
from steps import Workload, providers, training
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
provider = providers({family!r})["onepass"]
training(provider, Workload({family!r}, 2, 2, 2, 16, 16).make())()
run = training(provider, Workload({family!r}, *{shape}).make())
ctypes.CDLL(None).malloc_trim(0)  # else what making the inputs freed would hide some of the extra
open("/proc/self/clear_refs", "w").write("5")
before = peak()
contexts, gradients = run()
print(peak() - before - 4 * sum(x.numel() for x in (*contexts, *gradients)))
"""


def memory(workload: Workload, count: int) -> Row:
    """In a process of its own, once: resident memory does not drift."""
    B, T, S, A, D = shape = (workload.B, workload.T, workload.S, workload.A, workload.D)
    script = PEAK.format(folder=os.path.dirname(os.path.abspath(__file__)), family=workload.family, shape=shape)
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "ONEPASS_KEEP_MIB": "256"}
    extra = int(subprocess.run([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout)
    held = B * S * ((2 if workload.family == "additive" else 1) * A + D)
    budget = round(1.3 * 4 * (held + T * B * (A + 2 * S + D)))
    of = {"of it (bar 1)": extra / budget, "of it with keys and values": (extra + 4 * B * S * (A + D)) / budget}
    return {"extra bytes": extra, "budget bytes": budget, **of}


def overhead(workload: Workload, count: int, steps: int = 1000) -> Row:
    make, tensors, query = providers(workload.family), workload.inputs[1:], workload.tensors["query"].detach()[:, 0].requires_grad_()

    def run(provider: Provider, gradients: bool) -> None:
        with torch.set_grad_enabled(gradients):
            attend = provider(*tensors)
            for _ in range(steps):
                attend(query)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    titles = {"": False, " with gradients": True}
    seconds = rounds({name + title: partial(run, make[name], on) for name in ("onepass", "eager") for title, on in titles.items()}, count)
    torch.set_num_threads(threads)
    microseconds = {name: 1e3 * value / steps for name, value in times(seconds).items()}
    return {"onepass (bar 15)": microseconds.pop("onepass"), **microseconds}


def show(rows: list[Row]) -> str:
    """A plain table, and below it who was not timed and why."""

    def text(value: object) -> str:
        return (f"{value:.3f}" if value < 10 else f"{value:.1f}") if isinstance(value, float) else str(value)

    titles = list(dict.fromkeys(title for row in rows for title in row if title != "wrong"))
    titles.sort(key=lambda title: (title not in ("family", "shape"), title.split(" (")[0] not in PROVIDERS))  # stable
    lines = [titles, *([text(row.get(title, "")) for title in titles] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = ["  " + "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    notes = [f"  {row['family']}  {row['shape']}: {name} is WRONG: {why}" for row in rows for name, why in row.get("wrong", {}).items()]
    return "\n".join(table + notes)


def main() -> int:
    sections: dict[str, Callable[[Workload, int], Row]]
    sections = {"train": train, "decode": decode, "beams": beams, "memory": memory, "overhead": overhead}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5, help="rounds per row (default 5)")
    parser.add_argument("--family", choices=("additive", "multiplicative"), help="one family alone")
    parser.add_argument("--only", choices=tuple(sections), help="one table alone")
    parser.add_argument("--json", help="write all rows to this file")
    options = parser.parse_args()

    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, {_probe.isa()}, torch {torch.__version__}"
    print(f"{machine}, onepass {onepass.__version__}; float32")
    everything: dict[str, Any] = {"machine": machine, "onepass": onepass.__version__}
    families = (options.family,) if options.family else ("additive", "multiplicative")
    for section in (options.only,) if options.only else tuple(sections):
        rows: list[Row] = []
        for workload in track([w for family in families for w in workloads(section, family)], description=section, transient=True):
            torch.compiler.reset()  # every shape compiled for itself
            row = sections[section](workload.make() if section != "memory" else workload, options.rounds)
            workload.tensors.clear()
            rows.append({"family": workload.family, "shape": str(workload), **row})
        everything[section] = rows
        print(f"\n{TITLES[section]}\n{show(rows)}", flush=True)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(everything, file, indent=1)
    mine = ("onepass", "one memory", "copies")
    found = (name for rows in everything.values() if isinstance(rows, list) for row in rows for name in row.get("wrong", {}))
    return 1 if any(name in mine for name in found) else 0


if __name__ == "__main__":
    sys.exit(main())
