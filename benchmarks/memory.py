"""Peak memory, measured in a process of its own, where nothing was before: beyond inputs, results, gradients and what a compiler takes."""

import gc
import json
import os
import pathlib
import re
import subprocess
import sys

import torch

from .providers import PROVIDERS, UnavailableError
from .workloads import FAMILIES, Run, Shape, Workload


def peak(provider: str, workload: Workload, direction: str) -> int:
    """In bytes. Raises ``UnavailableError``, or ``RuntimeError`` where the process fails."""
    dtype = str(workload.dtype).removeprefix("torch.")
    question = json.dumps([provider, direction, workload.family, workload.shape, dtype, workload.device])
    one_arena = {**os.environ, "MALLOC_ARENA_MAX": "1"}  # what threads happen to share out is not the operation's
    command = [sys.executable, "-m", "onepass.benchmarks.memory", question]
    done = subprocess.run(command, capture_output=True, text=True, env=one_arena, check=False)
    answer, _, reason = (done.stdout.splitlines() or [""])[-1].partition(" ")
    if answer == "unavailable":
        raise UnavailableError(reason)
    if done.returncode != 0 or answer != "peak":
        raise RuntimeError(f"exit status {done.returncode}: {(done.stderr.strip().splitlines() or ['no word'])[-1]}")
    return int(reason)


def beyond_results(run: Run, device: str) -> int:
    """How far memory rises during a call, less what the call returns."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = int(torch.cuda.memory_allocated())
        kept = run()
        torch.cuda.synchronize()
        peak = int(torch.cuda.max_memory_allocated())
    else:
        _give_back()
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is resident now
        before = _status("VmRSS")
        kept = run()
        peak = _status("VmHWM")
    return peak - before - sum(int(x.nbytes) for x in (kept if isinstance(kept, (tuple, list)) else (kept,)))


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def _give_back() -> None:
    """Else what was freed before would hide some of what is taken next."""
    import ctypes

    ctypes.CDLL(None).malloc_trim(0)


def main(question: str) -> None:
    from . import catalogue

    assert catalogue
    name, direction, kind, sizes, dtype, device = json.loads(question)
    family = FAMILIES[kind]
    (provider,) = (p for p in PROVIDERS if p.name == name and kind in p.families)

    try:
        provider.prepare(Workload(kind, family.small, getattr(torch, dtype), device).make(), direction)()  # threads, allocator, code pages
        workload = Workload(kind, Shape(*sizes), getattr(torch, dtype), device).make()
        run = provider.prepare(workload, direction)
    except UnavailableError as reason:
        print("unavailable", reason)
        return
    if provider.compiles:
        run()
    print("peak", beyond_results(run, device) - family.outputs_apart(workload, direction))


if __name__ == "__main__":
    main(sys.argv[1])
