"""Runs: the same last bit however often one is interrupted or killed, and what can be gone on with."""

import dataclasses
import json
import math
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from seq2seq_runs import (
    DECODERS,
    PER_EPOCH,
    STEPS,
    VALIDATE_EVERY,
    assert_same,
    configuration,
    fixed_losses,
    interrupt_at,
    splits,
)

from onepass.seq2seq import training
from onepass.seq2seq.checkpoint import read_tensors
from onepass.seq2seq.config import config_to_dict
from onepass.seq2seq.data import DataError, Example, Splits
from onepass.seq2seq.training import CHECKPOINT, MODEL, Run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("decoder", DECODERS)
def test_an_interrupted_run_is_the_uninterrupted_one(tmp_path: Path, decoder: str) -> None:
    """Stopped after the first step, inside epochs, on the last step of one (5) and on validations (4, 16): weights, moments, random
    numbers, every loss and the file with the best weights."""
    config = configuration(decoder)
    losses: list[float] = []
    whole = Run.start(config, splits(), tmp_path / "whole")
    assert whole.train(math.inf, lambda progress: losses.append(progress.loss)).reason == "done"
    assert len(whole.pairs.epoch(8, 0, 0)) == PER_EPOCH
    assert len(set(losses)) == STEPS

    parts: list[float] = []
    run, folder = Run.start(config, splits(), tmp_path / "parts"), tmp_path / "parts"
    for step in (1, VALIDATE_EVERY, PER_EPOCH, 7, 11, 16):
        interrupt = interrupt_at(step)
        outcome = run.train(math.inf, lambda progress, interrupt=interrupt: (parts.append(progress.loss), interrupt(progress))[1])
        assert (outcome.reason, outcome.progress.step) == ("interrupted", step)
        torch.manual_seed(999 + step)
        torch.rand(step)
        run = Run.resume(config, splits(), folder)
    assert run.train(0.0, lambda progress: parts.append(progress.loss)).reason == "done"
    assert parts == losses
    assert [step for step, _ in run.progress.history] == [4, 8, 12, 16, 18]
    assert_same(tmp_path / "whole", folder)


def test_dropout_is_part_of_what_resumes(tmp_path: Path) -> None:
    """Guards the test above: with other random numbers after the interruption, the run is another one."""
    config = configuration("plain")
    Run.start(config, splits(), tmp_path / "whole").train()
    Run.start(config, splits(), tmp_path / "parts").train(report=interrupt_at(7))
    run = Run.resume(config, splits(), tmp_path / "parts")
    torch.manual_seed(999)
    run.train()
    with pytest.raises(AssertionError):
        assert_same(tmp_path / "whole", tmp_path / "parts")


def test_how_often_checkpoints_are_written_changes_nothing(tmp_path: Path) -> None:
    Run.start(configuration(), splits(), tmp_path / "often").train(0.0)
    Run.start(configuration(), splits(), tmp_path / "seldom").train(math.inf)
    assert_same(tmp_path / "often", tmp_path / "seldom")


KILLED = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from onepass.seq2seq.config import config_from_dict
from onepass.seq2seq.data import Example, Splits
from onepass.seq2seq.training import CHECKPOINT, Run
torch.set_num_threads(1)
config = config_from_dict(json.loads(sys.argv[1]), "")
splits = Splits(*[[Example(tuple(source), (tuple(source),)) for source in part] for part in json.loads(sys.argv[2])])
Run.start(config, splits, Path(sys.argv[3] + "-warm"))  # torch imports much on first use
folder, chance, reached = Path(sys.argv[3]), random.Random(int(sys.argv[4])), []

def child(write):
    resume = (folder / CHECKPOINT).exists()
    run = Run.resume(config, splits, folder) if resume else Run.start(config, splits, folder)
    os.write(write, b"s")
    run.train(0.0, lambda progress: os.write(write, b"."))

for kill in range(int(sys.argv[5]) + 1):
    read, write = os.pipe()
    if not (pid := os.fork()):
        child(write)
        os._exit(0)
    os.close(write)
    if kill < int(sys.argv[5]):
        for _ in range(chance.randint(0, 4)):  # 0: perhaps before there is anything
            os.read(read, 1)
        time.sleep(chance.uniform(0.0, 0.02))
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    os.close(read)
    reached.append(os.waitstatus_to_exitcode(status))
print(json.dumps(reached))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL on this system")
def test_a_killed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    """Killed six times, at a random moment after a random step, with a checkpoint after every step: often while one is being written."""
    config = configuration("bahdanau", steps=36)
    Run.start(config, splits(), tmp_path / "whole").train(math.inf)
    parts = json.dumps(_sources(splits()))
    arguments = [json.dumps(config_to_dict(config)), parts, str(tmp_path / "killed"), "0", "6"]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [-signal.SIGKILL] * 6 + [0]
    assert_same(tmp_path / "whole", tmp_path / "killed")


def _sources(parts: Splits) -> list[list[str]]:
    return [["".join(one.source) for one in part] for part in (parts.train, parts.validation, parts.test)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_takes_effect_between_two_steps(tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes in the middle of a step, which is still finished and kept."""
    update = Run._update

    def interrupted(self: Run, batch: Any) -> float:
        if self.progress.step == 6:
            signal.raise_signal(number)
        return update(self, batch)

    before = signal.getsignal(number)
    monkeypatch.setattr(Run, "_update", interrupted)
    outcome = Run.start(configuration(), splits(), tmp_path).train(math.inf)
    assert (outcome.reason, outcome.progress.step) == ("interrupted", 7)
    assert read_tensors(tmp_path / CHECKPOINT)[1]["progress"]["step"] == 7
    assert signal.getsignal(number) is before


def test_the_second_interrupt_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a step that takes long; the checkpoint is that of the last validation, and goes on to the same end."""
    update = Run._update
    monkeypatch.setattr(Run, "_update", lambda self, batch: twice(self.progress.step) or update(self, batch))

    def twice(step: int) -> None:
        if step == 6:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        Run.start(configuration(), splits(), tmp_path / "twice").train(math.inf)
    assert signal.getsignal(signal.SIGINT) is before
    assert read_tensors(tmp_path / "twice" / CHECKPOINT)[1]["progress"]["step"] == VALIDATE_EVERY
    monkeypatch.undo()
    Run.resume(configuration(), splits(), tmp_path / "twice").train()
    Run.start(configuration(), splits(), tmp_path / "whole").train()
    assert_same(tmp_path / "whole", tmp_path / "twice")


def test_a_second_sigterm_waits(tmp_path: Path) -> None:
    """Schedulers repeat it; only somebody at a keyboard is in a hurry."""
    outcome = Run.start(configuration(), splits(), tmp_path).train(
        math.inf, lambda progress: [signal.raise_signal(signal.SIGTERM) for _ in range(2)].clear()
    )
    assert (outcome.reason, outcome.progress.step) == ("interrupted", 1)


def test_an_interrupt_in_the_last_step_is_the_end(tmp_path: Path) -> None:
    assert Run.start(configuration(), splits(), tmp_path).train(report=interrupt_at(STEPS)).reason == "done"


def test_training_in_a_thread(tmp_path: Path) -> None:
    """Where Python allows no handlers of signals."""
    outcomes: list[training.Outcome] = []
    thread = threading.Thread(target=lambda: outcomes.append(Run.start(configuration(steps=3), splits(), tmp_path).train()))
    thread.start()
    thread.join()
    assert [outcome.reason for outcome in outcomes] == ["done"]


def test_a_run_can_go_on_from_before_its_first_step(tmp_path: Path) -> None:
    """There is a checkpoint as soon as there is a run."""
    Run.start(configuration(), splits(), tmp_path / "parts")
    assert read_tensors(tmp_path / "parts" / CHECKPOINT)[1]["progress"]["step"] == 0
    torch.manual_seed(999)
    Run.resume(configuration(), splits(), tmp_path / "parts").train()
    Run.start(configuration(), splits(), tmp_path / "whole").train()
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_a_finished_run_stays_as_it_is(tmp_path: Path) -> None:
    done = Run.start(configuration(), splits(), tmp_path).train()
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert files.keys() == {MODEL, CHECKPOINT}
    again = Run.resume(configuration(), splits(), tmp_path).train(report=lambda _: pytest.fail("a step"))
    assert (again.reason, again.progress) == ("done", done.progress)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_a_folder_that_holds_a_run(tmp_path: Path) -> None:
    Run.start(configuration(steps=1), splits(), tmp_path).train()
    before = (tmp_path / CHECKPOINT).read_bytes()
    with pytest.raises(DataError) as error:
        Run.start(configuration(steps=2), splits(), tmp_path)
    assert str(error.value) == f"{tmp_path} already holds a run: go on with it (--resume), or choose another folder"
    assert (tmp_path / CHECKPOINT).read_bytes() == before


def test_no_run_to_go_on_with(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file") as error:
        Run.resume(configuration(), splits(), tmp_path / "none")
    assert str(tmp_path / "none" / CHECKPOINT) in str(error.value)
    assert not (tmp_path / "none").exists()


def test_a_checkpoint_of_another_configuration(tmp_path: Path) -> None:
    """Every key is named, with both values; the search may change."""
    Run.start(configuration(), splits(), tmp_path)
    other = configuration(seed=1, learning_rate=0.5, steps=99)
    with pytest.raises(DataError) as error:
        Run.resume(other, splits(), tmp_path)
    first, *lines = str(error.value).splitlines()
    assert first == f"{tmp_path / CHECKPOINT} belongs to another configuration:"
    assert [line.strip() for line in lines] == [
        "seed: 0 in the checkpoint, 1 in the configuration",
        "training.steps: 18 in the checkpoint, 99 in the configuration",
        "training.learning_rate: 0.02 in the checkpoint, 0.5 in the configuration",
    ]
    same = configuration()
    Run.resume(dataclasses.replace(same, search=dataclasses.replace(same.search, beams=9)), splits(), tmp_path)


def test_other_symbols_in_the_data(tmp_path: Path) -> None:
    """The numbers of symbols would mean other symbols."""
    Run.start(configuration(), splits(), tmp_path)
    with pytest.raises(DataError, match=r"the training examples have other source symbols now: e$") as error:
        Run.resume(configuration(), splits("abcde"), tmp_path)
    assert str(tmp_path / CHECKPOINT) in str(error.value)
    changed = [Example(one.source, (one.source, ("z",))) for one in splits().train]
    with pytest.raises(DataError, match=r"the training examples have other target symbols now: z$"):
        Run.resume(configuration(), dataclasses.replace(splits(), train=changed), tmp_path)


def test_a_stopped_run_stays_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed_losses(monkeypatch, 4.0, 5.0, 5.0)
    config = configuration(validate_every=2, patience=2)
    assert Run.start(config, splits(), tmp_path).train().reason == "stopped"
    assert Run.resume(config, splits(), tmp_path).train().reason == "stopped"


def test_what_a_kill_left_is_cleared_away(tmp_path: Path) -> None:
    """A killed process cannot remove the file it was writing; the next one takes its place."""
    Run.start(configuration(steps=1), splits(), tmp_path)
    for name in (CHECKPOINT, MODEL):
        (tmp_path / f"{name}.part").write_bytes(b"half")
    Run.resume(configuration(steps=1), splits(), tmp_path).train()
    assert {path.name for path in tmp_path.iterdir()} == {MODEL, CHECKPOINT}


def test_a_run_goes_on_with_its_number_of_threads(tmp_path: Path) -> None:
    """Other threads would sum in another order; a number in the configuration goes before it."""
    torch.set_num_threads(2)
    Run.start(configuration(), splits(), tmp_path)
    torch.set_num_threads(1)
    Run.resume(configuration(), splits(), tmp_path)
    assert torch.get_num_threads() == 2
    Run.resume(configuration(threads=1), splits(), tmp_path)
    assert torch.get_num_threads() == 1
