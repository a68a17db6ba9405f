"""The command line: results on standard output, notes on standard error, and errors that can be read, with status 2."""

import io
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import onepass.seq2seq
from onepass import __main__
from onepass.seq2seq.checkpoint import read_tensors
from onepass.seq2seq.data import Example
from onepass.seq2seq.scoring import error_rates
from onepass.seq2seq.system import System
from onepass.seq2seq.training import CHECKPOINT, MODEL, Run

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


def decoded(run: Path, sources: list[str], **options: Any) -> list[list[str]]:
    """By the library."""
    found = System.load(run / MODEL).decode([tuple(source) for source in sources], **options)
    return [[" ".join(one.symbols) for one in hypotheses] for hypotheses in found]


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


def test_decode_a_file(trained: Path, command: Command, tmp_path: Path) -> None:
    """Source, tab, hypothesis, in the order of the file, and as the library decodes them."""
    path = tmp_path / "sources"
    path.write_text("abcd\nd\nba\n")
    status, output, _ = command("decode", trained, path)
    assert status == 0
    assert output.splitlines() == [
        f"{s}\t{best}" for s, [best] in zip(["abcd", "d", "ba"], decoded(trained, ["abcd", "d", "ba"]), strict=True)
    ]
    assert command("decode", trained / MODEL, path)[1] == output


def test_decode_standard_input(trained: Path, command: Command, stdin: Callable[[bytes], None]) -> None:
    """With or without the line feed of the last line, with CR LF and a byte order mark, all the same; nothing gives nothing."""
    outcomes = []
    for content in (b"ab\nc\n", b"ab\nc", b"ab\r\nc\r\n", b"\xef\xbb\xbfab\nc\n"):
        stdin(content)
        outcomes.append(command("decode", trained))
    assert outcomes == [(0, "".join(f"{s}\t{decoded(trained, [s])[0][0]}\n" for s in ("ab", "c")), "")] * 4
    stdin(b"")
    assert command("decode", trained) == (0, "", "")


def test_decode_options(trained: Path, command: Command, stdin: Callable[[bytes], None]) -> None:
    """Each goes through to the search."""
    hypotheses = decoded(trained, ["abcd"], n_best=3)[0]
    stdin(b"abcd\n")
    status, output, _ = command("decode", trained, "--n-best", 3, "--scores")
    assert status == 0
    rows = [line.split("\t") for line in output.splitlines()]
    assert [row[:2] for row in rows] == [["abcd", hypothesis] for hypothesis in hypotheses]
    scores = [float(row[2]) for row in rows]
    assert scores == sorted(scores, reverse=True)

    def score(*options: object) -> tuple[str, float]:
        stdin(b"abcd\n")
        status, output, error = command("decode", trained, "--scores", *options)
        assert status == 0, error
        [(_, hypothesis, score)] = [line.split("\t") for line in output.splitlines()]
        return hypothesis, float(score)

    usual = score()
    assert len(score("--max-length", 1)[0].split()) <= 1
    assert score("--beams", 1)[1] <= usual[1]
    assert score("--length-penalty", 2.0)[1] > usual[1]
    assert score("--coverage-penalty", 2.0)[1] < usual[1]


@pytest.mark.parametrize(
    ("content", "place", "said"),
    [
        (b"ab\nabx\n", ":2: ", "unknown symbol 'x' in \"abx\"; known are 'a', 'b', 'c', 'd'"),
        ("a\u2028b\nab\n".encode(), ":1: ", "unknown symbol '\\u2028'"),
        (b"ab\x0cc\n", ":1: ", "unknown symbol '\\x0c'"),
        (b"ab\n\nc\n", ":2: ", "the source is empty"),
        (b"ab\n \nc\n", ":2: ", "the source is empty"),
        (b"ab\na\xff\n", ": ", "not UTF-8 at byte 5"),
    ],
    ids=["unknown", "line separator", "form feed", "empty", "blank", "encoding"],
)
def test_sources_that_cannot_be_decoded(
    trained: Path, command: Command, stdin: Callable[[bytes], None], tmp_path: Path, content: bytes, place: str, said: str
) -> None:
    """The place is the file, or standard input, and the line; nothing is printed of the lines before it."""
    path = tmp_path / "sources"
    path.write_bytes(content)
    assert_error(command("decode", trained, path), f"error: {path}{place}{said}")
    stdin(content)
    assert_error(command("decode", trained), f"error: standard input{place}{said}")


def test_decoding_that_cannot_start(trained: Path, command: Command, stdin: Callable[[bytes], None], tmp_path: Path, task: Path) -> None:
    stdin(b"ab\n")
    assert_error(command("decode", trained, "--n-best", 5), "--n-best 5 needs as many beams; got 4: add --beams 5")
    assert_error(command("decode", trained, "--n-best", 2, "--beams", 1), "--n-best 2 needs as many beams; got 1")
    assert_error(command("decode", trained, tmp_path / "none"), f"{tmp_path / 'none'}: cannot be read")
    assert_error(command("decode", tmp_path / "none"), f"{tmp_path / 'none'}: no such file")
    assert_error(command("decode", tmp_path), f"{tmp_path / MODEL}: no such file")
    assert_error(command("decode", task), f"{task}: not a safetensors file that can be read")
    assert_error(command("decode", trained / CHECKPOINT), f"{trained / CHECKPOINT} is not the model.safetensors of a run")
    for option in ("--beams", "--n-best", "--max-length"):
        assert_error(command("decode", trained, option, 0), option)
    assert_error(command("decode", trained, "--length-penalty", -1), "--length-penalty")


def test_no_attention(plain: Path, command: Command, stdin: Callable[[bytes], None], tmp_path: Path) -> None:
    """Refused before anything is decoded, printed or made."""
    stdin(b"ab\n")
    assert_error(command("decode", plain, "--coverage-penalty", 0.2), "search.coverage_penalty = 0.2 has no effect with")
    assert_error(command("decode", plain, "--alignments", tmp_path / "pictures"), "no attention, and so no alignment to draw")
    assert_error(command("evaluate", plain, "--picture", tmp_path / "a.png"), "no attention, and so no alignment to draw")
    assert list(tmp_path.iterdir()) == []
    assert command("evaluate", plain, "--coverage-penalty", 0.0)[0] == 0


def test_alignments(trained: Path, command: Command, stdin: Callable[[bytes], None], tmp_path: Path) -> None:
    """A picture per source, numbered as the lines are."""
    pytest.importorskip("matplotlib")
    stdin(b"ab\nd\n")
    status, output, error = command("decode", trained, "--alignments", tmp_path / "new" / "pictures")
    assert (status, output.count("\n"), error) == (0, 2, "")
    pictures = sorted((tmp_path / "new" / "pictures").iterdir())
    assert [picture.name for picture in pictures] == ["0001.png", "0002.png"]
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
    stdin(b"ab\n")
    assert_error(command("decode", trained, "--alignments", trained / MODEL), str(trained / MODEL))


def test_evaluate(trained: Path, command: Command, tmp_path: Path) -> None:
    """The figures of the file are those that are printed, and those of the library."""
    figures = tmp_path / "new" / "figures.json"
    status, output, error = command("evaluate", trained, "--json", figures, "--edges", "2,4", "--show", 3)
    assert (status, error) == (0, "")
    found = json.loads(figures.read_text())
    lines = [line.split("\t") for line in (trained.parent / "test.tsv").read_text().splitlines()]
    examples = [Example(tuple(source), (tuple(target.split()),)) for source, target in lines]
    rates = error_rates(examples, [tuple(best.split()) for [best] in decoded(trained, [source for source, _ in lines])])
    counts = {key: found[key] for key in ("symbols", "symbol_errors", "sequences", "sequence_errors")}
    assert counts == vars(rates)
    assert (found["symbol_error_rate"], found["sequence_error_rate"]) == (rates.symbol_error_rate, rates.sequence_error_rate)
    assert found["by_length"].keys() == {"1-2", "3-4", "5+"}
    assert sum(part["symbols"] for part in found["by_length"].values()) == rates.symbols
    assert found["examples"] == {"split": "test", "phrase_words": 1, "drop_stress": False}
    assert (found["search"]["beams"], found["config"]["training"]["steps"]) == (4, 20)
    for name, one in [("all", found), *found["by_length"].items()]:
        [row] = [re.split(r"\s*[│|]\s*", line.strip("│| ")) for line in output.splitlines() if line.strip("│| ").startswith(f"{name} ")]
        symbols = (f"{one['symbols']:,}", f"{one['symbol_errors']:,}", f"{one['symbol_error_rate']:.2%}")
        assert row == [name, f"{one['sequences']:,}", f"{one['sequence_errors']:,}", f"{one['sequence_error_rate']:.2%}", *symbols]
    assert [source for source, _ in lines if f" {source} " in output] == [source for source, _ in lines[:3]]


def figures_of(command: Command, run: Path, path: Path, *options: object) -> dict[str, Any]:
    status, _, error = command("evaluate", run, "--json", path, "--show", 0, *options)
    assert status == 0, error
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_evaluate_options(trained: Path, command: Command, tmp_path: Path) -> None:
    """What is decoded, by which search, and how it is compared."""
    path = tmp_path / "figures.json"
    usual = figures_of(command, trained, path)
    assert figures_of(command, trained, path, "--limit", 3)["sequences"] == 3
    counts = {split: len((trained.parent / f"{split}.tsv").read_text().splitlines()) for split in ("train", "validation", "test")}
    assert {split: figures_of(command, trained, path, "--split", split)["sequences"] for split in counts} == counts
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("ab\tA1 B1\nab\tA0\ncd\tC1 D1\n")
    other = figures_of(command, trained, path, "--data", pairs)
    assert (other["sequences"], other["examples"]["split"]) == (2, str(pairs))
    search = figures_of(command, trained, path, "--beams", 2, "--length-penalty", 1, "--coverage-penalty", 0.5, "--max-length", 1)
    assert search["search"] == {"beams": 2, "length_penalty": 1.0, "coverage_penalty": 0.5, "max_length": 1}
    assert search["symbols"] == usual["symbols"]


def test_without_stress(trained: Path, command: Command, tmp_path: Path) -> None:
    """A digit that is wrong is an error, unless digits are dropped on both sides."""
    pairs, path = tmp_path / "pairs.tsv", tmp_path / "figures.json"
    [[said]] = decoded(trained, ["abcd"])
    assert "1" in said
    pairs.write_text(f"abcd\t{said.replace('1', '2')}\n")
    assert figures_of(command, trained, path, "--data", pairs)["sequence_errors"] == 1
    assert figures_of(command, trained, path, "--data", pairs, "--drop-stress")["sequence_errors"] == 0


def test_phrases(task: Path, command: Command) -> None:
    """Words joined by ``_``, which the system must have seen; else the message names it."""
    run, path = task.parent / "run", task.parent / "figures.json"
    with open(task.parent / "train.tsv", "a") as file:
        file.write("a_b\tA1 _ B1\n")
    assert command("train", task, "--output", run, "--set", "training.steps=1")[0] == 0
    words = figures_of(command, run, path)
    joined = figures_of(command, run, path, "--phrase-words", 3)
    assert (joined["sequences"], joined["examples"]["phrase_words"]) == (words["sequences"] // 3, 3)
    assert joined["mean_source_length"] > words["mean_source_length"] + 3


def test_phrases_of_a_system_that_knows_none(trained: Path, command: Command) -> None:
    assert_error(command("evaluate", trained, "--phrase-words", 2), "unknown symbol '_'")


def test_picture(trained: Path, command: Command, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    status, _, error = command("evaluate", trained, "--picture", tmp_path / "new" / "alignment.png")
    assert (status, "alignment.png" in error) == (0, True)
    assert (tmp_path / "new" / "alignment.png").read_bytes().startswith(b"\x89PNG")


def test_symbols_that_look_like_markup(trained: Path, command: Command, tmp_path: Path) -> None:
    """They are printed as they are: no colours, no emoji, no error."""
    (tmp_path / "pairs.tsv").write_text("abcd\t[/] [bold] :x: \\[i]\n")
    status, output, _ = command("evaluate", trained, "--data", tmp_path / "pairs.tsv")
    assert status == 0
    assert "[/] [bold] :x: \\[i]" in output


def test_a_folder_that_looks_like_markup(task: Path, command: Command) -> None:
    """And is longer than a terminal is wide: to be copied as it stands."""
    run = task.parent / "[bold]" / "[i]" / ("x" * 100)
    status, _, error = command("train", task, "--output", run, "--set", "training.steps=1")
    assert status == 0
    assert error.splitlines()[-1] == f"weights in {run / MODEL}; now `python -m onepass evaluate {run}`"


def test_evaluation_that_cannot_start(trained: Path, command: Command, tmp_path: Path) -> None:
    for edges in ("4,2", "0,3", "1,x", "2,2"):
        assert_error(command("evaluate", trained, "--edges", edges), f"--edges takes ascending lengths like 5,10,15; got '{edges}'")
    assert_error(command("evaluate", trained, "--split", "tst"), "--split must be test, validation or train; got tst")
    assert_error(command("evaluate", trained, "--limit", 0), "--limit")
    assert_error(command("evaluate", trained, "--data", tmp_path / "none"), f"{tmp_path / 'none'}: no such file")
    assert_error(command("evaluate", tmp_path / "none"), f"{tmp_path / 'none'}: no such file")
    bad = tmp_path / "bad.tsv"
    bad.write_text("ab\tA1\nab A1\n")
    assert_error(command("evaluate", trained, "--data", bad), f"{bad}:2: a line is a source, one tab and a target")
    bad.write_text("ab\tA1\nxb\tA1\n")
    assert_error(command("evaluate", trained, "--data", bad), "unknown symbol 'x' in \"xb\"")
    assert_error(command("evaluate", trained, "--json", bad / "figures.json"), str(bad))


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


@pytest.mark.skipif(os.name != "posix", reason="pipes of a shell")
def test_processes(trained: Path) -> None:
    """Through the interpreter: results alone on standard output, an error's status, and a reader that goes away early."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "80"}

    def run(*arguments: str, content: bytes) -> "subprocess.CompletedProcess[bytes]":
        whole = [sys.executable, "-m", "onepass", *arguments]
        return subprocess.run(whole, input=content, capture_output=True, env=environment, timeout=300)

    done = run("decode", str(trained), content=b"ab\n")
    assert (done.returncode, done.stdout.decode()) == (0, f"ab\t{decoded(trained, ['ab'])[0][0]}\n"), done.stderr
    done = run("decode", str(trained), content=b"ab\nax\n")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.decode() == "error: standard input:2: unknown symbol 'x' in \"ax\"; known are 'a', 'b', 'c', 'd'\n"


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


def test_symbols_that_look_like_mathematics(tmp_path: Path, command: Command, stdin: Any) -> None:
    path = write_task(tmp_path)
    for name in ("train", "validation", "test"):
        (tmp_path / f"{name}.tsv").write_text("$\\frac$ b\t$x_$ y\n")
    run = tmp_path / "run"
    assert command("train", path, "--output", run, "--set", "data.source=words", "--set", "training.steps=1")[0] == 0
    stdin(b"$\\frac$ b\n")
    assert command("decode", run, "--alignments", tmp_path / "pictures")[0] == 0


def test_a_picture_of_another_kind(trained: Path, command: Command, tmp_path: Path) -> None:
    status, _, error = command("evaluate", trained, "--picture", tmp_path / "a.xyz")
    assert status in (0, 2), error


def test_figures_into_a_folder(trained: Path, command: Command, tmp_path: Path) -> None:
    """Said before anything is decoded, about the path that was given."""
    outcome = command("evaluate", trained, "--json", tmp_path)
    assert_error(outcome, f"{tmp_path}")
    assert ".part" not in outcome[2]


def test_the_file_of_an_unknown_symbol(trained: Path, command: Command, task: Path, tmp_path: Path) -> None:
    """Where to look for it."""
    (tmp_path / "pairs.tsv").write_text("ab\tA1\nxb\tA1\n")
    assert_error(command("evaluate", trained, "--data", tmp_path / "pairs.tsv"), str(tmp_path / "pairs.tsv"), "'x'")
    (task.parent / "validation.tsv").write_text("abz\tA1\n")
    assert_error(command("train", task, "--output", tmp_path / "run"), "validation", "'z'")
