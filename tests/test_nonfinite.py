"""Contract 3: non-finite inputs give what the eager formula gives."""

from collections.abc import Callable

import pytest
import torch
from cases import DTYPES, FAMILIES, Case, Dims, build, call, results
from tolerance import check

import onepass

DIMS = Dims(3, 5, 21, 18, 6)
BAD = [torch.nan, torch.inf, -torch.inf]


def spoil(case: Case, name: str, bad: float) -> Case:
    """``bad`` in one element of a tensor (of the batch's second entry, where there is one)."""
    tensor = getattr(case, name).clone()
    tensor[(1, 2, 3)[: tensor.dim()] if tensor.dim() > 1 else 3] = bad
    return case.replace(**{name: tensor})


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", ["query", "keys", "values", "v"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_forward(family: str, dtype: torch.dtype, name: str, bad: float, backend: str, isa: str) -> None:
    """NaN and infinities stand where eager has them, and every other element is as accurate as ever."""
    case = spoil(build(family, DIMS, dtype), name, bad)
    if name not in case.inputs():
        return
    names = ("scores",) if family == "scores" else ("context", "weights")
    eager = results(case.to(torch.float64), "reference")
    for key, output in zip(names, call(case, backend), strict=True):
        expected = eager[key].to(dtype)
        assert torch.equal(output.isnan(), expected.isnan()), key
        assert torch.equal(output.isposinf(), expected.isposinf()), key
        assert torch.equal(output.isneginf(), expected.isneginf()), key


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", ["query", "keys", "values", "v"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_everything(family: str, dtype: torch.dtype, name: str, bad: float, backend: str, isa: str) -> None:
    """The same of the gradients, within tolerances; an infinite query or key saturates tanh and is nothing special."""
    case = spoil(build(family, DIMS, dtype), name, bad)
    if name in case.inputs():
        check(results(case, backend), case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, -1)], ids=str)
def test_infinities_that_meet(family: str, signs: tuple[int, int], dtype: torch.dtype, backend: str, isa: str) -> None:
    """An infinite query element against an infinite key element: tanh of an infinity, or of NaN."""
    case = spoil(spoil(build(family, DIMS, dtype), "query", signs[0] * torch.inf), "keys", signs[1] * torch.inf)
    check(results(case, backend), case)


@pytest.mark.parametrize("family", ["additive", "multiplicative"])
@pytest.mark.parametrize("bad", BAD)
def test_other_batch_entries(family: str, bad: float, backend: str) -> None:
    """A bad batch entry leaves every bit of the others alone, but for the gradient of v, which they share."""
    case = build(family, DIMS)
    dirty = spoil(spoil(spoil(case, "query", bad), "keys", bad), "values", bad)
    clean, found = results(case, backend), results(dirty, backend)
    for name in clean:
        if name != "d_v":
            assert torch.equal(found[name][::2], clean[name][::2]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_score_of_minus_infinity(dtype: torch.dtype, backend: str, isa: str) -> None:
    """A visible position whose score is -inf has weight 0; a row of them is NaN, as in eager, and not a row that sees nothing."""
    case = build("multiplicative", Dims(2, 3, 6, 1, 4), dtype)
    query, keys = torch.ones_like(case.query), case.keys.clone()
    keys[:, 1] = -torch.inf
    keys[1] = -torch.inf
    context, weights = call(case.replace(query=query, keys=keys, scale=1.0), backend)
    assert not weights[0, :, 1].any()
    assert weights[0].isfinite().all()
    assert context[0].isfinite().all()
    assert weights[1].isnan().all()
    assert context[1].isnan().all()


@pytest.mark.parametrize("hidden_from", [0, 150])
def test_what_one_query_does_not_see_does_not_reorder_the_others(
    hidden_from: int, backend: str, set_threads: Callable[[int], None]
) -> None:
    """Sums that overflow behind an infinity stay that infinity, as eager's do, whatever queries come beside and on however many threads."""
    if backend == "triton":
        pytest.xfail("a GPU's matrix products have an order of their own")
    values = torch.full((1, 8, 16), 3e38)
    values[0, 0] = -torch.inf
    mask = torch.ones(200, 8, dtype=torch.bool)
    mask[hidden_from, 0] = False
    expected = torch.full((200, 16), -torch.inf)
    expected[hidden_from] = torch.inf
    for count in (1, 2, 3):
        set_threads(count)
        memory = onepass.multiplicative_memory(torch.zeros(1, 8, 4), values, backend=backend)
        assert torch.equal(memory.context(torch.ones(1, 200, 8), mask=mask)[0], expected)
