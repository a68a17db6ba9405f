"""Gradients of attention memories: steps give their queries theirs at once, and leave what the memory's own are made of to its root.

Two kinds of nodes do it: :class:`Root`, made with the memory, and one :class:`Step` per call (:class:`Scores` of raw scores,
:class:`Context` of weights that are given), which depends on the root through an empty tensor and so runs before it.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch

from onepass._autograd import past_autograd, refuse_second

if TYPE_CHECKING:
    from onepass.memory import AttentionMemory


class Deposit(NamedTuple):
    """What one call leaves; of given weights there is no query, of raw scores no weights, and no context where no gradient came through
    it. ``spans`` and ``mask``: None for the memory's own. ``root``: where a graph of the gradients is asked for."""

    query: Tensor | None
    grad_scores: Tensor | None
    weights: Tensor | None
    grad_context: Tensor | None
    spans: Tensor | None
    mask: Tensor | None
    changes: int
    root: Tensor | None

    @classmethod
    def of(
        cls,
        memory: "AttentionMemory",
        query: Tensor | None,
        grad_scores: Tensor | None,
        weights: Tensor | None,
        grad_context: Tensor | None,
        spans: Tensor | None,
        mask: Tensor | None,
    ) -> "Deposit":
        query, weights = _past(query), _past(weights)
        changes = _changes(query, weights, spans, mask)
        return cls(query, grad_scores, weights, grad_context, spans, mask, changes, memory._root if torch.is_grad_enabled() else None)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.query, self.grad_scores, self.weights, self.grad_context, self.spans, self.mask

    @property
    def is_as_left(self) -> bool:
        return self.changes == _changes(self.query, self.weights, self.spans, self.mask)


def _changes(*tensors: Tensor | None) -> int:
    """How often they were changed in place, all together."""
    count = 0
    for tensor in tensors:
        if tensor is not None:
            count += tensor._version
    return count


class Deposits:
    """What the steps of a backward leave for its root, and what the root needs besides; of every backward its own."""

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        v: Tensor | None,
        kept_v: Tensor | None,
        lengths: Tensor | None,
        mask: Tensor | None,
        ops: Any,
    ) -> None:
        self.keys, self.v = keys.detach(), kept_v
        self.lengths, self.mask, self.ops = lengths, mask, ops
        self._of_inference = any(x is not None and x.is_inference() for x in (keys, values, v))
        self._tracked = [x for x in (keys, values, v, lengths, mask) if x is not None and not x.is_inference()]
        self._changes = _changes(*self._tracked)
        self._of: dict[int, list[Deposit]] = {}
        self._streams: dict[int, set[Any]] = {}  # on which they were computed, on a GPU

    def check_versions(self) -> None:
        if _changes(*self._tracked) != self._changes:
            raise RuntimeError(
                "keys, values, v, lengths or mask of a memory have been modified by an inplace operation since it was made: "
                "make the memory anew after an optimizer's step"
            )

    def check_backward(self) -> None:
        self.check_versions()
        if self._of_inference:
            raise RuntimeError("a memory of tensors that were made in inference mode has no backward: make it of clones of them")

    def leave(self, root: Tensor | None, deposit: Deposit) -> None:
        """What a call's backward has for the root, if this backward comes to it."""
        if root is None:
            return
        backward = torch._C._current_graph_task_id()
        left, node = self._of.get(backward), root.grad_fn
        if left is not None:
            left.append(deposit)
        elif node is not None and torch._C._will_engine_execute_node(node):
            self._of[backward] = [deposit]
        else:
            return
        if self.keys.is_cuda:
            self._streams.setdefault(backward, set()).add(torch.cuda.current_stream(self.keys.device))

    def take(self) -> list[Deposit]:
        """Those of the backward that is running. Those of one that failed stay unused until the memory goes. They hold no graph, which
        would hold the memory, but where one is asked for (``create_graph``)."""
        backward = torch._C._current_graph_task_id()
        left = self._of.pop(backward, [])
        self._wait(self._streams.pop(backward, set()), left)
        return left

    def _wait(self, streams: set[Any], left: list[Deposit]) -> None:
        """Has the current stream wait for the others: autograd knows of no gradient that goes from a step to the root."""
        if not streams:
            return
        current = torch.cuda.current_stream(self.keys.device)
        for stream in streams - {current}:
            current.wait_stream(stream)
        if streams != {current}:
            for tensor in {tensor for deposit in left for tensor in deposit.tensors if tensor is not None}:
                tensor.record_stream(current)


class Root(torch.autograd.Function):
    """An empty tensor that steps depend on; its backward, which runs after theirs, is the gradient of keys, values and ``v``. It saves
    nothing that a backward would free: losses of steps may come one by one, as of steps that have nothing in common."""

    @staticmethod
    def forward(ctx: Any, deposits: Deposits, keys: Tensor, values: Tensor, v: Tensor | None) -> Tensor:
        ctx.deposits = deposits
        ctx.set_materialize_grads(False)
        return keys.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor | None) -> tuple[Tensor | None, ...]:
        deposits: Deposits = ctx.deposits
        steps = deposits.take()
        keys, v = deposits.keys, deposits.v
        if not steps:
            return None, None, None, None
        deposits.check_backward()
        if not all(step.is_as_left for step in steps):
            raise RuntimeError(
                "query, weights, spans or mask of a step over a memory have been modified by an inplace operation in its backward"
            )
        root = steps[0].root
        wants_keys, wants_values, wants_v = ctx.needs_input_grad[1:]
        asked = [(x.query, x.grad_scores, x.spans, x.mask) for x in steps if x.query is not None]
        summed = [(x.weights, x.grad_context, x.spans, x.mask) for x in steps if x.grad_context is not None]
        del steps
        rank, ops = keys.dim(), deposits.ops
        grad_keys = grad_values = grad_v = None
        if asked and (wants_keys or wants_v):
            queries, scores, spans, masks = (list(parts) for parts in zip(*asked, strict=True))
            del asked
            limits, mask = _limits(deposits.lengths, spans, queries, keys), _mask(deposits.mask, masks, queries, keys)
            query, grad_scores = _side_by_side(queries, rank, ops), _side_by_side(scores, rank, ops)
            if v is None:
                grad_keys = past_autograd(ops.source_sums, grad_scores, query, limits, mask)
            else:
                _, grad_keys, grad_v = past_autograd(ops.additive_scores_backward, grad_scores, query, keys, v, limits, mask, False)
            del query, grad_scores
        if summed and wants_values:
            weights, contexts, spans, masks = (list(parts) for parts in zip(*summed, strict=True))
            del summed
            limits, mask = _limits(deposits.lengths, spans, weights, keys), _mask(deposits.mask, masks, weights, keys)
            terms = _side_by_side(weights, rank, ops), _side_by_side(contexts, rank, ops)
            grad_values = past_autograd(ops.source_sums, *terms, limits, mask)
        return None, *_once(root, grad_keys if wants_keys else None, grad_values, grad_v if wants_v else None)


class _Once(torch.autograd.Function):
    """Gradients of a memory, or of a step over it, whose own are refused."""

    @staticmethod
    def forward(ctx: Any, root: Tensor, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if grad is None else grad.view_as(grad) for grad in grads)

    backward = staticmethod(refuse_second)


def _once(root: Tensor | None, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Where a graph of the gradients is asked for, they depend on all that the memory is made of: the ops were given it without a graph."""
    if root is None or not torch.is_grad_enabled():
        return grads
    once: tuple[Tensor | None, ...] = _Once.apply(root, *grads)  # type: ignore[no-untyped-call]
    return once


def _limits(lengths: Tensor | None, spans: list[Any], rows: list[Any], keys: Tensor) -> Tensor | None:
    """What the queries of all steps see, side by side: the spans of each, or the memory's lengths if none has any."""
    if all(span is None for span in spans):
        return lengths
    batch, source = keys.shape[0], keys.shape[-2]
    ends = keys.new_full((batch,), source, dtype=torch.int64) if lengths is None else lengths
    whole = torch.stack([torch.zeros_like(ends), ends], -1).unsqueeze(1)  # of a query without spans
    return torch.cat([whole.expand(-1, _count(row, keys), -1) if span is None else span for span, row in zip(spans, rows, strict=True)], 1)


def _mask(own: Tensor | None, masks: list[Any], rows: list[Any], keys: Tensor) -> Tensor | None:
    """The masks of all steps side by side, the memory's where a step has none; that alone if none has one."""
    if all(mask is None for mask in masks):
        return own
    whole = keys.new_ones((*keys.shape[:-2], 1, keys.shape[-2]), dtype=torch.bool) if own is None else own
    steps = [
        whole.expand(*[-1] * (keys.dim() - 2), _count(row, keys), -1) if mask is None else mask
        for mask, row in zip(masks, rows, strict=True)
    ]
    return torch.cat(steps, -2)


def _count(row: Tensor, keys: Tensor) -> int:
    """How many queries a step's row is of."""
    return row.shape[-2] if row.dim() == keys.dim() else 1


def _side_by_side(steps: list[Tensor], rank: int, ops: Any) -> Tensor:
    """``[B, (H,) K, W]`` or ``[B, (H,) W]`` of each step as one ``[B, (H,) T, W]``; empties the list, so that no more is held twice."""
    ranks = {step.dim() for step in steps}
    several = rank in ranks
    if len(ranks) > 1:
        steps = [step if step.dim() == rank else step.unsqueeze(-2) for step in steps]
    stacked: Tensor
    if len(steps) == 1:
        stacked = steps[0] if several else steps[0].unsqueeze(-2)
    elif any(_functorch.is_legacy_batchedtensor(step) for step in steps):  # of is_grads_batched, whose loop over ops takes no lists
        stacked = torch.cat(steps, -2) if several else torch.stack(steps, -2)
    else:
        stacked = past_autograd(ops.stack_steps, steps, several)
    steps.clear()
    return stacked


def _wide(tensor: Tensor) -> Tensor:
    """In the dtype that weights and gradients of scores are kept in."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _past(tensor: Tensor | None) -> Tensor | None:
    """Without its graph, unless a graph of the gradients is asked for: there it refuses second derivatives. A copy of a leaf, as an
    optimizer may step in the backward, once the leaf has its gradient."""
    if tensor is None:
        return None
    whole = tensor if tensor._base is None else tensor._base
    if whole.requires_grad and whole.is_leaf:
        tensor = tensor.clone()
    return tensor if torch.is_grad_enabled() else tensor.detach()


def _unchanged(
    memory: "AttentionMemory", spans: Tensor | None, mask: Tensor | None
) -> tuple["AttentionMemory", Deposits, Tensor | None, Tensor | None]:
    """What a call's backward needs, of a memory that holds what it held in the forward: with what the call sees."""
    assert memory._deposits is not None
    memory._deposits.check_backward()
    return memory, memory._deposits, *memory._seen(spans, mask)


def _query_gradient(
    memory: "AttentionMemory",
    grad_context: Tensor | None,
    grad_weights: Tensor | None,
    query: Tensor,
    weights: Tensor | None,
    spans: Tensor | None,
    mask: Tensor | None,
) -> Tensor | None:
    """What a call's backward gives its query, all else left with the memory. Without weights, ``grad_weights`` is that of raw scores."""
    memory, deposits, limits, seen = _unchanged(memory, spans, mask)
    keys, values, ops = memory._step_keys, memory._step_values, memory._ops_for(query, True, weights is None)
    grad_query: Tensor
    if memory._prepared is None:
        grad_query, grad_scores = past_autograd(
            ops.multiplicative_step_backward, grad_context, grad_weights, query, keys, values, memory.scale, weights, limits, seen
        )
    else:
        grad_query, grad_scores = past_autograd(
            ops.additive_step_backward, grad_context, grad_weights, query, keys, values, *memory._prepared, weights, limits, seen
        )
    deposits.leave(memory._root, Deposit.of(memory, query, grad_scores, weights, grad_context, spans, mask))
    (once,) = _once(memory._root, grad_query)
    return once


class Step(torch.autograd.Function):
    """One call of :meth:`AttentionMemory.attend`: gives the query its gradient and leaves the rest with the memory."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, root: Tensor | None, memory: "AttentionMemory", spans: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        context, weights = memory._forward(query, spans, mask)
        ctx.memory = memory
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, weights, spans, mask)
        return context, weights

    @staticmethod
    def backward(ctx: Any, grad_context: Tensor | None, grad_weights: Tensor | None) -> tuple[Tensor | None, None, None, None, None]:
        query, weights, spans, mask = ctx.saved_tensors
        if grad_context is None and grad_weights is None:
            return None, None, None, None, None
        return _query_gradient(ctx.memory, grad_context, grad_weights, query, weights, spans, mask), None, None, None, None


class Scores(torch.autograd.Function):
    """One call of :meth:`AttentionMemory.scores`, as :class:`Step`."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, root: Tensor | None, memory: "AttentionMemory", spans: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        ctx.memory = memory
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, spans, mask)
        return memory._forward_scores(query, spans, mask)

    @staticmethod
    def backward(ctx: Any, grad_scores: Tensor | None) -> tuple[Tensor | None, None, None, None, None]:
        query, spans, mask = ctx.saved_tensors
        if grad_scores is None:
            return None, None, None, None, None
        return _query_gradient(ctx.memory, None, _wide(grad_scores), query, None, spans, mask), None, None, None, None


class Context(torch.autograd.Function):
    """One call of :meth:`AttentionMemory.context`: gives the weights their gradient and leaves the rest with the memory."""

    @staticmethod
    def forward(
        ctx: Any, weights: Tensor, root: Tensor | None, memory: "AttentionMemory", spans: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        ctx.memory = memory
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weights, spans, mask)
        return memory._forward_context(weights, spans, mask)

    @staticmethod
    def backward(ctx: Any, grad_context: Tensor | None) -> tuple[Tensor | None, None, None, None, None]:
        weights, spans, mask = ctx.saved_tensors
        if grad_context is None:
            return None, None, None, None, None
        memory, deposits, limits, seen = _unchanged(ctx.memory, spans, mask)
        grad_weights = None
        if ctx.needs_input_grad[0]:
            grad_weights = past_autograd(memory._ops.weighted_values_backward, grad_context, memory._step_values, limits, seen)
        deposits.leave(memory._root, Deposit.of(memory, None, None, _wide(weights), grad_context, spans, mask))
        (once,) = _once(memory._root, grad_weights)
        return once, None, None, None, None


# Past Function.apply, which is Python and looks for functorch (attend has): 2 of the 15 microseconds that a step may cost.
step: Any = super(torch.autograd.Function, Step).apply
scores: Any = super(torch.autograd.Function, Scores).apply
context: Any = super(torch.autograd.Function, Context).apply
