"""Masks of a query over an attention memory: what a pointer has chosen before, or what one step must not see."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Case, Dims, assert_same_bits, call, garbage
from memory_cases import (
    assert_near,
    build_for_memory,
    by_step_or_at_once,
    each_family,
    each_heads,
    gradients,
    layer_states,
    loss_of,
    make_layer,
    masked_over_memory,
    remember,
    with_leaves,
    with_masks,
)
from tolerance import check
from torch import Tensor

import onepass


@by_step_or_at_once
@pytest.mark.parametrize("own", ["none", "both"])
@pytest.mark.parametrize("heads", [0, 2, -2], ids=["no heads", "heads", "per head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@each_family
def test_as_the_function(family: str, dtype: torch.dtype, heads: int, own: str, by_step: bool, backend: str) -> None:
    """Over a memory with lengths and a mask of its own or none; what no query sees is NaN."""
    case = build_for_memory(family, Dims(3, 5, 19, 20, 9, abs(heads)), dtype, hidden=own)
    seen, masks = with_masks(case, per_head=heads < 0)
    leaves = with_leaves(garbage(seen, torch.nan))
    check(masked_over_memory(remember(leaves.replace(mask=case.mask), backend), leaves, masks, by_step), seen)


@each_heads
@each_family
def test_the_reference_has_them(family: str, heads: int, backend: str) -> None:
    case = build_for_memory(family, Dims(3, 5, 19, 20, 9, heads), torch.float64, hidden="both")
    seen, masks = with_masks(case)
    found = []
    for taken in (backend, "reference"):
        leaves = with_leaves(seen)
        found.append(masked_over_memory(remember(leaves.replace(mask=case.mask), taken), leaves, masks, by_step=True))
    assert_near(*found)


class ByMemory:
    def __init__(self, leaves: Case, backend: str) -> None:
        self.memory = remember(leaves, backend)

    def attend(self, query: Tensor, **how: Any) -> tuple[Tensor, Tensor | None]:
        return self.memory.attend(query, True, **how)

    def context(self, weights: Tensor, mask: Tensor) -> Tensor:
        return self.memory.context(weights, mask=mask)


class ByFunction:
    """The same without a memory, of the reference."""

    def __init__(self, leaves: Case, backend: str) -> None:
        self.leaves = leaves

    def attend(self, query: Tensor, mask: Tensor | None = None, spans: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        own = self.leaves.mask
        if mask is not None and mask.dim() == 2:
            mask = mask.unsqueeze(1)
        both = own if mask is None else mask if own is None else mask & own
        return call(self.leaves.replace(query=query, mask=both, spans=spans), "reference")  # type: ignore[return-value]

    def context(self, weights: Tensor, mask: Tensor) -> Tensor:
        return (weights.unsqueeze(-2) @ self.leaves.values).squeeze(-2)  # of weights that are 0 where nothing is seen


@each_heads
@each_family
def test_steps_with_and_without(family: str, heads: int, backend: str) -> None:
    """Steps with a mask, with spans, with both, with neither, several queries at once, and a context of given weights share a backward."""
    case = build_for_memory(family, Dims(3, 4, 9, 7, 6, heads), torch.float64, hidden="both")
    _, masks = with_masks(case)
    step, spans = masks[:, 0], torch.tensor([[1, 7], [0, 9], [3, 4]])
    outcomes = []
    for way in (ByMemory, ByFunction):
        leaves = with_leaves(case)
        over, (first, second, third, fourth) = way(leaves, backend), leaves.query.unbind(-2)
        context, weights = over.attend(first, mask=step)
        assert weights is not None
        outputs = [context, weights, *over.attend(second), *over.attend(third, spans=spans), *over.attend(fourth, spans=spans, mask=step)]
        outputs += [*over.attend(leaves.query, mask=masks), *over.attend(leaves.query), over.context(weights.square(), step)]
        loss_of(*outputs).backward()
        outcomes.append(gradients(leaves))
    assert_near(*outcomes)


@each_heads
@each_family
def test_context_of_given_weights(family: str, heads: int, backend: str) -> None:
    """Weights and values have gradients of exactly 0 where the mask hides them, whatever they hold; beside a context without a mask."""
    case = build_for_memory(family, Dims(3, 4, 9, 7, 6, heads), torch.float64, hidden="both")
    seen, masks = with_masks(case)
    leaves = with_leaves(garbage(case, torch.nan))  # behind the memory's mask
    memory = remember(leaves, backend)
    generator = torch.Generator().manual_seed(4)
    given = torch.rand(seen.visible().shape, generator=generator, dtype=torch.float64).requires_grad_()
    upstream = torch.randn(case.grad_context.shape, generator=generator, dtype=torch.float64)
    contexts = memory.context(given, mask=masks), memory.context(given)
    torch.autograd.backward(contexts, [upstream, 2 * upstream])
    values = leaves.values.detach().nan_to_num()
    of_weights, of_values = 0.0, 0.0
    for context, visible, factor in zip(contexts, (seen.visible(), case.visible()), (1, 2), strict=True):
        weights = (given * visible).detach()
        assert_near({"context": context}, {"context": weights @ values})
        of_weights = of_weights + factor * (upstream @ values.mT) * visible
        of_values = of_values + factor * weights.mT @ upstream
    assert_near({"weights": given.grad, "values": leaves.values.grad}, {"weights": of_weights, "values": of_values})
    assert not given.grad[~case.visible()].any()
    only_masked = remember(with_leaves(case), backend)
    only_masked.context(given, mask=masks).backward(upstream)
    assert not only_masked.values.grad[~seen.visible().any(-2)].any()


@each_family
def test_gradients_with_and_without_masks_over_garbage(family: str, backend: str) -> None:
    """What the memory's mask hides is not read in the steps without a mask of their own either."""
    case = build_for_memory(family, Dims(3, 4, 9, 7, 6), torch.float64, hidden="both")
    _, masks = with_masks(case)
    found = []
    for bad in (0.0, torch.nan):
        leaves = with_leaves(garbage(case, bad))
        memory = remember(leaves, backend)
        loss_of(*memory.attend(leaves.query[:, 0], True, mask=masks[:, 0]), *memory.attend(leaves.query[:, 1], True)).backward()
        found.append(gradients(leaves))
    assert_same_bits(*found)


def pointers(memory: onepass.AttentionMemory, query: Tensor, in_place: bool) -> Tensor:
    """A tour: each step points to what no step before it has."""
    open_ = torch.ones(memory.keys.shape[0], memory.keys.shape[-2], dtype=torch.bool)
    total = torch.zeros(())
    for step in query.unbind(1):
        _, weights = memory.attend(step, need_weights=True, mask=open_)
        assert weights is not None
        chosen = weights.argmax(-1, keepdim=True)
        assert open_.gather(-1, chosen).all()
        total = total - weights.gather(-1, chosen).log().sum()
        open_ = open_.scatter_(-1, chosen, False) if in_place else open_.scatter(-1, chosen, False)
    return total


@each_family
def test_a_mask_may_change_in_place_after_the_call(family: str, backend: str) -> None:
    case = build_for_memory(family, Dims(2, 7, 7, 6, 0))
    found = []
    for in_place in (True, False):
        leaves = with_leaves(case)
        total = pointers(remember(leaves, backend), leaves.query, in_place)
        assert torch.isfinite(total)
        total.backward()
        found.append({"total": total.detach(), **gradients(leaves)})
    assert_same_bits(*found)


@each_family
def test_what_is_left_has_weights_however_little_it_had(family: str, backend: str) -> None:
    """Hidden before the softmax, not after: what stays has all the weight, though it had none that float32 can hold."""
    case = build_for_memory(family, Dims(1, 1, 3, 4, 2))
    v = torch.full((4,), 100.0) if family == "additive" else None
    keys = torch.tensor([[[9.0] * 4, [-9.0] * 4, [-8.0] * 4]])
    case = case.replace(query=torch.ones(1, 1, 4) * (1 if family == "additive" else 9), keys=keys, v=v)
    memory = remember(case, backend)
    _, weights = memory.attend(case.query[:, 0], need_weights=True)
    _, left = memory.attend(case.query[:, 0], need_weights=True, mask=torch.tensor([[False, True, True]]))
    assert weights is not None
    assert left is not None
    assert weights[0, 1:].max() == 0
    assert left[0, 0] == 0
    assert abs(float(left.sum()) - 1) <= 4 * torch.finfo(left.dtype).eps  # of two quotients and their sum


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["additive", "general"])
def test_layers(kind: str, dropout: float, backend: str) -> None:
    """A layer takes a mask with its query over a memory, and gives what it gives with both masks over the states."""
    layer, (query, states, _) = make_layer(kind, dropout=dropout), layer_states(kind)
    own = torch.rand(states.shape[:2], generator=torch.Generator().manual_seed(1)) < 0.8
    mask = torch.rand(*query.shape[:2], states.shape[1], generator=torch.Generator().manual_seed(2)) < 0.7
    found = []
    for over in (True, False):
        torch.manual_seed(0)
        seen = mask if over else mask & own[:, None]
        context, weights = layer(query, layer.memory(states, mask=own) if over else states, mask=seen, need_weights=True)
        found.append({"context": context, "weights": weights})
    assert_near(*found)


@pytest.mark.usefixtures("fresh_compiler")
@each_family
def test_compiled(family: str, backend: str) -> None:
    """In one graph, gradients included."""
    case = build_for_memory(family, Dims(3, 4, 9, 7, 6), torch.float64, hidden="both")
    seen, masks = with_masks(case)

    def steps(leaves: Case) -> tuple[Tensor, Tensor]:
        memory = remember(leaves.replace(mask=case.mask), backend)
        context, weights = memory.attend(leaves.query[:, 0], True, mask=masks[:, 0])
        return memory.context(weights, mask=masks[:, 0]) + context, memory.attend(leaves.query, mask=masks)[0]

    found = []
    for function in (steps, torch.compile(steps, fullgraph=True, backend="aot_eager")):
        leaves = with_leaves(seen)
        outputs = function(leaves)
        loss_of(*outputs).backward()
        found.append({"one": outputs[0].detach(), "all": outputs[1].detach(), **gradients(leaves)})
    assert_near(*found)


@each_family
def test_selected_rows_and_no_gradients(family: str, backend: str) -> None:
    case = build_for_memory(family, Dims(3, 4, 9, 7, 6), hidden="both")
    _, masks = with_masks(case)
    expected: tuple[Any, ...] = remember(case, backend).attend(case.query, True, mask=masks)
    rows = torch.tensor([2, 0])
    with torch.no_grad():
        found = remember(case, backend).select(rows).attend(case.query[rows], True, mask=masks[rows])
    names = ("context", "weights")
    assert_near(dict(zip(names, found, strict=True)), dict(zip(names, (tensor[rows] for tensor in expected), strict=True)))


WRONG: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: torch.ones(2, 7), TypeError, "mask must be a boolean tensor, True where a query attends; got torch.float32"),
    (lambda: [[True]], TypeError, "mask must be a boolean tensor, True where a query attends; got list"),
    (lambda: torch.ones(2, 6, dtype=torch.bool), ValueError, "mask must broadcast to [B, T, S] = [2, 1, 7]; got [2, 6]"),
    (lambda: torch.ones(2, 3, 7, dtype=torch.bool), ValueError, "mask must broadcast to [B, T, S] = [2, 1, 7]; got [2, 3, 7]"),
    (lambda: torch.ones(2, 7, dtype=torch.bool, device="meta"), ValueError, "mask must be on the device of query, cpu; got meta"),
]


@pytest.mark.parametrize(("mask", "error", "message"), WRONG, ids=lambda x: x if isinstance(x, str) else "")
def test_errors(mask: Callable[[], Any], error: type[Exception], message: str, backend: str) -> None:
    memory = onepass.multiplicative_memory(torch.randn(2, 7, 5), torch.randn(2, 7, 4), backend=backend)
    for ask in (lambda: memory.attend(torch.randn(2, 5), mask=mask()), lambda: memory.context(torch.rand(2, 7), mask=mask())):
        with pytest.raises(error, match=re.escape(message)):
            ask()


@pytest.mark.parametrize("raw", [False, True], ids=["attend", "scores"])
@each_family
def test_a_hidden_number_changes_no_bit_of_the_gradient(family: str, raw: bool, backend: str, isa: str) -> None:
    """Of the query that it is hidden from, though another query of the call sees it: not by how keys are computed together either."""
    for seed in range(12):
        case = build_for_memory(family, Dims(1, 2, 14, 16, 3), seed=seed)
        mask = torch.ones(1, 2, 14, dtype=torch.bool)
        mask[0, 0, seed % 8 + 3] = False
        found = []
        for number in (0.0, 3.0, 30.0, torch.inf, torch.nan):
            keys = case.keys.clone()
            keys[0, seed % 8 + 3] = number
            query = case.query.clone().requires_grad_()
            memory = remember(case.replace(keys=keys), backend)
            result = memory.scores(query, mask=mask).masked_fill(~mask, 0.0) if raw else memory.attend(query, mask=mask)[0]
            result[:, 0].square().sum().backward()
            assert query.grad is not None
            found.append({"query": query.grad[:, 0]})
        for other in found[1:]:
            assert_same_bits(other, found[0])
