"""Kernels as Triton compiles them for sm_80, run on the PTX machine against numpy; and their waits, weakened in the compiled text."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from ptx import Machine, Output, Traffic, parse
from ptx.rounding import Array

triton = pytest.importorskip("triton", reason="needs triton, to compile kernels to PTX")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402


@triton.jit
def add(p_x, p_y, p_sum, n, B: tl.constexpr):
    o = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(p_sum + o, tl.load(p_x + o, o < n) + tl.load(p_y + o, o < n), o < n)


@triton.jit
def softmax(p_x, p_y, n, stride, B: tl.constexpr):
    o = tl.arange(0, B)
    x = tl.load(p_x + tl.program_id(0) * stride + o, o < n, -float("inf"))
    e = tl.exp(x - tl.max(x, 0))
    tl.store(p_y + tl.program_id(0) * stride + o, e / tl.sum(e, 0), o < n)


@triton.jit
def matmul(p_a, p_b, p_c, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    o_n = tl.program_id(1) * BN + tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    total = tl.zeros((BM, BN), tl.float32)
    for start in tl.range(0, K, BK, num_stages=3):
        a = tl.load(p_a + o_m[:, None] * K + (start + o_k)[None, :])
        b = tl.load(p_b + (start + o_k)[:, None] * N + o_n[None, :])
        total += tl.dot(a, b)
    tl.store(p_c + o_m[:, None] * N + o_n[None, :], total)


Compile = Callable[..., Any]


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compile]:
    """Gives the kernel and its dynamic shared memory; all pointers and sizes are said to be divisible by 16, as Triton finds out itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))

        def compile_(function: Any, types: str, **constants: int) -> Any:
            names = function.arg_names
            listed = [*types.split(), *("constexpr" for _ in constants)]
            divisible = {(index,): [["tt.divisibility", 16]] for index in range(len(types.split()))}
            source = ASTSource(function, dict(zip(names, listed, strict=True)), constants, divisible)
            return triton.compile(source, target=GPUTarget("cuda", 80, 32))

        yield compile_


def test_vector_add(compiler: Compile) -> None:
    compiled = compiler(add, "*fp32 *fp32 *fp32 i32", B=256)
    x, y = np.random.default_rng(0).standard_normal((2, 688)).astype(np.float32)
    total = np.empty(688, np.float32)
    machine = Machine(parse(compiled.asm["ptx"]))
    machine.launch(3, 32 * compiled.metadata.num_warps, [x, y, Output(total), 688])
    assert not machine.findings
    assert np.array_equal(total, x + y)
    assert list(machine.global_bytes.values())[:3] == [Traffic(2752, 0), Traffic(2752, 0), Traffic(0, 2752)]


def test_softmax(compiler: Compile) -> None:
    compiled = compiler(softmax, "*fp32 *fp32 i32 i32", B=256)
    x = np.random.default_rng(1).standard_normal((3, 208)).astype(np.float32)
    y = np.empty_like(x)
    exact = np.exp(x.astype(np.float64)) / np.exp(x.astype(np.float64)).sum(1, keepdims=True)
    for approximate in (False, True):
        machine = Machine(parse(compiled.asm["ptx"]), approximate=approximate)
        machine.launch(3, 32 * compiled.metadata.num_warps, [x, Output(y), 208, 208], compiled.metadata.shared)
        assert not machine.findings
        np.testing.assert_allclose(y, exact, rtol=4e-6)


def matrices(type_: str) -> tuple[Array, Array, Array]:
    """Two matrices as the kernel gets them, and their exact product."""
    generator = torch.Generator().manual_seed(0)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[type_]
    a, b = (torch.randn(shape, generator=generator).to(dtype) for shape in ((64, 128), (128, 64)))
    bits = [matrix.view(torch.int16).numpy() if type_ != "fp32" else matrix.numpy() for matrix in (a, b)]
    return bits[0], bits[1], (a.double() @ b.double()).numpy()


def product(text: str, shared: int, type_: str) -> tuple[Machine, Array, Array]:
    a, b, exact = matrices(type_)
    c = np.empty((64, 64), np.float32)
    machine = Machine(parse(text))
    machine.launch((1, 2), 128, [a, b, Output(c), 64, 128], shared)
    return machine, c, exact


@pytest.mark.parametrize("type_", ["fp16", "bf16", "fp32"])
def test_pipelined_matmul(compiler: Compile, type_: str) -> None:
    compiled = compiler(matmul, f"*{type_} *{type_} *fp32 i32 i32", BM=64, BN=32, BK=32)
    text, shared = compiled.asm["ptx"], compiled.metadata.shared
    assert "mma.sync" in text
    machine, c, exact = product(text, shared, type_)
    assert not machine.findings
    np.testing.assert_allclose(c, exact, atol=0.05 if type_ == "fp32" else 1e-4)  # fp32 is multiplied as tf32
    weakened = re.sub(r"(cp\.async\.wait_group\s+)2;", r"\g<1>3;", text)  # all of them: some only repeat another
    assert weakened != text
    machine, _, _ = product(weakened, shared, type_)
    assert "shared access during a copy" in {finding.kind for finding in machine.findings}
