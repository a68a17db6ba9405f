"""The command line to test: how it is called, and a small task with runs trained on it. Test modules import its fixtures."""

import io
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from onepass import __main__

CONFIGURATION = """
[data]
task = "pairs"
train = "train.tsv"
validation = "validation.tsv"
test = "test.tsv"
[model]
embedding_dim = 6
encoder_dim = 6
decoder_dim = 8
{model}
[training]
steps = 20
batch_size = 16
validate_every = 5
warmup = 5
learning_rate = 0.02
threads = 1
"""
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """As the configuration says, too; put back for the other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Status, standard output and standard error. An exception that leaves ``main`` would be a traceback, and fails the test."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = __main__.main([str(argument) for argument in arguments])
        output, error = capsys.readouterr()
        return status, output, error

    return run


def write_task(folder: Path, model: str = "attention_dim = 6") -> Path:
    """Letters a to d, to be said in capitals, with a stress digit; the path of the configuration."""
    chance = random.Random(0)
    for name, count in (("train", 80), ("validation", 12), ("test", 20)):
        sources = {"".join(chance.choice("abcd") for _ in range(chance.randint(1, 6))): None for _ in range(count)}
        first = {"abcd": None} if name == "train" else {}
        lines = [f"{source}\t{' '.join(letter.upper() + '1' for letter in source)}\n" for source in first | sources]
        (folder / f"{name}.tsv").write_text("".join(lines))
    path = folder / "task.toml"
    path.write_text(CONFIGURATION.format(model=model))
    return path


@pytest.fixture
def task(tmp_path: Path) -> Path:
    return write_task(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    assert __main__.main(["train", str(write_task(folder)), "--output", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    path = write_task(folder, 'decoder = "plain"')
    assert __main__.main(["train", str(path), "--output", str(folder / "run"), "--set", "training.steps=2"]) == 0
    return folder / "run"


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    return lambda content: monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def assert_error(outcome: tuple[int, str, str], *parts: str) -> None:
    """One message, and nothing that could be taken for a result."""
    status, output, error = outcome
    assert (status, output) == (2, "")
    assert "Traceback" not in error
    assert [part for part in parts if part not in error] == []
