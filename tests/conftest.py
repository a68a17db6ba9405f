"""Options and fixtures: the backend under test, instruction sets, thread counts, and memory that starts as NaN."""

import importlib
import os
from collections.abc import Callable, Iterator

import hypothesis
import pytest
import stand_in_gpu
import tolerance
import torch
from interpreter import mend
from isas import ISAS, machine_isas
from turns import in_turn, parameters

# Outputs come from torch's allocator, which poisons them (below); tests/test_blocks.py has the memory that is kept between calls.
os.environ["ONEPASS_KEEP_MIB"] = "0"

from onepass import _backends, _library

hypothesis.settings.register_profile("onepass", derandomize=True, deadline=None, database=None, print_blob=False)
hypothesis.settings.load_profile("onepass")

BUILT_UPON = ("test_layer", "test_memory_layers", "test_seq2seq")
LONG = ("test_attention_memory", "test_deferred", "test_determinism", "test_memory_", "test_spans")  # of many calls in each test
if _library.INTERPRETED:  # Triton compiles nothing there
    collect_ignore_glob = ["test_gpuless*.py", "test_ptx_triton.py", "test_triton_*.py"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        default="cpu",
        choices=["cpu", "triton", "reference"],
        help="what the tests run; triton, with TRITON_INTERPRET=1, runs in Triton's interpreter; reference is torch's eager formula",
    )
    parser.addoption("--every", action="store_true", help="on a GPU, every case of a test and not just each pair of its parameters' values")


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)  # the workers share the cores
    if config.getoption("--backend") == "triton" and _library.INTERPRETED:
        mend()
    if stand_in_gpu.CAPABILITY:
        stand_in_gpu.give_triton()
    config.addinivalue_line("markers", "of_cpp: about the C++ kernels alone: threads, memory, kept blocks, what only a host checks")
    config.addinivalue_line("markers", "of_gpu: what only a real GPU has, and not its stand-in: graphs, streams")
    config.addinivalue_line("markers", "plain_memory: fresh memory is left as the allocator gives it (the test maps a lot of it)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With another backend than the C++ kernels, drop what speaks of these."""
    select = {"cpu": list, "reference": of_reference, "triton": of_triton}[config.getoption("--backend")]
    kept = select(items)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def of_reference(items: list[pytest.Item]) -> list[pytest.Item]:
    """Neither instruction sets nor half-width dtypes in float32."""
    halves = (torch.bfloat16, torch.float16)
    return [
        item
        for item in items
        if parameters(item).get("isa") not in ISAS[1:]
        and not ("backend" in getattr(item, "fixturenames", ()) and parameters(item).get("dtype") in halves)
    ]


def of_triton(items: list[pytest.Item]) -> list[pytest.Item]:
    """Tests of a backend, but for layers and systems built upon it, and those marked as the C++ kernels' own.

    Of a test's cases, since a launch takes up to a second in the interpreter, those that bring a value of a parameter; of tests that make
    many calls, every eighth of these.
    """
    of_backend = [
        item
        for item in items
        if "backend" in getattr(item, "fixturenames", ())
        and not item.path.name.startswith(BUILT_UPON)
        and not item.get_closest_marker("of_cpp")
        and parameters(item).get("isa") not in ISAS[1:]
    ]
    chosen = enumerate(in_turn(of_backend), 1)
    kept = {item.nodeid for number, item in chosen if not item.path.name.startswith(LONG) or number % 8 == 0}
    return [item for item in of_backend if item.nodeid in kept]


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The backend under test, which ``"auto"`` takes too. Kernels that are not there fail a test; they never skip it."""
    name: str = request.config.getoption("--backend")
    if name == "reference":
        monkeypatch.setattr(_library, "error", "these tests run the reference")
        _backends._say_once.cache_clear()
        return name
    if name == "triton":
        monkeypatch.setattr(tolerance, "factors_are_rounded", True)
    if reasons := _backends.not_supported_reasons(name, torch.device("cpu")):
        pytest.fail(f"the backend under test is not there: {'; '.join(reasons)}")
    return name


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
