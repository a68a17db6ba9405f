"""The backends of a GPU. Without one every test here skips, and says so; ``STAND_IN_GPU=80 pytest tests/gpu`` runs them without one."""

import pytest
import stand_in_gpu
import tolerance
import torch
from turns import in_turn

HERE = torch.device("cuda", 0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of the stand-in, on which a call takes seconds, cases that bring a pair of values of their parameters."""
    ours = [item for item in items if item.path.parent.name == "gpu"]
    if not torch.cuda.is_available():
        for item in ours:
            item.add_marker(pytest.mark.skip(reason="there is no GPU here"))
    if stand_in_gpu.CAPABILITY:
        kept = {item.nodeid for item in in_turn(ours, together=2) if not item.get_closest_marker("of_gpu")}
        config.hook.pytest_deselected(items=[item for item in ours if item.nodeid not in kept])
        items[:] = [item for item in items if item not in ours or item.nodeid in kept]


@pytest.fixture(params=["triton", "cuda"])
def gpu_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def products_of_tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tolerance, "factors_are_rounded", True)
