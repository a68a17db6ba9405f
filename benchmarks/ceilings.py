"""What the machine can do at most, measured when a benchmark starts: multiply-adds and bytes per second, by the names that follow.

``fma``, multiply-adds of the dtype; ``read``, bytes from memory; on a CPU also ``cache``, bytes from a buffer that fits into L2, and
``reciprocal``, accurate float32 ones. On a GPU ``fma`` is half the FLOP/s of a large matrix product, ``read`` the bytes that a large copy
moves, both ways counted.
"""

from functools import partial

import torch

from onepass import _info

from .timing import cuda_clock
from .workloads import Cost, Run

IN_CACHE = 1 << 20


def measure(device: str, dtype: torch.dtype = torch.float32, seconds: float = 0.1) -> dict[str, float]:
    """Empty where the module that measures a CPU was not built."""
    if device == "cuda":
        return _of_gpu(dtype)
    probe = _info.probe()
    if probe is None:
        return {}
    threads = torch.get_num_threads()
    found = dict(probe.ceilings(threads, seconds))
    found["cache"] = probe.ceilings(threads, seconds, IN_CACHE * threads)["read"]
    if dtype == torch.float64:
        found["fma"] /= 2  # half as many lanes
    return found


def _of_gpu(dtype: torch.dtype, width: int = 8192, size: int = 1 << 30, calls: int = 10) -> dict[str, float]:
    clock, a = cuda_clock(), torch.randn(width, width, device="cuda").to(dtype)
    source = torch.zeros(size, dtype=torch.int8, device="cuda")
    target, out = torch.empty_like(source), torch.empty_like(a)

    def best(run: Run) -> float:
        return min(clock(run) for _ in range(calls))

    return {"fma": width**3 / best(partial(torch.mm, a, a, out=out)), "read": 2 * size / best(partial(target.copy_, source))}


def share(cost: Cost, seconds: float, ceilings: dict[str, float]) -> float:
    """How much of the time the machine's ceilings account for: by arithmetic or by bytes, whichever takes longer. Above 1 where inputs
    come from a cache."""
    return max(cost.multiply_adds / ceilings["fma"], cost.bytes / ceilings["read"]) / seconds


def attainable(intensity: float, ceilings: dict[str, float], read: str = "read") -> float:
    """Multiply-adds per second at so many of them per byte: the roofline."""
    return min(ceilings["fma"], intensity * ceilings[read])
