"""Training: the losses, learning rates and weights that it says, and what it says when it cannot go on."""

import dataclasses
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from seq2seq_runs import VALIDATE_EVERY, assert_same, configuration, examples, fixed_losses, interrupt_at, splits, weights
from torch import Tensor

from onepass.seq2seq import training
from onepass.seq2seq.checkpoint import read_tensors
from onepass.seq2seq.config import config_from_dict
from onepass.seq2seq.data import DataError, Example, Splits
from onepass.seq2seq.scoring import error_rates
from onepass.seq2seq.system import System
from onepass.seq2seq.training import CHECKPOINT, MODEL, Progress, Run

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_the_step_that_was_not_finite_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step is 1, as in the checkpoints and the progress."""
    monkeypatch.setattr(training, "cross_entropy", lambda model, *_: (next(model.parameters()).sum() * math.nan, 1))
    with pytest.raises(DataError, match="at step 1: "):
        Run.start(configuration(), splits(), tmp_path).train()
