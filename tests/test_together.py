"""Queries that are taken together, beams say, get to the last bit what each gets alone: tiles of any size, pieces of rows, two panels."""

import pytest
import torch
from cases import Dims, build
from memory_cases import each_family, remember, with_leaves

MOST = 26  # past where rows are packed
ONE_WAY = 15  # past which products over channels are computed another way: multiplicative scores, gradients of weights
DTYPES = [(torch.float32, None), (torch.float32, torch.bfloat16), (torch.float64, None), (torch.bfloat16, None)]  # and as kept


@pytest.mark.of_cpp
@pytest.mark.parametrize("hidden", ["none", "lengths"])
@pytest.mark.parametrize(("dtype", "kept"), DTYPES, ids=str)
@pytest.mark.parametrize("dims", [Dims(2, MOST, 101, 136, 1037), Dims(3, MOST, 12, 21, 5)], ids=str)
@each_family
def test_as_alone(family: str, dims: Dims, dtype: torch.dtype, kept: torch.dtype | None, hidden: str, backend: str, isa: str) -> None:
    if backend == "reference":
        pytest.xfail("torch's matrix products promise no such thing")
    case = with_leaves(build(family, dims, dtype, hidden=hidden))

    def step(queries: torch.Tensor, upstream: torch.Tensor) -> list[torch.Tensor]:
        memory = remember(case, backend, dtype=kept)
        query = queries.detach().clone().requires_grad_()
        context, weights = memory.attend(query, need_weights=True)
        return [context, weights, *torch.autograd.grad(context, query, upstream)]

    alone = [step(case.query[:, t : t + 1], case.grad_context[:, t : t + 1]) for t in range(MOST)]
    for count in range(2, MOST + 1):
        together = step(case.query[:, :count], case.grad_context[:, :count])
        for name, found, each in zip(("context", "weights", "d_query"), together, zip(*alone[:count], strict=True), strict=True):
            if count <= ONE_WAY or (family == "additive" and name != "d_query"):
                assert torch.equal(found, torch.cat(each, 1)), f"{name} of {count} queries"
