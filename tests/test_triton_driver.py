"""Triton's own launch, up to the compiler and to the driver, on which these take notes: what a GPU would be asked to compile and to run.

The other tests hand launches to a compiler or to the PTX machine by themselves (``onepass/kernels/launches.py``). Here each goes the way
that it goes on a GPU: options that the compiler does not know are refused, and arguments become types, constants and alignments.
"""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs triton, whose launches these are")

import triton
from triton.backends.compiler import GPUTarget

from onepass.kernels import parts
from onepass.kernels.launches import Launch, recorded
from onepass.kernels.ops import OPS
from onepass.kernels.tiles import Device

TARGETS = {
    "8.0": (GPUTarget("cuda", 80, 32), Device(108, capability=80)),
    "10.0": (GPUTarget("cuda", 100, 32), Device(148, capability=100)),
    "gfx942": (GPUTarget("hip", "gfx942", 64), Device(304, lanes=64, unit="gcn")),
}
numbers = itertools.count()


class Compiled:
    """In place of a kernel: what was to be compiled, and the launches of it."""

    function, packed_metadata = None, None

    def __init__(self, source: Any, options: dict[str, Any]) -> None:
        self.source, self.options = source, options
        self.launches: list[tuple[int, tuple[Any, ...]]] = []  # programs, arguments

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, programs: int, y: int, z: int, stream: int, *rest: Any) -> None:
        assert (y, z, stream) == (1, 1, 77)
        self.launches.append((programs, rest[5:]))


class Driver:
    def __init__(self, target: GPUTarget) -> None:
        self.target, self.device = target, next(numbers)  # of which a kernel has a cache

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        assert device == self.device
        return 77


@pytest.fixture(params=TARGETS)
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Compiled]:
    """What is compiled from now on, for the target."""
    target, device = TARGETS[request.param]
    seen: list[Compiled] = []

    def compile(source: Any, target: GPUTarget, options: dict[str, Any]) -> Compiled:
        seen.append(Compiled(source, options))
        return seen[-1]

    monkeypatch.setattr("triton.compiler.compile", compile)
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver(target))
    monkeypatch.setattr(parts, "device_of", lambda _: device)
    assert triton.runtime.driver.active.get_current_target() == target
    return seen


def tensors(dtype: torch.dtype, B: int, T: int, S: int, A: int, D: int, heads: int) -> dict[str, Any]:
    lead = (B,) if heads == 0 else (B, heads)
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    made = {name: torch.zeros(*lead, *sizes, dtype=dtype) for name, sizes in {"q": (T, A), "k": (S, A), "x": (S, D), "c": (T, D)}.items()}
    return {**made, "v": torch.zeros((A,) if heads == 0 else (heads, A), dtype=dtype), "w": torch.zeros(*lead, T, S, dtype=wide)}


def calls(t: dict[str, Any], limits: Tensor | None, mask: Tensor | None) -> dict[str, tuple[Any, ...]]:
    """Of every op, its arguments."""
    q, k, x, c, v, w = (t[name] for name in "qkxcvw")
    none = (k.new_empty((len(k), 0)), k.new_empty((len(k), 0)), v)
    seen = limits, mask
    return {
        "additive_forward": (q, k, x, v, *seen), "additive_backward": (c, w, q, k, x, v, w, *seen), "additive_scores": (q, k, v, *seen),
        "additive_scores_backward": (w.to(q.dtype), q, k, v, *seen, True), "additive_step": (q, k, x, v, *none, *seen),
        "additive_step_backward": (c, w, q, k, x, *none, w, *seen), "multiplicative_forward": (q, k, x, 0.5, *seen, False),
        "multiplicative_backward": (c, None, q, k, x, 0.5, w.new_empty(0), *seen), "multiplicative_step": (q, k, x, 0.5, *seen),
        "multiplicative_step_backward": (c, None, q, k, x, 0.5, w, *seen), "source_sums": (w, q, *seen), "weighted_values": (w, x, *seen),
        "weighted_values_backward": (c, x, *seen), "additive_step_scores": (q, k, v, *none, *seen),
        "multiplicative_step_scores": (q, k, 0.5, *seen),
    }  # fmt: skip


def of_triton(kernel: Any, source: Any) -> dict[str, tuple[str, Any, bool]]:
    """By argument: its type, its value if it is a constant, and whether 16 divides it."""
    divisible = {path[0] for path, attributes in source.attrs.items() if ["tt.divisibility", 16] in attributes}
    constants = {path if isinstance(path, str) else kernel.arg_names[path[0]]: value for path, value in source.constants.items()}
    return {
        name: (type_, constants.get(name), place in divisible) for place, (name, type_) in enumerate(source.signature.items())
    }


def of_launch(launch: Launch) -> dict[str, tuple[str, Any, bool]]:
    """The same as the tests without a GPU have it."""
    constants, divisible = launch.constants, launch.divisible
    return {name: (type_, constants.get(name), name in divisible) for name, type_ in launch.signature.items()}


@pytest.mark.parametrize("heads", [0, 2])
@pytest.mark.parametrize("hidden", ["none", "lengths", "spans and mask"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("op", sorted(OPS.keys() - {"stack_steps"}))
def test_launches(op: str, dtype: torch.dtype, hidden: str, heads: int, compiled: list[Compiled]) -> None:
    """Triton takes every launch, and makes of it what the tests' own way makes: few queries and many, sizes that are 1, or that 16
    divides."""
    for B, T, S, A, D in ((2, 3, 70, 12, 8), (1, 80, 512, 64, 48), (1, 1, 1, 16, 1)):
        limits = {"none": None, "lengths": torch.ones(B, dtype=torch.int64)}.get(hidden, torch.zeros(B, T, 2, dtype=torch.int64))
        mask = torch.ones((B, 1, T, S) if heads else (B, T, S), dtype=torch.bool) if "mask" in hidden else None
        arguments = calls(tensors(dtype, B, T, S, A, D, heads), limits, mask)[op]
        before = len(compiled), sum(len(each.launches) for each in compiled)
        OPS[op](*arguments)
        with recorded(parts.device_of(torch.device("cpu"))) as launches:
            OPS[op](*arguments)
        assert sum(len(each.launches) for each in compiled) - before[1] == len(launches) > 0
        for each in compiled[before[0] :]:
            own = [of_launch(launch) for launch in launches if launch.kernel is each.source.fn]
            assert of_triton(each.source.fn, each.source) in own


SIZES = {"a source that grows": [(1, S) for S in range(1, 700)], "batches of any sizes": [(7 * S % 60 + 1, S) for S in range(1, 400, 3)]}


@pytest.mark.parametrize(
    ("op", "growing", "any_sizes"),
    [("additive_step", 9, 17), ("multiplicative_step", 9, 12), ("multiplicative_step_backward", 10, 21), ("additive_backward", 18, 51)],
)
def test_sizes_that_vary(op: str, growing: int, any_sizes: int, compiled: list[Compiled]) -> None:
    """Compiling takes seconds, in the middle of a loop: few kernels serve all lengths of a source, and any number of queries."""
    found = []
    for sizes in SIZES.values():
        before = len(compiled)
        for T, S in sizes:
            OPS[op](*calls(tensors(torch.float32, 2, T, S, 32, 24, 0), torch.ones(2, dtype=torch.int64), None)[op])
        found.append(len(compiled) - before)
    assert found[0] <= growing
    assert found[1] <= any_sizes
