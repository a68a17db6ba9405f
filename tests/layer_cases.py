"""Layers of every kind, small, and what they are called with."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import onepass

B, T, S, Q, K = 3, 4, 11, 6, 8
LAYERS: dict[str, Callable[..., nn.Module]] = {
    "additive": lambda **options: onepass.AdditiveAttention(Q, K, 10, **options),
    "normalized": lambda **options: onepass.AdditiveAttention(Q, K, 10, normalize=True, **options),
    "without bias": lambda **options: onepass.AdditiveAttention(Q, K, 10, bias=False, **options),
    "general": lambda **options: onepass.MultiplicativeAttention(Q, K, "general", **options),
    "general with bias": lambda **options: onepass.MultiplicativeAttention(Q, K, "general", bias=True, **options),
    "dot": lambda **options: onepass.MultiplicativeAttention(K, K, **options),
    "scaled dot": lambda **options: onepass.MultiplicativeAttention(K, K, "scaled_dot", **options),
}
each_layer = pytest.mark.parametrize("kind", LAYERS)
each_heads = pytest.mark.parametrize("heads", [1, 2])


def make(kind: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return LAYERS[kind](**options)


def states(kind: str, steps: int | None = T, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """A query, a memory and lengths of which one is 0."""
    width = K if "dot" in kind else Q
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(B, *([] if steps is None else [steps]), width, generator=generator)
    return query.to(dtype), torch.randn(B, S, K, generator=generator).to(dtype), torch.tensor([S, 0, 4])
