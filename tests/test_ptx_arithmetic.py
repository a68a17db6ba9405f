"""Every arithmetic, logic and conversion instruction of the PTX machine against Python's integers and fractions, over edge cases."""

import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from ptx.rounding import Array, add_to_odd, fma, to_float32
from ptx.write import evaluate

WIDTHS = {"u16": np.uint16, "s16": np.int16, "u32": np.uint32, "s32": np.int32, "u64": np.uint64, "s64": np.int64}
SHIFTS = np.array([0, 1, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 256, 0x80000000, 0xFFFFFFFF], np.uint32)
FLOATS = np.array(
    [
        0.0,
        -0.0,
        1.0,
        -1.0,
        1.5,
        3.0,
        1 / 3,
        -2.5,
        1e-38,
        1e-45,
        -1e-45,
        3e38,
        -3e38,
        1e20,
        16777217,
        0.1,
        np.inf,
        -np.inf,
        np.nan,
        2**-126,
        5e-39,
    ],
    np.float32,
)


def integers(type_: str, count: int = 8) -> Array:
    """Edges of a type and a few numbers between."""
    limits = np.iinfo(WIDTHS[type_])
    edges = [0, 1, 2, 7, limits.max, limits.max - 1, limits.min, limits.min + 1, -1 if limits.min else limits.max // 2 + 1]
    rng = np.random.default_rng(3)
    return np.concatenate([np.array(edges, WIDTHS[type_]), rng.integers(limits.min, limits.max, count, WIDTHS[type_], endpoint=True)])


def pairs(first: Array, second: Array) -> tuple[Array, Array]:
    a, b = np.meshgrid(first, second, indexing="ij")
    return a.reshape(-1), b.reshape(-1)


def triples(values: Array) -> tuple[Array, ...]:
    return tuple(array.reshape(-1) for array in np.meshgrid(values, values, values, indexing="ij"))


def wrapped(value: int, dtype: Any) -> int:
    """An integer modulo the width of a dtype."""
    bits = 8 * np.dtype(dtype).itemsize
    value &= (1 << bits) - 1
    return value - (1 << bits) if np.iinfo(dtype).min and value >> (bits - 1) else value


def apply(function: Callable[..., int], dtype: Any, *arrays: Array) -> Array:
    return np.array([wrapped(function(*(int(item) for item in items)), dtype) for items in zip(*arrays, strict=True)], dtype)


def bits_of(array: Array) -> Array:
    return array.view(f"u{array.dtype.itemsize}")


def assert_same(found: Array, expected: Array) -> None:
    """The same bits, but any NaN for a NaN."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.dtype == expected.dtype
    if found.dtype.kind == "f":
        assert np.array_equal(np.isnan(found), np.isnan(expected))
        numbers = ~np.isnan(expected)
        found, expected = bits_of(found)[numbers], bits_of(expected)[numbers]
    np.testing.assert_array_equal(found, expected)


def nearest(exact: Fraction, dtype: Any, mode: str = "rn") -> float:
    """A fraction rounded to float16, float32 or float64, by looking at the neighbours of a guess."""
    largest = np.finfo(dtype).max
    with np.errstate(over="ignore"):
        start = dtype(float(max(-Fraction(float(largest)), min(Fraction(float(largest)), exact))))
        candidates = {float(start), *(float(np.nextafter(start, dtype(way))) for way in (-np.inf, np.inf))}
    limit = Fraction(float(np.finfo(dtype).max))
    step = limit - Fraction(float(np.nextafter(np.finfo(dtype).max, dtype(0))))
    place = {value: Fraction(value) if math.isfinite(value) else (limit + step) * (1 if value > 0 else -1) for value in candidates}
    if mode != "rn":
        fits = {
            "rm": lambda value: value <= exact,
            "rp": lambda value: value >= exact,
            "rz": lambda value: abs(value) <= abs(exact),
        }[mode]
        candidates = {value for value in candidates if fits(value)}
    integer = {2: np.uint16, 4: np.uint32, 8: np.uint64}[np.dtype(dtype).itemsize]
    return min(candidates, key=lambda value: (abs(place[value] - exact), int(np.array(value, dtype).view(integer)) & 1))


def exactly(function: Callable[..., Fraction], native: Callable[..., Array], dtype: Any, mode: str, *arrays: Array) -> Array:
    """Rounded from fractions where these are defined and not zero, else what numpy gives."""
    with np.errstate(all="ignore"):
        result = np.array(native(*(array.astype(np.float64) for array in arrays)).astype(dtype))
    for index, items in enumerate(zip(*arrays, strict=True)):
        if all(np.isfinite(items)):
            exact = function(*(Fraction(float(item)) for item in items))
            if exact:
                result[index] = nearest(exact, dtype, mode)
    return result


@pytest.mark.parametrize("type_", WIDTHS)
def test_integer_arithmetic(type_: str) -> None:
    dtype = WIDTHS[type_]
    a, b = pairs(integers(type_), integers(type_))
    for name, function in {"add": int.__add__, "sub": int.__sub__, "mul.lo": int.__mul__, "min": min, "max": max}.items():
        assert_same(evaluate(f"{name}.{type_} %d, %a, %b", {"d": dtype}, a=a, b=b)["d"], apply(function, dtype, a, b))
    high = apply(lambda x, y: x * y >> 8 * a.itemsize, dtype, a, b)
    assert_same(evaluate(f"mul.hi.{type_} %d, %a, %b", {"d": dtype}, a=a, b=b)["d"], high)
    assert_same(evaluate(f"mad.lo.{type_} %d, %a, %b, %a", {"d": dtype}, a=a, b=b)["d"], apply(lambda x, y: x * y + x, dtype, a, b))
    some, divisor = a[b != 0], b[b != 0]
    quotient = apply(lambda x, y: abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1), dtype, some, divisor)
    remainder = apply(lambda x, y: int(math.copysign(1, x)) * (abs(x) % abs(y)), dtype, some, divisor)
    assert_same(evaluate(f"div.{type_} %d, %a, %b", {"d": dtype}, a=some, b=divisor)["d"], quotient)
    assert_same(evaluate(f"rem.{type_} %d, %a, %b", {"d": dtype}, a=some, b=divisor)["d"], remainder)


@pytest.mark.parametrize("type_", ["u16", "s16", "u32", "s32"])
def test_wide_products(type_: str) -> None:
    wide = WIDTHS[f"{type_[0]}{2 * int(type_[1:])}"]
    a, b = pairs(integers(type_), integers(type_))
    c = np.resize(integers(f"{type_[0]}{2 * int(type_[1:])}"), a.shape)
    assert_same(evaluate(f"mul.wide.{type_} %d, %a, %b", {"d": wide}, a=a, b=b)["d"], apply(int.__mul__, wide, a, b))
    assert_same(
        evaluate(f"mad.wide.{type_} %d, %a, %b, %c", {"d": wide}, a=a, b=b, c=c)["d"], apply(lambda x, y, z: x * y + z, wide, a, b, c)
    )


@pytest.mark.parametrize("type_", ["s16", "s32", "s64"])
def test_signs(type_: str) -> None:
    dtype, a = WIDTHS[type_], integers(type_)
    assert_same(evaluate(f"neg.{type_} %d, %a", {"d": dtype}, a=a)["d"], apply(int.__neg__, dtype, a))
    assert_same(evaluate(f"abs.{type_} %d, %a", {"d": dtype}, a=a)["d"], apply(abs, dtype, a))


def test_saturating_sum() -> None:
    a, b = pairs(integers("s32"), integers("s32"))
    expected = apply(lambda x, y: max(-(2**31), min(2**31 - 1, x + y)), np.int32, a, b)
    assert_same(evaluate("add.sat.s32 %d, %a, %b", {"d": np.int32}, a=a, b=b)["d"], expected)


def test_carries() -> None:
    """96-bit sums and differences of three registers."""
    rng = np.random.default_rng(0)
    words = rng.choice(np.array([0, 1, 0xFFFFFFFF, 0x80000000, 12345], np.uint32), (6, 500))
    names = dict(zip("abcxyz", words, strict=True))
    for add, chain in (("add", "addc"), ("sub", "subc")):
        code = f"{add}.cc.u32 %d, %a, %x; {chain}.cc.u32 %e, %b, %y; {chain}.u32 %g, %c, %z;"
        found = evaluate(code, {"d": np.uint32, "e": np.uint32, "g": np.uint32}, **names)
        for index in range(500):
            left, right = (sum(int(names[key][index]) << 32 * place for place, key in enumerate(keys)) for keys in ("abc", "xyz"))
            total = (left + right if add == "add" else left - right) % 2**96
            assert [int(found[key][index]) for key in "deg"] == [total >> shift & 0xFFFFFFFF for shift in (0, 32, 64)]


def test_product_with_carry() -> None:
    """A 64-bit product and sum from mad.lo.cc and madc.hi."""
    a, b = pairs(integers("u32"), integers("u32"))
    c = np.resize(integers("u32"), a.shape)
    code = "mad.lo.cc.u32 %d, %a, %b, %c; madc.hi.u32 %e, %a, %b, 7;"
    found = evaluate(code, {"d": np.uint32, "e": np.uint32}, a=a, b=b, c=c)
    total = found["d"].astype(np.uint64) | found["e"].astype(np.uint64) << np.uint64(32)
    assert_same(total, apply(lambda x, y, z: x * y + z + (7 << 32), np.uint64, a, b, c))


@pytest.mark.parametrize("type_", ["b16", "u16", "s16", "b32", "u32", "s32", "b64", "u64", "s64"])
def test_shifts(type_: str) -> None:
    bits = int(type_[1:])
    dtype = WIDTHS[f"{'s' if type_[0] == 's' else 'u'}{bits}"]
    a, b = pairs(integers(f"{'s' if type_[0] == 's' else 'u'}{bits}"), SHIFTS)
    assert_same(evaluate(f"shr.{type_} %d, %a, %b", {"d": dtype}, a=a, b=b)["d"], apply(lambda x, y: x >> min(y, bits), dtype, a, b))
    if type_[0] == "b":
        assert_same(evaluate(f"shl.{type_} %d, %a, %b", {"d": dtype}, a=a, b=b)["d"], apply(lambda x, y: x << min(y, bits), dtype, a, b))


@pytest.mark.parametrize("side", ["l", "r"])
@pytest.mark.parametrize("mode", ["wrap", "clamp"])
def test_funnel_shift(side: str, mode: str) -> None:
    low, amount = pairs(integers("u32"), SHIFTS)
    high = np.roll(low, 7)

    def expected(x: int, y: int, by: int) -> int:
        by = min(by, 32) if mode == "clamp" else by % 32
        both = y << 32 | x
        return both << by >> 32 if side == "l" else both >> by

    found = evaluate(f"shf.{side}.{mode}.b32 %d, %a, %b, %c", {"d": np.uint32}, a=low, b=high, c=amount)["d"]
    assert_same(found, apply(expected, np.uint32, low, high, amount))


@pytest.mark.parametrize("type_", ["u32", "s32", "u64", "s64"])
def test_extract_field(type_: str) -> None:
    """The manual's pseudo-code, bit by bit."""
    top = int(type_[1:]) - 1
    start, length = pairs(
        np.array([0, 1, 4, 31, 32, 40, 63, 64, 255, 256], np.uint32), np.array([0, 1, 5, 31, 32, 33, 63, 64, 255, 257], np.uint32)
    )
    rng = np.random.default_rng(1)
    value = rng.integers(np.iinfo(WIDTHS[type_]).min, np.iinfo(WIDTHS[type_]).max, start.size, WIDTHS[type_])

    def expected(x: int, start: int, length: int) -> int:
        start, length = start & 255, length & 255
        sign = 0 if type_[0] == "u" or length == 0 else x >> min(start + length - 1, top) & 1
        return sum((x >> start + i & 1 if i < length and start + i <= top else sign) << i for i in range(top + 1))

    found = evaluate(f"bfe.{type_} %d, %a, %b, %c", {"d": WIDTHS[type_]}, a=value, b=start, c=length)["d"]
    assert_same(found, apply(expected, WIDTHS[type_], value, start, length))


@pytest.mark.parametrize("bits", [32, 64])
def test_insert_field(bits: int) -> None:
    dtype = WIDTHS[f"u{bits}"]
    start, length = pairs(np.array([0, 1, 4, 31, 32, 63, 64, 255], np.uint32), np.array([0, 1, 5, 31, 32, 63, 64, 255], np.uint32))
    rng = np.random.default_rng(2)
    field, base = (rng.integers(0, np.iinfo(dtype).max, start.size, dtype) for _ in range(2))

    def expected(x: int, y: int, start: int, length: int) -> int:
        for i in range(length):
            if start + i < bits:
                y = y & ~(1 << start + i) | (x >> i & 1) << start + i
        return y

    found = evaluate(f"bfi.b{bits} %d, %a, %b, %c, %e", {"d": dtype}, a=field, b=base, c=start, e=length)["d"]
    assert_same(found, apply(expected, dtype, field, base, start, length))


def test_permute_bytes() -> None:
    rng = np.random.default_rng(4)
    a, b, selector = rng.integers(0, 2**32, (3, 500), np.uint32)

    def expected(x: int, y: int, s: int) -> int:
        content = (y << 32 | x).to_bytes(8, "little")
        chosen = [(content[s >> 4 * i & 7], s >> 4 * i & 8) for i in range(4)]
        return sum(((255 if byte & 128 else 0) if sign else byte) << 8 * i for i, (byte, sign) in enumerate(chosen))

    assert_same(
        evaluate("prmt.b32 %d, %a, %b, %c", {"d": np.uint32}, a=a, b=b, c=selector)["d"], apply(expected, np.uint32, a, b, selector)
    )


def test_three_input_logic() -> None:
    a, b, c = (np.array([word], np.uint32) for word in (0xF0F0F0F0, 0xCCCCCCCC, 0xAAAAAAAA))
    for table in (*range(0, 256, 15), 0x96, 0xE8, 0xCA, 0x1B):
        found = evaluate(f"lop3.b32 %d, %a, %b, %c, {table:#x}", {"d": np.uint32}, a=a, b=b, c=c)["d"]
        assert int(found[0]) == table * 0x01010101


@pytest.mark.parametrize("bits", [32, 64])
def test_bit_counts(bits: int) -> None:
    a = np.concatenate([integers(f"u{bits}"), WIDTHS[f"u{bits}"](1) << np.arange(bits, dtype=WIDTHS[f"u{bits}"])])
    for name, function in {
        f"popc.b{bits}": int.bit_count,
        f"clz.b{bits}": lambda x: bits - x.bit_length(),
        f"bfind.u{bits}": lambda x: x.bit_length() - 1,
        f"bfind.s{bits}": lambda x: (x if x < 1 << (bits - 1) else ~x % (1 << bits)).bit_length() - 1,
    }.items():
        assert_same(evaluate(f"{name} %d, %a", {"d": np.uint32}, a=a)["d"], apply(function, np.uint32, a))
    reverse = apply(lambda x: int(f"{x:0{bits}b}"[::-1], 2), a.dtype, a)
    assert_same(evaluate(f"brev.b{bits} %d, %a", {"d": a.dtype}, a=a)["d"], reverse)


def test_logic() -> None:
    a, b = pairs(integers("u64"), integers("u64"))
    for name, function in {"and": int.__and__, "or": int.__or__, "xor": int.__xor__}.items():
        assert_same(evaluate(f"{name}.b64 %d, %a, %b", {"d": np.uint64}, a=a, b=b)["d"], apply(function, np.uint64, a, b))
    assert_same(evaluate("not.b64 %d, %a", {"d": np.uint64}, a=a)["d"], ~a)
    assert_same(evaluate("cnot.b64 %d, %a", {"d": np.uint64}, a=a)["d"], (a == 0).astype(np.uint64))
    p, q = pairs(np.array([False, True]), np.array([False, True]))
    assert_same(evaluate("xor.pred %d, %p0, %x; not.pred %d, %d", {"d": np.bool_}, p0=p, x=q)["d"], p == q)


def test_packing_moves() -> None:
    a, b = (np.arange(5, dtype=np.uint16) + start for start in (100, 60000))
    joined = evaluate("mov.b32 %d, {%a, %b}", {"d": np.uint32}, a=a, b=b)["d"]
    assert_same(joined, a.astype(np.uint32) | b.astype(np.uint32) << np.uint32(16))
    split = evaluate("mov.b32 {%d, %e}, %a", {"d": np.uint16, "e": np.uint16}, a=joined)
    assert_same(split["d"], a)
    assert_same(split["e"], b)
    assert_same(evaluate("mov.b64 {_, %d}, %a", {"d": np.uint32}, a=np.array([2**40 + 3], np.uint64))["d"], np.array([256], np.uint32))


MODES = ["rn", "rz", "rm", "rp"]


@pytest.mark.parametrize("mode", MODES)
def test_float32_sums_and_products(mode: str) -> None:
    a, b = pairs(FLOATS, FLOATS)
    for name, function, native in (
        ("add", Fraction.__add__, np.add),
        ("sub", Fraction.__sub__, np.subtract),
        ("mul", Fraction.__mul__, np.multiply),
    ):
        found = evaluate(f"{name}.{mode}.f32 %d, %a, %b", {"d": np.float32}, a=a, b=b)["d"]
        expected = exactly(function, native, np.float32, mode, a, b)
        zero = expected == 0  # the sign of an exact zero depends on the mode: only the value is compared
        assert_same(np.where(zero, np.abs(found), found), np.where(zero, np.float32(0), expected))


@pytest.mark.parametrize("mode", MODES)
def test_float32_fma_rounds_once(mode: str) -> None:
    rng = np.random.default_rng(5)
    a, b = rng.standard_normal((2, 300)).astype(np.float32)
    c = (-a * b * np.float32(1 + 2**-20)).astype(np.float32)
    tie = np.float32(1 + 2**-12)  # its square is 1 + 2^-11 + 2^-24: half a unit above a float32
    a, b, c = (
        np.concatenate([x, y]) for x, y in ((a, np.full(3, tie)), (b, np.full(3, tie)), (c, np.array([0, 1e-30, -1e-30], np.float32)))
    )
    found = evaluate(f"fma.{mode}.f32 %d, %a, %b, %c", {"d": np.float32}, a=a, b=b, c=c)["d"]
    assert_same(found, exactly(lambda x, y, z: x * y + z, lambda x, y, z: x * y + z, np.float32, mode, a, b, c))


def test_float32_fma_edges() -> None:
    a, b, c = triples(FLOATS)
    with np.errstate(all="ignore"):
        found = to_float32(fma(a, b, c))
    expected = exactly(lambda x, y, z: x * y + z, lambda x, y, z: x * y + z, np.float32, "rn", a, b, c)
    assert_same(found, expected)


def test_float64_fma_rounds_once() -> None:
    rng = np.random.default_rng(6)
    a, b = rng.standard_normal((2, 100))
    a, b, c = (np.concatenate([x, [np.inf, 0.0, 1e300, np.nan]]) for x in (a, b, -a * b))
    found = evaluate("fma.rn.f64 %d, %a, %b, %c", {"d": np.float64}, a=a, b=b, c=c)["d"]
    assert_same(found, exactly(lambda x, y, z: x * y + z, lambda x, y, z: x * y + z, np.float64, "rn", a, b, c))


def test_odd_sum_is_exact_or_odd() -> None:
    total = add_to_odd(np.array([1.0, 1.0, 1.0]), np.array([2.0**-60, -(2.0**-60), 2.0]))
    assert [float(value) for value in total] == [1 + 2**-52, 1 - 2**-53, 3.0]


def test_half_arithmetic() -> None:
    """f16, alone and in pairs, rounds once."""
    rng = np.random.default_rng(7)
    edges = np.array([0, 1, -1, 65504, 6e-8, 6e-5, 1 / 3, 2048, 2049, np.inf, np.nan], np.float16)
    a, b = pairs(np.concatenate([edges, rng.standard_normal(8).astype(np.float16)]), edges)
    c = np.resize(rng.standard_normal(37).astype(np.float16), a.shape)
    product = exactly(lambda x, y, z: x * y + z, lambda x, y, z: x * y + z, np.float16, "rn", a, b, c)
    bits = evaluate("fma.rn.f16 %d, %a, %b, %c", {"d": np.uint16}, a=a.view(np.uint16), b=b.view(np.uint16), c=c.view(np.uint16))["d"]
    assert_same(bits.view(np.float16), product)
    even = a.size // 2 * 2
    packed = evaluate(
        "fma.rn.f16x2 %d, %a, %b, %c", {"d": np.uint32}, **{name: x[:even].reshape(-1, 2) for name, x in zip("abc", (a, b, c), strict=True)}
    )
    assert_same(packed["d"].view(np.float16), product[:even])
    total = evaluate("add.f16 %d, %a, %b", {"d": np.uint16}, a=a.view(np.uint16), b=b.view(np.uint16))["d"].view(np.float16)
    assert_same(total, exactly(Fraction.__add__, np.add, np.float16, "rn", a, b))


def bf16(values: Array) -> Array:
    """Bits by torch, which rounds to even."""
    return torch.from_numpy(np.ascontiguousarray(values, np.float32)).bfloat16().view(torch.int16).numpy().view(np.uint16)


def wide(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def test_bfloat16_rounds_to_even() -> None:
    """Around every tie of a few binades, and for what is not a number."""
    bits = (np.arange(0x3F80, 0x3FA0, dtype=np.uint32) << np.uint32(16))[:, None] + np.array(
        [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32
    )
    values = np.concatenate([bits.reshape(-1).view(np.float32), FLOATS])
    found = evaluate("cvt.rn.bf16.f32 %d, %a", {"d": np.uint16}, a=values)["d"]
    numbers = ~np.isnan(values)
    assert_same(found[numbers], bf16(values)[numbers])
    assert (found[~numbers] == 0x7FFF).all()
    assert_same(evaluate("cvt.f32.bf16 %d, %a", {"d": np.float32}, a=found)["d"], wide(found))


def test_bfloat16_arithmetic() -> None:
    rng = np.random.default_rng(8)
    a, b, c = (bf16(rng.standard_normal(400)) for _ in range(3))
    exact = wide(a).astype(np.float64) * wide(b) + wide(c)  # 16 + 8 bits: no rounding in float64
    found = evaluate("fma.rn.bf16 %d, %a, %b, %c", {"d": np.uint16}, a=a, b=b, c=c)["d"]
    assert_same(found, torch.from_numpy(exact).bfloat16().view(torch.int16).numpy().view(np.uint16))
    assert_same(evaluate("neg.bf16 %d, %a", {"d": np.uint16}, a=a)["d"], a ^ np.uint16(0x8000))
    tie = [bf16(np.full(2, value)) for value in (1 + 2**-7, 1.5)] + [bf16(np.array([2**-40, -(2**-40)]))]  # 387/256, and a little
    found = evaluate("fma.rn.bf16 %d, %a, %b, %c", {"d": np.uint16}, **dict(zip("abc", tie, strict=True)))["d"]
    assert wide(found).tolist() == [194 / 128, 193 / 128]
    both = evaluate("max.bf16x2 %d, %a, %b", {"d": np.uint32}, a=a.reshape(-1, 2), b=b.reshape(-1, 2))["d"].view(np.uint16)
    assert_same(both, bf16(np.maximum(wide(a), wide(b))))


def test_float_extrema() -> None:
    """The other operand beats NaN unless .NaN is said; -0 is less than +0."""
    a, b = pairs(FLOATS, FLOATS)
    order = [np.where(np.isnan(x), 0, x.astype(np.float64)) + np.where(np.signbit(x) & (x == 0), -1e-300, 0) for x in (a, b)]
    for name, better in (("min", order[0] < order[1]), ("max", order[0] > order[1])):
        expected = np.where(np.isnan(a), b, np.where(np.isnan(b), a, np.where(better, a, b)))
        assert_same(evaluate(f"{name}.f32 %d, %a, %b", {"d": np.float32}, a=a, b=b)["d"], expected)
        either = np.where(np.isnan(a) | np.isnan(b), np.float32(np.nan), expected)
        assert_same(evaluate(f"{name}.NaN.f32 %d, %a, %b", {"d": np.float32}, a=a, b=b)["d"], either)


def test_float_quotients_and_roots() -> None:
    a, b = pairs(FLOATS, FLOATS)
    with np.errstate(all="ignore"):
        assert_same(evaluate("div.rn.f32 %d, %a, %b", {"d": np.float32}, a=a, b=b)["d"], a / b)
        assert_same(evaluate("sqrt.rn.f32 %d, %a", {"d": np.float32}, a=FLOATS)["d"], np.sqrt(FLOATS))
        assert_same(evaluate("rcp.rn.f32 %d, %a", {"d": np.float32}, a=FLOATS)["d"], np.float32(1) / FLOATS)


def test_modifiers() -> None:
    """.ftz flushes on both sides, .sat clamps and takes NaN to 0, copysign takes the first operand's sign."""
    a = np.array([1e-39, -1e-39, 2**-126, 0.5, 2.0, -3.0, np.nan], np.float32)
    flushed = np.array([0, -0.0, 2**-126, 0.5, 2.0, -3.0, np.nan], np.float32)
    assert_same(evaluate("mul.ftz.f32 %d, %a, 0f3F800000", {"d": np.float32}, a=a)["d"], flushed)
    assert_same(
        evaluate("mul.ftz.f32 %d, %a, 0f3F000000", {"d": np.float32}, a=a)["d"], np.array([0, -0.0, 0, 0.25, 1, -1.5, np.nan], np.float32)
    )
    assert_same(
        evaluate("add.sat.f32 %d, %a, 0f00000000", {"d": np.float32}, a=a)["d"], np.array([1e-39, 0, 2**-126, 0.5, 1, 0, 0], np.float32)
    )
    assert_same(evaluate("copysign.f32 %d, %a, 0f40000000", {"d": np.float32}, a=a[:6])["d"], np.array([2, -2, 2, 2, 2, -2], np.float32))
    assert_same(evaluate("neg.f32 %d, %a; abs.f32 %d, %d", {"d": np.float32}, a=a)["d"], np.abs(a))


COMPARED: dict[str, Callable[[Any, Any], Any]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: (a < b) | (a > b),
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


@pytest.mark.parametrize("name", COMPARED)
def test_comparisons(name: str) -> None:
    a, b = pairs(FLOATS, FLOATS)
    ordered, unordered = COMPARED[name](a, b), np.isnan(a) | np.isnan(b)
    assert_same(evaluate(f"setp.{name}.f32 %d, %a, %b", {"d": np.bool_}, a=a, b=b)["d"], ordered)
    assert_same(evaluate(f"setp.{name}u.f32 %d, %a, %b", {"d": np.bool_}, a=a, b=b)["d"], ordered | unordered)
    assert_same(
        evaluate(f"set.{name}.u32.f32 %d, %a, %b", {"d": np.uint32}, a=a, b=b)["d"], np.where(ordered, np.uint32(0xFFFFFFFF), np.uint32(0))
    )
    assert_same(evaluate(f"set.{name}.f32.f32 %d, %a, %b", {"d": np.float32}, a=a, b=b)["d"], ordered.astype(np.float32))
    for type_ in ("s32", "u32", "s64", "u16"):
        x, y = pairs(integers(type_), integers(type_))
        assert_same(
            evaluate(f"setp.{name}.{type_} %d, %a, %b", {"d": np.bool_}, a=x, b=y)["d"], COMPARED[name](x, y) if name != "ne" else x != y
        )


def test_comparison_forms() -> None:
    a, b = pairs(FLOATS, FLOATS)
    c = np.resize([True, False, False], a.shape)
    unordered = np.isnan(a) | np.isnan(b)
    assert_same(evaluate("setp.num.f32 %d, %a, %b", {"d": np.bool_}, a=a, b=b)["d"], ~unordered)
    assert_same(evaluate("setp.nan.f32 %d, %a, %b", {"d": np.bool_}, a=a, b=b)["d"], unordered)
    both = evaluate("setp.lt.and.f32 %d|%e, %a, %b, !%c", {"d": np.bool_, "e": np.bool_}, a=a, b=b, c=c)
    assert_same(both["d"], (a < b) & ~c)
    assert_same(both["e"], ~(a < b) & ~c)
    u = integers("u32")
    assert_same(evaluate("setp.hi.u32 %d, %a, 7", {"d": np.bool_}, a=u)["d"], u > 7)


def test_selections() -> None:
    a, b = integers("u32"), integers("u32")[::-1].copy()
    c = np.resize([True, False], a.shape)
    assert_same(evaluate("selp.b32 %d, %a, %b, %c", {"d": np.uint32}, a=a, b=b, c=c)["d"], np.where(c, a, b))
    x = np.resize(np.array([-1, 0, 1], np.int32), a.shape)
    assert_same(evaluate("slct.u32.s32 %d, %a, %b, %c", {"d": np.uint32}, a=a, b=b, c=x)["d"], np.where(x >= 0, a, b))
    assert_same(
        evaluate("testp.subnormal.f32 %d, %a", {"d": np.bool_}, a=FLOATS)["d"], (np.abs(FLOATS) < np.float32(2**-126)) & (FLOATS != 0)
    )


ROUNDED: dict[str, Callable[[float], int]] = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}


@pytest.mark.parametrize("mode", ROUNDED)
def test_floats_to_integers(mode: str) -> None:
    """Saturates, and NaN becomes 0."""
    ties = np.array(
        [0.5, 1.5, 2.5, -0.5, -1.5, 2.4999, 127.5, 255.5, 2147483520, 2147483648, -2147483904, 4294967040, 4294967296, 9.3e18, 2e19]
    )
    values = np.concatenate([FLOATS, ties.astype(np.float32), -ties.astype(np.float32)])
    for type_, dtype in {
        "s8": np.int8,
        "u8": np.uint8,
        "s16": np.int16,
        "s32": np.int32,
        "u32": np.uint32,
        "s64": np.int64,
        "u64": np.uint64,
    }.items():
        limits = np.iinfo(dtype)

        def whole(value: float, limits: Any = limits) -> int:
            if math.isnan(value):
                return 0
            return max(limits.min, min(limits.max, ROUNDED[mode](value) if math.isfinite(value) else int(math.copysign(2**70, value))))

        expected = np.array([whole(float(value)) for value in values], dtype)
        assert_same(evaluate(f"cvt.{mode}.{type_}.f32 %d, %a", {"d": dtype}, a=values)["d"], expected)
    inside = values[np.isfinite(values) & (np.abs(values) < 1e9)]
    expected_float = np.array([ROUNDED[mode](float(value)) for value in inside], np.float32)
    assert np.array_equal(evaluate(f"cvt.{mode}.f32.f32 %d, %a", {"d": np.float32}, a=inside)["d"], expected_float)


@pytest.mark.parametrize("mode", MODES)
def test_integers_to_floats(mode: str) -> None:
    for type_ in ("s32", "u32"):
        values = np.concatenate([integers(type_, 40), np.array([16777217, 16777219, 33554433], WIDTHS[type_])])
        expected = np.array([nearest(Fraction(int(value)), np.float32, mode) if value else 0 for value in values], np.float32)
        assert_same(evaluate(f"cvt.{mode}.f32.{type_} %d, %a", {"d": np.float32}, a=values)["d"], expected)
    large = integers("u64", 40)
    assert_same(
        evaluate("cvt.rn.f32.u64 %d, %a", {"d": np.float32}, a=large)["d"],
        np.array([nearest(Fraction(int(v)), np.float32) for v in large], "f4"),
    )


def test_integer_widths() -> None:
    a = np.array([0, 1, 127, 128, 255, 256, 32767, 32768, 65535, 2**31, 2**32 - 1], np.uint32)
    assert_same(evaluate("cvt.s64.s32 %d, %a", {"d": np.int64}, a=a)["d"], a.view(np.int32).astype(np.int64))
    assert_same(evaluate("cvt.u64.u32 %d, %a", {"d": np.uint64}, a=a)["d"], a.astype(np.uint64))
    assert_same(evaluate("cvt.s32.s8 %d, %a", {"d": np.int32}, a=a)["d"], a.astype(np.uint8).view(np.int8).astype(np.int32))
    assert_same(evaluate("cvt.u16.u32 %d, %a", {"d": np.uint16}, a=a)["d"], a.astype(np.uint16))
    assert_same(evaluate("cvt.s8.s32 %d, %a", {"d": np.int32}, a=a)["d"], a.astype(np.uint8).view(np.int8).astype(np.int32))
    assert_same(evaluate("cvt.sat.u8.s32 %d, %a", {"d": np.uint32}, a=a)["d"], np.clip(a.view(np.int32), 0, 255).astype(np.uint32))


@pytest.mark.parametrize("mode", MODES)
def test_float64_to_float32(mode: str) -> None:
    values = np.array([1 + 2.0**-24, 1 + 3 * 2.0**-24, -1 - 2.0**-30, 1e-46, -1e-46, 1e39, -1e39, 0.1, 1e-40, 3.0])
    expected = np.array([nearest(Fraction(value), np.float32, mode) for value in values], np.float32)
    assert_same(evaluate(f"cvt.{mode}.f32.f64 %d, %a", {"d": np.float32}, a=values)["d"], expected)


def test_narrow_floats() -> None:
    values = np.concatenate([FLOATS, np.array([65519, 65520, 2049, 2051, 6e-8, 2.9e-8, 3.1e-8], np.float32)])
    with np.errstate(all="ignore"):
        half = values.astype(np.float16)
    assert_same(evaluate("cvt.rn.f16.f32 %d, %a", {"d": np.uint16}, a=values)["d"].view(np.float16), half)
    assert_same(evaluate("cvt.f32.f16 %d, %a", {"d": np.float32}, a=half.view(np.uint16))["d"], half.astype(np.float32))
    finite = values[np.abs(values) < 1e5]
    packed = evaluate("cvt.rn.bf16x2.f32 %d, %a, %b", {"d": np.uint32}, a=finite, b=-finite)["d"]
    assert_same(packed >> np.uint32(16), bf16(finite).astype(np.uint32))
    assert_same(packed & np.uint32(0xFFFF), bf16(-finite).astype(np.uint32))
    assert_same(
        evaluate("cvt.sat.f32.f32 %d, %a", {"d": np.float32}, a=values)["d"], np.where(values > 0, np.fmin(values, 1), 0).astype("f4")
    )


def test_tf32_ties_go_away_from_zero() -> None:
    bits = np.uint32(0x3F800000) + np.array([0, 0xFFF, 0x1000, 0x1001, 0x1FFF, 0x2000, 0x3000], np.uint32)
    found = evaluate("cvt.rna.tf32.f32 %d, %a", {"d": np.uint32}, a=bits.view(np.float32))["d"]
    assert_same(found - np.uint32(0x3F800000), np.array([0, 0, 0x2000, 0x2000, 0x2000, 0x2000, 0x4000], np.uint32))


APPROXIMATE: dict[str, tuple[Callable[[Any], Any], float]] = {
    "ex2": (np.exp2, 2.0**-21),
    "lg2": (np.log2, 2.0**-21),
    "sin": (np.sin, 2.0**-20),
    "cos": (np.cos, 2.0**-20),
    "tanh": (np.tanh, 2.0**-10.9),
    "sqrt": (np.sqrt, 2.0**-22),
    "rsqrt": (lambda a: 1 / np.sqrt(a), 2.0**-22),
    "rcp": (np.reciprocal, 2.0**-22),
}


@pytest.mark.parametrize("name", APPROXIMATE)
def test_approximations(name: str) -> None:
    """Correctly rounded by default; on demand off by no more than is documented, and reproducibly so."""
    function, error = APPROXIMATE[name]
    a = np.linspace(0.1, 3, 200, dtype=np.float32)
    exact = function(a.astype(np.float64))
    code = f"{name}.approx.f32 %d, %a"
    assert_same(evaluate(code, {"d": np.float32}, a=a)["d"], exact.astype(np.float32))
    off = evaluate(code, {"d": np.float32}, approximate=True, a=a)["d"]
    distance = np.abs(off - exact)
    assert (distance <= error * np.maximum(1, np.abs(exact))).all()
    assert distance.max() > error / 8
    assert_same(off, evaluate(code, {"d": np.float32}, approximate=True, a=a)["d"])
    assert_same(evaluate("mul.f32 %d, %a, %a", {"d": np.float32}, approximate=True, a=a)["d"], a * a)


def test_every_pair_of_bytes_multiplies() -> None:
    """A long run over several blocks: the harness itself, so to say."""
    a, b = (np.array(items, np.uint16) for items in zip(*itertools.product(range(0, 256, 17), repeat=2), strict=True))
    assert_same(evaluate("mul.lo.u16 %d, %a, %b", {"d": np.uint16}, a=a, b=b)["d"], a * b)
