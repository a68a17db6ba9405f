"""The reference itself, against the papers' formulae written out in scalars."""

import math
from typing import Any

import pytest
import torch
from cases import FAMILIES, MASKS, Case, Dims, build, call

import onepass


def by_hand(case: Case) -> tuple[list[Any], list[Any], list[Any]]:
    """Scores, weights and contexts of a case without heads, in plain Python."""
    visible = case.visible().tolist()
    query, keys, values, v = (tensor.tolist() for tensor in (case.query, case.keys, case.values, case.v))
    scores: list[Any] = []
    weights: list[Any] = []
    contexts: list[Any] = []
    for b, memory in enumerate(keys):
        scores.append([])
        weights.append([])
        contexts.append([])
        for t, q in enumerate(query[b]):
            if case.family == "multiplicative":
                row = [case.scale * sum(x * y for x, y in zip(q, k, strict=True)) for k in memory]
            else:
                row = [sum(u * math.tanh(x + y) for u, x, y in zip(v, q, k, strict=True)) for k in memory]
            row = [score if seen else -math.inf for score, seen in zip(row, visible[b][t], strict=True)]
            total = sum(math.exp(score) for score in row)
            chances = [math.exp(score) / total if total else 0.0 for score in row]
            scores[b].append(row)
            weights[b].append(chances)
            contexts[b].append([sum(w * row[d] for w, row in zip(chances, values[b], strict=True)) for d in range(len(values[b][0]))])
    return scores, weights, contexts


@pytest.mark.parametrize("hidden", MASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_is_the_formula(family: str, hidden: str) -> None:
    """Scores, weights and contexts are those of the papers, and zeros where a query sees nothing."""
    case = build(family, Dims(3, 4, 5, 6, 2), torch.float64, hidden=hidden)
    scores, weights, contexts = (torch.tensor(rows, dtype=torch.float64) for rows in by_hand(case))
    found = call(case, "reference")
    for got, expected in zip(found, [scores] if family == "scores" else [contexts, weights], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("hidden", ["none", "lengths", "lengths per query", "holes", "padding"])
@pytest.mark.parametrize("family", FAMILIES)
def test_heads_are_calls_side_by_side(family: str, hidden: str) -> None:
    """A head's result is that of a call with the head's tensors alone."""
    case = build(family, Dims(3, 4, 5, 6, 2, heads=2), torch.float64, hidden=hidden)
    found = call(case, "reference")
    for head in range(2):
        parts = {name: getattr(case, name)[:, head] for name in ("query", "keys", "values")}
        mask = case.mask[:, head] if case.mask is not None and case.mask.dim() == 4 else case.mask
        alone = call(case.replace(**parts, v=case.v[head], mask=mask), "reference")
        for got, expected in zip(found, alone, strict=True):
            torch.testing.assert_close(got[:, head], expected, rtol=1e-12, atol=1e-14)


def test_is_public() -> None:
    """The reference's functions carry the names of the library's."""
    for name in ("additive_attention", "additive_scores", "multiplicative_attention"):
        assert callable(getattr(onepass.reference, name))
        assert name in onepass.__all__
