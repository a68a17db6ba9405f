"""Attention memories: keys and values prepared once, attended to step by step, their gradients computed once after the last step.

A decoder asks one query at a time. A memory takes what does not depend on the query out of the step: it checks the arguments, and in
the additive family exponentiates the keys. Under autograd a step's backward computes the gradient of its query alone and leaves the
rest (its query and weights, and the gradients of its scores and its context) with the memory; when the last step of a backward is
done, the gradients of keys, values and ``v`` follow from all steps at once.

Two nodes of the graph do it: :class:`_Root`, made with the memory, and one :class:`_Step` per call, which depends on the root
through an empty tensor and so runs before it.
"""

from typing import Any

import torch
from torch import Tensor

from onepass import reference
from onepass._backends import pick_backend
from onepass._validate import check_inputs

Result = tuple[Tensor, Tensor | None]


def additive_memory(
    keys: Tensor,
    values: Tensor,
    v: Tensor,
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> "AttentionMemory":
    """A memory for additive attention, of keys that are projected already; :meth:`onepass.AdditiveAttention.memory` projects.

    Args:
        keys: ``[B, S, A]`` or ``[B, H, S, A]``.
        values: ``[B, S, D]`` or ``[B, H, S, D]``.
        v: ``[A]`` or ``[H, A]``.
        lengths: how many source positions are visible, in ``[0, S]``: integers ``[B]``.
        mask: boolean, True where queries attend: ``[B, S]`` or ``[B, 1, S]``, with heads also ``[B, H, 1, S]``.
        dtype: how exponentials and values are kept: None as they are, or ``torch.bfloat16``, which halves what a step reads. Each
            exponential ``e^(2k)`` then moves by at most ``2^-8`` of itself, so a key by ``2^-9`` and a score by ``2^-9 sum |v|``;
            each value by ``2^-8`` of itself. Not for float64. Where gradients are not deferred, those of what is stored so are rounded too.
        backend: as in :func:`onepass.additive_attention`.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`onepass.additive_attention`.
    """
    return _checked(keys, values, v, "", 1.0, lengths, mask, dtype, backend)


def multiplicative_memory(
    keys: Tensor,
    values: Tensor,
    *,
    scale: float = 1.0,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> "AttentionMemory":
    """A memory for multiplicative attention. Arguments and errors as in :func:`additive_memory`, without ``v``.

    With ``dtype=torch.bfloat16`` keys and values are rounded to it: each moves by at most ``2^-8`` of itself.
    """
    return _checked(keys, values, None, "v", scale, lengths, mask, dtype, backend)


class AttentionMemory:
    """Keys and values of ``B`` sources, ready for many queries. Made by :func:`additive_memory`, :func:`multiplicative_memory` or a
    layer's ``memory``; goes to :meth:`attend`, or to the layer in place of the encoder states.

    Gradients of keys, values and ``v`` are deferred to the end of each backward on the compiled kernels; under ``torch.compile`` and
    ``torch.export``, and on the reference, every step computes its own. A memory serves the grad mode that it was made in.

    Attributes: ``keys``, ``values``, ``lengths``, ``mask`` (expanded to ``[B, (H,) 1, S]``), ``v`` (None if multiplicative),
    ``scale``, ``dtype`` (None or ``torch.bfloat16``).
    """

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        v: Tensor | None,
        scale: float,
        lengths: Tensor | None,
        mask: Tensor | None,
        dtype: torch.dtype | None,
        backend: str,
        prepared: tuple[Tensor, ...] | None = None,
    ) -> None:
        self.keys, self.values, self.v, self.scale = keys, values, v, scale
        self.lengths, self.mask, self.dtype = lengths, mask, dtype
        self._backend = backend
        self._with_grad = torch.is_grad_enabled()
        if prepared is None and v is not None and backend == "cpu":
            prepared = torch.ops.onepass.additive_prepare(keys.detach(), v.detach(), lengths, mask, dtype is not None)
        self._prepared = prepared
        self._one_query = torch.Size((*keys.shape[:-2], keys.shape[-1]))
        self._step_keys, self._step_values = keys.detach(), values.detach()  # what steps read
        if dtype is not None:
            self._step_values = self._step_values.to(dtype)
            self._step_keys = self._step_keys.to(dtype) if v is None else self._step_keys
        self._root: Tensor | None = None
        self._deposits: _Deposits | None = None
        if self._with_grad and backend != "reference" and not torch.compiler.is_compiling():
            self._deposits = _Deposits(lengths, mask)
            self._versions = self._versions_now()
            root = _Root.apply(self._deposits, keys, values, v)  # type: ignore[no-untyped-call]
            self._root = root if root.requires_grad else None

    def attend(self, query: Tensor, need_weights: bool = False) -> Result:
        """Context and weights of one query per source, or of several (beams, or all steps at once).

        Args:
            query: ``[B, A]`` or ``[B, K, A]``, with heads ``[B, H, A]`` or ``[B, H, K, A]``; projected already, of the keys' dtype.
            need_weights: also return the weights; a gradient may come back through them.

        Returns:
            ``(context, weights)``: ``[B, D]`` and ``[B, S]`` or None; with ``K`` queries ``[B, K, D]`` and ``[B, K, S]``.

        Raises:
            TypeError, ValueError: a query of another dtype, device or size. RuntimeError: another grad mode than the memory's.
        """
        self._check(query)
        if torch.is_grad_enabled() != self._with_grad:
            raise RuntimeError(
                f"this memory was made with gradients {'enabled' if self._with_grad else 'disabled'} (torch.is_grad_enabled()) and is used "
                f"with them {'disabled' if self._with_grad else 'enabled'}: make it in the mode of its steps"
            )
        if self._backend == "reference" or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            context, weights = self._undeferred(query)
        elif self._with_grad and (self._root is not None or query.requires_grad):
            context, weights = _step(query, self._root, self)
        else:
            context, weights = self._forward(query)
        if not need_weights:
            return context, None
        return context, weights if weights.dtype == query.dtype else weights.to(query.dtype)

    def select(self, rows: Tensor) -> "AttentionMemory":
        """A memory of some of the sources: indices ``[N]``, or boolean ``[B]``; nothing is prepared again."""
        if rows.dim() != 1 or rows.dtype not in (torch.bool, torch.int64, torch.int32):
            raise ValueError(f"rows must be indices [N] or boolean [B]; got {list(rows.shape)} of {rows.dtype}")
        if rows.dtype == torch.bool and rows.shape[0] != self.keys.shape[0]:
            raise ValueError(f"boolean rows must be [B] = [{self.keys.shape[0]}]; got {list(rows.shape)}")
        if torch.is_grad_enabled() != self._with_grad:
            raise RuntimeError("select from a memory in the grad mode that it was made in (torch.is_grad_enabled())")
        index = rows.nonzero().squeeze(-1) if rows.dtype == torch.bool else rows

        def some(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.index_select(0, index)

        prepared = self._prepared
        if prepared is not None:
            exponentials, sizes, weighting = prepared
            prepared = (exponentials.index_select(0, index), sizes.index_select(0, index), weighting)
        keys, values = self.keys.index_select(0, index), self.values.index_select(0, index)
        return AttentionMemory(keys, values, self.v, self.scale, some(self.lengths), some(self.mask), self.dtype, self._backend, prepared)

    def __repr__(self) -> str:
        family = "multiplicative" if self.v is None else "additive"
        return f"AttentionMemory({family}, keys={list(self.keys.shape)}, values={list(self.values.shape)}, dtype={self.dtype})"

    def _check(self, query: Tensor) -> None:
        if not isinstance(query, Tensor):
            raise TypeError(f"query must be a torch.Tensor; got {type(query).__name__}")
        keys, sizes = self.keys, query.shape
        if sizes == self._one_query and query.dtype is keys.dtype and query.device == keys.device:
            return
        several = len(sizes) == keys.dim() and sizes[:-2] == keys.shape[:-2]
        if several and sizes[-1] == keys.shape[-1] and query.dtype is keys.dtype and query.device == keys.device:
            return
        if query.dtype != keys.dtype:
            raise TypeError(f"query must have the dtype of the memory's keys, {keys.dtype}; got {query.dtype}")
        if query.device != keys.device:
            raise ValueError(f"query must be on the device of the memory, {keys.device}; got {query.device}")
        lead = list(keys.shape[:-2])
        raise ValueError(
            f"query must be {[*lead, keys.shape[-1]]}, or {lead} x K x [{keys.shape[-1]}] for K queries, to go with this memory; "
            f"got {list(sizes)}"
        )

    def _versions_now(self) -> list[int]:
        return [tensor._version for tensor in (self.keys, self.values, self.v, self.lengths, self.mask) if tensor is not None]

    def _forward(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """The op of a step, past autograd."""
        with torch._C._AutoDispatchBelowAutograd():
            if self._prepared is None:
                context, weights = torch.ops.onepass.multiplicative_step.default(
                    query, self._step_keys, self._step_values, self.scale, self.lengths, self.mask
                )
            else:
                context, weights = torch.ops.onepass.additive_step.default(
                    query, self._step_keys, self._step_values, self.v, *self._prepared, self.lengths, self.mask
                )
        return context, weights

    def _undeferred(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """By ops or formulae that carry their gradients themselves."""
        keys, values = self.keys, self.values
        if self.dtype is not None:
            values = values.to(self.dtype)
            keys = keys.to(self.dtype) if self.v is None else keys
        context: Tensor
        weights: Tensor
        if self._prepared is not None:
            context, weights = torch.ops.onepass.additive_step(query, keys, values, self.v, *self._prepared, self.lengths, self.mask)
        elif self._backend != "reference":
            context, weights = torch.ops.onepass.multiplicative_step(query, keys, values, self.scale, self.lengths, self.mask)
        else:
            context, weights = self._by_reference(query, keys.to(query.dtype), values.to(query.dtype))
        return context, weights

    def _by_reference(self, query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        one_step = query.dim() < keys.dim()
        queries = query.unsqueeze(-2) if one_step else query
        options: dict[str, Any] = {"lengths": self.lengths, "mask": self.mask, "need_weights": True}
        if self.v is None:
            context, weights = reference.multiplicative_attention(queries, keys, values, scale=self.scale, **options)
        else:
            context, weights = reference.additive_attention(queries, keys, values, self.v, **options)
        assert weights is not None
        return (context.squeeze(-2), weights.squeeze(-2)) if one_step else (context, weights)


def _checked(
    keys: Tensor,
    values: Tensor,
    v: Tensor | None,
    lacks: str,
    scale: float,
    lengths: Tensor | None,
    mask: Tensor | None,
    dtype: torch.dtype | None,
    backend: str,
) -> AttentionMemory:
    if not isinstance(keys, Tensor):
        raise TypeError(f"keys must be a torch.Tensor; got {type(keys).__name__}")
    a_query = keys.new_empty((*keys.shape[:-2], keys.shape[-1])) if keys.dim() in (3, 4) else keys  # other ranks are refused
    inputs = check_inputs(a_query, keys, values, v, lengths, mask, lacks=lacks, like="keys")
    if lengths is not None and lengths.dim() != 1:
        raise ValueError(f"lengths of a memory belong to its sources, [B] = [{keys.shape[0]}]; got {list(lengths.shape)}")
    if dtype not in (None, keys.dtype, torch.bfloat16) or (dtype == torch.bfloat16 and keys.dtype == torch.float64):
        other = "" if keys.dtype == torch.float64 else " or torch.bfloat16"
        raise TypeError(f"dtype of a memory of {keys.dtype} must be None, {keys.dtype}{other}; got {dtype}")
    kept = torch.bfloat16 if dtype == torch.bfloat16 != keys.dtype else None
    return AttentionMemory(keys, values, v, float(scale), inputs.lengths, inputs.mask, kept, pick_backend(backend, keys))


class _Deposits:
    """What the steps of a backward leave for its root, and what the root needs besides; of every backward its own."""

    def __init__(self, lengths: Tensor | None, mask: Tensor | None) -> None:
        self.lengths, self.mask = lengths, mask
        self._of: dict[int, list[tuple[Tensor | None, ...]]] = {}

    def leave(self, *tensors: Tensor | None) -> None:
        self._of.setdefault(torch._C._current_graph_task_id(), []).append(tensors)

    def take(self) -> list[tuple[Tensor | None, ...]]:
        """Those of the backward that is running. Those of one that failed stay unused until the memory goes."""
        return self._of.pop(torch._C._current_graph_task_id(), [])


class _Root(torch.autograd.Function):
    """An empty tensor that steps depend on; its backward, which runs after theirs, is the gradient of keys, values and ``v``."""

    @staticmethod
    def forward(ctx: Any, deposits: _Deposits, keys: Tensor, values: Tensor, v: Tensor | None) -> Tensor:
        ctx.deposits = deposits
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(keys, values, v)
        return keys.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor | None) -> tuple[Tensor | None, ...]:
        deposits: _Deposits = ctx.deposits
        steps = deposits.take()
        keys, _, v = ctx.saved_tensors
        if not steps:
            return None, None, None, None
        wants_keys, wants_values, wants_v = ctx.needs_input_grad[1:]
        queries, scores, weights, contexts = (list(parts) for parts in zip(*steps, strict=True))
        del steps
        lengths, mask, rank = deposits.lengths, deposits.mask, keys.dim()
        grad_keys = grad_values = grad_v = None
        if wants_keys or wants_v:
            query, grad_scores = _side_by_side(queries, rank), _side_by_side(scores, rank)
            if v is None:
                grad_keys = torch.ops.onepass.source_sums(grad_scores, query, lengths, mask)
            else:
                _, grad_keys, grad_v = torch.ops.onepass.additive_scores_backward(grad_scores, query, keys, v, lengths, mask)
            del query, grad_scores
        if wants_values:
            through = [i for i, grad in enumerate(contexts) if grad is not None]
            some_weights, some_contexts = [weights[i] for i in through], [contexts[i] for i in through]
            del weights, contexts
            if through:
                grad_values = torch.ops.onepass.source_sums(
                    _side_by_side(some_weights, rank), _side_by_side(some_contexts, rank), lengths, mask
                )
        return None, grad_keys if wants_keys else None, grad_values, grad_v if wants_v else None


def _side_by_side(steps: list[Tensor], rank: int) -> Tensor:
    """``[B, (H,) K, W]`` or ``[B, (H,) W]`` of each step as one ``[B, (H,) T, W]``; empties the list, so that no more is held twice."""
    ranks = {step.dim() for step in steps}
    several = rank in ranks
    if len(ranks) > 1:
        steps = [step if step.dim() == rank else step.unsqueeze(-2) for step in steps]
    stacked: Tensor = steps[0] if several and len(steps) == 1 else torch.ops.onepass.stack_steps(steps, several)
    steps.clear()
    return stacked


class _Step(torch.autograd.Function):
    """One call of :meth:`AttentionMemory.attend`: gives the query its gradient and leaves the rest with the memory."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, root: Tensor | None, memory: AttentionMemory) -> tuple[Tensor, Tensor]:
        context, weights = memory._forward(query)
        ctx.memory = memory
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, weights)
        return context, weights

    @staticmethod
    def backward(ctx: Any, grad_context: Tensor | None, grad_weights: Tensor | None) -> tuple[Tensor | None, None, None]:
        query, weights = ctx.saved_tensors
        if grad_context is None and grad_weights is None:
            return None, None, None
        memory: AttentionMemory = ctx.memory
        if memory._versions_now() != memory._versions:
            raise RuntimeError("keys, values, v, lengths or mask of a memory have been modified by an inplace operation since it was made")
        keys, values = memory._step_keys, memory._step_values
        if memory._prepared is None:
            grad_query, grad_scores = torch.ops.onepass.multiplicative_step_backward(
                grad_context, grad_weights, query, keys, values, memory.scale, weights, memory.lengths, memory.mask
            )
        else:
            grad_query, grad_scores = torch.ops.onepass.additive_step_backward(
                grad_context, grad_weights, query, keys, values, *memory._prepared, weights, memory.lengths, memory.mask
            )
        root = None if memory._root is None else memory._root.grad_fn
        if root is not None and memory._deposits is not None and torch._C._will_engine_execute_node(root):
            memory._deposits.leave(query, grad_scores, weights, grad_context)
        return grad_query, None, None


# Past Function.apply, which is Python and looks for functorch (attend has): 2 of the 15 microseconds that a step may cost.
_step: Any = super(torch.autograd.Function, _Step).apply
