"""Who has a layer: onepass, and the papers' formulas in plain modules. The peers' own are in ``peers``."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import onepass

from .providers import EAGER, eager_additive, eager_multiplicative, provider
from .workloads import FORWARD, Run, Shape, Workload

ADDITIVE, GENERAL = ("additive layer", "additive layer steps"), ("general layer",)


@dataclass(frozen=True)
class Parts:
    """What of a module computes a family: the ``names`` that it has for the workload's weights, what makes a step (query ``[B, A]`` to its
    result) of a memory, and how all queries go ``at_once`` if it can. Of its matrices those ``transposed`` are ``[in, out]``. All other
    parameters are zero and fixed."""

    module: nn.Module
    names: Mapping[str, str]
    begin: Callable[[Tensor], Callable[[Tensor], Tensor]]
    at_once: Callable[[Tensor, Tensor], Tensor] | None = None
    transposed: Collection[str] = ()

    def attend(self, query: Tensor, memory: Tensor, stepwise: bool) -> Tensor:
        if self.at_once is not None and not stepwise:
            return self.at_once(query, memory)
        step = self.begin(memory)
        return torch.stack([step(one) for one in query.unbind(1)], 1)

    def run(self, workload: Workload, direction: str) -> Run:
        self.module.to(workload.device, workload.dtype).requires_grad_(False)
        parameters = dict(self.module.named_parameters())
        for parameter in parameters.values():
            parameter.zero_()
        inputs = {name: x for name, x in workload.tensors.items() if x.requires_grad}
        for ours, theirs in self.names.items():
            weight = inputs[ours].detach()
            parameter = parameters[theirs]
            parameter.copy_((weight.mT if ours in self.transposed else weight).view_as(parameter)).requires_grad_()
            inputs[ours] = parameter
        query, memory, stepwise = inputs["query"], inputs["memory"], workload.family.endswith("steps")

        def forward() -> object:
            with torch.no_grad():
                return self.attend(query, memory, stepwise)

        def both() -> object:
            found = torch.autograd.grad(self.attend(query, memory, stepwise), tuple(inputs.values()), workload.tensors["upstream"])
            turned = [x.mT if name in self.transposed else x for name, x in zip(inputs, found, strict=True)]
            return [x.reshape(like.shape) for x, like in zip(turned, workload.inputs, strict=True)]

        return forward if direction == FORWARD else both


def layer(name: str, families: Collection[str], **more: Any) -> Callable[[Callable[[Shape], Parts]], Callable[[Shape], Parts]]:
    """Registers what makes the parts of a layer for a shape."""

    def add(make: Callable[[Shape], Parts]) -> Callable[[Shape], Parts]:
        provider(name, families, **more)(lambda workload, direction: make(workload.shape).run(workload, direction))
        return make

    return add


def attentional(output: nn.Module, context: Tensor, query: Tensor) -> Tensor:
    """Luong et al., equation 5."""
    return torch.tanh(output(torch.cat((context, query), -1)))


@layer("onepass", ADDITIVE)
def onepass_additive(shape: Shape) -> Parts:
    attention = onepass.AdditiveAttention(shape.A, shape.D, shape.A, bias=False)

    def begin(states: Tensor) -> Callable[[Tensor], Tensor]:
        memory = attention.memory(states)
        return lambda query: attention(query, memory)[0]

    names = {"W_q": "query_layer.weight", "W_k": "key_layer.weight", "v": "v"}
    return Parts(attention, names, begin, lambda query, memory: attention(query, memory)[0])


@layer("onepass", GENERAL)
def onepass_general(shape: Shape) -> Parts:
    attention, output = onepass.MultiplicativeAttention(shape.A, shape.D, "general"), nn.Linear(shape.D + shape.A, shape.A, bias=False)

    def begin(states: Tensor) -> Callable[[Tensor], Tensor]:
        memory = attention.memory(states)
        return lambda query: attentional(output, attention(query, memory)[0], query)

    def at_once(query: Tensor, memory: Tensor) -> Tensor:
        return attentional(output, attention(query, memory)[0], query)

    return Parts(nn.ModuleList((attention, output)), {"W_a": "0.query_layer.weight", "W_c": "1.weight"}, begin, at_once)


class PlainAdditive(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.W_q, self.W_k = nn.Linear(shape.A, shape.A, bias=False), nn.Linear(shape.D, shape.A, bias=False)
        self.v = nn.Parameter(torch.empty(shape.A))

    def step(self, query: Tensor, keys: Tensor, memory: Tensor) -> Tensor:
        return eager_additive(self.W_q(query).unsqueeze(1), keys, memory, self.v).squeeze(1)

    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        return eager_additive(self.W_q(query), self.W_k(memory), memory, self.v)


class PlainGeneral(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.W_a, self.W_c = nn.Linear(shape.A, shape.D, bias=False), nn.Linear(shape.D + shape.A, shape.A, bias=False)

    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        return attentional(self.W_c, eager_multiplicative(self.W_a(query), memory, memory), query)


def _plain(name: str, compiled: Callable[[Callable[..., Tensor]], Callable[..., Tensor]], **more: Any) -> None:
    @layer(name, ADDITIVE, **more)
    def additive(shape: Shape) -> Parts:
        module = PlainAdditive(shape)
        step = compiled(module.step)

        def begin(memory: Tensor) -> Callable[[Tensor], Tensor]:
            keys = module.W_k(memory)
            return lambda query: step(query, keys, memory)

        return Parts(module, {"W_q": "W_q.weight", "W_k": "W_k.weight", "v": "v"}, begin, compiled(module.forward))

    @layer(name, GENERAL, **more)
    def general(shape: Shape) -> Parts:
        module = PlainGeneral(shape)
        whole = compiled(module.forward)

        def begin(memory: Tensor) -> Callable[[Tensor], Tensor]:
            return lambda query: whole(query.unsqueeze(1), memory).squeeze(1)

        return Parts(module, {"W_a": "W_a.weight", "W_c": "W_c.weight"}, begin, whole)


_plain(EAGER, lambda function: function)
_plain("torch.compile", lambda function: torch.compile(function, dynamic=False), compiles=True)
