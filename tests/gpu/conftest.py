"""The backends of a GPU. Without one every test here skips, and says so; ``STAND_IN_GPU=80 pytest tests/gpu`` runs them without one."""

from collections.abc import Iterator

import pytest
import stand_in_gpu
import tolerance
import torch
from gpu_cases import BACKENDS
from turns import in_turn


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Compiling takes seconds, and on the stand-in so does a call: unless every case is asked for, those run that bring a pair of values of
    their parameters."""
    ours = [item for item in items if item.path.parent.name == "gpu"]
    kept = {item.nodeid for item in (ours if config.getoption("--every") else in_turn(ours, together=2))}
    if stand_in_gpu.CAPABILITY:
        kept -= {item.nodeid for item in ours if item.get_closest_marker("of_gpu")}
    left_out = {item.nodeid for item in ours} - kept
    config.hook.pytest_deselected(items=[item for item in ours if item.nodeid in left_out])
    items[:] = [item for item in items if item.nodeid not in left_out]
    if not torch.cuda.is_available():
        for item in ours:
            item.add_marker(pytest.mark.skip(reason="there is no GPU here"))


@pytest.fixture(params=BACKENDS)
def gpu_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def nothing_found() -> Iterator[None]:
    """The PTX machine that stands in for a GPU has nothing to say against what ran on it."""
    stand_in_gpu.findings.clear()
    yield
    assert not stand_in_gpu.findings, "\n".join(stand_in_gpu.findings)


@pytest.fixture(autouse=True)
def products_of_tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tolerance, "factors_are_rounded", True)
