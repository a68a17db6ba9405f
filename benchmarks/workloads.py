"""The inputs that everything is measured on, and who computes them: each provider a few lines, with the reason if it is not there."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import onepass
from onepass import reference

Attention = Callable[..., Tensor]


@dataclass(frozen=True)
class Workload:
    """One family at one shape. ``A`` is the attention width, ``D`` the value width."""

    family: str  # "additive" or "multiplicative"
    B: int
    T: int
    S: int
    A: int
    D: int
    tensors: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def make(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> "Workload":
        """The same with its input tensors: projections of the size that a trained model's have, all wanting gradients."""
        g = torch.Generator().manual_seed(seed)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=g) * scale).to(dtype).requires_grad_()

        scale = 0.5 if self.family == "additive" else self.A**-0.25
        self.tensors["query"] = normal(self.B, self.T, self.A, scale=scale)
        self.tensors["keys"] = normal(self.B, self.S, self.A, scale=scale)
        self.tensors["values"] = normal(self.B, self.S, self.D)
        if self.family == "additive":
            self.tensors["v"] = normal(self.A, scale=self.A**-0.5)
        self.tensors["upstream"] = normal(self.B, self.T, self.D).detach()
        return self

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return tuple(tensor for name, tensor in self.tensors.items() if name != "upstream")

    @property
    def elements(self) -> int:
        """B * T * S * A: tanh terms of the additive family, multiply-adds of one product of the multiplicative one."""
        return self.B * self.T * self.S * self.A

    def __str__(self) -> str:
        return f"B {self.B}  T {self.T}  S {self.S}  A {self.A}  D {self.D}"


SHAPES = ((32, 32, 48, 512, 1024), (8, 100, 400, 256, 512), (128, 10, 128, 1024, 512))


def workloads(family: str) -> list[Workload]:
    """The three shapes of the family; in the multiplicative one values are as wide as keys."""
    return [Workload(family, B, T, S, A, A if family == "multiplicative" else D) for B, T, S, A, D in SHAPES]


def eager_additive(query: Tensor, keys: Tensor, values: Tensor, v: Tensor) -> Tensor:
    scores = torch.tanh(query.unsqueeze(2) + keys.unsqueeze(1)) @ v
    return torch.softmax(scores, -1) @ values


def eager_multiplicative(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return torch.softmax(query @ keys.transpose(1, 2), -1) @ values


def sdpa(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(query, keys, values, scale=1.0)


def jax_provider(family: str) -> Callable[[Workload, bool], Callable[[], object]]:
    """jax.jit on the CPU; raises ImportError where jax is not installed."""
    import jax  # type: ignore[import-not-found]
    import jax.numpy as jnp  # type: ignore[import-not-found]

    def context(query, keys, values, *v):  # type: ignore[no-untyped-def]
        if family == "additive":
            scores = jnp.tanh(query[:, :, None] + keys[:, None]) @ v[0]
        else:
            scores = query @ keys.transpose(0, 2, 1)
        return jax.nn.softmax(scores, -1) @ values

    def prepare(workload: Workload, backward: bool) -> Callable[[], object]:
        arrays = [jnp.asarray(tensor.detach().numpy()) for tensor in workload.inputs]
        upstream = jnp.asarray(workload.tensors["upstream"].numpy())
        if backward:
            run = jax.jit(lambda *a: jax.vjp(context, *a)[1](upstream))
        else:
            run = jax.jit(context)
        return lambda: jax.block_until_ready(run(*arrays))

    return prepare


def torch_provider(function: Attention) -> Callable[[Workload, bool], Callable[[], object]]:
    """Forward alone without gradients, or forward and backward to every input."""

    def prepare(workload: Workload, backward: bool) -> Callable[[], object]:
        inputs, upstream = workload.inputs, workload.tensors["upstream"]

        def forward() -> object:
            with torch.no_grad():
                return function(*inputs)

        return (lambda: torch.autograd.grad(function(*inputs), inputs, upstream)) if backward else forward

    return prepare


def providers(family: str) -> tuple[dict[str, Callable[[Workload, bool], Callable[[], object]]], dict[str, str]]:
    """Those that are there, and why the others are not. ``onepass`` is the first, ``eager`` the second."""
    functional: Callable[..., tuple[Tensor, Tensor | None]] = (
        onepass.additive_attention if family == "additive" else onepass.multiplicative_attention
    )
    eager = eager_additive if family == "additive" else eager_multiplicative
    there = {
        "onepass": torch_provider(lambda *inputs: functional(*inputs, backend="cpu")[0]),
        "eager": torch_provider(eager),
        "torch.compile": torch_provider(torch.compile(eager)),
    }
    missing = {}
    if family == "multiplicative":
        there["SDPA"] = torch_provider(sdpa)
    try:
        there["jax.jit"] = jax_provider(family)
    except ImportError:
        missing["jax.jit"] = "jax is not installed (pip install jax)"
    return there, missing


def expected(workload: Workload) -> list[tuple[Tensor, Tensor]]:
    """Context and all gradients by the float64 reference, a few batch entries at a time, each with the sum of its terms' magnitudes."""
    step = max(1, (1 << 25) // max(1, workload.elements // workload.B))
    chunks = []
    for first in range(0, workload.B, step):
        part = slice(first, first + step)
        inputs = [x.detach()[part] if x.dim() > 1 else x.detach() for x in workload.inputs]
        inputs = [x.double().requires_grad_() for x in inputs]
        upstream = workload.tensors["upstream"][part].double()
        function = reference.additive_attention if workload.family == "additive" else reference.multiplicative_attention
        context, weights = function(*inputs, need_weights=True)
        exact = (context.detach(), *torch.autograd.grad(context, inputs, upstream))
        chunks.append(list(zip(exact, _magnitudes(workload.family, weights, upstream, *inputs), strict=True)))
    whole = []
    for parts in zip(*chunks, strict=True):
        values, sizes = zip(*parts, strict=True)
        summed = values[0].dim() == 1  # dv, over the whole batch
        whole.append((torch.stack(values).sum(0), torch.stack(sizes).sum(0)) if summed else (torch.cat(values), torch.cat(sizes)))
    return whole


@torch.no_grad()
def _magnitudes(
    family: str, weights: Tensor | None, upstream: Tensor, query: Tensor, keys: Tensor, values: Tensor, *v: Tensor
) -> list[Tensor]:
    """What each result is a sum of, in magnitudes: one rounding of that is the least that any order of summation may be off by."""
    assert weights is not None
    product = upstream @ values.mT
    g = (weights * (product - (weights * product).sum(-1, keepdim=True))).abs()  # |dL/dscore|
    if family == "additive":
        queries, sources = g.sum(-1)[..., None] * v[0].abs(), g.sum(-2)[..., None] * v[0].abs()
    else:
        queries, sources = g @ keys.abs(), g.mT @ query.abs()
    rows = [weights @ values.abs(), queries, sources, weights.mT @ upstream.abs()]
    return [*rows, g.sum().expand(v[0].shape)] if v else rows
