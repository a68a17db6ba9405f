"""Examples, vocabularies, pairs and their epochs: every promise and every error."""

import itertools
import pickle
import tracemalloc

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from onepass.seq2seq.data import (
    BOS,
    EOS,
    PAD,
    Batch,
    DataError,
    Example,
    Pairs,
    Symbols,
    Vocabulary,
    pad,
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
