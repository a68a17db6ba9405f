"""Beam search beside every sequence that a tiny vocabulary has."""

import dataclasses

import pytest
from seq2seq_cases import make_model, make_sources
from seq2seq_searches import PENALTIES, SEARCHES, Options, assert_same, continuations, ranked, unpadded

from onepass.seq2seq.data import EOS

pytestmark = pytest.mark.usefixtures("backend", "one_thread")


@pytest.mark.parametrize(("kind", "penalty"), SEARCHES)
@pytest.mark.parametrize(("num_symbols", "max_length", "peak"), [(4, 5, 1.0), (5, 4, 0.3), (5, 4, 5.0), (6, 3, 1.0), (6, 4, 3.0)])
def test_beams_for_all_find_all(kind: str, penalty: str, num_symbols: int, max_length: int, peak: float) -> None:
    """With a beam for every sequence that there is nothing is lost: the n best are those of all, for every n."""
    model = make_model(kind, seed=num_symbols, num_symbols=num_symbols, peak=peak)
    source, lengths = make_sources((4, 1, 3))
    everything = continuations(num_symbols, max_length)
    whole = Options(len(everything), len(everything), max_length, **PENALTIES[penalty])
    expected = [ranked(model, row, everything, whole) for row in unpadded(source, lengths)]
    for n_best in (len(everything), 3, 1):
        found = dataclasses.replace(whole, n_best=n_best).search(model, source, lengths, need_weights=True)
        for hypotheses, best in zip(found, expected, strict=True):
            assert_same(hypotheses, best[:n_best])


@pytest.mark.parametrize("kind", ["plain", "bahdanau", "dot"])
@pytest.mark.parametrize(("num_symbols", "max_length"), [(3, 1), (3, 4), (4, 1), (4, 3), (5, 1)])
def test_small_vocabularies(kind: str, num_symbols: int, max_length: int) -> None:
    """Fewer hypotheses than asked for come back where there are no more, down to the empty one alone."""
    model = make_model(kind, num_symbols=num_symbols)
    source, lengths = make_sources((3, 1))
    everything, options = continuations(num_symbols, max_length), Options(40, 40, max_length)
    if num_symbols == 3:
        everything = [(EOS,)]
    for hypotheses, row in zip(options.search(model, source, lengths), unpadded(source, lengths), strict=True):
        assert_same(hypotheses, ranked(model, row, everything, options))
