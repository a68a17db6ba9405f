"""PTX types as numpy arrays, and back.

A register holds unsigned integers of its own width (predicates: bool), one per thread, or a single one that all threads share.
``decode`` gives what an instruction computes with: integers of the right sign, float32 for f16, bf16 and f32, float64 for f64, and a
last axis of two float32 for the packed pairs. ``encode`` is the way back and rounds once, to nearest even.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .findings import PTXError
from .rounding import Array, bf16_bits, f16_bits

WIDTH = {
    **{f"{kind}{bits}": bits // 8 for kind in "bsu" for bits in (8, 16, 32, 64)},
    **{"f16": 2, "bf16": 2, "f16x2": 4, "bf16x2": 4, "tf32": 4, "f32": 4, "f64": 8, "f32x2": 8, "b128": 16, "pred": 1},
}
UNSIGNED: dict[int, type[np.unsignedinteger[Any]]] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED: dict[int, type[np.signedinteger[Any]]] = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
FLOATS = ("f16", "bf16", "f16x2", "bf16x2", "f32", "f32x2", "f64")

# Generic addresses of the windows of shared and local memory; their low halves are zero, so that 32 bits of an address are the offset.
SHARED_WINDOW, LOCAL_WINDOW, GLOBAL_WINDOW = 0x0001_0000_0000_0000, 0x0002_0000_0000_0000, 0x0000_7000_0000_0000
CLUSTER_SHIFT = 24  # addresses of shared::cluster: this block's own as they are, those of block r of the cluster from r + 1 of these on
WINDOWS = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "global": 0, "param": 0, "const": 0}


def is_float(type_: str) -> bool:
    return type_ in FLOATS


def is_signed(type_: str) -> bool:
    return type_[0] == "s"


def integer_dtype(type_: str) -> "np.dtype[Any]":
    return np.dtype((SIGNED if is_signed(type_) else UNSIGNED)[WIDTH[type_]])


def from_bf16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def from_f16(bits: Array) -> Array:
    return np.asarray(bits.view(np.float16)).astype(np.float32)


def halves(bits: Array) -> Array:
    """The two 16-bit halves of 32-bit words on a new last axis, low half first."""
    return np.stack([bits & np.uint32(0xFFFF), bits >> np.uint32(16)], -1).astype(np.uint16)


def join(low_high: Array) -> Array:
    """The inverse of :func:`halves`."""
    wide = low_high.astype(np.uint32)
    return wide[..., 0] | (wide[..., 1] << np.uint32(16))


def decode(bits: Array, type_: str) -> Array:
    """What bits of exactly the type's width mean."""
    if type_ == "f32x2":
        return np.stack([bits & np.uint64(0xFFFFFFFF), bits >> np.uint64(32)], -1).astype(np.uint32).view(np.float32)
    if type_ == "f32":
        return bits.view(np.float32)
    if type_ == "f64":
        return bits.view(np.float64)
    if type_ == "f16":
        return from_f16(bits)
    if type_ == "bf16":
        return from_bf16(bits)
    if type_ == "f16x2":
        return from_f16(halves(bits))
    if type_ == "bf16x2":
        return from_bf16(halves(bits))
    return bits.view(SIGNED[WIDTH[type_]]) if is_signed(type_) else bits


def encode(values: Array, type_: str) -> Array:
    """Bits of the type's width; integers wrap, floats are rounded to nearest even."""
    if type_ == "pred":
        return np.asarray(values, bool)
    if type_ == "f32x2":
        words = np.asarray(values, np.float32).view(np.uint32).astype(np.uint64)
        return np.asarray(words[..., 0] | words[..., 1] << np.uint64(32))
    if type_ in ("f16", "f16x2"):
        bits = f16_bits(values)
    elif type_ in ("bf16", "bf16x2"):
        bits = bf16_bits(values)
    elif type_ == "f32":
        return np.asarray(values, np.float32).view(np.uint32)
    elif type_ == "f64":
        return np.asarray(values, np.float64).view(np.uint64)
    else:
        return values.astype(UNSIGNED[WIDTH[type_]], copy=False)
    return join(bits) if type_.endswith("x2") else bits


def resize(bits: Array, width: int, signed: bool = False) -> Array:
    """Bits cut or extended to a width in bytes."""
    if bits.dtype.itemsize == width:
        return bits
    if signed and bits.dtype.itemsize < width:
        return bits.view(SIGNED[bits.dtype.itemsize]).astype(SIGNED[width]).view(UNSIGNED[width])
    return bits.astype(UNSIGNED[width])


def immediate(text: str, type_: str) -> Array:
    """The bits of a literal that is used as ``type_``: 0f and 0d give the bits of a float, other literals their value."""
    if type_ == "pred":
        return np.asarray(bool(int(text, 0)))
    width = WIDTH[type_]
    if re.match(r"0[fF][0-9a-fA-F]{8}$", text):
        single = np.array(int(text[2:], 16), np.uint32)
        return encode(single.view(np.float32).astype(np.float64), type_) if is_float(type_) else resize(single, width)
    if re.match(r"0[dD][0-9a-fA-F]{16}$", text):
        double = np.array(int(text[2:], 16), np.uint64)
        return encode(double.view(np.float64), type_) if is_float(type_) else resize(double, width)
    if "." in text and is_float(type_):
        return encode(np.array(float(text)), type_)
    try:
        value = integer(text)
    except ValueError as error:
        raise PTXError(f"not a literal: {text!r}") from error
    return np.array(value & ((1 << 8 * width) - 1), UNSIGNED[width])


def integer(text: str) -> int:
    """A PTX integer literal: decimal, 0x, 0b or octal with a leading 0, an optional sign and U."""
    digits = text.rstrip("U").replace(" ", "")
    octal = re.fullmatch(r"([-+]?)0([0-7]+)", digits)
    return int(octal[1] + octal[2], 8) if octal else int(digits, 0)


def decoder(stored: str, type_: str) -> Callable[[Array], Array]:
    """``decode`` for a register declared as ``stored``, which may be wider than the type that is read from it."""
    if type_ == "pred" or stored == "pred":
        if type_ != stored:
            raise PTXError(f"a .{stored} register is read as .{type_}")
        return lambda bits: bits
    width = WIDTH[type_]
    if WIDTH[stored] < width:
        raise PTXError(f"a .{stored} register is too narrow for .{type_}")
    if WIDTH[stored] == width:
        return lambda bits: decode(bits, type_)
    return lambda bits: decode(resize(bits, width), type_)
