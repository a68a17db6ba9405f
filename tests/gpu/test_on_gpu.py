"""The Triton and CUDA kernels on a GPU: bounds of the contract, padding, repeatability, CUDA graphs. Without one they skip, and say so."""

import dataclasses

import pytest
import tolerance
import torch
from cases import DTYPES, FAMILIES, Case, Dims, build, garbage, results
from torch import Tensor

import onepass
from onepass._backends import not_supported_reasons

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
SHAPES = [Dims(2, 3, 37, 12, 20), Dims(2, 70, 130, 64, 48), Dims(1, 1, 1000, 256, 256), Dims(2, 5, 64, 33, 17, heads=3)]
HIDDEN = ("none", "lengths", "lengths per query", "holes", "spans", "nothing")


def on_gpu(case: Case) -> Case:
    fields = {field.name: getattr(case, field.name) for field in dataclasses.fields(case)}
    return case.replace(**{name: value.cuda() for name, value in fields.items() if isinstance(value, Tensor)})


@pytest.fixture(params=["triton", "cuda"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def found(case: Case, name: str) -> dict[str, Tensor]:
    """On the backend, or a skip with the reasons why it does not serve the call."""
    family = "multiplicative" if case.family == "multiplicative" else "additive"
    reasons = not_supported_reasons(name, torch.device("cuda", torch.cuda.current_device()), family, case.steps())
    if reasons:
        pytest.skip("; ".join(reasons))
    return {output: result.cpu() for output, result in results(on_gpu(case), name).items()}


@pytest.mark.parametrize("dims", SHAPES, ids=str)
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_bounds(family: str, dtype: torch.dtype, hidden: str, dims: Dims, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every result within twice eager's error and the roundings that the contract grants."""
    monkeypatch.setattr(tolerance, "factors_are_rounded", True)
    case = build(family, dims, dtype, hidden=hidden)
    tolerance.check(found(case, name), case)


@pytest.mark.parametrize("hidden", HIDDEN[1:])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_and_repetition(family: str, hidden: str, name: str) -> None:
    """The same bits again, and with NaN where nothing is visible."""
    case = build(family, SHAPES[1], hidden=hidden)
    first = found(case, name)
    for other in (found(case, name), found(garbage(case, float("nan")), name)):
        for output, expected in first.items():
            assert torch.equal(other[output], expected), output


def test_graph_capture() -> None:
    """A decoding step in a CUDA graph follows what its tensors hold, lengths included."""
    case = on_gpu(build("additive", SHAPES[2], hidden="lengths"))
    arguments = (case.query, case.keys, case.values, case.v)
    onepass.additive_attention(*arguments, lengths=case.lengths)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        context, _ = onepass.additive_attention(*arguments, lengths=case.lengths)
    assert case.lengths is not None
    case.lengths.fill_(7)
    case.query.mul_(2.0)
    graph.replay()
    assert torch.equal(context, onepass.additive_attention(*arguments, lengths=case.lengths)[0])


def test_lengths_are_clamped() -> None:
    case = on_gpu(build("additive", SHAPES[0]))
    whole, _ = onepass.additive_attention(case.query, case.keys, case.values, case.v)
    lengths = torch.full((2,), 10**9, device="cuda")
    assert torch.equal(onepass.additive_attention(case.query, case.keys, case.values, case.v, lengths=lengths)[0], whole)
