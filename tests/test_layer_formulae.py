"""What each layer computes, against the papers' formulae written out; heads, normalisation, dropout."""

import math

import pytest
import torch
from torch import Tensor, nn

import onepass

pytestmark = pytest.mark.usefixtures("backend")
B, T, S, Q, K, A = 3, 4, 11, 6, 8, 10


def states(query_width: int = Q) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(B, size, width, generator=generator, dtype=torch.float64) for size, width in ((T, query_width), (S, K)))  # type: ignore[return-value]


def attend(scores: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    return torch.einsum("bts,bsd->btd", weights, memory), weights


def close(found: tuple[Tensor, Tensor | None], expected: tuple[Tensor, Tensor]) -> None:
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_bahdanau(bias: bool) -> None:
    """``v . tanh(W_q query + b + W_k memory)``."""
    layer = onepass.AdditiveAttention(Q, K, A, bias=bias).double()
    query, memory = states()
    q = query @ layer.query_layer.weight.T + (layer.query_layer.bias if bias else 0)
    k = memory @ layer.key_layer.weight.T
    scores = torch.stack([torch.stack([torch.tanh(q[:, t] + k[:, s]) @ layer.v for s in range(S)], -1) for t in range(T)], 1)
    close(layer(query, memory, need_weights=True), attend(scores, memory))


def test_gnmt_normalisation() -> None:
    """``g (v / |v|) . tanh(W_q query + W_k memory + b)`` with g = sqrt(1 / A) and b = 0 at first (Wu et al. 2016; TensorFlow)."""
    layer = onepass.AdditiveAttention(Q, K, A, normalize=True).double()
    assert layer.g is not None
    assert layer.g.shape == ()
    assert math.isclose(layer.g.item(), math.sqrt(1 / A), rel_tol=1e-6)
    assert not layer.query_layer.bias.any()
    with torch.no_grad():
        layer.g.fill_(1.7)
        layer.query_layer.bias.normal_()
    query, memory = states()
    q, k = query @ layer.query_layer.weight.T, memory @ layer.key_layer.weight.T
    v = layer.g * layer.v / (layer.v**2).sum() ** 0.5
    scores = (v * torch.tanh(q[:, :, None] + k[:, None] + layer.query_layer.bias)).sum(-1)
    close(layer(query, memory, need_weights=True), attend(scores, memory))
    found = torch.autograd.grad(layer(query, memory)[0].square().sum(), [layer.g, layer.v])
    expected = torch.autograd.grad(attend(scores, memory)[0].square().sum(), [layer.g, layer.v])
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_luong_concat() -> None:
    """Luong's ``v . tanh(W [query; memory])`` is the layer whose two matrices are the halves of W."""
    layer = onepass.AdditiveAttention(Q, K, A, bias=False).double()
    both = nn.Linear(Q + K, A, bias=False).double()
    with torch.no_grad():
        layer.query_layer.weight.copy_(both.weight[:, :Q])
        layer.key_layer.weight.copy_(both.weight[:, Q:])
    query, memory = states()
    pairs = torch.cat([query[:, :, None].expand(B, T, S, Q), memory[:, None].expand(B, T, S, K)], -1)
    close(layer(query, memory, need_weights=True), attend(torch.tanh(both(pairs)) @ layer.v, memory))


@pytest.mark.parametrize(("score", "scale"), [("dot", 1.0), ("scaled_dot", K**-0.5)])
def test_luong_dot(score: str, scale: float) -> None:
    """``query . memory``, and over ``sqrt(A)``."""
    layer = onepass.MultiplicativeAttention(K, K, score)
    assert not list(layer.parameters())
    query, memory = states(K)
    close(layer(query, memory, need_weights=True), attend(scale * torch.einsum("bta,bsa->bts", query, memory), memory))


@pytest.mark.parametrize("bias", [False, True])
def test_luong_general(bias: bool) -> None:
    """``(W query + b) . memory``."""
    layer = onepass.MultiplicativeAttention(Q, K, "general", bias=bias).double()
    assert layer.query_layer is not None
    assert (layer.query_layer.bias is not None) == bias
    query, memory = states()
    q = query @ layer.query_layer.weight.T + (layer.query_layer.bias if bias else 0)
    close(layer(query, memory, need_weights=True), attend(torch.einsum("bta,bsa->bts", q, memory), memory))


@pytest.mark.parametrize("normalize", [False, True])
def test_additive_heads(normalize: bool) -> None:
    """Heads split A and D, each with its own row of v (and g), and their contexts lie side by side."""
    layer = onepass.AdditiveAttention(Q, K, A, num_heads=2, normalize=normalize).double()
    assert list(layer.v.shape) == [2, A // 2]
    query, memory = states()
    q, k = layer.query_layer(query), layer.key_layer(memory)
    contexts, weights = [], []
    for head in range(2):
        a, d = slice(head * A // 2, (head + 1) * A // 2), slice(head * K // 2, (head + 1) * K // 2)
        v = layer.v[head]
        if layer.g is not None:
            assert math.isclose(layer.g[head].item(), math.sqrt(2 / A), rel_tol=1e-6)
            v = layer.g[head] * v / v.norm()
        scores = (v * torch.tanh(q[:, :, None, a] + k[:, None, :, a])).sum(-1)
        context, share = attend(scores, memory[..., d])
        contexts.append(context)
        weights.append(share)
    close(layer(query, memory, need_weights=True), (torch.cat(contexts, -1), torch.stack(weights, 1)))


@pytest.mark.parametrize(("score", "scale"), [("dot", 1.0), ("scaled_dot", (K / 2) ** -0.5)])
def test_multiplicative_heads(score: str, scale: float) -> None:
    """Scaled by the width of one head."""
    layer = onepass.MultiplicativeAttention(K, K, score, num_heads=2)
    query, memory = states(K)
    halves = [
        attend(scale * torch.einsum("bta,bsa->bts", query[..., h], memory[..., h]), memory[..., h]) for h in (slice(0, 4), slice(4, 8))
    ]
    expected = torch.cat([context for context, _ in halves], -1), torch.stack([weights for _, weights in halves], 1)
    close(layer(query, memory, need_weights=True), expected)


def layers(**options: object) -> list[nn.Module]:
    torch.manual_seed(0)
    made = [onepass.AdditiveAttention(Q, K, A, **options), onepass.MultiplicativeAttention(Q, K, "general", **options)]  # type: ignore[arg-type]
    return [layer.double() for layer in made]


@pytest.mark.parametrize("heads", [1, 2])
def test_dropout_in_evaluation(heads: int) -> None:
    """In ``eval`` a layer with dropout is the layer without."""
    query, memory = states()
    for layer, plain in zip(layers(dropout=0.4, num_heads=heads), layers(num_heads=heads), strict=True):
        close(layer.eval()(query, memory, need_weights=True), plain(query, memory, need_weights=True))


@pytest.mark.parametrize("heads", [1, 2])
def test_dropout_in_training(heads: int) -> None:
    """A weight is 0 or over 1 - p; the context is of the returned weights; both have the undropped ones as their means."""
    query, memory = states()
    for layer, plain in zip(layers(dropout=0.4, num_heads=heads), layers(num_heads=heads), strict=True):
        undropped, whole = plain(query, memory, need_weights=True)
        total, sum_of_weights, runs = torch.zeros_like(undropped), torch.zeros_like(whole), 400
        for _ in range(runs):
            context, weights = layer(query, memory, need_weights=True)
            kept = weights != 0
            torch.testing.assert_close(weights[kept], whole[kept] / 0.6)
            total, sum_of_weights = total + context, sum_of_weights + weights
        split = memory.view(B, S, heads, K // heads).transpose(1, 2)
        product = weights.reshape(B, heads, T, S) @ split
        torch.testing.assert_close(context, product.transpose(1, 2).flatten(-2))
        # a dropped weight has the variance w^2 p / (1 - p); six standard deviations of the mean
        deviation = 6 * (0.4 / 0.6 / runs) ** 0.5
        assert ((sum_of_weights / runs - whole).abs() <= deviation * whole).all()
        spread = (whole.reshape(B, heads, T, S).square() @ split.square()).sqrt().transpose(1, 2).flatten(-2)
        assert ((total / runs - undropped).abs() <= deviation * spread).all()


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("hidden", ["lengths", "mask"])
def test_dropout_and_padding(heads: int, hidden: str) -> None:
    """NaN in the padding leaks neither into the context nor into gradients, and rows that see nothing stay 0."""
    query, memory = states()
    lengths = torch.tensor([S, 0, 4])
    mask = (torch.arange(S) < lengths[:, None])[:, None]
    options = {"lengths": lengths} if hidden == "lengths" else {"mask": mask}
    dirty = memory.masked_fill(~mask.mT, torch.nan)
    for layer in layers(dropout=0.4, num_heads=heads):
        found = []
        for states_ in (dirty, memory.masked_fill(~mask.mT, 0.0)):
            torch.manual_seed(3)
            values = states_.clone().requires_grad_()
            keys = memory.clone().requires_grad_()
            context, weights = layer(query, keys, values, need_weights=True, **options)
            grads = torch.autograd.grad(context.square().sum(), [keys, values, *layer.parameters()])
            found.append((context.detach(), weights.detach(), *grads))
        for got, expected in zip(*found, strict=True):
            assert torch.equal(got, expected)
        assert not found[0][0][1].any()
        context, _ = layer(query, dirty, need_weights=True, **options)
        assert not context.isnan().any()


def test_dropout_differs_between_calls() -> None:
    """Two calls drop other weights; one seed drops the same."""
    query, memory = states()
    for layer in layers(dropout=0.4):
        first = layer(query, memory)[0]
        assert not torch.equal(first, layer(query, memory)[0])
        torch.manual_seed(5)
        again = layer(query, memory)[0]
        torch.manual_seed(5)
        assert torch.equal(again, layer(query, memory)[0])
