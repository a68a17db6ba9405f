"""What torch's ``FlopCounterMode`` counts of onepass is what it counts of the formulas in plain torch."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import onepass
import onepass.profiling
from onepass._schemas import SCHEMAS
from onepass.profiling.flops import PRODUCTS

B, T, S, A, D = 3, 4, 7, 8, 6
HEADS = [(), (2,)]


def counted(f: Callable[[], Tensor]) -> int:
    """Forward and backward."""
    with FlopCounterMode(display=False) as counter:
        f().sum().backward()
    return int(counter.get_total_flops())


def inputs(heads: tuple[int, ...] = (), device: str = "cpu") -> dict[str, Tensor]:
    sizes = {"query": (T, A), "keys": (S, A), "values": (S, D)}
    return {name: torch.randn(B, *heads, *size, device=device, requires_grad=True) for name, size in sizes.items()}


def additive(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """With v as the layer that models have for it: torch counts ``nn.Linear``, and not a product with a vector."""
    v = torch.nn.Linear(A, 1, bias=False, device=query.device)
    scores = v(torch.tanh(query.unsqueeze(-2) + keys.unsqueeze(-3))).squeeze(-1)
    return scores.softmax(-1) @ values


def multiplicative(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return (query @ keys.transpose(-1, -2)).softmax(-1) @ values


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_additive(heads: tuple[int, ...], device: str) -> None:
    """Forward and backward; three times the forward's products."""
    x = inputs(heads, device)
    v = torch.randn(*heads, A, device=device, requires_grad=True)
    found = counted(lambda: onepass.additive_attention(x["query"], x["keys"], x["values"], v)[0])
    assert found == counted(lambda: additive(**x)) == 3 * 2 * B * max(1, *heads, 1) * T * S * (A + D)


@pytest.mark.parametrize("keep_weights", [False, True])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_multiplicative(heads: tuple[int, ...], keep_weights: bool) -> None:
    """Where weights are not kept, the backward computes scores again, and that counts."""
    x = inputs(heads)
    if not keep_weights:
        x = {name: torch.cat([tensor] * 20, -2).detach().requires_grad_() for name, tensor in x.items()}
    found = counted(lambda: onepass.multiplicative_attention(**x, need_weights=keep_weights)[0])
    N, T, S = x["query"].shape[:-2].numel(), x["query"].shape[-2], x["keys"].shape[-2]
    assert found == counted(lambda: multiplicative(**x)) + (0 if keep_weights else 2 * N * T * S * A)


def test_scores() -> None:
    """Scores alone count their product with v."""
    x = inputs()
    v = torch.randn(A, requires_grad=True)
    assert counted(lambda: onepass.additive_scores(x["query"], x["keys"], v)) == 3 * 2 * B * T * S * A


@pytest.mark.parametrize("family", ["additive", "multiplicative"])
def test_steps(family: str) -> None:
    """A loop over a memory counts as much as one call of all its queries, wherever its gradients are computed."""
    x = inputs()
    v = torch.randn(A, requires_grad=True)

    def loop() -> Tensor:
        memory = (
            onepass.additive_memory(x["keys"], x["values"], v)
            if family == "additive"
            else onepass.multiplicative_memory(x["keys"], x["values"])
        )
        return torch.stack([memory.attend(query)[0] for query in x["query"].unbind(1)], 1)

    assert counted(loop) == counted(lambda: (additive if family == "additive" else multiplicative)(**x))


def test_all_ops() -> None:
    """An op without a formula would count nothing, and nobody would know."""
    names = {schema[: schema.index("(")] for schema in SCHEMAS}
    assert names - set(PRODUCTS) == {"additive_prepare", "stack_steps"}
