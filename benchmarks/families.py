"""The three functions: additive attention, multiplicative attention, additive scores."""

from collections.abc import Iterator

import torch
from torch import Tensor

from onepass import reference

from .workloads import BARS, BOTH, FORWARD, SHAPES, Cost, Exact, Family, Shape, Workload, register


class Function(Family):
    """Of query, keys and perhaps values and v, projected already, of the size that a trained model's have."""

    bars: tuple[str, ...] = BARS
    quick = True

    def __init__(self) -> None:
        self.shapes = tuple(map(self.fitted, SHAPES))
        self.small = self.fitted(Family.small)

    def make(self, workload: Workload, generator: torch.Generator) -> dict[str, Tensor]:
        _, B, T, S, A, D = workload.shape
        scale = A**-0.25 if self.name == "multiplicative" else 0.5
        tensors = {"query": workload.normal(generator, B, T, A, scale=scale), "keys": workload.normal(generator, B, S, A, scale=scale)}
        if self.name != "scores":
            tensors["values"] = workload.normal(generator, B, S, D)
        if self.name != "multiplicative":
            tensors["v"] = workload.normal(generator, A, scale=A**-0.5)
        tensors["upstream"] = workload.normal(generator, B, T, S if self.name == "scores" else D).detach()
        return tensors

    def expected(self, workload: Workload) -> dict[str, list[Exact]]:
        """By the float64 reference, a few batch entries at a time."""
        parts = list(zip(*self._exact_parts(workload), strict=True))
        results = [_joined(of_result, whole=of_result[0].value.dim() == 1) for of_result in parts]
        return {FORWARD: results[:1], BOTH: results[1:]}

    def _exact_parts(self, workload: Workload) -> Iterator[list[Exact]]:
        step = max(1, (1 << 25) * workload.shape.B // max(1, elements(workload)))
        for first in range(0, workload.shape.B, step):
            part = slice(first, first + step)
            inputs = [x.detach().cpu().double()[part] if x.dim() > 1 else x.detach().cpu().double() for x in workload.inputs]
            yield self.exact([x.requires_grad_() for x in inputs], workload.tensors["upstream"].cpu().double()[part])

    def exact(self, inputs: list[Tensor], upstream: Tensor) -> list[Exact]:
        """The result, then the gradients of all inputs."""
        if self.name == "scores":
            query, keys, v = inputs
            scores, heavy = reference.additive_scores(query, keys, v), v.detach().abs()
            terms = 2 * heavy.sum() - reference.additive_scores(query, keys, heavy).detach()  # |v| (2 - tanh), as the contract has it
            return _with_gradients(scores, inputs, upstream, terms, upstream.abs())
        function = reference.additive_attention if self.name == "additive" else reference.multiplicative_attention
        context, weights = function(*inputs, need_weights=True)
        assert weights is not None
        weights, values = weights.detach(), inputs[2].detach()
        of_values = weights.mT @ upstream.abs()
        if self.name == "multiplicative":
            terms = _terms_of_scores(weights, upstream.abs() @ values.abs().mT)
            return _with_gradients(context, inputs, upstream, weights @ values.abs(), terms, of_values)
        product = upstream @ values.mT
        of_scores = (weights * (product - (weights * product).sum(-1, keepdim=True))).abs()
        terms = _terms_of_scores(weights, product.abs())
        return _with_gradients(context, inputs, upstream, weights @ values.abs(), of_scores, of_values, terms)

    def cost(self, workload: Workload, direction: str) -> Cost:
        """An element of B T S A of additive attention takes 3 multiply-adds forward, one for 1 + e^(2q + 2k) and two to merge it with
        others, and 7 backward: one for x = e^(2q + 2k), two for the reciprocal, one for r - r^2, three sums. A product takes one. The
        reciprocals themselves, for which a GPU has a unit, are not counted: a CPU's backward takes one more (``profiling/floors.py``)."""
        _, B, T, S, _, D = workload.shape
        one, both = (1, 3) if self.name == "multiplicative" else (3, 10)
        products = 0 if self.name == "scores" else B * T * S * D
        inputs = sum(x.nbytes for x in workload.inputs)
        result = workload.tensors["upstream"].nbytes
        if direction == FORWARD:
            return Cost(elements(workload), one * elements(workload) + products, inputs + result)
        return Cost(elements(workload), both * elements(workload) + 3 * products, 2 * inputs + result)

    def budget(self, workload: Workload, direction: str) -> int | None:
        if self.name != "additive" or direction != BOTH:
            return None
        _, B, T, S, A, _ = workload.shape
        return 4 * (4 * B * T * S + B * (T + S) * A)


def elements(workload: Workload) -> int:
    """B T S A: tanh terms, or multiply-adds of one product."""
    _, B, T, S, A, _ = workload.shape
    return B * T * S * A


def _terms_of_scores(weights: Tensor, product: Tensor) -> Tensor:
    """The magnitudes of what makes up the gradients of scores, differences of weighted products."""
    return weights * (product + (weights * product).sum(-1, keepdim=True))


def _with_gradients(
    result: Tensor, inputs: list[Tensor], upstream: Tensor, size: Tensor, of_scores: Tensor, of_values: Tensor | None = None,
    terms: Tensor | None = None,
) -> list[Exact]:  # fmt: skip
    """One rounding of the sums of such magnitudes is the least that any order of summation may be off by. ``of_scores``: of the terms of a
    query's or a key's gradient, what does not depend on the other: of multiplicative attention the magnitudes of what makes up a score's
    gradient ``g``. An additive one is ``sum g v (1 - tanh^2)``: a rounding of ``1 - tanh^2`` for each ``|g|``, which ``of_scores`` then is,
    and one of ``g`` for what makes it up, ``terms``."""
    query, keys, *rest = (x.detach().abs() for x in inputs)
    v = rest[-1] if rest and rest[-1].dim() == 1 else None
    if v is not None:
        sizes = [of_scores.sum(-1)[..., None] * v, of_scores.sum(-2)[..., None] * v]
        if terms is not None:
            of_terms = torch.autograd.grad(reference.additive_scores(inputs[0], inputs[1], v), inputs[:2], terms)
            sizes = [one + other for one, other in zip(sizes, of_terms, strict=True)]
    else:
        sizes = [of_scores @ keys, of_scores.mT @ query]
    if of_values is not None:
        sizes.append(of_values)
    if v is not None:
        sizes.append(of_scores.sum().expand(v.shape))
    exact = (result.detach(), *torch.autograd.grad(result, inputs, upstream))
    return [Exact(*pair) for pair in zip(exact, (size, *sizes), strict=True)]


def _joined(parts: tuple[Exact, ...], whole: bool) -> Exact:
    """Of all batch entries; the gradient of v is a sum over them."""
    values, sizes = zip(*parts, strict=True)
    return Exact(torch.stack(values).sum(0), torch.stack(sizes).sum(0)) if whole else Exact(torch.cat(values), torch.cat(sizes))


class Additive(Function):
    name = "additive"


class Multiplicative(Function):
    """Values are as wide as keys, as SDPA's users have them."""

    name = "multiplicative"

    def fitted(self, shape: Shape) -> Shape:
        return shape._replace(D=shape.A)


class Scores(Function):
    """Scores alone, as pointer networks and other normalisers take them; without values."""

    name = "scores"
    bars = ()

    def fitted(self, shape: Shape) -> Shape:
        return shape._replace(D=0)


for function in (Additive(), Multiplicative(), Scores()):
    register(function)
