"""docs/porting.md: what was trained elsewhere, in the layers and functions here; theirs is written out in plain torch."""

import pathlib
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from memory_cases import sparsemax
from torch import Tensor, nn

import onepass
from onepass import additive_attention, additive_memory, additive_scores, multiplicative_attention, multiplicative_memory

pytestmark = pytest.mark.usefixtures("backend")
PAGE = pathlib.Path(__file__).resolve().parents[1] / "docs" / "porting.md"
B, T, S, Q, K, A, H = 3, 4, 7, 6, 10, 8, 2
LENGTHS = torch.tensor([7, 4, 1])
EMPTY = torch.tensor([7, 0, 1])
SHOWN = torch.arange(S) < LENGTHS[:, None]
PADDING = ~SHOWN
FLOAT_MASK = torch.zeros(B, 1, S, dtype=torch.float64).masked_fill(PADDING[:, None], -torch.inf)

Formula = Callable[[Tensor, Tensor], Tensor]
Case = tuple[str, Formula, Formula, list[Tensor]]  # name, theirs, ours, parameters


def parameter(*sizes: int) -> Tensor:
    return torch.randn(sizes, dtype=torch.float64).requires_grad_()


def states() -> tuple[Tensor, Tensor]:
    return parameter(B, T, Q), parameter(B, S, K)


def softmax(scores: Tensor) -> Tensor:
    """Over ``[B, T, S]``, hidden positions left out."""
    return scores.masked_fill(~SHOWN[:, None], -torch.inf).softmax(-1)


def pairs(query: Tensor, keys: Tensor) -> Tensor:
    return query[:, :, None] + keys[:, None]


def loaded(layer: nn.Module, **parameters: Tensor) -> Callable[..., Tensor]:
    """The layer with these in place of its own parameters, all of them; dots are written as two underscores."""
    given = {name.replace("__", "."): tensor for name, tensor in parameters.items()}
    assert {name: list(tensor.shape) for name, tensor in layer.state_dict().items()} == {n: list(t.shape) for n, t in given.items()}
    return lambda *states: torch.func.functional_call(layer, given, states, {"lengths": LENGTHS})[0]


def cases() -> list[Case]:
    torch.manual_seed(0)
    w_q, w_k, b_q, b_k, v = parameter(A, Q), parameter(A, K), parameter(A), parameter(A), parameter(1, A)
    concat, v_b, g, kernel = parameter(A, Q + K), parameter(1), parameter(), parameter(Q, K)
    per_head = [parameter(1, A // H) for _ in range(H)]
    values_of = [parameter(K // H, K) for _ in range(H)]
    additive = onepass.AdditiveAttention
    projections, vs = {"query_layer__weight": w_q, "key_layer__weight": w_k}, torch.cat(per_head)
    of_heads = loaded(additive(Q, K, A, bias=False, num_heads=H), **projections, v=vs)

    def heads(query: Tensor, memory: Tensor, values: list[Tensor] | None = None) -> Tensor:
        hidden, contexts = torch.tanh(pairs(query @ w_q.T, memory @ w_k.T)), []
        for head in range(H):
            weights = softmax(hidden[..., head * A // H : (head + 1) * A // H] @ per_head[head][0])
            contexts.append(weights @ (memory @ values[head].T if values else memory[..., head * K // H : (head + 1) * K // H]))
        return torch.cat(contexts, -1)

    def own_values(query: Tensor, memory: Tensor) -> Tensor:
        keys, queries = ((x.unflatten(-1, (H, A // H))).transpose(1, 2) for x in (memory @ w_k.T, query @ w_q.T))
        values = torch.cat([memory @ w.T for w in values_of], -1).unflatten(-1, (H, K // H)).transpose(1, 2)
        return additive_attention(queries, keys, values, vs, lengths=LENGTHS)[0].transpose(1, 2).flatten(2)

    def layer_of_own_values(query: Tensor, memory: Tensor) -> Tensor:
        values = torch.cat([memory @ w.T for w in values_of], -1)
        return of_heads(query, memory, values)

    return [
        ("bias on both sides",
         lambda q, m: softmax((torch.tanh(pairs(q @ w_q.T + b_q, m @ w_k.T + b_k)) @ v.T + v_b).squeeze(-1)) @ m,
         loaded(additive(Q, K, A), **projections, query_layer__bias=b_q + b_k, v=v[0]),
         [w_q, w_k, b_q, b_k, v]),
        ("heads", heads, of_heads, [w_q, w_k, *per_head]),
        ("heads with values of their own", lambda q, m: heads(q, m, values_of), layer_of_own_values, [w_q, w_k, *per_head, *values_of]),
        ("the same by the function", lambda q, m: heads(q, m, values_of), own_values, [w_q, w_k, *per_head, *values_of]),
        ("concat", lambda q, m: softmax(torch.tanh(pairs(q @ concat[:, :Q].T, m @ concat[:, Q:].T)) @ v[0]) @ m,
         loaded(additive(Q, K, A, bias=False), query_layer__weight=concat[:, :Q], key_layer__weight=concat[:, Q:], v=v[0]), [concat, v]),
        ("normalised", lambda q, m: softmax(torch.tanh(pairs(q @ w_q.T, m @ w_k.T) + b_q) @ (g * v[0] / v[0].norm())) @ m,
         loaded(additive(Q, K, A, normalize=True), **projections, query_layer__bias=b_q, v=v[0], g=g),
         [w_q, w_k, b_q, v, g]),
        ("general on the key's side", lambda q, m: softmax(q @ (m @ kernel.T).mT + v_b) @ m,
         loaded(onepass.MultiplicativeAttention(Q, K, "general"), query_layer__weight=kernel.T), [kernel]),
        ("both sides projected", lambda q, m: softmax(0.3 * torch.tanh(q @ w_q.T) @ torch.tanh(m @ w_k.T).mT) @ m,
         lambda q, m: multiplicative_attention(torch.tanh(q @ w_q.T), torch.tanh(m @ w_k.T), m, scale=0.3, lengths=LENGTHS)[0], [w_q, w_k]),
        ("OpenNMT-py", lambda q, m: softmax((torch.tanh(pairs(q @ w_q.T + b_q, m @ w_k.T)) @ v.T).squeeze(-1)) @ m,
         loaded(additive(Q, K, A), **projections, query_layer__bias=b_q, v=v[0]), [w_q, w_k, b_q, v]),
        ("scaled", lambda q, m: softmax(0.3 * torch.tanh(pairs(q @ w_q.T, m @ w_k.T)) @ v[0]) @ m,
         lambda q, m: additive_attention(q @ w_q.T, m @ w_k.T, m, 0.3 * v[0], lengths=LENGTHS)[0], [w_q, w_k, v]),
        ("weights alone", lambda q, m: softmax(torch.tanh(pairs(q @ w_q.T, m @ w_k.T)) @ v[0]),
         lambda q, m: additive_attention(q @ w_q.T, m @ w_k.T, m[..., :0], v[0], lengths=LENGTHS, need_weights=True)[1], [w_q, w_k, v]),
        ("scores alone", lambda q, m: torch.tanh(pairs(q @ w_q.T, m @ w_k.T)) @ v[0] * SHOWN[:, None],
         lambda q, m: pointed_at(q @ w_q.T, m @ w_k.T, m[..., :0], v[0]), [w_q, w_k, v]),
        ("keys as values", lambda q, m: softmax(torch.tanh(pairs(q @ w_q.T, m @ w_k.T)) @ v[0]) @ (m @ w_k.T),
         lambda q, m: glimpsed(q @ w_q.T, m @ w_k.T, v[0]), [w_q, w_k, v]),
        ("a mask of padding", lambda q, m: softmax(torch.tanh(pairs(q @ w_q.T, m @ w_k.T)) @ v[0]) @ m,
         lambda q, m: additive_attention(q @ w_q.T, m @ w_k.T, m, v[0], mask=~PADDING[:, None])[0], [w_q, w_k, v]),
        ("a float mask", lambda q, m: (q @ (m @ kernel.T).mT + FLOAT_MASK).softmax(-1) @ m,
         lambda q, m: multiplicative_attention(q, m @ kernel.T, m, mask=FLOAT_MASK == 0)[0], [kernel]),
        ("time first", lambda q, m: softmax(torch.tanh(pairs(q @ w_q.T, m @ w_k.T)) @ v[0]) @ m,
         lambda q, m: of_time_first(q, m.transpose(0, 1).contiguous(), w_q, w_k, v[0]), [w_q, w_k, v]),
    ]  # fmt: skip


def of_time_first(query: Tensor, memory: Tensor, w_q: Tensor, w_k: Tensor, v: Tensor) -> Tensor:
    values = memory.transpose(0, 1)
    return additive_attention(query @ w_q.T, values @ w_k.T, values, v, lengths=LENGTHS)[0]


def pointed_at(query: Tensor, keys: Tensor, values: Tensor, v: Tensor) -> Tensor:
    return additive_memory(keys, values, v, lengths=LENGTHS).scores(query).masked_fill(PADDING[:, None], 0)


def glimpsed(query: Tensor, keys: Tensor, v: Tensor) -> Tensor:
    return additive_memory(keys, keys, v, lengths=LENGTHS).attend(query)[0]


@pytest.mark.parametrize("case", cases(), ids=lambda case: case[0])
def test_rows(case: Case) -> None:
    """Results, and gradients of states and parameters."""
    _, theirs, ours, parameters = case
    torch.manual_seed(1)
    given = states()
    found, expected = ours(*given), theirs(*given)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    upstream = torch.randn_like(expected)
    inputs = [*given, *parameters]
    gradients = [torch.autograd.grad(output, inputs, upstream, allow_unused=True, retain_graph=True) for output in (found, expected)]
    for got, want in zip(*gradients, strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def given() -> dict[str, Any]:
    """What the page's code has."""
    torch.manual_seed(2)
    keys, values, prior = parameter(B, S, A), parameter(B, S, K), torch.rand(B, S, dtype=torch.float64) + 0.1
    w1, of_query, of_coverage = parameter(A, K), parameter(A, A), parameter(K, 1)
    return {
        "torch": torch, "additive_attention": additive_attention, "additive_scores": additive_scores, "sparsemax": sparsemax,
        "multiplicative_attention": multiplicative_attention, "multiplicative_memory": multiplicative_memory,
        "query": parameter(B, T, A), "keys": keys, "values": values, "v": parameter(A), "lengths": LENGTHS, "prior": prior,
        "encoder_states": parameter(B, S, K), "w1": w1, "w2": parameter(T, A), "bias": parameter(A), "u": parameter(A),
        "n": 2, "temperature": 1.5,
        "chosen": (torch.arange(S) % 3 == 1).repeat(B, 1), "previous_weights": softmax(torch.zeros(B, 1, S, dtype=torch.float64))[:, 0],
        "memory": multiplicative_memory(keys, values, lengths=LENGTHS),
        "of_query": of_query, "of_coverage": of_coverage, "coverage": torch.rand(B, S, dtype=torch.float64),
        "linear_query": lambda x: x @ of_query.T, "linear_context": lambda x: x @ w1.T, "linear_cover": lambda x: x @ of_coverage.T,
        "convolution": lambda weights: weights.unsqueeze(-1) * torch.linspace(0, 1, A, dtype=torch.float64),
    }  # fmt: skip


def located(x: dict[str, Any]) -> Tensor:
    feature = x["convolution"](x["previous_weights"]) if "feature" not in x else x["feature"]
    return softmax(torch.tanh(pairs(x["query"], x["keys"] + feature)) @ x["v"]) @ x["values"]


def beams(x: dict[str, Any]) -> Tensor:
    return torch.cat([located({**x, "query": x["query"][:, k : k + 1], "feature": x["features"][:, k]}) for k in range(T)], 1)


def covered(x: dict[str, Any]) -> Tensor:
    bank = torch.tanh(x["encoder_states"] + x["coverage"][..., None] * x["of_coverage"][:, 0])
    return softmax(torch.tanh(pairs(x["query"] @ x["of_query"].T, bank @ x["w1"].T)) @ x["v"]) @ bank


def clipped(x: dict[str, Any]) -> Tensor:
    return softmax(10 * torch.tanh(torch.tanh(pairs(x["query"], x["keys"])) @ x["v"])) @ x["values"]


def clipped_pointer(x: dict[str, Any]) -> Tensor:
    scores = (x["query"][:, 0, None] @ x["keys"].mT)[:, 0].masked_fill(PADDING, -torch.inf)
    return (10 * torch.tanh(scores) / x["temperature"]).exp() * ~(x["chosen"] | PADDING)


def with_prior(x: dict[str, Any]) -> Tensor:
    return softmax(x["query"] @ x["keys"].mT + x["prior"].log()[:, None]) @ x["values"]


def sparse(x: dict[str, Any]) -> Tensor:
    return sparsemax((x["query"] @ x["keys"].mT).masked_fill(PADDING[:, None], -torch.inf)) @ x["values"]


def pointed(x: dict[str, Any]) -> Tensor:
    scores = (x["query"][:, :1] @ x["keys"].mT).masked_fill(x["chosen"][:, None], -torch.inf)
    return (softmax(scores) @ x["values"])[:, 0]


def shrunk(x: dict[str, Any]) -> Tensor:
    return (softmax(x["query"][:, :1] @ x["keys"].mT) @ x["values"])[: x["n"], 0]


def pooled_by_one(x: dict[str, Any]) -> Tensor:
    scores = torch.tanh(x["encoder_states"] @ x["w1"].T + x["bias"]) @ x["u"]
    return (softmax(scores[:, None]) @ x["encoder_states"])[:, 0]


def pooled(x: dict[str, Any]) -> Tensor:
    scores = torch.tanh(x["encoder_states"] @ x["w1"].T) @ x["w2"].T
    return softmax(scores.mT) @ x["encoder_states"]


# Of each block of code but the first, which is a function that others call, and those of export, which tests/test_server.py and
# tests/test_decompositions.py run.
EXPECTED = [
    located, located, beams, covered, clipped, clipped_pointer, with_prior, with_prior, sparse, pointed, shrunk, pooled_by_one, pooled,
]  # fmt: skip
each_block = pytest.mark.parametrize("number", range(len(EXPECTED)), ids=lambda number: EXPECTED[number].__name__)


def run(number: int, **others: Any) -> dict[str, Any]:
    """What there is after a block."""
    first, *blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    blocks = [block for block in blocks if "torch.export" not in block]
    assert len(blocks) == len(EXPECTED)
    names = {**given(), **others}
    exec(first, names)
    if EXPECTED[number] is located:
        names["query"] = names["query"][:, :1]
    if EXPECTED[number] is beams:
        names["previous_weights"] = softmax(torch.randn(B, T, S, dtype=torch.float64))
    exec(blocks[number], names)
    return names


def outcome(names: dict[str, Any]) -> Tensor:
    """What a block is for: a context, weights of values, or logits, of which exp makes 0 where they are hidden."""
    if "logits" in names:
        return names["logits"].exp()
    return names["context"] if "context" in names else names["weights"] @ names["values"]


def leaves_of(names: dict[str, Any]) -> list[Tensor]:
    return [x for x in names.values() if isinstance(x, Tensor) and x.is_leaf and x.requires_grad]


@each_block
def test_code(number: int) -> None:
    """The page's code, block by block, and its gradients."""
    names = run(number)
    found = outcome(names)
    expected = EXPECTED[number](names)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    inputs = leaves_of(names)
    upstream = torch.randn_like(expected)
    gradients = [torch.autograd.grad(output, inputs, upstream, allow_unused=True, retain_graph=True) for output in (found, expected)]
    assert any(want is not None for want in gradients[1])
    for got, want in zip(*gradients, strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@each_block
def test_code_over_a_source_that_is_empty(number: int) -> None:
    """What is learned before and in it, a factor of the scores too, gets a gradient, and nowhere is a NaN, not even on the way."""
    names = given()
    factor = parameter(A)
    others = {
        "convolution": lambda weights: weights.unsqueeze(-1) * factor,
        "lengths": EMPTY,
        "memory": multiplicative_memory(names["keys"], names["values"], lengths=EMPTY),
        "prior": names["prior"].requires_grad_(),
    }
    with torch.autograd.set_detect_anomaly(True):
        names = run(number, **{**names, **others})
        found = outcome(names)
        found.square().sum().backward()
    assert (found[1] == 0).all()
    gradients = [x.grad for x in (*leaves_of(names), factor) if x.grad is not None]
    assert len(gradients) >= 2
    assert all(torch.isfinite(tensor).all() for tensor in (found, *gradients))


def test_changed_scores() -> None:
    """A learned temperature and a dropout leave nothing hidden in, and no NaN; one that is seen stays."""
    names = run(0)
    scores = additive_scores(names["query"], names["keys"], names["v"], lengths=EMPTY)
    hidden, temperature = scores == -torch.inf, parameter()
    changed = nn.functional.dropout(temperature * scores.masked_fill(hidden, 0), 0.5)
    with torch.autograd.set_detect_anomaly(True):
        weights = names["softmax_of_seen"](changed, hidden)
        weights[..., 0].sum().backward()
    assert torch.equal(weights == 0, hidden)
    torch.testing.assert_close(weights.sum(-1), (~hidden).any(-1).double())
    assert temperature.grad is not None
    assert torch.isfinite(temperature.grad)
    query = names["query"].detach().clone()
    query[0, 0] = torch.nan
    scores = additive_scores(query, names["keys"], names["v"], lengths=EMPTY)
    assert names["softmax_of_seen"](scores, scores == -torch.inf)[0, 0].isnan().all()


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
def test_torchscript() -> None:
    """Scripts know no arguments by name alone; a trace does."""
    layer = onepass.AdditiveAttention(Q, K, A).requires_grad_(False)
    with pytest.raises(torch.jit.frontend.NotSupportedError, match=r"[Kk]eyword.only"):
        torch.jit.script(layer)
    query, memory = torch.randn(B, T, Q), torch.randn(B, S, K)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is read of shapes while tracing stays so
        traced = torch.jit.trace(lambda *states: layer(*states, need_weights=True), (query, memory))
    for got, expected in zip(traced(2 * query, memory), layer(2 * query, memory, need_weights=True), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated", "ignore::torch.jit.TracerWarning")
def test_a_trace_of_training_through_a_memory() -> None:
    """It defers nothing: a trace has each step's own gradients."""
    inputs = parameter(B, A), parameter(B, S, A), parameter(B, S, K), parameter(A)
    mask = torch.arange(S) % 3 > 0

    def steps(query: Tensor, keys: Tensor, values: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        memory = onepass.additive_memory(keys, values, v, lengths=LENGTHS)
        context, weights = memory.attend(query, need_weights=True)
        return memory.attend(query + context[:, :A], mask=mask)[0], memory.context(weights, mask=mask)

    results, upstream = (torch.jit.trace(steps, inputs)(*inputs), steps(*inputs)), [torch.ones(B, K, dtype=torch.float64)] * 2
    gradients = [torch.autograd.grad(of, inputs, upstream) for of in results]
    for got, expected in zip((*results[0], *gradients[0]), (*results[1], *gradients[1]), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
