"""The benchmark suite on a GPU: every family, checked and timed."""

import pytest
import stand_in_gpu
import torch

from onepass.benchmarks import catalogue, ceilings
from onepass.benchmarks.providers import EAGER, PROVIDERS, mine
from onepass.benchmarks.records import MEASURED, MISSING
from onepass.benchmarks.study import Study
from onepass.benchmarks.workloads import FAMILIES, Workload

assert catalogue
KINDS = [kind for kind in FAMILIES if not (stand_in_gpu.CAPABILITY and kind.endswith("overhead"))]  # a thousand steps


@pytest.mark.parametrize("kind", KINDS)
def test_family(kind: str) -> None:
    """All of onepass's providers, and eager, give right results and have times; what is missing has its reason."""
    family = FAMILIES[kind]
    names = {provider.name for provider in PROVIDERS if kind in provider.families and mine(provider.name)} | {EAGER}
    records = list(Study(names, rounds=1, turn=1e-6).speed(Workload(kind, family.small, device="cuda")))
    assert {record.status for record in records} <= {MEASURED, MISSING}, [record.reason for record in records]
    assert all(record.reason for record in records if record.status == MISSING)
    measured = {record.provider for record in records if record.status == MEASURED}
    assert EAGER in measured
    assert any(mine(name) for name in measured)


def test_ceilings() -> None:
    rates = ceilings._of_gpu(torch.float32, width=64, size=1 << 12, calls=2)
    assert rates.keys() == {"fma", "read"}
    assert min(rates.values()) > 0
