"""``torch.compile`` takes every function and layer in one graph, and compiles once when only T or S changes.

What is counted are graphs compiled after the first call: within it, torch may start over, having learnt what is dynamic.
"""

import pytest
import torch
from cases import FAMILIES, Case, Dims, build, call
from tolerance import check
from torch._dynamo.testing import CompileCounterWithBackend

import onepass

SIZES = [(3, 5), (4, 5), (4, 9), (7, 6)]


pytestmark = pytest.mark.usefixtures("fresh_compiler")


def run(function: object, case: Case) -> dict[str, torch.Tensor]:
    """Outputs and gradients of the compiled function."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in case.inputs().items()}
    outputs = function(case.replace(**leaves))  # type: ignore[operator]
    arriving = [case.grad_weights] if case.family == "scores" else [case.grad_context, case.grad_weights]
    torch.autograd.backward(outputs, arriving)
    found = dict(zip(("scores",) if case.family == "scores" else ("context", "weights"), outputs, strict=True))
    found.update({f"d_{name}": leaf.grad for name, leaf in leaves.items()})
    return {name: result.detach() for name, result in found.items()}


@pytest.mark.parametrize("hidden", ["none", "lengths", "padding", "both"])
@pytest.mark.parametrize("heads", [0, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_graph_for_all_sizes(family: str, heads: int, hidden: str, backend: str) -> None:
    """Training with changing T and S compiles once, in one graph, and is as accurate as ever."""
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(lambda case: call(case, backend), fullgraph=True, dynamic=True, backend=counter)
    compiled_at_first = 0
    for steps, source in SIZES:
        case = build(family, Dims(2, steps, source, 8, 6, heads), hidden=hidden)
        check(run(function, case), case)
        compiled_at_first = compiled_at_first or counter.frame_count
    assert counter.frame_count == compiled_at_first


@pytest.mark.parametrize("family", FAMILIES)
def test_automatic_dynamic_shapes(family: str, backend: str) -> None:
    """By default torch compiles once more when a size first changes, and not again."""
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(lambda case: call(case, backend), fullgraph=True, backend=counter)
    for steps, source in [(3, 5), (4, 9), (5, 6), (7, 11), (8, 13)]:
        case = build(family, Dims(2, steps, source, 8, 6), hidden="lengths")
        check(run(function, case), case)
        if source == 9:
            compiled_at_second = counter.frame_count
    assert counter.frame_count == compiled_at_second


@pytest.mark.parametrize("family", FAMILIES)
def test_one_step(family: str, backend: str) -> None:
    """A decoder's step compiles too, without gradients."""
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(lambda case: call(case, backend), fullgraph=True, dynamic=True, backend=counter)
    compiled_at_first = 0
    for source in (5, 6, 9):
        case = build(family, Dims(2, 1, source, 8, 6), hidden="lengths")
        stepped = case.replace(query=case.query[:, 0])
        with torch.no_grad():
            for got, expected in zip(function(stepped), call(stepped, backend), strict=True):
                torch.testing.assert_close(got, expected)
        compiled_at_first = compiled_at_first or counter.frame_count
    assert counter.frame_count == compiled_at_first


@pytest.mark.parametrize("family", ["additive", "multiplicative"])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_layers(family: str, heads: int, dropout: float, backend: str) -> None:
    """Layers compile in one graph, once; without dropout they give what they give uncompiled."""
    torch.manual_seed(0)
    if family == "additive":
        layer: torch.nn.Module = onepass.AdditiveAttention(6, 8, 10, normalize=True, num_heads=heads, dropout=dropout)
    else:
        layer = onepass.MultiplicativeAttention(6, 8, "general", num_heads=heads, dropout=dropout)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    compiled_at_first = 0
    for steps, source in SIZES:
        query, memory, lengths = torch.randn(2, steps, 6), torch.randn(2, source, 8), torch.tensor([source, 2])
        context, weights = compiled(query, memory, lengths=lengths, need_weights=True)
        (context.sum() + weights.square().sum()).backward()
        if not dropout:
            for got, expected in zip((context, weights), layer(query, memory, lengths=lengths, need_weights=True), strict=True):
                torch.testing.assert_close(got, expected)
        compiled_at_first = compiled_at_first or counter.frame_count
    assert counter.frame_count == compiled_at_first


def test_inductor(backend: str) -> None:
    """The default compiler runs a decoder's attention with code around it, forward and backward."""
    torch.manual_seed(0)
    layer = onepass.AdditiveAttention(6, 8, 10)
    query, memory, lengths = torch.randn(2, 3, 6), torch.randn(2, 5, 8), torch.tensor([5, 2])

    def loss(query: torch.Tensor) -> torch.Tensor:
        context, weights = layer(query.tanh(), memory, lengths=lengths, need_weights=True)
        total: torch.Tensor = torch.relu(context).sum() + weights.square().sum()
        return total

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        layer.zero_grad()
        torch.autograd.backward(function(query))
        results.append(
            [
                function(query).detach(),
                *(parameter.grad.clone() for parameter in layer.parameters() if parameter.grad is not None),
            ]
        )
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_export(family: str, backend: str) -> None:
    """``torch.export`` with a dynamic source length, reloaded as a module."""
    case = build(family, Dims(2, 3, 5, 8, 6))
    names = list(case.inputs())

    class Call(torch.nn.Module):
        def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            return call(case.replace(**dict(zip(names, tensors, strict=True))), backend)

    source = torch.export.Dim("source", min=2, max=1024)
    shapes = {"query": None, "v": None, "keys": {1: source}, "values": {1: source}}
    program = torch.export.export(Call(), tuple(case.inputs().values()), dynamic_shapes=(tuple(shapes[name] for name in names),))
    longer = build(family, Dims(2, 3, 11, 8, 6))
    for got, expected in zip(program.module()(*longer.inputs().values()), call(longer, backend), strict=True):
        torch.testing.assert_close(got, expected)
