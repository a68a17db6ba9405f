"""Files of tensors: whole or not there, and what is said of those that cannot be read; systems that are kept and decode the same."""

import builtins
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file

from onepass.seq2seq import checkpoint
from onepass.seq2seq.checkpoint import FORMAT, read_tensors, write_bytes, write_tensors
from onepass.seq2seq.config import Config, ModelConfig, SearchConfig, config_from_dict
from onepass.seq2seq.data import DataError, Example, Splits
from onepass.seq2seq.system import Decoded, System
from onepass.seq2seq.training import CHECKPOINT, MODEL, Run

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(7, dtype=torch.int64), "c": torch.zeros(0, 2, dtype=torch.bfloat16)}
DECODERS: dict[str, dict[str, Any]] = {
    "plain": {"decoder": "plain", "cell": "lstm", "num_layers": 2},
    "bahdanau": {"decoder": "bahdanau", "attention_dim": 4, "maxout_dim": 4},
    "luong": {"decoder": "luong", "cell": "lstm"},
    "luong-dot": {"decoder": "luong", "score": "dot", "decoder_dim": 10},
    "luong-concat": {"decoder": "luong", "score": "concat", "attention_dim": 4, "input_feeding": False},
    "local-m": {"decoder": "luong", "score": "dot", "decoder_dim": 10, "window": "local-m", "half_width": 2},
    "local-p": {"decoder": "luong", "window": "local-p", "half_width": 2, "input_feeding": False},
}
SOURCES = [tuple(text) for text in ("abc", "d", "abcdabcd", "ba", "c", "dcba", "bbbbb", "ad")]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def system(decoder: str = "bahdanau", seed: int = 0) -> System:
    """Untrained, with weights large enough for hypotheses that differ."""
    torch.manual_seed(seed)
    widths = {"embedding_dim": 4, "encoder_dim": 5, "decoder_dim": 6, "dropout": 0.3}
    splits = Splits([Example(tuple("abcd"), (("X", "YY", "ü", "[z]"),))], [], [])
    made = System.of(config_from_dict({"model": widths | DECODERS[decoder]}, ""), splits)
    with torch.no_grad():
        for parameter in made.model.parameters():
            parameter.mul_(4.0)
    return made


def same(a: Decoded, b: Decoded) -> bool:
    """To rounding: the sums of a batch depend on its size."""
    weights = (a.alignment is None and b.alignment is None) or torch.allclose(a.alignment, b.alignment, atol=1e-5)  # type: ignore[arg-type]
    return weights and (a.symbols, a.ended) == (b.symbols, b.ended) and abs(a.score - b.score) < 1e-4


def test_there_and_back(tmp_path: Path) -> None:
    """Names, shapes, dtypes, values; metadata as JSON gives them."""
    metadata = {"text": "ü\n", "numbers": [1, 0.1, None], "nested": {"a": {}}}
    write_tensors(tmp_path / "x", TENSORS, metadata)
    tensors, back = read_tensors(tmp_path / "x")
    assert back == metadata
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert (tensors[name].dtype, tensors[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(tensors[name], tensor)


def test_views_are_kept_as_they_look(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4).requires_grad_()
    write_tensors(tmp_path / "x", {"turned": base.T, "part": base[1:, ::2]}, {})
    tensors, _ = read_tensors(tmp_path / "x")
    assert torch.equal(tensors["turned"], base.detach().T)
    assert torch.equal(tensors["part"], base.detach()[1:, ::2])


def test_written_files_are_replaced_at_once(tmp_path: Path) -> None:
    """Who has the old file open keeps it whole; the new one is another file."""
    path = tmp_path / "x"
    write_bytes(path, b"old" * 1000)
    with open(path, "rb") as old:
        write_bytes(path, b"new")
        assert old.read() == b"old" * 1000
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


class Full(io.FileIO):
    """A file on a disk that fills up."""

    def write(self, content: Any) -> int:
        super().write(content[: len(content) // 2])
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("fault", ["write", "fsync", "replace", "interrupt"])
def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """And nothing beside it, whether the disk is full or somebody presses Ctrl-C."""
    path = tmp_path / "x"
    write_tensors(path, TENSORS, {"version": 1})
    before = path.read_bytes()

    def fails(*_: object) -> None:
        raise KeyboardInterrupt if fault == "interrupt" else OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        if fault == "write":
            patch.setattr(builtins, "open", lambda name, mode: Full(name, mode.replace("b", "")))
        else:
            patch.setattr(checkpoint.os, "replace" if fault == "replace" else "fsync", fails)
        with pytest.raises(KeyboardInterrupt if fault == "interrupt" else OSError):
            write_tensors(path, TENSORS, {"version": 2})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_kill_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there at every moment before the old file is replaced: all of the new one is on the disk by then."""
    path, seen = tmp_path / "x", list[str]()
    write_tensors(path, TENSORS, {"version": 1})
    fsync, replace = os.fsync, os.replace

    def look(name: str) -> None:
        seen.append(f"{name} {read_tensors(path)[1]['version']}")

    def replacing(beside: Path, target: Path) -> None:
        look("replace")
        assert read_tensors(beside)[1] == {"version": 2}
        replace(beside, target)

    monkeypatch.setattr(checkpoint.os, "fsync", lambda number: (look("fsync"), fsync(number))[1])
    monkeypatch.setattr(checkpoint.os, "replace", replacing)
    write_tensors(path, TENSORS, {"version": 2})
    assert seen == ["fsync 1", "replace 1", *["fsync 2"] * (os.name == "posix")]


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        read_tensors(tmp_path / "none")
    assert str(error.value) == f"{tmp_path / 'none'}: no such file"


def test_a_file_cut_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_tensors(path, TENSORS, {"some": "metadata"})
    whole = path.read_bytes()
    for length in {0, 1, 7, 8, 9, *range(10, len(whole), 17), len(whole) - 1}:
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match="not a safetensors file that can be read") as error:
            read_tensors(path)
        assert str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"seed = 1\n", "not a safetensors file that can be read"),
        (b"\x00" * 64, "not a safetensors file that can be read"),
        (save({"a": torch.ones(2)}), "these tensors were not written by onepass"),
        (save({"a": torch.ones(2)}, {"format": "pt"}), "these tensors were not written by onepass"),
        (save({"a": torch.ones(2)}, {"onepass": json.dumps({"format": FORMAT + 1})}), f"with another format than {FORMAT}"),
        (save({"a": torch.ones(2)}, {"onepass": "{}"}), f"with another format than {FORMAT}"),
        (save({"a": torch.ones(2)}, {"onepass": "no JSON"}), f"with another format than {FORMAT}"),
    ],
    ids=["TOML", "zeros", "no metadata", "of others", "later", "no format", "no JSON"],
)
def test_files_of_others(tmp_path: Path, content: bytes, said: str) -> None:
    """Each message names the file."""
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(DataError, match=re.escape(said)) as error:
        read_tensors(path)
    assert str(error.value).startswith(f"{path}: ")


def test_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=re.escape(str(tmp_path))):
        read_tensors(tmp_path)


def test_tensors_that_do_not_make_a_system(tmp_path: Path) -> None:
    """A checkpoint of a run is no model and the other way round; nor are tensors of other names, shapes, or without a description."""
    folder = tmp_path / "run"
    config = Config(model=ModelConfig(embedding_dim=2, encoder_dim=2, decoder_dim=2, attention_dim=2))
    run = Run.start(config, Splits([Example(("a",), (("b",),))], [], []), folder)
    run.system.save(folder / MODEL)
    with pytest.raises(DataError, match=r"not the model\.safetensors of a run") as error:
        System.load(folder / CHECKPOINT)
    assert str(folder / CHECKPOINT) in str(error.value)

    tensors, metadata = read_tensors(folder / MODEL)
    name = next(iter(tensors))
    for wrong, description in (
        ({**tensors, "more": torch.ones(1)}, metadata),
        ({key: tensor for key, tensor in tensors.items() if key != name}, metadata),
        ({**tensors, name: torch.ones(1, 1)}, metadata),
        (tensors, {key: value for key, value in metadata.items() if key != "target"}),
        (tensors, {}),
    ):
        write_tensors(tmp_path / "wrong", wrong, description)
        with pytest.raises(DataError, match=r"not the model\.safetensors of a run") as error:
            System.load(tmp_path / "wrong")
        assert str(tmp_path / "wrong") in str(error.value)
        assert "\n" not in str(error.value)

    (folder / CHECKPOINT).write_bytes((folder / MODEL).read_bytes())
    with pytest.raises(DataError, match="not the checkpoint of a run"):
        Run.resume(config, Splits([Example(("a",), (("b",),))], [], []), folder)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_system_decodes_the_same_from_its_file(tmp_path: Path, decoder: str) -> None:
    """To the last bit, and no dropout."""
    kept = system(decoder)
    kept.save(tmp_path / "x")
    torch.manual_seed(5)
    loaded = System.load(tmp_path / "x")
    assert (loaded.config, loaded.source.symbols, loaded.target.symbols) == (kept.config, kept.source.symbols, kept.target.symbols)
    assert not loaded.model.training
    weights = loaded.model.state_dict()
    assert [name for name, tensor in kept.model.state_dict().items() if not torch.equal(tensor, weights[name])] == []
    for ours, theirs in zip(kept.decode(SOURCES, n_best=3), loaded.decode(SOURCES, n_best=3), strict=True):
        assert ours == theirs


@pytest.mark.parametrize("decoder", DECODERS)
def test_sources_are_decoded_as_each_alone(decoder: str) -> None:
    """In the order given, though they are decoded by length; whatever the chunks; each with the alignment of its own length."""
    made = system(decoder)
    alone = [made.decode([source], n_best=2, need_weights=True)[0] for source in SOURCES]
    assert len({round(hypotheses[0].score, 3) for hypotheses in alone}) == len(SOURCES)  # so that a wrong order is seen
    for chunk in (1, 3, 256):
        together = made.decode(SOURCES, n_best=2, need_weights=True, chunk=chunk)
        assert [len(hypotheses) for hypotheses in together] == [2] * len(SOURCES)
        assert all(same(a, b) for some, others in zip(alone, together, strict=True) for a, b in zip(some, others, strict=True))
        for source, hypotheses in zip(SOURCES, together, strict=True):
            for one in hypotheses:
                shape = None if one.alignment is None else one.alignment.shape
                assert shape == (None if decoder == "plain" else (len(one.symbols) + one.ended, len(source)))


def test_best_first() -> None:
    for hypotheses in system().decode(SOURCES, n_best=4):
        assert [one.score for one in hypotheses] == sorted((one.score for one in hypotheses), reverse=True)
        assert len({one.symbols for one in hypotheses}) == 4


def test_alignments_only_if_asked_for() -> None:
    assert {one.alignment for hypotheses in system().decode(SOURCES) for one in hypotheses} == {None}


def test_the_search_is_the_configurations_unless_given() -> None:
    made = system()
    [one] = made.decode([tuple("abcdabcd")], SearchConfig(beams=1, max_length=3))[0]
    assert len(one.symbols) + one.ended <= 3
    default = made.decode(SOURCES, n_best=2)
    assert default == made.decode(SOURCES, made.config.search, n_best=2)
    other = made.decode(SOURCES, SearchConfig(beams=4, length_penalty=5.0), n_best=2)
    assert [hypotheses[0].score for hypotheses in default] != [hypotheses[0].score for hypotheses in other]


def test_progress() -> None:
    """How many are done, after each chunk."""
    done: list[int] = []
    system().decode(SOURCES, chunk=3, progress=done.append)
    assert done == [3, 6, 8]


def test_no_sources() -> None:
    assert system().decode([]) == []


def test_sources_that_cannot_be_decoded() -> None:
    """Refused before any is."""
    made = system()
    with pytest.raises(DataError, match="source 2 is empty"):
        made.decode([("a",), ()], progress=lambda _: pytest.fail("decoded"))
    with pytest.raises(DataError, match=r"unknown symbol 'e' in \"ae\"; known are 'a', 'b', 'c', 'd'"):
        made.decode([("a",), ("a", "e")], progress=lambda _: pytest.fail("decoded"))
    for special in ("<pad>", "<bos>", "<eos>"):
        with pytest.raises(DataError, match=f"unknown symbol '{special}'"):
            made.decode([(special,)])


def test_decoding_leaves_no_dropout_on() -> None:
    """Of a model that was being trained."""
    made = system()
    made.model.train()
    assert made.decode(SOURCES) == made.decode(SOURCES)


def test_a_file_of_safetensors_is_one_for_others_too(tmp_path: Path) -> None:
    """Its tensors can be read without onepass, and a copy that lost the description is told apart."""
    made = system()
    made.save(tmp_path / "x")
    tensors, _ = read_tensors(tmp_path / "x")
    save_file(tensors, tmp_path / "copy")
    with pytest.raises(DataError, match="the metadata lack their description"):
        System.load(tmp_path / "copy")


@pytest.mark.parametrize(
    "metadata",
    ["5", "[1]", '{"format": 1, "config": [], "source": [], "target": []}',
     '{"format": 1, "config": {"model": {"later": 1}}, "source": [], "target": []}'],
)  # fmt: skip
def test_a_description_that_is_none(tmp_path: Path, metadata: str) -> None:
    """The last is one of a later version: the message names the file too."""
    (tmp_path / "x").write_bytes(save({"a": torch.ones(1)}, {"onepass": metadata}))
    with pytest.raises(DataError) as error:
        System.load(tmp_path / "x")
    assert str(tmp_path / "x") in str(error.value)
