"""The command line, and training by it: results on standard output, notes on standard error, and errors that can be read, with status 2."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from seq2seq_command_cases import Command, assert_error, command, one_thread, task

import onepass.seq2seq
from onepass.seq2seq.checkpoint import read_tensors
from onepass.seq2seq.system import System
from onepass.seq2seq.training import CHECKPOINT, MODEL, Run

__all__ = ["command", "one_thread", "task"]  # fixtures


def test_train(task: Path, command: Command) -> None:
    """Nothing on standard output; where there is no terminal, a line per validation; what to do next."""
    run = task.parent / "sub" / "run"
    status, output, error = command("train", task, "--output", run)
    assert (status, output) == (0, "")
    lines = error.splitlines()
    assert re.fullmatch(rf"\d+ pairs to learn from, \d+ for validation; 1,[\d]+ parameters; run in {re.escape(str(run))}", lines[0])
    assert [line.split(",")[0] for line in lines[1:5]] == [f"step {step} of 20" for step in (5, 10, 15, 20)]
    assert re.fullmatch(r"trained for \d+ s; best validation loss \d\.\d{4} nats per symbol, at step 20", lines[5])
    assert lines[6:] == [f"weights in {run / MODEL}; now `python -m onepass evaluate {run}`"]
    assert {path.name for path in run.iterdir()} == {MODEL, CHECKPOINT}


def test_the_folder_is_named_after_the_configuration(task: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(task.parent)
    assert command("train", "task.toml", "--set", "training.steps=1")[0] == 0
    assert (task.parent / "runs" / "task" / MODEL).exists()


def test_settings_go_before_the_file(task: Path, command: Command) -> None:
    run = task.parent / "run"
    settings = ("--set", "training.steps=3", "--set", "model.cell=lstm", "--set", "seed = 5")
    assert command("train", task, "--output", run, *settings)[0] == 0
    config = System.load(run / MODEL).config
    assert (config.training.steps, config.model.cell, config.seed, config.training.batch_size) == (3, "lstm", 5, 16)
    assert_error(command("train", task, "--output", run, "--resume"), "training.steps: 3 in the checkpoint, 20 in the configuration")
    assert command("train", task, "--output", run, "--resume", *settings)[0] == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_training(task: Path, command: Command, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Status 130, a whole step, and how to go on; doing so ends as the uninterrupted run does."""
    update = Run._update

    def interrupted(self: Run, batch: Any) -> float:
        if self.progress.step == 7:
            signal.raise_signal(number)
        return update(self, batch)

    run, whole = task.parent / "run", task.parent / "whole"
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_update", interrupted)
        status, output, error = command("train", task, "--output", run)
    assert (status, output) == (130, "")
    assert error.splitlines()[-1] == "interrupted after 8 of 20 steps; the same command with --resume goes on"
    assert read_tensors(run / CHECKPOINT)[1]["progress"]["step"] == 8
    status, output, error = command("train", task, "--output", run, "--resume", "--checkpoint-every", "0")
    assert (status, output) == (0, "")
    assert command("train", task, "--output", whole)[0] == 0
    assert (run / MODEL).read_bytes() == (whole / MODEL).read_bytes()


def test_the_second_interrupt_ends_training_at_once(task: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a traceback and not as a success; the checkpoint is there."""

    def interrupted(self: Run, batch: Any) -> float:
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
        pytest.fail("the step went on")

    monkeypatch.setattr(Run, "_update", interrupted)
    status, output, error = command("train", task, "--output", task.parent / "run")
    assert status not in (0, 2)
    assert output == ""
    assert "Traceback" not in error
    assert read_tensors(task.parent / "run" / CHECKPOINT)[1]["progress"]["step"] == 0


@pytest.mark.skipif(os.name != "posix", reason="signals are sent to another process")
def test_an_interrupted_process(task: Path) -> None:
    """As from a shell: Ctrl-C in the middle of a training, then ``--resume``, each a process of its own."""
    run = task.parent / "run"
    arguments = [sys.executable, "-m", "onepass", "train", str(task), "--output", str(run), "--set", "training.steps=100000"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        assert process.stdout is not None
        for line in process.stderr:
            if line.startswith("step 10 "):
                process.send_signal(signal.SIGINT)
                break
        rest, output = process.stderr.read(), process.stdout.read()
    assert (process.returncode, output) == (130, ""), rest
    reached = read_tensors(run / CHECKPOINT)[1]["progress"]["step"]
    assert reached >= 10
    assert rest.splitlines()[-1] == f"interrupted after {reached:,} of 100,000 steps; the same command with --resume goes on"


def test_training_stops_for_want_of_improvement(task: Path, command: Command) -> None:
    """And says so, and so does the same command with ``--resume``."""
    rate = ("--set", "training.patience=1", "--set", "training.learning_rate=1e-30")
    status, output, error = command("train", task, "--output", task.parent / "run", *rate)
    assert (status, output) == (0, "")
    assert "stopped early: no validation after step 5 was better" in error
    assert "step 15" not in error


def test_training_that_cannot_start(task: Path, command: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert_error(command("train", tmp_path / "none.toml"), f"error: {tmp_path / 'none.toml'}: no such file")
    assert_error(command("train", tmp_path), f"error: {tmp_path}: cannot be read")
    assert_error(command("train", task, "--set", "model.cel=gru"), "unknown key model.cel; did you mean model.cell?")
    assert_error(command("train", task, "--set", "training.steps"), "a setting is a key, = and a value")
    assert_error(command("train", task, "--output", run, "--resume"), str(run / CHECKPOINT), "no such file")
    assert not run.exists()
    assert command("train", task, "--output", run, "--set", "training.steps=1")[0] == 0
    assert_error(command("train", task, "--output", run), f"{run} already holds a run: go on with it (--resume), or choose another")
    other = ("--set", "seed=1", "--set", "training.steps=2")
    assert_error(command("train", task, "--output", run, "--resume", *other), "seed: 0 in the checkpoint, 1 in the", "training.steps: 1 in")
    task.write_text("[model\n")
    assert_error(command("train", task), f"error: {task}:1: not TOML")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"ab\tA1 B1\nno tab\n", "{path}:2: a line is a source, one tab and a target; got 0 tabs in 'no tab'"),
        (b"ab\tA1 B1\n\n\tA1\n", "{path}:3: the source is empty"),
        (b"ab\tA1\n\xff\tA1\n", "{path}:2: not UTF-8"),
        (b"", "{path}: the file is empty"),
        (None, "{path}: no such file"),
    ],
    ids=["no tab", "empty side", "encoding", "empty", "none"],
)
@pytest.mark.parametrize("name", ["train", "validation"])
def test_training_data_that_cannot_be_read(task: Path, command: Command, name: str, content: bytes | None, said: str) -> None:
    """The message begins with the file and the line; no run is begun."""
    path = task.parent / f"{name}.tsv"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    outcome = command("train", task, "--output", task.parent / "run")
    assert_error(outcome, "error: " + said.format(path=path))
    assert not (task.parent / "run").exists()


def test_validation_data_with_an_unknown_symbol(task: Path, command: Command) -> None:
    (task.parent / "validation.tsv").write_text("abz\tA1\n")
    assert_error(command("train", task, "--output", task.parent / "run"), "unknown symbol 'z' in \"abz\"; known are 'a', 'b', 'c', 'd'")


@pytest.mark.parametrize("name", ["a file", "a file/run"])
def test_a_folder_that_cannot_be_made(task: Path, command: Command, name: str) -> None:
    (task.parent / "a file").write_text("")
    assert_error(command("train", task, "--output", task.parent / name), str(task.parent / "a file"))


def test_a_folder_that_looks_like_markup(task: Path, command: Command) -> None:
    """And is longer than a terminal is wide: to be copied as it stands."""
    run = task.parent / "[bold]" / "[i]" / ("x" * 100)
    status, _, error = command("train", task, "--output", run, "--set", "training.steps=1")
    assert status == 0
    assert error.splitlines()[-1] == f"weights in {run / MODEL}; now `python -m onepass evaluate {run}`"


def test_help(command: Command) -> None:
    status, output, error = command("--help")
    assert (status, error) == (0, "")
    assert [name for name in ("info", "train", "decode", "evaluate") if name not in output] == []
    for name in ("train", "decode", "evaluate", "info"):
        assert command(name, "--help")[0] == 0
    assert command()[0] == 2
    assert_error(command("trian"), "No such command 'trian'")
    assert_error(command("decode"))


@pytest.mark.parametrize("blocked", [None, "typer", "safetensors", "rich"])
def test_info(command: Command, monkeypatch: pytest.MonkeyPatch, blocked: str | None) -> None:
    """It works without the packages of the extra, and says the same."""
    usual = command("info", "--no-measure")
    if blocked is not None:
        monkeypatch.setattr(onepass, "seq2seq", onepass.seq2seq)  # put back with its modules
        for name in [name for name in sys.modules if name.split(".")[0] == blocked or name.startswith("onepass.seq2seq")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, blocked, None)
    status, output, error = command("info", "--no-measure")
    assert (status, output, error) == usual
    assert status == 0
    assert [name for name in ("onepass ", "torch ", "backend ") if name not in output] == []


@pytest.mark.parametrize("arguments", [["train", "x.toml"], ["decode", "run"], ["evaluate", "run"], ["info", "--what"], []])
def test_without_typer(command: Command, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    """It says what is missing and what to install."""
    monkeypatch.setitem(sys.modules, "typer", None)
    assert_error(command(*arguments), "typer", "pip install rich safetensors typer")


def test_a_stopped_run_says_so_again(task: Path, command: Command) -> None:
    settings = ("--set", "training.patience=1", "--set", "training.learning_rate=1e-30")
    run = task.parent / "run"
    assert "stopped early" in command("train", task, "--output", run, *settings)[2]
    assert "stopped early" in command("train", task, "--output", run, *settings, "--resume")[2]


def test_a_resumed_run_does_not_repeat_old_lines(task: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line of a validation comes with the loss of its own step."""
    run, update = task.parent / "run", Run._update
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_update", lambda self, batch: (update(self, batch), self.progress.step == 6 and signal.raise_signal(2))[0])
        assert command("train", task, "--output", run)[0] == 130
    assert "step 5 of" not in command("train", task, "--output", run, "--resume")[2]
