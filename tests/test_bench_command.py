"""``python -m onepass bench``, on sizes of a few elements."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from onepass.__main__ import main
from onepass.benchmarks import catalogue, ceilings, plan, providers
from onepass.benchmarks.providers import PROVIDERS, provider
from onepass.benchmarks.records import WRONG, load
from onepass.benchmarks.workloads import BOTH, FORWARD, Run, Workload

assert catalogue
TINY = ["--family", "additive", "--shapes", "2x3x5x16x4", "--provider", "onepass cpu", "--provider", "eager"]
RATES = {"fma": 1e11, "read": 1e10, "cache": 5e10}


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Short turns, ceilings that are not measured, and no provider left behind."""
    before = list(PROVIDERS)
    monkeypatch.setattr("onepass.benchmarks.command.TURN", 1e-4)
    monkeypatch.setattr("onepass.benchmarks.command.QUICK_TURN", 1e-4)
    monkeypatch.setattr(ceilings, "measure", lambda device, dtype: RATES)
    yield
    PROVIDERS[:] = before


def test_tables_a_report_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "LENGTHS_QUICK", (8, 16))
    monkeypatch.setattr(plan, "thread_counts", lambda: [1, 2])
    folder, data, html = tmp_path / "pictures", tmp_path / "results.json", tmp_path / "report.html"
    files = ["--json", str(data), "--html", str(html), "--pictures", str(folder)]
    assert main(["bench", "--quick", *TINY, *files]) == 0
    shown = capsys.readouterr().out
    assert "additive, forward + backward, float32 on cpu" in shown
    assert "peak memory beyond inputs and results" in shown
    names = {"speed-additive", "memory", "roofline-cpu-float32", "threads"}
    assert {path.name for path in folder.iterdir()} == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.glob("*.png"))
    page = html.read_text()
    assert page.count("data:image/svg+xml;base64,") == len(names)
    assert "http" not in page.replace("http://www.w3.org", "")  # nothing from elsewhere
    results = load(data)
    assert {(r.provider, r.direction) for r in results.timed()} == {(p, d) for p in ("onepass cpu", "eager") for d in (FORWARD, BOTH)}
    assert results.ceilings == {"cpu float32": RATES}

    assert main(["bench", "--load", str(data)]) == 0
    assert capsys.readouterr().out == shown
    assert main(["bench", "--compare", str(data), str(data)]) == 0
    assert "0 slower, 0 faster" in capsys.readouterr().out


@pytest.fixture
def as_from_a_terminal() -> Iterator[None]:
    """Signals do what they do there, also where a shell began the tests in the background, which makes processes ignore some."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler or handlers[number])


@pytest.mark.usefixtures("as_from_a_terminal")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_shows_what_was_measured(number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    @provider("interrupter", {"additive"})
    def interrupter(workload: Workload, direction: str) -> Run:
        run = providers.eager(workload, direction)
        calls = 0

        def until_the_second_round() -> object:
            nonlocal calls
            calls += 1
            if direction == BOTH and calls == 3:
                signal.raise_signal(number)
            return run()

        return until_the_second_round

    data = tmp_path / "results.json"
    assert main(["bench", *TINY, "--provider", "interrupter", "--json", str(data)]) == 130
    shown = capsys.readouterr().out
    assert "additive, forward, float32" in shown
    assert "backward" not in shown
    assert "interrupted" in shown
    assert {record.direction for record in load(data).timed()} == {FORWARD}
    assert torch.get_num_threads() >= 1
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize(("name", "status"), [("onepass off", 1), ("off", 0)])
def test_wrong_results_are_said_and_those_of_onepass_fail(
    name: str, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    @provider(name, {"additive"})
    def off(workload: Workload, direction: str) -> Run:
        return lambda: torch.zeros(2, 3, 4)

    data = tmp_path / "results.json"
    assert main(["bench", *TINY, "--provider", name, "--json", str(data)]) == status
    assert f"{name} is WRONG, so it has no time" in capsys.readouterr().out
    assert {record.status for record in load(data).records if record.provider == name} == {WRONG}


def test_what_got_slower_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    assert main(["bench", *TINY, "--json", str(before)]) == 0
    results = load(before)
    for record in results.timed():
        record.seconds = [1.0, 1.01, 1.02]
    results.save(before)
    for record in results.timed():
        record.seconds = [1.5, 1.51, 1.52] if record.provider == "onepass cpu" else record.seconds
    results.save(after)
    capsys.readouterr()
    assert main(["bench", "--compare", str(before), str(after)]) == 1
    assert "2 slower, 0 faster of 2" in capsys.readouterr().out
    assert main(["bench", "--compare", str(after), str(before)]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "--device is cpu or cuda"),
        (["--family", "dot"], "no family 'dot'"),
        (["--provider", "numpy"], "no provider numpy"),
        (["--json", "no/such/folder/results.json"], "there is no folder"),
        (["--json", "."], "is a folder"),
        (["--pictures", __file__], "is no folder"),
        (["--pictures", f"{__file__}/deeper"], "is no folder"),
        (["--shapes", ""], "no shape ''"),
        (["--family", "additive steps", "--provider", "jax.jit"], "no provider that is asked for has additive steps"),
        (["--load", __file__], "holds no results"),
    ],
)
def test_a_mistake_is_explained(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())  # in a box, whose lines break anywhere


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_cuda_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--device", "cuda"]) == 2
    said = capsys.readouterr().err
    assert "needs a GPU" in said
    assert torch.__version__ in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_script_for_gpus_says_that_there_is_none() -> None:
    script = Path(__file__).parent.parent / "benchmarks/gpu.sh"
    done = subprocess.run(["bash", str(script)], env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("no GPU here: nothing was run")


def test_pictures_need_matplotlib(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["bench", "--html", "report.html"]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
