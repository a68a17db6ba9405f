"""Training by teacher forcing that can be stopped at any moment and goes on to the same last bit.

A run lives in a folder: ``model.safetensors``, the weights with the lowest validation loss so far, which is what decodes, and
``checkpoint.safetensors``, all that the run needs to go on.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from onepass.seq2seq.checkpoint import described_as, read_tensors, write_tensors
from onepass.seq2seq.config import Config, differences
from onepass.seq2seq.data import PAD, Batch, DataError, Pairs, Splits, naming
from onepass.seq2seq.model import Seq2Seq
from onepass.seq2seq.system import System

MODEL, CHECKPOINT = "model.safetensors", "checkpoint.safetensors"


@dataclass
class Progress:
    """How far a run is: updates done, their seconds over all sessions, loss of the last one (nats per symbol), validation losses as
    ``(step, loss)``."""

    step: int = 0
    seconds: float = 0.0
    loss: float = math.nan
    history: list[tuple[int, float]] = field(default_factory=list)

    @property
    def best(self) -> tuple[int, float]:
        """The step with the lowest validation loss, and that loss."""
        return min(self.history, key=lambda entry: entry[1], default=(0, math.inf))

    def out_of_patience(self, patience: int) -> bool:
        """Whether the last ``patience`` validations brought nothing."""
        since = [step for step, _ in self.history if step > self.best[0]]
        return 0 < patience <= len(since)


@dataclass(frozen=True)
class Outcome:
    """How training ended: ``"done"`` with all steps, ``"stopped"`` early for want of improvement, or ``"interrupted"``."""

    reason: str
    progress: Progress


class Run:
    """One training run: a system, its optimizer and its progress."""

    def __init__(self, system: System, splits: Splits, folder: Path) -> None:
        self.system, self.folder = system, folder
        self.training = system.config.training
        self.progress = Progress()
        self.pairs = Pairs(splits.train, system.source, system.target)
        with naming(system.config.data.validation or "validation"):
            self.validation = Pairs(splits.validation, system.source, system.target)
        self.optimizer = torch.optim.Adam(system.model.parameters(), lr=self.training.learning_rate, betas=(0.9, 0.98), fused=True)
        self._saved = (0, time.monotonic())  # step and time of the last checkpoint

    @classmethod
    def start(cls, config: Config, splits: Splits, folder: Path) -> "Run":
        """A new run. DataError: the folder already holds one."""
        if (folder / CHECKPOINT).exists():
            raise DataError(f"{folder} already holds a run: go on with it (--resume), or choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        if config.training.threads:
            torch.set_num_threads(config.training.threads)
        torch.manual_seed(config.seed)
        run = cls(System.of(config, splits), splits, folder)
        run.save()
        return run

    @classmethod
    def resume(cls, config: Config, splits: Splits, folder: Path) -> "Run":
        """The run in the folder, as it was left, with its number of threads: others would round otherwise.

        DataError: there is none, or it was begun with another configuration.
        """
        path = folder / CHECKPOINT
        tensors, metadata = read_tensors(path)
        with described_as(path, "the checkpoint of a run"):
            kept = System.described(metadata, path)
        if different := differences(kept.config, config):
            raise DataError(f"{path} belongs to another configuration:\n  " + "\n  ".join(different))
        system = System.of(config, splits)
        for name, ours, theirs in (("source", system.source, kept.source), ("target", system.target, kept.target)):
            if ours.symbols != theirs.symbols:
                changed = sorted(set(ours.symbols) ^ set(theirs.symbols))
                raise DataError(f"{path}: the training examples have other {name} symbols now: {', '.join(changed[:10])}")
        run = cls(system, splits, folder)
        with described_as(path, "the checkpoint of a run"):
            torch.set_num_threads(config.training.threads or metadata["threads"])
            run._restore(tensors, metadata)
        return run

    def train(self, checkpoint_seconds: float = 30.0, report: Callable[[Progress], None] | None = None) -> Outcome:
        """Go on to the end, to the end of patience, or to Ctrl-C or SIGTERM, which take effect between two steps.

        ``report`` is called after each step. A checkpoint is written at every validation, at the end, and otherwise every
        ``checkpoint_seconds``.
        """
        training, progress = self.training, self.progress
        reason = "stopped" if self._out_of_patience() else "done"
        with _interruption() as interrupted:
            for rows in self._remaining():
                began = time.monotonic()
                progress.loss = self._update(self.pairs.batch(rows))
                progress.step += 1
                validates = progress.step == training.steps or progress.step % training.validate_every == 0
                if validates:
                    self._validate()
                progress.seconds += time.monotonic() - began
                if validates or time.monotonic() - self._saved[1] >= checkpoint_seconds:
                    self.save()
                if report is not None:
                    report(progress)
                if self._out_of_patience():
                    reason = "stopped"
                    break
                if interrupted() and progress.step < training.steps:
                    reason = "interrupted"
                    break
        if self._saved[0] != progress.step:
            self.save()
        return Outcome(reason, progress)

    def save(self) -> None:
        """Write the checkpoint."""
        tensors = {f"model.{name}": tensor for name, tensor in self.system.model.state_dict().items()}
        for name, parameter in self.system.model.named_parameters():
            tensors |= {f"adam.{key}.{name}": value for key, value in self.optimizer.state[parameter].items()}
        tensors["random"] = torch.get_rng_state()
        write_tensors(self.folder / CHECKPOINT, tensors, self.description())
        self._saved = (self.progress.step, time.monotonic())

    def description(self) -> dict[str, Any]:
        """What a checkpoint holds besides tensors."""
        return self.system.description() | {"progress": asdict(self.progress), "threads": torch.get_num_threads()}

    def _restore(self, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        self.system.model.load_state_dict({name.removeprefix("model."): tensors[name] for name in tensors if name.startswith("model.")})
        for name, parameter in self.system.model.named_parameters():
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"adam.{key}.{name}" in tensors]
            self.optimizer.state[parameter].update({key: tensors[f"adam.{key}.{name}"] for key in keys})
        torch.set_rng_state(tensors["random"])
        kept = metadata["progress"]
        self.progress = Progress(**{**kept, "history": [(int(step), float(loss)) for step, loss in kept["history"]]})
        self._saved = (self.progress.step, time.monotonic())

    def _out_of_patience(self) -> bool:
        return self.progress.step < self.training.steps and self.progress.out_of_patience(self.training.patience)

    def _remaining(self) -> Iterator[Tensor]:
        """The rows of every batch from the next step on: a function of the seed and the step alone."""
        if self._out_of_patience():
            return
        epoch, order = -1, list[Tensor]()
        per_epoch = len(self.pairs.epoch(self.training.batch_size, self.system.config.seed, 0))
        for step in range(self.progress.step, self.training.steps):
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                order = self.pairs.epoch(self.training.batch_size, self.system.config.seed, epoch)
            yield order[step % per_epoch]

    def _update(self, batch: Batch) -> float:
        """One step of Adam on the mean loss of the batch's symbols, by the schedule."""
        training, model, step = self.training, self.system.model, self.progress.step
        rate = training.learning_rate * min((step + 1) / max(1, training.warmup), 1.0 - step / training.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        model.train()
        total, count = cross_entropy(model, batch, training.label_smoothing)
        loss = total / count
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(model.parameters(), training.clip)
        self._refuse_not_finite(norm.item(), "norm of the gradient", step + 1)  # before it reaches the weights
        self.optimizer.step()
        return loss.item()

    def _refuse_not_finite(self, value: float, name: str, step: int) -> None:
        if not math.isfinite(value):
            rate = self.training.learning_rate
            raise DataError(f"the {name} is {value} at step {step}: training.learning_rate = {rate} may be too high")

    def _validate(self) -> None:
        """The loss on the validation pairs; the weights are kept if it is the lowest."""
        self.system.model.eval()
        total, count = 0.0, 0
        with torch.inference_mode():
            for rows in torch.split(self.validation.lengths.argsort(stable=True), 256):
                nats, symbols = cross_entropy(self.system.model, self.validation.batch(rows))
                total, count = total + nats.item(), count + symbols
        self._refuse_not_finite(total, "validation loss", self.progress.step)
        self.progress.history.append((self.progress.step, total / count))
        if self.progress.best[0] == self.progress.step:
            self.system.save(self.folder / MODEL)


def cross_entropy(model: Seq2Seq, batch: Batch, label_smoothing: float = 0.0) -> tuple[Tensor, int]:
    """Nats of all symbols of a batch, end symbols included, and how many symbols there are."""
    logits, _ = model(batch.source, batch.lengths, batch.target[:, :-1])
    nats = nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.target[:, 1:].flatten(), ignore_index=PAD, reduction="sum", label_smoothing=label_smoothing
    )
    return nats, int(batch.target_lengths.sum())


@contextmanager
def _interruption() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C or SIGTERM came. The second Ctrl-C interrupts at once."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def note(number: int, frame: FrameType | None) -> None:
        if came and number == signal.SIGINT:
            raise KeyboardInterrupt
        came.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
