"""Spans: the window of the source that each query sees, in the functions, the layers and over a memory."""

import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import FAMILIES, Case, Dims, Results, assert_same_bits, bits, build, call, garbage, hide, outputs_of, results
from memory_cases import (
    assert_near,
    build_for_memory,
    by_step_or_at_once,
    each_family,
    each_heads,
    each_layer,
    gradients,
    layer_states,
    loss_of,
    make_layer,
    next_query,
    remember,
    with_leaves,
)
from tolerance import check
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

KINDS = ("spans", "moving spans", "one span", "all three")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
SHAPES = [
    Dims(1, 1, 1, 1, 1),
    Dims(2, 40, 67, 33, 20),
    Dims(3, 5, 37, 20, 9),
    Dims(1, 150, 70, 24, 33),
    Dims(2, 9, 150, 12, 7, heads=2),
]
each_kind = pytest.mark.parametrize("hidden", KINDS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def masked(case: Case) -> Case:
    """The case with its visibility written out as a boolean mask."""
    return case.replace(lengths=None, spans=None, mask=case.visible())


@pytest.mark.parametrize("dims", SHAPES, ids=str)
@each_kind
@each_dtype
@pytest.mark.parametrize("family", FAMILIES)
def test_results(family: str, dtype: torch.dtype, hidden: str, dims: Dims, backend: str) -> None:
    """Results and gradients are within the tolerances of every other call."""
    case = build(family, dims, dtype, hidden=hidden)
    check(results(case, backend), case)


@pytest.mark.parametrize("span", ["wide", "cancelling 60", "one channel cancelling", "huge", "tiny", "mixed channels"])
@pytest.mark.parametrize("hidden", ["spans", "moving spans"])
@pytest.mark.parametrize("family", FAMILIES)
def test_ranges(family: str, hidden: str, span: str, backend: str) -> None:
    """So they are where exponentials overflow or cancel."""
    case = build(family, Dims(2, 21, 37, 24, 10), hidden=hidden, span=span)
    check(results(case, backend), case)


@pytest.mark.parametrize("dims", SHAPES[1::3], ids=str)
@each_kind
@each_dtype
@pytest.mark.parametrize("family", FAMILIES)
def test_spans_are_a_mask(family: str, dtype: torch.dtype, hidden: str, dims: Dims, backend: str, isa: str) -> None:
    """Outputs have the bits that the equivalent mask gives; gradients, whose sums go by groups of queries, are within its tolerance."""
    case = build(family, dims, dtype, hidden=hidden)
    found, expected = call(case, backend), call(masked(case), backend)
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(bits(got), bits(want))
    check(results(masked(case), backend), case)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@each_kind
@each_dtype
@pytest.mark.parametrize("family", FAMILIES)
def test_windows_only(family: str, dtype: torch.dtype, hidden: str, bad: float, backend: str, isa: str) -> None:
    """What lies outside of every window is not read: garbage there changes no bit, forward or backward, and has gradients of 0."""
    case = build(family, Dims(3, 24, 90, 20, 9), dtype, hidden=hidden)
    if hidden == "spans":
        case = case.replace(spans=case.spans // 4 + 30)
    found = results(garbage(case, bad), backend)
    assert_same_bits(found, results(garbage(case, 0.0), backend))
    unseen = ~case.visible().any(-2)
    assert unseen.any()
    for name in ("d_keys", "d_values"):
        if name in found:
            assert not found[name][unseen].any(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_window_of_one_query(family: str, backend: str, isa: str, request: pytest.FixtureRequest) -> None:
    """NaN in one query's window leaves every bit of the others alone, whose windows lie beside it."""
    if backend == "reference":
        request.applymarker(pytest.mark.xfail(reason="eager's products take 0 * NaN as NaN"))
    first = torch.arange(30)[None, :, None]
    case = build(family, Dims(1, 30, 34, 20, 9)).replace(spans=torch.cat([first, first + 4], -1), grad_weights=torch.zeros(1, 30, 34))
    bad = torch.tensor([17])
    dirty = case.replace(keys=case.keys.index_fill(1, bad, torch.nan), values=case.values.index_fill(1, bad, torch.nan))
    clean, found = results(case, backend), results(dirty, backend)
    others = (torch.arange(30) < 14) | (torch.arange(30) > 17)
    for name in (*outputs_of(case), "d_query"):
        assert torch.equal(bits(found[name][:, others]), bits(clean[name][:, others])), name
    assert found[outputs_of(case)[0]][:, ~others].isnan().any(-1).all()


@each_heads
@pytest.mark.parametrize("family", FAMILIES)
def test_empty_spans(family: str, heads: int, backend: str) -> None:
    """A query whose span holds nothing gets zeros and gives none, wherever the span stands; scores are -inf."""
    case = build(family, Dims(2, 4, 5, 8, 4, heads)).replace(spans=torch.tensor([[[0, 0], [5, 5], [4, 1], [1, 4]]] * 2))
    found = results(case, backend)
    check(found, case)
    blind = slice(0, 3)
    if family == "scores":
        assert (found["scores"][..., blind, :] == -torch.inf).all()
    else:
        assert not found["context"][..., blind, :].any()
        assert not found["weights"][..., blind, :].any()
    assert not found["d_query"][..., blind, :].any()
    nothing = case.replace(spans=torch.zeros(2, 4, 2, dtype=torch.int64))
    assert all(not grad.any() for name, grad in results(nothing, backend).items() if name.startswith("d_"))


@pytest.mark.parametrize("dims", [Dims(0, 3, 5), Dims(2, 0, 5), Dims(2, 3, 0), Dims(2, 3, 5, 0), Dims(2, 3, 5, 8, 0)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_empty_dimensions(family: str, dims: Dims, backend: str) -> None:
    """Any dimension may be empty."""
    case = build(family, dims, hidden="spans")
    check(results(case, backend), case)


@each_heads
@pytest.mark.parametrize("family", FAMILIES)
def test_one_step(family: str, heads: int, backend: str) -> None:
    """``[B, 2]`` for one query; int32 and any strides give the bits of contiguous int64."""
    case = build(family, Dims(3, 1, 11, 8, 4, heads), hidden="spans")
    stepped = case.replace(query=case.query.squeeze(-2), spans=case.spans.squeeze(1))
    strided = stepped.replace(spans=torch.stack([stepped.spans, stepped.spans], -1)[..., 0])
    for other in (stepped, strided, stepped.replace(spans=stepped.spans.int())):
        for got, want in zip(call(other, backend), call(case, backend), strict=True):
            assert torch.equal(bits(got), bits(want.squeeze(-2)))


@pytest.mark.parametrize("dims", [Dims(1, 131, 67, 19, 40), Dims(1, 1, 1031, 24, 40), Dims(2, 9, 37, 24, 10, heads=3)], ids=str)
@each_kind
@pytest.mark.parametrize("family", FAMILIES)
def test_threads(family: str, dims: Dims, hidden: str, backend: str, isa: str, set_threads: Callable[[int], None]) -> None:
    """1, 2 and 3 threads give the same bits."""
    if backend == "reference":
        pytest.xfail("torch's matrix products promise no such thing")
    case = build(family, dims, hidden=hidden)
    set_threads(1)
    expected = results(case, backend)
    for count in (2, 3):
        set_threads(count)
        assert_same_bits(results(case, backend), expected)


@pytest.mark.of_cpp
def test_groups_that_grow(backend: str, set_threads: Callable[[int], None]) -> None:
    """A thread that is new to the kernels needs a little more memory for each group of queries than for all before."""
    set_threads(1)
    spans = torch.zeros(4, 160, 2, dtype=torch.int64)
    spans[0, :, 1] = torch.arange(160) * 2 + 5
    spans[0, 1::2] = torch.tensor([399, 400])
    case = build("additive", Dims(4, 160, 400, 20000, 4), torch.float64).replace(spans=spans)
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(call(case, backend)[0]))
    thread.start()
    thread.join()
    assert found[0].isfinite().all()


@pytest.mark.usefixtures("fresh_compiler")
@each_heads
@pytest.mark.parametrize("family", FAMILIES)
def test_compile(family: str, heads: int, backend: str) -> None:
    """``torch.compile`` takes spans, beside lengths too, in one graph, whatever T and S are."""
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(lambda case: call(case, backend), fullgraph=True, dynamic=True, backend=counter)
    compiled_at_first = 0
    for steps, source in [(3, 5), (4, 9), (7, 6)]:
        case = build(family, Dims(2, steps, source, 8, 6, heads), hidden="all three")
        leaves = with_leaves(case)
        outputs = function(leaves)
        torch.autograd.backward(outputs, [case.grad_weights] if family == "scores" else [case.grad_context, case.grad_weights])
        found = {name: output.detach() for name, output in zip(outputs_of(case), outputs, strict=True)}
        check({**found, **{f"d_{name}": grad for name, grad in gradients(leaves).items()}}, case)
        compiled_at_first = compiled_at_first or counter.frame_count
    assert counter.frame_count == compiled_at_first


of_cpp = pytest.mark.of_cpp  # the Triton kernels clamp what is out of range
PLAIN, HEADS = Dims(2, 3, 5, 8, 4), Dims(2, 3, 5, 8, 4, 2)
WRONG: list[Any] = [
    ([[0, 5]], TypeError, "spans must be a torch.Tensor of integers; got list"),
    (torch.zeros(2, 3, 2), TypeError, "spans must be int64 or int32; got torch.float32"),
    (torch.zeros(2, 3, 2, dtype=torch.bool), TypeError, "spans must be int64 or int32; got torch.bool"),
    (torch.zeros(2, 3, 2, dtype=torch.int64, device="meta"), ValueError, "spans must be on the device of query, cpu; got meta"),
    (torch.zeros(2, 2, dtype=torch.int64), ValueError, "spans must be [B, T, 2] = [2, 3, 2]; got [2, 2]"),
    (torch.zeros(2, 3, dtype=torch.int64), ValueError, "spans must be [B, T, 2] = [2, 3, 2]; got [2, 3]"),
    (torch.zeros(2, 3, 3, dtype=torch.int64), ValueError, "spans must be [B, T, 2] = [2, 3, 2]; got [2, 3, 3]"),
    (torch.zeros(2, 1, 2, dtype=torch.int64), ValueError, "spans must be [B, T, 2] = [2, 3, 2]; got [2, 1, 2]"),
    (torch.zeros(2, 2, 3, 2, dtype=torch.int64), ValueError, "spans must be [B, T, 2] = [2, 3, 2]; got [2, 2, 3, 2]"),
    pytest.param(torch.tensor([0, 6]).expand(2, 3, 2), RuntimeError, " must lie in [0, 5], got", marks=of_cpp),
    pytest.param(torch.tensor([-1, 2]).expand(2, 3, 2), RuntimeError, " must lie in [0, 5], got", marks=of_cpp),
    pytest.param(torch.tensor([2, -(2**31)], dtype=torch.int32).expand(2, 3, 2), RuntimeError, " must lie in [0, 5], got", marks=of_cpp),
    pytest.param(torch.tensor([2**40, 2]).expand(2, 3, 2), RuntimeError, " must lie in [0, 5], got", marks=of_cpp),
]


@pytest.mark.parametrize(("spans", "error", "message"), WRONG)
@pytest.mark.parametrize("dims", [PLAIN, HEADS], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_errors(family: str, dims: Dims, spans: Any, error: type[Exception], message: str, backend: str) -> None:
    """What does not fit is refused in words that name it."""
    with pytest.raises(error, match="spans.*" + re.escape(message.removeprefix("spans"))):
        call(build(family, dims).replace(spans=spans), backend)


@pytest.mark.of_cpp
@pytest.mark.parametrize(("lengths", "last"), [([6, 2], 5), ([5, -1], 5), ([3, 3], 7), ([0, 0], 6)])
@pytest.mark.parametrize("per_query", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_errors_beside_lengths(family: str, per_query: bool, lengths: list[int], last: int, backend: str) -> None:
    """Neither lengths nor spans hide that the other is out of range; the message quotes the number."""
    given = torch.tensor(lengths)
    case = build(family, PLAIN).replace(lengths=given[:, None].expand(2, 3) if per_query else given, spans=torch.full((2, 3, 2), last))
    bad = next(number for number in (*lengths, last) if not 0 <= number <= 5)
    with pytest.raises(RuntimeError, match=rf" must lie in \[0, 5\], got .*{bad}"):
        call(case.replace(spans=torch.stack([torch.zeros(2, 3, dtype=torch.int64), case.spans[..., 0]], -1)), backend)


# Layers


@each_layer
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("one_step", [False, True])
@pytest.mark.parametrize("over", ["states", "memory"])
def test_layers(kind: str, heads: int, one_step: bool, over: str, backend: str) -> None:
    """A layer takes spans with its query, over states or a memory, and gives what it gives under the equivalent mask."""
    layer = make_layer(kind, num_heads=heads)
    queries, states, lengths = (tensor.requires_grad_(tensor.is_floating_point()) for tensor in layer_states(kind))
    query = queries[:, 0] if one_step else queries
    spans = torch.tensor([[[2, 5], [0, 11], [3, 3], [9, 11]], [[0, 4]] * 4, [[0, 3], [2, 9], [8, 9], [1, 2]]])
    positions = torch.arange(11)
    mask = (positions >= spans[..., :1]) & (positions < spans[..., 1:])
    spans, mask = (spans[:, 0], mask[:, :1]) if one_step else (spans, mask)
    leaves = [queries, states, *layer.parameters()]
    outcomes = []
    for mine in (True, False):
        if mine and over == "memory":
            outputs = layer(query, layer.memory(states, lengths=lengths), spans=spans, need_weights=True)
        else:
            outputs = layer(query, states, lengths=lengths, need_weights=True, **({"spans": spans} if mine else {"mask": mask}))
        grads = torch.autograd.grad(loss_of(*outputs), leaves, allow_unused=True)
        outcomes.append({"context": outputs[0], "weights": outputs[1], **{str(i): g for i, g in enumerate(grads) if g is not None}})
    assert_near(*outcomes)


@each_layer
@pytest.mark.parametrize("over", ["states", "memory"])
def test_dropout(kind: str, over: str, backend: str) -> None:
    """Dropout drops weights of the window; NaN outside of the windows reaches neither context nor gradients."""
    layer = make_layer(kind, dropout=0.5)
    queries, states, _ = layer_states(kind)
    spans = torch.tensor([3, 8]).expand(3, 4, 2)
    outside = ((torch.arange(11) < 3) | (torch.arange(11) >= 8))[:, None]
    dirty = states.masked_fill(outside, torch.nan)
    found = []
    for values in (states, dirty):
        torch.manual_seed(3)
        query = queries.clone().requires_grad_()
        target = layer.memory(states, values) if over == "memory" else states
        context, weights = layer(query, target, None if over == "memory" else values, spans=spans, need_weights=True)
        assert not weights[..., outside.squeeze()].any()
        (grad,) = torch.autograd.grad(loss_of(context), [query])
        found.append({"context": context.detach(), "weights": weights.detach(), "grad": grad})
    assert_near(*found)


# Memories


def steps_of(case: Case, count: int) -> list[Any]:
    """Spans ``[B, 2]`` of each step, of windows that move along the source; the last step has none."""
    source = case.keys.shape[-2]
    drawn = hide("spans", Dims(case.keys.shape[0], count, source), torch.Generator().manual_seed(5))["spans"]
    return [*drawn.unbind(1)[:-1], None]


def over_memory(case: Case, backend: str, by_step: bool) -> Results:
    """Outputs and gradients of the case's queries over its memory, with its spans."""
    leaves = with_leaves(case)
    memory = remember(leaves, backend)
    if by_step:
        pairs = zip(leaves.query.unbind(-2), case.spans.unbind(1), strict=True)
        steps = [memory.attend(query, need_weights=True, spans=spans) for query, spans in pairs]
        context, weights = (torch.stack(parts, -2) for parts in zip(*steps, strict=True))
    else:
        context, weights = memory.attend(leaves.query, need_weights=True, spans=case.spans)
    torch.autograd.backward([context, weights], [case.grad_context, case.grad_weights])
    found = {"context": context.detach(), "weights": weights.detach()}
    return {**found, **{f"d_{name}": grad for name, grad in gradients(leaves).items()}}


@by_step_or_at_once
@pytest.mark.parametrize("own", ["none", "both", "per head"])
@pytest.mark.parametrize("kind", ["spans", "moving spans", "one span"])
@each_dtype
@each_heads
@each_family
def test_memory(family: str, heads: int, dtype: torch.dtype, kind: str, own: str, by_step: bool, backend: str) -> None:
    """Steps with spans over a memory, with lengths and a mask of its own, are the function's, gradients included."""
    dims = Dims(4, 6, 41, 20, 13, heads)
    case = build_for_memory(family, dims, dtype, hidden=own if heads or own != "per head" else "both")
    case = case.replace(**hide(kind, dims, torch.Generator().manual_seed(1)))
    check(over_memory(garbage(case, torch.nan), backend, by_step), case)


@by_step_or_at_once
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@each_family
def test_memory_windows_only(family: str, bad: float, by_step: bool, backend: str, isa: str) -> None:
    """Over a memory too, garbage outside of all windows changes no bit, and what the memory prepared of it is not read."""
    case = build_for_memory(family, Dims(3, 5, 90, 20, 9, 2), hidden="both")
    case = case.replace(spans=torch.stack([torch.arange(5) * 6 + 20, torch.arange(5) * 6 + 29], -1).expand(3, 5, 2))
    found = over_memory(garbage(case, bad), backend, by_step)
    assert_same_bits(found, over_memory(garbage(case, 0.0), backend, by_step))
    unseen = ~case.visible().any(-2)
    assert not found["d_keys"][unseen].any()
    assert not found["d_values"][unseen].any()
    assert not found["weights"][~case.visible()].any()


def chained(attend: Callable[..., Any], queries: Tensor, spans: list[Any]) -> Tensor:
    """A recurrent decoder whose steps see the spans given, if any."""
    state, outputs = queries[..., 0, :], []
    for step, span in enumerate(spans):
        context, weights = attend(state, need_weights=True, spans=span)
        outputs += [context, weights]
        state = next_query(queries[..., step, :], context)
    return loss_of(*outputs)


@pytest.mark.parametrize("hidden", ["none", "lengths", "both"])
@each_heads
@each_family
def test_steps_with_and_without_spans(family: str, heads: int, hidden: str, backend: str) -> None:
    """Steps with spans, a step without and several queries at once share one deferred backward."""
    case = build_for_memory(family, Dims(3, 4, 9, 7, 6, heads), torch.float64, hidden=hidden)
    spans, many = steps_of(case, 4), hide("spans", Dims(3, 4, 9), torch.Generator().manual_seed(9))["spans"]
    outcomes = []
    for deferred in (True, False):
        leaves = with_leaves(case)
        if deferred:
            attend: Callable[..., Any] = remember(leaves, backend).attend
        else:

            def attend(query: Tensor, need_weights: bool = False, spans: Any = None, leaves: Case = leaves) -> Any:
                return call(leaves.replace(query=query, spans=spans), "reference", need_weights=need_weights)

        loss = chained(attend, leaves.query, spans) + loss_of(attend(leaves.query, spans=many)[0], attend(leaves.query)[0])
        loss.backward()
        outcomes.append(gradients(leaves))
    assert_near(*outcomes)


@each_family
def test_deferred_is_undeferred(family: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients that each step computes by itself are those of the deferred backward."""
    case = build_for_memory(family, Dims(3, 4, 9, 7, 6, 2), torch.float64, hidden="both")
    outcomes = []
    for undefers in (False, True):
        leaves = with_leaves(case)
        memory = remember(leaves, backend)
        if undefers:
            monkeypatch.setattr(memory, "_defers", lambda rows: False)
        chained(memory.attend, leaves.query, steps_of(case, 4)).backward()
        outcomes.append(gradients(leaves))
    assert_near(*outcomes)


@each_family
def test_memory_threads(family: str, backend: str, set_threads: Callable[[int], None]) -> None:
    """1, 2 and 3 threads give the same bits through a memory."""
    if backend == "reference":
        pytest.xfail("torch's matrix products promise no such thing")
    case = build_for_memory(family, Dims(2, 40, 131, 24, 40), hidden="lengths")
    case = case.replace(**hide("spans", Dims(2, 40, 131), torch.Generator().manual_seed(1)))
    for by_step in (False, True):
        set_threads(1)
        expected = over_memory(case, backend, by_step)
        for count in (2, 3):
            set_threads(count)
            assert_same_bits(over_memory(case, backend, by_step), expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@each_family
def test_memory_without_gradients(family: str, mode: Callable[[], Any], backend: str) -> None:
    """Inference gives the bits of training; a selection of rows takes spans of its own."""
    case = build_for_memory(family, Dims(3, 4, 11, 9, 5), hidden="both")
    spans = torch.tensor([[0, 4], [2, 9], [5, 11]])
    expected = remember(case, backend).attend(case.query[:, 0], spans=spans)[0]
    with mode():
        memory = remember(case, backend)
        assert torch.equal(memory.attend(case.query[:, 0], spans=spans)[0], expected)
        rows = torch.tensor([2, 0])
        found = memory.select(rows).attend(case.query[rows, 0], spans=spans[rows])[0]
    torch.testing.assert_close(found, expected[rows])


@each_family
def test_spans_changed_in_place(family: str, backend: str) -> None:
    """Spans changed between a step and its backward are an error, not another gradient."""
    if backend == "reference":
        pytest.xfail("eager keeps what it made of the spans")
    case = with_leaves(build(family, Dims(2, 3, 5, 8, 4)))
    spans = torch.tensor([[0, 4], [1, 3]])
    context, _ = remember(case, backend).attend(case.query[:, 0], spans=spans)
    spans += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        context.sum().backward()


@pytest.mark.usefixtures("fresh_compiler")
@each_heads
@each_family
def test_memory_compiled(family: str, heads: int, backend: str) -> None:
    """A compiled decoder over a memory takes spans in one graph, once."""

    def whole(case: Case, spans: Tensor) -> Tensor:
        return chained(remember(case, backend).attend, case.query, [*spans.unbind(1), None])

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(whole, fullgraph=True, backend=counter)
    for seed in (0, 1):
        case = build_for_memory(family, Dims(3, 3, 7, 6, 5, heads), torch.float64, hidden="both", seed=seed)
        spans = hide("spans", Dims(3, 2, 7), torch.Generator().manual_seed(seed))["spans"]
        outcomes = []
        for function in (compiled, whole):
            leaves = with_leaves(case)
            function(leaves, spans).backward()
            outcomes.append(gradients(leaves))
        assert_near(*outcomes)
    assert counter.frame_count == 1


MEMORY_WRONG: list[Any] = [
    (True, [[0, 5]] * 2, TypeError, r"spans must be a torch.Tensor of integers; got list"),
    (True, torch.zeros(2, 2), TypeError, r"spans must be int64 or int32; got torch.float32"),
    (True, torch.zeros(3, 2, dtype=torch.int64), ValueError, r"spans must be \[B, 2\] = \[2, 2\] for one step; got \[3, 2\]"),
    (True, torch.zeros(2, 3, 2, dtype=torch.int64), ValueError, r"spans must be \[B, 2\] = \[2, 2\] for one step; got \[2, 3, 2\]"),
    (False, torch.zeros(2, 2, dtype=torch.int64), ValueError, r"spans must be .* = \[2, 3, 2\]; got \[2, 2\]"),
    (True, torch.zeros(2, 2, dtype=torch.int64, device="meta"), ValueError, r"spans must be on the device .*cpu; got meta"),
    pytest.param(True, torch.tensor([[0, 6], [0, 5]]), RuntimeError, r"spans.* must lie in \[0, 5\], got .*6", marks=of_cpp),
    pytest.param(False, torch.tensor([-1, 5]).expand(2, 3, 2), RuntimeError, r"spans.* must lie in \[0, 5\], got .*-1", marks=of_cpp),
]


@pytest.mark.parametrize(("one_step", "spans", "error", "message"), MEMORY_WRONG)
@pytest.mark.parametrize("dims", [PLAIN, HEADS], ids=str)
@each_family
def test_memory_errors(family: str, dims: Dims, one_step: bool, spans: Any, error: type[Exception], message: str, backend: str) -> None:
    """A memory refuses spans that do not fit, of a query or of weights."""
    case = build(family, dims).replace(lengths=torch.tensor([3, 2]))
    memory = remember(case, backend)
    with pytest.raises(error, match=message):
        memory.attend(case.query[..., 0, :] if one_step else case.query, spans=spans)
    with pytest.raises(error, match=message):
        memory.context(case.grad_weights[..., 0, :] if one_step else case.grad_weights, spans=spans)


def test_spans_are_keyword_only(backend: str) -> None:
    """``need_weights`` stays attend's only other positional argument."""
    case = build("additive")
    memory = remember(case, backend)
    with pytest.raises(TypeError):
        memory.attend(case.query, False, torch.zeros(2, 3, 2, dtype=torch.int64))  # type: ignore[call-arg]
