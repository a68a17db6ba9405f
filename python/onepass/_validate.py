"""Checks of a call's arguments, and their one canonical form: every error names what it got and what it takes."""

import numbers
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch
from torch._C._functorch import TransformType
from torch.amp import is_autocast_available
from torch.autograd import forward_ad

_NO_TANGENTS = "onepass has no forward-mode derivatives (tangents, torch.func.jvp); for these name backend='reference'"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Inputs(NamedTuple):
    """Arguments as the ops take them: query ``[B, (H,) T, A]``, lengths int64, mask expanded to ``[B, (H,) T, S]``, spans ``[B, T, 2]``."""

    query: Tensor
    keys: Tensor
    values: Tensor | None
    v: Tensor | None
    lengths: Tensor | None
    mask: Tensor | None
    spans: Tensor | None
    one_step: bool

    def limits(self) -> Tensor | None:
        """Lengths, spans or both as the ops take them, in one tensor."""
        return limits_of(self.lengths, self.spans, self.keys.shape[-2])

    def output(self, tensor: Tensor) -> Tensor:
        """An op's ``[B, (H,) T, ...]`` result in the rank of the caller's query."""
        return tensor.squeeze(-2) if self.one_step else tensor


def check_inputs(
    query: Tensor,
    keys: Tensor,
    values: Tensor | None,
    v: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    spans: Tensor | None = None,
    *,
    lacks: str = "",
    like: str = "query",
) -> Inputs:
    """Raise on the first thing that is wrong, else return the canonical form; ``lacks`` names a tensor that it does not take, ``like``
    the one whose dtype and device the others must have: a memory's keys, to which lengths and mask then belong."""
    check_kind(like, query, query, like)
    dtype, device = query.dtype, query.device
    for name, tensor in (("keys", keys), ("values", values), ("v", v)):
        if name == lacks or (isinstance(tensor, Tensor) and tensor.dtype is dtype and tensor.device == device and not tensor.is_nested):
            continue
        check_kind(name, tensor, query, like)
    sizes, of_keys, given = query.shape, keys.shape, query
    if len(of_keys) not in (3, 4):
        raise ValueError(f"keys must be [B, S, A] or, with heads, [B, H, S, A]; got {_shape(keys)}")
    heads = len(of_keys) == 4
    one_step = len(sizes) == len(of_keys) - 1
    if one_step:
        query = query.unsqueeze(-2)
        sizes = query.shape
    if len(sizes) != len(of_keys):
        raise ValueError(
            f"query must be {'[B, H, T, A], or [B, H, A]' if heads else '[B, T, A], or [B, A]'} for one step, "
            f"to go with keys {_shape(keys)}; got {_shape(given)}"
        )
    if sizes[:-2] != of_keys[:-2]:
        raise _disagreement("query", query, keys, "batch size and heads" if heads else "batch size")
    if sizes[-1] != of_keys[-1]:
        raise _disagreement("query", query, keys, "attention width A (the last dimension)")
    if values is not None:
        if values.dim() != len(of_keys):
            raise ValueError(f"values must have the rank of keys {_shape(keys)}; got {_shape(values)}")
        if values.shape[:-1] != of_keys[:-1]:
            raise _disagreement("values", values, keys, "batch and source dimensions")
    if v is not None:
        wanted = [of_keys[1], of_keys[-1]] if heads else [of_keys[-1]]
        if list(v.shape) != wanted:
            hint = " (a Linear's weight is weight[0])" if [1, *wanted] == list(v.shape) and not heads else ""
            raise ValueError(f"v must be {'[H, A]' if heads else '[A]'} = {wanted} for keys {_shape(keys)}; got {_shape(v)}{hint}")
    of_memory = like == "keys"
    lengths = _check_lengths(lengths, query, of_memory)
    mask = check_mask(mask, query, keys, one_step, of_memory)
    spans = check_spans(spans, query, one_step)
    return Inputs(query, keys, values, v, lengths, mask, spans, one_step)


def limits_of(lengths: Tensor | None, spans: Tensor | None, source: int) -> Tensor | None:
    """The ops' third form of lengths, spans ``[B, T, 2]`` that end where the lengths do; what is out of range stays so, for them to see."""
    if spans is None:
        return lengths
    if lengths is None:
        return spans
    first, last = spans.unbind(-1)
    lengths = (lengths if lengths.dim() == 2 else lengths.unsqueeze(-1)).expand_as(last)
    longer = torch.maximum(last, lengths)
    return torch.stack([first, torch.where(longer > source, longer, torch.minimum(last, lengths))], -1)


def check_scale(scale: Any) -> float:
    """A scale as the ops take it."""
    if isinstance(scale, Tensor):
        raise TypeError(f"scale must be a number; got a tensor of shape {_shape(scale)}: multiply the query by it, with scale=1.0")
    if isinstance(scale, (torch.SymInt, torch.SymFloat)):  # of a graph for any size
        return scale  # type: ignore[return-value]
    if not isinstance(scale, numbers.Real):
        raise TypeError(f"scale must be a number; got {type(scale).__name__}")
    return float(scale)


def are_recorded() -> bool:
    """Whether calls become a graph: compiled, exported, or traced by ``torch.jit``."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def are_transformed() -> bool:
    """Whether code runs under forward-mode derivatives or a function transform."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def refuse_tangents(*tensors: Tensor | None) -> None:
    """Raise where derivatives are asked for that the ops lack, and that autograd would take as zero: those of forward mode, and those of
    function transforms (of which ``torch.func.vmap`` is served)."""
    if torch.compiler.is_compiling():
        if forward_ad._current_level >= 0:  # a graph cannot ask which tensors have tangents
            raise RuntimeError(_NO_TANGENTS)
        return
    if not are_transformed():
        return
    transforms = _functorch.get_interpreter_stack() or []
    differentiates = torch.is_grad_enabled() and any(one.key() in (TransformType.Grad, TransformType.Jvp) for one in transforms)
    for tensor in tensors:
        while tensor is not None and _functorch.is_batchedtensor(tensor):
            tensor = _functorch.get_unwrapped(tensor)
        if tensor is None:
            continue
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
            raise RuntimeError(_NO_TANGENTS)
        if differentiates and tensor.requires_grad:
            raise RuntimeError("onepass has no gradients of function transforms (torch.func.grad); for these name backend='reference'")


def check_kind(name: str, tensor: Tensor | None, query: Tensor, like: str) -> None:
    """Raise where an argument is no dense float tensor of the dtype and on the device of ``query``, which its user knows as ``like``."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(tensor).__name__}")
    if tensor.is_nested:
        raise TypeError(f"{name} must not be a nested tensor: pad it (torch.nested.to_padded_tensor) and give lengths")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16; got {tensor.dtype}")
    if tensor.dtype != query.dtype:
        hint = uncast(tensor, f"{name}.to({like}.dtype)")
        raise TypeError(f"{name} must have the dtype of {like}, {query.dtype}; got {tensor.dtype}{hint}")
    if tensor.device != query.device:
        raise ValueError(f"{name} must be on the device of {like}, {query.device}; got {tensor.device}")


def autocasts(device: str) -> bool:
    return is_autocast_available(device) and torch.is_autocast_enabled(device)


def uncast(tensor: Tensor, cast: str) -> str:
    """Where autocast may have made dtypes differ, what an error adds: the cast that is the caller's."""
    return f": functions do not cast under autocast, {cast} does" if autocasts(tensor.device.type) else ""


def not_of_memory(query: Tensor, lead: list[int], width: int) -> ValueError:
    """The error of a query of other sizes than a memory of ``lead`` sources (and heads) takes, in the widths of who gave it."""
    batch, sizes, hint = lead[0], _shape(query), ""
    if sizes[-1:] == [width] and len(sizes) - len(lead) in (1, 2) and sizes[0] < batch and batch not in sizes[1:-1]:
        hint = ": where fewer sources are left, memory.select(rows)"
    elif len(lead) == 1 and len(sizes) == 2 and sizes[1] == width and batch and sizes[0] % batch == 0:
        hint = f": K beams of each source are query.view({batch}, -1, {width})"
    return ValueError(f"query must be {[*lead, width]}, or {lead} x K x [{width}] for K queries, to go with this memory; got {sizes}{hint}")


def _disagreement(name: str, tensor: Tensor, keys: Tensor, what: str) -> ValueError:
    return ValueError(f"{name} and keys must agree in {what}; got {_shape(tensor)} and {_shape(keys)}")


def _check_lengths(lengths: Tensor | None, query: Tensor, of_memory: bool) -> Tensor | None:
    if lengths is None:
        return None
    if not isinstance(lengths, Tensor):
        raise TypeError(f"lengths must be a torch.Tensor of integers; got {type(lengths).__name__}")
    if lengths.dtype not in (torch.int64, torch.int32):
        hint = "" if lengths.dtype == torch.bool else ": lengths.long()"
        raise TypeError(f"lengths must be int64 or int32; got {lengths.dtype}{hint}")
    if lengths.device != query.device:
        raise ValueError(f"lengths must be on the device of {'keys' if of_memory else 'query'}, {query.device}; got {lengths.device}")
    batch, steps = query.shape[0], query.shape[-2]
    of_sources = lengths.shape == (batch,)
    if of_memory and not of_sources:
        raise ValueError(f"lengths of a memory belong to its sources, [B] = [{batch}]; got {_shape(lengths)}")
    if not of_sources and lengths.shape != (batch, steps):
        raise ValueError(f"lengths must be [B] = [{batch}] or, per query, [B, T] = [{batch}, {steps}]; got {_shape(lengths)}")
    return lengths if lengths.dtype is torch.int64 else lengths.to(torch.int64)


def check_spans(spans: Tensor | None, query: Tensor, one_step: bool) -> Tensor | None:
    """Spans as int64 ``[B, T, 2]``, for a query that has its dimension T."""
    if spans is None:
        return None
    if not isinstance(spans, Tensor):
        raise TypeError(f"spans must be a torch.Tensor of integers; got {type(spans).__name__}")
    if spans.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"spans must be int64 or int32; got {spans.dtype}")
    if spans.device != query.device:
        raise ValueError(f"spans must be on the device of query, {query.device}; got {spans.device}")
    given = spans
    if one_step and spans.dim() == 2:
        spans = spans.unsqueeze(1)
    batch, steps = query.shape[0], query.shape[-2]
    if list(spans.shape) != [batch, steps, 2]:
        wanted = f"[B, 2] = [{batch}, 2] for one step" if one_step else f"[B, T, 2] = [{batch}, {steps}, 2]"
        raise ValueError(f"spans must be {wanted}; got {_shape(given)}")
    return spans.to(torch.int64)


def check_mask(mask: Tensor | None, query: Tensor, keys: Tensor, one_step: bool, of_memory: bool = False) -> Tensor | None:
    """A mask as ``[B, (H,) T, S]``, for a query that has its dimension T; ``of_memory``: one that belongs to the sources."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a boolean tensor, True where a query attends; got {got}{_as_mask(mask)}")
    if mask.is_nested or mask.layout != torch.strided:
        raise TypeError(f"mask must be a dense tensor; got {'a nested one' if mask.is_nested else mask.layout}")
    if mask.device != query.device:
        raise ValueError(f"mask must be on the device of {'keys' if of_memory else 'query'}, {query.device}; got {mask.device}")
    full = (*query.shape[:-1], keys.shape[-2])  # [B, (H,) T, S]
    given = mask
    if one_step and mask.dim() == 2:
        mask = mask.unsqueeze(1)  # [B, S] of one step
    if len(full) == 4 and mask.dim() == 3:
        mask = mask.unsqueeze(1)  # one mask for all heads
    if not are_recorded() and mask.shape == full:  # of sizes that a graph knows, what follows asks less
        return mask
    broadcasts = mask.dim() <= len(full) and all(
        size in (1, want) for size, want in zip(reversed(mask.shape), reversed(full), strict=False)
    )
    if not broadcasts and of_memory:
        raise ValueError(f"a mask of a memory belongs to its sources, [B, S] = {[full[0], full[-1]]}; got {_shape(given)}")
    if not broadcasts:
        hint = " (a padding mask [B, S] is written mask[:, None, :])" if given.dim() == 2 and not one_step else ""
        wanted = "[B, H, T, S]" if len(full) == 4 else "[B, T, S]"
        raise ValueError(f"mask must broadcast to {wanted} = {list(full)}; got {_shape(given)}{hint}")
    return mask.expand(full)


def _as_mask(mask: Any) -> str:
    """What an error adds that was given a mask of numbers."""
    if not isinstance(mask, Tensor):
        return ""
    added = "; of 0 and -inf, mask == 0" if mask.is_floating_point() else ""
    return f": mask.bool(), or ~mask.bool() where it is 1 at what is hidden{added}"


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
