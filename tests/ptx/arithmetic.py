"""Integer and floating-point arithmetic that is exact or rounded once."""

from collections.abc import Callable
from typing import Any

import numpy as np

from .operation import CARRY, Builder, Operation, elementwise, unsupported
from .parse import Instruction
from .rounding import Array, add_to_odd, flush, fma, fma64, saturate, to_float32
from .values import SIGNED, UNSIGNED, WIDTH, integer_dtype, is_float

SINGLE = ("f32", "f32x2")
MODES = ("rn", "rz", "rm", "rp")
Binary = Callable[[Array, Array], Array]


def wide_type(type_: str) -> str:
    return f"{type_[0]}{16 * WIDTH[type_]}"


def finished(instruction: Instruction, apply: Callable[..., Any]) -> Callable[..., Any]:
    """``apply`` with the modifiers of floats around it: .ftz on both sides, then .sat or .relu."""
    parts = instruction.parts
    if "ftz" in parts and instruction.type in SINGLE:
        inner = apply

        def apply(*sources: Array) -> Array:
            return flush(inner(*(flush(source) for source in sources)))

    if "sat" in parts:
        return lambda *sources: saturate(apply(*sources))
    if "relu" in parts:
        return lambda *sources: np.maximum(apply(*sources), np.float32(0))  # NaN stays
    return apply


def rounding_mode(instruction: Instruction) -> str:
    return next((part for part in instruction.parts if part in MODES), "rn")


def float_operation(instruction: Instruction, exact: Callable[..., Array], native: Callable[..., Array]) -> Operation:
    """``native`` is rounded to nearest in f32 or f64; ``exact`` gives float64, rounded to odd, for the other modes and formats."""
    type_, mode = instruction.type, rounding_mode(instruction)
    if type_ == "f64" and mode != "rn":
        raise unsupported(instruction)
    if type_ == "f64" or (type_ in SINGLE and mode == "rn"):
        return elementwise(instruction, type_, finished(instruction, native))
    if type_ in SINGLE:
        return elementwise(instruction, type_, finished(instruction, lambda *sources: to_float32(exact(*sources), mode)))
    return elementwise(instruction, type_, finished(instruction, exact))


def wide(array: Array) -> Array:
    return np.asarray(array, np.float64)


def add(instruction: Instruction) -> Operation:
    if is_float(instruction.type):
        return float_operation(instruction, lambda a, b: add_to_odd(wide(a), wide(b)), np.add)
    return integer_sum(instruction, np.add)


def sub(instruction: Instruction) -> Operation:
    if is_float(instruction.type):
        return float_operation(instruction, lambda a, b: add_to_odd(wide(a), -wide(b)), np.subtract)
    return integer_sum(instruction, np.subtract)


def integer_sum(instruction: Instruction, sum_: Binary) -> Operation:
    type_, parts = instruction.type, instruction.parts
    if "cc" in parts:
        unsigned = f"u{8 * WIDTH[type_]}"
        carry = (lambda a, b: a + b < a) if sum_ is np.add else np.less
        results = ((instruction.operands[0], unsigned), (CARRY, "pred"))
        sources = tuple((operand, unsigned) for operand in instruction.operands[1:])
        return Operation(results, sources, lambda a, b: (sum_(a, b), carry(a, b)))
    if "sat" in parts:
        limits = np.iinfo(integer_dtype(type_))
        return elementwise(instruction, type_, lambda a, b: np.clip(sum_(a.astype(np.int64), b.astype(np.int64)), limits.min, limits.max))
    return elementwise(instruction, type_, sum_)


def with_carry(instruction: Instruction) -> Operation:
    """addc and subc: the flag is a third source, and with .cc a second result."""
    unsigned = f"u{8 * WIDTH[instruction.type]}"
    adds = instruction.opcode == "addc"

    def apply(a: Array, b: Array, flag: Array) -> tuple[Array, Array]:
        extra = flag.astype(a.dtype)
        first = a + b if adds else a - b
        result = first + extra if adds else first - extra
        out = (first < a) | (result < first) if adds else (a < b) | (first < extra)
        return result, out

    return carried(instruction, unsigned, apply)


def carried(instruction: Instruction, unsigned: str, apply: Callable[..., tuple[Array, Array]]) -> Operation:
    first, *operands = instruction.operands
    sources = (*((operand, unsigned) for operand in operands), (CARRY, "pred"))
    if "cc" in instruction.parts:
        return Operation(((first, unsigned), (CARRY, "pred")), sources, apply)
    return Operation(((first, unsigned),), sources, lambda *arrays: apply(*arrays)[0])


def high_product(a: Array, b: Array) -> Array:
    """The upper half of the product of two integers of one type."""
    bits = 8 * a.dtype.itemsize
    if bits < 64:
        return (a.astype(np.int64 if a.dtype.kind == "i" else np.uint64) * b >> bits).astype(a.dtype)
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    x, y = a.view(np.uint64), b.view(np.uint64)
    x0, x1, y0, y1 = x & low, x >> shift, y & low, y >> shift
    middle = x1 * y0 + (x0 * y0 >> shift)
    other = x0 * y1 + (middle & low)
    high = x1 * y1 + (middle >> shift) + (other >> shift)
    if a.dtype.kind == "i":  # as unsigned, a negative number is 2^64 too large
        high = high - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
    return np.asarray(high).view(a.dtype)


def product(instruction: Instruction) -> Binary:
    parts = instruction.parts
    if "hi" in parts:
        return high_product
    if "wide" in parts:
        dtype = integer_dtype(wide_type(instruction.type))
        return lambda a, b: a.astype(dtype) * b.astype(dtype)
    return np.multiply


def mul(instruction: Instruction) -> Operation:
    type_ = instruction.type
    if is_float(type_):
        return float_operation(instruction, lambda a, b: wide(a) * wide(b), np.multiply)
    return elementwise(instruction, type_, product(instruction), wide_type(type_) if "wide" in instruction.parts else type_)


def mad(instruction: Instruction) -> Operation:
    type_ = instruction.type
    if is_float(type_):
        return fused(instruction)
    if instruction.opcode == "madc" or "cc" in instruction.parts:
        return carried_mad(instruction)
    multiply = product(instruction)
    sum_type = wide_type(type_) if "wide" in instruction.parts else type_
    result, a, b, c = instruction.operands
    return Operation(((result, sum_type),), ((a, type_), (b, type_), (c, sum_type)), lambda a, b, c: multiply(a, b) + c)


def carried_mad(instruction: Instruction) -> Operation:
    width = WIDTH[instruction.type]
    signed, unsigned, multiply = SIGNED[width], UNSIGNED[width], product(instruction)
    reads, is_signed = instruction.opcode == "madc", instruction.type[0] == "s"

    def apply(a: Array, b: Array, c: Array, flag: Array) -> tuple[Array, Array]:
        term = np.asarray(multiply(a.view(signed), b.view(signed)) if is_signed else multiply(a, b)).view(unsigned)
        extra = flag.astype(unsigned) if reads else unsigned(0)
        first = term + c
        return first + extra, (first < term) | (first + extra < first)

    return carried(instruction, f"u{8 * width}", apply)


def fused(instruction: Instruction) -> Operation:
    mode = rounding_mode(instruction)
    return float_operation(instruction, fma, fma64 if instruction.type == "f64" else lambda a, b, c: to_float32(fma(a, b, c), mode))


def div(instruction: Instruction) -> Operation:
    type_ = instruction.type
    if not is_float(type_):
        return elementwise(instruction, type_, integer_quotient)
    if rounding_mode(instruction) != "rn":
        raise unsupported(instruction)
    return elementwise(instruction, type_, finished(instruction, np.divide))


def integer_quotient(a: Array, b: Array) -> Array:
    """Towards zero; by zero, all bits are set (PTX leaves it open, this is what the hardware's routine gives)."""
    down = a // b
    inexact = down * b != a
    quotient = down + (inexact & ((a < 0) != (b < 0))).astype(a.dtype)
    return np.where(b == 0, ~np.zeros_like(a), quotient)


def rem(instruction: Instruction) -> Operation:
    return elementwise(instruction, instruction.type, lambda a, b: np.where(b == 0, a, np.fmod(a, b)))


def extremum(instruction: Instruction) -> Operation:
    """min and max. Of floats: the other operand beats NaN unless .NaN is said, and -0 is less than +0."""
    smallest, type_ = instruction.opcode == "min", instruction.type
    if not is_float(type_):
        return elementwise(instruction, type_, np.minimum if smallest else np.maximum)
    propagate = "NaN" in instruction.parts

    def apply(*sources: Array) -> Array:
        chosen = sources[0]
        for other in sources[1:]:
            first = (chosen < other) if smallest else (chosen > other)
            first = first | ((chosen == other) & (np.signbit(chosen) == smallest))
            first = first | (np.isnan(chosen) if propagate else np.isnan(other))
            chosen = np.where(first, chosen, other)
        return chosen

    return elementwise(instruction, type_, finished(instruction, apply))


def sign_bits(instruction: Instruction) -> Operation:
    """neg and abs. Of floats they touch the sign bit alone, of NaN too."""
    type_, negate = instruction.type, instruction.opcode == "neg"
    if not is_float(type_):
        return elementwise(instruction, type_, np.negative if negate else np.abs)
    if "ftz" in instruction.parts:
        return elementwise(instruction, type_, finished(instruction, np.negative if negate else np.abs))
    width = WIDTH[type_]
    bits = UNSIGNED[width]
    mask = bits(0x80008000 if type_.endswith("x2") else 1 << (8 * width - 1))
    return elementwise(instruction, f"b{8 * width}", (lambda a: a ^ mask) if negate else (lambda a: a & ~mask))


def copysign(instruction: Instruction) -> Operation:
    return elementwise(instruction, instruction.type, lambda sign, magnitude: np.copysign(magnitude, sign))


def sad(instruction: Instruction) -> Operation:
    return elementwise(instruction, instruction.type, lambda a, b, c: c + np.where(a < b, b - a, a - b))


BUILDERS: dict[str, Builder] = {
    "add": add,
    "sub": sub,
    "addc": with_carry,
    "subc": with_carry,
    "mul": mul,
    "mad": mad,
    "madc": mad,
    "fma": fused,
    "div": div,
    "rem": rem,
    "min": extremum,
    "max": extremum,
    "neg": sign_bits,
    "abs": sign_bits,
    "copysign": copysign,
    "sad": sad,
}
