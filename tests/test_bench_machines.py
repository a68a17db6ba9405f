"""onepass.benchmarks.machines: what several machines gave, side by side, and the page of it that is kept."""

from pathlib import Path

import pytest
import typer.testing

from onepass.benchmarks.machines import main, markdown, side_by_side
from onepass.benchmarks.records import MISSING, Record, Results, load
from onepass.benchmarks.workloads import BOTH, FORWARD, NMT, SPEECH

DOCS = Path(__file__).resolve().parents[1] / "docs"


def results(*records: Record) -> Results:
    found = Results("2026-01-01T00:00:00+00:00", "c0ffee" * 6, "a CPU", "Linux", 2, {"onepass": "1"}, {"cpu float32": {"fma": 98e9}})
    found.records = list(records)
    return found


def record(kernel: str, provider: str, shape: object, seconds: float, threads: int = 2, **metrics: float) -> Record:
    named = {name.replace("_", " "): value for name, value in metrics.items()}
    times = [seconds] if seconds else []
    return Record(kernel, provider, FORWARD, shape, "float32", "cpu", threads, seconds=times, metrics=named)  # type: ignore[arg-type]


def rows(**machines: Results) -> dict[str, list[str]]:
    return {row[0]: row[1:] for row in side_by_side(machines)}


def test_least_and_most_of_the_shapes() -> None:
    one = results(
        record("additive", "onepass cpu", NMT, 1.0, over_best_peer=12.04, over_one_thread=1.9, of_budget=0.5),
        record("additive", "onepass cpu", NMT, 2.0, threads=1, over_one_thread=1.0),
        record("additive", "onepass cpu", SPEECH, 1.0, over_best_peer=9.0, over_one_thread=2.0),
        record("additive", "eager", NMT, 1.0, over_best_peer=0.1),
    )
    other = results(
        record("additive", "onepass cpu", NMT, 1.0, over_best_peer=3.0),
        record("additive", "onepass cpu", SPEECH, 1.0, over_best_peer=4.0),
        record("additive", "onepass cpu", NMT._replace(B=1), 1.0, over_best_peer=0.5),  # which the first lacks
    )
    found = rows(one=one, other=other)
    assert found["cpu float32: fma, G/s"] == ["98", "98"]
    assert found["commit"] == ["c0ffeec", "c0ffeec"]
    assert found["additive, forward, float32 on cpu: over best peer"] == ["9.0x to 12.0x", "3.0x to 4.0x"]
    assert found["additive, forward, float32 on cpu: over one thread"] == ["1.90x to 2.00x", ""]
    assert found["additive, forward, float32 on cpu: of budget"] == ["0.50", ""]


def test_of_several_backends_the_fastest_counts_and_no_variant() -> None:
    found = rows(
        one=results(
            record("additive", "onepass cuda", NMT, 1.0, over_best_peer=4.0),
            record("additive", "onepass triton", NMT, 2.0, over_best_peer=2.0),
            record("additive", "onepass reference", NMT, 0.5, over_best_peer=8.0),
            record("additive", "onepass cuda, bfloat16", NMT, 0.1, over_best_peer=40.0),
        )
    )
    assert found["additive, forward, float32 on cpu: over best peer"] == ["4.0x"]


def test_dtypes_stay_apart() -> None:
    half = record("additive", "onepass cpu", NMT, 1.0, over_best_peer=0.6)
    half.dtype = "bfloat16"
    both = results(record("additive", "onepass cpu", NMT, 1.0, over_best_peer=12.0), half)
    both.ceilings["cpu bfloat16"] = {"fma": 7e9}
    found = rows(one=both)
    assert found["additive, forward, float32 on cpu: over best peer"] == ["12.0x"]
    assert found["additive, forward, bfloat16 on cpu: over best peer"] == ["0.6x"]
    assert (found["cpu float32: fma, G/s"], found["cpu bfloat16: fma, G/s"]) == (["98"], ["7"])


def test_what_a_family_adds_stands_in_the_place_of_shares() -> None:
    found = rows(one=results(record("additive decoding", "onepass cpu", NMT, 1.0, over_eager=3.0, of_the_limit=0.812, read_seconds=1.0)))
    assert "additive decoding, forward, float32 on cpu: over eager" not in found
    assert "additive decoding, forward, float32 on cpu: read seconds" not in found
    assert found["additive decoding, forward, float32 on cpu: of the limit"] == ["0.812"]


def test_the_page_has_every_table_and_says_who_is_missing() -> None:
    absent = Record("additive", "keras", BOTH, NMT, "float32", "cpu", 2, status=MISSING, reason="keras is not installed")
    timed = record("additive", "onepass cpu", NMT, 0.25)
    timed.metrics["elements/s"] = 1e9
    page = markdown({"zen": results(timed, absent)})
    assert "\n## zen\n" in page
    assert "c0ffee" in page
    assert "\nadditive, forward, float32 on cpu: milliseconds:\n" in page
    assert "\n| NMT | 250 |" in page
    assert "without keras: keras is not installed" in page


def test_the_page_that_is_kept_is_of_the_files_beside_it() -> None:
    machines = {path.stem: load(path) for path in sorted((DOCS / "machines").glob("*.json"))}
    assert len(machines) >= 4
    assert (DOCS / "machines.md").read_text() == markdown(machines)


def test_the_command(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(main)
    run = typer.testing.CliRunner().invoke
    results(record("additive", "onepass cpu", NMT, 1.0, over_best_peer=3.0)).save(tmp_path / "mine.json")
    shown = run(app, [str(tmp_path / "mine.json")])
    assert shown.exit_code == 0
    assert run(app, [str(tmp_path / "mine.json"), "--page", str(tmp_path / "page.md")]).exit_code == 0
    assert (tmp_path / "page.md").read_text().strip() == shown.output.strip()
    (tmp_path / "other.json").write_text("{}")
    refused = run(app, [str(tmp_path / "other.json")])
    assert refused.exit_code == 2
    assert "holds no results" in " ".join(refused.output.replace("│", " ").split())


@pytest.mark.parametrize("arguments", [[], ["nowhere.json"]])
def test_what_is_not_there_is_an_error_of_use(arguments: list[str]) -> None:
    app = typer.Typer()
    app.command()(main)
    assert typer.testing.CliRunner().invoke(app, arguments).exit_code == 2
