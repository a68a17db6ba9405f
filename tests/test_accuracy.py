"""Contract 3: errors against the fp64 reference are at most twice eager's plus one rounding, in any shape, dtype or range."""

import math

import pytest
import torch
from cases import DTYPES, FAMILIES, MASKS, RANGES, Dims, assert_same_bits, build, call, garbage, results
from tolerance import check

SHAPES = [
    Dims(1, 1, 1, 1, 1),
    Dims(2, 3, 5, 7, 11),
    Dims(1, 1, 37, 64, 16),
    Dims(3, 17, 31, 33, 65),
    Dims(2, 64, 64, 64, 64),
    Dims(1, 131, 67, 19, 40),
    Dims(2, 5, 23, 519, 130),
    Dims(1, 3, 1031, 24, 9),
    Dims(2, 1, 129, 100, 515),
    Dims(1, 257, 3, 12, 5),
    Dims(5, 2, 2, 3, 300),
    Dims(2, 3, 17, 40, 21, heads=3),
    Dims(1, 2, 5, 16, 8, heads=1),
]
EMPTY = [
    Dims(0, 3, 5, 7, 4),
    Dims(2, 0, 5, 7, 4),
    Dims(2, 3, 0, 7, 4),
    Dims(2, 3, 5, 0, 4),
    Dims(2, 3, 5, 7, 0),
    Dims(2, 3, 0, 0, 0),
    Dims(0, 0, 0, 0, 0),
    Dims(2, 3, 0, 7, 4, heads=2),
    Dims(2, 3, 5, 0, 4, heads=2),
]


def test_fresh_memory_is_nan() -> None:
    """The suite's poison works: an element that no kernel writes is NaN."""
    assert torch.empty(3).isnan().all()
    assert torch.zeros(2).new_empty(3).isnan().all()


@pytest.mark.parametrize("dims", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_shapes(family: str, dtype: torch.dtype, dims: Dims, backend: str, isa: str) -> None:
    """Sizes of one, odd, prime, and larger than a tile in every dimension."""
    case = build(family, dims, dtype)
    check(results(case, backend), case)


@pytest.mark.of_cpp
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("width", [1, 2, 4, 6, 8, 9, 16])
def test_few_channels(width: int, seed: int, backend: str, isa: str) -> None:
    """Scores whose channels are too few to average errors out, and enough pairs to meet the largest ones."""
    case = build("scores", Dims(2, 128, 192, width), seed=seed)
    check(results(case, backend), case)


@pytest.mark.of_cpp
@pytest.mark.parametrize("dims", [Dims(2, 3, 5, 1), Dims(2, 3, 5, 3), Dims(2, 3, 5, 8), Dims(1, 4, 1, 9, 2), Dims(1, 4, 2, 8, 2)], ids=str)
def test_gradients_of_few(dims: Dims, backend: str, isa: str) -> None:
    """Of few channels or few keys: their roundings have few others to average with. Many cases, as one in a hundred or more is off."""
    for seed in range(300):
        case = build("scores", dims, hidden="lengths" if dims.batch > 1 else "none", seed=seed)
        try:
            check(results(case, backend), case)
        except AssertionError as wrong:
            raise AssertionError(f"seed {seed}: {wrong}") from wrong


@pytest.mark.of_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dims", [Dims(1, 1, 30011, 24), Dims(1, 6, 1031, 64), Dims(1, 40003, 3, 12), Dims(3000, 1, 2, 9)], ids=str)
def test_long_gradient_sums(dims: Dims, dtype: torch.dtype, backend: str, isa: str) -> None:
    """Over a long source, many queries, a large batch, of terms that all have one sign: their roundings do not add up."""
    case = build("scores", dims, dtype)
    case = case.replace(query=case.query.abs() / 10, keys=case.keys.abs() / 10, v=case.v.abs(), grad_weights=case.grad_weights.abs())
    check(results(case, backend), case)


@pytest.mark.of_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sums_of_the_largest_numbers(dtype: torch.dtype, backend: str, isa: str) -> None:
    """Of what is left over in a long sum, none is made where the sum itself is finite."""
    finfo = torch.finfo(dtype)
    v = torch.ones(16, dtype=dtype, requires_grad=True)
    query, keys = torch.full((2, 1, 16), 50, dtype=dtype), torch.zeros(2, 1, 16, dtype=dtype)
    scores = call(build("scores", dtype=dtype).replace(query=query, keys=keys, v=v), backend)[0]
    scores.backward(torch.tensor([-0.375 * finfo.max * finfo.eps, finfo.max], dtype=dtype).view(2, 1, 1))
    assert v.grad is not None
    assert (v.grad >= finfo.max * (1 - 2 * finfo.eps)).all()
    assert v.grad.isfinite().all()


@pytest.mark.of_cpp
@pytest.mark.parametrize("hidden", ["none", "both", "spans"])
@pytest.mark.parametrize("size", [1.0, 300.0])
def test_weights_computed_again(size: float, hidden: str, backend: str, isa: str) -> None:
    """Weights that were not kept are those that were, however large the scores: gradients have the same bits."""
    case = build("multiplicative", Dims(2, 150, 70, 20, 12), hidden=hidden).replace(grad_weights=None)
    case = case.replace(query=size * case.query.abs(), keys=size * case.keys.abs())
    leaves = [tensor.requires_grad_() for tensor in case.inputs().values()]
    found = []
    for need_weights in (False, True):
        context, _ = call(case, backend, need_weights=need_weights)
        found.append(dict(enumerate(torch.autograd.grad(context, leaves, case.grad_context))))
    assert_same_bits(*found)


@pytest.mark.of_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("width", [5, 16, 37, 300])
def test_v_whose_sum_overflows(width: int, dtype: torch.dtype, backend: str, isa: str) -> None:
    """Results are as many times larger as ``v`` is, and as exact, up to the largest number that it can hold."""
    case = build("scores", Dims(2, 5, 7, width), dtype)
    case = case.replace(query=case.query.abs() / 1000, keys=case.keys.abs() / 1000, grad_weights=case.grad_weights / 1000)
    power = 2.0 ** (math.frexp(torch.finfo(dtype).max)[1] - 1)
    most = torch.finfo(dtype).max / power
    for factors in (torch.full((width,), 1 / 16), most * torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(width)[:width]):
        unit = case.replace(v=factors.to(dtype))
        found = results(unit.replace(v=unit.v * power), backend)
        check({name: result if name == "d_v" else result / power for name, result in found.items()}, unit)


@pytest.mark.of_cpp
@pytest.mark.parametrize("below", [3, 12, 25, 28])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_v_near_the_largest_number(dtype: torch.dtype, below: int, backend: str, isa: str) -> None:
    """Where reciprocals merge, their product depends on ``v`` over its largest element, and not on how large that is."""
    case = build("scores", Dims(2, 5, 7, 256), dtype)
    case = case.replace(query=0.3 * case.query - 3, keys=0.3 * case.keys, v=torch.tensor([1.0, -0.9], dtype=dtype).repeat(128))
    power = 2.0 ** (math.frexp(torch.finfo(dtype).max)[1] - 8 - below)
    found = results(case.replace(v=case.v * power, grad_weights=case.grad_weights / power), backend)
    large = {name: result * power if name == "d_v" else result / power if name == "scores" else result for name, result in found.items()}
    check(large, case)


@pytest.mark.parametrize("span", RANGES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_ranges(family: str, dtype: torch.dtype, span: str, backend: str, isa: str) -> None:
    """All finite inputs, however small, large or cancelling, are exact in the contract's sense."""
    case = build(family, Dims(2, 7, 21, 37, 10), dtype, span=span)
    check(results(case, backend), case)


SMALL = [("grad_context",), ("values",), ("keys", "query"), ("query", "keys")]  # and of two the other as large, so that scores stay


@pytest.mark.of_cpp
@pytest.mark.parametrize("small", [1e-30, 1e-34, 1e-36])
@pytest.mark.parametrize("where", SMALL, ids=" beside large ".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("steps", [5, 40])
def test_small_beside_large(steps: int, dtype: torch.dtype, where: tuple[str, ...], small: float, backend: str, isa: str) -> None:
    """Products of numbers near the least and the largest that there are."""
    case = build("multiplicative", Dims(2, steps, 90, 40, 33), dtype)
    case = case.replace(**{name: getattr(case, name) * by for name, by in zip(where, (small, 1 / small), strict=False)})
    check(results(case, backend), case)


@pytest.mark.parametrize("hidden", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_masks(family: str, dtype: torch.dtype, hidden: str, backend: str, isa: str) -> None:
    """Lengths and masks of every kind, with NaN in what no query sees."""
    case = build(family, Dims(4, 6, 41, 20, 13), dtype, hidden=hidden)
    check(results(garbage(case, torch.nan), backend), case)


@pytest.mark.of_cpp
@pytest.mark.parametrize("hidden", MASKS)
@pytest.mark.parametrize("span", ["normal", "cancelling 22", "huge"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masks_of_many_keys(dtype: torch.dtype, span: str, hidden: str, backend: str, isa: str) -> None:
    """Gradients of additive scores take keys some at a time: what is hidden, and which keys are in range, goes on across."""
    case = build("additive", Dims(2, 9, 300, 20, 5), dtype, span=span, hidden=hidden)
    check(results(garbage(case, torch.nan), backend), case)


@pytest.mark.parametrize("hidden", MASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_masks_with_heads(family: str, hidden: str, backend: str) -> None:
    """Lengths and masks are shared by the heads, unless a mask has a dimension for them."""
    case = build(family, Dims(3, 4, 19, 10, 7, heads=2), hidden=hidden)
    check(results(garbage(case, torch.nan), backend), case)


@pytest.mark.parametrize("dims", EMPTY, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hidden", ["none", "lengths", "padding"])
@pytest.mark.parametrize("family", FAMILIES)
def test_empty_dimensions(family: str, hidden: str, dtype: torch.dtype, dims: Dims, backend: str) -> None:
    """Contract 6: any dimension may be empty."""
    case = build(family, dims, dtype, hidden=hidden)
    found = results(case, backend)
    check(found, case)
    if family != "scores" and dims.source == 0:
        assert not found["context"].any()
    if family != "scores" and dims.width == 0 and hidden == "none":
        assert (found["weights"] == torch.tensor(1 / max(dims.source, 1)).to(dtype)).all()


@pytest.mark.parametrize(("values_width", "source"), [(4, 64), (64, 4), (256, 512), (257, 40), (3, 7)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", ["none", "both"])
def test_weights_that_are_not_asked_for(hidden: str, dtype: torch.dtype, values_width: int, source: int, backend: str, isa: str) -> None:
    """Kept or recomputed for the backward, gradients are right when no weights are returned."""
    for family in ("additive", "multiplicative"):
        case = build(family, Dims(2, 5, source, 12, values_width), dtype, hidden=hidden).replace(grad_weights=None)
        found = results(case, backend)
        assert "weights" not in found
        wanted = case.replace(grad_weights=torch.zeros_like(build(family, Dims(2, 5, source, 12, values_width), dtype).grad_weights))
        check({**found, "weights": results(wanted, backend)["weights"]}, wanted)


@pytest.mark.parametrize("scale", [0.0, 1.0, -2.5, 1e-3])
def test_scale(scale: float, backend: str) -> None:
    """Multiplicative scores are scaled, by any number."""
    case = build("multiplicative", Dims(2, 3, 17, 9, 5)).replace(scale=scale)
    check(results(case, backend), case)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("hidden", ["none", "lengths", "padding"])
@pytest.mark.parametrize("heads", [0, 2])
def test_one_step(family: str, heads: int, hidden: str, backend: str) -> None:
    """A query without T gives the results of T = 1 without T, bit for bit; its mask may be ``[B, S]``."""
    case = build(family, Dims(3, 1, 11, 8, 6, heads=heads), hidden=hidden)
    mask = None if case.mask is None else case.mask.squeeze(1)
    stepped = call(case.replace(query=case.query.squeeze(-2), mask=mask), backend)
    for got, expected in zip(stepped, call(case, backend), strict=True):
        assert torch.equal(got, expected.squeeze(-2))


@pytest.mark.of_cpp
@pytest.mark.parametrize("steps", [1, 9])
@pytest.mark.parametrize("family", ["additive", "multiplicative"])
def test_long_sums(family: str, steps: int, backend: str, isa: str) -> None:
    """A context of 2^14 equal weights rounds no oftener than eager's, twice over, and once more."""
    source = 2**14
    case = build(family, Dims(batch=1, steps=steps, source=source, width=9, value_width=32))
    values = torch.rand(case.values.shape, generator=torch.Generator().manual_seed(0))
    case = case.replace(query=torch.zeros_like(case.query), keys=torch.zeros_like(case.keys), values=values)
    exact = values.double().mean(1, keepdim=True)
    mine, eager = ((call(case, name)[0].double() - exact).abs() for name in (backend, "reference"))
    assert (mine <= 2 * eager.max() + torch.finfo(torch.float32).eps * exact).all()
