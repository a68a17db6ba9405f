"""Greedy and beam search over any :class:`onepass.seq2seq.Decoder`: hypotheses of a source are queries over its one attention memory."""

import math
import numbers
from dataclasses import dataclass

import torch
from torch import Tensor

from onepass.seq2seq.data import BOS, EOS, PAD
from onepass.seq2seq.decoder import DecoderState
from onepass.seq2seq.model import Seq2Seq


@dataclass(frozen=True)
class Hypothesis:
    """One decoded sequence.

    Attributes: ``symbols``, without the end symbol; ``ended``: whether the end symbol came before the maximum length; ``log_probability``:
    nats, of the end symbol too; ``score``: that with the penalties; ``alignment``: weights ``[T, S]`` of every symbol read out, the end
    symbol's last, or None if not asked for.
    """

    symbols: tuple[int, ...]
    ended: bool
    log_probability: float
    score: float
    alignment: Tensor | None


@torch.inference_mode()
def greedy_search(
    model: Seq2Seq, source: Tensor, lengths: Tensor, *, max_length: int | None = None, need_weights: bool = False
) -> list[Hypothesis]:
    """The most probable symbol at every step. Arguments, errors and order as in :func:`beam_search`; the same as its ``beams=1``."""
    if not len(lengths):
        return []
    state, limits = _begin(model, source, lengths, max_length)
    rows = torch.arange(len(lengths), device=source.device)  # sources that are still being decoded
    last = torch.full_like(rows, BOS).unsqueeze(1)
    symbols: list[list[int]] = [[] for _ in rows]
    alignments: list[list[Tensor]] = [[] for _ in rows]
    totals = torch.zeros(len(rows), device=source.device, dtype=torch.float64)
    ended = torch.zeros_like(rows, dtype=torch.bool)
    while len(rows):
        logits, state, weights = model.decoder.step(last, state)
        best, last = _gains(logits).max(-1)
        totals[rows] += best.squeeze(1)
        for i, row in enumerate(rows.tolist()):
            symbols[row].append(int(last[i, 0]))
            if need_weights and weights is not None:
                alignments[row].append(weights[i, 0, : int(lengths[row])])
        ends = last.squeeze(1) == EOS
        ended[rows[ends]] = True
        going = (~ends & (limits[rows] > state.position)).nonzero().squeeze(1)
        if len(going) < len(rows):
            rows, last, state = rows[going], last[going], state.select(going)
    return [
        Hypothesis(
            tuple(symbol for symbol in symbols[row] if symbol != EOS),
            bool(ended[row]),
            float(totals[row]),
            float(totals[row]),
            torch.stack(alignments[row]) if alignments[row] else None,
        )
        for row in range(len(symbols))
    ]


@torch.inference_mode()
def beam_search(
    model: Seq2Seq,
    source: Tensor,
    lengths: Tensor,
    *,
    beams: int = 4,
    n_best: int = 1,
    max_length: int | None = None,
    length_penalty: float = 0.0,
    coverage_penalty: float = 0.0,
    need_weights: bool = False,
) -> list[list[Hypothesis]]:
    """The ``n_best`` hypotheses of each source by score, best first.

    ``score = log P / ((5 + n) / 6)^length_penalty + coverage_penalty * sum_s log(min(1, sum_t weights[t, s]))``, with ``n`` symbols, the
    end symbol among them (Wu et al. 2016, arXiv:1609.08144, equation 14); a position that was never attended to, as local attention may
    leave it, makes the coverage minus infinity. At every step, what ends among the ``beams`` most probable continuations of a source
    is set aside with its score, and the ``beams`` most probable ones that have not ended go on. A source is done, and leaves the work,
    when ``beams`` hypotheses have ended, when none that goes on could still come among the ``n_best``, or at the maximum length, where
    those that go on count as they are.

    Args:
        model: in evaluation mode, unless dropout is wanted. source: ``[B, S]``, int64. lengths: ``[B]``, at least 1.
        beams, n_best: ``1 <= n_best <= beams``. Fewer hypotheses come back where the vocabulary gives no more, none where the model's
            probabilities are NaN.
        max_length: symbols at most, the end symbol among them; None: ``2 n + 8`` for a source of ``n``.
        length_penalty, coverage_penalty: at least 0; the latter needs a decoder with attention.
        need_weights: also give the alignments.

    Raises:
        TypeError: numbers of beams, hypotheses or symbols that are no integers. ValueError: an argument out of range.
    """
    if not (isinstance(beams, numbers.Integral) and isinstance(n_best, numbers.Integral)):
        raise TypeError(f"beams and n_best must be integers; got {beams!r} and {n_best!r}")
    if not 1 <= n_best <= beams:
        raise ValueError(f"beams and n_best must be 1 <= n_best <= beams; got n_best={n_best}, beams={beams}")
    if not (0.0 <= length_penalty < math.inf and 0.0 <= coverage_penalty < math.inf):  # NaN is neither
        got = f"length_penalty={length_penalty}, coverage_penalty={coverage_penalty}"
        raise ValueError(f"penalties must be at least 0, and finite; got {got}")
    if not len(lengths):
        return []
    state, limits = _begin(model, source, lengths, max_length)
    if coverage_penalty > 0.0 and state.memory is None:
        raise ValueError(f"coverage_penalty needs attention, which {type(model.decoder).__name__} has not")

    found: list[list[Hypothesis]] = [[] for _ in range(len(lengths))]
    rows = torch.arange(len(lengths), device=source.device)  # sources that are still being decoded
    positions = torch.arange(source.shape[1], device=source.device)
    log_p = torch.zeros(len(rows), 1, device=source.device, dtype=torch.float64)  # [N, K], of the hypotheses that go on
    last = torch.full_like(rows, BOS).unsqueeze(1)  # [N, K]
    history = last.new_empty(len(rows), 1, 0)  # [N, K, T]
    dtype = torch.float32 if state.memory is None else state.memory.values.dtype
    alignment = torch.empty(len(rows), 1, 0, source.shape[1], dtype=dtype, device=source.device)  # [N, K, T, S]
    coverage = alignment.new_zeros(len(rows), 1, source.shape[1], dtype=torch.promote_types(dtype, torch.float32))  # [N, K, S]
    while len(rows):
        logits, state, weights = model.decoder.step(last, state)
        n = state.position
        candidates = (log_p.unsqueeze(-1) + _gains(logits)).flatten(1)
        best, choice = candidates.topk(min(2 * beams, candidates.shape[1]))
        parent, symbol = choice // logits.shape[-1], choice % logits.shape[-1]
        if weights is not None:
            coverage = coverage + weights
            if need_weights:
                alignment = torch.cat((alignment, weights.unsqueeze(-2)), -2)

        possible, ends = best.isfinite(), symbol == EOS
        penalised = best / _length_factor(rows.new_full((), n), length_penalty)
        if coverage_penalty > 0.0:
            covered = coverage.clamp(max=1.0).log().masked_fill(positions >= lengths[rows, None, None], 0.0).sum(-1)
            penalised = penalised + coverage_penalty * covered.gather(1, parent)
        at_limit = limits[rows] <= n
        goes_on = possible & ~ends
        among_first = torch.arange(best.shape[1], device=best.device) < beams
        closes = possible & ((ends & among_first) | (goes_on & (goes_on.cumsum(1) <= beams) & at_limit.unsqueeze(1)))
        for i, k in closes.nonzero().tolist():
            row, p = int(rows[i]), int(parent[i, k])
            symbols = history[i, p].tolist() + ([] if ends[i, k] else [int(symbol[i, k])])
            seen = alignment[i, p, :, : int(lengths[row])].clone() if need_weights and weights is not None else None
            found[row].append(Hypothesis(tuple(symbols), bool(ends[i, k]), float(best[i, k]), float(penalised[i, k]), seen))

        # Of a source that goes on, the first `beams` continuations that have not ended.
        width = max(1, min(beams, int(goes_on.sum(1).max())))
        kept = (~goes_on).to(torch.int8).argsort(dim=1, stable=True)[:, :width]
        log_p = best.where(goes_on, -torch.inf).gather(1, kept)
        parent, last = parent.gather(1, kept), symbol.gather(1, kept)
        bound = log_p[:, 0] / _length_factor(limits[rows], length_penalty)  # no continuation scores more
        done = at_limit | ~log_p[:, 0].isfinite() | _settled(found, rows, bound, beams, n_best)
        state = state.follow(parent)
        history = torch.cat((_follow(history, parent), last.unsqueeze(-1)), -1)
        coverage = _follow(coverage, parent)
        alignment = _follow(alignment.flatten(2), parent).view(*parent.shape, *alignment.shape[2:]) if need_weights else alignment
        if done.any():
            going = (~done).nonzero().squeeze(1)
            rows, log_p, last, history = rows[going], log_p[going], last[going], history[going]
            coverage, alignment, state = coverage[going], alignment[going], state.select(going)
    return [sorted(hypotheses, key=lambda one: -one.score)[:n_best] for hypotheses in found]


def _begin(model: Seq2Seq, source: Tensor, lengths: Tensor, max_length: int | None) -> tuple[DecoderState, Tensor]:
    """The first state, and the most symbols of each source."""
    if max_length is not None and not isinstance(max_length, numbers.Integral):
        raise TypeError(f"max_length must be an integer or None; got {type(max_length).__name__}")
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length must be at least 1; got {max_length}")
    limits = 2 * lengths + 8 if max_length is None else torch.full_like(lengths, max_length)
    return model.decoder.start(model.encoder(source, lengths)), limits


def _gains(logits: Tensor) -> Tensor:
    """Log probabilities, with -inf for symbols that are never produced. In float64: sums of many must keep their order."""
    gains = logits.double().log_softmax(-1)
    gains[..., PAD] = gains[..., BOS] = -torch.inf
    return gains


def _length_factor(symbols: Tensor, length_penalty: float) -> Tensor:
    """What equation 14 divides by, in float64, where a large penalty makes it infinite."""
    return ((5 + symbols.double()) / 6) ** length_penalty


def _settled(found: list[list[Hypothesis]], rows: Tensor, bound: Tensor, beams: int, n_best: int) -> Tensor:
    """Which sources need no further step, whatever their hypotheses that go on might score."""
    settled = []
    for row, most in zip(rows.tolist(), bound.tolist(), strict=True):
        scores = sorted((one.score for one in found[row]), reverse=True)
        settled.append(len(scores) >= beams or (len(scores) >= n_best and scores[n_best - 1] >= most))
    return torch.tensor(settled, device=rows.device)


def _follow(parts: Tensor, parents: Tensor) -> Tensor:
    """From ``[N, K, W]`` the rows ``[N, K']`` of the hypotheses that were continued."""
    return parts.gather(1, parents.unsqueeze(-1).expand(-1, -1, parts.shape[-1]))
