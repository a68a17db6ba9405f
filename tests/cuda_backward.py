"""The CUDA backward kernels, launched on the PTX machine as ``csrc/cuda/additive_backward.h`` would launch them on a GPU."""

import ctypes
import functools
import pathlib
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from cases import Case, Results, accumulator
from cuda_machine import DTYPES, kernel, shape_struct, tensor_struct, visibility_struct
from ptx import Buffer, Machine, Struct
from torch import Tensor

COMPILER = shutil.which("c++")
PARTS = ("query_parts", "key_parts", "v_parts")
FOLDER = pathlib.Path(__file__).parent / "cuda"


class Launch(ctypes.Structure):
    _fields_ = (
        ("kernel", ctypes.c_char * 64), ("blocks", ctypes.c_int64), ("threads", ctypes.c_int32), ("shared", ctypes.c_int32),
        ("resident", ctypes.c_int32), ("seconds", ctypes.c_double),
    )  # fmt: skip


@dataclass(frozen=True)
class Launches:
    """``onepass::cuda::BackwardLaunch``: gradients and sums; splits, query splits, positions, queries; numbers of the three scratches."""

    gradients: Launch
    sums: Launch
    parts: tuple[int, ...]
    scratch: tuple[int, ...]


@functools.cache
def library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        target = pathlib.Path(folder) / "launch.so"
        command = [str(COMPILER), "-std=c++20", "-O1", "-fPIC", "-shared", str(FOLDER / "launch_backward.cpp"), "-o", str(target)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        return ctypes.CDLL(str(target))


def launches(sizes: tuple[int, ...], dtype: torch.dtype, processors: int = 1, capability: int = 80) -> Launches:
    """For sizes B, H, T, S, A, D."""
    found, parts, scratch = (Launch * 2)(), (ctypes.c_int32 * 4)(), (ctypes.c_int64 * 3)()
    library().additive_backward((ctypes.c_int64 * 6)(*sizes), DTYPES[dtype], processors, capability, found, parts, scratch)
    return Launches(found[0], found[1], tuple(parts), tuple(scratch))


def sizes_of(case: Case) -> tuple[int, ...]:
    """B, H, T, S, A, D."""
    query, heads = case.query, case.query.shape[1] if case.query.dim() == 4 else 1
    return query.shape[0], heads, query.shape[-2], case.keys.shape[-2], query.shape[-1], case.values.shape[-1]


def numpy_empty(count: int, dtype: torch.dtype) -> Any:
    return np.empty(count, np.float64 if dtype == torch.float64 else np.float32)


def visibility_of(case: Case) -> Struct:
    limits = case.spans if case.spans is not None else case.lengths
    return visibility_struct(None if limits is None else limits.long(), case.mask)


def additive_backward(case: Case, processors: int = 1, **options: Any) -> tuple[Results, list[Machine]]:
    """Gradients of a case of the family "scores", whose ``grad_weights`` arrive, and the machines that made them."""
    dtype, wide = case.query.dtype, accumulator(case.query.dtype)
    grad_scores = case.grad_weights.to(wide)
    sizes = sizes_of(case)
    how = launches(sizes, dtype, processors)
    found = {f"d_{name}": torch.empty(tensor.shape, dtype=dtype) for name, tensor in case.inputs().items()}
    scratch = [numpy_empty(count, wide) for count in how.scratch]
    machines = []
    for launch in (how.gradients, how.sums):
        fresh = launch is how.gradients
        outputs = {f"grad_{name}": tensor_struct(found[f"d_{name}"], fresh) for name in ("query", "keys", "v")}
        parts = {name: Buffer(array, 0, fresh) if array.size else None for name, array in zip(PARTS, scratch, strict=True)}
        arguments = Struct({
            "shape": shape_struct(*sizes),
            **{name: tensor_struct(tensor) for name, tensor in (*case.inputs().items(), ("grad_scores", grad_scores))},
            "visibility": visibility_of(case),
            **outputs, **parts,
            **{str(number): np.int32(each) for number, each in enumerate(how.parts)},
        })  # fmt: skip
        machine = Machine(kernel("additive_backward.cu", launch.kernel.decode()), **options)
        if launch.blocks:
            machine.launch(launch.blocks, launch.threads, [arguments], launch.shared)
        machines.append(machine)
    return found, machines


def score_gradients(case: Case, weights: Tensor, **options: Any) -> tuple[Results, list[Machine]]:
    """Gradients of scores and of values of a case of the family "additive", whose weights are given."""
    dtype, wide, sizes = case.query.dtype, accumulator(case.query.dtype), sizes_of(case)
    how, count = (Launch * 2)(), ctypes.c_int64()
    library().score_gradients((ctypes.c_int64 * 6)(*sizes), DTYPES[dtype], 1, 80, how, ctypes.byref(count))
    found = {"grad_scores": torch.empty(weights.shape, dtype=wide), "grad_values": torch.empty(case.values.shape, dtype=dtype)}
    inner = numpy_empty(count.value, wide)
    more = None if case.grad_weights is None else case.grad_weights.to(wide)
    given = {"weights": weights.to(wide), "values": case.values, "grad_context": case.grad_context, "grad_weights": more}
    machines = []
    for number, launch in enumerate(how):
        arguments = Struct({
            "shape": shape_struct(*sizes),
            **{name: tensor_struct(tensor) for name, tensor in given.items()},
            "visibility": visibility_of(case),
            **{name: tensor_struct(tensor, number == 0) for name, tensor in found.items()},
            "inner": Buffer(inner, 0, number == 0) if inner.size else None,
        })  # fmt: skip
        machine = Machine(kernel("score_gradients.cu", launch.kernel.decode()), **options)
        if launch.blocks:
            machine.launch(launch.blocks, launch.threads, [arguments], launch.shared)
        machines.append(machine)
    return found, machines
