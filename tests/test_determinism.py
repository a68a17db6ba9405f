"""Contract 4: bitwise the same result on every run and for every number of threads."""

from collections.abc import Callable

import pytest
import torch
from cases import DTYPES, FAMILIES, Dims, assert_same_bits, build, results

SHAPES = [
    Dims(1, 1, 1, 1, 1),
    Dims(1, 1, 1031, 24, 40),
    Dims(1, 1, 1031, 24, 45),  # long enough to be shared out over the source
    Dims(1, 5, 700, 64, 130),
    Dims(2, 16, 513, 100, 40),
    Dims(1, 1, 40, 257, 515),
    Dims(1, 131, 67, 19, 40),
    Dims(1, 197, 16, 1, 1),
    Dims(3, 67, 33, 8, 5),
    Dims(2, 65, 16, 1, 1),
    Dims(1, 5, 300, 64, 7),
    Dims(7, 3, 45, 40, 33),
    Dims(2, 64, 64, 64, 64),
    Dims(64, 1, 50, 32, 16),
    Dims(2, 9, 37, 24, 10, heads=3),
    Dims(1, 150, 97, 40, 64),  # of one source, all threads share each block of queries
    Dims(5, 33, 61, 40, 33),  # of five, those that are left over
]


@pytest.mark.parametrize("hidden", ["none", "both", "holes", "lengths per query", "spans", "moving spans"])
@pytest.mark.parametrize("dims", SHAPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_threads_and_repeats(family: str, dims: Dims, hidden: str, backend: str, isa: str, set_threads: Callable[[int], None]) -> None:
    """1, 2 and 3 threads, twice each, forward and backward."""
    if backend == "reference":
        pytest.xfail("torch's matrix products promise no such thing")
    case = build(family, dims, hidden=hidden)
    set_threads(1)
    expected = results(case, backend)
    for count in (1, 2, 3, 2, 3):
        set_threads(count)
        assert torch.get_num_threads() == count
        assert_same_bits(results(case, backend), expected)


@pytest.mark.of_cpp
@pytest.mark.parametrize("dims", [Dims(75, 3, 20, 24, 10), Dims(1, 40, 64, 64, 50)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_many_threads(family: str, dims: Dims, backend: str, set_threads: Callable[[int], None]) -> None:
    """More threads than there are runs of tasks, which some then share, and than a source has shares to give."""
    if backend == "reference":
        pytest.xfail("torch's matrix products promise no such thing")
    case = build(family, dims, hidden="lengths")
    set_threads(1)
    expected = results(case, backend)
    set_threads(70)
    assert_same_bits(results(case, backend), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", [Dims(3, 33, 129, 40, 24), Dims(1, 2, 900, 40, 63)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_dtypes(family: str, dims: Dims, dtype: torch.dtype, backend: str, set_threads: Callable[[int], None]) -> None:
    """The same for every dtype, with and without weights."""
    if backend == "reference":
        pytest.xfail("torch's matrix products promise no such thing")
    whole = build(family, dims, dtype, hidden="lengths")
    for case in [whole] if family == "scores" else [whole, whole.replace(grad_weights=None)]:
        set_threads(1)
        expected = results(case, backend)
        for count in (2, 3):
            set_threads(count)
            assert_same_bits(results(case, backend), expected)


@pytest.mark.parametrize("span", ["cancelling 60", "one channel cancelling", "huge", "wide"])
@pytest.mark.parametrize("family", FAMILIES)
def test_ranges(family: str, span: str, backend: str, set_threads: Callable[[int], None]) -> None:
    """The same where another path may be taken for part of the rows."""
    if backend == "reference":
        pytest.xfail("torch's matrix products promise no such thing")
    case = build(family, Dims(3, 33, 65, 40, 24), span=span)
    case = case.replace(query=torch.cat([case.query[:, :16], build(family, Dims(3, 17, 65, 40, 24)).query], 1))
    set_threads(1)
    expected = results(case, backend)
    for count in (2, 3):
        set_threads(count)
        assert_same_bits(results(case, backend), expected)


@pytest.mark.of_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["additive", "multiplicative"])
def test_a_value_that_is_not_finite(family: str, dtype: torch.dtype, backend: str, set_threads: Callable[[int], None]) -> None:
    """Its row is seen by all queries of some blocks and by some of others, and threads decide which are a block."""
    if backend == "reference":
        pytest.xfail("torch's matrix products promise no such thing")
    case = build(family, Dims(1, 256, 64, 24, 40), dtype)
    values, mask = case.values.clone(), torch.ones(1, 256, 64, dtype=torch.bool)
    values[:, 5, 0], values[:, 7, 3], mask[:, 100:, 5], mask[:, ::2, 7] = torch.inf, torch.nan, False, False
    case = case.replace(values=values, mask=mask)
    set_threads(1)
    expected = results(case, backend)
    assert expected["context"][:, :, 1].isfinite().all()
    for count in (2, 3, 4):
        set_threads(count)
        assert_same_bits(results(case, backend), expected)
