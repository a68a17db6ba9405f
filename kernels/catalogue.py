"""Launches without a GPU: which kernels a call would launch, with which tiles, and what the compilers make of them.

    with recorded(Device(132)) as launches:
        OPS["additive_forward"](query, keys, values, v, None, None)
    launches[0].compile("cuda:90").asm["ptx"]
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from onepass.kernels import ops
from onepass.kernels.tiles import Device

TYPES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.uint8: "u8",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One launch of one kernel: arguments in order, constants and options as :func:`onepass.kernels.ops.launch` gets them."""

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    @property
    def warps(self) -> int:
        return int(self.constants.get("num_warps", 4))

    def compile(self, target: str) -> Any:
        """For ``"cuda:90"``, ``"hip:gfx942"``, ..., specialised as a launch would be: sizes that are 1, and that 16 divides."""
        names = self.kernel.arg_names
        options = {name: value for name, value in self.constants.items() if name not in names}
        constants = {name: value for name, value in self.constants.items() if name in names}
        if target.startswith("hip"):
            constants = {name: "gcn" if value == "ptx" else value for name, value in constants.items()}
        signature = {}
        divisible = {}
        positional = [name for name in names if name not in constants]
        for name, value in zip(positional, self.arguments, strict=True):
            if isinstance(value, int) and value == 1:
                constants[name] = value
            else:
                signature[name] = type_of(value)
                if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
                    divisible[(names.index(name),)] = [["tt.divisibility", 16]]
        signature = {name: signature.get(name, "constexpr") for name in names}
        backend, _, architecture = target.partition(":")
        found = GPUTarget(backend, int(architecture), 32) if backend == "cuda" else GPUTarget(backend, architecture, 64)
        source = ASTSource(self.kernel, signature, constants, divisible)
        return triton.compile(source, target=found, options={**options, "enable_fp_fusion": True})

    def passed(self) -> list[Any]:
        """The arguments that the compiled kernel takes: all but those that are 1."""
        return [value for value in self.arguments if not (isinstance(value, int) and value == 1)]


def type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


@contextlib.contextmanager
def launched_by(launch: Callable[..., None], device: Device) -> Iterator[None]:
    """Ops of CPU tensors call ``launch`` in place of a GPU, with the tiles of the device."""
    before = ops.launch, ops.device_of
    ops.launch, ops.device_of = launch, lambda _: device  # type: ignore[assignment]
    try:
        yield
    finally:
        ops.launch, ops.device_of = before  # type: ignore[assignment]


@contextlib.contextmanager
def recorded(device: Device) -> Iterator[list[Launch]]:
    """Collects launches; outputs stay as they were allocated."""
    launches: list[Launch] = []

    def record(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        if programs > 0:
            launches.append(Launch(kernel, programs, arguments, constants))

    with launched_by(record, device):
        yield launches
