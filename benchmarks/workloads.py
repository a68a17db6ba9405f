"""What is measured: families of operations, shapes named for where they come from, inputs, and what the results must be.

A family is registered once and brings everything that the harness needs to know of it: the tensors of a workload, the exact results, the
work that cannot be avoided. Who computes it is in ``providers``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

FORWARD, BOTH = "forward", "forward + backward"
Run = Callable[[], object]  # computes the results once: a tensor, or a sequence of tensors, of torch or convertible by numpy
Seconds = Mapping[str, list[float]]  # of every provider in every round


class Shape(NamedTuple):
    """``A`` is the attention width, ``D`` the value width; ``name`` says whose the sizes are."""

    name: str
    B: int
    T: int
    S: int
    A: int
    D: int


class Exact(NamedTuple):
    """A result in float64, and of every element the sum of the magnitudes of the terms that it is a sum of."""

    value: Tensor
    size: Tensor


@dataclass(frozen=True)
class Cost:
    """What an operation cannot do without: ``elements`` are its unit of work, ``bytes`` those of inputs and results, each once."""

    elements: int
    multiply_adds: int
    bytes: int


@dataclass(frozen=True)
class Workload:
    """One family at one shape, in one dtype on one device; ``make`` fills in the tensors."""

    family: str
    shape: Shape
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    tensors: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def make(self, seed: int = 0) -> "Workload":
        self.tensors.update(FAMILIES[self.family].make(self, torch.Generator().manual_seed(seed)))
        return self

    def normal(self, generator: torch.Generator, *sizes: int, scale: float = 1.0) -> Tensor:
        """A random tensor that wants a gradient, the same on every device."""
        return (torch.randn(*sizes, generator=generator) * scale).to(self.device, self.dtype).requires_grad_()

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The tensors that gradients are taken for, in order."""
        return tuple(tensor for tensor in self.tensors.values() if tensor.requires_grad)


class Family:
    """An operation to measure. Subclasses give ``name``, ``shapes``, ``make``, ``expected`` and ``cost``; if a provider keeps inputs in
    fewer bits, ``as_kept`` too. An instance goes to ``register``."""

    name: str
    shapes: tuple[Shape, ...]
    small = Shape("small", 2, 3, 5, 16, 16)  # to warm up on, and for tests
    bars: tuple[str, ...] = ()  # names of the shapes that the README's tables show
    directions: tuple[str, ...] = (FORWARD, BOTH)
    threads: int | None = None  # on a CPU, if not all
    quick: bool = False  # in a run of less than a minute too

    def fitted(self, shape: Shape) -> Shape:
        """A shape that a user gave, within what the family takes."""
        return shape

    def make(self, workload: Workload, generator: torch.Generator) -> dict[str, Tensor]:
        """The tensors by name; those that want gradients are inputs, ``upstream`` is the gradient that the backward starts from."""
        raise NotImplementedError

    def expected(self, workload: Workload) -> dict[str, list[Exact]]:
        """The results of each direction, in the order in which a ``Run`` returns them."""
        raise NotImplementedError

    def as_kept(self, workload: Workload, dtype: torch.dtype) -> tuple[Workload, float]:
        """The workload whose inputs are those that a provider has which keeps them in fewer bits; and what results may be off by then, in
        sums of the magnitudes of their terms."""
        raise NotImplementedError

    def cost(self, workload: Workload, direction: str) -> Cost:
        raise NotImplementedError

    def budget(self, workload: Workload, direction: str) -> int | None:
        """Bytes beyond inputs and results that onepass promises to stay within, if it promises any."""
        return None

    def budgeted_inputs(self, workload: Workload) -> int:
        """Bytes of inputs that the budget counts, which a measured peak does not."""
        return 0

    def outputs_apart(self, workload: Workload, direction: str) -> int:
        """Bytes of outputs that a ``Run`` makes and does not return: with a backward it returns gradients."""
        return workload.tensors["upstream"].nbytes if direction == BOTH else 0

    def beside(self, workload: Workload, direction: str) -> dict[str, Run]:
        """Runs that take turns with the providers' without being one: what a limit is measured by."""
        return {}

    def metrics(self, workload: Workload, direction: str, seconds: Seconds, ceilings: Mapping[str, float]) -> dict[str, dict[str, float]]:
        """More figures, by provider; ``seconds`` has the runs of ``beside`` too."""
        return {}


FAMILIES: dict[str, Family] = {}


def register(family: Family) -> None:
    assert family.name not in FAMILIES, f"family {family.name!r} is there already"
    FAMILIES[family.name] = family


# B, T, S, A, D
NMT = Shape("NMT", 32, 32, 48, 512, 1024)
SUMMARISATION = Shape("summarisation", 8, 100, 400, 256, 512)  # See et al. 2017: articles of 400 words, summaries of 100
ONE_SOURCE = SUMMARISATION._replace(name="one source", B=1)  # which all threads share
TORCH = Shape("torch 128x10", 128, 10, 128, 1024, 512)  # B, T, S, A of pytorch's benchmarks/tensorexpr/attention.py, as the next
TORCH_STEP = Shape("torch 1280x1", 1280, 1, 66, 1024, 512)
SPEECH = Shape("speech", 16, 60, 200, 320, 640)  # Listen, attend and spell: characters over frames that a pyramid has thinned out
TACOTRON = Shape("Tacotron", 32, 160, 100, 128, 512)  # Shen et al. 2018: 128 channels over 512 of the encoder
G2P = Shape("G2P", 128, 8, 9, 128, 384)  # examples/g2p/configs/demo.toml: letters and phonemes of a word
RECOMMENDER = Shape("recommender", 512, 1, 50, 200, 400)  # Wu et al. 2019 (NAML): 50 articles read, pooled by one learned query
SHAPES = (NMT, SUMMARISATION, TORCH, ONE_SOURCE, TORCH_STEP, SPEECH, TACOTRON, G2P, RECOMMENDER)
BARS = (NMT.name, SUMMARISATION.name, TORCH.name, ONE_SOURCE.name)
