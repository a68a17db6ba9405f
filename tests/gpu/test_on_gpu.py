"""The Triton kernels on a GPU: the contract's bounds, padding, repeatability, CUDA graphs. Where there is no GPU they skip, and say so."""

import dataclasses

import pytest
import tolerance
import torch
from cases import DTYPES, FAMILIES, Case, Dims, build, garbage, results
from torch import Tensor

import onepass

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
SHAPES = [Dims(2, 3, 37, 12, 20), Dims(2, 70, 130, 64, 48), Dims(1, 1, 1000, 256, 256), Dims(2, 5, 64, 33, 17, heads=3)]
HIDDEN = ("none", "lengths", "lengths per query", "holes", "spans", "nothing")


def on_gpu(case: Case) -> Case:
    fields = {field.name: getattr(case, field.name) for field in dataclasses.fields(case)}
    return case.replace(**{name: value.cuda() for name, value in fields.items() if isinstance(value, Tensor)})


def found(case: Case) -> dict[str, Tensor]:
    return {name: result.cpu() for name, result in results(on_gpu(case), "triton").items()}


@pytest.mark.parametrize("dims", SHAPES, ids=str)
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_bounds(family: str, dtype: torch.dtype, hidden: str, dims: Dims, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every result within twice eager's error and the roundings that the contract grants."""
    monkeypatch.setattr(tolerance, "factors_are_rounded", True)
    case = build(family, dims, dtype, hidden=hidden)
    tolerance.check(found(case), case)


@pytest.mark.parametrize("hidden", HIDDEN[1:])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_and_repetition(family: str, hidden: str) -> None:
    """The same bits again, and with NaN where nothing is visible."""
    case = build(family, SHAPES[1], hidden=hidden)
    first = found(case)
    for other in (found(case), found(garbage(case, float("nan")))):
        for name, expected in first.items():
            assert torch.equal(other[name], expected), name


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
