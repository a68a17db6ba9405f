"""Runs to test: small configurations and examples, and all that a run leaves."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from onepass.seq2seq import training
from onepass.seq2seq.checkpoint import read_tensors
from onepass.seq2seq.config import Config, config_from_dict
from onepass.seq2seq.data import Example, Splits
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
