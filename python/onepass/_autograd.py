"""Shapes without data (fakes) and gradients of the ops ``onepass::*`` and ``onepass_cuda::*``; forward and backward are each an op."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.library import register_autograd, register_fake
from torch.overrides import has_torch_function

from onepass._library import NAMESPACES, ops_of
from onepass._validate import are_recorded

Grads = tuple[Tensor | None, ...]
Fake = TypeVar("Fake", bound=Callable[..., object])


def fake(op: str) -> Callable[[Fake], Fake]:
    """Register the decorated function as what the op returns for tensors without data."""

    def register(function: Fake) -> Fake:
        for namespace in NAMESPACES:
            register_fake(f"{namespace}::{op}", function)
        return function

    return register


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What a dtype accumulates in, and weights are kept in: itself, or float32 for the half-width ones."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _weights_like(query: Tensor, keys: Tensor) -> Tensor:
    return query.new_empty((*query.shape[:-1], keys.shape[-2]), dtype=accumulator(query.dtype))


def _context_like(query: Tensor, values: Tensor) -> Tensor:
    return query.new_empty((*query.shape[:-1], values.shape[-1]))


def _contiguous_like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in tensors)


@fake("additive_forward")
def _additive_forward_like(
    query: Tensor, keys: Tensor, values: Tensor, v: Tensor, lengths: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _context_like(query, values), _weights_like(query, keys)


@fake("additive_backward")
def _additive_backward_like(
    grad_context: Tensor | None,
    grad_weights: Tensor | None,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    v: Tensor,
    weights: Tensor,
    lengths: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, ...]:
    return _contiguous_like(query, keys, values, v)


@fake("additive_scores")
def _additive_scores_like(query: Tensor, keys: Tensor, v: Tensor, lengths: Tensor | None, mask: Tensor | None) -> Tensor:
    return query.new_empty((*query.shape[:-1], keys.shape[-2]))


@fake("additive_scores_backward")
def _additive_scores_backward_like(
    grad_scores: Tensor, query: Tensor, keys: Tensor, v: Tensor, lengths: Tensor | None, mask: Tensor | None, of_query: bool
) -> tuple[Tensor, ...]:
    return _contiguous_like(query if of_query else query.new_empty(0), keys, v)


@fake("multiplicative_forward")
def _multiplicative_forward_like(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    lengths: Tensor | None,
    mask: Tensor | None,
    keep_weights: bool,
) -> tuple[Tensor, Tensor]:
    weights = _weights_like(query, keys) if keep_weights else query.new_empty((0,), dtype=accumulator(query.dtype))
    return _context_like(query, values), weights


@fake("multiplicative_backward")
def _multiplicative_backward_like(
    grad_context: Tensor | None,
    grad_weights: Tensor | None,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    weights: Tensor,
    lengths: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, ...]:
    return _contiguous_like(query, keys, values)


@fake("additive_prepare")
def prepared_like(
    keys: Tensor, v: Tensor, lengths: Tensor | None, mask: Tensor | None, half: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide = accumulator(keys.dtype)
    stride = (keys.shape[-1] + 15) // 16 * 16
    heads = v.shape[0] if v.dim() == 2 else 1
    return (
        keys.new_empty((*keys.shape[:-1], stride), dtype=torch.bfloat16 if half else wide),
        keys.new_empty((*keys.shape[:-1], 2), dtype=wide),
        keys.new_empty((heads, 3 * stride + 8), dtype=wide),
    )


@fake("additive_step")
def _additive_step_like(query: Tensor, keys: Tensor, values: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return _context_like(query, values), _weights_like(query, keys)


@fake("multiplicative_step")
def _multiplicative_step_like(query: Tensor, keys: Tensor, values: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return _context_like(query, values), _weights_like(query, keys)


@fake("additive_step_scores")
def _additive_step_scores_like(query: Tensor, keys: Tensor, *others: Any) -> Tensor:
    return query.new_empty((*query.shape[:-1], keys.shape[-2]))


@fake("multiplicative_step_scores")
def _multiplicative_step_scores_like(query: Tensor, keys: Tensor, *others: Any) -> Tensor:
    return query.new_empty((*query.shape[:-1], keys.shape[-2]))


def _step_backward_like(
    grad_context: Tensor | None, grad_weights: Tensor | None, query: Tensor, keys: Tensor, *others: Any
) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), _weights_like(query, keys)


fake("additive_step_backward")(_step_backward_like)
fake("multiplicative_step_backward")(_step_backward_like)


@fake("source_sums")
def _source_sums_like(weights: Tensor, rows: Tensor, lengths: Tensor | None, mask: Tensor | None) -> Tensor:
    return rows.new_empty((*rows.shape[:-2], weights.shape[-1], rows.shape[-1]))


@fake("weighted_values")
def _weighted_values_like(weights: Tensor, values: Tensor, lengths: Tensor | None, mask: Tensor | None) -> Tensor:
    return _context_like(weights, values)


@fake("weighted_values_backward")
def _weighted_values_backward_like(grad_context: Tensor, values: Tensor, lengths: Tensor | None, mask: Tensor | None) -> Tensor:
    return grad_context.new_empty((*grad_context.shape[:-1], values.shape[-2]))


@fake("stack_steps")
def _stack_steps_like(steps: list[Tensor], several: bool) -> Tensor:
    rows = steps if several else [step.unsqueeze(-2) for step in steps]
    return rows[0].new_empty((*rows[0].shape[:-2], sum(step.shape[-2] for step in rows), rows[0].shape[-1]))


def _keep(ctx: Any, *tensors: Tensor | None) -> None:
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _additive_setup(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor]) -> None:
    query, keys, values, v, lengths, mask = inputs
    _keep(ctx, query, keys, values, v, output[1], lengths, mask)


def _additive_backward(ops: Any, ctx: Any, grad_context: Tensor | None, grad_weights: Tensor | None) -> Grads:
    if grad_context is None and grad_weights is None:
        return (None,) * 6
    query, keys, values, v, weights, lengths, mask = ctx.saved_tensors
    grads = past_autograd(ops.additive_backward, grad_context, grad_weights, query, keys, values, v, weights, lengths, mask)
    return (*grads, None, None)


def _scores_setup(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    _keep(ctx, *inputs)


def _scores_backward(ops: Any, ctx: Any, grad_scores: Tensor | None) -> Grads:
    if grad_scores is None:
        return (None,) * 5
    query, keys, v, lengths, mask = ctx.saved_tensors
    return (*past_autograd(ops.additive_scores_backward, grad_scores, query, keys, v, lengths, mask, True), None, None)


def _multiplicative_setup(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor]) -> None:
    query, keys, values, scale, lengths, mask, keep_weights = inputs
    _keep(ctx, query, keys, values, output[1], lengths, mask)
    ctx.scale = scale
    if not keep_weights:
        ctx.mark_non_differentiable(output[1])


def _multiplicative_backward(ops: Any, ctx: Any, grad_context: Tensor | None, grad_weights: Tensor | None) -> Grads:
    if grad_context is None and grad_weights is None:
        return (None,) * 7
    query, keys, values, weights, lengths, mask = ctx.saved_tensors
    grads = past_autograd(ops.multiplicative_backward, grad_context, grad_weights, query, keys, values, ctx.scale, weights, lengths, mask)
    return (*grads, None, None, None, None)


def _additive_step_setup(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor]) -> None:
    query, keys, values, v, _, _, _, lengths, mask = inputs
    _keep(ctx, query, keys, values, v, output[1], lengths, mask)


def _additive_step_backward(ops: Any, ctx: Any, grad_context: Tensor | None, grad_weights: Tensor | None) -> Grads:
    """All gradients of one step: what compiled and exported graphs use, where nothing is deferred."""
    if grad_context is None and grad_weights is None:
        return (None,) * 9
    query, keys, values, v, weights, lengths, mask = ctx.saved_tensors
    rows = _rows_of(query, keys)
    grad_query, grad_keys, grad_values, grad_v = ops.additive_backward(
        rows(grad_context), rows(grad_weights), rows(query), keys.to(query.dtype), values.to(query.dtype), v, rows(weights), lengths, mask
    )
    return grad_query.view(query.shape), grad_keys.to(keys.dtype), grad_values.to(values.dtype), grad_v, None, None, None, None, None


def _multiplicative_step_setup(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor]) -> None:
    query, keys, values, scale, lengths, mask = inputs
    _keep(ctx, query, keys, values, output[1], lengths, mask)
    ctx.scale = scale


def _multiplicative_step_backward(ops: Any, ctx: Any, grad_context: Tensor | None, grad_weights: Tensor | None) -> Grads:
    if grad_context is None and grad_weights is None:
        return (None,) * 6
    query, keys, values, weights, lengths, mask = ctx.saved_tensors
    rows = _rows_of(query, keys)
    grad_query, grad_scores = ops.multiplicative_step_backward(
        grad_context, grad_weights, query, keys, values, ctx.scale, weights, lengths, mask
    )
    grad_keys = ops.source_sums(rows(grad_scores), rows(query), lengths, mask).to(keys.dtype)
    grad_values = None
    if grad_context is not None:
        grad_values = ops.source_sums(rows(weights), rows(grad_context), lengths, mask).to(values.dtype)
    return grad_query, grad_keys, grad_values, None, None, None


def _additive_step_scores_setup(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    query, keys, v, _, _, _, lengths, mask = inputs
    _keep(ctx, query, keys, v, lengths, mask)


def _additive_step_scores_backward(ops: Any, ctx: Any, grad_scores: Tensor | None) -> Grads:
    if grad_scores is None:
        return (None,) * 8
    query, keys, v, lengths, mask = ctx.saved_tensors
    rows = _rows_of(query, keys)
    narrow = keys.to(query.dtype)
    grad_query, grad_keys, grad_v = ops.additive_scores_backward(rows(grad_scores), rows(query), narrow, v, lengths, mask, True)
    return grad_query.view(query.shape), grad_keys.to(keys.dtype), grad_v, None, None, None, None, None


def _multiplicative_step_scores_setup(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    query, keys, scale, lengths, mask = inputs
    _keep(ctx, query, keys, lengths, mask)
    ctx.scale = scale


def _multiplicative_step_scores_backward(ops: Any, ctx: Any, grad_scores: Tensor | None) -> Grads:
    if grad_scores is None:
        return (None,) * 5
    query, keys, lengths, mask = ctx.saved_tensors
    rows, wide = _rows_of(query, keys), grad_scores.to(accumulator(query.dtype))
    grad_query, wide = ops.multiplicative_step_backward(None, wide, query, keys, keys[..., :0], ctx.scale, None, lengths, mask)
    return grad_query, ops.source_sums(rows(wide), rows(query), lengths, mask).to(keys.dtype), None, None, None


def _weighted_values_setup(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    _keep(ctx, *inputs)


def _weighted_values_backward(ops: Any, ctx: Any, grad_context: Tensor | None) -> Grads:
    if grad_context is None:
        return (None,) * 4
    weights, values, lengths, mask = ctx.saved_tensors
    wants_weights, wants_values = ctx.needs_input_grad[:2]
    grad_weights = grad_values = None
    if wants_weights:
        grad_weights = ops.weighted_values_backward(grad_context, values, lengths, mask)
    if wants_values:
        rows = _rows_of(weights, values)
        wide = weights.to(accumulator(weights.dtype))
        grad_values = ops.source_sums(rows(wide), rows(grad_context), lengths, mask).to(values.dtype)
    return grad_weights, grad_values, None, None


def _rows_of(query: Tensor, keys: Tensor) -> Callable[[Tensor | None], Tensor | None]:
    """Gives what belongs to one query the dimension of several."""
    one_step = query.dim() < keys.dim()
    return lambda tensor: tensor.unsqueeze(-2) if one_step and tensor is not None else tensor


def _refuse_setup(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
    pass


def refuse_second(ctx: Any, *grads: Tensor | None) -> Grads:
    """The gradients of gradients."""
    raise RuntimeError("onepass computes first derivatives only; for a second one name backend='reference'")


DIFFERENTIABLE: dict[str, tuple[Callable[..., Grads], Callable[..., None]]] = {
    "additive_forward": (_additive_backward, _additive_setup),
    "additive_scores": (_scores_backward, _scores_setup),
    "multiplicative_forward": (_multiplicative_backward, _multiplicative_setup),
    "additive_step": (_additive_step_backward, _additive_step_setup),
    "multiplicative_step": (_multiplicative_step_backward, _multiplicative_step_setup),
    "additive_step_scores": (_additive_step_scores_backward, _additive_step_scores_setup),
    "multiplicative_step_scores": (_multiplicative_step_scores_backward, _multiplicative_step_scores_setup),
    "weighted_values": (_weighted_values_backward, _weighted_values_setup),
}
LAST = (
    "additive_backward",
    "additive_scores_backward",
    "multiplicative_backward",
    "additive_step_backward",
    "multiplicative_step_backward",
    "source_sums",
    "stack_steps",
    "weighted_values_backward",
)


def past_autograd(op: Any, *arguments: Any) -> Any:
    """An op in a backward. Its own autograd, which is Python, is there to refuse second derivatives: nobody asks for them, usually."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return op(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return op.default(*arguments)


def _function_of(ops: Any, op: str) -> Any:
    """The op and its gradients as an ``autograd.Function``, past what ``register_autograd`` makes, which takes 14 microseconds more."""
    backward, setup = DIFFERENTIABLE[op]

    def forward(ctx: Any, *inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = getattr(ops, op).default(*inputs)
        setup(ctx, inputs, output)
        return output

    def gradients(ctx: Any, *grads: Tensor | None) -> Grads:  # a function, as compiled autograd asks
        return backward(ops, ctx, *grads)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(gradients)}
    function: Any = type(f"onepass_{op}", (torch.autograd.Function,), methods)
    return super(torch.autograd.Function, function).apply  # as in _deferred.py


_FUNCTIONS: dict[tuple[Any, str], Any] = {}
for _namespace in NAMESPACES:
    _ops = getattr(torch.ops, _namespace)
    for _op, (_backward, _setup) in DIFFERENTIABLE.items():
        register_autograd(f"{_namespace}::{_op}", functools.partial(_backward, _ops), setup_context=_setup)
        _FUNCTIONS[_ops, _op] = _function_of(_ops, _op)
    for _op in LAST:
        register_autograd(f"{_namespace}::{_op}", refuse_second, setup_context=_refuse_setup)


def call_op(backend: str, op: str, *arguments: Any) -> Any:
    """An op and its gradients. Graphs, traces, function transforms and whoever overrides functions take it as it is registered."""
    ops = ops_of(backend)
    if are_recorded() or torch._C._are_functorch_transforms_active() or has_torch_function(arguments):
        return getattr(ops, op)(*arguments)
    if torch.is_grad_enabled() and any(isinstance(argument, Tensor) and argument.requires_grad for argument in arguments):
        return _FUNCTIONS[ops, op](*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return getattr(ops, op).default(*arguments)
