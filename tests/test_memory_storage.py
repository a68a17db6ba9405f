"""A memory stored in bfloat16 is off by the rounding that its documentation states, and by no more."""

import itertools

import pytest
import torch
from cases import DTYPES, Case, Dims, assert_same_bits, build, garbage
from memory_cases import (
    as_stored,
    attended,
    build_for_memory,
    by_step_or_at_once,
    each_family,
    each_heads,
    loss_of,
    remember,
    settle_final_gradients,
    with_leaves,
)
from tolerance import bounds, check
from torch import Tensor


def bfloat16_bounds(case: Case, backend: str) -> dict[str, Tensor]:
    """How far results may be when stored in bfloat16: scores move by d, weights by a factor of e^2d, values by 2^-8 of themselves.

    A weight lies in ``w e^-2d`` to ``w e^2d``; a context is off by ``sum_s w |value| ((1 + 2^-8) e^2d - 1)`` at most. To both the
    tolerance without bfloat16 is added. Additive scores move by ``2^-9 sum |v|``, multiplicative ones by ``2^-8 |scale| sum |q k|``; those
    of additive keys that are kept themselves, on Triton, by ``2^-8 sum |v k|``.
    """
    wide, plain = case.to(torch.float64), bounds(case)
    if case.family == "additive" and backend == "triton":
        moved = 2.0**-8 * (wide.keys.abs() @ wide.v.abs()[..., None]).amax(-2, keepdim=True)
    elif case.family == "additive":
        moved = 2.0**-9 * wide.v.abs().sum(-1)[..., None, None]
    else:
        moved = 2.0**-8 * abs(case.scale) * (wide.query.abs() @ wide.keys.abs().mT).amax(-1, keepdim=True)
    weights, values = plain["weights"].exact, wide.values.masked_fill(~case.visible().any(-2)[..., None], 0.0).abs()
    ratio = (2 * moved).exp()
    return {
        "weights": weights * (ratio - 1) + plain["weights"].tolerance,
        "context": ((1 + 2.0**-8) * ratio - 1) * (weights @ values) + plain["context"].tolerance,
    }


@pytest.mark.parametrize("hidden", ["none", "both"])
@pytest.mark.parametrize("span", ["normal", "small", "wide", "saturated", "cancelling 11", "one channel cancelling", "cancelling 60"])
@pytest.mark.parametrize("dims", [Dims(2, 3, 67, 33, 40), Dims(3, 2, 5, 7, 1, heads=2)], ids=str)
@each_family
def test_bfloat16_storage(family: str, dims: Dims, span: str, hidden: str, backend: str, isa: str) -> None:
    """Results of float32 queries are off by no more than the documented rounding of scores and values."""
    case = build_for_memory(family, dims, hidden=hidden, span=span)
    exact, limits = bounds(case), bfloat16_bounds(case, backend)
    for by_step, (name, limit) in itertools.product((True, False), limits.items()):
        found = attended(garbage(case, torch.nan), backend, by_step, dtype=torch.bfloat16)[name]
        assert found.dtype == torch.float32
        excess = (found.double() - exact[name].exact).abs() / limit
        assert excess.max() <= 1, f"{name}: {float(excess.max()):.3g} times the bound"


@by_step_or_at_once
@each_heads
@pytest.mark.parametrize("hidden", ["none", "lengths", "both"])
@each_family
def test_bfloat16_gradients(family: str, hidden: str, heads: int, by_step: bool, backend: str) -> None:
    """Results and gradients are those of what is stored, within float32's own tolerances: rounding the storage is all that is lost."""
    case = build_for_memory(family, Dims(3, 4, 33, 20, 13, heads), hidden=hidden)
    found, stored = attended(case, backend, by_step, dtype=torch.bfloat16), as_stored(case, backend)
    if family == "additive" and backend != "reference":
        settle_final_gradients(found, case, backend)
    if backend == "reference":  # rounds the gradients of what it stores
        for name in ("d_values", *(["d_keys"] if family == "multiplicative" else [])):
            bound = bounds(stored)[name]
            assert (found[name].double() - bound.exact).norm() <= 0.05 * bound.exact.norm(), name
            found[name] = bound.exact.float()
    check(found, stored)


@each_family
def test_bfloat16_is_stored(family: str, backend: str) -> None:
    """Values that bfloat16 cannot hold are rounded: the storage is really narrow; those that it can hold are exact."""
    case = build(family, Dims(2, 1, 1, 8, 4))
    for values, same in ((case.values, False), (case.values.bfloat16().float(), True)):
        found = remember(case.replace(values=values), backend, dtype=torch.bfloat16).attend(case.query)[0]
        assert torch.equal(found, values) is same
        assert torch.equal(found, values.bfloat16().float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_family
def test_storage_in_the_keys_dtype(family: str, dtype: torch.dtype, backend: str) -> None:
    """Naming the keys' own dtype changes nothing."""
    case = build(family, Dims(2, 3, 11, 8, 4), dtype)
    assert_same_bits(attended(case, backend, True, dtype=dtype), attended(case, backend, True))


@each_family
def test_select_of_bfloat16_storage(family: str, backend: str) -> None:
    """Rows of a memory in bfloat16 give the bits of those rows' results, and gradients."""
    case = with_leaves(build_for_memory(family, Dims(4, 2, 11, 8, 6), hidden="both"))
    memory, rows = remember(case, backend, dtype=torch.bfloat16), torch.tensor([3, 0, 0])
    context = memory.select(rows).attend(case.query[rows])[0]
    torch.testing.assert_close(context, memory.attend(case.query)[0][rows], rtol=1e-6, atol=1e-6)
    (grad,) = torch.autograd.grad(loss_of(context), [case.keys])
    assert grad[0].any()
    assert not grad[1:3].any()


@pytest.mark.of_cpp
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dims", [Dims(2, 7, 203, 100, 70), Dims(1, 5, 98, 33, 1030)], ids=str)
@each_family
def test_together_or_one_by_one(family: str, dims: Dims, dtype: torch.dtype | None, backend: str, isa: str) -> None:
    """A single query has loops of its own, and reads halves where they lie; every sum has one order all the same."""
    if backend != "cpu":
        pytest.xfail("promised by the CPU kernels alone")
    case = build_for_memory(family, dims, hidden="both", span="wide")
    memory = remember(case, backend, dtype=dtype)
    context, weights = memory.attend(case.query, need_weights=True)
    for step, query in enumerate(case.query.unbind(-2)):
        found = memory.attend(query, need_weights=True)
        assert weights is not None
        for one, all_of_them in zip(found, (context, weights), strict=True):
            assert one is not None
            assert torch.equal(one, all_of_them.select(-2, step))


@pytest.mark.of_cpp
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("queries", [2, 7])
@each_family
def test_gradients_together_or_one_by_one(family: str, queries: int, dtype: torch.dtype | None, backend: str, isa: str) -> None:
    """So are a query's gradients, over a source whose terms are added a part at a time."""
    if backend != "cpu":
        pytest.xfail("promised by the CPU kernels alone")
    case = with_leaves(build_for_memory(family, Dims(2, queries, 300, 64, 12), hidden="lengths"))
    memory = remember(case, backend, dtype=dtype)
    upstream = case.grad_context
    (together,) = torch.autograd.grad(memory.attend(case.query)[0], case.query, upstream)
    for step in range(queries):
        query = case.query.detach()[:, step].clone().requires_grad_()
        (alone,) = torch.autograd.grad(memory.attend(query)[0], query, upstream[:, step])
        assert torch.equal(alone, together[:, step])
