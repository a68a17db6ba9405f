"""What a layer cannot take: each error names what it got and what it takes."""

import re

import pytest
import torch
from layer_cases import B, K, Q, S, T, each_heads, each_layer, make, states
from torch import Tensor, nn

import onepass

pytestmark = pytest.mark.usefixtures("backend")


@each_layer
def test_memory_of_another_dtype(kind: str) -> None:
    """Without autocast, a memory of another dtype is an error where it is projected, and else takes the query's."""
    layer = make(kind)
    query, memory, lengths = states(kind)
    if "dot" in kind or "general" in kind:
        context, _ = layer(query, memory.bfloat16(), lengths=lengths)
        assert context.dtype == query.dtype
    else:
        with pytest.raises(TypeError, match="memory must have the dtype of the layer's parameters"):
            layer(query, memory.bfloat16(), lengths=lengths)


@pytest.mark.parametrize("options", [{"dropout": 1.0}, {"dropout": -0.1}])
@each_layer
def test_dropout_out_of_range(kind: str, options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=rf"dropout must lie in \[0, 1\); got {options['dropout']}"):
        make(kind, **options)


def test_heads_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="hidden_dim must be a multiple of num_heads = 3; got 10"):
        onepass.AdditiveAttention(Q, K, 10, num_heads=3)
    with pytest.raises(ValueError, match="key_dim must be a multiple of num_heads = 3; got 8"):
        onepass.MultiplicativeAttention(Q, K, "general", num_heads=3)
    for heads in (0, -1):
        with pytest.raises(ValueError, match=f"num_heads must be .*got {heads}"):
            onepass.AdditiveAttention(Q, K, 10, num_heads=heads)


def test_values_that_do_not_divide() -> None:
    """A value width that the heads do not divide is named."""
    layer = onepass.AdditiveAttention(Q, K, 10, num_heads=2)
    with pytest.raises(ValueError, match=r"the width of values must be a multiple of num_heads = 2; got 7"):
        layer(torch.zeros(B, T, Q), torch.zeros(B, S, K), torch.zeros(B, S, 7))
    for kind in ("additive", "general"):
        with pytest.raises(ValueError, match=r"the width of values must be a multiple of num_heads = 2; got 7"):
            make(kind, num_heads=2).memory(torch.zeros(B, S, K), torch.zeros(B, S, 7))


def test_scores_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match="score must be 'dot', 'general' or 'scaled_dot'; got 'cosine'"):
        onepass.MultiplicativeAttention(K, K, "cosine")
    with pytest.raises(ValueError, match="score='dot' needs query_dim == key_dim; got 6 and 8: use 'general'"):
        onepass.MultiplicativeAttention(Q, K)


def test_widths_of_nothing() -> None:
    """A layer has a width."""
    with pytest.raises(ValueError, match="hidden_dim must be at least 1; got 0"):
        onepass.AdditiveAttention(Q, K, 0)
    for score in ("dot", "scaled_dot", "general"):
        with pytest.raises(ValueError, match="key_dim must be at least 1; got 0"):
            onepass.MultiplicativeAttention(0, 0, score)


@each_layer
@each_heads
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_ranks(kind: str, heads: int, dropout: float) -> None:
    """Queries, encoder states and values of another rank are named, over states as over a memory."""
    layer = make(kind, num_heads=heads, dropout=dropout)
    query, memory, _ = states(kind)
    prepared = layer.memory(memory)
    width = query.shape[-1]
    for bad in (query[0, 0], query[None], query[..., 1:], query[0, :, 1:]):
        for over in (memory, prepared):
            wanted = f"query must be [B, T, {width}], or [B, {width}] for one step; got {list(bad.shape)}"
            with pytest.raises(ValueError, match=re.escape(wanted)):
                layer(bad, over)
    for bad in (memory[0], memory[None], memory[..., 1:]):
        for call in (layer.memory, lambda states: layer(query, states)):
            with pytest.raises(ValueError, match=re.escape(f"memory must be [B, S, {K}]; got {list(bad.shape)}")):
                call(bad)
    for bad in (memory[0], memory[None]):
        with pytest.raises(ValueError, match=re.escape(f"values must be [B, S, width]; got {list(bad.shape)}")):
            layer(query, memory, bad)


@each_layer
@each_heads
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_queries_of_another_batch(kind: str, heads: int, dropout: float) -> None:
    """Over a memory they are named in the widths that a user knows, with what mostly is the cause."""
    layer = make(kind, num_heads=heads, dropout=dropout)
    query, states_, _ = states(kind, None)
    memory, width = layer.memory(states_), query.shape[-1]
    wanted = f"query must be [{B}, {width}], or [{B}] x K x [{width}] for K queries, to go with this memory; got "
    left, beams, others = query[:2], query.repeat(2, 1), torch.zeros(B + 1, T, width)
    for bad, cause in (
        (left, f"[2, {width}]: where fewer sources are left, memory.select(rows)"),
        (left[:, None], f"[2, 1, {width}]: where fewer sources are left, memory.select(rows)"),
        (beams, f"[{2 * B}, {width}]: K beams of each source are query.view({B}, -1, {width})"),
        (others, f"[{B + 1}, {T}, {width}]"),
    ):
        for call in (layer, layer.scores):
            with pytest.raises(ValueError, match=f"{re.escape(wanted + cause)}$"):
                call(bad, memory)
    assert layer(left, memory.select([0, 1]))[0].shape == (2, K)
    assert layer(beams.view(B, -1, width), memory)[0].shape == (B, 2, K)


@each_layer
def test_feature_maps(kind: str) -> None:
    """What a convolution makes of a picture has its channels in another place."""
    layer, (query, _, _) = make(kind), states(kind)
    picture = torch.zeros(B, K, 2, 5)
    for call in (layer.memory, lambda states: layer(query, states)):
        message = f"memory must be [B, S, {K}]; got [{B}, {K}, 2, 5]: of a feature map [B, {K}, h, w], memory.flatten(2).transpose(1, 2)"
        with pytest.raises(ValueError, match=re.escape(message)):
            call(picture)
    layer(query, picture.flatten(2).transpose(1, 2))


def test_casts_of_the_functions() -> None:
    """Under autocast, and only there, the error of a function, and of a memory, says whose cast it is."""
    query, keys, values = torch.zeros(B, Q), torch.zeros(B, S, Q).bfloat16(), torch.zeros(B, S, K)
    memory = onepass.multiplicative_memory(keys, values.bfloat16())
    calls = (
        (lambda: onepass.multiplicative_attention(query, keys, values), "keys must have the dtype of query", "keys.to(query.dtype)"),
        (lambda: onepass.multiplicative_memory(keys, values), "values must have the dtype of keys", "values.to(keys.dtype)"),
        (lambda: memory.attend(query), "query must have the dtype of the memory's keys", "query.to(memory.keys.dtype)"),
        (lambda: memory.context(values[..., 0]), "weights must have the dtype of the memory's keys", "weights.to(memory.keys.dtype)"),
    )
    for call, message, cast in calls:
        with pytest.raises(TypeError, match=f"^{message}, .*; got torch\\.[a-z0-9]*$"):
            call()
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError) as error:
            call()
        assert str(error.value).endswith(f": functions do not cast under autocast, {cast} does")


@each_layer
def test_arguments_in_other_places(kind: str) -> None:
    """What users of other layers try first: lengths by place, states with the time first, the state of a GRU, numpy's arrays."""
    layer = make(kind)
    query, memory, _ = states(kind)
    with pytest.raises(ValueError, match=re.escape(f"values must be [B, S, width]; got [{B}] (lengths, mask and spans are given by name)")):
        layer(query, memory, torch.full((B,), S))
    batches = f"query and memory must agree in batch size B, the first; got {[T, B, query.shape[-1]]} and {[B, S, K]}"
    with pytest.raises(ValueError, match=re.escape(batches)):
        layer(query.transpose(0, 1), memory)
    with pytest.raises(TypeError, match=r"memory must be a torch\.Tensor; got ndarray"):
        layer(query, memory.numpy())
    with pytest.raises(TypeError, match=r"query must be a torch\.Tensor; got list"):
        layer(query.tolist(), memory)
    with pytest.raises(TypeError, match=r"values must be a torch\.Tensor; got bool \(need_weights is given by name\)"):
        layer(query, memory, True)
    with pytest.raises(ValueError, match=r"a memory has its own values .* \(all else goes by name\)"):
        layer(query, layer.memory(memory), True)


@each_layer
def test_states_of_another_dtype(kind: str) -> None:
    """Named as the argument that has it, beside the dtype of the parameters; autocast, or a projection of the user's own, may cast."""
    layer, (query, memory, _) = make(kind), states(kind)
    with torch.autocast("cpu", torch.bfloat16):
        layer(query.bfloat16(), memory.bfloat16())
    if hasattr(layer, "key_layer"):
        for call in (layer.memory, lambda states: layer(query, states)):
            with pytest.raises(TypeError, match=r"memory must have the dtype of the layer's parameters, torch.float32; got torch.float64"):
                call(memory.double())
    if getattr(layer, "query_layer", None) is None:
        return
    for over in (memory, layer.memory(memory)):
        with pytest.raises(TypeError, match=r"query must have the dtype of the layer's parameters, torch.float32; got torch.float16"):
            layer(query.half(), over)

    class Casting(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.to(self.weight.dtype))

    layer.query_layer.__class__ = Casting
    assert layer(query.double(), memory)[0].dtype == query.dtype
    layer = make(kind)  # as layerwise casting has it
    layer.query_layer.bfloat16().register_forward_pre_hook(lambda module, _: module.float() and None)
    layer.query_layer.register_forward_hook(lambda module, _, output: module.bfloat16() and output)
    assert layer(query, memory)[0].dtype == query.dtype


@each_layer
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("steps", [T, None], ids=str)
def test_masks_that_are_none(kind: str, steps: int | None, dropout: float) -> None:
    """What is no mask, no lengths and no spans is named as the functions name it."""
    layer = make(kind, dropout=dropout)
    query, memory, _ = states(kind, steps)
    for name, bad in (("mask", [[1, 1]]), ("lengths", [1, 2, 3]), ("spans", [[0, 1]])):
        with pytest.raises(TypeError, match=f"{name} must be a .*; got list"):
            layer(query, memory, **{name: bad})
