"""The benchmark suite on a GPU: every family, checked and timed."""

import pytest
import stand_in_gpu
import torch

from onepass.benchmarks import catalogue, ceilings
from onepass.benchmarks.providers import EAGER, mine, providers
from onepass.benchmarks.records import MEASURED
from onepass.benchmarks.study import Study
from onepass.benchmarks.workloads import FAMILIES, Workload

assert catalogue
KINDS = [kind for kind in FAMILIES if not (stand_in_gpu.CAPABILITY and kind.endswith("overhead"))]  # a thousand steps


@pytest.mark.parametrize("kind", KINDS)
def test_family(kind: str) -> None:
    """Eager and every provider of onepass that has no reason not to give right results and have times."""
    workload = Workload(kind, FAMILIES[kind].small, device="cuda")
    there = {name for name in providers(workload)[0] if mine(name)} | {EAGER}
    records = list(Study(there, rounds=1, turn=1e-6).speed(workload))
    assert {record.status for record in records} == {MEASURED}, [record.reason for record in records]
    assert {record.provider for record in records} == there
    assert len(there) > 1


def test_ceilings() -> None:
    rates = ceilings._of_gpu(torch.float32, width=64, size=1 << 12, calls=2)
    assert rates.keys() == {"fma", "read"}
    assert min(rates.values()) > 0
