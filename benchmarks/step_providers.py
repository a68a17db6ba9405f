"""Who takes steps: onepass over a memory; the formulas over the tensors themselves, one query at a time."""

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

import onepass
from onepass import _backends

from .providers import EAGER, FORMULAE, Formula, fused_multiplicative, provider
from .stepwise import RECORDED, STEPS
from .workloads import Run, Workload

Begin = Callable[..., Callable[[Tensor], Tensor]]  # keys, values and v to a step: one query [B, A], or several [B, K, A] over a memory
MEMORIES: dict[str, Callable[..., onepass.AttentionMemory]] = {
    "additive": onepass.additive_memory,
    "multiplicative": onepass.multiplicative_memory,
}


def training(workload: Workload, direction: str, begin: Begin) -> Run:
    queries = [q.contiguous().requires_grad_() for q in workload.tensors["query"].detach().unbind(1)]
    upstream = [u.contiguous() for u in workload.tensors["upstream"].unbind(1)]
    tensors = workload.inputs[1:]

    def run() -> object:
        step = begin(*tensors)
        contexts = [step(query) for query in queries]
        return *(context.detach() for context in contexts), *torch.autograd.grad(contexts, (*queries, *tensors), upstream)

    return run


def asked(begin: Begin, query: Tensor, *tensors: Tensor) -> Callable[[], Tensor]:
    """A step without gradients; what it begins with is there before."""
    with torch.no_grad():
        step = begin(*tensors)

    def run() -> Tensor:
        with torch.no_grad():
            return step(query)

    return run


def decoding(workload: Workload, direction: str, begin: Begin) -> Run:
    return asked(begin, workload.tensors["query"].detach()[:, 0].contiguous(), *workload.inputs[1:])


def together(workload: Workload, direction: str, begin: Begin) -> Run:
    return asked(begin, workload.tensors["query"].detach(), *workload.inputs[1:])


def copies(workload: Workload, direction: str, begin: Begin) -> Run:
    """Every beam is a sentence with a memory of its own."""
    query, keys, values, *v = (x.detach() for x in workload.inputs)
    B, K, A = query.shape
    run = asked(begin, query.reshape(B * K, A), keys.repeat_interleave(K, 0), values.repeat_interleave(K, 0), *v)
    return lambda: run().view(B, K, -1)


def many(workload: Workload, direction: str, begin: Begin) -> Run:
    query = workload.tensors["query"].detach()[:, 0].contiguous().requires_grad_()

    def run() -> object:
        with torch.set_grad_enabled(direction == RECORDED):
            step = begin(*workload.inputs[1:])
            for _ in range(STEPS - 1):
                step(query)
            return step(query).detach()

    return run


Loop = Callable[[Workload, str, Begin], Run]
LOOPS: dict[str, Loop] = {"steps": training, "decoding": decoding}
WITH_BEAMS: dict[str, Loop] = {**LOOPS, "beams": together}
ALL_LOOPS: dict[str, Loop] = {**WITH_BEAMS, "overhead": many}


def register(
    name: str,
    begin_of: Callable[[str], Begin],
    loops: Mapping[str, Loop] = LOOPS,
    functions: Collection[str] = tuple(MEMORIES),
    **more: Any,
) -> None:
    """``begin_of`` a function's name is how its steps begin."""

    @provider(name, {f"{function} {kind}" for function in functions for kind in loops}, **more)
    def prepare(workload: Workload, direction: str) -> Run:
        function, kind = workload.family.split()
        return loops[kind](workload, direction, begin_of(function))


def over_tensors(step: Formula) -> Begin:
    return lambda *tensors: lambda query: step(query, *tensors)


def step_of(attention: Formula) -> Formula:
    """Of one query, or of several."""

    def step(query: Tensor, *tensors: Tensor) -> Tensor:
        return attention(query, *tensors) if query.dim() == 3 else attention(query.unsqueeze(1), *tensors).squeeze(1)

    return step


def over_memory(function: str, backend: str, dtype: torch.dtype | None = None) -> Begin:
    def begin(*tensors: Tensor) -> Callable[[Tensor], Tensor]:
        memory = MEMORIES[function](*tensors, dtype=dtype, backend=backend)
        return lambda query: memory.attend(query)[0]

    return begin


def _eager(function: str) -> Begin:
    return over_tensors(step_of(FORMULAE[function]))


def _compiled(function: str) -> Begin:
    return over_tensors(torch.compile(step_of(FORMULAE[function]), dynamic=False))


def _backend(name: str) -> None:
    def reasons(workload: Workload) -> list[str]:
        return _backends.not_supported_reasons(name, torch.device(workload.device))

    begin_of = functools.partial(over_memory, backend=name)
    more: dict[str, Any] = {"more_reasons": reasons, "optional": name == "reference"}
    register(f"onepass {name}", begin_of, ALL_LOOPS, **more)
    register(f"onepass {name}, copies", begin_of, {"beams": copies}, **more)
    functions = {"cpu": tuple(MEMORIES), "cuda": ("multiplicative",), "triton": ("multiplicative",)}.get(name)
    if functions:  # those that keep it as `as_kept` says
        rounded = functools.partial(over_memory, backend=name, dtype=torch.bfloat16)
        register(f"onepass {name}, bfloat16", rounded, LOOPS, functions, dtypes=(torch.float32,), keeps=torch.bfloat16, **more)


for backend in _backends.NAMES:
    _backend(backend)
register(EAGER, _eager, ALL_LOOPS)
register(f"{EAGER}, copies", _eager, {"beams": copies})
register("torch.compile", _compiled, WITH_BEAMS, compiles=True)
register("SDPA", lambda function: over_tensors(step_of(fused_multiplicative)), WITH_BEAMS, functions=("multiplicative",))
