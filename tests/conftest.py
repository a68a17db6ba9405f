"""Options and fixtures: the backend under test, instruction sets, thread counts, and memory that starts as NaN."""

import importlib
import os
from collections.abc import Callable, Iterator

import hypothesis
import pytest
import torch

# Outputs come from torch's allocator, which poisons them (below); tests/test_blocks.py has the memory that is kept between calls.
os.environ["ONEPASS_KEEP_MIB"] = "0"

from onepass import _backends, _library

hypothesis.settings.register_profile("onepass", derandomize=True, deadline=None, database=None, print_blob=False)
hypothesis.settings.load_profile("onepass")

ISAS = ("baseline", "avx2", "avx512")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend", default="cpu", choices=["cpu", "reference"], help="what the tests run; reference is torch's eager formula"
    )


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)  # the workers share the cores
    config.addinivalue_line("markers", "plain_memory: fresh memory is left as the allocator gives it (the test maps a lot of it)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With ``--backend reference``, drop what speaks of kernels: instruction sets, half-width dtypes in float32."""
    if config.getoption("--backend") != "reference":
        return

    def of_kernels(item: pytest.Item) -> bool:
        chosen = item.callspec.params if hasattr(item, "callspec") else {}
        halves = (torch.bfloat16, torch.float16)
        return chosen.get("isa") in ISAS[1:] or ("backend" in getattr(item, "fixturenames", ()) and chosen.get("dtype") in halves)

    config.hook.pytest_deselected(items=[item for item in items if of_kernels(item)])
    items[:] = [item for item in items if not of_kernels(item)]


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The backend under test, which ``"auto"`` takes too. Kernels that are not there fail a test; they never skip it."""
    name: str = request.config.getoption("--backend")
    if name == "reference":
        monkeypatch.setattr(_library, "error", "these tests run the reference")
        _backends._say_once.cache_clear()
    elif _library.error is not None:
        pytest.fail(f"the backend under test is not there: {_library.error}")
    return name


def machine_isas(backend: str) -> tuple[str, ...]:
    """The instruction sets to test on this machine; the reference has none of its own."""
    if backend == "reference":
        return ("baseline",)
    return tuple(name for name in ISAS if name in importlib.import_module("onepass._probe").isas())


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, backend: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Forces an instruction set on the kernels; skips only those that the machine lacks."""
    name: str = request.param
    if name not in machine_isas(backend):
        pytest.skip(f"this machine lacks {name}")
    monkeypatch.setenv("ONEPASS_ISA", name)
    if backend == "cpu":
        assert importlib.import_module("onepass._probe").isa() == name
    return name


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """``empty`` gives NaN, so that an output element which no kernel wrote is seen."""
    if request.node.get_closest_marker("plain_memory"):
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """No graph of another test, and no poisoned memory, which a compiled graph would fill in its own way."""
    torch.use_deterministic_algorithms(False)
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """``torch.set_num_threads``, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(set_threads: Callable[[int], None]) -> None:
    """For tests of many tiny operations, which threads that wait for one another slow down by far."""
    set_threads(1)


@pytest.fixture(autouse=True)
def leave_no_isa() -> Iterator[None]:
    """A test that forces an instruction set by itself does not pass it on."""
    before = os.environ.get("ONEPASS_ISA")
    yield
    os.environ.pop("ONEPASS_ISA", None)
    if before is not None:
        os.environ["ONEPASS_ISA"] = before
