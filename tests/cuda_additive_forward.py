"""The forward kernels of additive attention on the PTX machine, launched as ``csrc/cuda/additive_forward.h`` says."""

import ctypes
import functools
import pathlib
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from cases import Case, Results, accumulator
from cuda_machine import DTYPES, SOURCES, kernel, shape_struct, tensor_struct, visibility_struct
from ptx import Kernel, Machine, Struct

SOURCE = "additive_forward.cu"
HERE = pathlib.Path(__file__).parent / "cuda"


@dataclass(frozen=True)
class Launch:
    kernel: str
    blocks: int
    threads: int
    shared: int
    resident: int
    seconds: float


@functools.cache
def library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        target = f"{folder}/launch.so"
        command = ["c++", "-std=c++20", "-shared", "-fPIC", f"-I{SOURCES}", str(HERE / "launch_additive_forward.cpp"), "-o", target]
        subprocess.run(command, check=True)
        return ctypes.CDLL(target)


def launch(sizes: tuple[int, ...], dtype: torch.dtype, *, processors: int = 1, capability: int = 90, tile: int = 0) -> Launch:
    """Of sizes B, H, T, S, A, D; ``tile`` overrules how many queries a block has."""
    name, numbers, seconds = ctypes.create_string_buffer(100), (ctypes.c_int64 * 4)(), ctypes.c_double()
    library().launch((ctypes.c_int64 * 6)(*sizes), DTYPES[dtype], processors, capability, tile, name, numbers, ctypes.byref(seconds))
    return Launch(name.value.decode(), *numbers, seconds.value)


def sizes(case: Case) -> tuple[int, ...]:
    (*lead, T, A), (S, D) = case.query.shape, (case.keys.shape[-2], case.values.shape[-1])
    return lead[0], lead[1] if len(lead) > 1 else 1, T, S, A, D


def run(case: Case, *, tile: int = 0, architecture: str = "80", code: Kernel | None = None, **options: Any) -> tuple[Results, Machine]:
    """Context and weights, or scores."""
    shape, dtype = sizes(case), case.query.dtype
    chosen = launch(shape, dtype, tile=tile)
    alone = case.family == "scores"
    lead = case.query.shape[:-1]
    weights = torch.full((*lead, shape[3]), torch.nan, dtype=dtype if alone else accumulator(dtype))
    context = None if alone else torch.full((*lead, shape[5]), torch.nan, dtype=dtype)
    at = context if context is None or context.numel() else weights.new_empty(1)  # a null pointer would ask for scores alone
    limits = case.lengths if case.spans is None else case.spans
    arguments = Struct({
        "shape": shape_struct(*shape),
        **{name: tensor_struct(tensor) for name, tensor in case.inputs().items() if name not in ("v", "values")},
        "values": tensor_struct(None if alone else case.values),
        "v": tensor_struct(case.v),
        "visibility": visibility_struct(limits, case.mask),
        "context": tensor_struct(at, fresh=True),
        "weights": tensor_struct(weights, fresh=True),
    })  # fmt: skip
    machine = Machine(code or kernel(SOURCE, chosen.kernel, architecture), **options)
    machine.launch(chosen.blocks, chosen.threads, [arguments], chosen.shared)
    return {"scores": weights} if alone else {"context": context, "weights": weights.to(dtype)}, machine
