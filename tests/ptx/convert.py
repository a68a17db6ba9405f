"""cvt between integers and floats, and cvta between state spaces and generic addresses."""

from collections.abc import Callable

import numpy as np

from .arithmetic import rounding_mode
from .operation import Builder, Operation, elementwise, unsupported
from .parse import Instruction
from .rounding import INTEGRAL, Array, bf16_bits, f16_bits, flush, saturate, tf32_bits, to_float32, to_integer
from .values import UNSIGNED, WIDTH, WINDOWS, integer_dtype, is_float


def cvt(instruction: Instruction) -> Operation:
    to, from_ = instruction.parts[-2:]
    if to in ("f16x2", "bf16x2"):
        return pair(instruction, to)
    if to == "tf32":
        mode = next(part for part in instruction.parts if part in ("rna", "rn", "rz"))
        return elementwise(instruction, from_, lambda a: tf32_bits(a, mode), "b32")
    if is_float(from_) and is_float(to):
        return float_to_float(instruction, to, from_)
    if is_float(from_):
        return float_to_integer(instruction, to, from_)
    if is_float(to):
        return integer_to_float(instruction, to, from_)
    if "sat" in instruction.parts:
        return elementwise(instruction, from_, lambda a: saturated(a, to), to)
    return elementwise(instruction, from_, lambda a: a, to)


def float_to_integer(instruction: Instruction, to: str, from_: str) -> Operation:
    mode = integral_mode(instruction)
    if mode is None:
        raise unsupported(instruction)
    dtype, ftz = integer_dtype(to), "ftz" in instruction.parts
    return elementwise(instruction, from_, lambda a: to_integer(flush(a) if ftz else a, mode, dtype), to)


def integral_mode(instruction: Instruction) -> str | None:
    return next((part for part in instruction.parts if part in INTEGRAL), None)


def saturated(value: Array, to: str) -> Array:
    limits, own = np.iinfo(integer_dtype(to)), np.iinfo(value.dtype)
    return np.clip(value, max(limits.min, own.min), min(limits.max, own.max))


def pair(instruction: Instruction, to: str) -> Operation:
    """Two f32 into one register; the first source is the upper half."""
    relu = "relu" in instruction.parts
    bits = half_bits(instruction, to[:-2])

    def apply(high: Array, low: Array) -> Array:
        both = [np.maximum(half, np.float32(0)) if relu else half for half in (low, high)]
        return bits(both[0]).astype(np.uint32) | (bits(both[1]).astype(np.uint32) << np.uint32(16))

    return elementwise(instruction, "f32", apply, "b32")


def half_bits(instruction: Instruction, to: str) -> Callable[[Array], Array]:
    mode = rounding_mode(instruction)
    if mode not in ("rn", "rz"):
        raise unsupported(instruction)
    return lambda values: (f16_bits if to == "f16" else bf16_bits)(values, mode)


def float_to_float(instruction: Instruction, to: str, from_: str) -> Operation:
    parts, whole, mode = instruction.parts, integral_mode(instruction), rounding_mode(instruction)

    def prepared(values: Array) -> Array:
        if "ftz" in parts and from_ == "f32":
            values = flush(values)
        if whole:
            values = INTEGRAL[whole](values)
        if "sat" in parts:
            values = saturate(values)
        return np.maximum(values, values.dtype.type(0)) if "relu" in parts else values

    if to in ("f16", "bf16"):
        bits = half_bits(instruction, to)
        return elementwise(instruction, from_, lambda a: bits(prepared(a)), "b16")
    if to == "f32" and from_ == "f64":
        return elementwise(instruction, from_, lambda a: finish(to_float32(prepared(a), mode), "ftz" in parts), to)
    return elementwise(instruction, from_, prepared, to)


def finish(values: Array, ftz: bool) -> Array:
    return flush(values) if ftz else values


def integer_to_float(instruction: Instruction, to: str, from_: str) -> Operation:
    mode = rounding_mode(instruction)
    if to == "f64" or mode == "rn":
        dtype = np.float32 if to == "f32" else np.float64
        return elementwise(instruction, from_, lambda a: a.astype(dtype), to)
    if WIDTH[from_] == 8 or to != "f32":
        raise unsupported(instruction)
    return elementwise(instruction, from_, lambda a: to_float32(a.astype(np.float64), mode), to)


def cvta(instruction: Instruction) -> Operation:
    """To and from generic addresses; global ones are the same."""
    space = next(part for part in instruction.parts if part in WINDOWS)
    type_ = instruction.type
    window = UNSIGNED[WIDTH[type_]](WINDOWS[space] & ((1 << 8 * WIDTH[type_]) - 1))
    return elementwise(instruction, type_, (lambda a: a - window) if "to" in instruction.parts else (lambda a: a + window))


BUILDERS: dict[str, Builder] = {"cvt": cvt, "cvta": cvta}
