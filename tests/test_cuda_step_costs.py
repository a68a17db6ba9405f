"""What the CUDA kernels of steps promise of their costs: bytes, shared memory without conflicts, no spills, blocks side by side, slots."""

import itertools

import cuda_machine
import pytest
import torch
from cases import Dims
from cuda_step import launches_of
from step_bytes import moved

pytestmark = pytest.mark.skipif(cuda_machine.NVCC is None, reason="needs nvcc, to compile kernels")

ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
REGISTERS = 64 * 1024  # of a processor, given to warps by 256


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dims", [Dims(1, 1, 512, 256, 256), Dims(2, 4, 256, 256, 256)], ids=str)
def test_bytes_and_wavefronts(dims: Dims, dtype: torch.dtype) -> None:
    """Keys and values are read once; what goes with them adds at most a twentieth, in two parts of one query and in one of four, as it is
    asked for and past the L1. Shared memory has no conflicts."""
    for found in moved("additive", dims, dtype, processors=1, capability=80):
        assert found.launch.splits == 3 - dims.batch
        assert max(found.asked, found.past_l1) <= 1.05, f"{found.launch.kernel}: {found}"
        counts = found.machine.counts
        assert counts["shared wavefronts"] <= 1.05 * counts["shared wavefronts at least"]


@pytest.mark.parametrize(
    ("dtype", "kept"), [(torch.float32,) * 2, (torch.float32, torch.bfloat16), (torch.bfloat16,) * 2], ids=["float32", "mixed", "bfloat16"]
)
@pytest.mark.parametrize("steps", [1, 4, 5, 16])
@pytest.mark.parametrize("family", ["additive", "multiplicative"])
def test_bytes_of_clusters(family: str, steps: int, dtype: torch.dtype, kept: torch.dtype) -> None:
    """One sentence on all of an H100: at most a twentieth more, however many blocks have a piece of it. ``step_bytes.py`` prints what it is
    without clusters, and where several of them share a source."""
    for found in moved(family, Dims(1, steps, 400, 256, 256), dtype, processors=132, capability=90, kept=kept):
        assert found.launch.cluster > 1
        assert found.launch.splits >= 8
        assert max(found.asked, found.past_l1) <= 1.05, f"{found.launch.kernel}: {found}"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_registers(direction: str, architecture: str) -> None:
    """No spills, and as many blocks on a processor as launches say."""
    kernels = cuda_machine.compiled(f"step_{direction}.cu", architecture)
    assert len(kernels) == 20
    named = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16, "f16": torch.float16}
    for name, kernel in kernels.items():
        dtype, kept = named[name.split("_")[3]], named[name.split("_")[-2]]
        sizes = (1, 1, 1 if name.endswith("_1") else 4, 500, 512, 512)
        (launch,) = launches_of(direction == "backward", name.startswith("additive"), sizes, dtype, 132, int(architecture), kept)
        assert launch.kernel == name
        assert kernel.spills == 0, name
        per_warp = -(-kernel.registers * 32 // 256) * 256
        assert REGISTERS // per_warp // (launch.threads // 32) >= launch.resident, f"{name}: {kernel.registers} registers"


def test_arithmetic_hides_behind_memory() -> None:
    """With one query, on an A100 and an H100, the issue slots that launches count take less time than their bytes."""
    for capability, processors, bandwidth in ((80, 108, 2.039e12), (90, 132, 3.352e12)):
        for backward in (False, True):
            for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
                sizes = (4 * processors, 1, 1, 400, 512, 512)
                (launch,) = launches_of(backward, True, sizes, dtype, processors, capability)
                assert launch.seconds == pytest.approx(sizes[0] * 400 * 1024 * size / bandwidth)


@pytest.mark.parametrize("capability", [90, 120])
def test_clusters_of_launches(capability: int) -> None:
    """Whole clusters, which fit a processor, take at most half of the blocks from work, and are there where their shared memory is."""
    room, taken = {90: 228, 120: 100}[capability] * 1024 - 1152, 0
    for batch, steps, source, width in itertools.product((1, 4, 16, 64), (1, 4, 5, 16), (1, 50, 400, 2049, 8192), (0, 64, 256, 928)):
        for dtype, backward in itertools.product((torch.float32, torch.bfloat16, torch.float64), (False, True)):
            arguments = (backward, True, (batch, 1, steps, source, width, width), dtype, 132)
            pieces, found = launches_of(*arguments, 80), launches_of(*arguments, capability)
            assert len(pieces) == len(found)
            for alone, launch in zip(pieces, found, strict=True):
                assert alone.cluster == 1
                assert launch.cluster in (1, 2, 4, 8)
                assert launch.splits % launch.cluster == 0
                assert launch.blocks == batch * launch.splits
                assert 2 * launch.splits >= alone.splits
                assert launch.shared <= room
                assert launch.cluster > 1 or alone.splits == 1 or capability == 120
                taken += launch.cluster > 1
    assert taken > 500


def test_widths_that_no_kernel_takes() -> None:
    for backward, sizes in ((False, (1, 1, 1, 5, 30000, 8)), (True, (1, 1, 1, 5, 8, 30000))):
        assert launches_of(backward, True, sizes, torch.float32, 132) == []
