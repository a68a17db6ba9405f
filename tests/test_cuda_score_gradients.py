"""The CUDA kernels before those of ``test_cuda_backward``, gradients of scores and of values, and both together: all gradients of additive
attention, from its weights."""

import pytest
import torch
from cases import Case, Dims, Results, accumulator, assert_same_bits, build, garbage, results
from cuda_backward import additive_backward, score_gradients
from cuda_machine import NVCC, compiled
from tolerance import check

pytestmark = pytest.mark.skipif(NVCC is None, reason="needs nvcc, to compile kernels")

SMALL = Dims(batch=2, steps=3, source=37, width=12, value_width=20)


def clean(case: Case) -> Results:
    wide = case.to(accumulator(case.query.dtype))
    shape = (*case.query.shape[:-1], case.keys.shape[-2])
    weights = results(wide.replace(grad_weights=wide.query.new_zeros(shape)), "cpu")["weights"]
    found, machines = score_gradients(case, weights)
    rest, more = additive_backward(case.replace(family="scores", grad_weights=found["grad_scores"]))
    for machine in machines + more:
        assert not machine.findings, "\n".join(map(str, machine.findings))
    return rest | {"d_values": found["grad_values"]}


def checked(case: Case) -> None:
    forward = {name: result for name, result in results(case, "cpu").items() if name in ("context", "weights")}
    check(forward | clean(case), case)


@pytest.mark.parametrize("hidden", ["none", "lengths", "lengths per query", "holes", "spans", "nothing"])
def test_visibility(hidden: str) -> None:
    checked(build("additive", SMALL, hidden=hidden))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtype(dtype: torch.dtype) -> None:
    checked(build("additive", SMALL, dtype, hidden="lengths"))


@pytest.mark.parametrize(
    "dims", [Dims(1, 20, 70, 12, 70), Dims(1, 5, 20, 12, 8, heads=2), Dims(2, 3, 0, 4, 2), Dims(2, 3, 5, 4, 0)], ids=str
)
def test_sizes(dims: Dims) -> None:
    """Several tiles each way, heads, and nothing at all."""
    checked(build("additive", dims, hidden="holes"))


def test_one_gradient_only() -> None:
    case = build("additive", SMALL, hidden="lengths")
    checked(case.replace(grad_weights=None))
    checked(case.replace(grad_context=None))


def test_garbage_changes_no_bit() -> None:
    case = build("additive", SMALL, hidden="padding")
    assert_same_bits(clean(garbage(case, float("nan"))), clean(case))


def test_wavefronts() -> None:
    """Full tiles meet next to no bank of shared memory twice."""
    case = build("additive", Dims(batch=1, steps=64, source=128, width=12, value_width=128))
    _, machines = score_gradients(case, torch.full((1, 64, 128), 1 / 128))
    counts = machines[0].counts
    assert counts["shared wavefronts at least"] <= counts["shared wavefronts"] <= 1.05 * counts["shared wavefronts at least"]


@pytest.mark.parametrize("target", ["80", "86", "89", "90", "100", "120"])
def test_fits(target: str) -> None:
    """No spills, and registers for as many blocks on a processor as launches count on."""
    kernels = compiled("score_gradients.cu", target)
    assert len(kernels) == 10
    for name, kernel in kernels.items():
        assert (kernel.spills, kernel.stack) == (0, 0), name
        blocks, threads = (4, 256) if "softmax" in name else (2 if "f64" in name else 4, 128)
        assert blocks * threads * -(-kernel.registers // 8) * 8 <= 65536, name
