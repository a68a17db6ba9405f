"""Every instruction of the PTX machine on floats, and to and from them, against Python's fractions, over edge cases."""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from ptx.rounding import Array, add_to_odd, fma, to_float32
from ptx.write import evaluate
from ptx_numbers import FLOATS, WIDTHS, assert_same, exactly, integers, nearest, pairs, triples

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
    halves = {name: x[:even].reshape(-1, 2) for name, x in (("a", a), ("b", b))}
    both = evaluate("setp.lt.f16x2 %d|%e, %a, %b", {"d": np.bool_, "e": np.bool_}, **halves)
    low, high = (halves["a"] < halves["b"]).T
    assert_same(both["d"], low)
    assert_same(both["e"], high)
    total = evaluate("add.f16 %d, %a, %b", {"d": np.uint16}, a=a.view(np.uint16), b=b.view(np.uint16))["d"].view(np.float16)
    assert_same(total, exactly(Fraction.__add__, np.add, np.float16, "rn", a, b))


@pytest.mark.parametrize("code", ["fma.rn{}.{} %d, %a, %b, %c", "add.rn{}.{} %d, %a, %b", "mul.rn{}.{} %d, %a, %c"])
@pytest.mark.parametrize("ftz", ["", ".ftz"])
def test_packed_singles(code: str, ftz: str) -> None:
    """f32x2 does what f32 does, on the low and the high half of a register."""
    rng = np.random.default_rng(8)
    edges = np.array([0, -0.0, 1, -1, np.inf, -np.inf, np.nan, 1e-40, -3e-39, 3e38], np.float32)
    sources = {name: rng.permuted(np.concatenate([edges, rng.standard_normal(54).astype(np.float32)])) for name in "abc"}
    alone = evaluate(code.format(ftz, "f32"), {"d": np.float32}, **sources)["d"]
    packed = evaluate(code.format(ftz, "f32x2"), {"d": np.uint64}, **{name: x.view(np.uint64) for name, x in sources.items()})["d"]
    assert_same(packed.view(np.float32), alone)


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
