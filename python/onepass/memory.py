"""Attention memories: keys and values prepared once, attended to step by step, their gradients computed once after the last step.

A decoder asks one query at a time. A memory takes what does not depend on the query out of the step: it checks the arguments, and in
the additive family exponentiates the keys. Under autograd a step's backward computes the gradient of its query alone and leaves the
rest (its query and weights, and the gradients of its scores and its context) with the memory; when the last step of a backward is
done, the gradients of keys, values and ``v`` follow from all steps at once: ``_deferred.py``.
"""

from typing import Any

import torch
from torch import Tensor

from onepass import _deferred, reference
from onepass._backends import most_queries, pick_backend
from onepass._library import ops_of
from onepass._validate import (
    are_recorded,
    are_transformed,
    check_inputs,
    check_kind,
    check_mask,
    check_scale,
    check_spans,
    limits_of,
    not_of_memory,
    refuse_tangents,
    uncast,
)

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
            each value by ``2^-8`` of itself. Not for float64. Where gradients are not deferred, those of what is stored so are rounded too,
            and those of queries are taken at the keys as they were given.
            The Triton kernels keep the keys themselves, each moved by at most ``2^-8`` of itself; the reference keeps them as they are.
        backend: as in :func:`onepass.additive_attention`.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`onepass.additive_attention`.
    """
    return remember(keys, values, v, "", 1.0, lengths, mask, dtype, backend)


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
    return remember(keys, values, None, "v", scale, lengths, mask, dtype, backend)


class AttentionMemory:
    """Keys and values of ``B`` sources, ready for many queries. Made by :func:`additive_memory`, :func:`multiplicative_memory` or a
    layer's ``memory``; goes to :meth:`attend`, or to the layer in place of the encoder states.

    Gradients of keys, values and ``v`` are deferred to the end of each backward on the compiled kernels; under ``torch.compile``,
    ``torch.export`` and ``torch.jit.trace``, and on the reference, every step computes its own, and so do those over a memory that such
    code has made. A memory serves the grad mode that it was made in.

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
        stored: tuple[Tensor, ...] | None = None,
        kept_v: Tensor | None = None,
    ) -> None:
        self.keys, self.values, self.v, self.scale = keys, values, v, scale
        self.lengths, self.mask, self.dtype = lengths, mask, dtype
        self._backend, self._ops = backend, ops_of(backend)
        if backend == "cuda":
            self._most = most_queries(v is not None, keys.shape[-1], values.shape[-1], keys.dtype, dtype)
        self._with_grad = torch.is_grad_enabled()
        compiling = torch.compiler.is_compiling()  # steps over what that makes defer nothing: they take keys, values and v themselves
        if prepared is None and v is not None and backend == "cpu":
            prepared = self._ops.additive_prepare(keys.detach(), v.detach(), lengths, mask, dtype is not None)
        if kept_v is None and v is not None:
            kept_v = v if compiling else v.detach().clone()  # FSDP may free a parameter before the last step
        self._step_v = kept_v
        if prepared is None and kept_v is not None and backend in ("triton", "cuda"):  # whose steps read the keys, and v
            prepared = (keys.new_empty((keys.shape[0], 0)), keys.new_empty((keys.shape[0], 0)), kept_v.detach())
        self._prepared = prepared
        self._one_query = torch.Size((*keys.shape[:-2], keys.shape[-1]))
        self._step_keys, self._step_values = stored or (
            self._kept_keys(keys if compiling else keys.detach()), self._kept_values(values if compiling else values.detach())
        )
        self._root: Tensor | None = None
        self._deposits: _deferred.Deposits | None = None
        transformed = are_recorded() or torch._C._are_functorch_transforms_active()
        if self._with_grad and backend != "reference" and not transformed:
            self._deposits = _deferred.Deposits(keys, values, v, self._step_v, lengths, mask, self._ops)
            root = _deferred.Root.apply(self._deposits, keys, values, v)  # type: ignore[no-untyped-call]
            self._root = root if root.requires_grad else None

    def attend(self, query: Tensor, need_weights: bool = False, *, spans: Tensor | None = None, mask: Tensor | None = None) -> Result:
        """Context and weights of one query per source, or of several (beams, or all steps at once).

        Args:
            query: ``[B, A]`` or ``[B, K, A]``, with heads ``[B, H, A]`` or ``[B, H, K, A]``; projected already, of the keys' dtype.
            need_weights: also return the weights; a gradient may come back through them.
            spans: the window of the source that each query sees, as in :func:`onepass.additive_attention`: integers ``[B, 2]``, or
                ``[B, K, 2]`` for ``K`` queries, for all heads. What the memory hides stays hidden.
            mask: boolean, True where the query attends, of what the memory shows: ``[B, S]``, or broadcastable to ``[B, K, S]`` for ``K``
                queries, with heads also ``[B, H, K, S]``: what a pointer has chosen before. A copy is kept for the backward.

        Returns:
            ``(context, weights)``: ``[B, D]`` and ``[B, S]`` or None; with ``K`` queries ``[B, K, D]`` and ``[B, K, S]``.

        Raises:
            TypeError, ValueError: a query, spans or a mask of another dtype, device or size. RuntimeError: another grad mode than the
            memory's, spans outside ``[0, S]`` (which the Triton kernels take as the nearest number within).
        """
        self._check(query)
        context, weights = self._call(_deferred.step, self._forward, self._undeferred, query, spans, mask)
        if not need_weights:
            return context, None
        return context, weights if weights.dtype == query.dtype else weights.to(query.dtype)

    def scores(self, query: Tensor, *, spans: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """The raw scores of one query per source, or of several: for normalisers other than softmax, whose weights go to :meth:`context`.

        Arguments and errors as in :meth:`attend`.

        Returns:
            ``[B, S]`` or ``[B, K, S]``, with heads ``[B, H, S]`` or ``[B, H, K, S]``; ``-inf`` where a position is not visible, as
            :func:`onepass.additive_scores` has it. Gradients of keys and ``v`` are deferred as :meth:`attend`'s are.
        """
        self._check(query)
        scores: Tensor = self._call(_deferred.scores, self._forward_scores, self._undeferred_scores, query, spans, mask)
        return scores

    def context(self, weights: Tensor, *, spans: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """The context of given weights, ``sum_s weights[s] values[s]`` over the visible positions: for weights that are changed after the
        softmax, by dropout or by the Gaussian of Luong's *local-p*.

        Args:
            weights: ``[B, S]`` or ``[B, K, S]``, with heads ``[B, H, S]`` or ``[B, H, K, S]``, of the keys' dtype. Where a position is
                not visible, weights and values are not read, and the gradient of the weights is exactly 0.
            spans, mask: as in :meth:`attend`.

        Returns:
            ``[B, D]`` or ``[B, K, D]``, with heads ``[B, H, D]`` or ``[B, H, K, D]``. The gradient of the values is deferred as
            :meth:`attend`'s is.

        Raises:
            As :meth:`attend`.
        """
        self._check_weights(weights)
        context: Tensor = self._call(_deferred.context, self._forward_context, self._undeferred_context, weights, spans, mask)
        return context

    def select(self, rows: Tensor | list[int] | slice) -> "AttentionMemory":
        """A memory of some of the sources: indices ``[N]``, or boolean ``[B]``, a list of either, or a slice; nothing is prepared again."""
        if isinstance(rows, slice):
            rows = torch.arange(self.keys.shape[0], device=self.keys.device)[rows]
        elif isinstance(rows, list) and all(isinstance(row, (int, torch.SymInt)) for row in rows):
            rows = torch.tensor(rows, dtype=None if rows else torch.int64, device=self.keys.device)
        if not isinstance(rows, Tensor):
            raise TypeError(f"rows must be a torch.Tensor, a list of integers or a slice; got {type(rows).__name__}")
        if rows.dim() != 1 or rows.dtype not in (torch.bool, torch.int64, torch.int32):
            raise ValueError(f"rows must be indices [N] or boolean [B]; got {list(rows.shape)} of {rows.dtype}")
        if rows.dtype == torch.bool and rows.shape[0] != self.keys.shape[0]:
            raise ValueError(f"boolean rows must be [B] = [{self.keys.shape[0]}]; got {list(rows.shape)}")
        self._check_mode()
        self._check_unchanged()
        index = rows.nonzero().squeeze(-1) if rows.dtype == torch.bool else rows
        try:
            keys, values = self.keys.index_select(0, index), self.values.index_select(0, index)
        except (IndexError, RuntimeError) as problem:
            if all(0 <= row < self.keys.shape[0] for row in index.tolist()):
                raise
            raise IndexError(f"rows must lie in [0, B) = [0, {self.keys.shape[0]}); got {rows.tolist()}") from problem

        def some(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.index_select(0, index)

        prepared = self._prepared
        if prepared is not None:
            exponentials, sizes, weighting = prepared
            prepared = (exponentials.index_select(0, index), sizes.index_select(0, index), weighting)
        stored = None if self.dtype is None else tuple(stored.index_select(0, index) for stored in (self._step_keys, self._step_values))
        rest = some(self.lengths), some(self.mask), self.dtype, self._backend
        return AttentionMemory(keys, values, self.v, self.scale, *rest, prepared, stored, self._step_v)

    def detach(self) -> "AttentionMemory":
        """The same sources without gradients, for steps beside those of training, as scheduled sampling takes them; nothing is prepared
        again. It serves steps under ``torch.no_grad()``, wherever this is called."""
        self._check_unchanged()
        keys, values, v = self.keys.detach(), self.values.detach(), None if self.v is None else self.v.detach()
        rest = self.lengths, self.mask, self.dtype, self._backend, self._prepared
        kept = self._step_keys.detach(), self._step_values.detach()
        with torch.no_grad():
            return AttentionMemory(keys, values, v, self.scale, *rest, kept, self._step_v)

    def __reduce__(self) -> Any:
        if self._with_grad and any(tensor is not None and tensor.requires_grad for tensor in (self.keys, self.values, self.v)):
            raise TypeError(
                "an AttentionMemory with gradients belongs to its graph and cannot be copied or pickled: make it anew of its encoder states"
            )
        v, lacks = (None, "v") if self._step_v is None else (self._step_v.detach(), "")
        backend = "reference" if self._backend == "reference" else "auto"
        rest = self.scale, self.lengths, self.mask, self.dtype, backend
        return _made_anew, (self._with_grad, self.keys.detach(), self.values.detach(), v, lacks, *rest)

    def __repr__(self) -> str:
        family = "multiplicative" if self.v is None else "additive"
        return f"AttentionMemory({family}, keys={list(self.keys.shape)}, values={list(self.values.shape)}, dtype={self.dtype})"

    def _call(self, deferred: Any, forward: Any, undeferred: Any, rows: Tensor, spans: Tensor | None, mask: Tensor | None) -> Any:
        """One call, of queries or of weights that are given, in the one of three ways that the grad mode and who looks on leave to it."""
        defers = self._defers(rows)
        if spans is not None or mask is not None:
            spans, mask = self._visible(rows, spans, mask)
        if not defers:
            return undeferred(rows, spans, mask)
        if self._with_grad and (self._root is not None or rows.requires_grad):
            return deferred(rows, self._root, self, spans, mask)
        return forward(rows, spans, mask)

    def _check(self, query: Tensor) -> None:
        if not isinstance(query, Tensor) or query.is_nested:
            check_kind("query", query, self.keys, "the memory's keys")
        keys, sizes = self.keys, query.shape
        if len(sizes) == keys.dim() - 1 and sizes == self._one_query and query.dtype is keys.dtype and query.device == keys.device:
            return
        several = len(sizes) == keys.dim() and sizes[:-2] == keys.shape[:-2]
        if several and sizes[-1] == keys.shape[-1] and query.dtype is keys.dtype and query.device == keys.device:
            return
        if query.dtype != keys.dtype:
            hint = uncast(query, "query.to(memory.keys.dtype)")
            raise TypeError(f"query must have the dtype of the memory's keys, {keys.dtype}; got {query.dtype}{hint}")
        if query.device != keys.device:
            raise ValueError(f"query must be on the device of the memory, {keys.device}; got {query.device}")
        raise not_of_memory(query, list(keys.shape[:-2]), keys.shape[-1])

    def _check_weights(self, weights: Tensor) -> None:
        if not isinstance(weights, Tensor) or weights.is_nested:
            check_kind("weights", weights, self.keys, "the memory's keys")
        if weights.dtype != self.keys.dtype:
            hint = uncast(weights, "weights.to(memory.keys.dtype)")
            raise TypeError(f"weights must have the dtype of the memory's keys, {self.keys.dtype}; got {weights.dtype}{hint}")
        if weights.device != self.keys.device:
            raise ValueError(f"weights must be on the device of the memory, {self.keys.device}; got {weights.device}")
        lead, source, sizes = list(self.keys.shape[:-2]), self.keys.shape[-2], list(weights.shape)
        several = len(sizes) == self.keys.dim() and sizes[:-2] == lead and sizes[-1] == source
        if not several and sizes != [*lead, source]:
            raise ValueError(
                f"weights must be {[*lead, source]}, or {lead} x K x [{source}] for K queries, to go with this memory; got {sizes}"
            )

    def _defers(self, rows: Tensor) -> bool:
        """Whether a call goes past autograd, and leaves to the end of the backward what it owes the memory. Else its own ops or formulae
        carry all gradients: on the reference, in compiled, traced or transformed code, and where such code made the memory, which then
        has no root. An error in another grad mode than the memory's, and where derivatives are asked for that the ops lack."""
        self._check_mode()
        if self._backend == "reference":
            return False
        if are_recorded() or are_transformed():
            refuse_tangents(rows, self.keys, self.values, self.v)
            self._check_unchanged()
            return False
        return self._deposits is not None or not self._with_grad

    def _check_mode(self) -> None:
        if torch.is_grad_enabled() == self._with_grad:
            return
        made, used, hint = "disabled", "enabled", "make it in the mode of its steps"
        if self._with_grad:
            made, used, hint = "enabled", "disabled", "steps that train nothing, as a validation's, take memory.detach()"
            hint += "; torch.utils.checkpoint wants use_reentrant=False"
        raise RuntimeError(f"this memory was made with gradients {made} (torch.is_grad_enabled()) and is used with them {used}: {hint}")

    def _check_unchanged(self) -> None:
        """Raise where what was prepared is not of these keys any more. Steps that defer do so in their backward; compiled ones cannot."""
        if self._deposits is not None and not torch.compiler.is_compiling():
            self._deposits.check_versions()

    def _visible(self, rows: Tensor, spans: Tensor | None, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Spans of a query or its weights, ended by the memory's lengths, and its mask, with the memory's: what the ops take in the place
        of the memory's own; None for what is not given."""
        one_step = rows.dim() < self.keys.dim()
        rows = rows.unsqueeze(-2) if one_step else rows
        if spans is not None:
            spans = limits_of(self.lengths, check_spans(spans, rows, one_step), self.keys.shape[-2])
        if mask is not None:
            mask = check_mask(mask, rows, self.keys, one_step)
            assert mask is not None
            if self.mask is not None:
                mask = mask & self.mask
            elif self._with_grad or are_recorded():
                mask = mask.clone()
        return spans, mask

    def _seen(self, spans: Tensor | None, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """What the ops take: of the call, or of the memory where the call gives none."""
        return self.lengths if spans is None else spans, self.mask if mask is None else mask

    def _ops_for(self, query: Tensor, backward: bool = False, scores: bool = False) -> Any:
        """The ops of a step: the memory's backend's, or Triton's where CUDA has none for so many queries, or for raw scores."""
        if self._backend != "cuda":
            return self._ops
        queries = query.shape[-2] if query.dim() == self.keys.dim() else 1
        return ops_of(pick_backend("triton", query, self.keys)) if scores or queries > self._most[backward] else self._ops

    def _forward(self, query: Tensor, spans: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The op of a step, past autograd."""
        limits, mask = self._seen(spans, mask)
        with torch._C._AutoDispatchBelowAutograd():
            if self._prepared is None:
                context, weights = self._ops_for(query).multiplicative_step.default(
                    query, self._step_keys, self._step_values, self.scale, limits, mask
                )
            else:
                context, weights = self._ops_for(query).additive_step.default(
                    query, self._step_keys, self._step_values, self._step_v, *self._prepared, limits, mask
                )
        return context, weights

    def _forward_scores(self, query: Tensor, spans: Tensor | None, mask: Tensor | None) -> Tensor:
        """The op of :meth:`scores`, past autograd."""
        with torch._C._AutoDispatchBelowAutograd():
            return self._scores_op(query, self._step_keys, self._step_v, spans, mask)

    def _scores_op(self, query: Tensor, keys: Tensor, v: Tensor | None, spans: Tensor | None, mask: Tensor | None) -> Tensor:
        limits, mask = self._seen(spans, mask)
        ops = self._ops_for(query, scores=True)
        scores: Tensor
        if self._prepared is None:
            scores = ops.multiplicative_step_scores.default(query, keys, self.scale, limits, mask)
        else:
            scores = ops.additive_step_scores.default(query, keys, v, *self._prepared, limits, mask)
        return scores

    def _forward_context(self, weights: Tensor, spans: Tensor | None, mask: Tensor | None) -> Tensor:
        """The op of :meth:`context`, past autograd."""
        limits, mask = self._seen(spans, mask)
        with torch._C._AutoDispatchBelowAutograd():
            context: Tensor = self._ops.weighted_values.default(weights, self._step_values, limits, mask)
        return context

    def _kept_keys(self, keys: Tensor) -> Tensor:
        """What steps read of the keys: in the memory's dtype, unless they are kept as exponentials, or by the reference."""
        if self.dtype is None or (self.v is not None and self._backend not in ("triton", "cuda")):
            return keys
        return keys.to(self.dtype)

    def _kept_values(self, values: Tensor) -> Tensor:
        return values if self.dtype is None else values.to(self.dtype)

    def _kept(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values and ``v`` as steps read them, with their derivatives if there are any. A trace is one for both modes."""
        if not self._with_grad and self._backend != "reference" and torch._C._get_tracing_state() is None:
            return self._step_keys, self._step_values, self._step_v
        return self._kept_keys(self.keys), self._kept_values(self.values), self.v

    def _undeferred(self, query: Tensor, spans: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """By ops or formulae that carry their gradients themselves."""
        limits, mask = self._seen(spans, mask)
        keys, values, v = self._kept()
        context: Tensor
        weights: Tensor
        if self._prepared is not None:
            context, weights = self._ops_for(query).additive_step(query, keys, values, v, *self._prepared, limits, mask)
        elif self._backend != "reference":
            context, weights = self._ops_for(query).multiplicative_step(query, keys, values, self.scale, limits, mask)
        else:
            context, weights = self._by_reference(query, keys.to(query.dtype), values.to(query.dtype), spans, mask)
        return context, weights

    def _undeferred_scores(self, query: Tensor, spans: Tensor | None, mask: Tensor | None) -> Tensor:
        keys, _, v = self._kept()
        if self._backend != "reference":
            return self._scores_op(query, keys, v, spans, mask)
        mask = self._seen(spans, mask)[1]
        one_step = query.dim() < keys.dim()
        queries, keys = query.unsqueeze(-2) if one_step else query, keys.to(query.dtype)
        if self.v is None:
            visible = reference.visible_positions(keys, queries.shape[-2], self.lengths, mask, spans)
            scores = reference.multiplicative_scores(queries, keys, self.scale, visible)
        else:
            scores = reference.additive_scores(queries, keys, self.v, lengths=self.lengths, mask=mask, spans=spans)
        return scores.squeeze(-2) if one_step else scores

    def _undeferred_context(self, weights: Tensor, spans: Tensor | None, mask: Tensor | None) -> Tensor:
        limits, mask = self._seen(spans, mask)
        _, values, _ = self._kept()
        if self._backend != "reference":
            context: Tensor = self._ops.weighted_values(weights, values, limits, mask)
            return context
        one_step = weights.dim() < values.dim()
        rows = weights.unsqueeze(-2) if one_step else weights
        visible = reference.visible_positions(self.keys, rows.shape[-2], self.lengths, mask, spans)
        context = reference.weighted_values(rows, values.to(rows.dtype), visible)
        return context.squeeze(-2) if one_step else context

    def _by_reference(
        self, query: Tensor, keys: Tensor, values: Tensor, spans: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        one_step = query.dim() < keys.dim()
        queries = query.unsqueeze(-2) if one_step else query
        options: dict[str, Any] = {"lengths": self.lengths, "mask": mask, "spans": spans, "need_weights": True}
        if self.v is None:
            context, weights = reference.multiplicative_attention(queries, keys, values, scale=self.scale, **options)
        else:
            context, weights = reference.additive_attention(queries, keys, values, self.v, **options)
        assert weights is not None
        return (context.squeeze(-2), weights.squeeze(-2)) if one_step else (context, weights)


def remember(
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
    """A memory of what is checked first; ``lacks``: as :func:`check_inputs` takes it."""
    check_kind("keys", keys, keys, "keys")
    # Copies, as only what is visible now is prepared.
    lengths, mask = (x.clone() if isinstance(x, Tensor) else x for x in (lengths, mask))
    a_query = keys.new_empty((*keys.shape[:-2], keys.shape[-1])) if keys.dim() in (3, 4) else keys  # other ranks are refused
    inputs = check_inputs(a_query, keys, values, v, lengths, mask, lacks=lacks, like="keys")
    if dtype not in (None, keys.dtype, torch.bfloat16) or (dtype == torch.bfloat16 and keys.dtype == torch.float64):
        other = "" if keys.dtype == torch.float64 else " or torch.bfloat16"
        raise TypeError(f"dtype of a memory of {keys.dtype} must be None, {keys.dtype}{other}; got {dtype}")
    kept = torch.bfloat16 if dtype == torch.bfloat16 != keys.dtype else None
    family = "multiplicative" if v is None else "additive"
    taken = pick_backend(backend, inputs.query, keys, values, family, kept)
    if taken != "reference":
        refuse_tangents(keys, values, v)
    if taken == "cuda" and kept is not None and keys.dtype != torch.float32:
        if backend == "cuda":
            raise RuntimeError(f"backend 'cuda' cannot serve this call: it has no kernels of {keys.dtype} over memories kept in {kept}")
        taken = pick_backend("triton", inputs.query, keys, values, family)
    return AttentionMemory(keys, values, v, check_scale(scale), inputs.lengths, inputs.mask, kept, taken)


def _made_anew(with_grad: bool, *arguments: Any) -> AttentionMemory:
    """A copy, in the grad mode of the memory that it is of."""
    with torch.set_grad_enabled(with_grad):
        return remember(*arguments)


torch.serialization.add_safe_globals([_made_anew])  # of which a pickled memory is made; `torch.load(weights_only=True)` reads it
