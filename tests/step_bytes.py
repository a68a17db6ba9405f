"""Bytes of global memory that a decoding step moves in CUDA, over those that it cannot do without, counted on the PTX machine.

    python tests/step_bytes.py        prints the table, in a minute or two; needs nvcc
"""

import pathlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / "benchmarks"))

from cases import Dims, build
from cuda_machine import Launch
from cuda_step import Steps
from ptx import Machine

L1 = 32 * 1024
PROCESSORS = 132


@dataclass(frozen=True)
class Moved:
    """Of one launch: bytes as they are asked for and as they move past the L1, over the necessary ones."""

    launch: Launch
    machine: Machine
    asked: float
    past_l1: float

    def __str__(self) -> str:
        cut = f"{self.launch.splits} blocks" + (f" in clusters of {self.launch.cluster}" if self.launch.cluster > 1 else "")
        return f"{self.asked:.3f} asked, {self.past_l1:.3f} past the L1 ({cut})"


def moved(
    family: str, dims: Dims, dtype: torch.dtype, processors: int, capability: int, kept: torch.dtype | None = None
) -> tuple[Moved, Moved]:
    """Of a step's forward and of its backward; keys, values, queries, v and results are necessary once each."""
    case = build(family, dims, dtype)
    case = case.replace(keys=case.keys.to(kept or dtype), values=case.values.to(kept or dtype))
    v = case.v if family == "additive" else None
    device = Steps(processors, capability, cache=L1)
    context, weights = device.forward(case.query, case.keys, case.values, v, 1.0, None, None)
    grads = torch.ones_like(context), torch.ones_like(weights)
    grad_query, grad_scores = device.backward(*grads, case.query, case.keys, case.values, v, 1.0, weights, None, None)
    assert not device.findings, "\n".join(device.findings)
    inputs = [case.query, case.keys, case.values, *([] if v is None else [v])]
    needs = total([*inputs, context, weights]), total([*inputs, *grads, weights, grad_query, grad_scores])
    found = []
    for machine, launch, necessary in zip(device.machines, device.launches, needs, strict=True):
        traffic = list(machine.global_bytes.values())
        asked, past_l1 = sum(each.loaded + each.stored for each in traffic), sum(each.fetched + each.written for each in traffic)
        found.append(Moved(launch, machine, asked / necessary, past_l1 / necessary))
    return found[0], found[1]


def total(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def main() -> None:
    print(f"additive, one source, widths of 256, a device of {PROCESSORS} processors", flush=True)
    shapes = [(source, dtype) for source in (100, 400, 1024) for dtype in (torch.float32, torch.bfloat16)]
    for capability in (80, 90):
        for source, dtype in shapes:
            for steps in (1, 5, 16):
                for direction, found in zip(
                    ("forward", "backward"), moved("additive", Dims(1, steps, source, 256, 256), dtype, PROCESSORS, capability), strict=True
                ):
                    print(f"sm_{capability}, {source} positions, {steps} queries, {str(dtype)[6:]}, {direction}: {found}", flush=True)


if __name__ == "__main__":
    main()
