"""Training: the same last bit however often a run is interrupted or killed, and what it says when it cannot go on."""

import dataclasses
import json
import math
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from onepass.seq2seq import training
from onepass.seq2seq.checkpoint import read_tensors
from onepass.seq2seq.config import Config, config_from_dict, config_to_dict
from onepass.seq2seq.data import DataError, Example, Splits
from onepass.seq2seq.scoring import error_rates
from onepass.seq2seq.system import System
from onepass.seq2seq.training import CHECKPOINT, MODEL, Progress, Run

DECODERS: dict[str, dict[str, Any]] = {
    "plain": {"decoder": "plain", "cell": "lstm", "num_layers": 2},
    "bahdanau": {"decoder": "bahdanau", "maxout_dim": 4},
    "luong": {"decoder": "luong", "cell": "lstm", "num_layers": 2},
    "luong-dot": {"decoder": "luong", "score": "dot", "decoder_dim": 10},
    "luong-concat": {"decoder": "luong", "score": "concat", "attention_dim": 4, "input_feeding": False},
    "local-m": {"decoder": "luong", "score": "dot", "decoder_dim": 10, "window": "local-m", "half_width": 2},
    "local-p": {"decoder": "luong", "window": "local-p", "half_width": 2, "input_feeding": False},
}
STEPS, VALIDATE_EVERY, PER_EPOCH = 18, 4, 5


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def examples(count: int, seed: int, longest: int = 5, shortest: int = 1, symbols: str = "abcd") -> list[Example]:
    """To be copied, each another one."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[tuple[str, ...], None] = {}
    while len(found) < count:
        length = int(torch.randint(shortest, longest + 1, (), generator=generator))
        found[tuple(symbols[i] for i in torch.randint(len(symbols), (length,), generator=generator).tolist())] = None
    return [Example(source, (source,)) for source in found]


def splits(symbols: str = "abcd") -> Splits:
    """With every symbol in the training examples, and 37 of them: 5 batches an epoch, the last one short."""
    return Splits([*examples(36, 1, symbols=symbols), Example(tuple(symbols), (tuple(symbols),))], examples(9, 2), examples(9, 3))


def configuration(decoder: str = "bahdanau", seed: int = 0, **values: Any) -> Config:
    widths = {"embedding_dim": 4, "encoder_dim": 5, "decoder_dim": 6, "dropout": 0.3}
    if decoder == "bahdanau":
        widths["attention_dim"] = 4
    update = {"steps": STEPS, "batch_size": 8, "validate_every": VALIDATE_EVERY, "warmup": 5, "learning_rate": 0.02, "label_smoothing": 0.1}
    return config_from_dict({"seed": seed, "model": widths | DECODERS[decoder], "training": update | values}, "")


def kept(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], bytes]:
    """All that a run leaves, without the seconds."""
    tensors, metadata = read_tensors(folder / CHECKPOINT)
    del metadata["progress"]["seconds"]
    return tensors, metadata, (folder / MODEL).read_bytes()


def assert_same(folder: Path, other: Path) -> None:
    (tensors, metadata, model), (tensors_, metadata_, model_) = kept(folder), kept(other)
    assert metadata == metadata_
    assert tensors.keys() == tensors_.keys()
    assert [name for name in tensors if not torch.equal(tensors[name], tensors_[name])] == []
    assert model == model_


def interrupt_at(*steps: int, number: int = signal.SIGINT) -> Callable[[Progress], None]:
    return lambda progress: signal.raise_signal(number) if progress.step in steps else None


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


def fixed_losses(monkeypatch: pytest.MonkeyPatch, *losses: float) -> None:
    """What validation finds."""
    validate, original = Run._validate, training.cross_entropy
    remaining = iter(losses)

    def told(self: Run) -> None:
        loss = next(remaining)
        with monkeypatch.context() as patch:
            patch.setattr(training, "cross_entropy", lambda model, batch, *_: (torch.tensor(loss * len(batch.lengths)), len(batch.lengths)))
            validate(self)
        assert training.cross_entropy is original

    monkeypatch.setattr(Run, "_validate", told)


def weights(path: Path, prefix: str = "") -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in read_tensors(path)[0].items() if name.startswith(prefix)}


def test_the_best_weights_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the lowest validation loss; of an equal one, the earlier; also where the best was before the run was resumed."""
    fixed_losses(monkeypatch, 4.0, 2.0, 3.0, 2.0)
    saved: dict[int, dict[str, Tensor]] = {}
    config = configuration(validate_every=3, steps=12)

    def report(progress: Progress) -> None:
        saved[progress.step] = {name: tensor.clone() for name, tensor in run.system.model.state_dict().items()}
        if progress.step == 8:
            signal.raise_signal(signal.SIGINT)

    run = Run.start(config, splits(), tmp_path)
    assert run.train(report=report).reason == "interrupted"
    run = Run.resume(config, splits(), tmp_path)
    outcome = run.train(report=report)
    assert outcome.progress.history == [(3, 4.0), (6, 2.0), (9, 3.0), (12, 2.0)]
    assert outcome.progress.best == (6, 2.0)
    best = weights(tmp_path / MODEL)
    assert best.keys() == saved[6].keys()
    assert all(torch.equal(best[name], saved[6][name]) for name in best)
    assert not all(torch.equal(best[name], saved[12][name]) for name in best)
    last = weights(tmp_path / CHECKPOINT, "model.")
    assert all(torch.equal(last[name], saved[12][name]) for name in best)


def test_patience(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two validations that bring nothing, an equal loss among them; a better one starts the count again."""
    fixed_losses(monkeypatch, 4.0, 5.0, 3.0, 3.0, 3.5, 1.0, 1.0, 1.0, 1.0)
    config = configuration(validate_every=2, patience=2)
    outcome = Run.start(config, splits(), tmp_path).train()
    assert (outcome.reason, outcome.progress.step, outcome.progress.best) == ("stopped", 10, (6, 3.0))

    again = Run.resume(config, splits(), tmp_path).train(report=lambda _: pytest.fail("a step"))
    assert (again.progress.step, again.progress.history) == (10, outcome.progress.history)


def test_patience_at_the_last_step_is_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed_losses(monkeypatch, 4.0, 5.0, 5.0)
    assert Run.start(configuration(validate_every=2, patience=2, steps=6), splits(), tmp_path).train().reason == "done"


def test_no_patience_is_never_at_its_end() -> None:
    progress = Progress(history=[(1, 1.0), *((step, 2.0) for step in range(2, 99))])
    assert not progress.out_of_patience(0)
    assert progress.out_of_patience(97)
    assert not progress.out_of_patience(98)
    assert not Progress().out_of_patience(1)


def test_validation_loss(tmp_path: Path) -> None:
    """The mean over all symbols, end symbols among them, without dropout and smoothing: not the mean over batches or sequences."""
    run = Run.start(configuration(steps=1), splits(), tmp_path)
    run.train()
    run.system.model.eval()
    total, count = 0.0, 0
    for example in splits().validation:
        [source], [target] = [run.system.source.numbers(example.source)], [[1, *run.system.target.numbers(example.source), 2]]
        with torch.no_grad():
            logits, _ = run.system.model(torch.tensor([source]), torch.tensor([len(source)]), torch.tensor([target[:-1]]))
        total -= float(logits.log_softmax(-1)[0].gather(1, torch.tensor(target[1:])[:, None]).sum())
        count += len(target) - 1
    [(step, loss)] = run.progress.history
    assert step == 1
    assert loss == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize(
    ("warmup", "rates"), [(0, [1.0, 0.75, 0.5, 0.25]), (3, [1 / 3, 2 / 3, 0.5, 0.25]), (8, [1 / 8, 2 / 8, 3 / 8, 0.25])]
)
def test_learning_rates(tmp_path: Path, warmup: int, rates: list[float]) -> None:
    """Up over the warm-up, down to nothing over all steps, whichever is lower; also of a resumed run."""
    config = configuration(steps=4, warmup=warmup, learning_rate=0.02)
    found: list[float] = []

    def report(progress: Progress) -> None:
        [group] = run.optimizer.param_groups
        found.append(group["lr"] / 0.02)
        if progress.step == 2:
            signal.raise_signal(signal.SIGINT)

    run = Run.start(config, splits(), tmp_path)
    run.train(report=report)
    run = Run.resume(config, splits(), tmp_path)
    run.train(report=report)
    assert found == pytest.approx(rates)


def test_one_step_is_adam_on_the_clipped_gradient(tmp_path: Path) -> None:
    """The first update of Adam is the learning rate times the sign of the gradient, however it is clipped."""
    config = configuration(steps=2, warmup=0, clip=1e-3)
    run = Run.start(config, splits(), tmp_path)
    before = {name: parameter.detach().clone() for name, parameter in run.system.model.named_parameters()}
    run.train(report=interrupt_at(1))
    norm = torch.stack([parameter.grad.norm() for parameter in run.system.model.parameters() if parameter.grad is not None]).norm()
    assert float(norm) == pytest.approx(1e-3, rel=1e-3)
    moved = max(float((parameter.detach() - before[name]).abs().max()) for name, parameter in run.system.model.named_parameters())
    assert moved == pytest.approx(0.02, rel=1e-2)


def test_the_seed_alone_decides(tmp_path: Path) -> None:
    """Whatever random numbers were drawn before."""
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(len(list(tmp_path.iterdir())))
        Run.start(configuration(seed=seed), splits(), tmp_path / name).train()
    assert_same(tmp_path / "a", tmp_path / "b")
    a, c = weights(tmp_path / "a" / MODEL), weights(tmp_path / "c" / MODEL)
    assert not any(torch.equal(a[name], c[name]) for name in a)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_a_number_does_not_reach_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """The message says what to change, and the checkpoint is the last good one, with finite weights, even if the loss was still finite and
    the step was one that validates: a resumed run has the right end."""
    config = configuration(steps=12, validate_every=4)
    original, done = training.cross_entropy, 0

    def broken(model: Any, batch: Any, smoothing: float = 0.0) -> tuple[Tensor, int]:
        nonlocal done
        nats, count = original(model, batch, smoothing)
        done += model.training
        if model.training and done == 8:
            zero = 0.0 * next(model.parameters()).sum()
            nats = nats * math.nan if what == "loss" else nats + zero.sqrt()  # whose slope at 0 is infinite
        return nats, count

    with monkeypatch.context() as patch:
        patch.setattr(training, "cross_entropy", broken)
        with pytest.raises(DataError, match=r"is nan at step \d: training\.learning_rate = 0\.02 may be too high"):
            Run.start(config, splits(), tmp_path / "broken").train(0.0)
    tensors, metadata = read_tensors(tmp_path / "broken" / CHECKPOINT)
    assert metadata["progress"]["step"] == 7
    assert [name for name, tensor in tensors.items() if not tensor.isfinite().all()] == []
    Run.resume(config, splits(), tmp_path / "broken").train()
    Run.start(config, splits(), tmp_path / "whole").train()
    assert_same(tmp_path / "whole", tmp_path / "broken")


def test_a_validation_loss_that_is_not_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be the lowest for ever: nothing is less than NaN."""
    fixed_losses(monkeypatch, math.nan)
    with pytest.raises(DataError, match=f"the validation loss is nan at step {VALIDATE_EVERY}: "):
        Run.start(configuration(), splits(), tmp_path).train(0.0)
    assert read_tensors(tmp_path / CHECKPOINT)[1]["progress"]["step"] == VALIDATE_EVERY - 1
    assert not (tmp_path / MODEL).exists()


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


@pytest.mark.parametrize("example", [Example(("a", "q"), (("a",),)), Example(("a",), (("q",),))], ids=["source", "target"])
def test_an_unknown_symbol_in_the_validation_data(tmp_path: Path, example: Example) -> None:
    """Said before the folder holds a run."""
    with pytest.raises(DataError, match="unknown symbol 'q'"):
        Run.start(configuration(), dataclasses.replace(splits(), validation=[example]), tmp_path)
    assert not (tmp_path / CHECKPOINT).exists()


COPY: dict[str, dict[str, Any]] = {
    "bahdanau": {"decoder": "bahdanau", "encoder_dim": 24, "decoder_dim": 48, "attention_dim": 24},
    "luong": {"decoder": "luong", "encoder_dim": 32, "decoder_dim": 64},
}
COPY_UPDATES = {"bahdanau": {"steps": 700, "learning_rate": 0.01}, "luong": {"steps": 800, "learning_rate": 0.006}}


@pytest.mark.parametrize("decoder", COPY)
def test_copying_is_learnt(tmp_path: Path, decoder: str) -> None:
    """Fresh random sequences of 8 symbols, none of the held-out ones among those it learnt from: below 1 % of the symbols are wrong."""
    every = examples(4300, 5, longest=8, shortest=3, symbols="abcdefgh")
    data = Splits(every[:4000], every[4000:4100], every[4100:])
    model = {"embedding_dim": 16, **COPY[decoder]}
    update = {"batch_size": 32, "validate_every": 100, "warmup": 50, **COPY_UPDATES[decoder]}
    Run.start(config_from_dict({"model": model, "training": update}, ""), data, tmp_path).train()
    decoded = System.load(tmp_path / MODEL).decode([example.source for example in data.test])
    rates = error_rates(data.test, [hypotheses[0].symbols for hypotheses in decoded])
    assert rates.symbol_error_rate < 0.01


def test_a_stopped_run_stays_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed_losses(monkeypatch, 4.0, 5.0, 5.0)
    config = configuration(validate_every=2, patience=2)
    assert Run.start(config, splits(), tmp_path).train().reason == "stopped"
    assert Run.resume(config, splits(), tmp_path).train().reason == "stopped"


def test_the_step_that_was_not_finite_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step is 1, as in the checkpoints and the progress."""
    monkeypatch.setattr(training, "cross_entropy", lambda model, *_: (next(model.parameters()).sum() * math.nan, 1))
    with pytest.raises(DataError, match="at step 1: "):
        Run.start(configuration(), splits(), tmp_path).train()


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
