"""What greedy and beam search find: beside the beam written out, rescored by teacher forcing, and for sources one by one."""

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from cases import by_eager
from seq2seq_cases import DECODERS, each_decoder, make_model, make_sources
from seq2seq_searches import (
    PENALTIES,
    SEARCHES,
    Options,
    allowed,
    assert_aligned,
    assert_same,
    beam_of_one_source,
    forced,
    penalised,
    unpadded,
)
from tolerance import as_near

from onepass.seq2seq import beam_search, greedy_search
from onepass.seq2seq.data import BOS, EOS, PAD

pytestmark = pytest.mark.usefixtures("backend", "one_thread")
LENGTHS = (4, 1, 6, 3)


@pytest.mark.parametrize(("kind", "penalty"), SEARCHES)
@pytest.mark.parametrize(
    ("beams", "n_best", "peak", "end"), [(1, 1, 1.0, 0.0), (2, 1, 3.0, 2.0), (3, 3, 0.3, 1.0), (3, 3, 3.0, 2.0), (5, 2, 1.0, 0.0)]
)
def test_beam(kind: str, penalty: str, beams: int, n_best: int, peak: float, end: float) -> None:
    """The search of the documentation, one source at a time: what it keeps, sets aside and gives back."""
    model = make_model(kind, seed=beams, peak=peak, end=end)
    source, lengths = make_sources(LENGTHS)
    options = Options(beams, n_best, 7, **PENALTIES[penalty])
    found = options.search(model, source, lengths, need_weights=True)
    assert len(found) == len(LENGTHS)
    for hypotheses, row in zip(found, unpadded(source, lengths), strict=True):
        assert_same(hypotheses, beam_of_one_source(model, row, options)[0])


@each_decoder
@pytest.mark.parametrize(("max_length", "peak", "end"), [(1, 1.0, 0.0), (2, 4.0, 3.0), (5, 1.0, -50.0), (12, 1.0, 0.0), (12, 4.0, 3.0)])
def test_greedy(kind: str, max_length: int, peak: float, end: float) -> None:
    """Greedy search takes the most probable symbol at every step until the end symbol or the maximum, as a beam of one does."""
    model = make_model(kind, peak=peak, end=end)
    source, lengths = make_sources(LENGTHS)
    found = greedy_search(model, source, lengths, max_length=max_length, need_weights=True)
    one_beam = Options(1, 1, max_length).search(model, source, lengths, need_weights=True)
    for row, hypothesis, (of_beam,) in zip(unpadded(source, lengths), found, one_beam, strict=True):
        assert_same([hypothesis], [of_beam])
        with torch.no_grad():
            logits = model(row[None], torch.tensor([len(row)]), torch.tensor([[BOS, *hypothesis.symbols]]))[0][0]
        logits[:, [PAD, BOS]] = -torch.inf
        most_probable = tuple(logits.argmax(-1).tolist())
        assert hypothesis.symbols == most_probable[: len(hypothesis.symbols)]
        assert hypothesis.ended == (len(hypothesis.symbols) < max_length)
        assert not hypothesis.ended or most_probable[-1] == EOS
        assert end > -50 or len(hypothesis.symbols) == max_length


@pytest.mark.parametrize(("kind", "penalty"), [pair for pair in itertools.product(DECODERS, PENALTIES) if allowed(*pair)])
def test_rescored(kind: str, penalty: str) -> None:
    """Log probability, score and alignment are those of teacher forcing; the best comes first; no hypothesis comes twice."""
    model = make_model(kind, peak=2.0, end=1.0)
    source, lengths = make_sources((5, 1, 8, 3, 8))
    options = Options(6, 4, 9, **PENALTIES[penalty])
    for row, hypotheses in zip(unpadded(source, lengths), options.search(model, source, lengths, need_weights=True), strict=True):
        assert len(hypotheses) == 4
        assert len({(one.symbols, one.ended) for one in hypotheses}) == 4
        scores = [one.score for one in hypotheses]
        assert scores == sorted(scores, reverse=True)
        for one in hypotheses:
            assert not {PAD, BOS, EOS} & set(one.symbols)
            assert one.ended or len(one.symbols) == 9
            whole = (*one.symbols, EOS) if one.ended else one.symbols
            ((log_probability, weights),) = forced(model, row, [whole])
            assert math.isclose(one.log_probability, log_probability, rel_tol=1e-9)
            assert math.isclose(one.score, penalised(log_probability, weights, len(whole), options), rel_tol=1e-9)
            assert (one.alignment is None) == (weights is None)
            if one.alignment is not None:
                assert list(one.alignment.shape) in ([len(whole), 8], [len(whole), len(row)])
                assert_aligned(one.alignment, weights)


@each_decoder
def test_limits_of_sources(kind: str) -> None:
    """Without a maximum a source of n is read out for 2 n + 8 symbols, whatever its neighbours are."""
    source, lengths = make_sources((4, 1, 6))
    model = make_model(kind, end=-60.0)
    for hypotheses in ([[one] for one in greedy_search(model, source, lengths)], Options(3, 3, None).search(model, source, lengths)):  # type: ignore[arg-type]
        for length, of_source in zip(lengths.tolist(), hypotheses, strict=True):
            assert all(len(one.symbols) == 2 * length + 8 and not one.ended for one in of_source)


@pytest.mark.parametrize("penalty", [penalty for penalty in PENALTIES if "coverage_penalty" not in PENALTIES[penalty]])
def test_beams_beyond_the_vocabulary(penalty: str) -> None:
    """More beams than symbols, of which the first step can fill but few."""
    model = make_model("dot", num_symbols=6, peak=2.0)
    source, lengths = make_sources(LENGTHS)
    options = Options(20, 20, 4, **PENALTIES[penalty])
    for hypotheses, row in zip(options.search(model, source, lengths), unpadded(source, lengths), strict=True):
        assert_same(hypotheses, beam_of_one_source(model, row, options)[0])


@each_decoder
def test_autocast(kind: str) -> None:
    """Under autocast the searches know what they find as well as eager would, and find what is about as good as in float32."""
    model = make_model(kind, peak=2.0).float()
    source, lengths = make_sources(LENGTHS)
    options = Options(3, 1, 5, 0.5, 0.2 if allowed(kind, "coverage") else 0.0)

    def search() -> list[list[Any]]:
        found = [[one] for one in greedy_search(model, source, lengths, max_length=5, need_weights=True)]
        return found + options.search(model, source, lengths, need_weights=True)

    best = [one.score for (one,) in search()]
    with torch.autocast("cpu", torch.bfloat16):
        found = [one for (one,) in search()]
    rows = 2 * list(unpadded(source, lengths))

    def read() -> list[Any]:
        """Log probability and weights of what was found, read symbol by symbol."""
        ended = [(*one.symbols, EOS) if one.ended else one.symbols for one in found]
        return [forced(model, row, [symbols])[0] for row, symbols in zip(rows, ended, strict=True)]

    exact = read()
    with torch.autocast("cpu", torch.bfloat16), by_eager():
        eager = read()
    probable = [torch.tensor([log_probability for log_probability, _ in of_all]) for of_all in (eager, exact)]
    as_near([torch.tensor([one.log_probability for one in found])], probable[:1], probable[1:])
    for one, row, theirs, wanted in zip(found, rows, eager, exact, strict=True):
        aligned = None if one.alignment is None else one.alignment[:, : len(row)]
        as_near([aligned], [theirs[1]], [wanted[1]])
    assert all(one.score > score - 0.15 for one, score in zip(found, best, strict=True))  # where beams are cut, small errors may count


@each_decoder
def test_no_sources(kind: str) -> None:
    """An empty batch has no hypotheses."""
    model = make_model(kind)
    source, lengths = make_sources(LENGTHS)
    for nothing in (source[:0], source[:0, :0]):
        assert greedy_search(model, nothing, lengths[:0]) == []
        assert beam_search(model, nothing, lengths[:0], need_weights=True) == []


def test_penalty_beyond_all_bounds() -> None:
    """A length penalty whose power overflows makes the score of all that is longer than a symbol 0."""
    model = make_model("dot", end=-60.0)
    source, lengths = make_sources(LENGTHS)
    for (one,) in Options(3, 1, 5, 1e6).search(model, source, lengths):
        assert one.score == 0.0
        assert len(one.symbols) == 5


@pytest.mark.parametrize("search", [greedy_search, beam_search])
def test_maximum_that_is_no_integer(search: Any) -> None:
    source, lengths = make_sources(LENGTHS)
    for bad in (1.5, "3", torch.tensor(3)):
        with pytest.raises(TypeError, match=f"max_length must be an integer or None; got {type(bad).__name__}"):
            search(make_model("dot"), source, lengths, max_length=bad)


@each_decoder
@pytest.mark.parametrize("beams", [0, 4])
def test_batch_is_one_by_one(kind: str, beams: int) -> None:
    """What a source gives depends neither on its neighbours nor on its padding; 0 beams is greedy search."""
    model = make_model(kind, peak=2.0, end=1.0)
    source, lengths = make_sources((5, 1, 8, 3, 8, 2), source=9)

    def search(rows: Any, counts: Any) -> list[Any]:
        if beams == 0:
            return [[one] for one in greedy_search(model, rows, counts, need_weights=True)]
        return Options(beams, beams, None, 0.5).search(model, rows, counts, need_weights=True)  # type: ignore[arg-type]

    together = search(source, lengths)
    for row, hypotheses in zip(unpadded(source, lengths), together, strict=True):
        (alone,) = search(row[None], torch.tensor([len(row)]))
        assert_same(hypotheses, alone)
    garbage = search(source.masked_fill(torch.arange(9) >= lengths[:, None], 11), lengths)
    for hypotheses, others in zip(together, garbage, strict=True):
        for one, other in zip(hypotheses, others, strict=True):
            assert dataclasses.replace(one, alignment=None) == dataclasses.replace(other, alignment=None)
            assert one.alignment is other.alignment is None or torch.equal(one.alignment, other.alignment)


@pytest.mark.parametrize("kind", ["local-m, concat", "local-p, dot"])
def test_coverage_that_no_window_gives(kind: str) -> None:
    """A position that local attention never sees is covered by log 0: the score is minus infinity, never NaN, and the search goes on."""
    model = make_model(kind, end=-60.0)
    source, lengths = make_sources((30, 2), source=30)
    long, short = Options(3, 2, 6, 0.5, 0.5).search(model, source, lengths, need_weights=True)
    assert [one.score for one in long] == [-math.inf] * 2
    assert not any(math.isnan(one.score) for one in short)
    free, _ = Options(3, 2, 6, 0.5).search(model, source, lengths, need_weights=True)
    assert all(math.isfinite(one.score) for one in free)


@pytest.mark.parametrize("options", [{"beams": 2.5}, {"beams": "3"}, {"beams": 4, "n_best": 1.5}], ids=str)
def test_numbers_that_are_none(options: dict[str, Any]) -> None:
    """Before anything is searched."""
    with pytest.raises(TypeError, match="beams and n_best must be integers"):
        beam_search(make_model("bahdanau"), torch.tensor([[3, 4]]), torch.tensor([2]), **options)


@pytest.mark.parametrize("options", [{"coverage_penalty": math.inf}, {"length_penalty": math.nan}, {"length_penalty": -1.0}], ids=str)
def test_penalties_that_are_none(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="penalties must be at least 0, and finite"):
        beam_search(make_model("bahdanau"), torch.tensor([[3, 4]]), torch.tensor([2]), **options)
