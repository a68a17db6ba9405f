"""Run as a program: prints the peak of memory that a call takes beyond its inputs, outputs and gradients, in bytes.

``python measure.py BACKEND FAMILY DIMS... NEED_WEIGHTS TRAIN``
"""

import ctypes
import gc
import pathlib
import re
import sys

import torch
from cases import Case, Dims, build, call, results


def memory(field: str) -> int:
    """A field of ``/proc/self/status``, in bytes."""
    found = re.search(rf"{field}:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def peak_extra(case: Case, backend: str, train: bool) -> int:
    """How far the resident set rises during a call, less what the call returns."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is resident now
    before = memory("VmRSS")
    if train:
        kept = list(results(case, backend).values())
    else:
        with torch.no_grad():
            kept = [result for result in call(case, backend, need_weights=case.grad_weights is not None) if result is not None]
    return memory("VmHWM") - before - sum(result.numel() * result.element_size() for result in kept)


def main(backend: str, family: str, *numbers: str) -> None:
    *sizes, need_weights, train = (int(number) for number in numbers)
    small = build(family, Dims(2, 3, 5, sizes[3], sizes[4]))
    case = build(family, Dims(*sizes))
    if not need_weights:
        small, case = small.replace(grad_weights=None), case.replace(grad_weights=None)
    results(small, backend)  # threads, allocator and code pages
    print(peak_extra(case, backend, bool(train)))


if __name__ == "__main__":
    main(*sys.argv[1:])
