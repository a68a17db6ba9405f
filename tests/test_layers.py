"""What both layers share: projections kept elsewhere, they are modules like any other of torch."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from cases import by_eager
from layer_cases import LAYERS, B, K, S, T, each_heads, each_layer, make, states
from tolerance import as_near
from torch import Tensor, nn

import onepass

pytestmark = pytest.mark.usefixtures("backend")


def outcome(layer: nn.Module, kind: str, **options: object) -> tuple[Tensor, ...]:
    """Context, weights, and the gradients of the parameters, query and memory."""
    query, memory, lengths = states(kind, **options)  # type: ignore[arg-type]
    query.requires_grad_()
    memory.requires_grad_()
    context, weights = layer(query, memory, lengths=lengths, need_weights=True)
    grads = torch.autograd.grad(context.square().sum() + weights.square().sum(), [query, memory, *layer.parameters()])
    return context.detach(), weights.detach(), *grads


def assert_equal(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(got, want)


@each_layer
@each_heads
def test_copies(kind: str, heads: int) -> None:
    """deepcopy, pickle, torch.save and a state_dict give a layer with the same results and gradients."""
    layer = make(kind, num_heads=heads)
    expected = outcome(layer, kind)
    assert_equal(outcome(copy.deepcopy(layer), kind), expected)
    assert_equal(outcome(pickle.loads(pickle.dumps(layer)), kind), expected)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert_equal(outcome(torch.load(file, weights_only=False), kind), expected)
    torch.manual_seed(7)
    other = LAYERS[kind](num_heads=heads)
    assert other.load_state_dict(layer.state_dict(), strict=True)
    assert_equal(outcome(other, kind), expected)
    assert set(layer.state_dict()) == {name for name, _ in layer.named_parameters()}


@each_layer
@each_heads
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(kind: str, heads: int, dtype: torch.dtype) -> None:
    """``.to(dtype)`` converts the parameters, and the layer serves inputs of the dtype."""
    layer = make(kind, num_heads=heads).to(dtype)
    assert all(parameter.dtype == dtype for parameter in layer.parameters())
    expected = outcome(make(kind, num_heads=heads), kind)
    for got, want in zip(outcome(layer, kind, dtype=dtype), expected, strict=True):
        assert got.dtype == dtype
        tolerance = {torch.float64: 1e-5, torch.bfloat16: 0.06, torch.float16: 0.01}[dtype]
        torch.testing.assert_close(got.float(), want, rtol=tolerance, atol=tolerance * float(want.abs().max()))


@each_layer
@each_heads
def test_one_step(kind: str, heads: int) -> None:
    """A query ``[B, query_dim]`` gives the results of T = 1 without T; a mask may be ``[B, S]``."""
    layer = make(kind, num_heads=heads)
    query, memory, lengths = states(kind, None)
    context, weights = layer(query, memory, lengths=lengths, need_weights=True)
    for options in ({"lengths": lengths}, {"mask": torch.arange(S) < lengths[:, None]}):
        found, found_weights = layer(query, memory, need_weights=True, **options)
        assert torch.equal(found, context)
        assert torch.equal(found_weights, weights)
    whole, whole_weights = layer(query[:, None], memory, lengths=lengths, need_weights=True)
    assert torch.equal(whole[:, 0], context)
    assert torch.equal(whole_weights.squeeze(-2), weights)
    assert list(context.shape) == [B, K]
    assert list(weights.shape) == ([B, S] if heads == 1 else [B, heads, S])


@each_layer
@each_heads
def test_weights_only_if_asked_for(kind: str, heads: int) -> None:
    """``need_weights`` changes nothing but the second result."""
    layer = make(kind, num_heads=heads)
    query, memory, lengths = states(kind)
    context, weights = layer(query, memory, lengths=lengths)
    assert weights is None
    torch.testing.assert_close(context, layer(query, memory, lengths=lengths, need_weights=True)[0], rtol=1e-6, atol=1e-6)


@each_layer
@each_heads
def test_values_apart_from_the_memory(kind: str, heads: int) -> None:
    """Values of another width; the memory itself where none are given."""
    layer = make(kind, num_heads=heads)
    query, memory, lengths = states(kind)
    context, weights = layer(query, memory, lengths=lengths, need_weights=True)
    assert torch.equal(layer(query, memory, memory, lengths=lengths, need_weights=True)[0], context)
    values = torch.randn(B, S, 4 * heads)
    found, again = layer(query, memory, values, lengths=lengths, need_weights=True)
    assert list(found.shape) == [B, T, 4 * heads]
    assert torch.equal(again, weights)
    per_head = values.view(B, S, heads, 4).transpose(1, 2)
    expected = weights.view(B, heads, T, S) @ per_head
    torch.testing.assert_close(found, expected.transpose(1, 2).flatten(-2))


@each_layer
@each_heads
@pytest.mark.parametrize("hidden", ["padding", "holes"])
def test_masks(kind: str, heads: int, hidden: str) -> None:
    """Masks broadcast over T and, with heads, over H; padding of NaN reaches no result."""
    layer = make(kind, num_heads=heads)
    query, memory, lengths = states(kind)
    mask = (torch.arange(S) < lengths[:, None])[:, None]
    if hidden == "holes":
        mask = mask & (torch.arange(S) % 3 != torch.arange(T)[:, None] % 3)
    expected, weights = layer(query, memory, mask=mask, need_weights=True)
    assert not weights.masked_select(~(mask if heads == 1 else mask[:, None])).any()
    assert not expected[1].any()
    dirty = memory.masked_fill(~mask.any(1)[..., None], torch.nan)
    found = layer(query, dirty, mask=mask, need_weights=True)
    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], weights)


@each_heads
@pytest.mark.parametrize("kind", ["additive", "normalized", "general"])
def test_autocast(kind: str, heads: int) -> None:
    """Under autocast the projections give bf16, the attention serves it, and parameters get float32 gradients."""
    layer = make(kind, num_heads=heads)
    query, memory, lengths = states(kind)
    with torch.autocast("cpu", torch.bfloat16):
        context, weights = layer(query, memory, lengths=lengths, need_weights=True)
        with by_eager():
            eager = layer(query, memory, lengths=lengths, need_weights=True)
    assert context.dtype == weights.dtype == torch.bfloat16
    expected = layer(query, memory, lengths=lengths, need_weights=True)
    as_near((context, weights), eager, expected)
    (context.float().square().sum() + weights.float().square().sum()).backward()
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


@each_layer
@each_heads
@pytest.mark.parametrize("steps", [T, None], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_over_memory(kind: str, heads: int, steps: int | None, dtype: torch.dtype) -> None:
    """Under autocast a layer over its memory gives what it gives over the states, made and used in any dtype, with gradients."""
    layer = make(kind, num_heads=heads)
    query, memory, lengths = states(kind, steps)
    options = {"lengths": lengths, "need_weights": True}
    with torch.autocast("cpu", dtype):
        expected = layer(query, memory, **options)
        found = layer(query, layer.memory(memory, lengths=lengths), need_weights=True)
        of_halves = layer(query, layer.memory(memory.to(dtype), lengths=lengths), need_weights=True)
        half_query = layer(query.to(dtype), layer.memory(memory, lengths=lengths), need_weights=True)
        with by_eager():
            eager = layer(query.to(dtype), memory.to(dtype), **options)
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=2 * torch.finfo(want.dtype).eps, atol=1e-6)
    plain = layer(query, layer.memory(memory, lengths=lengths), need_weights=True)
    for others in (of_halves, half_query):
        as_near(others, eager, plain)
    loss = found[0].float().square().sum() + found[1].float().square().sum()
    for gradient in torch.autograd.grad(loss, list(layer.parameters())) if list(layer.parameters()) else []:
        assert gradient.dtype == torch.float32
        assert gradient.isfinite().all()


@each_heads
@pytest.mark.parametrize("kind", ["dot", "scaled dot", "general"])
def test_states_of_another_dtype_over_memory(kind: str, heads: int) -> None:
    """Encoder states of another dtype than the query: results have the query's, over a memory as over the states."""
    layer = make(kind, num_heads=heads)
    query, memory, lengths = states(kind)
    expected = layer(query, memory.bfloat16(), lengths=lengths, need_weights=True)
    for found, want in zip(layer(query, layer.memory(memory.bfloat16(), lengths=lengths), need_weights=True), expected, strict=True):
        assert found.dtype == want.dtype == query.dtype
        torch.testing.assert_close(found, want, rtol=0.02, atol=0.02)
    if kind != "general":
        with pytest.raises(TypeError, match=r"query must have the dtype of the memory's keys, torch\.float32; got torch\.int64"):
            layer(query.long(), layer.memory(memory))


HIDING: dict[str, dict[str, Tensor]] = {  # source position 8 from queries 0 and 2
    "lengths": {"lengths": torch.tensor([[4, 9, 8, 11]] * B)},
    "spans": {"spans": torch.tensor([[[0, 5], [3, 11], [5, 5], [6, 11]]] * B)},
    "mask": {"mask": torch.arange(S) % 4 != torch.arange(T)[:, None] % 2},
}


@each_layer
@each_heads
@pytest.mark.parametrize("hidden", HIDING)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_dropout_reads_what_is_seen(kind: str, heads: int, hidden: str, bad: float) -> None:
    """With dropout, a value reaches the contexts and gradients of those queries alone that see it: no bit of the others'."""
    layer = make(kind, num_heads=heads, dropout=0.3)
    query, memory, _ = states(kind)
    outcomes = []
    for number in (1.0, bad):
        torch.manual_seed(3)
        asking, values = query.clone().requires_grad_(), memory.index_fill(1, torch.tensor([8]), number).requires_grad_()
        context, weights = layer(asking, memory, values, need_weights=True, **HIDING[hidden])
        of_query, of_values = torch.autograd.grad(context[:, ::2].square().sum(), [asking, values])
        outcomes.append((context[:, ::2], weights, of_query[:, ::2], of_values))
        assert context[:, 1::2].isfinite().any() == (number == 1.0)
    for got, want in zip(*outcomes, strict=True):
        assert torch.equal(got, want)


@each_heads
@pytest.mark.parametrize("one_step", [False, True])
@pytest.mark.parametrize("hidden", ["nothing", *HIDING])
def test_dropout_multiplies(heads: int, hidden: str, one_step: bool) -> None:
    """The context of dropped weights is their product with the values, gradients included; weights of what is hidden stay 0."""
    layer = make("additive", num_heads=heads, dropout=0.5).double()
    query, memory, _ = states("additive", dtype=torch.float64)
    options = {"nothing": {}, **HIDING}[hidden]
    if one_step:
        at = {"lengths": lambda rows: rows[:, 0], "spans": lambda rows: rows[:, 0], "mask": lambda rows: rows[:1]}
        query, options = query[:, 0], {name: at[name](rows) for name, rows in options.items()}
    values = torch.randn(B, S, 2 * heads, dtype=torch.float64).requires_grad_()
    context, weights = layer(query, memory, values, need_weights=True, **options)
    rows = weights.unsqueeze(-2) if one_step else weights
    split = values if heads == 1 else values.view(B, S, heads, 2).transpose(1, 2)
    product = rows @ split
    product = product if heads == 1 else product.transpose(1, 2).flatten(-2)
    product = product.squeeze(1) if one_step else product
    torch.testing.assert_close(context, product)
    inputs, upstream = [values, *layer.parameters()], torch.randn_like(context)
    found, expected = (torch.autograd.grad(output, inputs, upstream, retain_graph=True) for output in (context, product))
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want)


@each_layer
@each_heads
@pytest.mark.parametrize("sizes", [(0, T, S), (B, 0, S), (B, T, 0)], ids=str)
def test_empty(kind: str, heads: int, sizes: tuple[int, int, int]) -> None:
    """Empty batches, targets and sources."""
    query, memory, _ = states(kind)
    layer = make(kind, num_heads=heads)
    batch, steps, source = sizes
    context, weights = layer(query[:batch, :steps], memory[:batch, :source], need_weights=True)
    assert list(context.shape) == [batch, steps, K]
    assert not context.any()
    assert list(weights.shape) == ([batch, steps, source] if heads == 1 else [batch, heads, steps, source])


def test_repr() -> None:
    """``print`` shows what a layer was made with."""
    assert "normalize=True, dropout=0.1, num_heads=2" in repr(make("normalized", dropout=0.1, num_heads=2))
    assert "score='general', dropout=0.1, num_heads=2" in repr(make("general", dropout=0.1, num_heads=2))


@each_layer
@each_heads
def test_made_without_data_and_reset(kind: str, heads: int) -> None:
    """As FSDP and others do: made on meta, given memory, each module that has parameters of its own asked to reset them."""
    with torch.device("meta"):
        layer = make(kind, num_heads=heads)
    layer.to_empty(device="cpu")
    for parameter in layer.parameters():
        nn.init.constant_(parameter, torch.nan)
    for module in layer.modules():
        if list(module.parameters(recurse=False)):
            module.reset_parameters()  # type: ignore[operator]
    for name, parameter in layer.named_parameters():
        assert torch.isfinite(parameter).all(), name
    if "additive" in kind or "normalized" in kind:
        assert layer.v.abs().max() <= (heads / 10) ** 0.5


@each_layer
@pytest.mark.parametrize("over_memory", [False, True])
def test_projections_replaced(kind: str, over_memory: bool) -> None:
    """By whatever takes and gives states: of several modules, or none."""
    layer, (query, memory, lengths) = make(kind), states(kind)

    def attended() -> Tensor:
        found = layer(query, layer.memory(memory, lengths=lengths)) if over_memory else layer(query, memory, lengths=lengths)
        context: Tensor = found[0]
        return context

    expected = attended()
    for name in ("query_layer", "key_layer"):
        if isinstance(getattr(layer, name, None), nn.Linear):
            setattr(layer, name, nn.Sequential(nn.Identity(), getattr(layer, name)))
    assert torch.equal(attended(), expected)


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors(layout: torch.layout) -> None:
    """Are refused in words that can be followed."""
    nested = torch.nested.nested_tensor([torch.zeros(3, K), torch.zeros(2, K)], layout=layout)
    dense = torch.zeros(2, 3, K)
    memory, layer = onepass.multiplicative_memory(dense, dense), onepass.MultiplicativeAttention(K, K)
    calls: list[Callable[[], object]] = [
        lambda: onepass.multiplicative_attention(nested, nested, nested),
        lambda: onepass.multiplicative_attention(dense, nested, nested),
        lambda: onepass.multiplicative_attention(nested, dense, dense),
        lambda: onepass.multiplicative_memory(nested, nested),
        lambda: memory.attend(nested),
        lambda: memory.context(nested),
        lambda: layer(nested, dense),
        lambda: layer(dense, nested),
    ]
    for ask in calls:
        with pytest.raises(TypeError, match=r"must not be a nested tensor: pad it \(torch.nested.to_padded_tensor\) and give lengths"):
            ask()


def test_v_that_is_freed_before_the_backward_ends() -> None:
    """As FSDP frees parameters when a module's queries have their gradients, before those of the memory are computed."""
    outcomes = []
    for freed in (False, True):
        keys, values = (torch.linspace(-1, 1, B * S * K).view(B, S, K).requires_grad_() for _ in range(2))
        v = torch.linspace(1, 2, K)
        memory = onepass.additive_memory(keys, values, v)
        query = torch.linspace(-2, 1, B * K).view(B, K).requires_grad_()
        if freed:

            def free(_: Tensor, v: Tensor = v) -> None:
                v.untyped_storage().resize_(0)

            query.register_hook(free)
        memory.attend(query)[0].square().sum().backward()
        outcomes.append((query.grad, keys.grad, values.grad))
    assert_equal(outcomes[1], outcomes[0])
