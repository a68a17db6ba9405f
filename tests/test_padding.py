"""Contracts 1 and 2: what is hidden is never read, changes no bit, and has gradients of exactly zero."""

import time
from collections.abc import Callable

import pytest
import torch
from cases import DTYPES, FAMILIES, Case, Dims, assert_same_bits, bits, build, call, garbage, results
from torch import Tensor

GARBAGE = [torch.nan, torch.inf, -torch.inf, 1e30, 60.0]
HIDING = ["lengths", "lengths per query", "padding", "holes", "nothing", "one row hidden", "both", "shared"]
HIDING += ["spans", "moving spans", "all three"]
SHAPES = [Dims(3, 5, 37, 20, 9), Dims(2, 1, 150, 70, 33), Dims(2, 4, 19, 12, 7, heads=2)]


@pytest.mark.parametrize("bad", GARBAGE)
@pytest.mark.parametrize("hidden", HIDING)
@pytest.mark.parametrize("dims", SHAPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_garbage_changes_no_bit(family: str, dims: Dims, hidden: str, bad: float, backend: str, isa: str) -> None:
    """Garbage in keys and values that no query sees gives the bits that zeros there give, and zero gradients there."""
    case = build(family, dims, hidden=hidden)
    clean, dirty = results(garbage(case, 0.0), backend), results(garbage(case, bad), backend)
    assert_same_bits(dirty, clean)
    unseen = ~case.visible().any(-2)
    for name in ("d_keys", "d_values"):
        if name in dirty:
            assert not dirty[name][unseen].any(), name


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_garbage_in_every_dtype(family: str, dtype: torch.dtype, bad: float, backend: str, isa: str) -> None:
    """The same for every dtype, lengths and mask together."""
    case = build(family, Dims(4, 6, 45, 33, 17), dtype, hidden="both")
    assert_same_bits(results(garbage(case, bad), backend), results(garbage(case, 0.0), backend))


@pytest.mark.parametrize("hidden", HIDING)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_outputs(family: str, dtype: torch.dtype, hidden: str, backend: str) -> None:
    """Weights of what is hidden are exactly 0, scores -inf; a row that sees nothing has zero context and gradients, never NaN."""
    case = build(family, Dims(3, 5, 37, 20, 9), dtype, hidden=hidden)
    found, visible = results(garbage(case, torch.nan), backend), case.visible()
    blind = ~visible.any(-1)
    if family == "scores":
        assert torch.equal(found["scores"] == -torch.inf, ~visible)
    else:
        assert not found["weights"][~visible].any()
        assert not found["context"][blind].any()
        torch.testing.assert_close(found["weights"].double().sum(-1), (~blind).double(), rtol=0, atol=8 * torch.finfo(dtype).eps)
    assert not found["d_query"][blind].any()
    for name, result in found.items():
        assert not result.isnan().any(), name


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("family", FAMILIES)
def test_query_that_sees_nothing(family: str, bad: float, backend: str) -> None:
    """Garbage in a query that sees nothing reaches no result: its row is padding of the target."""
    case = build(family, Dims(3, 5, 37, 20, 9), hidden="lengths per query")
    blind = ~case.visible().any(-1, keepdim=True)
    assert blind.any()
    clean = results(case.replace(query=case.query.masked_fill(blind, 0.0)), backend)
    assert_same_bits(results(case.replace(query=case.query.masked_fill(blind, bad)), backend), clean)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("hidden", HIDING)
def test_gradients_arriving_at_what_is_hidden(family: str, hidden: str, backend: str) -> None:
    """Weights and scores that are constant take no gradient: what arrives there, NaN included, changes no bit."""
    case = build(family, Dims(3, 5, 37, 20, 9), hidden=hidden)
    arriving = [case.grad_weights.masked_fill(~case.visible(), bad) for bad in (0.0, torch.nan, 1e30)]
    clean, *dirty = (results(case.replace(grad_weights=grad), backend) for grad in arriving)
    for found in dirty:
        assert_same_bits(found, clean)


def seen_by_the_last_only(family: str, dims: Dims) -> tuple[Case, Tensor]:
    """A case whose source position 2 only the last query sees, and the rows of the others."""
    case = build(family, dims)
    mask = torch.ones(1, dims.steps, dims.source, dtype=torch.bool)
    mask[:, :-1, 2] = False
    return case.replace(mask=mask), torch.arange(dims.steps) < dims.steps - 1


@pytest.mark.parametrize("bad", GARBAGE)
@pytest.mark.parametrize("dims", [Dims(2, 3, 5, 8, 4), Dims(1, 70, 41, 33, 20), Dims(2, 9, 150, 12, 7, heads=2)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_key_hidden_from_some_queries(family: str, dims: Dims, bad: float, backend: str, isa: str) -> None:
    """A bad key that one query sees leaves every bit of the others' rows alone; its own row is what eager gives."""
    case, others = seen_by_the_last_only(family, dims)
    dirty = case.replace(keys=case.keys.index_fill(-2, torch.tensor([2]), bad))
    clean_outputs, outputs, eager_outputs = (call(c, name) for c, name in ((case, backend), (dirty, backend), (dirty, "reference")))
    for clean, output, eager in zip(clean_outputs, outputs, eager_outputs, strict=True):
        assert torch.equal(bits(output[..., others, :]), bits(clean[..., others, :]))
        torch.testing.assert_close(output[..., ~others, :], eager[..., ~others, :], equal_nan=True)


@pytest.mark.parametrize("bad", GARBAGE)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_key_hidden_from_some_queries(family: str, bad: float, backend: str, isa: str) -> None:
    """The others' query gradients keep every bit; elsewhere NaN stands only where eager has NaN."""
    case, others = seen_by_the_last_only(family, Dims(2, 9, 41, 33, 20))
    dirty = case.replace(keys=case.keys.index_fill(-2, torch.tensor([2]), bad))
    clean, found, eager = results(case, backend), results(dirty, backend), results(dirty, "reference")
    assert torch.equal(bits(found["d_query"][..., others, :]), bits(clean["d_query"][..., others, :]))
    for name in found:
        assert not (found[name].isnan() & ~eager[name].isnan()).any(), name


@pytest.mark.parametrize("bad", GARBAGE)
@pytest.mark.parametrize("family", ["additive", "multiplicative"])
def test_value_hidden_from_some_queries(family: str, bad: float, backend: str, isa: str) -> None:
    """A bad value that one query sees reaches neither context nor query gradient of the others, whose weight for it is 0."""
    case, others = seen_by_the_last_only(family, Dims(2, 9, 41, 33, 20))
    dirty = case.replace(values=case.values.index_fill(-2, torch.tensor([2]), bad))
    clean, found = results(case, backend), results(dirty, backend)
    for name in ("context", "weights", "d_query"):
        assert torch.equal(bits(found[name][..., others, :]), bits(clean[name][..., others, :])), name
    assert torch.equal(bits(found["weights"]), bits(clean["weights"]))


@pytest.mark.of_cpp
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("hidden", ["lengths", "padding"])
def test_work_is_proportional_to_what_is_visible(family: str, hidden: str, backend: str, set_threads: Callable[[int], None]) -> None:
    """With 1/16 of the positions visible, forward and backward take well under half the processor time of one thread."""
    if backend == "reference":
        pytest.xfail("eager computes the padding")
    dims = Dims(4, 64, 1024, 256, 256)  # wide, since a mask itself must be read
    full = build(family, dims)
    lengths = torch.full((dims.batch,), dims.source // 16)
    few = full.replace(lengths=lengths) if hidden == "lengths" else full.replace(mask=torch.arange(dims.source)[None, None] < lengths[0])

    def seconds(case: Case) -> float:
        start = time.thread_time()
        outputs = call(case, backend)
        torch.autograd.grad(outputs[-1], leaves, case.grad_weights, allow_unused=True)
        return time.thread_time() - start

    set_threads(1)
    leaves = [tensor.requires_grad_() for tensor in full.inputs().values()]
    assert min(seconds(few) for _ in range(7)) < 0.5 * min(seconds(full) for _ in range(7))
