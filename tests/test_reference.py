"""The reference itself, against the papers' formulae written out in scalars."""

import itertools
import math
from typing import Any

import pytest
import torch
from cases import FAMILIES, MASKS, Case, Dims, build, call, outputs_of, results
from torch import Tensor

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


def alone(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients of a case whose queries are called one by one, each over what it sees and nothing else."""
    leaves = [tensor.detach().requires_grad_() for tensor in case.inputs().values()]
    query, keys, *others = leaves
    values = keys if case.family == "scores" else others[0]
    lead, visible = query.shape[:-1], case.visible()
    outputs = query.new_zeros(*lead, keys.shape[-2]), query.new_zeros(*lead, values.shape[-1])
    for place in itertools.product(*map(range, lead)):
        source, seen = place[:-1], visible[place].nonzero().squeeze(-1)
        if case.family == "multiplicative":
            scores = case.scale * keys[source][seen] @ query[place]
        else:
            scores = torch.tanh(query[place] + keys[source][seen]) @ others[-1][source[1:]]
        weights = scores if case.family == "scores" else scores.softmax(-1)
        outputs[0][place][seen] = weights
        outputs[1][place] = weights @ values[source][seen]
    found = [outputs[0].masked_fill(~visible, -torch.inf)] if case.family == "scores" else [outputs[1], outputs[0]]
    arriving = [case.grad_weights] if case.family == "scores" else [case.grad_context, case.grad_weights]
    return found, list(torch.autograd.grad(found, leaves, arriving))


@pytest.mark.parametrize("names", [("values",), ("keys",), ("query",), ("values", "keys", "query")], ids="+".join)
@pytest.mark.parametrize("hidden", ["lengths per query", "holes", "spans", "all three"])
@pytest.mark.parametrize("heads", [0, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_from_some_queries(family: str, heads: int, hidden: str, names: tuple[str, ...]) -> None:
    """NaN and infinities reach the results and gradients of those that see them, and nothing of the others."""
    case = build(family, Dims(3, 4, 7, 6, 2, heads), torch.float64, hidden=hidden)
    for name in names:
        tensor = getattr(case, name).clone()
        tensor[..., 1, 0], tensor[..., 2, 1], tensor[..., 1, 1] = torch.nan, torch.inf, -torch.inf
        case = case.replace(**{name: tensor})
    outputs, gradients = alone(case)
    found = results(case, "reference")
    for name, expected in zip([*outputs_of(case), *(f"d_{name}" for name in case.inputs())], [*outputs, *gradients], strict=True):
        torch.testing.assert_close(found[name], expected, rtol=1e-12, atol=1e-14, equal_nan=True)


def direct(case: Case, function: Any = onepass.reference) -> tuple[Any, ...]:
    """The function of a case in a module, which needs no backend."""
    options: dict[str, Any] = {"lengths": case.lengths, "mask": case.mask, "spans": case.spans}
    if case.family == "scores":
        return (function.additive_scores(*case.inputs().values(), **options),)
    options |= {"scale": case.scale} if case.family == "multiplicative" else {}
    return getattr(function, f"{case.family}_attention")(*case.inputs().values(), need_weights=True, **options)


@pytest.mark.parametrize("one_step", [False, True])
@pytest.mark.parametrize("heads", [0, 2])
@pytest.mark.parametrize("hidden", ["none", "int32 lengths", "lengths per query", "padding", "holes", "both", "all three"])
@pytest.mark.parametrize("family", FAMILIES)
def test_takes_what_its_namesake_takes(family: str, hidden: str, heads: int, one_step: bool) -> None:
    """Called by itself, with as many heads as batch entries: masks for all heads, and one step without T."""
    case = build(family, Dims(2, 1 if one_step else 3, 5, 4, 6, heads), torch.float64, hidden=hidden)
    if one_step:
        case = case.replace(query=case.query[..., 0, :], spans=None if case.spans is None else case.spans[:, 0])
        if case.mask is not None and case.mask.dim() == 3:
            case = case.replace(mask=case.mask[:, 0])
    for got, expected in zip(direct(case), call(case, "auto"), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_refuses_what_its_namesake_refuses(family: str) -> None:
    """Called by itself, it checks as the library's function does."""
    case = build(family, Dims(2, 3, 5, 4, 6))
    with pytest.raises(ValueError, match="query and keys must agree in attention width"):
        direct(case.replace(query=case.query[..., :3]))
    with pytest.raises(TypeError, match="mask must be a boolean tensor"):
        direct(case.replace(mask=[[True]]))


def test_is_public() -> None:
    """The reference's functions carry the names of the library's."""
    for name in ("additive_attention", "additive_scores", "multiplicative_attention"):
        assert callable(getattr(onepass.reference, name))
        assert name in onepass.__all__
