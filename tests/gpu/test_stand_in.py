"""The GPU's stand-in itself: it runs the kernels that a GPU would run, and sees what is wrong with a call."""

import pytest
import stand_in_gpu
import torch
from cases import Dims, build
from gpu_cases import moved, there
from memory_cases import PROGRAMS, attended, build_for_memory, trained
from stand_in_gpu import CAPABILITY
from tolerance import check

import onepass
from onepass import _probe, additive_scores
from onepass._backends import op_of

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


def test_scores_are_not_a_step() -> None:
    """What is launched is what ``"auto"`` predicts the time of."""
    case = moved(build("additive", Dims(1, 1, 9, 12, 8)))
    for call, scores in ((additive_scores, True), (onepass.additive_attention, False)):
        launches()
        call(case.query, case.keys, *([] if scores else [case.values]), case.v, backend="cuda")
        (kernel,) = launches()
        assert kernel.startswith(f"{op_of(True, scores, 1)}_f32")


@pytest.mark.parametrize("family", ["additive", "multiplicative"])
def test_widths_without_a_step(family: str) -> None:
    """Nine queries over a memory for which CUDA has no such step, forward (by A) or backward (by D): Triton has."""
    for dims in (Dims(1, 9, 3, 8, 1408), Dims(1, 9, 3, 1408, 8)):
        case = build_for_memory(family, dims)
        launches()
        check(there(attended(moved(case), "cuda", False)), case)
        steps = {name for name in launches() if "_step_" in name}
        kept = {"additive_step_forward_f32_4"} if dims.width == 8 else {"additive_step_backward_f32_4"}  # the other's rows are short
        assert steps == (kept if family == "additive" else set())


def test_shared_memory_beside_the_static() -> None:
    """What a launch may have without being allowed is 48 KiB in all: with its static memory, this one has more."""
    dims = Dims(1, 17, 3, 3200, 4)
    sizes = [dims.batch, 1, dims.steps, dims.source, dims.width, dims.value_width]
    (how,) = _probe.cuda_launches("additive_forward", sizes, 0, stand_in_gpu.PROCESSORS, CAPABILITY)
    assert 46 << 10 < how["shared"] <= 48 << 10
    case = build("additive", dims)
    here = moved(case)
    context, _ = onepass.additive_attention(here.query, here.keys, here.values, here.v, backend="cuda")
    check(there({"context": context}), case, part=True)


def test_the_device_of_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device: that of the tensors, whichever it was before and is afterwards."""
    case = moved(build("multiplicative", Dims(1, 2, 9, 12, 8)))
    made_current: list[tuple[int, bool]] = []  # and whether anything had been launched
    launches()
    monkeypatch.setattr(torch.cuda, "_exchange_device", lambda device: made_current.append((device, bool(stand_in_gpu.launched))) or 3)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", lambda device: made_current.append((device, bool(stand_in_gpu.launched))))
    onepass.multiplicative_attention(case.query, case.keys, case.values, backend="triton")
    assert made_current == [(0, False), (3, True)]


def test_compiled_for_any_size() -> None:
    """``"auto"`` chooses by widths, and a graph for any of these too."""
    torch.compiler.reset()
    compiled = torch.compile(lambda *tensors: onepass.additive_attention(*tensors)[0], fullgraph=True, dynamic=True, backend="aot_eager")
    for dims in (Dims(2, 2, 9, 12, 8), Dims(1, 3, 7, 20, 6)):
        case = moved(build("additive", dims))
        inputs = case.query, case.keys, case.values, case.v
        torch.testing.assert_close(compiled(*inputs), onepass.additive_attention(*inputs)[0])


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
