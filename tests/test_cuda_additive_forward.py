"""The CUDA forward of additive attention: its compiled code on the PTX machine, right within the contract's bounds and without a finding; and
what compilers make of it for each architecture."""

import pytest
import torch
from cases import Case, Dims, build, garbage
from cuda_machine import NVCC
from tolerance import check

pytestmark = pytest.mark.skipif(NVCC is None, reason="needs nvcc, to compile kernels")

from cuda_additive_forward import Results, run  # noqa: E402 - compiles when called

SMALL = Dims(batch=2, steps=3, source=37, width=12, value_width=20)


def checked(case: Case, **options: object) -> Results:
    got, machine = run(case, **options)
    assert not machine.findings, "\n".join(map(str, machine.findings))
    check(got, case, part=True)
    return got


@pytest.mark.parametrize("hidden", ["none", "lengths", "lengths per query", "holes", "shared", "spans", "one row hidden", "nothing"])
@pytest.mark.parametrize("family", ["additive", "scores"])
def test_visibility(family: str, hidden: str) -> None:
    checked(build(family, SMALL, hidden=hidden))


@pytest.mark.parametrize("tile", [16, 32, 64])
def test_tiles(tile: int) -> None:
    """Several of queries and positions, none of them full."""
    checked(build("additive", Dims(batch=1, steps=tile + 3, source=150, width=24, value_width=36), hidden="holes"), tile=tile)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtype(dtype: torch.dtype) -> None:
    checked(build("additive", SMALL, dtype, hidden="lengths"))


def test_heads() -> None:
    checked(build("additive", Dims(batch=1, steps=5, source=20, width=12, value_width=8, heads=2), hidden="holes"))


@pytest.mark.parametrize("dims", [Dims(1, 17, 9, 1, 3), Dims(1, 17, 9, 9, 1), Dims(1, 3, 140, 64, 300), Dims(1, 2, 0, 5, 4), Dims(1, 2, 3, 0, 0)])
def test_sizes(dims: Dims) -> None:
    """Channels too few to merge, numbers that no vector divides, several tiles of values, nothing at all."""
    checked(build("additive", dims))


@pytest.mark.parametrize("span", ["tiny", "cancelling 11", "cancelling 60", "one channel cancelling", "huge", "huge v", "zero v", "mixed channels"])
def test_ranges(span: str) -> None:
    checked(build("additive", SMALL, span=span))


def test_approximate_instructions() -> None:
    """``rcp.approx`` and ``ex2.approx`` as far off as they may be."""
    checked(build("additive", SMALL), approximate=True)


def test_garbage_changes_no_bit() -> None:
    case = build("additive", SMALL, hidden="lengths")
    clean, dirty = (checked(each) for each in (case, garbage(case, float("nan"))))
    for name, expected in clean.items():
        assert torch.equal(dirty[name], expected), name
