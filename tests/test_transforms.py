"""Derivatives that the kernels lack are refused, never zero and never in autograd's own words; the reference has them, and vmap serves."""

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from cases import FAMILIES, Dims, build, call
from memory_cases import assert_near, build_for_memory, each_family, remember, with_leaves
from torch import Tensor
from torch.autograd import forward_ad

import onepass

DIMS = Dims(2, 3, 5, 4, 6)
Function = Callable[[Tensor], Tensor]
FORWARD_MODE: dict[str, Callable[[Function, Tensor], Any]] = {
    "jvp": lambda function, x: torch.func.jvp(function, (x,), (torch.ones_like(x),))[1],
    "jacfwd": lambda function, x: torch.func.jacfwd(function)(x),
    "dual level": lambda function, x: _dual(function, x),
    "jvp of vmap": lambda function, x: torch.func.jvp(torch.vmap(lambda one: function(one[None])), (x,), (x,))[1],
    "vmap of jvp": lambda function, x: torch.vmap(lambda one: torch.func.jvp(lambda y: function(y[None]), (one,), (one,))[1])(x),
}
REVERSE_MODE: dict[str, Callable[[Function, Tensor], Any]] = {
    "grad": lambda function, x: torch.func.grad(lambda y: function(y).square().sum())(x),
    "vjp": lambda function, x: torch.func.vjp(function, x)[1](torch.ones_like(function(x)))[0],
    "jacrev": lambda function, x: torch.func.jacrev(function)(x),
    "grad of vmap": lambda function, x: torch.func.grad(lambda y: torch.vmap(lambda one: function(one[None]))(y).square().sum())(x),
    "vmap of grad": lambda function, x: torch.vmap(torch.func.grad(lambda one: function(one[None]).square().sum()))(x),
}


def _dual(function: Function, x: Tensor) -> Tensor | None:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def of_queries(family: str, backend: str) -> tuple[Function, Tensor]:
    """A family's first output as a function of its queries, whose batch may have any size; and the queries."""
    case = build(family, DIMS, torch.float64)

    def function(query: Tensor) -> Tensor:
        some = {name: getattr(case, name)[:1].expand(len(query), -1, -1) for name in ("keys", "values")}  # alike for all
        output: Tensor = call(case.replace(query=query, **some), backend)[0]
        return output

    return function, case.query


@contextlib.contextmanager
def refused_by_kernels(backend: str, message: str) -> Iterator[None]:
    if backend == "reference":
        yield
        return
    with pytest.raises(RuntimeError, match=f"onepass has no {message}.*name backend='reference'"):
        yield


@pytest.mark.parametrize("mode", FORWARD_MODE)
@pytest.mark.parametrize("family", FAMILIES)
def test_forward_mode(family: str, mode: str, backend: str) -> None:
    """A tangent of an input is refused by the kernels; the reference gives the derivative that differences give."""
    function, query = of_queries(family, "auto")
    with refused_by_kernels(backend, "forward-mode derivatives"):
        FORWARD_MODE[mode](function, query)
    function, query = of_queries(family, "reference")
    along = torch.ones_like(query)
    found = FORWARD_MODE["jvp"](function, query)
    torch.testing.assert_close(found, (function(query + 1e-6 * along) - function(query - 1e-6 * along)) / 2e-6, rtol=1e-6, atol=1e-7)
    assert FORWARD_MODE[mode](function, query).any()


@pytest.mark.of_cpp
@pytest.mark.parametrize("mode", ["jvp", "dual level"])
@pytest.mark.parametrize("over", ["function", "memory"])
@each_family
def test_forward_mode_compiled(family: str, over: str, mode: str, backend: str) -> None:
    """A graph has no tangents of the ops either, and says so: they would be zero there."""
    case = build_for_memory(family)
    with torch.no_grad():
        memory = remember(case, backend)

    def function(query: Tensor) -> Tensor:
        if over == "function":
            return call(case.replace(query=query), backend)[0]  # type: ignore[no-any-return]
        with torch.no_grad():
            return memory.attend(query)[0]

    if mode == "jvp":
        with refused_by_kernels(backend, "forward-mode derivatives"):
            torch.compile(lambda query: FORWARD_MODE["jvp"](function, query), backend="eager")(case.query)
    else:
        compiled = torch.compile(function, backend="eager")
        with refused_by_kernels(backend, "forward-mode derivatives"):
            _dual(compiled, case.query)
        assert_near({"context": compiled(case.query)}, {"context": function(case.query)})


@pytest.mark.parametrize(("family", "name"), [(family, name) for family in FAMILIES for name in build(family, DIMS).inputs()])
def test_tangent_of_any_input(family: str, name: str, backend: str) -> None:
    """Whichever input has a tangent; a level of forward mode in which none has one changes nothing."""
    case = build(family, DIMS)
    expected = call(case, backend)
    with forward_ad.dual_level():
        for found, want in zip(call(case, backend), expected, strict=True):
            assert torch.equal(found, want)
        tensor = getattr(case, name)
        with refused_by_kernels(backend, "forward-mode derivatives"):
            call(case.replace(**{name: forward_ad.make_dual(tensor, torch.ones_like(tensor))}), backend)


@pytest.mark.parametrize("mode", REVERSE_MODE)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_transforms(family: str, mode: str, backend: str) -> None:
    """Function transforms that differentiate are refused by the kernels; those of the reference are autograd's gradients."""
    function, query = of_queries(family, "auto")
    with refused_by_kernels(backend, "gradients of function transforms"):
        REVERSE_MODE[mode](function, query)
    function, query = of_queries(family, "reference")
    found = REVERSE_MODE[mode](function, query)
    leaf = query.clone().requires_grad_()
    if mode in ("grad", "grad of vmap", "vmap of grad"):
        torch.testing.assert_close(found, torch.autograd.grad(function(leaf).square().sum(), leaf)[0])
    if mode == "vjp":
        torch.testing.assert_close(found, torch.autograd.grad(function(leaf).sum(), leaf)[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_not_differentiated(family: str, backend: str) -> None:
    """Inside a transform, without gradients or of constants, the kernels serve."""
    function, query = of_queries(family, backend)
    expected = function(query).sum()

    def loss(x: Tensor) -> Tensor:
        with torch.no_grad():
            return x.sum() * 0.0 + function(x).sum()

    torch.testing.assert_close(torch.func.grad_and_value(loss)(query)[1], expected)
    gradient, value = torch.func.grad_and_value(lambda x: x.sum() + function(query).sum())(torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(value, expected)
    assert torch.equal(gradient, torch.ones_like(gradient))


@pytest.mark.parametrize("family", FAMILIES)
def test_vmap(family: str, backend: str) -> None:
    """Calls mapped over one more batch dimension are the calls one by one, with gradients that autograd takes through them."""
    function, query = of_queries(family, backend)
    several = torch.stack([query, 2 * query]).requires_grad_()
    found, expected = torch.vmap(function)(several), torch.stack([function(one) for one in several])
    torch.testing.assert_close(found, expected)
    weighing = torch.randn_like(expected)
    for got, want in zip(*(torch.autograd.grad(output, several, weighing) for output in (found, expected)), strict=True):
        torch.testing.assert_close(got, want)


def test_ensemble(backend: str) -> None:
    """Layers whose parameters are stacked, called by vmap and trained by autograd."""
    torch.manual_seed(0)
    layers = [onepass.AdditiveAttention(4, 6, 8) for _ in range(2)]
    query, states = torch.randn(2, 3, 4), torch.randn(2, 5, 6)
    stacked, _ = torch.func.stack_module_state(layers)
    found = torch.vmap(lambda parameters: torch.func.functional_call(layers[0], parameters, (query, states))[0])(stacked)
    expected = torch.stack([layer(query, states)[0] for layer in layers])
    torch.testing.assert_close(found, expected)
    of_stack = torch.autograd.grad(found.square().sum(), list(stacked.values()))
    for name, gradient in zip(stacked, of_stack, strict=True):
        each = [torch.autograd.grad(layer(query, states)[0].square().sum(), layer.get_parameter(name))[0] for layer in layers]
        torch.testing.assert_close(gradient, torch.stack(each))


@pytest.mark.parametrize("where", ["lengths", "spans"])
def test_vmap_over_what_is_seen(where: str, backend: str) -> None:
    """Of the reference too, which looks at lengths elsewhere."""
    case = build("additive", DIMS, torch.float64)
    several = torch.tensor([[1, 2], [3, 4]]) if where == "lengths" else torch.tensor([[[0, 3]] * 3, [[1, 5]] * 3]).expand(2, 2, 3, 2)
    for name in {backend, "reference"}:
        def of(seen: Tensor, name: str = name) -> Tensor:
            return onepass.additive_attention(case.query, case.keys, case.values, case.v, **{where: seen}, backend=name)[0]

        torch.testing.assert_close(torch.vmap(of)(several), torch.stack([of(seen) for seen in several]))


@pytest.mark.filterwarnings("error")
def test_meta() -> None:
    """Shapes alone, without a word."""
    with torch.device("meta"):
        lengths = torch.tensor([1, 2])
        for layer in (onepass.AdditiveAttention(4, 6, 8), onepass.MultiplicativeAttention(4, 6, "general")):
            query, states = torch.empty(2, 3, 4), torch.empty(2, 5, 6)
            assert layer(query, states, lengths=lengths)[0].shape == (2, 3, 6)
            assert layer(query, layer.memory(states, lengths=lengths), spans=torch.empty(2, 3, 2, dtype=torch.int64))[0].shape == (2, 3, 6)


def test_memories_refuse_tangents(backend: str) -> None:
    case = build("multiplicative", DIMS, torch.float64)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(case.keys, torch.ones_like(case.keys))
        with pytest.raises(RuntimeError, match="onepass has no forward-mode derivatives"):
            onepass.multiplicative_memory(dual, case.values, backend=backend if backend != "reference" else "auto")


def test_vmap_keeps_the_check_of_lengths() -> None:
    """Of lengths that it does not map over, which the reference can look at."""
    case = build("additive", DIMS, torch.float64)
    lengths = torch.tensor([1, DIMS.source + 1])
    with pytest.raises(RuntimeError, match=r"lengths must lie in \[0, 5\]"):
        torch.vmap(lambda q: onepass.reference.additive_attention(q, case.keys, case.values, case.v, lengths=lengths)[0])(case.query[None])


@each_family
def test_batched_gradients(family: str, backend: str) -> None:
    """Several upstream gradients at once, over steps and several queries: each as by itself."""
    leaves = with_leaves(build_for_memory(family, Dims(2, 3, 7, 6, 4), torch.float64, hidden="lengths"))
    memory = remember(leaves, backend)
    steps = [memory.attend(query)[0] for query in leaves.query.unbind(1)]
    several = torch.stack(steps, 1) + memory.attend(leaves.query)[0]
    upstream = torch.stack([leaves.grad_context, 2 * leaves.grad_context.cos()])
    inputs = list(leaves.inputs().values())
    together = torch.autograd.grad(several, inputs, upstream, retain_graph=True, is_grads_batched=True)
    one_by_one = [torch.autograd.grad(several, inputs, one, retain_graph=True) for one in upstream]
    for number, got in enumerate(together):
        assert_near({"grad": got}, {"grad": torch.stack([grads[number] for grads in one_by_one])})


def test_a_reentrant_checkpoint_is_told_what_it_wants(backend: str) -> None:
    leaves = with_leaves(build_for_memory("additive"))
    memory = remember(leaves, backend)
    message = "used with them disabled: steps that train nothing, as a validation's, take memory.detach(); "
    with pytest.raises(RuntimeError, match=re.escape(f"{message}torch.utils.checkpoint wants use_reentrant=False")):
        torch.utils.checkpoint.checkpoint(lambda query: memory.attend(query)[0], leaves.query, use_reentrant=True)
