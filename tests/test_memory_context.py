"""``AttentionMemory.context``: the context of weights that were changed after the softmax, and where its gradients go."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Case, Dims, Results, assert_same_bits, bits, build, hide
from memory_cases import (
    assert_near,
    build_for_memory,
    by_step_or_at_once,
    each_family,
    each_heads,
    gradients,
    loss_of,
    make_layer,
    remember,
    with_leaves,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

HIDDEN = ("none", "lengths", "both", "per head", "nothing", "spans", "spans and both")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def build_with_spans(dims: Dims, dtype: torch.dtype, hidden: str) -> Case:
    """A case whose memory hides what ``hidden`` says, and whose queries may have spans."""
    own = {"spans": "none", "spans and both": "both", "per head": "per head" if dims.heads else "both"}.get(hidden, hidden)
    case = build_for_memory("multiplicative", dims, dtype, hidden=own)
    spans = hide("spans", dims, torch.Generator().manual_seed(1)) if hidden.startswith("spans") else {}
    return case.replace(**spans)


def of_weights(case: Case, backend: str, by_step: bool, **options: Any) -> Results:
    """Context of ``grad_weights``, taken as weights, and the gradients of these and of the values."""
    values, weights = (tensor.detach().clone().requires_grad_() for tensor in (case.values, case.grad_weights))
    memory = remember(case.replace(values=values), backend, **options)
    if by_step:
        spans = [None] * case.steps() if case.spans is None else case.spans.unbind(1)
        steps = [memory.context(row, spans=span) for row, span in zip(weights.unbind(-2), spans, strict=True)]
        context = torch.stack(steps, -2)
    else:
        context = memory.context(weights, spans=case.spans)
    context.backward(case.grad_context)
    assert values.grad is not None
    assert weights.grad is not None
    return {"context": context.detach(), "d_weights": weights.grad, "d_values": values.grad}


def by_formula(case: Case) -> tuple[Results, Results]:
    """The same in fp64 by plain products over what is visible, and the sums of the terms' magnitudes."""
    visible = case.visible()
    wide = case.to(torch.float64)
    weights, grad = wide.grad_weights.masked_fill(~visible, 0.0), wide.grad_context
    values = wide.values.masked_fill(~visible.any(-2)[..., None], 0.0)

    def products(weights: Tensor, values: Tensor, grad: Tensor) -> Results:
        return {"context": weights @ values, "d_weights": (grad @ values.mT).masked_fill(~visible, 0.0), "d_values": weights.mT @ grad}

    return products(weights, values, grad), products(weights.abs(), values.abs(), grad.abs())


def check_products(found: Results, case: Case, roundings: float = 1.0) -> None:
    """Each sum may be off by an eps of the accumulating dtype per term and root, and a rounding of what is returned."""
    expected, sizes = by_formula(case)
    wide = torch.float64 if case.values.dtype == torch.float64 else torch.float32
    terms = max(*case.grad_weights.shape[-2:], case.values.shape[-1], 4)
    for name, want in expected.items():
        got = found[name]
        assert got.dtype == case.values.dtype
        allowed = terms * torch.finfo(wide).eps * sizes[name] + roundings * torch.finfo(got.dtype).eps * want.abs()
        assert ((got.double() - want).abs() <= allowed).all(), name


@by_step_or_at_once
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", [Dims(4, 6, 41, 8, 13), Dims(2, 3, 67, 5, 40, 2), Dims(1, 20, 300, 4, 33), Dims(1, 1, 1, 1, 1)], ids=str)
def test_products(dims: Dims, dtype: torch.dtype, hidden: str, by_step: bool, backend: str) -> None:
    """It is the product over the visible positions, and so are its gradients, step by step and at once."""
    case = build_with_spans(dims, dtype, hidden)
    check_products(of_weights(case, backend, by_step), case)


@by_step_or_at_once
@pytest.mark.parametrize("hidden", HIDDEN[1:])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_hidden_positions_are_not_read(hidden: str, bad: float, by_step: bool, backend: str, isa: str) -> None:
    """Garbage in values that no query sees, and in weights of what is not visible, changes no bit; gradients there are exactly 0."""
    case = build_with_spans(Dims(4, 5, 37, 8, 19, 2), torch.float32, hidden)
    visible = case.visible()
    unseen = ~visible.any(-2)[..., None]
    clean = case.replace(values=case.values.masked_fill(unseen, 0.0), grad_weights=case.grad_weights.masked_fill(~visible, 0.0))
    dirty = case.replace(values=case.values.masked_fill(unseen, bad), grad_weights=case.grad_weights.masked_fill(~visible, bad))
    found = of_weights(dirty, backend, by_step)
    assert_same_bits(found, of_weights(clean, backend, by_step))
    assert not found["d_weights"][~visible].any()
    assert not found["d_values"][unseen.expand_as(case.values)].any()
    assert not found["context"][~visible.any(-1)].any()


@each_heads
@each_family
def test_attended_weights_give_the_context(family: str, heads: int, backend: str) -> None:
    """Of attend's own weights it is attend's context; on the C++ kernels to the bit, in fp32."""
    case = build_for_memory(family, Dims(3, 4, 41, 8, 13, heads), hidden="both")
    spans = hide("spans", Dims(3, 4, 41), torch.Generator().manual_seed(1))["spans"]
    with torch.no_grad():
        memory = remember(case, backend)
        for given in (None, spans):
            context, weights = memory.attend(case.query, need_weights=True, spans=given)
            found = memory.context(weights, spans=given)
            if backend != "cpu":  # the Triton kernels sum in other tiles there
                torch.testing.assert_close(found, context)
            else:
                assert torch.equal(bits(found), bits(context))


def test_stored_in_bfloat16(backend: str) -> None:
    """A memory kept in bfloat16 sums its rounded values; the values' gradient is that of the sum."""
    case = build_with_spans(Dims(3, 4, 41, 8, 13), torch.float32, "both")
    rounded = case.replace(values=case.values.bfloat16().float())
    found = of_weights(case, backend, False, dtype=torch.bfloat16)
    limit = 1e-2 if backend == "reference" else 1e-5
    for name, want in by_formula(rounded)[0].items():
        torch.testing.assert_close(found[name].double(), want, rtol=limit if name == "d_values" else 1e-5, atol=1e-5)


class Calls(TorchDispatchMode):
    """Counts the ops of this package that are called within."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "onepass":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("with_spans", [False, True])
@each_family
def test_deferred(family: str, with_spans: bool, backend: str) -> None:
    """A backward through several contexts takes one op for each's weights, and one for the values of all."""
    if backend == "reference":
        pytest.xfail("the reference defers nothing")
    case = build_for_memory(family, Dims(3, 4, 9, 7, 6), torch.float64, hidden="lengths")
    leaves = with_leaves(case)
    memory = remember(leaves, backend)
    spans = torch.tensor([[1, 6]] * 3) if with_spans else None
    contexts = []
    for query in leaves.query.unbind(1):
        weights = memory.attend(query, need_weights=True, spans=spans)[1]
        contexts.append(memory.context(weights * 0.5, spans=spans))
    with Calls() as calls:
        loss_of(*contexts).backward()
    counted = {name: calls.names.count(name) for name in set(calls.names)}
    assert counted.pop("weighted_values_backward") == 4
    assert counted.pop(f"{family}_step_backward") == 4
    assert counted.pop("stack_steps") == 4  # queries, gradients of scores; weights, gradients of contexts
    assert counted == ({"source_sums": 2} if family == "multiplicative" else {"source_sums": 1, "additive_scores_backward": 1})


def sharpened(memory: Any, queries: Tensor, spans: list[Any]) -> Tensor:
    """A loss through changed weights, plain contexts, and contexts of constant weights, in alternation."""
    outputs = []
    for step, (query, span) in enumerate(zip(queries.unbind(-2), spans, strict=True)):
        context, weights = memory.attend(query, need_weights=True, spans=span)
        if step % 2:
            outputs.append(context)
        outputs.append(memory.context(weights * weights, spans=span))
    outputs.append(memory.context(torch.ones_like(weights)))
    several = memory.attend(queries, need_weights=True)[1]
    return loss_of(*outputs, memory.context(several * 3))


@pytest.mark.parametrize("names", [["query", "keys", "values", "v"], ["values"], ["query"], ["keys"]], ids=str)
@pytest.mark.parametrize("with_spans", [False, True])
@each_heads
@each_family
def test_among_steps(family: str, heads: int, with_spans: bool, names: list[str], backend: str) -> None:
    """Mixed with steps, whichever inputs train, gradients are those of the undeferred formulae."""
    case = build_for_memory(family, Dims(3, 4, 9, 7, 6, heads), torch.float64, hidden="both")
    drawn = hide("spans", Dims(3, 3, 9), torch.Generator().manual_seed(1))["spans"]
    spans = [*drawn.unbind(1), None] if with_spans else [None] * 4
    outcomes = []
    for named in (backend, "reference"):
        leaves = with_leaves(case, [name for name in names if name in case.inputs()])
        sharpened(remember(leaves, named), leaves.query, spans).backward()
        outcomes.append(gradients(leaves))
    assert_near(*outcomes)


@each_family
def test_undeferred(family: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is deferred, the op carries the same gradients itself; a second derivative is refused."""
    case = build_for_memory(family, Dims(3, 4, 9, 7, 6, 2), torch.float64, hidden="both")
    spans = [*hide("spans", Dims(3, 3, 9), torch.Generator().manual_seed(1))["spans"].unbind(1), None]
    outcomes = []
    for undefers in (False, True):
        leaves = with_leaves(case)
        memory = remember(leaves, backend)
        if undefers:
            monkeypatch.setattr(memory, "_defers", lambda rows: False)
        sharpened(memory, leaves.query, spans).backward()
        outcomes.append(gradients(leaves))
    assert_near(*outcomes)


def test_retained_graph(backend: str) -> None:
    """The same backward again gives the same bits; values changed in between are an error."""
    case = build_with_spans(Dims(3, 4, 9, 7, 6), torch.float64, "lengths")
    leaves = with_leaves(case)
    values = leaves.values * 1.0
    loss = loss_of(remember(leaves.replace(values=values), backend).context(case.grad_weights))
    (first,) = torch.autograd.grad(loss, [leaves.values], retain_graph=True)
    (second,) = torch.autograd.grad(loss, [leaves.values], retain_graph=True)
    assert torch.equal(first, second)
    if backend != "reference":
        with torch.no_grad():
            values += 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_threads(backend: str, set_threads: Callable[[int], None]) -> None:
    """1, 2 and 3 threads give the same bits."""
    if backend == "reference":
        pytest.xfail("torch's matrix products promise no such thing")
    for hidden in ("both", "spans"):
        case = build_with_spans(Dims(2, 70, 131, 4, 45), torch.float32, hidden)
        for by_step in (False, True):
            set_threads(1)
            expected = of_weights(case, backend, by_step)
            for count in (2, 3):
                set_threads(count)
                assert_same_bits(of_weights(case, backend, by_step), expected)


@pytest.mark.parametrize("dims", [Dims(0, 3, 5), Dims(2, 0, 5), Dims(2, 3, 0), Dims(2, 3, 5, 8, 0), Dims(2, 3, 0, 8, 4, 2)], ids=str)
@pytest.mark.parametrize("hidden", ["none", "lengths", "spans"])
def test_empty_dimensions(dims: Dims, hidden: str, backend: str) -> None:
    """Any dimension may be empty."""
    case = build_with_spans(dims, torch.float32, hidden)
    check_products(of_weights(case, backend, False), case)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Callable[[], Any], backend: str) -> None:
    """Inference gives the bits of training; the other grad mode is refused."""
    case = build_with_spans(Dims(3, 4, 11, 9, 5), torch.float32, "both")
    trains = remember(case, backend)
    expected = trains.context(case.grad_weights)
    with mode():
        found = remember(case, backend).context(case.grad_weights)
        assert not found.requires_grad
        assert torch.equal(found, expected)
        with pytest.raises(RuntimeError, match="grad"):
            trains.context(case.grad_weights)


@pytest.mark.usefixtures("fresh_compiler")
@each_heads
@each_family
def test_compile(family: str, heads: int, backend: str) -> None:
    """A compiled decoder changes its weights in one graph, with eager's gradients."""

    def whole(case: Case, spans: Tensor) -> Tensor:
        return sharpened(remember(case, backend), case.query, [*spans.unbind(1), None])

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(whole, fullgraph=True, backend=counter)
    case = build_for_memory(family, Dims(3, 3, 7, 6, 5, heads), torch.float64, hidden="both")
    spans = hide("spans", Dims(3, 2, 7), torch.Generator().manual_seed(1))["spans"]
    outcomes = []
    for function in (compiled, whole):
        leaves = with_leaves(case)
        function(leaves, spans).backward()
        outcomes.append(gradients(leaves))
    assert_near(*outcomes)
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", ["additive", "general"])
@pytest.mark.parametrize("heads", [1, 2])
def test_dropout_is_deferred(kind: str, heads: int, backend: str) -> None:
    """A layer with dropout gives the values their gradient once, after the last step."""
    if backend == "reference":
        pytest.xfail("the reference defers nothing")
    layer = make_layer(kind, num_heads=heads, dropout=0.5)
    generator = torch.Generator().manual_seed(1)
    queries, states = (torch.randn(3, n, width, generator=generator, dtype=torch.float64) for n, width in ((4, 6), (11, 8)))
    memory = layer.memory(states.requires_grad_(), lengths=torch.tensor([11, 0, 4]))
    contexts = [layer(query, memory)[0] for query in queries.unbind(1)]
    with Calls() as calls:
        loss_of(*contexts).backward()
    assert calls.names.count("source_sums") == (1 if kind == "additive" else 2)
    assert states.grad is not None


PLAIN, HEADS = Dims(2, 3, 5, 8, 4), Dims(2, 3, 5, 8, 4, 2)
WRONG: list[tuple[Dims, Any, type[Exception], str]] = [
    (PLAIN, [[0.0] * 5] * 2, TypeError, "weights must be a torch.Tensor; got list"),
    (PLAIN, torch.zeros(2, 5, dtype=torch.float64), TypeError, "weights must have the dtype of the memory's keys, torch.float32"),
    (PLAIN, torch.zeros(2, 5, device="meta"), ValueError, "weights must be on the device of the memory, cpu; got meta"),
    (PLAIN, torch.zeros(2, 6), ValueError, r"weights must be \[2, 5\].*got \[2, 6\]"),
    (PLAIN, torch.zeros(3, 5), ValueError, r"weights must be \[2, 5\].*got \[3, 5\]"),
    (PLAIN, torch.zeros(2, 3, 6), ValueError, r"weights must be \[2, 5\].*got \[2, 3, 6\]"),
    (PLAIN, torch.zeros(5), ValueError, r"weights must be \[2, 5\].*got \[5\]"),
    (HEADS, torch.zeros(2, 5), ValueError, r"weights must be \[2, 2, 5\].*got \[2, 5\]"),
    (HEADS, torch.zeros(2, 3, 3, 5), ValueError, r"weights must be \[2, 2, 5\].*got \[2, 3, 3, 5\]"),
]


@pytest.mark.parametrize(("dims", "weights", "error", "message"), WRONG)
@each_family
def test_errors(family: str, dims: Dims, weights: Any, error: type[Exception], message: str, backend: str) -> None:
    """Weights that do not fit are refused in words that name them."""
    memory = remember(build(family, dims), backend)
    with pytest.raises(error, match=message):
        memory.context(weights)
