"""One function per operation: check the arguments, pick a backend, call its op.

Shapes: ``B`` batch, ``H`` heads, ``T`` queries (target positions, or beams: several queries over one memory), ``S`` source positions,
``A`` attention width, ``D`` value width. All float arguments share one dtype (float32, float64, bfloat16 or float16) and one device.
"""

import torch
from torch import Tensor

from onepass import reference
from onepass._autograd import call_op
from onepass._backends import pick_backend
from onepass._validate import Inputs, check_inputs, check_scale, refuse_tangents


def additive_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    v: Tensor,
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    spans: Tensor | None = None,
    need_weights: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Additive attention: ``weights = softmax_s(v . tanh(query[t] + keys[s]))``, ``context = sum_s weights[t, s] values[s]``.

    Bahdanau, Cho and Bengio 2015 (arXiv:1409.0473), equations 5 and 6 and appendix A.1.2; the projections ``W_a s`` and ``U_a h``
    are the caller's, as ``query`` and ``keys``. Luong's *concat* score is the same after splitting its matrix in two.

    Args:
        query: ``[B, T, A]``, or ``[B, A]`` for one step; with heads ``[B, H, T, A]`` or ``[B, H, A]``.
        keys: ``[B, S, A]`` or ``[B, H, S, A]``.
        values: ``[B, S, D]`` or ``[B, H, S, D]``.
        v: ``[A]`` or ``[H, A]``.
        lengths: how many source positions are visible, in ``[0, S]``: integers ``[B]``, or ``[B, T]`` per query.
        mask: boolean, True where a query attends; broadcastable to ``[B, T, S]`` (``[B, S]`` for one step; with heads also
            ``[B, H, T, S]``). A mask of the source alone is ``mask[:, None]`` beside several queries.
        spans: the window of the source that each query sees, positions ``first <= s < last``: integers ``[B, T, 2]`` in ``[0, S]``
            (``[B, 2]`` for one step), for all heads. The work follows the windows. Where ``first >= last`` nothing is seen. With
            ``lengths`` or ``mask`` too, a position must be visible by all.
        need_weights: also return the weights; a gradient may come back through them.
        backend: ``"auto"``, ``"cpu"`` (C++ kernels), ``"cuda"`` (for NVIDIA GPUs), ``"triton"`` (for GPUs) or ``"reference"``
            (plain torch). A named backend never falls back.

    Returns:
        ``(context, weights)``: context ``[B, T, D]`` (``[B, D]`` for one step), weights ``[B, T, S]`` or None. Weights of positions that
        are not visible are exactly 0; a query that sees none gets a context of zeros.

    Raises:
        TypeError: dtypes that are mixed or not supported. ValueError: ranks, sizes or devices that do not go together, an unknown
        backend. RuntimeError: lengths or spans outside ``[0, S]`` (the Triton kernels take them as the nearest number within, since a check
        would wait for the GPU), a backend that cannot serve the call, derivatives that only ``"reference"`` has: second ones, those of
        forward mode, and those of function transforms such as ``torch.func.grad`` (``torch.func.vmap`` is served).
    """
    inputs = check_inputs(query, keys, values, v, lengths, mask, spans)
    taken = pick_backend(backend, inputs.query, keys, values)
    if taken == "reference":
        return reference.additive_attention_of(inputs, values, v, need_weights)
    refuse_tangents(query, keys, values, v)
    context, weights = call_op(taken, "additive_forward", inputs.query, keys, values, v, inputs.limits(), inputs.mask)
    return inputs.output(context), inputs.output(weights.to(query.dtype)) if need_weights else None


def additive_scores(
    query: Tensor,
    keys: Tensor,
    v: Tensor,
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    spans: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The raw scores ``v . tanh(query[t] + keys[s])``, for pointer networks and normalisers other than softmax.

    Bahdanau et al. 2015, appendix A.1.2; Vinyals et al. 2015 (arXiv:1506.03134), equation 3. Arguments and errors as in
    :func:`additive_attention`.

    Returns:
        ``[B, T, S]`` (``[B, S]`` for one step; with heads ``[B, H, T, S]``); ``-inf`` where a position is not visible. What changes scores
        gets ``scores.masked_fill(scores == -torch.inf, 0)``, as 0 times ``-inf`` is NaN, forward or in a gradient. ``softmax`` of a query
        that sees nothing is NaN.
    """
    inputs = check_inputs(query, keys, None, v, lengths, mask, spans, lacks="values")
    taken = pick_backend(backend, inputs.query, keys)
    if taken == "reference":
        return reference.additive_scores_of(inputs, v)
    refuse_tangents(query, keys, v)
    return inputs.output(call_op(taken, "additive_scores", inputs.query, keys, v, inputs.limits(), inputs.mask))


def multiplicative_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float = 1.0,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    spans: Tensor | None = None,
    need_weights: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Multiplicative attention: ``weights = softmax_s(scale * query[t] . keys[s])``, ``context = sum_s weights[t, s] values[s]``.

    Luong, Pham and Manning 2015 (arXiv:1508.04025), equations 7 and 8, *dot*; for *general* project the query (or the keys) first.
    ``scale``, a number, is ``A ** -0.5`` for the scaled dot product; by one that is learnt, a tensor, multiply the query. Arguments,
    results and errors as in :func:`additive_attention`, without ``v``.
    """
    inputs, scale = check_inputs(query, keys, values, None, lengths, mask, spans, lacks="v"), check_scale(scale)
    taken = pick_backend(backend, inputs.query, keys, values, "multiplicative")
    if taken == "reference":
        return reference.multiplicative_attention_of(inputs, values, scale, need_weights)
    refuse_tangents(query, keys, values)
    keep = need_weights or _weights_are_small(inputs.query, keys, values)
    context, weights = call_op(taken, "multiplicative_forward", inputs.query, keys, values, scale, inputs.limits(), inputs.mask, keep)
    return inputs.output(context), inputs.output(weights.to(query.dtype)) if need_weights else None


def weighted_values(weights: Tensor, inputs: Inputs) -> Tensor:
    """``sum_s weights[t, s] values[s]`` over the visible positions, of a call whose weights were changed after the softmax."""
    assert inputs.values is not None
    taken = pick_backend("auto", inputs.query, inputs.keys, inputs.values)
    rows = weights.unsqueeze(-2) if inputs.one_step else weights
    if taken == "reference":
        return inputs.output(reference.weighted_values(rows, inputs.values, reference.visible_to(inputs)))
    refuse_tangents(rows, inputs.values)
    return inputs.output(call_op(taken, "weighted_values", rows, inputs.values, inputs.limits(), inputs.mask))


def _weights_are_small(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether training keeps the weights for the backward: only where they are at most twice the context, else they are recomputed."""
    trains = torch.is_grad_enabled() and (query.requires_grad or keys.requires_grad or values.requires_grad)
    if torch.compiler.is_exporting():  # for any sizes
        return False
    return trains and keys.shape[-2] <= 2 * values.shape[-1]
