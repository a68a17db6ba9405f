"""Error rates: the distance against its definition, the nearest of several references, bins by length."""

from functools import cache

import hypothesis
import pytest
from hypothesis import strategies as st

from onepass.seq2seq.data import Example, Symbols
from onepass.seq2seq.scoring import ErrorRates, edit_distance, error_by_length, error_rates

sequences = st.lists(st.sampled_from("abc"), max_size=7).map(tuple)
examples = st.builds(
    Example,
    st.lists(st.sampled_from("xy"), min_size=1, max_size=9).map(tuple),
    st.lists(sequences, min_size=1, max_size=3).map(tuple),
)
scored = st.lists(st.tuples(examples, sequences), max_size=8)


@cache
def by_definition(one: Symbols, other: Symbols) -> int:
    """Every way to edit the ends away."""
    if not one or not other:
        return len(one) + len(other)
    replaced = by_definition(one[:-1], other[:-1]) + (one[-1] != other[-1])
    return min(replaced, by_definition(one[:-1], other) + 1, by_definition(one, other[:-1]) + 1)


def example(source: str, *references: str) -> Example:
    return Example(tuple(source), tuple(map(tuple, references)))


@hypothesis.given(sequences, sequences)
def test_edit_distance(one: Symbols, other: Symbols) -> None:
    assert edit_distance(one, other) == by_definition(one, other) == edit_distance(other, one)


@pytest.mark.parametrize(("one", "other", "distance"), [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "abc", 0), ("ab", "ba", 2)])
def test_known_distances(one: str, other: str, distance: int) -> None:
    assert edit_distance(tuple(one), tuple(other)) == distance


def test_symbols_are_compared_whole() -> None:
    assert edit_distance(("AH", "B"), ("A", "HB")) == 2


def test_rates() -> None:
    """Two sequences, five symbols: one right, one with a substitution."""
    rates = error_rates([example("a", "xy"), example("b", "xyz")], [("x", "y"), ("x", "q", "z")])
    assert rates == ErrorRates(symbols=5, symbol_errors=1, sequences=2, sequence_errors=1)
    assert (rates.symbol_error_rate, rates.sequence_error_rate) == (0.2, 0.5)


def test_any_reference_is_right() -> None:
    rates = error_rates([example("a", "xxxx", "y"), example("a", "xxxx", "y")], [("y",), ("x", "x", "x", "x")])
    assert rates == ErrorRates(5, 0, 2, 0)


@pytest.mark.parametrize("references", [("xyz", "x"), ("x", "xyz")])
def test_of_equally_near_references_the_shortest_counts(references: tuple[str, ...]) -> None:
    """Whatever their order in the data."""
    assert error_rates([example("a", *references)], [("x", "y")]) == ErrorRates(1, 1, 1, 1)


def test_a_prediction_may_be_worse_than_nothing() -> None:
    assert error_rates([example("a", "x")], [("y",) * 3]).symbol_error_rate == 3.0


def test_nothing_to_score() -> None:
    rates = error_rates([], [])
    assert (rates.symbol_error_rate, rates.sequence_error_rate) == (0.0, 0.0)
    assert error_rates([Example(("a",), ((),))], [()]) == ErrorRates(0, 0, 1, 0)


@hypothesis.given(scored)
def test_rates_are_sums_over_the_nearest_reference(pairs: list[tuple[Example, Symbols]]) -> None:
    rates = error_rates([one for one, _ in pairs], [said for _, said in pairs])
    nearest = [min(by_definition(said, reference) for reference in one.references) for one, said in pairs]
    assert (rates.symbol_errors, rates.sequences, rates.sequence_errors) == (sum(nearest), len(pairs), sum(map(bool, nearest)))


def test_bins() -> None:
    """An edge is the last length of its bin; a bin that nothing falls into stays."""
    words = [example("x" * length, "y") for length in (1, 2, 3, 4, 9, 10)]
    found = error_by_length(words, [("y",)] * 5 + [("n",)], [2, 3, 8])
    assert [(name, rates.sequences, rates.sequence_errors) for name, rates in found] == [
        ("1-2", 2, 0),
        ("3", 1, 0),
        ("4-8", 1, 0),
        ("9+", 2, 1),
    ]
    assert error_by_length(words[:1], [("y",)], [4])[1] == ("5+", ErrorRates(0, 0, 0, 0))


def test_no_edges_are_one_bin() -> None:
    assert error_by_length([example("xx", "y")], [("n",)], []) == [("1+", ErrorRates(1, 1, 1, 1))]


@hypothesis.given(scored, st.sets(st.integers(1, 10)).map(sorted))
def test_bins_add_up(pairs: list[tuple[Example, Symbols]], edges: list[int]) -> None:
    words, said = [one for one, _ in pairs], [said for _, said in pairs]
    bins = [rates for _, rates in error_by_length(words, said, edges)]
    counts = [(rates.symbols, rates.symbol_errors, rates.sequences, rates.sequence_errors) for rates in bins]
    assert ErrorRates(*map(sum, zip(*counts, strict=True))) == error_rates(words, said)


@pytest.mark.parametrize("edges", [[0], [-1, 3], [3, 3], [5, 2]])
def test_edges_that_do_not_ascend(edges: list[int]) -> None:
    with pytest.raises(ValueError, match=r"edges must ascend, the first at least 1; got \["):
        error_by_length([], [], edges)


def test_a_prediction_per_example() -> None:
    with pytest.raises(ValueError, match="got 1 examples and 2 predictions"):
        error_rates([example("a", "x")], [(), ()])
    with pytest.raises(ValueError, match="got 1 examples and 0 predictions"):
        error_by_length([example("a", "x")], [], [3])
