"""Tiles found by trying: which are tried, that the fastest one is launched, and when nothing is tried."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs triton, whose kernels these tiles are of")

from onepass.kernels import tuning
from onepass.kernels.launches import Launch, recorded
from onepass.kernels.ops import OPS
from onepass.kernels.tiles import Device, Tile

GPU = Device(132)


@pytest.fixture(autouse=True)
def on(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ONEPASS_TUNE", "1")
    tuning._best.clear()
    yield
    tuning._best.clear()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[tuning.Tiles]:
    """More seconds the further positions of a source tile are from 32, and warps from 2; and what was tried."""
    tried = []

    def seconds(run: Callable[[], Any]) -> float:
        run()
        tried.append(dict(tuning._here.given))
        tiles = [tuning._here.given.get(kernel, tile) for kernel, (tile, _) in tuning._here.met.items()]
        return float(sum(1 + abs(tile.BS - 32) + 8 * abs(tile.warps - 2) for tile in tiles))

    monkeypatch.setattr(tuning, "seconds", seconds)
    return tried


def launched(op: str, sizes: dict[str, int] | None = None, dtype: torch.dtype = torch.float32) -> list[Launch]:
    n = {"B": 2, "T": 40, "S": 250, "A": 64, "D": 96} | (sizes or {})
    query, keys, values, gradient = (
        torch.zeros(n["B"], n[rows], n[width], dtype=dtype) for rows, width in ("TA", "SA", "SD", "TD")
    )  # fmt: skip
    v, weights = torch.zeros(n["A"], dtype=dtype), torch.zeros(n["B"], n["T"], n["S"])
    arguments = {
        "additive_forward": (query, keys, values, v, None, None),
        "additive_backward": (gradient, None, query, keys, values, v, weights, None, None),
    }
    with recorded(GPU) as launches:
        OPS[op](*arguments[op])
    return launches


def test_the_fastest_is_launched(clock: list[tuning.Tiles]) -> None:
    launches = launched("additive_backward")
    kernels = {launch.name: launch.given for launch in launches[-4:]}
    assert kernels.keys() == {"weight_gradients", "softmax_gradients", "tanh_gradients", "sums"}
    for name in ("weight_gradients", "sums"):
        assert (kernels[name]["BS"], kernels[name]["num_warps"]) == (32, 2)
    assert (kernels["tanh_gradients"]["BT"], kernels["tanh_gradients"]["num_warps"]) == (40, 2)  # its queries are not free to change
    assert len(clock) < 60


def test_once_for_sizes_up_to_a_power_of_2(clock: list[tuning.Tiles]) -> None:
    launched("additive_forward")
    count = len(clock)
    for S, T in ((129, 40), (256, 33)):
        assert len(launched("additive_forward", {"S": S, "T": T})) <= 2
    assert len(clock) == count
    launched("additive_forward", {"S": 257})
    assert len(clock) > count
    count = len(clock)
    launched("additive_forward", dtype=torch.bfloat16)
    assert len(clock) > count


@pytest.mark.parametrize("value", ["0", None])
def test_off(value: str | None, monkeypatch: pytest.MonkeyPatch, clock: list[tuning.Tiles]) -> None:
    if value is None:
        monkeypatch.delenv("ONEPASS_TUNE")
    else:
        monkeypatch.setenv("ONEPASS_TUNE", value)
    launched("additive_forward")
    assert clock == []


def test_not_while_a_graph_is_recorded(monkeypatch: pytest.MonkeyPatch, clock: list[tuning.Tiles]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    launched("additive_forward")
    assert clock == []
    assert not tuning._best


def test_what_fails_is_passed_over() -> None:
    """Also where all neighbours fail."""
    rule = Tile(BT=32, BS=64, warps=4, stages=2)

    def run() -> None:
        if tuning.chosen("kernel", rule, "BT", "BS") != rule:
            raise RuntimeError("out of resource: shared memory")

    assert tuning.search(run) == {"kernel": rule}


def test_an_error_of_the_call_is_raised() -> None:
    def run() -> None:
        raise RuntimeError("no such thing")

    with pytest.raises(RuntimeError, match="no such thing"):
        tuning.search(run)


def test_neighbours() -> None:
    tile = Tile(BT=16, BS=256, BD=64, warps=1, stages=1)
    around = list(tuning.neighbours(tile, ("BT", "BS")))
    assert {(other.BT, other.BS, other.BD, other.warps, other.stages) for other in around} == {
        (32, 256, 64, 1, 1), (16, 128, 64, 1, 1), (16, 256, 64, 2, 1), (16, 256, 64, 1, 2),
    }  # fmt: skip
    assert len(around) == 4


def test_other_threads_keep_theirs() -> None:
    rule, seen = Tile(BT=16), []
    with tuning.instead({"kernel": Tile(BT=64)}):
        thread = threading.Thread(target=lambda: seen.append(tuning.chosen("kernel", rule).BT))
        thread.start()
        thread.join()
        assert tuning.chosen("kernel", rule).BT == 64
    assert seen == [16]


def test_seconds_are_of_calls_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    now, lengths = [0.0], iter([1000.0, 5.0, 1.0, 2.0, 3.0, 4.0])

    def run() -> None:
        now[0] += next(lengths)

    monkeypatch.setattr(tuning.time, "perf_counter", lambda: now[0])
    assert tuning.seconds(run) == 3.0
