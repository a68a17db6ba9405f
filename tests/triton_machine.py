"""The Triton kernels' ops on CPU tensors, each launch compiled for sm_80 and executed on the PTX machine."""

import contextlib
import os
import pathlib
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from ptx import Buffer, Finding, Kernel, Machine, parse
from torch import Tensor
from triton import knobs

from onepass.kernels.launches import Launch, launched_by
from onepass.kernels.ops import OPS
from onepass.kernels.tiles import Device

CAPABILITY = 80
CACHE = pathlib.Path(tempfile.gettempdir()) / f"onepass-triton-{os.getuid()}"  # Triton's own, by source and options, for all processes
_codes: dict[Any, tuple[Kernel, int, int]] = {}


@dataclass
class Executed:
    """What the launches of some calls did."""

    findings: list[Finding] = field(default_factory=list)
    names: list[str] = field(default_factory=list)


@contextlib.contextmanager
def ops_of_triton() -> Iterator[None]:
    """The library's ops of CPU tensors are those of the Triton kernels; they run within :func:`executed`."""
    library = torch.library.Library("onepass", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        for name, function in OPS.items():
            library.impl(name, function, "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


@contextlib.contextmanager
def executed(device: Device, approximate: bool = False) -> Iterator[Executed]:
    """Ops run on the PTX machine. Floating tensors that hold only NaN count as not written yet."""
    done = Executed()

    def launch(kernel: Any, programs: int, *arguments: Any, **given: Any) -> None:
        if programs == 0:
            return
        found = Launch(kernel, programs, arguments, given)
        done.findings += run(found, approximate).findings
        done.names.append(found.name)

    with launched_by(launch, device):
        yield done


def only_nan(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and bool(tensor.detach().isnan().all())


def run(launch: Launch, approximate: bool = False, fresh: Callable[[Tensor], bool] = only_nan) -> Machine:
    """One launch, on a machine that has it behind it; ``fresh`` tells tensors that nothing has written yet."""
    code, warps, shared = compiled(launch)
    machine = Machine(code, approximate=approximate)
    machine.launch(launch.programs, 32 * warps, buffers(launch, fresh), shared)
    return machine


def compiled(launch: Launch) -> tuple[Kernel, int, int]:
    """The kernel, its warps and its dynamic shared memory; the same code is compiled once."""
    key = (launch.kernel, *(str(part) for part in (launch.signature, launch.constants, launch.divisible, launch.options)))
    if key not in _codes:
        CACHE.mkdir(mode=0o700, exist_ok=True)
        with knobs.cache.scope():
            knobs.cache.dir = str(CACHE)
            result = launch.compile(CAPABILITY)
        _codes[key] = parse(result.asm["ptx"], result.metadata.name), result.metadata.num_warps, result.metadata.shared
    return _codes[key]


def buffers(launch: Launch, fresh: Callable[[Tensor], bool]) -> list[Any]:
    """Tensors as arrays, those that start at one address as one."""
    made: dict[int, Any] = {}

    def buffer(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        address = value.data_ptr()
        if address not in made:
            made[address] = array(value, fresh)
        return made[address]

    return [buffer(value) for value in launch.passed.values()]


def array(tensor: Tensor, fresh: Callable[[Tensor], bool]) -> Any:
    """From the tensor's first element to its last, with what its strides leave between them."""
    size = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
    flat = torch.as_strided(tensor.detach(), (size,), (1,), tensor.storage_offset())
    if flat.dtype == torch.bfloat16:
        flat = flat.view(torch.int16)
    return Buffer(flat.numpy(), 0, fresh(tensor)) if size else Buffer(np.empty(0, np.uint8))
