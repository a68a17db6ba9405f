"""``AttentionMemory.scores``: raw scores over a memory, for normalisers other than softmax, and where their gradients go."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import tolerance
import torch
from cases import Case, Dims, Results, assert_same_bits, garbage, hide
from memory_cases import (
    as_stored,
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
    remember,
    sparsemax,
    with_leaves,
    with_masks,
)
from test_memory_context import Calls
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import onepass

HIDDEN = ("none", "lengths", "both", "per head", "nothing", "spans and lengths", "mask and both", "spans, mask and both")


def build_hidden(family: str, dims: Dims, dtype: torch.dtype, hidden: str) -> tuple[Case, Case, Tensor | None]:
    """The memory's case; what its queries see of it in all; and the mask of their own."""
    own = hidden.split(" and ")[-1]
    case = build_for_memory(family, dims, dtype, hidden="both" if own == "per head" and not dims.heads else own)
    seen, mask = with_masks(case) if "mask" in hidden else (case, None)
    if "spans" in hidden:
        seen = seen.replace(**hide("spans", dims, torch.Generator().manual_seed(1)))
    return case, seen, mask


def scored(case: Case, backend: str, by_step: bool, seen: Case | None = None, mask: Tensor | None = None, **options: Any) -> Results:
    """Scores and their gradients, ``grad_weights`` arriving; ``seen`` brings spans, and ``mask`` is that of the queries."""
    leaves, spans = with_leaves(case), None if seen is None else seen.spans
    memory = remember(leaves, backend, **options)
    if by_step:
        queries = leaves.query.unbind(-2)
        windows = [None] * len(queries) if spans is None else spans.unbind(1)
        masks = [None] * len(queries) if mask is None else mask.unbind(-2)
        steps = zip(queries, windows, masks, strict=True)
        scores = torch.stack([memory.scores(query, spans=span, mask=one) for query, span, one in steps], -2)
    else:
        scores = memory.scores(leaves.query, spans=spans, mask=mask)
    scores.backward(case.grad_weights)
    return {"scores": scores.detach(), **{f"d_{name}": grad for name, grad in gradients(leaves).items() if name != "values"}}


def check_scores(found: Results, case: Case) -> None:
    """Additive ones as the contract has them; of products each sum may be off by an eps per term, and by a rounding of the result, or of
    its terms where a GPU rounds factors to a half-width dtype."""
    if case.family == "additive":
        return tolerance.check(found, case.replace(family="scores"))
    wide, visible = case.to(torch.float64), case.visible()
    query, keys = wide.query, wide.keys.masked_fill(~visible.any(-2)[..., None], 0.0)
    grad = case.scale * wide.grad_weights.masked_fill(~visible, 0.0)
    exact = {"scores": case.scale * query @ keys.mT, "d_query": grad @ keys, "d_keys": grad.mT @ query}
    sizes = {"scores": case.scale * query.abs() @ keys.abs().mT, "d_query": grad.abs() @ keys.abs(), "d_keys": grad.abs().mT @ query.abs()}
    eps = torch.finfo(torch.float64 if case.query.dtype == torch.float64 else torch.float32).eps
    rounded = tolerance.factors_are_rounded and case.query.dtype in (torch.bfloat16, torch.float16)
    assert found.keys() == exact.keys()
    for name, want in exact.items():
        got = found[name]
        assert got.dtype == case.query.dtype
        allowed = max(*case.grad_weights.shape[-2:], case.query.shape[-1], 4) * eps * sizes[name]
        allowed = allowed + torch.finfo(got.dtype).eps * (sizes[name] if rounded else want.abs())
        shown = visible if name == "scores" else torch.ones_like(want, dtype=torch.bool)
        assert ((got.double() - want).abs() <= allowed)[shown].all(), name
        assert (got[~shown] == -torch.inf).all(), name


@by_step_or_at_once
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dims", [Dims(4, 6, 41, 20, 3), Dims(2, 3, 67, 5, 4, 2), Dims(1, 20, 300, 36, 1), Dims(1, 1, 2, 1, 0)], ids=str)
@each_family
def test_as_the_formula(family: str, dims: Dims, dtype: torch.dtype, hidden: str, by_step: bool, backend: str) -> None:
    """Whatever the memory hides, or a call's own spans and mask, step by step and at once."""
    case, seen, mask = build_hidden(family, dims, dtype, hidden)
    check_scores(scored(case, backend, by_step, seen, mask), seen)


@by_step_or_at_once
@pytest.mark.parametrize("hidden", HIDDEN[1:])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@each_family
def test_hidden_positions_are_not_read(family: str, bad: float, hidden: str, by_step: bool, backend: str, isa: str) -> None:
    """Garbage in keys that no query sees, and in what arrives at scores of what is not visible, changes no bit."""
    case, seen, mask = build_hidden(family, Dims(4, 5, 37, 20, 3, 2), torch.float32, hidden)
    found = []
    for rubbish in (0.0, bad):
        dirty = case.replace(keys=garbage(seen, rubbish).keys, grad_weights=case.grad_weights.masked_fill(~seen.visible(), rubbish))
        found.append(scored(dirty, backend, by_step, seen, mask))
    assert_same_bits(*found)
    unseen = ~seen.visible().any(-2)[..., None]
    assert not found[1]["d_keys"][unseen.expand_as(case.keys)].any()
    assert not found[1]["d_query"][~seen.visible().any(-1)].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@each_heads
@each_family
def test_softmax_of_scores_is_attend(family: str, heads: int, dtype: torch.dtype, backend: str) -> None:
    """The weights that ``attend`` returns are the softmax of these scores."""
    case = build_for_memory(family, Dims(3, 4, 41, 20, 13, heads), dtype, hidden="lengths")
    memory = remember(case, backend)
    weights = memory.attend(case.query, need_weights=True)[1]
    assert weights is not None
    assert_near({"w": weights}, {"w": memory.scores(case.query).softmax(-1).nan_to_num()})


@each_family
def test_stored_in_bfloat16(family: str, backend: str) -> None:
    """Scores over a memory in bfloat16 are those of the keys that it keeps, and so is what the query gets."""
    case = build_for_memory(family, Dims(3, 4, 41, 20, 3), hidden="both")
    found = scored(case, backend, True, dtype=torch.bfloat16)
    wanted = scored(as_stored(case, backend).to(torch.float64), "reference", True)
    for name in ("scores", "d_query"):
        seen = wanted[name].isfinite()
        assert_near({name: found[name][seen]}, {name: wanted[name][seen]})


def programme(memory: Any, queries: Tensor, spans: list[Any]) -> Tensor:
    """Scores, contexts of weights made of them, and plain steps, of which not all reach the loss."""
    outputs = []
    for step, (query, span) in enumerate(zip(queries.unbind(-2), spans, strict=True)):
        weights = sparsemax(memory.scores(query, spans=span)) if step % 2 else memory.scores(query, spans=span).sigmoid()
        outputs.append(memory.context(weights, spans=span))
        if step == 2:
            outputs += memory.attend(query, need_weights=True, spans=span)
        if step != 1:
            outputs.append(memory.scores(query, spans=span).tanh())
    return loss_of(*outputs, memory.scores(queries).exp(), memory.scores(queries[..., :0, :]))


SPANS = [None, torch.tensor([[1, 6]] * 3), torch.tensor([[0, 9], [4, 4], [2, 3]]), None]


@pytest.mark.parametrize("undefers", [False, True], ids=["deferred", "undeferred"])
@pytest.mark.parametrize("names", [["query", "keys", "values", "v"], ["values"], ["query"], ["keys"], ["v"]], ids=str)
@each_heads
@each_family
def test_among_steps(
    family: str, heads: int, names: list[str], undefers: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mixed with steps and contexts, whichever inputs train, gradients are those of the formulae; so where every op has its own."""
    case = build_for_memory(family, Dims(3, 4, 9, 7, 6, heads), torch.float64, hidden="both")
    outcomes = []
    for taken in (backend, "reference"):
        leaves = with_leaves(case, [name for name in names if name in case.inputs()] or ["query"])
        memory = remember(leaves, taken)
        if undefers:
            monkeypatch.setattr(memory, "_defers", lambda rows: False)
        programme(memory, leaves.query, SPANS).backward()
        outcomes.append(gradients(leaves))
    assert_near(*outcomes)


@each_family
def test_deferred(family: str, backend: str) -> None:
    """A backward through several scores takes one op for each query, and one for the keys of all; values none."""
    if backend == "reference":
        pytest.xfail("the reference defers nothing")
    leaves = with_leaves(build_for_memory(family, Dims(3, 4, 9, 7, 6), torch.float64, hidden="lengths"))
    memory = remember(leaves, backend)
    scores = [memory.scores(query) for query in leaves.query.unbind(1)]
    with Calls() as calls:
        loss_of(*[score.sigmoid() for score in scores]).backward()
    last = {"multiplicative": "source_sums", "additive": "additive_scores_backward"}[family]
    assert {name: calls.names.count(name) for name in set(calls.names)} == {f"{family}_step_backward": 4, "stack_steps": 2, last: 1}
    assert leaves.values.grad is None


@each_family
def test_retained_graph_and_changed_keys(family: str, backend: str) -> None:
    """The same backward again gives the same bits; keys changed in between are an error."""
    leaves = with_leaves(build_for_memory(family, Dims(3, 4, 9, 7, 6), torch.float64, hidden="lengths"))
    keys = leaves.keys * 1.0
    loss = loss_of(remember(leaves.replace(keys=keys), backend).scores(leaves.query).sigmoid())
    first, second = (torch.autograd.grad(loss, [leaves.query, leaves.keys], retain_graph=True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    if backend != "reference":
        with torch.no_grad():
            keys += 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.of_cpp
@each_family
def test_threads(family: str, set_threads: Callable[[int], None], backend: str) -> None:
    """1, 2 and 3 threads give the same bits; so do steps of few sources, which threads share."""
    if backend == "reference":
        pytest.xfail("torch's matrix products promise no such thing")
    for dims in (Dims(2, 70, 131, 40, 1), Dims(1, 3, 700, 240, 1)):
        case = build_for_memory(family, dims, hidden="both")
        for by_step in (False, True):
            set_threads(1)
            expected = scored(case, backend, by_step)
            for count in (2, 3):
                set_threads(count)
                assert_same_bits(scored(case, backend, by_step), expected)


@pytest.mark.parametrize("dims", [Dims(0, 3, 5), Dims(2, 0, 5), Dims(2, 3, 0), Dims(2, 3, 5, 0), Dims(2, 3, 5, 8, 0)], ids=str)
@each_family
def test_empty_dimensions(family: str, dims: Dims, backend: str) -> None:
    """Any dimension may be empty; over no channels scores are 0."""
    check_scores(scored(build_for_memory(family, dims), backend, False), build_for_memory(family, dims))


def test_scaled_before_they_are_rounded(backend: str) -> None:
    """A product beyond float16 whose scale brings it back is a number."""
    if backend == "reference":
        pytest.xfail("eager's formula overflows")
    keys = torch.full((1, 2, 64), 64.0, dtype=torch.float16)
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            memory = onepass.multiplicative_memory(keys, keys[..., :0], scale=0.125, backend=backend)
            assert (memory.scores(keys[:, 0]) == 64 * 64 * 64 / 8).all()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@each_family
def test_without_gradients(family: str, mode: Callable[[], Any], backend: str) -> None:
    """Inference gives the bits of training; the other grad mode is refused; selected rows are those rows."""
    case = build_for_memory(family, Dims(3, 4, 11, 9, 5), hidden="both")
    trains = remember(case, backend)
    expected = trains.scores(case.query)
    with mode():
        memory = remember(case, backend)
        found = memory.scores(case.query)
        assert not found.requires_grad
        assert torch.equal(found, expected)
        rows = torch.tensor([2, 0])
        assert torch.equal(memory.select(rows).scores(case.query[rows]), expected[rows])
        with pytest.raises(RuntimeError, match="grad"):
            trains.scores(case.query)


@pytest.mark.usefixtures("fresh_compiler")
@each_heads
@each_family
def test_compile(family: str, heads: int, backend: str) -> None:
    """A compiled decoder with a normaliser of its own is one graph, with eager's gradients."""

    def whole(case: Case) -> Tensor:
        return programme(remember(case, backend), case.query, SPANS)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(whole, fullgraph=True, backend=counter)
    case = build_for_memory(family, Dims(3, 4, 9, 7, 6, heads), torch.float64, hidden="both")
    outcomes = []
    for function in (compiled, whole):
        leaves = with_leaves(case)
        function(leaves).backward()
        outcomes.append(gradients(leaves))
    assert_near(*outcomes)
    assert counter.frame_count == 1


@each_family
def test_vmap(family: str, backend: str) -> None:
    case = build_for_memory(family, hidden="lengths")
    memory = remember(case, backend)
    found = torch.vmap(memory.scores)(torch.stack([case.query, 2 * case.query]))
    assert_near({"one": found[1].exp()}, {"one": memory.scores(2 * case.query).exp()})


@pytest.mark.parametrize("heads", [1, 2])
@each_layer
def test_layers(kind: str, heads: int, backend: str) -> None:
    """A layer's scores give its weights, and its parameters the gradients of these; in the query's dtype."""
    layer = make_layer(kind, num_heads=heads)
    queries, states, lengths = layer_states(kind)
    queries.requires_grad_()
    mask = torch.rand(3, 4, 11, generator=torch.Generator().manual_seed(2)) < 0.7
    outcomes = []
    for by_scores in (True, False):
        memory = layer.memory(states, lengths=lengths)
        if by_scores:
            weights = layer.scores(queries, memory, mask=mask).softmax(-1).nan_to_num()
            steps = [layer.scores(query, memory, mask=one) for query, one in zip(queries.unbind(1), mask.unbind(1), strict=True)]
            assert_near({"w": torch.stack(steps, -2).softmax(-1).nan_to_num()}, {"w": weights})
        else:
            weights = layer(queries, memory, mask=mask, need_weights=True)[1]
        loss_of(weights.masked_fill(~mask[:, None] if heads > 1 else ~mask, 0.0)).backward()
        named = {name: parameter.grad for name, parameter in layer.named_parameters() if parameter.grad is not None}
        outcomes.append({"weights": weights.detach(), "query": queries.grad, **named})
        layer.zero_grad()
        queries.grad = None
    assert_near(*outcomes)


@each_layer
def test_layers_refuse(kind: str, backend: str) -> None:
    """Encoder states, a memory of the other family, a query of another width: in words."""
    layer = make_layer(kind)
    queries, states, _ = layer_states(kind)
    message = "memory must be what memory(...) made of the encoder states; got Tensor: memory = layer.memory(encoder_states, ...) comes"
    with pytest.raises(TypeError, match=re.escape(message)):
        layer.scores(queries, states)
    other = make_layer("dot" if isinstance(layer, onepass.AdditiveAttention) else "additive")
    with pytest.raises(ValueError, match="layer takes a memory of its own"):
        layer.scores(queries, other.memory(states))
    with pytest.raises(ValueError, match="query must be"):
        layer.scores(queries[..., 1:], layer.memory(states))


@pytest.mark.usefixtures("backend")
def test_layers_under_autocast() -> None:
    """Scores have the dtype that autocast gives the query, over a memory of another."""
    layer = make_layer("general", torch.float32)
    queries, states, _ = layer_states("general", dtype=torch.float32)
    memory = layer.memory(states)
    with torch.autocast("cpu", torch.bfloat16):
        scores = layer.scores(queries, memory)
    assert scores.dtype == torch.bfloat16
    exact = layer.scores(queries, memory)
    moved = queries.detach().norm(dim=-1, keepdim=True) * layer.query_layer.weight.norm() + layer.query_layer.bias.norm()
    # A product of bfloat16 factors, rounded, then the scores themselves: three roundings of at most the norms' product, and one.
    allowed = 4 * torch.finfo(torch.bfloat16).eps * moved * states.norm(dim=-1).unsqueeze(1)
    assert ((scores.float() - exact).abs() <= allowed).all()


@each_family
def test_errors(family: str, backend: str) -> None:
    """As ``attend``'s."""
    memory = remember(build_for_memory(family, Dims(2, 3, 5, 8, 4)), backend)
    for query, error, message in (
        (torch.zeros(2, 7), ValueError, r"query must be \[2, 8\].*got \[2, 7\]"),
        (torch.zeros(2, 8, dtype=torch.float64), TypeError, "query must have the dtype of the memory's keys"),
    ):
        with pytest.raises(error, match=message):
            memory.scores(query)
    with pytest.raises(ValueError, match="mask must broadcast"):
        memory.scores(torch.zeros(2, 8), mask=torch.ones(2, 6, dtype=torch.bool))


@each_family
def test_second_derivatives_are_refused(family: str, backend: str) -> None:
    if backend == "reference":
        pytest.xfail("the reference has them")
    leaves = with_leaves(build_for_memory(family))
    loss = loss_of(remember(leaves, backend).scores(leaves.query).sigmoid())
    (grad,) = torch.autograd.grad(loss, leaves.query, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad.sum().backward()
