"""The Triton kernels' ops on CPU tensors, each launch compiled for sm_80 and executed on the PTX machine."""

import contextlib
import functools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from ptx import Buffer, Finding, Kernel, Machine, parse
from torch import Tensor

from onepass.kernels.launches import Launch, launched_by
from onepass.kernels.tiles import Device

CAPABILITY = 80


@dataclass
class Executed:
    """What the launches of some calls did."""

    findings: list[Finding] = field(default_factory=list)
    names: list[str] = field(default_factory=list)


@contextlib.contextmanager
def executed(device: Device, approximate: bool = False) -> Iterator[Executed]:
    """Ops run on the PTX machine. Floating tensors that hold only NaN count as not written yet."""
    done = Executed()

    def launch(kernel: Any, programs: int, *arguments: Any, **given: Any) -> None:
        if programs == 0:
            return
        found = Launch(kernel, programs, arguments, given)
        code, warps, shared = compiled(kernel, tuple(found.signature.items()), tuple(found.constants.items()), found.divisible, found)
        machine = Machine(code, approximate=approximate)
        machine.launch(programs, 32 * warps, buffers(found), shared)
        done.findings += machine.findings
        done.names.append(found.name)

    with launched_by(launch, device):
        yield done


class Same:
    """Equal to any other: a part of a cache's key that does not count."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same)

    def __hash__(self) -> int:
        return 0


def compiled(kernel: Any, signature: Any, constants: Any, divisible: Any, launch: Launch) -> tuple[Kernel, int, int]:
    return _compiled(kernel, signature, constants, divisible, tuple(launch.options.items()), Same(launch))


@functools.cache
def _compiled(kernel: Any, signature: Any, constants: Any, divisible: Any, options: Any, same: Same) -> tuple[Kernel, int, int]:
    with tempfile.TemporaryDirectory() as folder:
        from triton import knobs

        with knobs.cache.scope():
            knobs.cache.dir = folder
            result = same.launch.compile(CAPABILITY)
    return parse(result.asm["ptx"], result.metadata.name), result.metadata.num_warps, result.metadata.shared


def buffers(launch: Launch) -> list[Any]:
    """Tensors as arrays over all of the memory that they lie in, those of one memory as one."""
    made: dict[int, Any] = {}

    def buffer(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        address = value.data_ptr()
        if address not in made:
            made[address] = array(value)
        return made[address]

    return [buffer(value) for value in launch.passed.values()]


def array(tensor: Tensor) -> Any:
    """From the tensor's first element to its last, with what its strides leave between them."""
    size = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
    flat = torch.as_strided(tensor.detach(), (size,), (1,), tensor.storage_offset())
    if flat.dtype == torch.bfloat16:
        flat = flat.view(torch.int16)
    fresh = tensor.is_floating_point() and size > 0 and bool(tensor.detach().isnan().all())
    return Buffer(flat.numpy(), 0, fresh) if size else Buffer(np.empty(0, np.uint8))
