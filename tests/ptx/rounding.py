"""Rounding of exact or wider results, once, to the formats and in the modes of PTX.

A float64 sum that is not exact would be rounded twice on its way to a narrower format. Rounding it to odd first (the last bit of an
inexact result is set) keeps the second rounding right in every mode (Boldo and Melquiond, "Emulation of a FMA and correctly rounded
sums", IEEE Trans. Computers 57(4), 2008).
"""

from fractions import Fraction
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]

INTEGRAL = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def add_to_odd(a: Array, b: Array) -> Array:
    """``a + b`` of two float64 arrays, rounded to odd."""
    total = a + b
    part = total - a
    error = (a - (total - part)) + (b - part)  # exact (Knuth's two-sum); NaN where the total is not finite
    inexact = np.abs(error) > 0
    if not np.any(inexact):
        return total
    even = (np.asarray(total).view(np.uint64) & np.uint64(1)) == 0
    return np.where(inexact & even, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total)


def fma(a: Array, b: Array, c: Array) -> Array:
    """``a * b + c`` of float32 values (or narrower) as float64, rounded to odd: products of 24-bit significands are exact in float64."""
    return add_to_odd(np.multiply(a, b, dtype=np.float64), np.asarray(c, np.float64))


def fma64(a: Array, b: Array, c: Array) -> Array:
    """``a * b + c`` of float64 values, rounded once to nearest."""
    a, b, c = np.broadcast_arrays(a, b, c)
    total = a * b + c  # right for infinities and NaN, and where the result is zero
    finite = np.isfinite(a) & np.isfinite(b) & np.isfinite(c)
    exact = [
        float_of(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)))
        for x, y, z in zip(a[finite], b[finite], c[finite], strict=True)
    ]
    result = np.array(total)
    result[finite] = np.where(np.array(exact) == 0, result[finite], exact)
    return result


def float_of(value: Fraction) -> float:
    """The nearest float64: the quotient of two integers is rounded once."""
    try:
        return value.numerator / value.denominator
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")


def to_float32(exact: Array, mode: str = "rn") -> Array:
    """float64 values to float32 in mode rn, rz, rm or rp."""
    nearest = np.asarray(exact).astype(np.float32)
    if mode == "rn" or exact.dtype == np.float32:
        return nearest
    below = {"rm": nearest > exact, "rp": nearest > np.inf, "rz": (np.abs(nearest) > np.abs(exact)) & (nearest > 0)}[mode]
    above = {"rm": nearest > np.inf, "rp": nearest < exact, "rz": (np.abs(nearest) > np.abs(exact)) & (nearest < 0)}[mode]
    down, up = np.nextafter(nearest, np.float32(-np.inf)), np.nextafter(nearest, np.float32(np.inf))
    return np.where(below, down, np.where(above, up, nearest))


def to_odd32(exact: Array) -> Array:
    """float64 values to float32, rounded to odd."""
    cut = to_float32(exact, "rz")
    inexact = (cut != exact) & ~np.isnan(cut)
    return np.where(inexact, cut.view(np.uint32) | np.uint32(1), cut.view(np.uint32)).view(np.float32)


def bf16_bits(values: Array, mode: str = "rn") -> Array:
    """float32 or float64 values to the bits of bf16, ties to even; NaN becomes 0x7fff, the canonical one."""
    single = to_odd32(values) if values.dtype == np.float64 else np.asarray(values, np.float32)
    bits = single.view(np.uint32)
    if mode == "rn":
        bits = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return np.where(np.isnan(single), np.uint16(0x7FFF), (bits >> np.uint32(16)).astype(np.uint16))


def f16_bits(values: Array, mode: str = "rn") -> Array:
    """float32 or float64 values to the bits of f16, ties to even or towards zero."""
    half = values.astype(np.float16)
    if mode == "rz":
        over = np.abs(half.astype(np.float64)) > np.abs(values)
        half = np.where(over, np.nextafter(half, np.float16(0)), half)
    return np.where(np.isnan(half), np.uint16(0x7FFF), np.asarray(half).view(np.uint16))


def tf32_bits(values: Array, mode: str = "rna") -> Array:
    """float32 values to tf32 (10 bits of fraction): ties away from zero (rna), to even (rn) or cut (rz)."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    if mode == "rna":
        rounded = bits + np.uint32(0x1000)
    elif mode == "rn":
        rounded = bits + np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))
    else:
        rounded = bits
    return np.where(np.isfinite(values), rounded & np.uint32(0xFFFFE000), bits)


def flush(values: Array) -> Array:
    """Subnormal float32 values to zeros of their sign (.ftz)."""
    return np.where(np.abs(values) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), values), values)


def saturate(values: Array) -> Array:
    """Clamped to [0, 1]; NaN becomes 0 (.sat)."""
    return np.where(values > 0, np.minimum(values, np.ones_like(values)), np.zeros_like(values))


def to_integer(values: Array, mode: str, dtype: npt.DTypeLike) -> Array:
    """Floats to integers in mode rni, rzi, rmi or rpi; what is out of range saturates, NaN becomes 0."""
    limits = np.iinfo(np.dtype(dtype))
    whole = INTEGRAL[mode](np.asarray(values, np.float64))
    low, high = whole <= float(limits.min), whole >= float(limits.max)
    inside = np.where(low | high | np.isnan(whole), 0.0, whole).astype(dtype)
    result: Array = np.where(high, np.array(limits.max, dtype), np.where(low, np.array(limits.min, dtype), inside))
    return result
