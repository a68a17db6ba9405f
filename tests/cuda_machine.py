"""The CUDA kernels as nvcc compiles them, executed on the PTX machine."""

import functools
import pathlib
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from cases import Case
from gpu import sass
from gpu.compiled import Compiled as Binary
from gpu.compiled import by_nvcc, program
from ptx import Buffer, Kernel, Struct, parse
from torch import Tensor

from onepass import _probe

NVCC = shutil.which("nvcc")
SOURCES = pathlib.Path(__file__).resolve().parents[1] / "csrc" / "cuda"
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


@functools.cache
def kernel(source: str, name: str, architecture: str = "80") -> Kernel:
    return parse((by_nvcc(SOURCES / source, architecture) / "kernels.ptx").read_text(), name)


@dataclass(frozen=True)
class Compiled:
    """What ptxas says of a kernel, and the cubin that it is in."""

    registers: int
    spills: int  # bytes
    stack: int
    shared: int  # bytes, without the dynamic ones
    cubin: pathlib.Path

    def program(self, name: str) -> list[sass.Instruction]:
        """The machine code of the kernel."""
        pytest.importorskip("triton", reason="needs nvdisasm, which triton brings")
        return program(Binary(name, "", self.cubin.read_bytes(), 0))


def compiled(source: str, architecture: str) -> dict[str, Compiled]:
    """The kernels of ``csrc/cuda/source``, by name."""
    folder = by_nvcc(SOURCES / source, architecture)
    found = {}
    for part in (folder / "said").read_text().split("Compiling entry function '")[1:]:
        stack, stores, loads = (int(number) for number in re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", part)[:3])
        registers, shared = re.search(r"Used (\d+) registers", part), re.search(r"(\d+) bytes smem", part)
        assert registers is not None
        found[part.split("'")[0]] = Compiled(
            int(registers[1]), stores + loads, stack, int(shared[1]) if shared else 0, folder / "kernels.cubin"
        )
    return found


@dataclass(frozen=True)
class Launch:
    """A launch as the host gives it to a GPU; ``scratch`` and ``cut`` are those of the whole op."""

    kernel: str
    blocks: int
    threads: int
    shared: int
    splits: int
    cluster: int
    resident: int
    seconds: float
    scratch: list[int]
    cut: list[int]


def launches(
    op: str,
    sizes: Sequence[int],
    dtype: torch.dtype,
    *,
    processors: int = 1,
    capability: int = 80,
    queries: int = 0,
    kept: torch.dtype | None = None,
    of_query: bool = True,
) -> list[Launch]:
    """Of sizes B, H, T, S, A, D; none where no kernel takes them. ``queries`` overrules how many a tile of the forward has."""
    found = _probe.cuda_launches(op, list(sizes), DTYPES[dtype], processors, capability, queries, DTYPES[kept or dtype], of_query)
    return [Launch(**launch) for launch in found]


def sizes_of(case: Case) -> tuple[int, ...]:
    """B, H, T, S, A, D."""
    query, heads = case.query, case.query.shape[1] if case.query.dim() == 4 else 1
    return query.shape[0], heads, query.shape[-2], case.keys.shape[-2], query.shape[-1], case.values.shape[-1]


def array(tensor: Tensor, fresh: bool = False) -> Any:
    """From the tensor's first element to its last, with what its strides leave between them; ``fresh`` where it is not written yet."""
    size = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
    flat = torch.as_strided(tensor.detach(), (size,), (1,), tensor.storage_offset())
    if flat.dtype in (torch.bfloat16, torch.bool):
        flat = flat.view(torch.int16 if flat.dtype == torch.bfloat16 else torch.uint8)
    return Buffer(flat.numpy(), 0, fresh)


def tensor_struct(tensor: Tensor | None, fresh: bool = False) -> Struct:
    """``onepass::Tensor`` of ``[B, (H,) N, W]``, or of v: ``[(H,) A]``."""
    strides = [0, 0, 0]
    if tensor is not None and tensor.dim() >= 3:
        strides = [tensor.stride(0), tensor.stride(1) if tensor.dim() == 4 else 0, tensor.stride(-2)]
    elif tensor is not None and tensor.dim() == 2:
        strides = [0, tensor.stride(0), 0]
    data = None if tensor is None or tensor.numel() == 0 else array(tensor, fresh)
    numbers = {name: np.int64(stride) for name, stride in zip(("batch", "head", "row"), strides, strict=True)}
    return Struct({"data": data, **numbers, "dtype": np.int32(0 if tensor is None else DTYPES[tensor.dtype])})


def visibility_struct(lengths: Tensor | None, mask: Tensor | None) -> Struct:
    """``onepass::Visibility`` of lengths ``[B]``, ``[B, T]`` or, as spans, ``[B, T, 2]``, and of a mask ``[B, (H,) T or 1, S]``."""
    firsts: Any = None
    lasts: Any = None
    batch = step = 0
    if lengths is not None:
        batch, step = lengths.stride(0), lengths.stride(1) if lengths.dim() > 1 else 0
        if lengths.dim() == 3:
            whole = array(lengths)
            firsts, lasts = whole, (whole, 8 * lengths.stride(2))
        else:
            lasts = array(lengths)
    strides = [0, 0, 0, 0]
    if mask is not None:
        by_head = mask if mask.dim() == 4 else mask.unsqueeze(1)
        strides = [0 if size == 1 else stride for size, stride in zip(by_head.shape, by_head.stride(), strict=True)]
    names = ("mask_batch", "mask_head", "mask_step", "mask_source")
    return Struct({
        "lengths": lasts, "firsts": firsts, "lengths_batch": np.int64(batch), "lengths_step": np.int64(step),
        "mask": None if mask is None else array(mask),
        **{name: np.int64(stride) for name, stride in zip(names, strides, strict=True)},
    })  # fmt: skip


def shape_struct(B: int, H: int, T: int, S: int, A: int, D: int) -> Struct:
    return Struct({name: np.int64(size) for name, size in zip("BHTSAD", (B, H, T, S, A, D), strict=True)})
