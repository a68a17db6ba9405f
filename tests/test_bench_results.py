"""onepass.benchmarks: what a run leaves behind, and what a comparison of two makes of it."""

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest

from onepass.benchmarks import report
from onepass.benchmarks.comparison import FASTER, SAME, SLOWER, compare
from onepass.benchmarks.page import page
from onepass.benchmarks.providers import REFERENCE
from onepass.benchmarks.records import MISSING, WRONG, Record, Results, load
from onepass.benchmarks.timing import interval, medians, quantile, ratio
from onepass.benchmarks.workloads import BOTH, FORWARD, NMT, SPEECH

SHAPES = (NMT, SPEECH)
CPU, COPIES = "onepass cpu", "onepass cpu, copies"


def record(provider: str, shape: object = NMT, direction: str = FORWARD, **more: object) -> Record:
    return Record("additive", provider, direction, shape, "float32", "cpu", 2, **more)  # type: ignore[arg-type]


def results(seed: int, onepass: float = 1.0, machine: float = 1.0, noise: float = 0.03) -> Results:
    """Rounds that jitter by `noise`, of a machine that is `machine` times as slow, and of a onepass that is."""
    rng = random.Random(seed)
    found = Results("2026-01-01T00:00:00+00:00", "c0ffee", "a CPU", "Linux", 2, {"onepass": "1", "torch": "2.13"})
    for provider, base in (("onepass cpu", 0.01 * onepass), ("eager", 0.2), ("torch.compile", 0.1)):
        for shape in SHAPES:
            for direction in (FORWARD, BOTH):
                seconds = [base * machine * rng.uniform(1 - noise, 1 + noise) for _ in range(7)]
                found.add(record(provider, shape, direction, seconds=seconds, metrics={"elements/s": 1e9}))
    return found


def verdicts(before: Results, after: Results) -> set[str]:
    return {change.verdict for change in compare(before, after).changes if change.after.provider == "onepass cpu"}


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    written = results(0)
    written.ceilings["cpu float32"] = {"fma": 1e11, "read": 1e10}
    written.add(record("SDPA", status=MISSING, reason="it has no additive"))
    written.save(tmp_path / "results.json")
    assert load(tmp_path / "results.json") == written


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 2}', '{"schema": 1, "records": [{"kernel": "additive"}]}'])
def test_other_files_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(ValueError, match=r"other\.json holds no results"):
        load(tmp_path / "other.json")


def test_a_record_of_the_same_key_adds_its_metrics() -> None:
    found = results(0)
    count, first = len(found.records), found.records[0]
    found.add(replace(first, seconds=[1.0], metrics={"peak bytes": 5}))
    assert len(found.records) == count
    assert found.records[0].metrics == {"elements/s": 1e9, "peak bytes": 5}
    found.add(replace(first, threads=1))
    assert len(found.records) == count + 1


def test_a_seeded_slow_down_is_found() -> None:
    assert verdicts(results(0), results(1, onepass=1.3)) == {SLOWER}
    assert verdicts(results(0), results(1, onepass=0.7)) == {FASTER}


def test_noise_is_not() -> None:
    assert verdicts(results(0), results(1)) == {SAME}
    assert verdicts(results(0, noise=0.3), results(1, noise=0.3, onepass=1.1)) == {SAME}


def test_a_machine_that_became_slower_is_not_onepass() -> None:
    found = compare(results(0), results(1, machine=2.0))
    assert found.drift == pytest.approx(2, rel=0.05)
    assert {change.verdict for change in found.changes} == {SAME}
    assert verdicts(results(0), results(1, machine=2.0, onepass=1.3)) == {SLOWER}


def test_peers_of_other_versions_are_no_control() -> None:
    after = results(1, machine=2.0)
    after.versions["torch"] = "2.14"
    found = compare(results(0), after)
    assert (found.drift, found.scatter) == (1.0, 1.0)
    assert found.slower()


def test_rows_of_one_file_alone_are_counted() -> None:
    before, after = results(0), results(1)
    del before.records[0], after.records[-2:]
    found = compare(before, after)
    assert (found.only_before, found.only_after, len(found.changes)) == (2, 1, len(results(0).records) - 3)


def test_quantiles_and_ratios() -> None:
    assert [quantile([4.0, 1.0, 3.0, 2.0], q) for q in (0, 0.25, 0.5, 1)] == [1.0, 1.75, 2.5, 4.0]
    assert quantile([7.0], 0.3) == 7.0
    assert medians({"a": [[1.0, 5.0, 2.0], [3.0]]}) == {"a": [2.0, 3.0]}
    # Of the rounds' own ratios, 4, 1 and 2: a machine that was slow for one round does not bend it.
    assert ratio({"a": [1.0, 10.0, 1.0], "b": [4.0, 10.0, 2.0]}, "a", "b") == 2.0


@pytest.mark.parametrize("n", range(1, 16))
def test_the_interval_holds_the_median_often_enough_and_is_the_narrowest(n: int) -> None:
    """Each value lies below the median with probability 1/2: the pair that leaves out k on each side holds it if more than k do, and
    fewer than n - k."""
    low, high = interval([float(i) for i in range(n)])
    k = int(low)
    assert high == n - 1 - k

    def holds(k: int) -> float:
        return sum(math.comb(n, below) for below in range(k + 1, n - k)) / 2**n

    assert k == 0 or holds(k) >= 0.95
    assert holds(k + 1) < 0.95


def test_tables_name_what_has_no_time() -> None:
    found = results(0)
    found.add(record("SDPA", status=MISSING, reason="it has no additive"))
    found.add(record("jax.jit", direction=BOTH, status=WRONG, reason="output 0: off by <much>"))
    (_, missing), (_, wrong) = report.notes(found)
    assert missing == "without SDPA: it has no additive"
    assert wrong == "jax.jit is WRONG, so it has no time (additive forward + backward NMT): output 0: off by <much>"
    html = page(found, [])
    assert "off by &lt;much&gt;" in html
    assert "<td" in html


@pytest.mark.parametrize(("providers", "expected"), [((CPU, COPIES, REFERENCE), 0.6), ((REFERENCE, COPIES), 0.9), ((COPIES,), None)])
def test_the_reference_does_not_stand_for_the_kernels(providers: tuple[str, ...], expected: float | None) -> None:
    """A table's summary is of onepass's kernels, also where its reference, in eager's own operations, or a variant is faster."""
    over = {CPU: (0.6, 5.0), COPIES: (1.2, 2.5), REFERENCE: (0.9, 3.0)}
    found = Results("2026-01-01T00:00:00+00:00", "c0ffee", "a CPU", "Linux", 2, {})
    for name in providers:
        found.add(record(name, seconds=[over[name][1]], metrics={"elements/s": 1e9, "over eager": over[name][0]}))
    (grid,) = report.grids(found)
    assert grid.rows[0][grid.columns.index("over eager")] == ("" if expected is None else f"{expected}x")


def test_a_table_has_a_row_for_each_shape_and_a_column_for_each_provider() -> None:
    forward, both = report.grids(results(0))
    assert [row[0] for row in forward.rows] == [row[0] for row in both.rows] == ["NMT", "speech"]
    assert forward.columns[1:4] == ["onepass cpu", "eager", "torch.compile"]
    assert float(forward.rows[0][1]) == pytest.approx(10, rel=0.05)
