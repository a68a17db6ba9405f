"""Bits: moves, logic, shifts, fields, permutations; comparisons and selections."""

import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from .arithmetic import finished
from .operation import Builder, Operation, elementwise, unsupported
from .parse import Instruction, Pair, Vector
from .rounding import Array
from .values import UNSIGNED, WIDTH, is_float


def bit_type(type_: str) -> str:
    return type_ if type_ in ("pred", "f32", "f64") else f"b{8 * WIDTH[type_]}"


def mov(instruction: Instruction) -> Operation:
    """A move, or the packing and unpacking of a vector of smaller registers."""
    result, source = instruction.operands
    type_ = instruction.type
    if isinstance(result, Vector):
        return unpack(instruction, result)
    if isinstance(source, Vector):
        return pack(instruction, source)
    return Operation(((result, bit_type(type_)),), ((source, bit_type(type_)),), lambda value: value)


def unpack(instruction: Instruction, vector: Vector) -> Operation:
    width = WIDTH[instruction.type]
    part = 8 * width // len(vector.items)
    shifts = [UNSIGNED[width](part * index) for index in range(len(vector.items))]
    results = tuple((item, f"b{part}") for item in vector.items)
    return Operation(results, ((instruction.operands[1], f"b{8 * width}"),), lambda value: tuple(value >> shift for shift in shifts))


def pack(instruction: Instruction, vector: Vector) -> Operation:
    width = WIDTH[instruction.type]
    part = 8 * width // len(vector.items)
    whole = UNSIGNED[width]

    def apply(*items: Array) -> Array:
        packed = whole(0)
        for index, item in enumerate(items):
            packed = packed | (item.astype(whole) << whole(part * index))
        return np.asarray(packed)

    return Operation(((instruction.operands[0], f"b{8 * width}"),), tuple((item, f"b{part}") for item in vector.items), apply)


def bitwise(instruction: Instruction) -> Operation:
    function = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}[instruction.opcode]
    return elementwise(instruction, instruction.type, function)


def cnot(instruction: Instruction) -> Operation:
    return elementwise(instruction, instruction.type, lambda a: (a == 0).astype(a.dtype))


def shift_left(value: Array, amount: Array) -> Array:
    """Shifts by the width or more leave nothing."""
    bits = 8 * value.dtype.itemsize
    shifted: Array = value << np.minimum(amount, bits - 1).astype(value.dtype)
    return np.where(amount >= bits, np.zeros_like(value), shifted)


def shift_right(value: Array, amount: Array) -> Array:
    """Shifts by the width or more leave nothing, or the sign."""
    bits = 8 * value.dtype.itemsize
    shifted: Array = value >> np.minimum(amount, bits - 1).astype(value.dtype)
    return shifted if value.dtype.kind == "i" else np.where(amount >= bits, np.zeros_like(value), shifted)


def shift(instruction: Instruction) -> Operation:
    result, value, amount = instruction.operands
    apply = shift_left if instruction.opcode == "shl" else shift_right
    return Operation(((result, instruction.type),), ((value, instruction.type), (amount, "u32")), apply)


def funnel(instruction: Instruction) -> Operation:
    """shf: 32 bits out of the 64 of two registers."""
    left, clamp = instruction.parts[0] == "l", "clamp" in instruction.parts

    def apply(low: Array, high: Array, amount: Array) -> Array:
        both = low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))
        count = (np.minimum(amount, 32) if clamp else amount & np.uint32(31)).astype(np.uint64)
        return (both << count) >> np.uint64(32) if left else both >> count

    return elementwise(instruction, "b32", apply)


def low_ones(count: Array, dtype: "np.dtype[Any]") -> Array:
    """As many ones from the lowest bit up."""
    return ~shift_left(~dtype.type(0) * np.ones_like(count, dtype), count)


def extract(instruction: Instruction) -> Operation:
    """bfe: a field of ``length`` bits from ``start``, extended by its sign where the type has one."""
    type_ = instruction.type
    unsigned, bits = UNSIGNED[WIDTH[type_]], 8 * WIDTH[type_]

    def apply(value: Array, start: Array, length: Array) -> Array:
        start, length = start & np.uint32(255), length & np.uint32(255)
        ones = low_ones(length, np.dtype(unsigned))
        raw = value.view(unsigned)
        field = shift_right(raw, start) & ones
        if type_[0] == "u":
            return field
        top = np.minimum(start + length - np.uint32(1), np.uint32(bits - 1))
        negative = (shift_right(raw, top) & unsigned(1) == 1) & (length > 0)
        held = low_ones(np.where(start < bits, bits - np.minimum(start, bits), 0), np.dtype(unsigned))  # bits of the value above start
        return np.where(negative, field | ~(ones & held), field)

    return field_operation(instruction, apply, (type_,))


def insert(instruction: Instruction) -> Operation:
    """bfi: the low ``length`` bits of the first source put into the second from ``start`` up."""

    def apply(field: Array, base: Array, start: Array, length: Array) -> Array:
        start, length = start & np.uint32(255), length & np.uint32(255)
        mask = shift_left(low_ones(length, field.dtype), start)
        return (base & ~mask) | (shift_left(field, start) & mask)

    return field_operation(instruction, apply, (instruction.type, instruction.type))


def field_operation(instruction: Instruction, apply: Callable[..., Array], types: tuple[str, ...]) -> Operation:
    result, *sources = instruction.operands
    return Operation(((result, instruction.type),), tuple(zip(sources, (*types, "u32", "u32"), strict=True)), apply)


def lop3(instruction: Instruction) -> Operation:
    """Any function of three bits: bit ``4a + 2b + c`` of the table is its value."""
    result, a, b, c, table = instruction.operands

    def apply(a: Array, b: Array, c: Array, table: Array) -> Array:
        value = np.uint32(0) * a
        for index in range(8):
            if int(table) >> index & 1:
                value = value | ((a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c))
        return value

    return Operation(((result, "b32"),), tuple((operand, "b32") for operand in (a, b, c, table)), apply)


def prmt(instruction: Instruction) -> Operation:
    """Bytes of two registers chosen by four nibbles; bit 3 of a nibble spreads the byte's sign instead."""
    if instruction.parts != ("b32",):
        raise unsupported(instruction)

    def apply(low: Array, high: Array, selector: Array) -> Array:
        both = low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))
        result = np.uint64(0)
        for index in range(4):
            nibble = (selector >> np.uint32(4 * index)).astype(np.uint64)
            byte = both >> (np.uint64(8) * (nibble & np.uint64(7))) & np.uint64(255)
            byte = np.where(nibble & np.uint64(8), (byte >> np.uint64(7)) * np.uint64(255), byte)
            result = result | (byte << np.uint64(8 * index))
        return np.asarray(result)

    return elementwise(instruction, "b32", apply)


def bit_length(value: Array) -> Array:
    """How many bits an unsigned number has, as uint32."""
    length = np.zeros_like(value)
    for step in (32, 16, 8, 4, 2, 1):
        if step < 8 * value.dtype.itemsize:
            large = (value >> value.dtype.type(step)) > 0
            length = length + large * value.dtype.type(step)
            value = np.where(large, value >> value.dtype.type(step), value)
    return (length + value).astype(np.uint32)


def count_bits(instruction: Instruction) -> Operation:
    type_ = f"b{8 * WIDTH[instruction.type]}"
    bits = np.uint32(8 * WIDTH[type_])
    if instruction.opcode == "popc":
        return elementwise(instruction, type_, np.bitwise_count, "u32")
    return elementwise(instruction, type_, lambda a: bits - bit_length(a), "u32")


def bfind(instruction: Instruction) -> Operation:
    """The highest bit that differs from the sign, or all ones; with .shiftamt the shift that brings it to the top."""
    type_ = instruction.type
    unsigned, top = UNSIGNED[WIDTH[type_]], np.uint32(8 * WIDTH[type_] - 1)

    def apply(value: Array) -> Array:
        found = bit_length(np.where(value < 0, ~value, value).view(unsigned)) - np.uint32(1)
        return np.where(found == np.uint32(0xFFFFFFFF), found, top - found) if "shiftamt" in instruction.parts else found

    return elementwise(instruction, type_, apply, "u32")


def brev(instruction: Instruction) -> Operation:
    def apply(value: Array) -> Array:
        whole = value.dtype.type
        bits = 8 * value.dtype.itemsize
        step = 1
        while step < bits:
            mask = whole(sum(((1 << step) - 1) << start for start in range(0, bits, 2 * step)))
            value = ((value >> whole(step)) & mask) | ((value & mask) << whole(step))
            step *= 2
        return value

    return elementwise(instruction, instruction.type, apply)


COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "lo": operator.lt,
    "ls": operator.le,
    "hi": operator.gt,
    "hs": operator.ge,
}
COMBINATIONS: dict[str, Callable[[Any, Any], Any]] = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}


def comparison(instruction: Instruction, type_: str) -> Callable[[Array, Array], Array]:
    """The named comparison; with NaN, those that end in u are true and the others false."""
    name = instruction.parts[0]
    if name in ("num", "nan"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan")
    if not is_float(type_):
        return COMPARISONS[name]
    unordered = len(name) == 3 and name.endswith("u")
    compare = COMPARISONS[name[:2]]
    if unordered:
        return lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b)
    return lambda a, b: compare(a, b) & ~np.isnan(a) & ~np.isnan(b)


def compared(instruction: Instruction, type_: str) -> tuple[Callable[..., tuple[Array, Array]], tuple[str, ...]]:
    """The comparison with its optional combination with a predicate, for it and for its negation; and the types of the sources."""
    compare = comparison(instruction, type_)
    if "ftz" in instruction.parts:
        ordered = compare
        flushed = finished(instruction, lambda a: a)

        def compare(a: Array, b: Array) -> Array:
            return ordered(flushed(a), flushed(b))

    combine = next((COMBINATIONS[part] for part in instruction.parts[1:] if part in COMBINATIONS), None)
    if combine is None:

        def alone(a: Array, b: Array) -> tuple[Array, Array]:
            holds = compare(a, b)
            return holds, ~holds

        return alone, (type_, type_)

    def combined(a: Array, b: Array, predicate: Array) -> tuple[Array, Array]:
        holds = compare(a, b)
        return combine(holds, predicate), combine(~holds, predicate)

    return combined, (type_, type_, "pred")


def setp(instruction: Instruction) -> Operation:
    result, *sources = instruction.operands
    apply, types = compared(instruction, instruction.type)
    typed = tuple(zip(sources, types, strict=True))
    if instruction.type.endswith("x2"):  # one result of each half
        assert isinstance(result, Pair)

        def by_half(a: Array, b: Array, *predicate: Array) -> tuple[Array, Array]:
            holds, _ = apply(a, b, *(each[..., None] for each in predicate))
            return holds[..., 0], holds[..., 1]

        return Operation(((result.first, "pred"), (result.second, "pred")), typed, by_half)
    if isinstance(result, Pair):
        return Operation(((result.first, "pred"), (result.second, "pred")), typed, apply)
    return Operation(((result, "pred"),), typed, lambda *arrays: apply(*arrays)[0])


def set_(instruction: Instruction) -> Operation:
    """Like setp, but true is 1.0 or all ones."""
    result, *sources = instruction.operands
    to, type_ = instruction.parts[-2:]
    apply, types = compared(instruction, type_)
    true: Any = np.float32(1) if is_float(to) else UNSIGNED[WIDTH[to]](2 ** (8 * WIDTH[to]) - 1)
    results = ((result, to if is_float(to) else f"u{8 * WIDTH[to]}"),)
    return Operation(results, tuple(zip(sources, types, strict=True)), lambda *arrays: np.where(apply(*arrays)[0], true, type(true)(0)))


def selp(instruction: Instruction) -> Operation:
    result, a, b, predicate = instruction.operands
    type_ = bit_type(instruction.type)
    return Operation(((result, type_),), ((a, type_), (b, type_), (predicate, "pred")), lambda a, b, choose: np.where(choose, a, b))


def slct(instruction: Instruction) -> Operation:
    result, a, b, selector = instruction.operands
    type_, by = bit_type(instruction.parts[-2]), instruction.type
    return Operation(((result, type_),), ((a, type_), (b, type_), (selector, by)), lambda a, b, c: np.where(c >= 0, a, b))


def testp(instruction: Instruction) -> Operation:
    """Classes of floats."""
    tiny = np.finfo(np.float32 if instruction.type == "f32" else np.float64).tiny
    tests: dict[str, Callable[[Array], Array]] = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda a: ~np.isnan(a),
        "notanumber": np.isnan,
        "normal": lambda a: np.isfinite(a) & (np.abs(a) >= tiny),
        "subnormal": lambda a: (np.abs(a) < tiny) & (a != 0),
    }
    return elementwise(instruction, instruction.type, tests[instruction.parts[0]], "pred")


BUILDERS: dict[str, Builder] = {
    "mov": mov,
    "and": bitwise,
    "or": bitwise,
    "xor": bitwise,
    "not": bitwise,
    "cnot": cnot,
    "shl": shift,
    "shr": shift,
    "shf": funnel,
    "bfe": extract,
    "bfi": insert,
    "lop3": lop3,
    "prmt": prmt,
    "popc": count_bits,
    "clz": count_bits,
    "bfind": bfind,
    "brev": brev,
    "setp": setp,
    "set": set_,
    "selp": selp,
    "slct": slct,
    "testp": testp,
}
