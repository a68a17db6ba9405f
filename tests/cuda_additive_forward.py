"""The forward kernels of additive attention on the PTX machine, launched as ``csrc/cuda/additive_forward.h`` says."""

from typing import Any

import torch
from cases import Case, Results, accumulator
from cuda_machine import kernel, launches, shape_struct, sizes_of, tensor_struct, visibility_struct
from ptx import Kernel, Machine, Struct

SOURCE = "additive_forward.cu"


def run(case: Case, *, tile: int = 0, architecture: str = "80", code: Kernel | None = None, **options: Any) -> tuple[Results, Machine]:
    """Context and weights, or scores."""
    shape, dtype = sizes_of(case), case.query.dtype
    (chosen,) = launches("additive_forward", shape, dtype, capability=90, queries=tile)
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
