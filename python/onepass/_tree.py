"""A memory as a tree of tensors, for what takes inputs and results apart: exported programs, which so can make one and be handed one."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from onepass.memory import AttentionMemory

LEAVES = ("keys", "values", "v", "lengths", "mask", "exponentials", "sizes", "weighting")


def _take_apart(memory: AttentionMemory) -> tuple[list[Any], Any]:
    prepared = memory._prepared or (None, None, None)
    leaves = [memory.keys, memory.values, memory.v, memory.lengths, memory.mask, *prepared]
    return leaves, [memory.scale, memory.dtype is not None, memory._backend]


def _with_names(memory: AttentionMemory) -> tuple[list[tuple[pytree.KeyEntry, Any]], Any]:
    leaves, rest = _take_apart(memory)
    return [(pytree.GetAttrKey(name), leaf) for name, leaf in zip(LEAVES, leaves, strict=True)], rest


def _put_together(leaves: Iterable[Any], rest: Any) -> AttentionMemory:
    """A memory of these tensors; or, where something else was made of each, what holds that and can be taken apart again."""
    scale, half, backend = rest
    keys, values, v, lengths, mask, *prepared = leaves
    kept, given = torch.bfloat16 if half else None, None if prepared == [None] * 3 else tuple(prepared)
    if isinstance(keys, Tensor) and isinstance(values, Tensor):
        return AttentionMemory(keys, values, v, scale, lengths, mask, kept, backend, given)
    memory = AttentionMemory.__new__(AttentionMemory)
    memory.keys, memory.values, memory.v, memory.lengths, memory.mask, memory._prepared = keys, values, v, lengths, mask, given
    memory.scale, memory.dtype, memory._backend = scale, kept, backend
    return memory


pytree.register_pytree_node(
    AttentionMemory, _take_apart, _put_together, serialized_type_name="onepass.AttentionMemory", flatten_with_keys_fn=_with_names
)
