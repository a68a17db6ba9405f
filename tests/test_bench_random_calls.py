"""Calls drawn at random: both compute the same, what is wrong is said, and a run of the whole is kept when it is interrupted."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer.testing

from onepass.benchmarks import random_calls
from onepass.benchmarks.random_calls import Call, Prepared, Timed, draw, markdown
from onepass.benchmarks.workloads import BOTH, FORWARD

APP = typer.Typer()
APP.command()(random_calls.main)


def call(**changes: object) -> Call:
    given = {"family": "additive", "direction": BOTH, "dtype": "float32", "hidden": "nothing", "layout": "batch first"}
    return Call(**{**given, "B": 2, "H": 1, "T": 3, "S": 7, "A": 20, "D": 9, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("family", random_calls.FUNCTIONS)
@pytest.mark.parametrize("hidden", sorted(set(random_calls.HIDDEN)))
@pytest.mark.parametrize("H", [1, 2])
@pytest.mark.parametrize("layout", ["batch first", "time first"])
def test_both_compute_the_same(family: str, hidden: str, H: int, layout: str) -> None:
    for direction in (FORWARD, BOTH):
        prepared = Prepared(call(family=family, hidden=hidden, H=H, layout=layout, direction=direction), 0)
        assert prepared.wrong() == ""
        keys = prepared.inputs[1]
        assert keys.is_contiguous() == (layout == "batch first")
        assert keys.stride(-1) == 1
        assert len(prepared.run(prepared.onepass)) == (1 if direction == FORWARD else len(prepared.inputs))


@pytest.mark.parametrize(("factor", "said"), [(1.1, "output 0: off by"), (torch.nan, "output 0: not finite where eager's is")])
def test_what_is_wrong_has_no_time(factor: float, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = Prepared(call(direction=FORWARD), 0)
    right = prepared.onepass
    monkeypatch.setattr(prepared, "onepass", lambda *inputs: factor * right(*inputs))
    found = prepared.timed()
    assert found.wrong.startswith(said)
    assert f"Wrong, {found.wrong}" in markdown([found], "here", 0)


def test_what_is_drawn() -> None:
    """The same calls for a seed, of all kinds, none larger than eager's tensor may be."""
    first, again = ([draw(chance) for _ in range(400)] for chance in (random.Random(3), random.Random(3)))
    assert first == again
    assert {one.family for one in first} == set(random_calls.FUNCTIONS)
    assert {one.hidden for one in first} == set(random_calls.HIDDEN)
    assert max(one.B * one.H * one.T * one.S * one.A for one in first) <= random_calls.MOST_TERMS


def test_the_page() -> None:
    timed = [Timed(call(S=size), ratio, 1.0, ratio) for size, ratio in ((7, 0.5), (8, 2.0), (9, 3.0))]
    text = markdown(timed, "a machine", 5)
    assert "3 calls of seed 5" in text
    assert "| additive | forward + backward | float32 | 3 | 0.65 | 2.00 | 2.90 | 1 |" in text
    assert "1 of 3 are slower than eager" in text
    assert text.index("| 0.50 | 1 | 0.5 |") < text.index("| 2.00 | 1 | 2 |")


def test_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_calls, "TURN", 1e-4)
    files = ["--json", f"{tmp_path}/a.json", "--page", f"{tmp_path}/a.md"]
    done = typer.testing.CliRunner().invoke(APP, ["--seconds", "1", *files])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "a.json").read_text())
    assert found
    assert all(one["ratio"] > 0 for one in found)
    assert f"of {len(found)} are slower than eager" in (tmp_path / "a.md").read_text()


def test_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    def calls(seconds: float, seed: int) -> Iterator[Timed]:
        yield Timed(call(), 2.0, 1.0, 2.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(random_calls, "measured", calls)
    done = typer.testing.CliRunner().invoke(APP, [])
    assert done.exit_code == 130
    assert "0 of 1 are slower than eager" in done.output
