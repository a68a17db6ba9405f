"""Launches without a GPU: which kernels a call would launch, with which tiles, and what the compilers make of them.

    with recorded(Device(132)) as launches:
        OPS["additive_forward"](query, keys, values, v, None, None)
    launches[0].compile(90).asm["ptx"]
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

from onepass.kernels import parts
from onepass.kernels.tiles import Device

TYPES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.uint8: "u8",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One launch of one kernel: arguments in order, constants and options as :func:`onepass.kernels.parts.launch` gets them."""

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    given: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    @property
    def options(self) -> dict[str, Any]:
        """The compiler's, warps and stages among them."""
        return {"enable_fp_fusion": True} | {name: value for name, value in self.given.items() if name not in self.kernel.arg_names}

    @property
    def passed(self) -> dict[str, Any]:
        """The arguments that the compiled kernel takes, by name: all but the constants, and sizes that are 1, which become constants."""
        positional = [name for name in self.kernel.arg_names if name not in self.given]
        named, any_value = zip(positional, self.arguments, strict=True), self._for_any_value
        return {name: value for name, value in named if name in any_value or not (isinstance(value, int) and value == 1)}

    @property
    def _for_any_value(self) -> set[str]:
        """The arguments of which the kernel is compiled once, whatever they are."""
        return {parameter.name for parameter in self.kernel.params if parameter.do_not_specialize}

    @property
    def constants(self) -> dict[str, Any]:
        return {name: self.given.get(name, 1) for name in self.kernel.arg_names if name not in self.passed}

    @property
    def signature(self) -> dict[str, str]:
        """Triton's types of all arguments."""
        passed = self.passed
        declared = {parameter.name: parameter.annotation_type for parameter in self.kernel.params}
        return {name: declared[name] or type_of(passed[name]) if name in passed else "constexpr" for name in self.kernel.arg_names}

    @property
    def divisible(self) -> tuple[str, ...]:
        """The arguments that 16 divides, as a launch would find: addresses and sizes."""
        some = {name: value for name, value in self.passed.items() if name not in self._for_any_value}
        return tuple(n for n, value in some.items() if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0))

    def compile(self, capability: int) -> Any:
        """For an NVIDIA GPU, which need not be there."""
        names = self.kernel.arg_names
        aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in self.divisible}
        source = ASTSource(self.kernel, self.signature, self.constants, aligned)
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=self.options)


def type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


@contextlib.contextmanager
def launched_by(launch: Callable[..., None], device: Device) -> Iterator[None]:
    """Ops of CPU tensors call ``launch`` in place of a GPU, with the tiles of the device."""
    before = parts.launch, parts.device_of
    parts.launch, parts.device_of = launch, lambda _: device
    try:
        yield
    finally:
        parts.launch, parts.device_of = before


@contextlib.contextmanager
def recorded(device: Device) -> Iterator[list[Launch]]:
    """Collects launches; outputs stay as they were allocated."""
    launches: list[Launch] = []

    def record(kernel: Any, programs: int, *arguments: Any, **given: Any) -> None:
        if programs > 0:
            launches.append(Launch(kernel, programs, arguments, given))

    with launched_by(record, device):
        yield launches
