"""Every instruction of the PTX machine on integers, bits and predicates against Python's integers, over edge cases; comparisons too."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from ptx.write import evaluate
from ptx_numbers import FLOATS, WIDTHS, apply, assert_same, integers, pairs

SHIFTS = np.array([0, 1, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 256, 0x80000000, 0xFFFFFFFF], np.uint32)


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


def test_integer_widths() -> None:
    a = np.array([0, 1, 127, 128, 255, 256, 32767, 32768, 65535, 2**31, 2**32 - 1], np.uint32)
    assert_same(evaluate("cvt.s64.s32 %d, %a", {"d": np.int64}, a=a)["d"], a.view(np.int32).astype(np.int64))
    assert_same(evaluate("cvt.u64.u32 %d, %a", {"d": np.uint64}, a=a)["d"], a.astype(np.uint64))
    assert_same(evaluate("cvt.s32.s8 %d, %a", {"d": np.int32}, a=a)["d"], a.astype(np.uint8).view(np.int8).astype(np.int32))
    assert_same(evaluate("cvt.u16.u32 %d, %a", {"d": np.uint16}, a=a)["d"], a.astype(np.uint16))
    assert_same(evaluate("cvt.s8.s32 %d, %a", {"d": np.int32}, a=a)["d"], a.astype(np.uint8).view(np.int8).astype(np.int32))
    assert_same(evaluate("cvt.sat.u8.s32 %d, %a", {"d": np.uint32}, a=a)["d"], np.clip(a.view(np.int32), 0, 255).astype(np.uint32))


def test_every_pair_of_bytes_multiplies() -> None:
    """A long run over several blocks: the harness itself, so to say."""
    a, b = (np.array(items, np.uint16) for items in zip(*itertools.product(range(0, 256, 17), repeat=2), strict=True))
    assert_same(evaluate("mul.lo.u16 %d, %a, %b", {"d": np.uint16}, a=a, b=b)["d"], a * b)
