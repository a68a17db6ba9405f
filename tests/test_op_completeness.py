"""Whatever an op needs besides its kernel is there: what says nothing when it is forgotten."""

import importlib
import re
from pathlib import Path

import pytest

from onepass import _library
from onepass._autograd import DIFFERENTIABLE, LAST
from onepass._schemas import SCHEMAS
from onepass.profiling import floors

ROOT = Path(__file__).resolve().parents[1]
OPS = {schema[: schema.index("(")] for schema in SCHEMAS}
KERNELS = re.findall(r"\(\*(\w+)\)\(const \w+&, const Executor&\)", (ROOT / "csrc/cpu/kernels.h").read_text())
pytestmark = pytest.mark.of_cpp


def test_every_op_has_a_derivative_or_refuses_one() -> None:
    """But for what prepares a memory, whose gradients are deferred."""
    assert set(DIFFERENTIABLE) | set(LAST) == OPS - {"additive_prepare"}
    assert not set(DIFFERENTIABLE) & set(LAST)


def test_every_op_has_its_gpu_kernel_or_says_that_it_has_none() -> None:
    pytest.importorskip("triton")
    kernels = importlib.import_module("onepass.kernels.ops")
    assert set(kernels.OPS) == OPS - _library.OF_CPU
    assert set(kernels.OPS) > _library.IN_CUDA


def test_every_op_has_a_least_time() -> None:
    assert set(floors.SLOTS) == OPS - floors.WITHOUT_PAIRS


NOT_COUNTED = {"weighted_values", "weighted_values_backward"}  # as CONTRIBUTING.md says


@pytest.mark.parametrize(("file", "left_out"), [("sanitize.cpp", set()), ("hot_loops.cpp", NOT_COUNTED)])
def test_every_kernel_is_sanitized_and_counted(file: str, left_out: set[str]) -> None:
    assert len(KERNELS) == 10
    text = (ROOT / "tests/cpp" / file).read_text()
    assert {kernel for kernel in KERNELS if not re.search(rf"\bkernels\.{kernel}\(", text)} == left_out
