"""Contract 5: no tensor of B*T*S*A elements, and little beyond inputs, outputs and gradients; measured in a fresh process."""

import os
import pathlib
import subprocess
import sys

import pytest
import torch
from cases import DTYPES, FAMILIES, Dims, build, results
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from onepass._validate import limits_of

FLOAT = 4
NOISE = 6 * 2**20  # stacks of new threads, code pages touched first, malloc's arenas


@pytest.fixture
def kernels(backend: str) -> str:
    """The backend, of which eager is none."""
    if backend == "reference":
        pytest.xfail("eager materialises what the kernels avoid")
    return backend


def peak_extra(backend: str, family: str, dims: Dims, *, need_weights: bool = False, train: bool = True, threads: int = 2) -> int:
    """Bytes beyond inputs, outputs and gradients at the peak of a call, in a process of its own."""
    numbers = (dims.batch, dims.steps, dims.source, dims.width, dims.value_width, int(need_weights), int(train))
    program = pathlib.Path(__file__).with_name("measure.py")
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MALLOC_ARENA_MAX": "1", "ONEPASS_KEEP_MIB": "256"}
    command = [sys.executable, str(program), backend, family, *map(str, numbers)]
    return int(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


@pytest.mark.of_cpp
@pytest.mark.parametrize("dims", [Dims(32, 256, 1024, 16, 16), Dims(4, 64, 8192, 128, 8), Dims(16, 1, 16384, 64, 8)], ids=str)
def test_additive_training(dims: Dims, kernels: str) -> None:
    """Forward and backward peak at 1.2 x (4 B*T*S + B*(T+S)*A) floats at most."""
    scores = dims.batch * dims.steps * dims.source
    exponentials = dims.batch * (dims.steps + dims.source) * dims.width
    assert peak_extra(kernels, "additive", dims) <= 1.2 * (4 * scores + exponentials) * FLOAT + NOISE


@pytest.mark.of_cpp
def test_long_source(kernels: str) -> None:
    """Weights and gradients of scores, two numbers a score, and nothing that grows with S * A: keys are exponentiated a few at a time."""
    dims = Dims(4, 32, 4096, 128, 128)
    assert peak_extra(kernels, "additive", dims) <= 2 * dims.batch * dims.steps * dims.source * FLOAT + NOISE


@pytest.mark.of_cpp
def test_additive_inference(kernels: str) -> None:
    """Forward alone needs the weights and the exponentials, not four times as much."""
    dims = Dims(32, 256, 1024, 16, 16)
    scores = dims.batch * dims.steps * dims.source
    exponentials = dims.batch * (dims.steps + dims.source) * dims.width
    assert peak_extra(kernels, "additive", dims, train=False) <= 1.2 * (2 * scores + exponentials) * FLOAT + NOISE


@pytest.mark.of_cpp
@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dims", [Dims(8, 1024, 2048, 64, 64), Dims(8, 512, 4096, 32, 256)], ids=str)
def test_multiplicative_without_weights(dims: Dims, train: bool, kernels: str) -> None:
    """O(B*T): a few numbers per query, where the weights would take 64 MB."""
    assert dims.batch * dims.steps * dims.source * FLOAT >= 64 * 2**20
    assert peak_extra(kernels, "multiplicative", dims, train=train) <= 16 * dims.batch * dims.steps * FLOAT + NOISE


@pytest.mark.of_cpp
def test_the_measure_sees_eager(backend: str) -> None:
    """The measure itself: eager's B*T*S*A tensor shows."""
    dims = Dims(8, 64, 256, 64, 16)
    assert peak_extra("reference", "additive", dims) >= dims.batch * dims.steps * dims.source * dims.width * FLOAT


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps the numbers of elements and of bytes of the largest tensor that any op returns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for result in out if isinstance(out, tuple | list) else [out]:
            if isinstance(result, Tensor):
                self.bytes = max(self.bytes, result.untyped_storage().nbytes())
                self.elements = max(self.elements, result.untyped_storage().nbytes() // result.element_size())
        return out


@pytest.mark.parametrize("hidden", ["none", "both"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_tensor_of_all_four_dimensions(family: str, dtype: torch.dtype, hidden: str, backend: str) -> None:
    """No op of forward or backward returns anything larger than B*T*S or an input; eager does, in additive attention."""
    case = build(family, Dims(2, 16, 24, 32, 8), dtype, hidden=hidden)
    allowed = max(tensor.numel() for tensor in (*case.inputs().values(), case.visible()))
    for name in {backend, "reference"}:
        with Largest() as seen:
            results(case, name)
        assert seen.elements <= allowed if name != "reference" or family == "multiplicative" else seen.elements >= 2 * 16 * 24 * 32


@pytest.mark.of_cpp
def test_nothing_is_kept(kernels: str) -> None:
    """A thousand calls leave no memory behind."""
    script = (
        "import sys; from measure import *; from cases import *\n"
        "case = build('additive', Dims(4, 32, 128, 32, 32), hidden='both')\n"
        "for _ in range(20): results(case, sys.argv[1])\n"
        "before = memory('VmRSS')\n"
        "for _ in range(1000): results(case, sys.argv[1])\n"
        "print(memory('VmRSS') - before)"
    )
    folder = pathlib.Path(__file__).parent
    grown = subprocess.run([sys.executable, "-c", script, kernels], cwd=folder, check=True, capture_output=True, text=True).stdout
    assert int(grown) < 8 * 2**20


@pytest.mark.parametrize("hidden", ["none", "both", "all three"])
def test_weights_computed_again_on_a_gpu(hidden: str, backend: str) -> None:
    """Where the weights were not kept, the Triton backward holds no tensor larger than an input, of which the weights are many."""
    if backend != "triton":
        pytest.skip("the CPU kernels compute weights again row by row; eager keeps them")
    from onepass.kernels import ops

    case = build("multiplicative", Dims(2, 150, 70, 20, 12), hidden=hidden)
    lengths = limits_of(case.lengths, case.spans, 70)
    arguments = (case.query, case.keys, case.values, case.scale)
    _, weights = ops.multiplicative_forward(*arguments, lengths, case.mask, False)
    with Largest() as seen:
        ops.multiplicative_backward(case.grad_context, None, *arguments, weights, lengths, case.mask)
    assert 0 < seen.bytes <= FLOAT * case.query.numel() < FLOAT * case.visible().numel() // 3
