"""Families of one query at a time over one memory: training loops, decoding, beams, and what a step costs beside its arithmetic."""

import statistics
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from onepass import _info

from .families import Additive, Function, Multiplicative, elements
from .providers import variant
from .workloads import BOTH, FORWARD, Cost, Exact, Family, Run, Seconds, Shape, Workload, register

RECORDED = "forward, recorded"  # for a backward that does not come

TRAINED: tuple[Shape, ...] = (
    Shape("over 50", 64, 50, 50, 512, 1024),
    Shape("over 200", 32, 100, 200, 256, 512),
    Shape("over 800", 16, 200, 800, 128, 512),
)
DECODED = (
    *(shape._replace(T=1) for shape in TRAINED),
    Shape("one sentence", 1, 1, 400, 512, 512),
    Shape("beyond the caches", 256, 1, 400, 512, 512),
)
BEAMS = (Shape("beams over 200", 32, 5, 200, 256, 512), Shape("beams over 100", 8, 5, 100, 512, 1024))
ONE = Shape("one position", 1, 1, 1, 16, 16)
STEPS = 1000  # timed together where one is too short


class Stepwise(Family):
    """What they share: the tensors and exact results of the function, whose queries come one at a time."""

    kind: str

    def __init__(self, function: Function) -> None:
        self.function, self.name = function, f"{function.name} {self.kind}"
        self.bars = tuple(shape.name for shape in self.shapes)

    def make(self, workload: Workload, generator: torch.Generator) -> dict[str, Tensor]:
        return self.function.make(workload, generator)

    def expected(self, workload: Workload) -> dict[str, list[Exact]]:
        return {direction: self.function.expected(workload)[FORWARD] for direction in self.directions}

    def as_kept(self, workload: Workload, dtype: torch.dtype) -> tuple[Workload, float]:
        """Additive keys are kept as their exponentials: a key moves by half a rounding of these at most, by a quarter of ``eps``. Deferred
        gradients take the keys as given, where the slope of tanh is another by twice as much of itself, half of ``eps``."""
        keys, values = (workload.tensors[name].detach().double() for name in ("keys", "values"))
        additive = self.function.name == "additive"
        keys = (2 * keys).exp().to(dtype).double().log() / 2 if additive else keys.to(dtype).double()
        kept = {"keys": keys.requires_grad_(), "values": values.to(dtype).double().requires_grad_()}
        rounding = torch.finfo(dtype).eps / 2 if additive else torch.finfo(workload.dtype).eps
        return replace(workload, tensors={**workload.tensors, **kept}), rounding

    def memory_bytes(self, workload: Workload) -> int:
        """Of keys and values: what a step reads."""
        _, B, _, S, A, D = workload.shape
        return workload.dtype.itemsize * B * S * (A + D)

    def cost(self, workload: Workload, direction: str) -> Cost:
        whole = self.function.cost(workload, direction)
        return Cost(whole.elements, whole.multiply_adds, self.memory_bytes(workload))


class Training(Stepwise):
    """T steps over one memory, making the memory included, then one backward to the queries and to all that the memory was made of. The
    results are the contexts of all steps, the gradients of all queries, then those of keys, values and v."""

    kind, directions, shapes = "steps", (BOTH,), TRAINED

    def __init__(self, function: Function) -> None:
        super().__init__(function)
        if function.name == "multiplicative":
            self.shapes = tuple(shape._replace(D=shape.A) for shape in TRAINED)

    def expected(self, workload: Workload) -> dict[str, list[Exact]]:
        exact = self.function.expected(workload)
        (context,), (of_query, *others) = exact[FORWARD], exact[BOTH]
        return {BOTH: [*_by_step(context), *_by_step(of_query), *others]}

    def cost(self, workload: Workload, direction: str) -> Cost:
        """Each step reads keys and values once forward and once backward."""
        whole = super().cost(workload, direction)
        return Cost(whole.elements, whole.multiply_adds, 2 * workload.shape.T * whole.bytes)

    def outputs_apart(self, workload: Workload, direction: str) -> int:
        return 0

    def budget(self, workload: Workload, direction: str) -> int:
        """1.3 of what there is to keep: keys, their exponentials and values, and of each step the query, scores and weights, a context."""
        _, B, T, S, A, D = workload.shape
        memory = B * S * ((2 if self.function.name == "additive" else 1) * A + D)
        return round(1.3 * workload.dtype.itemsize * (memory + T * B * (A + 2 * S + D)))

    def budgeted_inputs(self, workload: Workload) -> int:
        return self.memory_bytes(workload)


def _by_step(whole: Exact) -> list[Exact]:
    return [Exact(value, size) for value, size in zip(whole.value.unbind(1), whole.size.unbind(1), strict=True)]


class OneStep(Stepwise):
    small = Family.small._replace(T=1)

    def fitted(self, shape: Shape) -> Shape:
        return shape._replace(T=1)

    def expected(self, workload: Workload) -> dict[str, list[Exact]]:
        return {direction: _by_step(self.function.expected(workload)[FORWARD][0]) for direction in self.directions}


class Decoding(OneStep):
    """Without gradients. The limit is the longer of reading keys and values once, from where they lie, and of the arithmetic."""

    kind, directions, shapes = "decoding", (FORWARD,), DECODED

    def beside(self, workload: Workload, direction: str) -> dict[str, Run]:
        buffer = torch.ones(self.memory_bytes(workload) // workload.dtype.itemsize, dtype=workload.dtype, device=workload.device)
        return {"read": buffer.sum}

    def metrics(self, workload: Workload, direction: str, seconds: Seconds, ceilings: Mapping[str, float]) -> dict[str, dict[str, float]]:
        """Reading takes what the better of a sum and of the probe's loads, over as many bytes, takes."""
        if not ceilings:
            return {}
        cost, read, probe = self.cost(workload, direction), statistics.median(seconds["read"]), _info.probe()
        if workload.device == "cpu" and probe is not None:
            read = min(read, cost.bytes / probe.ceilings(torch.get_num_threads(), bytes=max(4096, cost.bytes))["read"])
        arithmetic = cost.multiply_adds / ceilings["fma"]
        limits = {"read seconds": read, "arithmetic seconds": arithmetic, "limit seconds": max(read, arithmetic)}
        return {
            name: {**limits, "of the limit": limits["limit seconds"] / statistics.median(times)}
            for name, times in seconds.items()
            if name != "read" and not variant(name)
        }


class Beams(Stepwise):
    """T queries of each source, a step of a beam search without gradients: over one memory, or over each of T copies of it."""

    kind, directions, shapes = "beams", (FORWARD,), BEAMS

    def metrics(self, workload: Workload, direction: str, seconds: Seconds, ceilings: Mapping[str, float]) -> dict[str, dict[str, float]]:
        return {
            name: {"over copies": statistics.median(b / a for a, b in zip(times, seconds[f"{name}, copies"], strict=True))}
            for name, times in seconds.items()
            if f"{name}, copies" in seconds
        }


class Overhead(OneStep):
    """Steps of one position, on one thread, that nothing but calls make slow."""

    kind, directions, shapes, threads = "overhead", (FORWARD, RECORDED), (ONE,), 1
    small = ONE

    def cost(self, workload: Workload, direction: str) -> Cost:
        return Cost(STEPS * elements(workload), STEPS * super().cost(workload, FORWARD).multiply_adds, self.memory_bytes(workload))

    def metrics(self, workload: Workload, direction: str, seconds: Seconds, ceilings: Mapping[str, float]) -> dict[str, dict[str, float]]:
        return {name: {"microseconds a step": 1e6 * statistics.median(times) / STEPS} for name, times in seconds.items()}


for kind in (Training, Decoding, Beams, Overhead):
    for function in (Additive(), Multiplicative()):
        register(kind(function))
