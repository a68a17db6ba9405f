"""The scaling study: exponents, who is left out, losses and their reasons, and a small run of the whole."""

import math
from pathlib import Path

import pytest
import typer.testing

from onepass.benchmarks import scaling
from onepass.benchmarks.exponents import MEMORY, TIME, Curve, curves, fit, losses, theory
from onepass.benchmarks.records import MISSING, WRONG, Record, Results, load
from onepass.benchmarks.scaling_report import left_out_rows, markdown
from onepass.benchmarks.study import Study
from onepass.benchmarks.workloads import BOTH, FORWARD, Shape, Workload


def curve(quantity: str, points: dict[int, float], axis: str = "S", kernel: str = "additive", provider: str = "onepass cpu") -> Curve:
    return Curve(axis, quantity, kernel, BOTH, provider, tuple(points.items()))


def record(S: int, provider: str, seconds: list[float], kernel: str = "additive", **more: object) -> Record:
    shape = Shape("over S", 2, 16, S, 128, 128)
    found = Record.of(Workload(kernel, shape), provider, FORWARD, seconds=seconds)
    for name, value in more.items():
        setattr(found, name, value)
    return found


def results_of(*records: Record) -> Results:
    results = Results.here("cpu")
    results.records = list(records)
    return results


def test_the_exponent_is_that_of_the_upper_half() -> None:
    """What calls cost is not in it."""
    found = fit(curve(TIME, {2**i: 1e-5 if i < 5 else 1e-7 * 2 ** (1.5 * i) for i in range(11)}))
    assert found is not None
    assert found.exponent == pytest.approx(1.5)
    assert found.error == pytest.approx(0, abs=1e-9)
    assert (found.low, found.high) == (32, 1024)


def test_the_standard_error_is_that_of_the_slope() -> None:
    """Three points at logarithms 0, 1, 2 with values 0, 1 + d, 2: the slope stays 1, the rest is 2/3 d^2 over one degree of freedom."""
    d = 0.1
    found = fit(curve(TIME, {1: 1e-9, 16: 1.0, 32: 2 * 2**d, 64: 4.0}))
    assert found is not None
    assert found.exponent == pytest.approx(1)
    assert found.error == pytest.approx(d * math.sqrt(2 / 3 / 2))


def test_what_is_too_little_has_no_exponent() -> None:
    assert fit(curve(TIME, {32: 1.0, 64: 2.0, 128: 4.0})) is None
    memory = {2**i: 2.0**i * 1000 for i in range(5, 12)}
    assert fit(curve(MEMORY, memory)) is None
    assert fit(curve(TIME, {1: 4.0, 2: 2.0}, axis="threads")) is not None


@pytest.mark.parametrize(
    ("axis", "quantity", "kernel", "provider", "expected"),
    [
        ("S", TIME, "additive", "onepass cpu", 1),
        ("T = S", TIME, "multiplicative", "eager", 2),
        ("threads", TIME, "additive", "eager", -1),
        ("S", MEMORY, "additive", "onepass cpu", 1),
        ("T = S", MEMORY, "additive", "onepass cpu", 2),
        ("S", MEMORY, "multiplicative", "onepass cpu", 0),
        ("T = S", MEMORY, "multiplicative", "SDPA", 1),
        ("T = S", MEMORY, "multiplicative", "eager", 2),
    ],
)
def test_theory(axis: str, quantity: str, kernel: str, provider: str, expected: float) -> None:
    assert theory(curve(quantity, {1: 1.0}, axis, kernel, provider)) == expected


def test_losses_and_their_reasons() -> None:
    found = losses(
        results_of(
            record(32, "onepass cpu", [1.0, 1.01, 1.02], "multiplicative"),
            record(32, "eager", [0.5, 0.51, 0.52], "multiplicative"),  # the smallest of the sweep
            record(64, "onepass cpu", [2.0, 4.0, 5.0], "multiplicative"),
            record(64, "eager", [1.0, 3.0, 4.5], "multiplicative"),  # its rounds and onepass's overlap
            record(128, "onepass cpu", [8.0, 8.1, 8.2], "multiplicative"),
            record(128, "eager", [6.0, 6.1, 6.2], "multiplicative"),
            record(32, "onepass cpu", [0.1, 0.1, 0.1]),
            record(64, "onepass cpu", [9.0, 9.0, 9.0]),
            record(64, "eager", [8.0, 8.0, 8.0]),
            record(128, "onepass cpu", [1.0, 1.0, 1.0]),
            record(128, "eager", [3.0, 3.0, 3.0]),
        )
    )
    reasons = [(loss.own.kernel, loss.own.shape.S, loss.reason.split(":")[0].split(",")[0]) for loss in found]
    assert reasons == [
        ("multiplicative", 32, "calls cost more than work"),
        ("multiplicative", 64, "within the noise of the rounds"),
        ("multiplicative", 128, "two matrix products"),
        ("additive", 64, "not accounted for"),
    ]


def test_who_would_take_too_long_or_too_much_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    study = scaling.Scaling(Study({"onepass cpu", "eager"}), limit=1.0)
    small, large = (Workload("additive", Shape("over S", 2, 16, S, 128, 128)) for S in (128, 512))
    study.last["additive", "over S", "eager"] = 0.3, scaling.terms(small)
    assert study._reason("eager", small) == ""
    assert study._reason("eager", large) == "a call would take about 1.2 s, the limit is 1.0 s"
    assert study._reason("onepass cpu", large) == ""
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1024}.__getitem__)
    assert "the machine has" in study._reason("eager", small)
    left = [record(S, "eager", [], status=MISSING, reason="too long") for S in (256, 512)]
    assert list(left_out_rows(results_of(*left))) == [["additive", "S", "eager", "256", "too long"]]


def test_the_page_says_who_is_wrong() -> None:
    text = markdown(results_of(record(64, "onepass cpu", [], status=WRONG, reason="output 0: off by 1e-3")))
    assert "| additive | forward | S | 64 | onepass cpu | wrong: output 0: off by 1e-3 |" in text


TINY = (scaling.Sweep("S", "additive", Shape("", 2, 3, 4, 16, 16), 4, 32, 4), scaling.Sweep("T = S", "multiplicative", scaling.BASE, 1, 4))
RUN = ["--rounds", "1", "--provider", "onepass cpu", "--provider", "eager"]


def test_a_small_run_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "SWEEPS", TINY)
    monkeypatch.setattr(scaling, "THREADED", Shape("over threads", 2, 3, 4, 16, 16))
    app = typer.Typer()
    app.command()(scaling.main)
    files = ["--json", f"{tmp_path}/a.json", "--pictures", str(tmp_path), "--page", f"{tmp_path}/a.md"]
    done = typer.testing.CliRunner().invoke(app, [*RUN, *files])
    assert done.exit_code == 0, done.output
    results = load(tmp_path / "a.json")
    over_s = next(c for c in curves(results) if (c.axis, c.quantity, c.direction, c.provider) == ("S", TIME, BOTH, "onepass cpu"))
    assert [x for x, _ in over_s.points] == [4, 8, 16, 32]
    assert [r.shape.S for r in results.records if "peak bytes" in r.metrics and r.provider == "eager"] == [4]
    assert not [r for r in results.records if r.status not in ("measured", MISSING)]
    text = (tmp_path / "a.md").read_text()
    assert text == markdown(results, ["scaling-time.svg"])
    assert "](scaling-time.svg)" in text
    for heading in ("## Exponents", "## Where a peer is faster", "## multiplicative, forward, over T = S: milliseconds"):
        assert heading in text
    assert (tmp_path / "scaling-time.png").stat().st_size > 10_000


def test_ctrl_c_keeps_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: object, workload: Workload) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(scaling, "SWEEPS", TINY[1:])
    monkeypatch.setattr(scaling.Scaling, "threads", interrupted)
    app = typer.Typer()
    app.command()(scaling.main)
    done = typer.testing.CliRunner().invoke(app, [*RUN, "--page", f"{tmp_path}/a.md"])
    assert done.exit_code == 130
    assert "over T = S" in (tmp_path / "a.md").read_text()
