"""A decoding step's CUDA kernels on the PTX machine: launched as a GPU would be, on the tensors of the ops."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import cuda_machine
import numpy as np
import torch
from cases import accumulator
from cuda_machine import Launch, launches, shape_struct, tensor_struct, visibility_struct
from ptx import Buffer, Kernel, Machine, Output, Struct
from torch import Tensor


def launches_of(
    backward: bool,
    additive: bool,
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    processors: int,
    capability: int = 80,
    kept: torch.dtype | None = None,
) -> list[Launch]:
    """The only one, or none."""
    op = f"{'additive' if additive else 'multiplicative'}_step_{'backward' if backward else 'forward'}"
    return launches(op, sizes, dtype, processors=processors, capability=capability, kept=kept)


@dataclass
class Steps:
    """Calls of the ops on a device of some processors; ``machines`` are what they ran on."""

    processors: int = 1
    capability: int = 80
    approximate: bool = False
    cache: int | None = None
    machines: list[Machine] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)
    kernel_of: Callable[[str, str, str], Kernel] = cuda_machine.kernel

    def forward(
        self, query: Tensor, keys: Tensor, values: Tensor, v: Tensor | None, scale: float, lengths: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        sizes = sizes_of(query, keys, values)
        context = torch.empty((*query.shape[:-1], values.shape[-1]), dtype=query.dtype)
        weights = torch.empty((*query.shape[:-1], keys.shape[-2]), dtype=accumulator(query.dtype))
        self.launch(False, v is not None, sizes, (query.dtype, keys.dtype), lambda scratch: Struct({
            "shape": shape_struct(*sizes), "query": tensor_struct(query), "keys": tensor_struct(keys), "values": tensor_struct(values),
            "v": tensor_struct(v), "scale": np.float64(scale), "visibility": visibility_struct(lengths, mask),
            "context": tensor_struct(context, True), "weights": tensor_struct(weights, True), **scratch,
        }))  # fmt: skip
        return context, weights

    def backward(
        self, grad_context: Tensor | None, grad_weights: Tensor | None, query: Tensor, keys: Tensor, values: Tensor, v: Tensor | None,
        scale: float, weights: Tensor, lengths: Tensor | None, mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        sizes = sizes_of(query, keys, values)
        grad_query = torch.empty(query.shape, dtype=query.dtype)
        grad_scores = torch.empty(weights.shape, dtype=weights.dtype)
        self.launch(True, v is not None, sizes, (query.dtype, keys.dtype), lambda scratch: Struct({
            "shape": shape_struct(*sizes), "query": tensor_struct(query), "keys": tensor_struct(keys), "values": tensor_struct(values),
            "v": tensor_struct(v), "scale": np.float64(scale), "visibility": visibility_struct(lengths, mask),
            "weights": tensor_struct(weights), "grad_context": tensor_struct(grad_context), "grad_weights": tensor_struct(grad_weights),
            "grad_query": tensor_struct(grad_query, True), "grad_scores": tensor_struct(grad_scores, True), **scratch,
        }))  # fmt: skip
        return grad_query, grad_scores

    def launch(
        self,
        backward: bool,
        additive: bool,
        sizes: tuple[int, ...],
        dtypes: tuple[torch.dtype, torch.dtype],
        arguments: Callable[[Any], Struct],
    ) -> None:
        (found,) = launches_of(backward, additive, sizes, dtypes[0], self.processors, self.capability, dtypes[1])
        self.launches.append(found)
        if found.blocks == 0:
            return
        counters = np.zeros(found.blocks // found.splits, np.uint32)
        parts = Output(np.empty(found.scratch[0], np.uint8)) if found.scratch[0] else None
        code = self.kernel_of(f"step_{'backward' if backward else 'forward'}.cu", found.kernel, str(self.capability))
        machine = Machine(code, approximate=self.approximate, cache=self.cache)
        self.machines.append(machine)
        scratch = {"parts": parts, "counters": Buffer(counters), "splits": np.int32(found.splits), "cluster": np.int32(found.cluster)}
        machine.launch(found.blocks, found.threads, [arguments(scratch)], found.shared, found.cluster)
        assert not counters.any()

    @property
    def findings(self) -> list[str]:
        return [str(finding) for machine in self.machines for finding in machine.findings]


def sizes_of(query: Tensor, keys: Tensor, values: Tensor) -> tuple[int, ...]:
    return query.shape[0], query.shape[1] if query.dim() == 4 else 1, *query.shape[-2:-1], *keys.shape[-2:], values.shape[-1]
