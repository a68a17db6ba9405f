"""Layers over their memories: what they give over the encoder states, dropout, and what they refuse."""

import copy
import re

import pytest
import torch
from memory_cases import (
    KEY_DIM,
    assert_near,
    each_layer,
    layer_states,
    loss_of,
    make_layer,
)
from torch import Tensor

import onepass


def named_gradients(layer: torch.nn.Module, *tensors: Tensor) -> dict[str, Tensor]:
    """Gradients of a layer's parameters and of tensors, all of which are then removed."""
    named = {**dict(layer.named_parameters()), **{str(place): tensor for place, tensor in enumerate(tensors)}}
    found = {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in named.items()}
    for leaf in named.values():
        leaf.grad = None
    return found


@each_layer
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("apart", [False, True], ids=["states", "values apart"])
@pytest.mark.parametrize("hidden", ["lengths", "mask"])
def test_layers(kind: str, heads: int, apart: bool, hidden: str, backend: str) -> None:
    """A layer over its memory gives what it gives over the states, step by step and at once, gradients included."""
    layer = make_layer(kind, num_heads=heads)
    queries, states, lengths = (tensor.requires_grad_(tensor.is_floating_point()) for tensor in layer_states(kind))
    values = torch.randn(3, 11, 4 * heads, dtype=torch.float64).requires_grad_() if apart else None
    mask = (torch.arange(11) < lengths[:, None]) & (torch.arange(11) % 3 != 0)
    options = {"lengths": lengths} if hidden == "lengths" else {"mask": mask[:, None]}
    inputs = [queries, states, *([] if values is None else [values])]
    expected, weights = layer(queries, states, values, need_weights=True, **options)
    loss_of(expected, weights).backward()
    expected_gradients = named_gradients(layer, *inputs)
    memory = layer.memory(states, values, **options)
    steps = [layer(query, memory, need_weights=True) for query in queries.unbind(1)]
    context, found_weights = torch.stack([step[0] for step in steps], 1), torch.stack([step[1] for step in steps], -2)
    loss_of(context, found_weights).backward()
    assert_near({"c": context, "w": found_weights, **named_gradients(layer, *inputs)}, {"c": expected, "w": weights, **expected_gradients})
    again = layer(queries, layer.memory(states, values, **options), need_weights=True)
    loss_of(*again).backward()
    assert_near({"c": again[0], "w": again[1], **named_gradients(layer, *inputs)}, {"c": expected, "w": weights, **expected_gradients})


@each_layer
def test_layer_projects_once(kind: str, backend: str) -> None:
    """``layer.memory`` is what applies the key projection: the steps do not."""
    layer = make_layer(kind)
    queries, states, lengths = layer_states(kind)
    calls: list[int] = []
    if isinstance(layer, onepass.AdditiveAttention):
        layer.key_layer.register_forward_hook(lambda *_: calls.append(1))
    memory = layer.memory(states, lengths=lengths)
    for query in queries.unbind(1):
        layer(query, memory)
    assert len(calls) == isinstance(layer, onepass.AdditiveAttention)


@each_layer
@pytest.mark.parametrize("given", ["values", "lengths", "values and lengths"])
def test_layer_refuses_what_the_memory_has(kind: str, given: str, backend: str) -> None:
    """Values and lengths belong to the memory: next to one they are a ValueError."""
    layer = make_layer(kind)
    queries, states, lengths = layer_states(kind)
    memory = layer.memory(states, lengths=lengths)
    extra = {name: tensor for name, tensor in (("values", states), ("lengths", lengths)) if name in given}
    with pytest.raises(ValueError, match=given):
        layer(queries, memory, **extra)


@each_layer
@pytest.mark.parametrize("heads", [1, 2])
def test_what_belongs_to_the_sources(kind: str, heads: int, backend: str) -> None:
    """Lengths and masks by query are refused in words that can be followed."""
    layer = make_layer(kind, num_heads=heads)
    _, states, lengths = layer_states(kind)
    for bad in (lengths[:, None], lengths[:, None].expand(3, 4), lengths[:2]):
        wanted = f"lengths of a memory belong to its sources, [B] = [3]; got {list(bad.shape)}"
        with pytest.raises(ValueError, match=re.escape(wanted)):
            layer.memory(states, lengths=bad)
    for sizes in ((3, 4, 11), (3, 10), (2, 11)):
        wanted = f"a mask of a memory belongs to its sources, [B, S] = [3, 11]; got {list(sizes)}"
        with pytest.raises(ValueError, match=re.escape(wanted)):
            layer.memory(states, mask=torch.ones(sizes, dtype=torch.bool))


@each_layer
@pytest.mark.parametrize("heads", [1, 2])
def test_layer_storage_in_bfloat16(kind: str, heads: int, backend: str) -> None:
    """A layer's memory may be stored in bfloat16; results stay float32 and close, and gradients reach every parameter."""
    layer = make_layer(kind, torch.float32, num_heads=heads)
    queries, states, lengths = (tensor.requires_grad_(tensor.is_floating_point()) for tensor in layer_states(kind, dtype=torch.float32))
    expected = layer(queries, states, lengths=lengths)[0]
    found = layer(queries, layer.memory(states, lengths=lengths, dtype=torch.bfloat16))[0]
    assert found.dtype == torch.float32
    assert (found - expected).norm() <= 0.05 * expected.norm()
    assert not torch.equal(found, expected)
    loss_of(found).backward()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() and leaf.grad.any() for leaf in (queries, states, *layer.parameters()))


@each_layer
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("one_step", [True, False])
def test_dropout(kind: str, heads: int, one_step: bool, backend: str) -> None:
    """Returned weights are the dropped ones, the context is theirs, and gradients are those of that product."""
    layer = make_layer(kind, num_heads=heads, dropout=0.5)
    queries, states, _ = (tensor.requires_grad_(tensor.is_floating_point()) for tensor in layer_states(kind))
    query = queries[:, 0] if one_step else queries
    context, weights = layer(query, layer.memory(states), need_weights=True)
    kept = (weights != 0).double()
    assert 0.25 < kept.mean() < 0.75
    loss_of(context).backward()
    found = {"context": context, "weights": weights, **named_gradients(layer, queries, states)}
    full = layer.eval()(query, states, need_weights=True)[1]
    expected = full * kept * 2
    rows = expected.unsqueeze(-2) if one_step else expected
    split = states if heads == 1 else states.view(3, 11, heads, KEY_DIM // heads).transpose(1, 2)
    product = rows @ split
    product = product if heads == 1 else product.transpose(1, 2).flatten(-2)
    product = product.squeeze(1) if one_step else product
    loss_of(product).backward()
    assert_near(found, {"context": product, "weights": expected, **named_gradients(layer, queries, states)})


@each_layer
def test_dropout_and_padding(kind: str, backend: str) -> None:
    """With dropout, NaN beyond the lengths reaches no result and no gradient of a parameter or query."""
    layer = make_layer(kind, dropout=0.5)
    queries, states, lengths = layer_states(kind)
    states = states.masked_fill((torch.arange(11) >= lengths[:, None])[..., None], torch.nan)
    queries.requires_grad_()
    context, weights = layer(queries, layer.memory(states.nan_to_num(0.0), states, lengths=lengths), need_weights=True)
    loss_of(context, weights).backward()
    assert not weights[1].any()
    assert not weights[2, :, 4:].any()
    assert all(tensor.isfinite().all() for tensor in (context, weights, queries.grad, *named_gradients(layer).values()))


@each_layer
def test_dropout_is_seeded(kind: str, backend: str) -> None:
    """A seed reproduces every bit, another seed and another step drop others, and ``eval`` drops nothing."""
    layer, plain = make_layer(kind, dropout=0.5), make_layer(kind)
    queries, states, lengths = layer_states(kind)

    def weights(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        memory = layer.memory(states, lengths=lengths)
        return [layer(queries[:, 0], memory, need_weights=True)[1] for _ in range(2)]

    first, again, other = weights(3), weights(3), weights(4)
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    assert not any(torch.equal(*pair) for pair in [*zip(first, other, strict=True), tuple(first)])
    layer.eval()
    expected = plain(queries[:, 0], plain.memory(states, lengths=lengths), need_weights=True)[1]
    assert all(torch.equal(got, expected) for got in weights(3))


@each_layer
def test_layer_is_copied_as_ever(kind: str, backend: str) -> None:
    """A layer holds no memory: after one was made and used, its copy, its state and its buffers are as before."""
    layer = make_layer(kind)
    queries, states, lengths = layer_states(kind)
    before = set(vars(layer)), set(layer.state_dict())
    memory = layer.memory(states, lengths=lengths)
    expected = layer(queries, memory)[0]
    assert (set(vars(layer)), set(layer.state_dict())) == before
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(queries, twin.memory(states, lengths=lengths))[0], expected)
