"""Functions that the hardware approximates: computed exactly here, with the error that the PTX manual documents for each beside it."""

from collections.abc import Callable

import numpy as np

from .arithmetic import div as exact_div
from .arithmetic import finished
from .operation import Builder, Error, Operation, elementwise
from .parse import Instruction
from .rounding import Array
from .values import is_float

ULP = 2.0**-23
FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
    "sqrt": np.sqrt,
    "rcp": np.reciprocal,
    "rsqrt": lambda a: 1 / np.sqrt(a),
}
ERRORS = {
    "ex2": Error(2 * ULP),
    "lg2": Error(2.0**-22, 2.0**-22),
    "sin": Error(0, 2.0**-20.5),
    "cos": Error(0, 2.0**-20.5),
    "tanh": Error(2.0**-11),
    "sqrt": Error(2.0**-23),
    "rcp": Error(ULP),
    "rsqrt": Error(2.0**-22.9),
    "div": Error(2 * ULP),
}
NARROW = {
    ("ex2", "f16"): Error(2.0**-9.9),
    ("ex2", "bf16"): Error(2.0**-7),
    ("tanh", "f16"): Error(0, 2.0**-10.987),
    ("tanh", "bf16"): Error(0, 2.0**-8),
}


def function(instruction: Instruction) -> Operation:
    """One of FUNCTIONS, rounded once from float64; .rn forms (rcp, sqrt) have no error."""
    name, type_ = instruction.opcode, instruction.type
    exact = FUNCTIONS[name]
    apply = finished(instruction, lambda a: exact(np.asarray(a, np.float64)).astype(a.dtype))
    if "approx" not in instruction.parts:
        return elementwise(instruction, type_, apply)
    return elementwise(instruction, type_, apply, error=NARROW.get((name, type_.removesuffix("x2")), ERRORS[name]))


def div(instruction: Instruction) -> Operation:
    if not is_float(instruction.type) or not {"approx", "full"} & set(instruction.parts):
        return exact_div(instruction)
    return elementwise(instruction, instruction.type, finished(instruction, np.divide), error=ERRORS["div"])


def perturbed(operation: Operation, error: Error) -> Callable[..., Array]:
    """The operation's function, off by up to its error: how far, and which way, follows from the operands' bits."""

    def apply(*sources: Array) -> Array:
        exact = operation.apply(*sources)
        seed: Array = np.array(0x9E3779B9, np.uint32)
        for source in sources:
            bits = np.ascontiguousarray(source, np.float32).view(np.uint32).reshape(np.shape(source))
            seed = (seed ^ bits) * np.uint32(0x85EBCA6B)
        share = (seed >> np.uint32(8)) / np.float64(1 << 23) - 1  # in [-1, 1)
        wide = np.asarray(exact, np.float64)
        off = wide + share * np.maximum(np.abs(wide) * error.relative, error.absolute)
        return np.where(np.isfinite(wide) & (wide != 0), off, wide).astype(exact.dtype)

    return apply


BUILDERS: dict[str, Builder] = {**dict.fromkeys(FUNCTIONS, function), "div": div}
