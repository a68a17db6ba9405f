"""Families of layers: projections included, from decoder states and encoder states to what the decoder reads on with."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import linear

from .families import Additive, Function, Multiplicative, elements
from .workloads import BARS, BOTH, FORWARD, SHAPES, Cost, Exact, Family, Shape, Workload, register


class Layer(Family):
    """All T queries, known beforehand, to their results: ``query [B, T, A]``, ``memory [B, S, D]``, which is keys and values alike."""

    function: Function
    shapes = tuple(shape._replace(D=shape.A) if shape.name in BARS else shape for shape in SHAPES)

    def weights(self, workload: Workload, generator: torch.Generator) -> dict[str, Tensor]:
        raise NotImplementedError

    def exact(self, inputs: Mapping[str, Tensor], upstream: Tensor) -> list[Exact]:
        """The result, then the gradients of all inputs, of a few batch entries in float64."""
        raise NotImplementedError

    def make(self, workload: Workload, generator: torch.Generator) -> dict[str, Tensor]:
        _, B, T, S, A, D = workload.shape
        tensors = {"query": workload.normal(generator, B, T, A), "memory": workload.normal(generator, B, S, D)}
        tensors |= self.weights(workload, generator)
        return tensors | {"upstream": workload.normal(generator, B, T, self.width(workload.shape)).detach()}

    def width(self, shape: Shape) -> int:
        return shape.D

    @torch.no_grad()
    def expected(self, workload: Workload) -> dict[str, list[Exact]]:
        tensors = {name: tensor.detach().cpu().double() for name, tensor in workload.tensors.items()}
        of_batch = ("query", "memory", "upstream")
        step = max(1, (1 << 25) * workload.shape.B // max(1, elements(workload)))
        parts = []
        for first in range(0, workload.shape.B, step):
            part = {name: x[first : first + step] if name in of_batch else x for name, x in tensors.items()}
            parts.append(self.exact(part, part.pop("upstream")))
        result, query, memory, *weights = zip(*parts, strict=True)
        gradients = [_joined(query, torch.cat), _joined(memory, torch.cat), *(_joined(weight, _sum) for weight in weights)]
        return {FORWARD: [_joined(result, torch.cat)], BOTH: gradients}

    def cost(self, workload: Workload, direction: str) -> Cost:
        """Of the function, and of the projections: each a product forward, two more backward."""
        inner = self.function.cost(workload, direction)
        _, B, T, S, _, _ = workload.shape
        inputs = sum(x.nbytes for x in workload.inputs)
        times = 1 if direction == FORWARD else 3
        projections = sum(x.numel() * B * (S if name == "W_k" else T) for name, x in workload.tensors.items() if name.startswith("W_"))
        size = (1 if direction == FORWARD else 2) * inputs + workload.tensors["upstream"].nbytes
        return Cost(inner.elements, inner.multiply_adds + times * projections, size)


def _sum(parts: tuple[Tensor, ...]) -> Tensor:
    return torch.stack(parts).sum(0)


def _joined(parts: tuple[Exact, ...], join: Callable[[tuple[Tensor, ...]], Tensor]) -> Exact:
    values, sizes = zip(*parts, strict=True)
    return Exact(join(values), join(sizes))


def _plus(one: Exact, other: Exact) -> Exact:
    return Exact(one.value + other.value, one.size + other.size)


class _Product:
    """``y = x W^T`` in float64, and what its gradients are sums of."""

    def __init__(self, x: Tensor, weight: Tensor) -> None:
        self.x, self.weight = x, weight
        self.value = linear(x, weight)

    def gradients(self, of_result: Exact) -> tuple[Exact, Exact]:
        """Of x, and of W."""
        of_x = [g @ w for g, w in zip(of_result, (self.weight, self.weight.abs()), strict=True)]
        of_weight = [g.flatten(0, 1).mT @ x.flatten(0, 1) for g, x in zip(of_result, (self.x, self.x.abs()), strict=True)]
        return Exact(*of_x), Exact(*of_weight)


def _exact(function: Function, inputs: list[Tensor], upstream: Tensor) -> list[Exact]:
    with torch.enable_grad():
        return function.exact([x.requires_grad_() for x in inputs], upstream)


class AdditiveLayer(Layer):
    """``score = v . tanh(W_q query + W_k memory)``; the result is the context."""

    name = "additive layer"
    function = Additive()

    def weights(self, workload: Workload, generator: torch.Generator) -> dict[str, Tensor]:
        _, _, _, _, A, D = workload.shape
        return {
            "W_q": workload.normal(generator, A, A, scale=0.5 * A**-0.5),
            "W_k": workload.normal(generator, A, D, scale=0.5 * D**-0.5),
            "v": workload.normal(generator, A, scale=A**-0.5),
        }

    def exact(self, inputs: Mapping[str, Tensor], upstream: Tensor) -> list[Exact]:
        query, keys = _Product(inputs["query"], inputs["W_q"]), _Product(inputs["memory"], inputs["W_k"])
        context, *of = _exact(self.function, [query.value, keys.value, inputs["memory"].clone(), inputs["v"].clone()], upstream)
        of_query, of_keys, of_values, of_v = of
        (of_states, of_w_q), (of_memory, of_w_k) = query.gradients(of_query), keys.gradients(of_keys)
        return [context, of_states, _plus(of_memory, of_values), of_w_q, of_w_k, of_v]


class GeneralLayer(Layer):
    """Luong's global attention (arXiv:1508.04025): ``score = (W_a query) . memory``; the result is ``tanh(W_c [context; query])``."""

    name = "general layer"
    function = Multiplicative()

    def weights(self, workload: Workload, generator: torch.Generator) -> dict[str, Tensor]:
        _, _, _, _, A, D = workload.shape
        return {
            "W_a": workload.normal(generator, D, A, scale=(A * D) ** -0.5),
            "W_c": workload.normal(generator, A, D + A, scale=0.5 * (D + A) ** -0.5),
        }

    def width(self, shape: Shape) -> int:
        return shape.A

    def cost(self, workload: Workload, direction: str) -> Cost:
        """Keys here are as wide as the memory."""
        of_keys = Workload(workload.family, workload.shape._replace(A=workload.shape.D), tensors=workload.tensors)
        return super().cost(of_keys, direction)

    def exact(self, inputs: Mapping[str, Tensor], upstream: Tensor) -> list[Exact]:
        query, memory = inputs["query"], inputs["memory"]
        projected = _Product(query, inputs["W_a"])
        context = torch.softmax(projected.value @ memory.mT, -1) @ memory
        combined = _Product(torch.cat((context, query), -1), inputs["W_c"])
        result = torch.tanh(combined.value)
        slope = 1 - result * result
        size = slope * linear(combined.x.abs(), combined.weight.abs()) + result.abs()
        of_features, of_w_c = combined.gradients(Exact(upstream * slope, (upstream * slope).abs()))
        D = memory.shape[-1]
        of_context, of_state = of_features.value[..., :D], Exact(of_features.value[..., D:], of_features.size[..., D:])
        _, of_query, of_keys, of_values = _exact(self.function, [projected.value, memory.clone(), memory.clone()], of_context)
        of_projected, of_w_a = projected.gradients(of_query)
        return [Exact(result, size), _plus(of_projected, of_state), _plus(of_keys, of_values), of_w_a, of_w_c]


class AdditiveLayerSteps(AdditiveLayer):
    """The same, one query at a time, as where a query depends on the context before it. Keys are projected once if the layer knows how."""

    name = "additive layer steps"


for family in (AdditiveLayer(), AdditiveLayerSteps(), GeneralLayer()):
    register(family)
