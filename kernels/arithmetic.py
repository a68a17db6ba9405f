"""What the hardware approximates well, and how: reciprocals and exponentials of float32.

``UNIT`` says whose instructions there are: ``"ptx"``, ``"gcn"``, or ``"plain"`` for float64 and for Triton's interpreter, which knows no
assembly. The approximate ones are good to one or two units in the last place.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950216293335)  # in float32, and what it lacks
LOG2_E_LOW = tl.constexpr(1.9259629911266175e-8)
SMALL = tl.constexpr(1 / 16)  # |q| + |k| below which tanh is summed itself, so that it is relatively accurate
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def reciprocal(x, UNIT: tl.constexpr):
    if UNIT == "ptx":
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    elif UNIT == "gcn":
        return tl.inline_asm_elementwise("v_rcp_f32 $0, $1", "=v,v", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return 1.0 / x


@triton.jit
def power_of_2(x, UNIT: tl.constexpr):
    if UNIT == "ptx":
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    elif UNIT == "gcn":
        return tl.inline_asm_elementwise("v_exp_f32 $0, $1", "=v,v", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return tl.exp2(x)


@triton.jit
def exponential(x, FACTOR: tl.constexpr, UNIT: tl.constexpr):
    """``e^(FACTOR x)`` for a FACTOR of 1 or 2 and finite results. In float32 the exponent of 2 is kept in two parts: one alone is off by
    as many roundings as it is large."""
    if x.dtype == tl.float64:
        return tl.exp(x * FACTOR)
    else:
        high = x * (FACTOR * LOG2_E)
        low = tl.fma(x, FACTOR * LOG2_E_LOW, tl.fma(x, FACTOR * LOG2_E, -high))
        power = power_of_2(high, UNIT)
        return tl.fma(power * LN_2, low, power)


@triton.jit
def softmax_term(score, highest, UNIT: tl.constexpr):
    """``e^(score - highest)``: 0 for a score of minus infinity, NaN for one of NaN and where ``highest`` is infinite."""
    x = score - highest
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        return tl.where(x < -87.0, 0.0, exponential(tl.where(x < -87.0, -87.0, x), 1.0, UNIT))


@triton.jit
def half_of_one_minus_tanh(x, UNIT: tl.constexpr):
    """``1 / (1 + e^(2x))`` for every x, NaN for NaN: the r of ``tanh x = 1 - 2 r``."""
    x = tl.where(x > 40.0, 40.0, tl.where(x < -40.0, -40.0, x))  # beyond, float32 and float64 have saturated
    return reciprocal(1.0 + exponential(x, 2.0, UNIT), UNIT)


@triton.jit
def tangent(x, r):
    """``tanh x = 1 - 2 r``, by its series where the difference would lose its digits."""
    square = x * x
    if x.dtype == tl.float64:
        series = 21844.0 / 6081075.0 - square * (929569.0 / 638512875.0)
        series = -1382.0 / 155925.0 + square * series
        series = 2.0 / 15.0 + square * (-17.0 / 315.0 + square * (62.0 / 2835.0 + square * series))
    else:
        series = 2.0 / 15.0 - square * (17.0 / 315.0)
    return tl.where(square < SMALL * SMALL, x + x * square * (-1.0 / 3.0 + square * series), 1.0 - 2.0 * r)


@triton.jit
def hyperbolic_tangent(x, UNIT: tl.constexpr):
    return tangent(x, half_of_one_minus_tanh(x, UNIT))


@triton.jit
def spread(x):
    """``x [N]``, laid out anew over all threads: as rows of the tile that it was reduced from, each thread would hold many of it."""
    return tl.gather(x, tl.arange(0, x.shape[0]), 0)


@triton.jit
def wide(x):
    """In the dtype that it is computed in: float64 its own, all others in float32."""
    if x.dtype == tl.float64:
        return x
    else:
        return x.to(tl.float32)


@triton.jit
def times(x, factor):
    """A tile times a number that comes as float64."""
    if x.dtype == tl.float64:
        return x * factor
    else:
        return x * tl.cast(factor, tl.float32)


@triton.jit
def multiply_add(a, b, total, PRECISION: tl.constexpr, UNIT: tl.constexpr):
    """``total + a @ b``; the interpreter knows no bfloat16."""
    if UNIT == "plain":
        # Before Triton 3.9 the instruction for a float64 product is chosen by the narrowest numbers from which elementwise operations make
        # its factor, where a mask's bytes leave none: a sum of one term ends that search.
        factor = tl.sum(wide(a)[:, :, None], 2)
        return tl.dot(factor, wide(b), total, input_precision="ieee", out_dtype=total.dtype)
    else:
        return tl.dot(a, b, total, input_precision=PRECISION, out_dtype=total.dtype)
