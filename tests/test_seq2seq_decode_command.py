"""Decoding and evaluation by the command line: results alone on standard output, as the library gives them, and errors that can be read."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from seq2seq_command_cases import Command, assert_error, command, one_thread, plain, stdin, task, trained, write_task

from onepass.seq2seq.data import Example
from onepass.seq2seq.scoring import error_rates
from onepass.seq2seq.system import System
from onepass.seq2seq.training import CHECKPOINT, MODEL

__all__ = ["command", "one_thread", "plain", "stdin", "task", "trained"]  # fixtures


def decoded(run: Path, sources: list[str], **options: Any) -> list[list[str]]:
    """By the library."""
    found = System.load(run / MODEL).decode([tuple(source) for source in sources], **options)
    return [[" ".join(one.symbols) for one in hypotheses] for hypotheses in found]


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
    assert_error(command("decode", trained, "--coverage-penalty", "inf"), "coverage")
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


def test_standard_input_that_is_closed(trained: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert_error(command("decode", trained), "standard input is closed: name a file")


@pytest.mark.parametrize("beams", [1, 4])
def test_spoilt_weights(trained: Path, command: Command, stdin: Callable[[bytes], None], tmp_path: Path, beams: int) -> None:
    """A model of NaN has no best hypothesis, and no line is lost in silence."""
    tensors = load_file(trained / MODEL)
    with safe_open(trained / MODEL, "pt") as file:
        metadata = file.metadata()
    spoilt = {name: torch.full_like(x, torch.nan) if x.is_floating_point() else x for name, x in tensors.items()}
    save_file(spoilt, tmp_path / MODEL, metadata)
    stdin(b"ab\n")
    assert_error(command("decode", tmp_path, "--beams", beams), "no numbers (NaN): its weights are spoilt")
    data = tmp_path / "pairs.tsv"
    data.write_text("ab\tA B\n")
    assert_error(command("evaluate", tmp_path, "--data", data, "--beams", beams), "no numbers (NaN): its weights are spoilt")
