"""The launches of the CUDA kernels that ``benchmarks/gpuless.py`` studies, in the tiles for many queries and in decoding steps. What they
move is counted where they are tested, ``tests/test_cuda_*.py``."""

import functools
import shutil
from pathlib import Path

import torch

from onepass import _probe

from . import ptx_loops, sass
from .catalogue import Entry, Shape
from .compiled import CudaKernel, by_nvcc
from .devices import DEVICES

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # as csrc/tensors.h numbers them
MANY = Shape(1, 64, 512, 512, 512)
STEPS = (Shape(8, 1, 512, 256, 256), Shape(2, 5, 512, 128, 128))


def entries(target: str) -> list[Entry]:
    """None for AMD, and none without nvcc."""
    if target.startswith("gfx") or shutil.which("nvcc") is None:
        return []
    B, T, S, A, D = MANY.B, MANY.T, MANY.S, MANY.A, MANY.D
    found = [entry("additive_forward", target, MANY, (T + S) * (A + D) + T * S, 2 if target == "80" else 4)]
    found.append(entry("additive_backward", target, MANY, 2 * (T + S) * A + T * S, 2))
    for shape in STEPS:
        B, T, S, A, D = shape.B, shape.T, shape.S, shape.A, shape.D
        for family in ("additive", "multiplicative"):
            found.append(entry(f"{family}_step_forward", target, shape, B * ((T + S) * (A + D) + T * S)))
            found.append(entry(f"{family}_step_backward", target, shape, B * ((2 * T + S) * (A + D) + 2 * T * S)))
    return found


def entry(op: str, target: str, shape: Shape, necessary: int, merged: int = 0) -> Entry:
    """The op's first launch, on all of the target's device if it is a step, with so many necessary numbers. ``merged``: how many of the
    hot loop's elements share a reciprocal."""
    processors = next(device.sms for device in DEVICES if device.target == target) if shape.T < MANY.T else 1
    sizes = [shape.B, 1, shape.T, shape.S, shape.A, shape.D]
    how = _probe.cuda_launches(op, sizes, DTYPES.index(shape.dtype), processors, int(target))[0]
    source = SOURCES / (f"{op}.cu" if shape is MANY else f"step_{op.rpartition('_')[2]}.cu")
    parts = f", {how['splits']} pieces" if how["splits"] > 1 else ""
    parts += f" in clusters of {how['cluster']}" if how["cluster"] > 1 else ""
    return Entry(
        name=f"CUDA {op}",
        tile=f"{how['kernel']}, {how['threads'] // 32} warps{parts}",
        shape=str(shape),
        function=CudaKernel(source, how["kernel"], how["shared"]),
        signature={},
        constants={},
        divisible=(),
        warps=how["threads"] // 32,
        stages=1,
        options={},
        arguments=None,
        grid=(how["blocks"], 1, 1),
        necessary=necessary * torch.finfo(shape.dtype).bits // 8,
        hot=sass.reciprocals_alone if merged else None,
        elements=float(merged * reciprocals(source, how["kernel"], target)) if merged else None,
        work=float(shape.B * shape.T * shape.S * shape.A) if merged else None,
    )


@functools.cache
def reciprocals(source: Path, symbol: str, target: str) -> int:
    """Of a trip of the PTX's hot loop: those that merge, as loops with exponentials are of rows, or of the exact way."""
    text = (by_nvcc(source, target) / "kernels.ptx").read_text()
    body = sass.hot_loop(ptx_loops.program(text, symbol), sass.reciprocals_alone)
    return sass.reciprocals_alone(body or ())
