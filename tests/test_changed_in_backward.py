"""What changes between a step's backward and that of its memory, which comes last: a step's own tensors, and what gradients depend on."""

import pytest
import torch
from cases import Results, assert_same_bits
from memory_cases import build_for_memory, each_family, gradients, remember, with_leaves
from torch import Tensor, nn

import onepass

each_use = pytest.mark.parametrize("use", ["attend", "scores", "context"])


def used(memory: onepass.AttentionMemory, use: str, rows: Tensor) -> Tensor:
    return memory.attend(rows)[0] if use == "attend" else memory.scores(rows) if use == "scores" else memory.context(rows)


@pytest.mark.parametrize("expanded", [False, True])
@each_use
@each_family
def test_an_optimizer_that_steps_in_the_backward(family: str, use: str, expanded: bool, backend: str) -> None:
    """A learned query, or learned weights, change as soon as they have their gradient: the memory's gradients are of what they were."""
    case = build_for_memory(family)
    rows = torch.rand_like(case.keys[..., 0]) if use == "context" else case.query[:, 0]
    start = rows[0] if expanded else rows

    def trained(steps: bool) -> Results:
        leaves, learned = with_leaves(case, ["keys", "values"]), nn.Parameter(start.clone())
        memory, optimizer = remember(leaves, backend), torch.optim.SGD([learned], lr=1.0)
        if steps:
            learned.register_post_accumulate_grad_hook(lambda _: optimizer.step())
        used(memory, use, learned.expand_as(rows) if expanded else learned).square().sum().backward()
        assert torch.equal(learned, start) != steps
        return gradients(leaves)

    assert_same_bits(trained(True), trained(False))


@pytest.mark.parametrize("what", ["query", "weights", "spans"])
@each_family
def test_a_hook_that_changes_what_a_step_had(family: str, what: str, backend: str) -> None:
    leaves = with_leaves(build_for_memory(family))
    memory = remember(leaves, backend)  # before the query: its backward comes after the query's
    query, spans = leaves.query[:, 0] * 1, torch.tensor([[0, 3]] * leaves.keys.shape[0])
    context, weights = memory.attend(query, need_weights=True, spans=spans)
    changed = {"query": query, "weights": weights, "spans": spans}[what].detach()
    query.register_hook(lambda _: (changed.add_(1), None)[-1])
    if backend == "reference":  # whose backward needs none of it any more
        return context.sum().backward()
    with pytest.raises(RuntimeError, match="have been modified by an inplace operation in its backward"):
        context.sum().backward()


@pytest.mark.parametrize("wanted", ["keys", "values", "rows"])
@each_use
@each_family
def test_second_derivatives_of_linear_losses(family: str, use: str, wanted: str, backend: str) -> None:
    """They are refused also where neither a query nor what arrives depends on anything, but the memory does."""
    leaves = with_leaves(build_for_memory(family, dtype=torch.float64), ["keys", "values"])
    rows = (torch.rand_like(leaves.keys[..., 0]) if use == "context" else leaves.query[:, 0]).clone().requires_grad_(wanted == "rows")
    loss = used(remember(leaves, backend), use, rows).sum()
    (found,) = torch.autograd.grad(loss, rows if wanted == "rows" else getattr(leaves, wanted), create_graph=True, allow_unused=True)
    assert (found is None) == ((use, wanted) in (("scores", "values"), ("context", "keys")))
    if found is None or backend == "reference":
        return
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(found.square().sum(), [leaves.keys, leaves.values], allow_unused=True)


@pytest.mark.parametrize("name", ["keys", "values"])
@each_family
def test_a_memory_of_inference_tensors_trains_nothing(family: str, name: str, backend: str) -> None:
    """They have no version to watch: functions refuse them, in torch's words."""
    if backend == "reference" and (family, name) == ("additive", "keys"):
        pytest.skip("its formula needs the keys' sum with the query alone")
    case = build_for_memory(family)
    with torch.inference_mode():
        case = case.replace(**{name: getattr(case, name).clone()})
    query, memory = case.query[:, 0].clone().requires_grad_(), remember(case, backend)
    with pytest.raises(RuntimeError, match="nference"):
        memory.attend(query)[0].sum().backward()
    with torch.no_grad():
        context = memory.detach().attend(query)[0]
    some = torch.arange(case.keys.shape[0])
    assert_same_bits({"context": memory.select(some).attend(query.detach())[0]}, {"context": context})
