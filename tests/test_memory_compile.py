"""``torch.compile`` and ``torch.export`` take a memory: made within the graph, or handed to it; results and gradients are eager's."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Case, Dims, Results
from memory_cases import (
    assert_near,
    build_for_memory,
    each_family,
    each_heads,
    gradients,
    layer_states,
    loss_of,
    make_layer,
    next_query,
    remember,
    with_leaves,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils import _pytree as pytree

from onepass import AttentionMemory

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def decode(attend: Callable[..., Any], queries: Tensor) -> tuple[Tensor, Tensor]:
    """Three recurrent steps: the last state, and the weights of all steps."""
    state, seen = queries[..., 0, :], []
    for step in range(3):
        context, weights = attend(state, need_weights=True)
        state = next_query(queries[..., step, :], context)
        seen.append(weights)
    return state, torch.stack(seen, -2)


def outcome(function: Callable[[Case], tuple[Tensor, ...]], case: Case) -> Results:
    """Outputs and gradients of a function of a case."""
    leaves = with_leaves(case)
    outputs = function(leaves)
    loss_of(*outputs).backward()
    return {**{str(place): output.detach() for place, output in enumerate(outputs)}, **gradients(leaves)}


@pytest.mark.parametrize(("heads", "hidden"), [(0, "none"), (2, "both")])
@each_family
def test_memory_made_within(family: str, heads: int, hidden: str, backend: str) -> None:
    """A function that makes a memory and loops over its steps is one graph, forward and backward, compiled once."""

    def whole(case: Case) -> tuple[Tensor, Tensor]:
        return decode(remember(case, backend).attend, case.query)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(whole, fullgraph=True, backend=counter)
    for seed in (0, 1):
        case = build_for_memory(family, Dims(3, 3, 7, 6, 5, heads), torch.float64, hidden=hidden, seed=seed)
        assert_near(outcome(compiled, case), outcome(whole, case))
    assert counter.frame_count == 1


@each_family
def test_dynamic_sizes(family: str, backend: str) -> None:
    """Other source lengths and batch sizes are right with dynamic shapes, and compiled no more than once again."""

    def whole(case: Case) -> tuple[Tensor, Tensor]:
        return decode(remember(case, backend).attend, case.query)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(whole, fullgraph=True, dynamic=True, backend=counter)
    for batch, source in ((4, 7), (2, 9), (8, 11)):
        case = build_for_memory(family, Dims(batch, 3, source, 6, 5), torch.float64, hidden="both")
        assert_near(outcome(compiled, case), outcome(whole, case))
    assert counter.frame_count <= 2


@each_heads
@each_family
def test_memory_handed_to_a_step(family: str, heads: int, backend: str) -> None:
    """A compiled step takes a memory made outside, trains through it, and is not compiled again for the next memory."""
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(lambda memory, query: memory.attend(query, need_weights=True), fullgraph=True, backend=counter)

    def by_steps(case: Case) -> tuple[Tensor, Tensor]:
        memory = remember(case, backend)
        return decode(lambda query, need_weights: step(memory, query), case.query)

    def eager(case: Case) -> tuple[Tensor, Tensor]:
        return decode(remember(case, backend).attend, case.query)

    compiled = []
    for seed in (0, 1, 2):
        case = build_for_memory(family, Dims(3, 3, 7, 6, 5, heads), torch.float64, hidden="both", seed=seed)
        assert_near(outcome(by_steps, case), outcome(eager, case))
        compiled.append(counter.frame_count)
    assert compiled[0] == compiled[1] == compiled[2]


@each_family
def test_without_gradients(family: str, backend: str) -> None:
    """Inference: a compiled step, and a compiled selection of rows, under ``no_grad``."""
    case = build_for_memory(family, Dims(3, 3, 7, 6, 5), hidden="both")
    rows = torch.tensor([2, 0, 0, 1])

    def search(case: Case, rows: Tensor) -> tuple[Tensor, Tensor]:
        memory = remember(case, backend)
        first, _ = memory.attend(case.query)
        second, _ = memory.select(rows).attend(case.query[rows])
        return first, second

    with torch.no_grad():
        found = torch.compile(search, fullgraph=True, backend="aot_eager")(case, rows)
        for got, want in zip(found, search(case, rows), strict=True):
            torch.testing.assert_close(got, want)


@each_family
def test_rows_and_steps_without_gradients(family: str, backend: str) -> None:
    """In training: rows of a list, as many as are left, and steps that train nothing; one graph for any number."""

    def shrinking(case: Case, left: int) -> tuple[Tensor, ...]:
        memory = remember(case, backend)
        with torch.no_grad():
            sampled, _ = memory.detach().attend(case.query)
        free = memory.detach()
        with torch.no_grad():
            again, _ = free.select([1]).attend(case.query[1:2])
        listed, _ = memory.select([2, 0]).attend(case.query[[2, 0]])
        return listed, memory.select(slice(0, left)).attend(case.query[:left])[0], sampled, again

    compiled = torch.compile(shrinking, fullgraph=True, backend="aot_eager", dynamic=True)
    for left in (3, 2):
        outcomes = []
        for function in (compiled, shrinking):
            leaves = with_leaves(build_for_memory(family, Dims(4, 3, 7, 6, 5), torch.float64, hidden="both"))
            outputs = function(leaves, left)
            assert [output.requires_grad for output in outputs] == [True, True, False, False]
            loss_of(*outputs[:2]).backward()
            outcomes.append({**{str(place): output.detach() for place, output in enumerate(outputs)}, **gradients(leaves)})
        assert_near(*outcomes)


@pytest.mark.parametrize(("kind", "heads"), [("additive", 1), ("normalized", 2), ("general", 2), ("dot", 1)])
def test_layers(kind: str, heads: int, backend: str) -> None:
    """A layer, its memory and a loop over its steps compile in one graph; parameters and states get eager's gradients."""
    layer = make_layer(kind, num_heads=heads)
    queries, source, lengths = layer_states(kind)

    def whole(queries: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        memory = layer.memory(states, lengths=lengths)
        return decode(lambda query, need_weights: layer(query, memory, need_weights=need_weights), queries)

    outcomes = []
    for function in (torch.compile(whole, fullgraph=True, backend="aot_eager"), whole):
        states = source.clone().requires_grad_()
        outputs = function(queries, states)
        leaves = {"states": states, **dict(layer.named_parameters())}
        grads = torch.autograd.grad(loss_of(*outputs), list(leaves.values()))
        outcomes.append({"state": outputs[0], "weights": outputs[1], **dict(zip(leaves, grads, strict=True))})
    assert_near(*outcomes)


@pytest.mark.parametrize("kind", ["additive", "general"])
def test_compiled_layer_over_a_memory_made_outside(kind: str, backend: str) -> None:
    """``torch.compile(layer)`` takes a memory in the place of states."""
    layer = make_layer(kind)
    queries, source, lengths = layer_states(kind)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    outcomes = []
    for function in (compiled, layer):
        states = source.clone().requires_grad_()
        memory = layer.memory(states, lengths=lengths)
        state, weights = decode(lambda query, need_weights: function(query, memory, need_weights=need_weights), queries)  # noqa: B023
        leaves = {"states": states, **dict(layer.named_parameters())}
        grads = torch.autograd.grad(loss_of(state, weights), list(leaves.values()))
        outcomes.append({"state": state, "weights": weights, **dict(zip(leaves, grads, strict=True))})
    assert_near(*outcomes)


@pytest.mark.parametrize("kind", ["additive", "general", "dot"])
def test_memory_made_by_compiled_code(kind: str, backend: str) -> None:
    """Steps outside of the compiled code that made their memory have all their gradients, and its masked weights theirs."""
    layer = make_layer(kind)
    queries, source, lengths = layer_states(kind)
    outcomes = []
    for make in (torch.compile(layer.memory, fullgraph=True, backend="aot_eager"), layer.memory):
        states = source.clone().requires_grad_()
        memory = make(2 * states, lengths=lengths)
        state, weights = decode(lambda query, need_weights: layer(query, memory, need_weights=need_weights), queries)  # noqa: B023
        context = memory.context(weights[:, 0].detach())
        leaves = {"states": states, **dict(layer.named_parameters())}
        grads = torch.autograd.grad(loss_of(state, weights, context), list(leaves.values()))
        outcomes.append({"state": state, "weights": weights, **dict(zip(leaves, grads, strict=True))})
    assert_near(*outcomes)


def test_inductor(backend: str) -> None:
    """The default compiler runs a decoder that makes a memory, with code around it, forward and backward."""

    def whole(case: Case) -> tuple[Tensor, ...]:
        memory = remember(case, backend)
        return tuple(torch.relu(memory.attend(query)[0]) for query in case.query.unbind(1))

    case = build_for_memory("additive", Dims(3, 3, 7, 6, 5), hidden="both")
    assert_near(outcome(torch.compile(whole, fullgraph=True), case), outcome(whole, case))


class Model(torch.nn.Module):
    """A layer that makes a memory and attends three times."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer = make_layer(kind)

    def forward(self, queries: Tensor, states: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        memory = self.layer.memory(states, lengths=lengths)
        return decode(lambda query, need_weights: self.layer(query, memory, need_weights=need_weights), queries)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic source"])
@pytest.mark.parametrize("kind", ["additive", "scaled dot"])
def test_export(kind: str, dynamic: bool, backend: str) -> None:
    """``torch.export`` takes a model with a memory and its steps; the program gives the model's results."""
    model = Model(kind)
    queries, states, lengths = layer_states(kind)
    shapes = {"queries": None, "states": {1: torch.export.Dim("source", min=2, max=1024)}, "lengths": None} if dynamic else None
    program = torch.export.export(model, (queries, states, lengths), dynamic_shapes=shapes)
    if dynamic:
        states = torch.cat([states, states.flip(1)], 1)
    inputs = (queries.flip(0), states, lengths.flip(0))
    for got, want in zip(program.module()(*inputs), model(*inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("kind", ["additive", "general"])
def test_a_memory_leaves_a_graph(kind: str, heads: int, backend: str) -> None:
    """Made by compiled code, asked by eager: states that heads split lie in views."""
    layer = make_layer(kind, num_heads=heads)
    queries, states, lengths = layer_states(kind)
    found = []
    for make in (layer.memory, torch.compile(layer.memory, backend="aot_eager", fullgraph=True)):
        leaf = states.clone().requires_grad_()
        memory = make(leaf, lengths=lengths)
        context, weights = layer(queries, memory, need_weights=True)
        found.append((context, weights, *torch.autograd.grad(loss_of(context, weights), [leaf, *layer.parameters()])))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


class AtOnce(torch.nn.Module):
    def __init__(self, kind: str, heads: int, over_memory: bool) -> None:
        super().__init__()
        self.layer, self.over_memory = make_layer(kind, num_heads=heads), over_memory

    def forward(self, queries: Tensor, states: Tensor) -> Tensor:
        context: Tensor = self.layer(queries, self.layer.memory(states) if self.over_memory else states)[0]
        return context


@pytest.mark.parametrize("with_grad", [False, True])
@pytest.mark.parametrize("over_memory", [False, True], ids=["states", "memory"])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("kind", ["additive", "general"])
def test_export_for_any_sizes(kind: str, heads: int, over_memory: bool, with_grad: bool, backend: str) -> None:
    """Of batch, queries and source at once: nothing compares them with widths, or with each other."""
    model, (queries, states, _) = AtOnce(kind, heads, over_memory), layer_states(kind)
    batch, steps, source = (torch.export.Dim(name) for name in ("batch", "steps", "source"))
    with torch.set_grad_enabled(with_grad):
        program = torch.export.export(model, (queries, states), dynamic_shapes=({0: batch, 1: steps}, {0: batch, 1: source}))
        inputs = torch.cat([queries, queries], 1)[:2], torch.cat([states, states, states], 1)[:2]
        torch.testing.assert_close(program.module()(*inputs), model(*inputs), rtol=1e-12, atol=1e-12)


class Encode(torch.nn.Module):
    def __init__(self, layer: torch.nn.Module, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.layer, self.dtype = layer, dtype

    def forward(self, states: Tensor, lengths: Tensor, mask: Tensor) -> AttentionMemory:
        memory: AttentionMemory = self.layer.memory(states, lengths=lengths, mask=mask, dtype=self.dtype)
        return memory


class Step(torch.nn.Module):
    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, query: Tensor, memory: AttentionMemory) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self.layer(query, memory, need_weights=True)
        return found


@pytest.mark.parametrize("with_grad", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("kind", ["additive", "general", "scaled dot"])
def test_a_memory_between_programs(kind: str, heads: int, dtype: torch.dtype | None, with_grad: bool, backend: str) -> None:
    """One program makes it and another takes its steps, both for any sizes, the other from a file; eager takes either's place."""
    layer = make_layer(kind, num_heads=heads).float()
    queries, states, lengths = (tensor.float() if tensor.is_floating_point() else tensor for tensor in layer_states(kind))
    mask, auto = torch.rand(states.shape[:2]) < 0.8, torch.export.Dim.AUTO
    encode, step = Encode(layer, dtype), Step(layer)
    with torch.set_grad_enabled(with_grad):
        shapes = ({0: auto, 1: auto}, {0: auto}, {0: auto, 1: auto})
        encodes = torch.export.export(encode, (states, lengths, mask), dynamic_shapes=shapes).module()
        sizes = torch.export.ShapesCollection()
        example = queries[:, 0], encodes(states, lengths, mask)
        for tensor in pytree.tree_leaves(example):
            sizes[tensor] = dict.fromkeys(range(tensor.dim()), auto)
        file = io.BytesIO()
        program = torch.export.export(step, example, dynamic_shapes=sizes)
        if with_grad:
            program.example_inputs = None  # which would be pickled
        torch.export.save(program, file)
        file.seek(0)
        steps = torch.export.load(file).module()
        inputs = torch.cat([states, states.flip(1)], 1)[1:], 2 * lengths[1:], torch.cat([mask, mask], 1)[1:]
        expected = step(queries[1:, 1], encode(*inputs))
        for remembered in (encodes(*inputs), encode(*inputs)):
            for ask in (step, steps):
                for got, want in zip(ask(queries[1:, 1], remembered), expected, strict=True):
                    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@each_family
def test_mask_of_rows_that_a_graph_does_not_know(family: str, backend: str) -> None:
    """As many sources as booleans leave, and one mask for them all."""
    case = build_for_memory(family)
    mask = torch.ones(1, case.keys.shape[-2], dtype=torch.bool)
    mask[0, 0] = False
    rows = torch.arange(case.keys.shape[0]) != 0

    class Selected(torch.nn.Module):
        def forward(self, query: Tensor, keys: Tensor, values: Tensor, rows: Tensor, mask: Tensor) -> Tensor:
            memory = remember(case.replace(keys=keys, values=values), backend).select(rows)
            return memory.attend(query[rows], mask=mask)[0]

    arguments = case.query[:, 0], case.keys, case.values, rows, mask
    with torch.no_grad():
        exported = torch.export.export(Selected(), arguments).module()(*arguments)
        assert_near({"context": exported}, {"context": Selected()(*arguments)})
