"""The CUDA backward kernels, launched on the PTX machine as ``csrc/cuda/additive_backward.h`` would launch them on a GPU."""

from typing import Any

import numpy as np
import torch
from cases import Case, Results, accumulator
from cuda_machine import kernel, launches, shape_struct, sizes_of, tensor_struct, visibility_struct
from ptx import Buffer, Machine, Struct
from torch import Tensor

PARTS = ("query_parts", "key_parts", "v_parts")


def numpy_empty(count: int, dtype: torch.dtype) -> Any:
    return np.empty(count, np.float64 if dtype == torch.float64 else np.float32)


def visibility_of(case: Case) -> Struct:
    limits = case.spans if case.spans is not None else case.lengths
    return visibility_struct(None if limits is None else limits.long(), case.mask)


def additive_backward(
    case: Case, processors: int = 1, architecture: str = "80", *, of_query: bool = True, **options: Any
) -> tuple[Results, list[Machine]]:
    """Gradients of a case of the family "scores", whose ``grad_weights`` arrive, and the machines that made them."""
    dtype, wide = case.query.dtype, accumulator(case.query.dtype)
    grad_scores = case.grad_weights.to(wide)
    sizes = sizes_of(case)
    how = launches("additive_backward", sizes, dtype, processors=processors, of_query=of_query)
    asked = {name: tensor for name, tensor in case.inputs().items() if of_query or name != "query"}
    found = {f"d_{name}": torch.empty(tensor.shape, dtype=dtype) for name, tensor in asked.items()}
    scratch = [numpy_empty(count, wide) for count in how[0].scratch]
    machines = []
    for number, launch in enumerate(how):
        fresh = number == 0
        outputs = {f"grad_{name}": tensor_struct(found.get(f"d_{name}"), fresh) for name in ("query", "keys", "v")}
        parts = {name: Buffer(array, 0, fresh) if array.size else None for name, array in zip(PARTS, scratch, strict=True)}
        arguments = Struct({
            "shape": shape_struct(*sizes),
            **{name: tensor_struct(tensor) for name, tensor in (*case.inputs().items(), ("grad_scores", grad_scores))},
            "visibility": visibility_of(case),
            **outputs, **parts,
            **{str(number): np.int32(each) for number, each in enumerate(launch.cut)},
        })  # fmt: skip
        machine = Machine(kernel("additive_backward.cu", launch.kernel, architecture), **options)
        if launch.blocks:
            machine.launch(launch.blocks, launch.threads, [arguments], launch.shared)
        machines.append(machine)
    return found, machines


def score_gradients(case: Case, weights: Tensor, **options: Any) -> tuple[Results, list[Machine]]:
    """Gradients of scores and of values of a case of the family "additive", whose weights are given."""
    dtype, wide, sizes = case.query.dtype, accumulator(case.query.dtype), sizes_of(case)
    how = launches("score_gradients", sizes, dtype)
    found = {"grad_scores": torch.empty(weights.shape, dtype=wide), "grad_values": torch.empty(case.values.shape, dtype=dtype)}
    inner = numpy_empty(how[0].scratch[0], wide)
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
        machine = Machine(kernel("score_gradients.cu", launch.kernel), **options)
        if launch.blocks:
            machine.launch(launch.blocks, launch.threads, [arguments], launch.shared)
        machines.append(machine)
    return found, machines
