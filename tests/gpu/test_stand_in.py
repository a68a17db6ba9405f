"""The GPU's stand-in itself: it runs the kernels that a GPU would run, and sees what is wrong with a call."""

import pytest
import stand_in_gpu
import torch
from cases import Dims, build
from gpu_cases import moved
from memory_cases import PROGRAMS, attended, build_for_memory, trained
from stand_in_gpu import CAPABILITY

import onepass

pytestmark = pytest.mark.skipif(not CAPABILITY, reason="there is no stand-in here: STAND_IN_GPU=80 puts one up")


def launches() -> set[str]:
    """What was launched since the last look."""
    seen = set(stand_in_gpu.launched)
    stand_in_gpu.launched.clear()
    return seen


@pytest.mark.parametrize("family", ["additive", "multiplicative"])
def test_backends_launch_their_own(family: str) -> None:
    """Steps over a memory are the CUDA kernels', and so are the additive gradients that steps share; the rest is Triton's."""
    case = moved(build_for_memory(family, Dims(1, 2, 9, 12, 8)))
    launches()
    trained(case, "cuda", PROGRAMS["separate steps"])
    of_cuda = launches()
    assert {f"{family}_step_forward_f32_1", f"{family}_step_backward_f32_1", "sums"} <= of_cuda
    assert any(name.startswith("additive_backward_") for name in of_cuda) == (family == "additive")
    trained(case, "triton", PROGRAMS["separate steps"])
    assert not any("_f32" in name for name in launches())


@pytest.mark.parametrize("family", ["additive", "multiplicative"])
def test_steps_over_a_memory_in_bfloat16(family: str) -> None:
    """They read it as it is, for as many queries as the kernels of steps take; of more, Triton's do."""
    for queries, own in ((2, True), (17, False)):
        case = moved(build_for_memory(family, Dims(1, queries, 9, 12, 8)))
        launches()
        attended(case, "cuda", False, dtype=torch.bfloat16)
        seen = launches()
        assert (f"{family}_step_forward_f32_over_bf16_4" in seen) == own
        assert (f"{family}_step_backward_f32_over_bf16_4" in seen) == own


def test_clusters() -> None:
    """From 9.0 on, blocks on pieces of one long source form clusters."""
    case = moved(build("additive", Dims(1, 1, 400, 16, 8)))
    launches()
    onepass.additive_attention(case.query, case.keys, case.values, case.v, backend="cuda")
    by = [name.rpartition(" by ")[2] for name in launches() if " by " in name]
    assert by == (["8"] if CAPABILITY >= 90 else [])


def test_memory_that_nobody_wrote_is_seen() -> None:
    case = moved(build("additive", Dims(1, 1, 5, 4, 3)))
    nothing = torch.empty_like(case.values)
    onepass.additive_attention(case.query, case.keys, nothing, case.v, backend="cuda")
    assert any("uninitialised global read" in finding for finding in stand_in_gpu.findings)
    stand_in_gpu.findings.clear()


def test_failed_launches_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch that fails is an error of the call, which names the kernel."""

    def broken(symbol: str) -> None:
        raise LookupError(symbol)

    case = moved(build("additive", Dims(1, 1, 5, 4, 3)))
    monkeypatch.setattr(stand_in_gpu, "kernel", broken)
    with pytest.raises(RuntimeError, match="additive_step_forward_f32_1: refused"):
        onepass.additive_attention(case.query, case.keys, case.values, case.v, backend="cuda")
    assert stand_in_gpu.findings == ["additive_step_forward_f32_1: LookupError('additive_step_forward_f32_1')"]
    stand_in_gpu.findings.clear()
