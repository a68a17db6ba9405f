"""The CUDA forward of additive attention as compiled for each architecture: registers, occupancy, issue slots; and what it moves."""

import dataclasses

import pytest
import torch
from cases import Dims, build
from cuda_machine import NVCC, SOURCES, Compiled, compiled, launches
from gpu import sass
from gpu.devices import Device, device_of, occupancy

pytestmark = pytest.mark.skipif(NVCC is None, reason="needs nvcc, to compile kernels")

from cuda_additive_forward import SOURCE, run  # noqa: E402 - compiles when called

WIDE = (64, 1, 512, 512, 512, 512)
NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.float64: "f64"}
SLOTS = {"80": 4.0, "86": 4.0, "89": 4.0, "90": 4.0, "100": 3.0, "120": 4.0}  # sm_120 splits packed instructions again


def device(architecture: str) -> Device:
    """Those that benchmarks/gpu does not know have the limits of the CUDA Programming Guide's table of compute capabilities."""
    if architecture in ("86", "89"):
        return dataclasses.replace(device_of("120"), target=architecture, blocks=16 if architecture == "86" else 24)
    return device_of(architecture)


def slots(kernel: Compiled, name: str, architecture: str) -> float:
    """Per element of a tile of channels: the loop over them with all that it does to stage the next, and as often as it runs, the loop
    within, which has a reciprocal for each number of elements that merge."""
    lines = enumerate((SOURCES / "additive_scores.cuh").read_text().splitlines(), 1)
    merging = {f"additive_scores.cuh:{number}" for number, line in lines if "multiply_add(" in line or "reciprocal(" in line}
    program = kernel.program(name)
    inner = sass.hot_loop(program, merging)
    assert inner is not None
    outer = min((body for body in sass.loops(program) if set(inner) < set(body)), key=len)
    elements = sum(item.opcode.startswith("MUFU.RCP") for item in inner) * (2 if architecture == "80" else 4)
    pairs = int(name.rsplit("_", 1)[1]) * 128 // 256  # of queries and positions, a thread's
    trips = 16 * pairs // elements
    assert trips in (2, 4)
    print(f"sm_{architecture} {name}: {len(inner)} slots for {elements} elements, {len(outer) - len(inner)} more for {trips} times as many")
    return (len(outer) - len(inner) + trips * len(inner)) / (16 * pairs)


@pytest.mark.parametrize("architecture", SLOTS)
def test_resources(architecture: str) -> None:
    """No kernel spills, as many blocks fit as the launch says, and the largest tile takes no more issue slots than promised."""
    kernels = compiled(SOURCE, architecture)
    assert len(kernels) == 10
    for dtype, short in NAMES.items():
        for tile in (16,) if dtype == torch.float64 else (16, 32, 64):
            (found,) = launches("additive_forward", WIDE, dtype, capability=int(architecture), queries=tile)
            assert found.kernel == f"additive_forward_{short}_{tile}"
            kernel = kernels[found.kernel]
            fits = occupancy(device(architecture), kernel.registers, kernel.shared + found.shared, found.threads // 32)
            assert (kernel.spills, kernel.stack) == (0, 0), found.kernel
            assert fits.blocks >= found.resident == 2, found.kernel
            if tile == 64:
                assert slots(kernel, found.kernel, architecture) <= SLOTS[architecture], found.kernel


def test_bytes() -> None:
    """A tile of queries moves little more than its rows and results: scores are written and read again once, weights once more for each
    further tile of values."""
    case = build("additive", Dims(batch=1, steps=64, source=256, width=64, value_width=256), hidden="none")
    _, machine = run(case)
    moved = {name.rsplit(".", 2)[-2]: traffic for name, traffic in machine.global_bytes.items()}
    sizes = {name: 4 * tensor.numel() for name, tensor in case.inputs().items()}
    scores = 4 * 64 * 256
    assert moved["keys"].loaded == sizes["keys"]
    assert moved["values"].loaded == sizes["values"]
    assert moved["query"].loaded == 2 * sizes["query"]  # for each tile of positions
    assert (moved["weights"].stored, moved["weights"].loaded) == (2 * scores, 2 * scores)
    assert moved["context"].stored == 4 * 64 * 256


@pytest.mark.parametrize(("queries", "tile"), [(512, 64), (30, 32), (17, 32), (9, 16)])
def test_tiles_fit_the_queries(queries: int, tile: int) -> None:
    (found,) = launches("additive_forward", (264, 1, queries, 512, 512, 512), torch.float32, processors=132, capability=90)
    assert found.kernel.endswith(f"_{tile}")


def test_small_batches_take_small_tiles() -> None:
    """So that more processors have a block."""
    assert launches("additive_forward", (2, 1, 128, 512, 512, 512), torch.float32, processors=132, capability=90)[0].kernel.endswith("_16")


def test_too_many_channels_have_no_kernel() -> None:
    assert launches("additive_forward", (1, 1, 64, 64, 8193, 64), torch.float32) == []
