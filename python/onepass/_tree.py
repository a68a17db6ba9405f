"""A memory as a tree of tensors, for what takes inputs and results apart: exported programs, which so can make one and be handed one."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from onepass.memory import AttentionMemory, remember


def _named(memory: AttentionMemory) -> dict[str, Tensor]:
    """The tensors that there are; of those that steps read, the ones that are kept in another dtype."""
    v = memory.v if memory._with_grad else memory._step_v
    found = {"keys": memory.keys, "values": memory.values, "v": v, "lengths": memory.lengths, "mask": memory.mask}
    found.update(zip(("exponentials", "sizes", "weighting"), memory._prepared or (), strict=False))
    for name, kept, given in (("kept_keys", memory._step_keys, memory.keys), ("kept_values", memory._step_values, memory.values)):
        if kept.dtype != given.dtype:
            found[name] = kept
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _take_apart(memory: AttentionMemory) -> tuple[list[Any], Any]:
    if "_apart" in vars(memory):
        return memory._apart  # type: ignore[attr-defined, no-any-return]
    memory._check_unchanged()
    named, keys = _named(memory), memory.keys
    kind = [str(keys.dtype), keys.device.type]
    return list(named.values()), [list(named), float(memory.scale), memory.dtype is not None, memory._backend, kind]


def _with_names(memory: AttentionMemory) -> tuple[list[tuple[pytree.KeyEntry, Any]], Any]:
    leaves, rest = _take_apart(memory)
    return [(pytree.GetAttrKey(name), leaf) for name, leaf in zip(rest[0], leaves, strict=True)], rest


def _put_together(leaves: Iterable[Any], rest: Any) -> AttentionMemory:
    """A memory of these tensors, made anew where they are of another dtype or device by now; or, where something else was made of them,
    what holds that and can be taken apart again."""
    names, scale, half, backend, kind = rest
    leaves = list(leaves)
    if not all(isinstance(leaf, Tensor) for leaf in leaves):
        memory = AttentionMemory.__new__(AttentionMemory)
        memory._apart = (leaves, rest)  # type: ignore[attr-defined]
        return memory
    found: dict[str, Tensor] = dict(zip(names, leaves, strict=True))
    keys, values, v, lengths, mask = (found.get(name) for name in ("keys", "values", "v", "lengths", "mask"))
    assert keys is not None
    assert values is not None
    if [str(keys.dtype), keys.device.type] != kind:
        rest = torch.bfloat16 if half and keys.dtype != torch.float64 else None, "reference" if backend == "reference" else "auto"
        return remember(keys, values, v, "v" if v is None else "", scale, lengths, mask, *rest)
    prepared = tuple(found[name] for name in ("exponentials", "sizes", "weighting") if name in found)
    stored = None
    if half:
        stored = found.get("kept_keys", keys).detach(), found.get("kept_values", values).detach()
    return AttentionMemory(keys, values, v, scale, lengths, mask, torch.bfloat16 if half else None, backend, prepared or None, stored)


pytree.register_pytree_node(
    AttentionMemory, _take_apart, _put_together, serialized_type_name="onepass.AttentionMemory", flatten_with_keys_fn=_with_names
)
