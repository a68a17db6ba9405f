"""The launches that ``benchmarks/gpuless.py`` studies: every kernel with the tiles in use, and beside them the tile of the bars."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from ptx import Output
from torch import Tensor

from onepass.kernels import scores, tanh_gradients
from onepass.kernels.launches import Launch, recorded
from onepass.kernels.ops import OPS
from onepass.kernels.tiles import Device

BUSY = 1  # multiprocessors of a device that any grid fills: nothing is split
AMPLE = 132  # an H100's


OUTPUTS = {  # arguments that hold nothing before the launch
    "attend": {"p_context", "p_weights", "p_highest", "p_sums", "p_parts"},
    "attend_online": {"p_context"},
    "combine": {"p_context"},
    "weight_gradients": {"p_gradients", "p_inner"},
    "softmax_gradients": set(),
    "sums": {"p_sums"},
    "tanh_gradients": {"p_dk", "p_dw"},
}


@dataclass(frozen=True)
class Entry:
    """A launch as :class:`benchmarks.gpu.compiled.Entry` wants it."""

    name: str
    tile: str
    shape: str
    function: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...]
    warps: int
    stages: int
    options: dict[str, Any]
    arguments: Callable[[], list[Any]] | None  # None: it is not executed here
    grid: tuple[int, int, int]
    necessary: int
    hot: Any = None
    elements: float | None = None
    work: float | None = None
    amd: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Shape:
    """B, T, S, A, D and the dtype of a call."""

    B: int
    T: int
    S: int
    A: int
    D: int
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"B {self.B}, T {self.T}, S {self.S}, A {self.A}, D {self.D}, {str(self.dtype).removeprefix('torch.')}"

    def tensors(self, *widths: str) -> list[Tensor]:
        """Such as ``"TA"`` for a query ``[B, T, A]``; ``"A"`` is v."""
        generator = torch.Generator().manual_seed(0)

        def normal(sizes: str) -> Tensor:
            shape = [getattr(self, name) for name in sizes]
            return torch.randn([self.B, *shape] if len(shape) > 1 else shape, generator=generator).to(self.dtype) * 0.5

        return [normal(sizes) for sizes in widths]

    def limits(self) -> list[tuple[Tensor | None, Tensor | None]]:
        """Every kind of lengths, and a mask: of what is there, all is visible."""
        lengths = torch.full((self.B,), self.S)
        by_query = lengths[:, None].expand(self.B, self.T).contiguous()
        spans = torch.stack([torch.zeros_like(by_query), by_query], -1)
        return [(lengths, None), (by_query, None), (spans, None), (None, torch.ones(self.B, self.T, self.S, dtype=torch.bool))]

    def weights(self) -> Tensor:
        return torch.full((self.B, self.T, self.S), 1 / self.S, dtype=torch.promote_types(self.dtype, torch.float32))


BAR = Shape(1, 64, 512, 512, 512)


def entries(target: str) -> list[Entry]:
    found: list[Entry] = []
    half = torch.bfloat16
    step = Shape(2, 1, 512, 256, 256)

    def add(op: str, processors: int, shape: Shape, *arguments: Any) -> None:
        found.extend(launches_of(op, device_for(target, processors), shape, *arguments))

    for shape in (BAR, Shape(1, 64, 512, 512, 512, half), Shape(1, 32, 128, 128, 128)):
        add("additive_forward", BUSY, shape, *shape.tensors("TA", "SA", "SD", "A"), None, None)
    for shape in (Shape(2, 5, 512, 128, 128), Shape(2, 1, 512, 256, 256)):
        add("additive_forward", AMPLE, shape, *shape.tensors("TA", "SA", "SD", "A"), None, None)
    every: tuple[int, ...] = (0, 1, 2, 3)
    for shape, processors, some in (
        (Shape(1, 64, 256, 64, 128), BUSY, every), (Shape(1, 64, 256, 64, 128, half), BUSY, (2,)), (step, AMPLE, (0, 2)),
    ):  # fmt: skip
        for lengths, mask in (shape.limits()[kind] for kind in some):
            add("additive_forward", processors, shape, *shape.tensors("TA", "SA", "SD", "A"), lengths, mask)
    for shape, some in ((Shape(1, 64, 64, 64, 256), (0, 2, 3)), (Shape(1, 64, 64, 64, 256, half), (2,))):
        for lengths, mask in (shape.limits()[kind] for kind in some):
            add("multiplicative_forward", BUSY, shape, *shape.tensors("TA", "SA", "SD"), 1.0, lengths, mask, False)
    for shape in (BAR, Shape(1, 64, 128, 256, 128, half), Shape(2, 20, 64, 128, 64)):
        query, keys, values, v, gradient = shape.tensors("TA", "SA", "SD", "A", "TD")
        add("additive_backward", BUSY, shape, gradient, None, query, keys, values, v, shape.weights(), None, None)
    for shape, some in ((Shape(1, 64, 64, 128, 64), (0, 1, 2, 3)), (Shape(1, 64, 64, 128, 64, half), (2,))):
        query, keys, values, v, gradient = shape.tensors("TA", "SA", "SD", "A", "TD")
        for lengths, mask in (shape.limits()[kind] for kind in some):
            add("additive_backward", BUSY, shape, gradient, None, query, keys, values, v, shape.weights(), lengths, mask)
    for shape, some in ((BAR, ()), (Shape(1, 64, 128, 256, 128, half), ()), (Shape(1, 64, 64, 128, 64), (0, 2))):  # as of a memory's steps
        query, keys, v, gradient = shape.tensors("TA", "SA", "A", "TS")
        for lengths, mask in [shape.limits()[kind] for kind in some] or [(None, None)]:
            add("additive_scores_backward", BUSY, shape, gradient, query, keys, v, lengths, mask, False)
    for shape in (Shape(1, 64, 256, 256, 256), Shape(1, 64, 256, 128, 128, half)):
        add("multiplicative_forward", BUSY, shape, *shape.tensors("TA", "SA", "SD"), 1.0, None, None, False)
    add("multiplicative_forward", AMPLE, step, *step.tensors("TA", "SA", "SD"), 1.0, None, None, True)
    for shape in (Shape(1, 64, 128, 128, 128), Shape(1, 64, 128, 128, 128, half)):
        query, keys, values, gradient = shape.tensors("TA", "SA", "SD", "TD")
        weights = shape.weights()
        add("multiplicative_backward", BUSY, shape, gradient, None, query, keys, values, 1.0, weights, None, None)
    return found


def device_for(target: str, processors: int) -> Device:
    if target.startswith("gfx"):
        return Device(processors, lanes=64, unit="gcn")
    return Device(processors, capability=int(target))


def launches_of(op: str, device: Device, shape: Shape, *arguments: Any) -> list[Entry]:
    """What a call of the op launches."""
    with recorded(device) as launches:
        OPS[op](*arguments)
    given = {argument.untyped_storage().data_ptr() for argument in arguments if isinstance(argument, Tensor)}
    return [entry_of(op, shape, launch, given) for launch in launches]


def entry_of(op: str, shape: Shape, launch: Launch, given: set[int]) -> Entry:
    constants, options = launch.constants, dict(launch.options)
    warps, stages = options.pop("num_warps", 4), options.pop("num_stages", 3)
    sizes = [f"{name[1:]} {constants[name]}" for name in ("BT", "BS", "BA", "BK", "BD") if name in constants]
    hot, elements = hot_loop(launch, warps)
    return Entry(
        name=f"{op}: {launch.name}",
        tile=", ".join([*sizes, f"{warps} warp{'s' * (warps > 1)}"]),
        shape=str(shape),
        function=launch.kernel,
        signature=launch.signature,
        constants=constants,
        divisible=launch.divisible,
        warps=warps,
        stages=stages,
        options=options,
        arguments=lambda: arrays(launch, given),
        grid=(launch.programs, 1, 1),
        necessary=sum(tensor.numel() * tensor.element_size() for tensor in different(launch)),
        hot=hot,
        elements=elements,
        work=None if hot is None else float(shape.B * shape.T * shape.S * shape.A),
    )


def hot_loop(launch: Launch, warps: int) -> tuple[Any, float | None]:
    """The function that the hot loop of an additive kernel has, and pairs of rows and channels that a thread does in one trip."""
    constants = launch.constants
    if constants.get("DIRECT", True) or not constants.get("ADDITIVE", True):
        return None, None
    if launch.name == "attend":
        return scores.add_reciprocals, constants["BT"] * constants["BS"] * 4 / (32 * warps)
    return tanh_gradients.merged, constants["BT"] * constants["BS"] * constants["BA"] / (32 * warps)


def different(launch: Launch) -> list[Tensor]:
    """The tensors that the kernel has to read or write, each once: an argument that it makes no use of is another one's stand-in."""
    tensors = [value for value in launch.passed.values() if isinstance(value, Tensor)]
    return list({tensor.data_ptr(): tensor for tensor in tensors}.values())


def arrays(launch: Launch, given: set[int]) -> list[Any]:
    """Arguments for the PTX machine: the call's own tensors, what earlier launches would have left (1/64 here), unwritten outputs."""
    made: dict[int, Any] = {}

    def array(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        address = value.data_ptr()
        if address not in made:
            known = value if value.untyped_storage().data_ptr() in given else torch.full_like(value, 1 / 64)
            bits = np.array((known.view(torch.int16) if value.dtype == torch.bfloat16 else known).numpy())
            made[address] = Output(bits) if name in OUTPUTS[launch.name] else bits
        return made[address]

    return [array(name, value) for name, value in launch.passed.items()]
