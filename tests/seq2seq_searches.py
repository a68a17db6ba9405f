"""Searches written out: every sequence there is, the beam of the documentation without batches, scores by teacher forcing."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from onepass.seq2seq import Hypothesis, beam_search
from onepass.seq2seq.data import BOS, EOS, PAD

Sequences = list[tuple[int, ...]]
PENALTIES: dict[str, dict[str, float]] = {
    "none": {},
    "length": {"length_penalty": 0.8},
    "coverage": {"coverage_penalty": 0.4},
    "both": {"length_penalty": 1.5, "coverage_penalty": 1.0},
}
SEARCHED = ("plain", "bahdanau, maxout", "dot", "general, 2 LSTM layers", "concat, no feeding", "local-m, concat", "local-p, dot")


def allowed(kind: str, penalty: str) -> bool:
    """Coverage needs attention, and under local attention would be log 0 wherever no window reaches."""
    return not ("coverage_penalty" in PENALTIES[penalty] and ("plain" in kind or "local" in kind))


SEARCHES = [pair for pair in itertools.product(SEARCHED, PENALTIES) if allowed(*pair)]


@dataclasses.dataclass(frozen=True)
class Options:
    """Arguments of a search."""

    beams: int = 4
    n_best: int = 1
    max_length: int = 6
    length_penalty: float = 0.0
    coverage_penalty: float = 0.0

    def search(self, model: Any, source: Tensor, lengths: Tensor, **others: Any) -> list[list[Hypothesis]]:
        return beam_search(model, source, lengths, **dataclasses.asdict(self), **others)


def continuations(num_symbols: int, max_length: int) -> Sequences:
    """Every sequence that a search may read out: ending in EOS after at most ``max_length`` symbols, or as long as that without one."""
    going: Sequences = [()]
    found: Sequences = []
    for _ in range(max_length):
        found += [(*sequence, EOS) for sequence in going]
        going = [(*sequence, symbol) for sequence in going for symbol in range(num_symbols) if symbol not in (PAD, BOS, EOS)]
    return found + going


def forced(model: Any, source: Tensor, sequences: Sequences) -> list[tuple[float, Any]]:
    """Log probability and weights ``[T, S]`` of each sequence, its end symbol included, by teacher forcing; source ``[S]`` is unpadded."""
    found: dict[tuple[int, ...], tuple[float, Any]] = {}
    for size in {len(sequence) for sequence in sequences}:
        group = [sequence for sequence in sequences if len(sequence) == size]
        target = torch.tensor(group)
        logits, weights = _read(model, source, [sequence[:-1] for sequence in group])
        totals = torch.log_softmax(logits, -1).gather(-1, target[..., None]).sum((1, 2)).tolist()
        for number, sequence in enumerate(group):
            found[sequence] = totals[number], None if weights is None else weights[number]
    return [found[sequence] for sequence in sequences]


def _read(model: Any, source: Tensor, prefixes: Sequences) -> tuple[Tensor, Any]:
    """Logits and weights of prefixes of one length."""
    count, symbols = len(prefixes), torch.tensor([(BOS, *prefix) for prefix in prefixes])
    with torch.no_grad():
        logits, weights = model(source.expand(count, -1), torch.full((count,), len(source)), symbols)
    return logits, weights


def penalised(log_probability: float, weights: Any, size: int, options: Options) -> float:
    """Wu et al. 2016, equation 14, over the positions that the weights have."""
    score = log_probability / ((5 + size) / 6) ** options.length_penalty
    if options.coverage_penalty:
        score += options.coverage_penalty * float(weights.sum(0).clamp(max=1.0).log().sum())
    return score


def ranked(model: Any, source: Tensor, sequences: Sequences, options: Options) -> list[Hypothesis]:
    """The ``n_best`` of the sequences."""
    found = []
    for sequence, (log_probability, weights) in zip(sequences, forced(model, source, sequences), strict=True):
        ended = sequence[-1] == EOS
        score = penalised(log_probability, weights, len(sequence), options)
        found.append(Hypothesis(sequence[:-1] if ended else sequence, ended, log_probability, score, weights))
    return sorted(found, key=lambda one: -one.score)[: options.n_best]


def beam_of_one_source(model: Any, source: Tensor, options: Options) -> tuple[list[Hypothesis], int]:
    """The search of the documentation, for one source, and how many steps it took; it stops early only where no penalty counts."""
    live: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    ended: list[tuple[float, tuple[int, ...]]] = []
    for size in range(1, options.max_length + 1):
        logs = torch.log_softmax(_read(model, source, [sequence for _, sequence in live])[0][:, -1], -1).tolist()
        nexts = [
            (total + row[symbol], (*sequence, symbol))
            for (total, sequence), row in zip(live, logs, strict=True)
            for symbol in range(len(row))
            if symbol not in (PAD, BOS)
        ]
        kept = sorted(nexts, reverse=True)[: options.beams]
        ended += [one for one in kept if one[1][-1] == EOS]
        live = [one for one in sorted(nexts, reverse=True) if one[1][-1] != EOS][: options.beams]
        if size == options.max_length or not live:
            break
        best = sorted((total for total, _ in ended), reverse=True)[: options.n_best]
        plain = not options.length_penalty and not options.coverage_penalty
        if len(ended) >= options.beams or (plain and len(best) == options.n_best and best[-1] >= live[0][0]):
            live = []
            break
    return ranked(model, source, [sequence for _, sequence in ended + live], options), size


def assert_same(found: list[Hypothesis], expected: list[Hypothesis]) -> None:
    """The same hypotheses in the same order, up to the rounding of float64; alignments where both have them."""
    assert [(one.symbols, one.ended) for one in found] == [(one.symbols, one.ended) for one in expected]
    for got, want in zip(found, expected, strict=True):
        assert math.isclose(got.log_probability, want.log_probability, rel_tol=1e-9, abs_tol=1e-9)
        assert math.isclose(got.score, want.score, rel_tol=1e-9, abs_tol=1e-9)
        if got.alignment is not None and want.alignment is not None:
            assert_aligned(got.alignment, want.alignment)


def assert_aligned(found: Tensor, expected: Tensor) -> None:
    """The same weights of every symbol, rounded to float32 where the search keeps them so, and zeros beyond the narrower of the two."""
    width = min(found.shape[1], expected.shape[1])
    rounding = torch.finfo(torch.float32).eps if torch.float32 in (found.dtype, expected.dtype) else 1e-9
    torch.testing.assert_close(found[:, :width].double(), expected[:, :width].double(), rtol=rounding, atol=1e-11)
    assert not found[:, width:].any()
    assert not expected[:, width:].any()


def unpadded(source: Tensor, lengths: Tensor) -> Sequence[Tensor]:
    return [row[:length] for row, length in zip(source, lengths.tolist(), strict=True)]
