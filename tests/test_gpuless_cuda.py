"""The CUDA kernels as ``benchmarks/gpuless.py`` lists them: all compile, and the slots of their hot loops are those of the bars."""

import pytest

pytest.importorskip("triton", reason="needs nvdisasm, which triton brings")

from cuda_machine import NVCC
from gpu.study import entries, study

pytestmark = pytest.mark.skipif(NVCC is None, reason="needs nvcc, to compile kernels")

CATALOGUE = "gpu.cuda_catalogue"
SLOTS = {"CUDA additive_forward": {"90": 4.0, "100": 3.0}, "CUDA additive_backward": {"90": 8.5, "100": 5.5}}  # without staging: less


@pytest.mark.parametrize("target", ["90", "100"])
def test_every_kernel(target: str) -> None:
    listed = entries(CATALOGUE, target) if NVCC else []
    assert [entry.name for entry in listed[:2]] == list(SLOTS)
    assert len(listed) == 10
    for number, entry in enumerate(listed):
        record = study(CATALOGUE, number, target)
        assert record["spills"] == 0
        assert record["occupancy"]["blocks"] >= 1
        if entry.name in SLOTS:
            assert 1.5 < record["loop"]["slots_per_element"] <= SLOTS[entry.name][target], entry.name
