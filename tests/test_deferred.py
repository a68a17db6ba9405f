"""Training through a memory: gradients of keys, values and ``v`` come once, after the last step, and are those of the steps one by one."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Dims, Results, assert_same_bits
from memory_cases import (
    PROGRAMS,
    assert_near,
    build_for_memory,
    double,
    each_family,
    each_heads,
    each_program,
    expected_gradients,
    expected_of_steps,
    functions,
    gradients,
    loss_of,
    next_query,
    remember,
    step_losses,
    trained,
    with_leaves,
)
from torch import Tensor


def add(first: Results, second: Results) -> Results:
    return {name: first[name] + second[name] for name in first}


@pytest.mark.parametrize("hidden", ["none", "both"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@each_heads
@each_program
@each_family
def test_programs(family: str, program: str, heads: int, dtype: torch.dtype, hidden: str, backend: str) -> None:
    """However the steps are used, gradients are those of the formulae in fp64, and the next run has the same bits."""
    case = build_for_memory(family, Dims(3, 4, 9, 7, 6, heads), dtype, hidden=hidden)
    found = trained(case, backend, PROGRAMS[program])
    assert_near(found, expected_gradients(case, PROGRAMS[program]))
    assert_same_bits(trained(case, backend, PROGRAMS[program]), found)


@pytest.mark.parametrize("dims", [Dims(2, 4, 67, 100, 40), Dims(1, 4, 1, 1, 1), Dims(2, 4, 5, 33, 1), Dims(3, 4, 0, 7, 4)], ids=str)
@pytest.mark.parametrize(
    ("family", "span"),
    [("additive", "normal"), ("additive", "saturated"), ("additive", "one channel cancelling"), ("multiplicative", "normal")],
)
def test_programs_in_other_sizes(family: str, span: str, dims: Dims, backend: str, isa: str) -> None:
    """The same for other sizes and ranges, in every instruction set."""
    case = build_for_memory(family, dims, torch.float64, hidden="both", span=span)
    for program in ("separate steps", "recurrent chain, every output"):
        assert_near(trained(case, backend, PROGRAMS[program]), expected_gradients(case, PROGRAMS[program]))


@each_program
@each_family
def test_threads(family: str, program: str, backend: str, set_threads: Callable[[int], None]) -> None:
    """1, 2 and 3 threads give the same bits."""
    if backend == "reference":
        pytest.xfail("torch's matrix products promise no such thing")
    case = build_for_memory(family, Dims(5, 4, 67, 33, 19), hidden="lengths")
    set_threads(1)
    expected = trained(case, backend, PROGRAMS[program])
    for count in (2, 3):
        set_threads(count)
        assert_same_bits(trained(case, backend, PROGRAMS[program]), expected)


@each_family
def test_many_steps(family: str, backend: str) -> None:
    """A hundred recurrent steps."""
    case = build_for_memory(family, Dims(2, 100, 9, 7, 6), torch.float64, hidden="both")
    for program in ("recurrent chain", "separate steps"):
        assert_near(trained(case, backend, PROGRAMS[program]), expected_gradients(case, PROGRAMS[program]))


@pytest.mark.parametrize("names", [list(c) for n in range(5) for c in itertools.combinations(("query", "keys", "values", "v"), n)], ids=str)
@each_family
def test_frozen_inputs(family: str, names: list[str], backend: str) -> None:
    """Any subset of the inputs may require gradients, none too; the others get none."""
    case = double(family)
    names = [name for name in names if name in case.inputs()]
    leaves, expected = with_leaves(case, names), with_leaves(case, names)
    for program in ("separate steps", "recurrent chain, every output"):
        loss = PROGRAMS[program](remember(leaves, backend).attend, leaves.query)
        assert loss.requires_grad is bool(names)
        if names:
            loss.backward()
            PROGRAMS[program](functions(expected, "reference"), expected.query).backward()
    assert all((getattr(leaves, name).grad is not None) == (name in names) for name in leaves.inputs())
    assert_near(gradients(leaves), gradients(expected))


@each_program
@each_family
def test_states_as_keys_and_values(family: str, program: str, backend: str) -> None:
    """One tensor as keys and values gets the sum of both gradients."""
    case = double(family)
    expected = expected_gradients(case.replace(values=case.keys), PROGRAMS[program])
    leaves = with_leaves(case)
    shared = leaves.replace(values=leaves.keys)
    PROGRAMS[program](remember(shared, backend).attend, leaves.query).backward()
    assert_near({"keys": gradients(leaves)["keys"]}, {"keys": expected["keys"] + expected["values"]})


@each_program
@each_family
def test_several_memories(family: str, program: str, backend: str) -> None:
    """Three memories, two of them of the same tensors, whose steps alternate, each feeding the next."""
    first, second = double(family), double(family, seed=5, hidden="lengths")

    def interleaved(attends: list[Callable[..., Any]], queries: Tensor) -> Tensor:
        state, losses = queries[:, 0], []
        for step in range(4):
            for attend in attends:
                context, weights = attend(next_query(state, queries[:, step, :6]), need_weights=True)
                state = next_query(queries[:, step], context)
                losses.append(loss_of(context, weights))
        return torch.stack(losses).sum() + PROGRAMS[program](attends[0], queries)

    found, expected = [], []
    for results, named in ((found, backend), (expected, "function")):
        leaves, others = with_leaves(first), with_leaves(second)
        if named == "function":
            attends = [functions(each, "reference") for each in (leaves, others, leaves)]
        else:
            attends = [remember(each, backend).attend for each in (leaves, others, leaves)]
        interleaved(attends, leaves.query).backward()
        results += [gradients(leaves), gradients(others)]
    for got, want in zip(found, expected, strict=True):
        assert_near(got, want)


@each_family
def test_a_memory_of_a_memory(family: str, backend: str) -> None:
    """Contexts of one memory are the keys of the next: its gradients arrive in time for the first one's steps."""
    outcomes = []
    for deferred in (True, False):
        leaves = with_leaves(double(family))
        attend = remember(leaves, backend).attend if deferred else functions(leaves, "reference")
        contexts = torch.stack([attend(query)[0] for query in leaves.query.unbind(1)], 1)
        inner = leaves.replace(keys=next_query(leaves.query, contexts), values=contexts, lengths=None, mask=None)
        attend_inner = remember(inner, backend).attend if deferred else functions(inner, "reference")
        (PROGRAMS["recurrent chain"](attend_inner, leaves.query) + PROGRAMS["weights alone"](attend, leaves.query)).backward()
        outcomes.append(gradients(leaves))
    assert_near(*outcomes)


@each_family
def test_several_losses(family: str, backend: str) -> None:
    """Losses with a backward each, the graph retained but for the last, add up as they would without a memory."""
    case = double(family)
    leaves = with_leaves(case)
    losses = step_losses(leaves, backend)
    for done, retain in ((2, True), (0, True), (3, True), (1, False)):
        losses[done].backward(retain_graph=retain)
        steps = {2: (2,), 0: (2, 0), 3: (2, 0, 3), 1: (2, 0, 3, 1)}[done]
        assert_near(gradients(leaves), expected_of_steps(case, *steps))


@each_family
def test_losses_one_by_one(family: str, backend: str) -> None:
    """Losses of different steps over leaves have nothing in common that a backward would free, as without a memory."""
    case = double(family)
    leaves = with_leaves(case)
    losses = step_losses(leaves, backend)
    for done, loss in enumerate(losses, 1):
        loss.backward()
        assert_near(gradients(leaves), expected_of_steps(case, *range(done)))


@each_family
def test_losses_that_share_steps(family: str, backend: str) -> None:
    """A step that two losses reach counts in both."""
    case = double(family)
    leaves = with_leaves(case)
    losses = step_losses(leaves, backend)
    (losses[0] + losses[1]).backward(retain_graph=True)
    (losses[1] + losses[2]).backward()
    assert_near(gradients(leaves), add(expected_of_steps(case, 0, 1), expected_of_steps(case, 1, 2)))


@each_program
@each_family
def test_the_same_backward_again(family: str, program: str, backend: str) -> None:
    """A retained graph gives the same bits again, and once more."""
    leaves = with_leaves(double(family))
    loss = PROGRAMS[program](remember(leaves, backend).attend, leaves.query)
    loss.backward(retain_graph=True)
    first = gradients(leaves, clear=True)
    assert_near(first, expected_gradients(leaves, PROGRAMS[program]))
    loss.backward(retain_graph=True)
    assert_same_bits(gradients(leaves, clear=True), first)
    loss.backward()
    assert_same_bits(gradients(leaves), first)


@each_family
def test_steps_after_a_backward(family: str, backend: str) -> None:
    """A memory goes on after a backward that retained its graph: later steps are added, earlier ones not again."""
    case = double(family)
    leaves = with_leaves(case)
    memory = remember(leaves, backend)
    loss_of(*memory.attend(leaves.query[..., 0, :], need_weights=True)).backward(retain_graph=True)
    assert_near(gradients(leaves, clear=True), expected_of_steps(case, 0))
    loss_of(*memory.attend(leaves.query[..., 2, :], need_weights=True)).backward()
    assert_near(gradients(leaves), expected_of_steps(case, 2))


@each_family
def test_accumulation_over_batches(family: str, backend: str) -> None:
    """``.grad`` of a shared ``v`` and of keys adds up over two memories, each with its backward."""
    first, second = double(family), double(family, seed=3)
    leaves = with_leaves(first)
    PROGRAMS["recurrent chain"](remember(leaves, backend).attend, leaves.query).backward()
    other = with_leaves(second).replace(v=leaves.v, keys=leaves.keys)
    PROGRAMS["recurrent chain"](remember(other, backend).attend, other.query).backward()
    expected = expected_gradients(first, PROGRAMS["recurrent chain"])
    changed = second.replace(v=first.v, keys=first.keys)
    more = expected_gradients(changed, PROGRAMS["recurrent chain"])
    shared = [name for name in ("keys", "v") if name in expected]
    assert_near(
        {**gradients(leaves), "other": gradients(other)["query"]},
        {**expected, **{name: expected[name] + more[name] for name in shared}, "other": more["query"]},
    )


@each_program
@each_family
def test_gradient_of_the_query_only(family: str, program: str, backend: str) -> None:
    """``autograd.grad`` of the query alone, thrice, is right and leaves nothing behind for the backward that follows."""
    leaves = with_leaves(double(family))
    expected = expected_gradients(leaves, PROGRAMS[program])
    loss = PROGRAMS[program](remember(leaves, backend).attend, leaves.query)
    for _ in range(3):
        (grad,) = torch.autograd.grad(loss, [leaves.query], retain_graph=True)
        assert_near({"query": grad}, {"query": expected["query"]})
    assert leaves.keys.grad is None
    loss.backward()
    assert_near(gradients(leaves), expected)


@each_family
def test_gradient_of_the_query_of_other_steps(family: str, backend: str) -> None:
    """A query's gradient of some steps adds nothing to a backward through the others."""
    case = double(family)
    leaves = with_leaves(case)
    losses = step_losses(leaves, backend)
    torch.autograd.grad(losses[0] + losses[1], [leaves.query], retain_graph=True)
    losses[2].backward(retain_graph=True)
    assert_near(gradients(leaves, clear=True), expected_of_steps(case, 2))
    torch.autograd.grad(losses[3], [leaves.query], retain_graph=True)
    (losses[1] + losses[2]).backward()
    assert_near(gradients(leaves), expected_of_steps(case, 1, 2))


@each_program
@each_family
def test_gradients_of_any_inputs(family: str, program: str, backend: str) -> None:
    """``autograd.grad`` of any inputs, of the keys alone for one, over one retained graph, and then a backward."""
    leaves = with_leaves(double(family))
    expected = expected_gradients(leaves, PROGRAMS[program])
    loss = PROGRAMS[program](remember(leaves, backend).attend, leaves.query)
    for count in (1, 2, 3):
        for names in itertools.combinations(leaves.inputs(), count):
            grads = torch.autograd.grad(loss, [getattr(leaves, name) for name in names], retain_graph=True, allow_unused=True)
            found = {name: torch.zeros_like(getattr(leaves, name)) if g is None else g for name, g in zip(names, grads, strict=True)}
            assert_near(found, {name: expected[name] for name in names})
    loss.backward(inputs=[leaves.keys], retain_graph=True)
    assert_near({"keys": leaves.keys.grad}, {"keys": expected["keys"]})
    assert leaves.query.grad is None
    leaves.keys.grad = None
    loss.backward()
    assert_near(gradients(leaves), expected)


@pytest.mark.parametrize("name", ["query", "keys", "values"])
@each_family
def test_gradient_of_one_input_on_a_fresh_graph(family: str, name: str, backend: str) -> None:
    """``autograd.grad`` of one input alone, on a graph of its own that is not retained."""
    leaves = with_leaves(double(family))
    loss = PROGRAMS["recurrent chain"](remember(leaves, backend).attend, leaves.query)
    (grad,) = torch.autograd.grad(loss, [getattr(leaves, name)])
    assert_near({name: grad}, {name: expected_gradients(leaves, PROGRAMS["recurrent chain"])[name]})


@each_family
def test_unused_memory(family: str, backend: str) -> None:
    """A memory without steps, or whose steps reach no loss, adds nothing to what the keys get elsewhere."""
    leaves = with_leaves(double(family))
    memory = remember(leaves, backend)
    leaves.keys.sum().backward()
    memory.attend(leaves.query[:, 0])
    leaves.keys.sum().backward()
    assert torch.equal(leaves.keys.grad, torch.full_like(leaves.keys, 2.0))
    assert leaves.values.grad is None or not leaves.values.grad.any()


@each_family
def test_gradients_that_are_zero(family: str, backend: str) -> None:
    """A loss that is constant in the context gives zeros, not NaN and not what fresh memory holds."""
    leaves = with_leaves(double(family))
    (PROGRAMS["recurrent chain"](remember(leaves, backend).attend, leaves.query) * 0.0).backward()
    assert not any(grad.any() for grad in gradients(leaves).values())
