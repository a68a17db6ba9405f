"""What a search does besides its results: which sources it still steps, modes that it leaves alone, dropout, and errors."""

import math
from typing import Any

import pytest
import torch
from seq2seq_cases import V, each_decoder, make_model, make_sources
from seq2seq_searches import Options
from torch import Tensor

from onepass.seq2seq import Hypothesis, beam_search, greedy_search

pytestmark = pytest.mark.usefixtures("backend", "one_thread")


def count_rows(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The list to which every step from now on adds how many sources and hypotheses it gets."""
    rows: list[tuple[int, int]] = []
    step = model.decoder.step

    def counted(symbols: Tensor, state: Any) -> Any:
        assert symbols.shape[0] == state.lengths.shape[0] == state.carried[0].shape[0]
        rows.append((symbols.shape[0], symbols.shape[1]))
        return step(symbols, state)

    monkeypatch.setattr(model.decoder, "step", counted)
    return rows


@each_decoder
def test_limits_end_work(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source at its own maximum of symbols is not stepped on beside longer ones."""
    model = make_model(kind, end=-60.0)
    source, lengths = make_sources((4, 1, 6))
    rows = count_rows(model, monkeypatch)
    expected = [3] * 10 + [2] * 6 + [1] * 4
    greedy_search(model, source, lengths)
    assert rows == [(count, 1) for count in expected]
    rows.clear()
    beam_search(model, source, lengths, beams=3)
    assert [count for count, _ in rows] == expected
    assert {beams for _, beams in rows[1:]} == {3}


@each_decoder
def test_end_symbols_end_work(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy search steps a source once for every symbol that it reads out, the end symbol among them."""
    model = make_model(kind, peak=2.0, end=3.0)
    source, lengths = make_sources((5, 1, 8, 3, 8, 2), seed=5)
    rows = count_rows(model, monkeypatch)
    steps = [len(one.symbols) + one.ended for one in greedy_search(model, source, lengths)]
    assert [count for count, _ in rows] == [sum(taken > t for taken in steps) for t in range(max(steps))]


@each_decoder
@pytest.mark.parametrize("n_best", [1, 3])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_sources_leave_as_if_alone(kind: str, n_best: int, length_penalty: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source takes the same number of steps beside others as alone, so that its neighbours' hypotheses never keep it."""
    model = make_model(kind, peak=2.0, end=2.0)
    source, lengths = make_sources((5, 1, 8, 3, 8, 2), seed=5)
    rows, options, alone = count_rows(model, monkeypatch), Options(3, n_best, 12, length_penalty), []
    for row, length in zip(source, lengths, strict=True):
        rows.clear()
        options.search(model, row[None, :length], length[None])
        alone.append(len(rows))
    rows.clear()
    options.search(model, source, lengths)
    assert [count for count, _ in rows] == [sum(taken > t for taken in alone) for t in range(max(alone))]
    assert all(beams <= 3 for _, beams in rows)


@each_decoder
@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_no_step_that_cannot_matter(kind: str, length_penalty: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the end symbol takes nearly all probability at once, no longer hypothesis can be the best, and one step is enough."""
    model = make_model(kind, end=60.0)
    source, lengths = make_sources((4, 1, 6))
    rows = count_rows(model, monkeypatch)
    found = Options(4, 1, 20, length_penalty).search(model, source, lengths)
    assert [hypotheses[0].symbols for hypotheses in found] == [()] * 3
    assert rows == [(3, 1)]


@each_decoder
def test_alignment_only_if_asked_for(kind: str) -> None:
    """``need_weights`` changes nothing but the alignments, which a decoder without attention never has."""
    model = make_model(kind, peak=2.0)
    source, lengths = make_sources((5, 1, 8))
    without, beside = (Options(3, 3, 6).search(model, source, lengths, need_weights=need) for need in (False, True))
    for hypotheses, others in zip(without, beside, strict=True):
        for one, other in zip(hypotheses, others, strict=True):
            assert one.alignment is None
            assert (other.alignment is None) == ("plain" in kind)
            assert (one.symbols, one.ended) == (other.symbols, other.ended)
            assert math.isclose(one.score, other.score, rel_tol=1e-12)
            assert math.isclose(one.log_probability, other.log_probability, rel_tol=1e-12)


@each_decoder
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_modes(kind: str, mode: Any) -> None:
    """A search records no gradients, works in any grad mode, and leaves that and the model's mode as they were."""
    model = make_model(kind, peak=2.0)
    source, lengths = make_sources((5, 1, 8))
    with mode():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        found = Options(3, 2, 6).search(model, source, lengths, need_weights=True)
        found.append([*greedy_search(model, source, lengths, need_weights=True)])
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
    assert not model.training
    assert all(isinstance(one, Hypothesis) for hypotheses in found for one in hypotheses)
    assert not any(one.alignment is not None and one.alignment.requires_grad for hypotheses in found for one in hypotheses)


@pytest.mark.parametrize("kind", ["plain", "bahdanau", "concat"])
def test_dropout(kind: str) -> None:
    """In training mode dropout is drawn, by the seed, and the model stays in training mode."""
    model = make_model(kind, dropout=0.4).train()
    source, lengths = make_sources((5, 1, 8))
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append([(one.symbols, one.log_probability) for one in greedy_search(model, source, lengths)])
    assert found[0] == found[1] != found[2]
    assert model.training


@pytest.mark.parametrize("kind", ["plain", "bahdanau", "concat"])
def test_searches_repeat(kind: str) -> None:
    """The same search gives the same bits."""
    model = make_model(kind, peak=2.0)
    source, lengths = make_sources((5, 1, 8))
    first, again = (Options(3, 3, 8, 0.5).search(model, source, lengths) for _ in range(2))
    assert first == again


@pytest.mark.parametrize("kind", ["plain", "bahdanau", "dot"])
def test_float32(kind: str) -> None:
    """A float32 model gives float64's hypotheses where they are far apart, their log probabilities to float32's accuracy."""
    wide = make_model(kind, peak=2.0, end=1.0)
    source, lengths = make_sources((5, 1, 8))
    expected = Options(3, 1, 8).search(wide, source, lengths)
    for (one,), (want,) in zip(Options(3, 1, 8).search(wide.float(), source, lengths), expected, strict=True):
        assert one.symbols == want.symbols
        assert math.isclose(one.log_probability, want.log_probability, rel_tol=1e-4)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"beams": 0}, "beams"),
        ({"beams": -1}, "beams"),
        ({"n_best": 0}, "n_best"),
        ({"beams": 2, "n_best": 3}, "n_best"),
        ({"max_length": 0}, "max_length"),
        ({"max_length": -3}, "max_length"),
        ({"length_penalty": -0.1}, "length_penalty"),
        ({"length_penalty": math.nan}, "length_penalty"),
        ({"coverage_penalty": -1.0}, "coverage_penalty"),
        ({"coverage_penalty": math.nan}, "coverage_penalty"),
    ],
    ids=str,
)
def test_arguments_out_of_range(options: dict[str, Any], named: str) -> None:
    """Named, before anything is searched."""
    source, lengths = make_sources((5, 1, 8))
    with pytest.raises(ValueError, match=named):
        beam_search(make_model("dot"), source, lengths, **options)


def test_max_length_of_greedy() -> None:
    source, lengths = make_sources((5, 1, 8))
    with pytest.raises(ValueError, match="max_length"):
        greedy_search(make_model("dot"), source, lengths, max_length=0)


def test_coverage_without_attention() -> None:
    """A decoder that gives no weights cannot be held to cover the source; without the penalty it is searched."""
    source, lengths = make_sources((5, 1, 8))
    with pytest.raises(ValueError, match="coverage"):
        beam_search(make_model("plain"), source, lengths, coverage_penalty=0.1)
    assert len(beam_search(make_model("plain"), source, lengths, coverage_penalty=0.0)) == 3


@pytest.mark.parametrize("search", [greedy_search, beam_search])
@pytest.mark.parametrize(
    ("source", "lengths"), [((2, 4), (0, 4)), ((2, 4), (5, 4)), ((2, 4), (-1, 4)), ((2, 4), (3,)), ((4,), (3,))], ids=str
)
def test_sources_out_of_range(search: Any, source: tuple[int, ...], lengths: tuple[int, ...]) -> None:
    """The encoder's errors come out of the searches, ahead of limits made of wrong lengths."""
    with pytest.raises(ValueError, match=r"lengths|source"):
        search(make_model("dot"), torch.full(source, V - 1), torch.tensor(lengths))
