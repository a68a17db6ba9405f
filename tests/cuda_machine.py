"""The CUDA kernels as nvcc compiles them, executed on the PTX machine."""

import functools
import pathlib
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from ptx import Buffer, Kernel, Struct, parse
from torch import Tensor

NVCC = shutil.which("nvcc")
SOURCES = pathlib.Path(__file__).parent.parent / "csrc" / "cuda"
FLAGS = ("-std=c++20", "-O3", "--expt-relaxed-constexpr")
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


@functools.cache
def ptx(source: str, architecture: str = "80") -> str:
    """What ``csrc/cuda/source`` compiles to."""
    with tempfile.TemporaryDirectory() as folder:
        target = pathlib.Path(folder) / "kernels.ptx"
        command = [str(NVCC), "-ptx", f"-arch=sm_{architecture}", "-lineinfo", *FLAGS, str(SOURCES / source), "-o", str(target)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        return target.read_text()


@functools.cache
def kernel(source: str, name: str, architecture: str = "80") -> Kernel:
    return parse(ptx(source, architecture), name)


@dataclass(frozen=True)
class Compiled:
    """What ptxas says of a kernel, and its machine code as ``nvdisasm -c -g`` prints it."""

    registers: int
    spills: int  # bytes
    stack: int
    shared: int  # bytes, without the dynamic ones
    code: str


@functools.cache
def compiled(source: str, architecture: str) -> dict[str, Compiled]:
    """The kernels of ``csrc/cuda/source``, by name."""
    disassembler = shutil.which("nvdisasm")
    if disassembler is None:
        from triton import knobs

        disassembler = knobs.nvidia.nvdisasm.path
    with tempfile.TemporaryDirectory() as folder:
        target = f"{folder}/kernels.cubin"
        options = ["-cubin", f"-arch=sm_{architecture}", "-lineinfo", "-Xptxas", "-v", *FLAGS, "-o", target]
        command = [str(NVCC), *options, str(SOURCES / source)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        code = subprocess.run([disassembler, "-c", "-g", target], check=True, capture_output=True, text=True).stdout
    found = {}
    for part in said.split("Compiling entry function '")[1:]:
        stack, stores, loads = (int(number) for number in re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", part)[:3])
        registers, shared = re.search(r"Used (\d+) registers", part), re.search(r"(\d+) bytes smem", part)
        assert registers is not None
        found[part.split("'")[0]] = Compiled(int(registers[1]), stores + loads, stack, int(shared[1]) if shared else 0, code)
    return found


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
