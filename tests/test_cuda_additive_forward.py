"""The CUDA forward of additive attention: its compiled code on the PTX machine, within the contract's bounds and without a finding."""

import dataclasses
from typing import Any

import pytest
import torch
from cases import Case, Dims, build, garbage
from cuda_machine import NVCC, kernel, launches, sizes_of
from ptx import Kernel
from tolerance import check

pytestmark = pytest.mark.skipif(NVCC is None, reason="needs nvcc, to compile kernels")

from cuda_additive_forward import SOURCE, Results, run  # noqa: E402 - compiles when called

SMALL = Dims(batch=2, steps=3, source=37, width=12, value_width=20)


def checked(case: Case, **options: Any) -> Results:
    got, machine = run(case, **options)
    assert not machine.findings, "\n".join(map(str, machine.findings))
    check(got, case, part=True)
    return got


@pytest.mark.parametrize("hidden", ["none", "lengths", "lengths per query", "holes", "spans", "one row hidden", "nothing"])
def test_visibility(hidden: str) -> None:
    checked(build("additive", SMALL, hidden=hidden))


@pytest.mark.parametrize("hidden", ["none", "holes", "moving spans"])
def test_scores_alone(hidden: str) -> None:
    checked(build("scores", SMALL, hidden=hidden))


@pytest.mark.parametrize("tile", [16, 32, 64])
def test_tiles(tile: int) -> None:
    """Several of queries and positions, none of them full."""
    checked(build("additive", Dims(batch=1, steps=tile + 3, source=150, width=24, value_width=36), hidden="holes"), tile=tile)


@pytest.mark.parametrize("architecture", ["90", "100"])
def test_architectures(architecture: str) -> None:
    """Where other numbers of channels merge, and where two are computed at once."""
    checked(build("additive", Dims(batch=1, steps=3, source=130, width=40, value_width=8), hidden="lengths"), architecture=architecture)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_widths(dtype: torch.dtype) -> None:
    checked(build("additive", SMALL, dtype, hidden="lengths"))
    checked(build("scores", Dims(batch=1, steps=2, source=9, width=13, value_width=1), dtype))


def test_float64() -> None:
    checked(build("additive", Dims(batch=1, steps=2, source=9, width=3, value_width=3), torch.float64, hidden="holes"))


def test_heads() -> None:
    checked(build("additive", Dims(batch=1, steps=5, source=20, width=12, value_width=8, heads=2), hidden="holes"))


@pytest.mark.parametrize("sizes", [(17, 9, 1, 3), (17, 9, 9, 1), (3, 140, 64, 300), (2, 0, 5, 4), (2, 3, 0, 0)])
def test_sizes(sizes: tuple[int, ...]) -> None:
    """Channels too few to merge, numbers that no vector divides, several tiles of values, nothing at all."""
    checked(build("additive", Dims(1, *sizes)))


def test_rows_out_of_line() -> None:
    """Rows of a larger tensor that start at no multiple of 16 bytes give the bits of rows that do."""
    case = build("additive", SMALL)
    wider = {name: torch.nn.functional.pad(tensor, (1, 2)) for name, tensor in case.inputs().items()}
    apart = case.replace(**{name: tensor[..., 1:-2] for name, tensor in wider.items()})
    for got, expected in zip(checked(apart).values(), checked(case).values(), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("span", ["tiny", "cancelling 11", "cancelling 60", "huge", "huge v", "zero v", "mixed channels"])
def test_ranges(span: str) -> None:
    checked(build("additive", SMALL, span=span))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["query", "keys", "values", "v"])
def test_not_finite(name: str, bad: float) -> None:
    case = build("additive", SMALL, hidden="lengths")
    broken = getattr(case, name).clone()
    broken[(0, 2, 1)[-broken.dim() :]] = bad
    checked(case.replace(**{name: broken}))


def test_queries_that_do_not_see_a_position_do_not_know_what_is_there() -> None:
    case = build("additive", SMALL, hidden="holes")
    keys, values = case.keys.clone(), case.values.clone()
    keys[:, 5, 1], values[:, 5, 2] = float("nan"), float("inf")
    (clean, _), (dirty, machine) = run(case), run(case.replace(keys=keys, values=values))
    assert not machine.findings
    blind = ~case.visible()[:, :, 5]
    assert blind.any()
    for name, expected in clean.items():
        assert torch.equal(dirty[name][blind], expected[blind]), name
        assert dirty[name][~blind].isnan().any(), name


def test_approximate_instructions() -> None:
    """``rcp.approx`` and ``ex2.approx`` as far off as they may be."""
    checked(build("additive", SMALL), approximate=True)


def test_garbage_changes_no_bit_and_neither_does_another_run() -> None:
    case = build("additive", SMALL, hidden="lengths")
    clean, again, dirty = (checked(each) for each in (case, case, garbage(case, float("nan"))))
    for name, expected in clean.items():
        assert torch.equal(again[name], expected), name
        assert torch.equal(dirty[name], expected), name


def test_wavefronts() -> None:
    """Full tiles meet next to no bank twice."""
    _, machine = run(build("additive", Dims(batch=1, steps=64, source=128, width=64, value_width=128)))
    assert machine.counts["shared wavefronts"] <= 1.05 * machine.counts["shared wavefronts at least"]


def without_barrier(code: Kernel, number: int) -> Kernel:
    barriers = [place for place, item in enumerate(code.instructions) if item.opcode in ("bar", "barrier") and item.parts[0] == "sync"]
    dropped = barriers[number]
    instructions = [item for place, item in enumerate(code.instructions) if place != dropped]
    return dataclasses.replace(
        code, instructions=instructions, labels={name: place - (place > dropped) for name, place in code.labels.items()}
    )


@pytest.mark.parametrize("number", range(-6, 0))
def test_a_deleted_barrier_is_found(number: int) -> None:
    """Of those in the loops: over channels, merged and not, over positions, and over values."""
    case = build("additive", Dims(batch=1, steps=20, source=150, width=20, value_width=150))
    case.query[0, 3] *= 60
    whole = kernel(SOURCE, launches("additive_forward", sizes_of(case), case.query.dtype, capability=90)[0].kernel)
    _, machine = run(case, code=without_barrier(whole, number))
    assert "shared race" in {finding.kind for finding in machine.findings}
