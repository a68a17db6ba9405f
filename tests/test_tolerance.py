"""The tolerances are tight enough to catch what a wrong kernel would do, and wide enough for eager."""

from collections.abc import Callable

import pytest
import torch
from cases import DTYPES, FAMILIES, Case, Dims, Results, accumulator, build, results
from tolerance import bounds, check
from torch import Tensor

DIMS = Dims(2, 5, 37, 24, 9)


def eager(case: Case) -> Results:
    """What an ideal kernel gives: the formula in the accumulating dtype, rounded once."""
    found = results(case.to(accumulator(case.query.dtype)), "reference")
    return {name: result.to(case.query.dtype) for name, result in found.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("span", ["normal", "tiny", "cancelling 60", "huge"])
def test_eager_passes(family: str, dtype: torch.dtype, span: str) -> None:
    """Eager is within its own bounds."""
    case = build(family, DIMS, dtype, hidden="both", span=span)
    check(eager(case), case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_ten_tolerances_fail(family: str, dtype: torch.dtype) -> None:
    """One element of any result that is ten tolerances off is caught, and bounds are small beside the results."""
    case = build(family, DIMS, dtype)
    good = eager(case)
    for name, bound in bounds(case).items():
        flat = int(bound.exact.abs().argmax())
        off = good[name].flatten().clone()
        off[flat] = (bound.exact + 10 * bound.tolerance).flatten()[flat]
        with pytest.raises(AssertionError, match=name):
            check({**good, name: off.view(bound.exact.shape)}, case)
        relative = {torch.float64: 1e-12, torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
        assert bound.tolerance.flatten()[flat] < relative * bound.exact.abs().max(), name


def test_nan_fails() -> None:
    """A NaN in place of a finite number is never close, and a finite number in place of a NaN neither."""
    case = build("additive", DIMS)
    good = eager(case)
    with pytest.raises(AssertionError, match="context"):
        check({**good, "context": good["context"].clone().index_fill_(1, torch.tensor([0]), torch.nan)}, case)
    broken = case.replace(query=case.query.index_fill(1, torch.tensor([0]), torch.nan))
    with pytest.raises(AssertionError, match="context"):
        check({**eager(broken), "context": good["context"]}, broken)


def wrong_exponent(case: Case) -> Case:
    return case.replace(query=2 * case.query, keys=2 * case.keys)


def dropped_source(case: Case) -> Case:
    shown = torch.ones(1, 1, DIMS.source, dtype=torch.bool)
    shown[..., -1] = False
    return case.replace(mask=shown)


def dropped_channel(case: Case) -> Case:
    v, query = case.v.clone(), case.query.clone()
    v[..., -1] = 0.0
    if case.family == "multiplicative":
        query[..., -1] = 0.0
    return case.replace(v=v, query=query)


def rounded_inputs(case: Case) -> Case:
    """As if the products were of tensors rounded to 11 bits, as in a TF32 unit or with ``tanh.approx``."""
    bits = {torch.float64: 2.0**24, torch.float32: 2.0**11}[case.query.dtype]

    def cut(tensor: Tensor) -> Tensor:
        return (tensor * bits).round() / bits

    return case.replace(query=cut(case.query), keys=cut(case.keys))


@pytest.mark.parametrize("mutate", [wrong_exponent, dropped_source, dropped_channel, rounded_inputs], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_wrong_formula_fails(family: str, dtype: torch.dtype, mutate: Callable[[Case], Case]) -> None:
    """A formula that is wrong in one term is caught by every result that depends on the term."""
    if mutate is rounded_inputs and dtype in (torch.bfloat16, torch.float16):
        dtype = torch.float32  # a half-width input has no more bits to lose
    case = build(family, DIMS, dtype, seed=1)
    wrong = results(mutate(case.to(accumulator(dtype))), "reference")
    right = eager(case)
    for name in right:
        if (name, mutate) in {("scores", dropped_source), ("d_v", dropped_channel)}:
            continue
        with pytest.raises(AssertionError, match=name):
            check({**right, name: wrong[name].to(dtype)}, case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_width_accumulation_fails(dtype: torch.dtype) -> None:
    """A formula computed in the half-width dtype throughout is caught: it must accumulate in float32."""
    case = build("additive", DIMS, dtype)
    wrong, right = results(case, "reference"), eager(case)
    for name in right:
        with pytest.raises(AssertionError, match=name):
            check({**right, name: wrong[name]}, case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_missing_row_sum_fails(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A softmax gradient without its row sum is caught."""
    case = build("additive", DIMS, dtype)
    right = eager(case)

    def without_row_sum(scores: Tensor, dim: int) -> Tensor:
        return (scores - scores.logsumexp(dim, keepdim=True).detach()).exp()

    monkeypatch.setattr(torch, "softmax", without_row_sum)
    wrong = results(case.to(accumulator(dtype)), "reference")
    monkeypatch.undo()
    for name in ("d_query", "d_keys", "d_v"):
        with pytest.raises(AssertionError, match=name):
            check({**right, name: wrong[name].to(dtype)}, case)
