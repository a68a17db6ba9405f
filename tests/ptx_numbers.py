"""Edge cases of every type of the PTX machine, and what exact integers and fractions round to in it."""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
from ptx.rounding import Array

WIDTHS = {"u16": np.uint16, "s16": np.int16, "u32": np.uint32, "s32": np.int32, "u64": np.uint64, "s64": np.int64}
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
