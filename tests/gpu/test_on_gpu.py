"""The Triton and CUDA kernels on a GPU: bounds of the contract, padding, repeatability, CUDA graphs."""

import pytest
import stand_in_gpu
import tolerance
import torch
from cases import DTYPES, FAMILIES, Dims, assert_same_bits, build, garbage
from gpu_cases import HERE, found, moved

import onepass

HIDDEN = ("none", "lengths", "lengths per query", "holes", "spans", "nothing")
SMALL, FEW = Dims(2, 3, 37, 12, 20), Dims(2, 5, 64, 33, 17, heads=3)
LARGE = Dims(2, 70, 130, 64, 48)
SHAPES = [SMALL, FEW, LARGE, Dims(1, 1, 1000, 256, 256)]
if stand_in_gpu.CAPABILITY:  # which takes a minute for what a GPU does in microseconds
    LARGE = Dims(1, 17, 21, 12, 20)  # more queries than the kernels of few take
    SHAPES = [SMALL, LARGE]


@pytest.mark.parametrize("dims", SHAPES, ids=str)
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_bounds(family: str, dtype: torch.dtype, hidden: str, dims: Dims, gpu_backend: str) -> None:
    """Every result within twice eager's error and the roundings that the contract grants."""
    case = build(family, dims, dtype, hidden=hidden)
    tolerance.check(found(case, gpu_backend), case)


@pytest.mark.parametrize("hidden", HIDDEN[1:])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding(family: str, hidden: str, gpu_backend: str) -> None:
    """NaN where nothing is visible changes no bit."""
    case = build(family, LARGE, hidden=hidden)
    assert_same_bits(found(garbage(case, float("nan")), gpu_backend), found(case, gpu_backend))


@pytest.mark.of_gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_repetition(family: str, gpu_backend: str) -> None:
    """The same bits again, whatever the GPU does first."""
    case = build(family, LARGE, hidden="holes")
    first = found(case, gpu_backend)
    for _ in range(5):
        assert_same_bits(found(case, gpu_backend), first)


@pytest.mark.of_gpu
def test_graph_capture() -> None:
    """A decoding step in a CUDA graph follows what its tensors hold, lengths included."""
    case = moved(build("additive", Dims(1, 1, 1000, 256, 256), hidden="lengths"))
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
    case = moved(build("additive", SMALL))
    whole, _ = onepass.additive_attention(case.query, case.keys, case.values, case.v)
    lengths = torch.full((2,), 10**9, device=HERE)
    assert torch.equal(onepass.additive_attention(case.query, case.keys, case.values, case.v, lengths=lengths)[0], whole)
