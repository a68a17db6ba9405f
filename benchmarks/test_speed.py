"""Every family, direction, shape and provider, in float32 and bfloat16, under pytest-benchmark.

``pytest benchmarks --benchmark-json=speed.json`` runs it. A provider that is not there skips with its reason; one that is wrong fails. ``-k
small`` takes the smallest shape of each alone, in seconds; so does ``make test``, without timing.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from onepass.benchmarks import catalogue
from onepass.benchmarks.checks import as_tensors, standard_apart, wrong
from onepass.benchmarks.providers import EAGER, PROVIDERS, UnavailableError, providers
from onepass.benchmarks.workloads import FAMILIES, Exact, Shape, Workload

assert catalogue
DTYPES = (torch.float32, torch.bfloat16)
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def cases() -> Iterator[Any]:
    """The providers of a workload come one after another: they share its exact results."""
    for family in FAMILIES.values():
        names = [provider.name for provider in PROVIDERS if family.name in provider.families]
        for device in DEVICES:
            for shape in (family.small, *family.shapes):
                for dtype in DTYPES:
                    for direction in family.directions:
                        for name in names:
                            words = (family.name, direction, shape.name, str(dtype).removeprefix("torch."), device, name)
                            yield pytest.param(family.name, shape, dtype, device, direction, name, id="-".join(words))


@functools.lru_cache(maxsize=1)
def made(family: str, shape: Shape, dtype: torch.dtype, device: str) -> tuple[Workload, dict[str, list[Exact]]]:
    workload = Workload(family, shape, dtype, device).make()
    return workload, FAMILIES[family].expected(workload)


@pytest.mark.parametrize(("family", "shape", "dtype", "device", "direction", "name"), list(cases()))
def test_speed(benchmark: Any, family: str, shape: Shape, dtype: torch.dtype, device: str, direction: str, name: str) -> None:
    there, missing = providers(Workload(family, shape, dtype, device))
    if name in missing:
        pytest.skip(missing[name])
    workload, exact = made(family, shape, dtype, device)
    torch.compiler.reset()
    try:
        run = there[name].prepare(workload, direction)
        results = {other: as_tensors(there[other].prepare(workload, direction)()) for other in (name, EAGER)}
    except UnavailableError as reason:
        pytest.skip(str(reason))
    keeps = there[name].keeps
    assert not wrong(exact[direction], results, dtype, {name: standard_apart(workload, keeps, direction)} if keeps else {})

    def timed() -> None:
        run()
        if device == "cuda":
            torch.cuda.synchronize()

    threads = torch.get_num_threads()
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads)
        torch.set_num_threads(FAMILIES[family].threads or threads)
        benchmark(timed)
