"""A catalogue for benchmarks/gpuless.py: a main loop like additive attention's, and a kernel without a loop."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import triton
import triton.language as tl
from ptx import Output


@triton.jit
def outer(p_q, p_k, p_o, A, BT: tl.constexpr, BS: tl.constexpr):
    """out[t, s] = sum_a 1 / (1 + q[t, a] k[a, s]), one element a trip."""
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    o_s = tl.arange(0, BS)
    total = tl.zeros((BT, BS), tl.float32)
    for a in range(A):
        d = 1 + tl.load(p_q + o_t * A + a)[:, None] * tl.load(p_k + a * BS + o_s)[None, :]
        total += tl.math.fdiv(1.0, d)
    tl.store(p_o + o_t[:, None] * BS + o_s[None, :], total)


@triton.jit
def double(p_x, p_y, B: tl.constexpr):
    o = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(p_y + o, 2 * tl.load(p_x + o))


@triton.jit
def inline(p_x, p_y, B: tl.constexpr, ASM: tl.constexpr):
    """Perhaps with NVIDIA's assembly in it."""
    o = tl.program_id(0) * B + tl.arange(0, B)
    x = tl.load(p_x + o)
    if ASM:
        x = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    tl.store(p_y + o, x)


@dataclass(frozen=True)
class Entry:
    name: str
    function: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    arguments: Callable[[], list[Any]]
    grid: tuple[int, int, int]
    necessary: int
    amd: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=lambda: {"enable_fp_fusion": True})
    hot: Any = None
    elements: float | None = None
    work: float | None = None
    tile: str = "T 16, S 32, 1 warp"
    shape: str = "T 32, S 32, A 24"
    divisible: tuple[str, ...] = field(default=("p_q", "p_k", "p_o"))
    warps: int = 1
    stages: int = 1


def arrays(*shapes: tuple[int, ...]) -> list[Any]:
    generator = np.random.default_rng(0)
    return [generator.random(shape, np.float32) for shape in shapes]


def entries(target: str) -> list[Entry]:
    T, S, A = 32, 32, 24
    return [
        Entry(
            "outer",
            outer,
            {"p_q": "*fp32", "p_k": "*fp32", "p_o": "*fp32", "A": "i32", "BT": "constexpr", "BS": "constexpr"},
            {"BT": 16, "BS": 32},
            lambda: [*arrays((T, A), (A, S)), Output(np.empty((T, S), np.float32)), A],
            (T // 16, 1, 1),
            4 * (T * A + A * S + T * S),
            elements=16 * 32 / 32,
            work=T * S * A,
        ),
        Entry(
            "double",
            double,
            {"p_x": "*fp32", "p_y": "*fp32", "B": "constexpr"},
            {"B": 256},
            lambda: [*arrays((512,)), Output(np.empty(512, np.float32))],
            (2, 1, 1),
            2 * 4 * 512,
            divisible=("p_x", "p_y"),
        ),
    ]
