"""Tiles that are found by trying are right too: each neighbour of the rules' own, compiled for sm_80 and executed on the PTX machine."""

from collections.abc import Iterator

import pytest
from cases import Case, Dims, build, results
from tolerance import check

pytest.importorskip("triton", reason="needs triton, to compile kernels to PTX")

from triton_machine import executed, ops_of_triton

from onepass import functional
from onepass.kernels import tuning
from onepass.kernels.launches import recorded
from onepass.kernels.tiles import Device

GPU = Device(1)
DIMS = Dims(batch=1, steps=40, source=150, width=40, value_width=72)  # of which no tile has a whole number
KERNELS = {
    "additive": {"attend", "weight_gradients", "tanh_gradients", "sums over queries"},
    "multiplicative": {"attend_online", "attend", "weight_gradients", "sums over the source", "sums over queries"},
}
MOST = 10  # neighbours of a tile


@pytest.fixture(scope="module", autouse=True)
def on_the_machine() -> Iterator[None]:
    with ops_of_triton():
        yield


def tried(case: Case) -> dict[str, list[tuning.Tile]]:
    """By kernel, what a search would try first."""
    tuning._here.met.clear()
    with recorded(GPU):
        results(case, "cpu")
    return {kernel: list(tuning.neighbours(tile, sizes)) for kernel, (tile, sizes) in tuning._here.met.items()}


@pytest.mark.parametrize("place", range(MOST))
@pytest.mark.parametrize("family", KERNELS)
def test_neighbours(monkeypatch: pytest.MonkeyPatch, family: str, place: int) -> None:
    """Of every kernel of a forward and a backward one neighbour at a time; multiplicative weights are computed again."""
    monkeypatch.setattr(functional, "_weights_are_small", lambda *tensors: False)
    case = build(family, DIMS, hidden="lengths").replace(grad_weights=None)
    around = tried(case)
    assert around.keys() == KERNELS[family]
    assert max(map(len, around.values())) <= MOST
    with tuning.instead({kernel: tiles[place % len(tiles)] for kernel, tiles in around.items()}), executed(GPU) as done:
        found = results(case, "cpu")
    assert not done.findings, "\n".join(map(str, done.findings))
    check(found, case)
