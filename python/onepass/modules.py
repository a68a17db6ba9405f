"""Layers: the projections of the papers around the functions of :mod:`onepass.functional`.

Both take ``memory``, the encoder states, as keys and, unless ``values`` are given, as values. With ``num_heads > 1`` the attention width
and the value width are split evenly over the heads; each head has its own weights and the contexts are put back side by side.
"""

import math

import torch
from torch import Tensor, nn

from onepass import functional
from onepass._validate import autocasts, check_inputs, check_kind, not_of_memory
from onepass.memory import AttentionMemory, additive_memory, multiplicative_memory


def projected(name: str, layer: nn.Module, states: Tensor) -> Tensor:
    """By the layer, whatever a user has put there; its words of a dtype that is not its own are put in ours."""
    try:
        found: Tensor = layer(states)
    except RuntimeError as problem:
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, Tensor) or weight.dtype == states.dtype:
            raise
        raise TypeError(f"{name} must have the dtype of the layer's parameters, {weight.dtype}; got {states.dtype}") from problem
    return found


class _Attention(nn.Module):
    """What both layers share: heads, dropout on the weights, and the call of the function."""

    _additive: bool
    query_dim: int

    def __init__(self, dropout: float, num_heads: int, **split: int) -> None:
        super().__init__()
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1); got {dropout}")
        if num_heads < 1:
            raise ValueError(f"num_heads must be at least 1; got {num_heads}")
        for name, width in split.items():
            if width < 1:
                raise ValueError(f"{name} must be at least 1; got {width}")
            if width % num_heads:
                raise ValueError(f"{name} must be a multiple of num_heads = {num_heads}; got {width}")
        self.dropout = dropout
        self.num_heads = num_heads

    def _check(self, name: str, states: Tensor, width: int, query: Tensor | None = None) -> None:
        """Raise on what a projection would refuse in words of its own, and on a batch of another size than the ``query``'s."""
        if not isinstance(states, Tensor) or states.is_nested:
            check_kind(name, states, states, name)
        of_query = name == "query"
        if states.shape[-1:] != (width,) or not (states.dim() == 3 or (of_query and states.dim() == 2)):
            wanted = f"[B, T, {width}], or [B, {width}] for one step" if of_query else f"[B, S, {width}]"
            is_map = not of_query and states.dim() == 4 and states.shape[1] == width
            hint = f": of a feature map [B, {width}, h, w], {name}.flatten(2).transpose(1, 2)" if is_map else ""
            raise ValueError(f"{name} must be {wanted}; got {list(states.shape)}{hint}")
        if query is not None and query.shape[0] != states.shape[0]:
            raise ValueError(f"query and {name} must agree in batch size B, the first; got {list(query.shape)} and {list(states.shape)}")

    def _split(self, states: Tensor) -> Tensor:
        """``[B, N, H * W]`` as ``[B, H, N, W]``, and the query of one step, ``[B, H * W]``, as ``[B, H, W]``, without a copy."""
        if self.num_heads == 1:
            return states
        heads = states.view(*states.shape[:-1], self.num_heads, states.shape[-1] // self.num_heads)
        return heads if states.dim() == 2 else heads.transpose(1, 2)

    def _split_values(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """As :meth:`_split`, of what may be of any width that the heads divide."""
        if not isinstance(values, Tensor):
            raise TypeError(f"values must be a torch.Tensor; got {type(values).__name__} (need_weights is given by name)")
        if values.dim() != 3:
            by_name = "" if values.is_floating_point() else " (lengths, mask and spans are given by name)"
            raise ValueError(f"values must be [B, S, width]; got {list(values.shape)}{by_name}")
        if values.shape[-1] % self.num_heads:
            raise ValueError(f"the width of values must be a multiple of num_heads = {self.num_heads}; got {values.shape[-1]}")
        return self._split(values.to(dtype))

    def _join(self, context: Tensor) -> Tensor:
        """What :meth:`_split` split."""
        if self.num_heads == 1:
            return context
        return (context if context.dim() == 3 else context.transpose(1, 2)).flatten(-2)

    def _function(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        lengths: Tensor | None,
        mask: Tensor | None,
        spans: Tensor | None,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError

    def _attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        lengths: Tensor | None,
        mask: Tensor | None,
        spans: Tensor | None,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        query, keys, values = self._split(query), self._split(keys), self._split_values(values, query.dtype)
        if self.dropout > 0.0 and self.training:
            inputs = check_inputs(query, keys, values, None, lengths, mask, spans, lacks="v")
            _, weights = self._function(query, keys, values[..., :0], lengths, mask, spans, True)  # the weights alone
            assert weights is not None
            weights = nn.functional.dropout(weights, self.dropout)
            context = functional.weighted_values(weights, inputs)
        else:
            context, weights = self._function(query, keys, values, lengths, mask, spans, need_weights)
        return self._join(context), weights if need_weights else None

    def scores(self, query: Tensor, memory: AttentionMemory, *, mask: Tensor | None = None, spans: Tensor | None = None) -> Tensor:
        """The raw scores of ``query`` over what :meth:`memory` made, for normalisers other than softmax: as :meth:`AttentionMemory.scores`.

        Returns ``[B, T, S]``, without T for one step; ``[B, H, T, S]`` with heads. The weights made of them go to ``memory.context``.
        """
        self._check("query", query, self.query_dim)
        if not isinstance(memory, AttentionMemory):
            made = "memory = layer.memory(encoder_states, ...) comes first"
            raise TypeError(f"memory must be what memory(...) made of the encoder states; got {type(memory).__name__}: {made}")
        query, dtype = self._over(memory, query)
        return memory.scores(query, spans=spans, mask=mask).to(dtype)

    def _project(self, query: Tensor) -> Tensor:
        raise NotImplementedError

    def _over(self, memory: AttentionMemory, query: Tensor) -> tuple[Tensor, torch.dtype]:
        """The projected query by heads, in the dtype of the memory's keys; and its own, which results have."""
        if (memory.v is not None) != self._additive:
            mine, other = ("an additive", "multiplicative") if self._additive else ("a multiplicative", "additive")
            raise ValueError(f"{mine} layer takes a memory of its own; got one of {other} attention")
        if query.shape[0] != memory.keys.shape[0]:
            raise not_of_memory(query, [memory.keys.shape[0]], self.query_dim)
        query = self._project(query)
        heads = self._split(query)
        return heads.to(memory.keys.dtype) if query.dtype.is_floating_point else heads, query.dtype

    def _attend_memory(
        self,
        query: Tensor,
        memory: AttentionMemory,
        others: tuple[Tensor | None, ...],
        mask: Tensor | None,
        spans: Tensor | None,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """As :meth:`_attend`, over a memory."""
        if any(other is not None for other in others):
            raise ValueError("a memory has its own values and lengths: give them to memory(...), not to the call (all else goes by name)")
        query, dtype = self._over(memory, query)
        if self.dropout > 0.0 and self.training:
            _, weights = memory.attend(query, need_weights=True, spans=spans, mask=mask)
            assert weights is not None
            weights = nn.functional.dropout(weights, self.dropout)
            context = memory.context(weights, spans=spans, mask=mask)
        else:
            context, weights = memory.attend(query, need_weights, spans=spans, mask=mask)
        return self._join(context).to(dtype), weights.to(dtype) if need_weights and weights is not None else None


class AdditiveAttention(_Attention):
    """Additive attention with its projections: ``score = v . tanh(W_q query + W_k memory + b)``.

    Bahdanau et al. 2015 (arXiv:1409.0473), appendix A.1.2. Luong's *concat* score (arXiv:1508.04025, equation 8),
    ``v . tanh(W [query; memory])``, is this layer with ``W = [W_q, W_k]``.

    Args:
        query_dim: width of the decoder states.
        key_dim: width of the encoder states.
        hidden_dim: attention width A.
        bias: whether ``query_layer`` has a bias ``b``.
        normalize: use ``g v / |v|`` for ``v`` (per head), as in GNMT and TensorFlow's ``BahdanauAttention(normalize=True)``;
            ``g`` starts at ``sqrt(1 / A)`` and the bias at 0.
        dropout: probability with which a weight is dropped in training (Srivastava et al. 2014); returned weights are the dropped ones.
        num_heads: heads; ``hidden_dim`` and the value width must be multiples of it.

    Parameters: ``query_layer`` (Linear), ``key_layer`` (Linear, no bias), ``v`` ``[A]`` (``[H, A / H]`` with heads), ``g`` ``[]``
    or ``[H]``.
    """

    _additive = True

    def __init__(
        self,
        query_dim: int,
        key_dim: int,
        hidden_dim: int,
        *,
        bias: bool = True,
        normalize: bool = False,
        dropout: float = 0.0,
        num_heads: int = 1,
    ) -> None:
        super().__init__(dropout, num_heads, hidden_dim=hidden_dim)
        self.query_dim, self.key_dim = query_dim, key_dim
        self.query_layer = nn.Linear(query_dim, hidden_dim, bias=bias)
        self.key_layer = nn.Linear(key_dim, hidden_dim, bias=False)
        per_head = hidden_dim // num_heads
        self.v = nn.Parameter(torch.empty(hidden_dim if num_heads == 1 else (num_heads, per_head)))
        self.g = nn.Parameter(torch.empty(() if num_heads == 1 else num_heads)) if normalize else None
        self.reset_parameters()
        if normalize and bias:
            nn.init.zeros_(self.query_layer.bias)

    def reset_parameters(self) -> None:
        """Initial values of ``v`` and ``g``. The projections, as any ``nn.Linear``, reset their own: the bias that starts at 0 with
        ``normalize=True`` does so in the constructor alone."""
        bound = 1.0 / math.sqrt(self.v.shape[-1])
        nn.init.uniform_(self.v, -bound, bound)
        if self.g is not None:
            nn.init.constant_(self.g, bound)

    def forward(
        self,
        query: Tensor,
        memory: Tensor | AttentionMemory,
        values: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        spans: Tensor | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from ``query`` (``[B, T, query_dim]`` or ``[B, query_dim]``) over ``memory``: encoder states ``[B, S, key_dim]``, or
        what :meth:`memory` made of them.

        ``values`` (``[B, S, D]``) default to ``memory``; ``lengths``, ``mask``, ``spans`` and errors as in
        :func:`onepass.additive_attention`. Beside what :meth:`memory` made, ``mask`` and ``spans`` alone may be given: they are the
        query's, as in :meth:`AttentionMemory.attend`. A memory of another dtype than the query's, as autocast may bring, is attended to in
        its own; results have the query's.
        Returns ``(context [B, T, D], weights [B, T, S] or None)``, without T for one step; weights ``[B, H, T, S]`` with heads.
        """
        self._check("query", query, self.query_dim)
        if isinstance(memory, AttentionMemory):
            return self._attend_memory(query, memory, (values, lengths), mask, spans, need_weights)
        self._check("memory", memory, self.key_dim, query)
        keys = projected("memory", self.key_layer, memory)
        return self._attend(self._project(query), keys, memory if values is None else values, lengths, mask, spans, need_weights)

    def _project(self, query: Tensor) -> Tensor:
        return projected("query", self.query_layer, query)

    def _function(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        lengths: Tensor | None,
        mask: Tensor | None,
        spans: Tensor | None,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        return functional.additive_attention(
            query, keys, values, self._weighting(query.dtype), lengths=lengths, mask=mask, spans=spans, need_weights=need_weights
        )

    def _weighting(self, dtype: torch.dtype) -> Tensor:
        """``v``, or ``g v / |v|``."""
        v: Tensor = self.v
        if self.g is not None:
            v = self.g.unsqueeze(-1) * nn.functional.normalize(v, dim=-1)
        return v.to(dtype)

    def memory(
        self,
        memory: Tensor,
        values: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> AttentionMemory:
        """``memory`` (``[B, S, key_dim]``) projected and prepared once, for ``attention(query, memory)`` step by step.

        ``values`` (``[B, S, D]``) default to ``memory``; the other arguments and errors as in :func:`onepass.additive_memory`. Hooks on
        the layer's forward, as ``torch.nn.utils.prune`` sets them, do not run here: what they make must be there before.
        """
        self._check("memory", memory, self.key_dim)
        keys = self._split(projected("memory", self.key_layer, memory))
        values = self._split_values(memory if values is None else values, keys.dtype)
        return additive_memory(keys, values, self._weighting(keys.dtype), lengths=lengths, mask=mask, dtype=dtype)

    def extra_repr(self) -> str:
        return f"normalize={self.g is not None}, dropout={self.dropout}, num_heads={self.num_heads}"


class MultiplicativeAttention(_Attention):
    """Multiplicative attention (Luong et al. 2015, arXiv:1508.04025, equation 8).

    ``"dot"``: ``query . memory``; ``"scaled_dot"``: the same over ``sqrt(A)`` (A per head); ``"general"``: ``(W query) . memory``.

    Args:
        query_dim, key_dim: widths of decoder and encoder states; equal unless ``score="general"``.
        score: one of the three above.
        bias: whether the projection of ``"general"`` has a bias.
        dropout, num_heads: as in :class:`AdditiveAttention`.

    Parameters: ``query_layer`` (Linear from ``query_dim`` to ``key_dim``) for ``"general"``, else none.
    """

    _additive = False

    def __init__(
        self,
        query_dim: int,
        key_dim: int,
        score: str = "dot",
        *,
        bias: bool = False,
        dropout: float = 0.0,
        num_heads: int = 1,
    ) -> None:
        super().__init__(dropout, num_heads, key_dim=key_dim)
        if score not in ("dot", "general", "scaled_dot"):
            raise ValueError(f"score must be 'dot', 'general' or 'scaled_dot'; got {score!r}")
        if score != "general" and query_dim != key_dim:
            raise ValueError(f"score={score!r} needs query_dim == key_dim; got {query_dim} and {key_dim}: use 'general'")
        self.query_dim, self.key_dim, self.score = query_dim, key_dim, score
        self.scale = math.sqrt(num_heads / key_dim) if score == "scaled_dot" else 1.0
        self.query_layer = nn.Linear(query_dim, key_dim, bias=bias) if score == "general" else None

    def forward(
        self,
        query: Tensor,
        memory: Tensor | AttentionMemory,
        values: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        spans: Tensor | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As :meth:`AdditiveAttention.forward`."""
        self._check("query", query, self.query_dim)
        if isinstance(memory, AttentionMemory):
            return self._attend_memory(query, memory, (values, lengths), mask, spans, need_weights)
        self._check("memory", memory, self.key_dim, query)
        query = self._project(query)
        keys = memory.to(query.dtype)
        return self._attend(query, keys, keys if values is None else values, lengths, mask, spans, need_weights)

    def _project(self, query: Tensor) -> Tensor:
        return query if self.query_layer is None else projected("query", self.query_layer, query)

    def _function(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        lengths: Tensor | None,
        mask: Tensor | None,
        spans: Tensor | None,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        return functional.multiplicative_attention(
            query, keys, values, scale=self.scale, lengths=lengths, mask=mask, spans=spans, need_weights=need_weights
        )

    def memory(
        self,
        memory: Tensor,
        values: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> AttentionMemory:
        """As :meth:`AdditiveAttention.memory`; the keys are ``memory`` itself, under autocast in the dtype that *general* gives queries."""
        self._check("memory", memory, self.key_dim)
        device, casts = memory.device.type, self.query_layer is not None and memory.dtype != torch.float64
        if casts and autocasts(device):
            memory = memory.to(torch.get_autocast_dtype(device))
        keys = self._split(memory)
        values = keys if values is None else self._split_values(values, memory.dtype)
        return multiplicative_memory(keys, values, scale=self.scale, lengths=lengths, mask=mask, dtype=dtype)

    def extra_repr(self) -> str:
        return f"score={self.score!r}, dropout={self.dropout}, num_heads={self.num_heads}"
