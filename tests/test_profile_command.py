"""``python -m onepass profile`` on small functions of a user's: the table, the trace, the figures, and errors that can be read."""

import gzip
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from seq2seq_command_cases import Command, assert_error, command

from onepass.benchmarks.families import Additive, Multiplicative
from onepass.profiling import command as profiling
from onepass.profiling import gpu, targets
from onepass.profiling.events import KERNELS, Profile, Work
from onepass.profiling.measure import Measured

__all__ = ["command"]  # a fixture

TOY = """
import torch, onepass

QUERY, KEYS, VALUES, V = torch.rand(2, 4, 16), torch.rand(2, 5, 16), torch.rand(2, 5, 8), torch.rand(16)
SIZES = "B 2, T 4, S 5, A 16, D 8"
LONG = torch.rand(1 << 18)  # whose tanh is among the longest ops, whatever the machine does meanwhile
calls = 0

def step():
    global calls
    calls += 1
    query = (QUERY @ torch.eye(16)).requires_grad_()
    context, _ = onepass.additive_attention(query, KEYS, VALUES, V)
    (context.sum() + LONG.tanh().sum()).backward()

def idle():
    pass

def ragged():
    for n in (1, 2):
        onepass.multiplicative_attention(QUERY[:, :n], KEYS, VALUES)

def eager():
    return QUERY.exp()

def hungry(batch):
    pass

def broken():
    raise ValueError("mine")
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "toy.py").write_text(TOY)
    (tmp_path / "importer.py").write_text("import nowhere_to_be_found\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("toy", "importer"):
        sys.modules.pop(name, None)


def test_the_table(toy: Path, command: Command, set_threads: Callable[[int], None]) -> None:
    status, output, error = command(
        "profile", "toy:step", "--repeat", 3, "--warmup", 1, "--threads", 1, "--trace", "out/trace.json.gz", "--json", "out/figures.json"
    )
    assert status == 0, error
    assert sys.modules["toy"].calls == 1 + 3 + 3
    assert torch.get_num_threads() == 1
    lines = output.splitlines()
    assert lines[0].startswith("toy:step: ")
    assert "1 thread of the cpu" in lines[0]
    assert lines[3].split() == ["calls", "ms", "share", "of", "its", "ceiling"]
    firsts = [line[:28].strip() for line in lines]
    for name in ("onepass kernels", "additive_forward", "additive_backward", "matrix products", "aten::mm", "aten::tanh"):
        assert name in firsts, output
    assert sum(f"    {sys.modules['toy'].SIZES}, float32" in line for line in lines) == 2
    figures = json.loads(Path("out/figures.json").read_text())
    rows = figures["rows"]
    assert sum(row["share"] for row in rows) == pytest.approx(1, abs=0.02)  # ops that overlap the ends of a call
    assert sum(row["milliseconds"] for row in rows) == pytest.approx(figures["milliseconds under the profiler"], rel=0.02)
    assert all(row["calls"] == 1 for row in rows if row["name"].startswith("additive"))
    kernels = [row for row in rows if row["kind"] == "onepass kernels"]
    assert all(row["limit"] in ("arithmetic", "read bandwidth") and row["of_ceiling"] > 0 for row in kernels)
    with gzip.open("out/trace.json.gz", "rt") as file:
        names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
    assert names.count(f"onepass::additive_backward [{sys.modules['toy'].SIZES}] float32 cpu") == 3


def test_several_sizes(toy: Path, command: Command) -> None:
    status, output, _ = command("profile", "toy:ragged", "--repeat", 1)
    assert status == 0
    assert "float32 and 1 more" in output
    assert "multiplicative_forward" in output


@pytest.mark.parametrize("function", ["eager", "idle"])
def test_without_a_kernel(toy: Path, command: Command, function: str) -> None:
    status, output, error = command("profile", f"toy:{function}", "--repeat", 1)
    assert status == 0
    assert "Python, autograd, dispatch" in output
    assert "no kernel of onepass ran" in error


def test_bare(toy: Path, command: Command) -> None:
    """Warm-up and one call, nothing said: another profiler watches."""
    assert command("profile", "toy:step", "--warmup", 2, "--bare") == (0, "", "")
    assert sys.modules["toy"].calls == 3


def test_on_a_gpu(toy: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on one: Proton's tree and Nsight Compute's command follow the table; a bare call is watched, its warm-up is not."""
    seen = []

    @contextmanager
    def watching(name: str) -> Iterator[None]:
        seen.append((name, sys.modules["toy"].calls))
        yield

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an imitation")
    monkeypatch.setattr(torch.cuda.profiler, "profile", lambda: watching("profile"))
    monkeypatch.setattr(torch.autograd.profiler, "emit_nvtx", lambda: watching("ranges"))
    monkeypatch.setattr(gpu, "proton_tree", lambda target, device, folder: f"the tree of {target} on {device}")
    profile = Profile([Work(KERNELS, "additive_step", 1, 70.0)], 70.0, ["attend"], on_gpu=True)
    monkeypatch.setattr(profiling, "measure", lambda *_: Measured(1, 1e-4, 1e-4, profile))
    status, output, error = command("profile", "toy:step")
    assert (status, error) == (0, "")
    assert output.startswith("toy:step: 0.10 ms a call, an imitation")
    assert ["Python,", "autograd,", "dispatch:", "GPU", "idle", "0.030", "30%"] in map(str.split, output.splitlines())
    assert "the tree of toy:step on cuda" in output
    assert output.splitlines()[-1].startswith("  ncu ")
    assert output.splitlines()[-1].endswith("'regex:^(attend)$' -o onepass python -m onepass profile toy:step --device cuda --bare")
    monkeypatch.setattr(profiling, "measure", lambda *_: Measured(1, 1e-4, 1e-4, replace(profile, on_gpu=False)))
    assert "no kernel of the GPU was seen" in command("profile", "toy:step")[2]
    assert command("profile", "toy:step", "--warmup", 2, "--bare") == (0, "", "")
    assert seen == [("profile", 2), ("ranges", 2)]
    assert sys.modules["toy"].calls == 3


def test_the_list(command: Command) -> None:
    status, output, _ = command("profile")
    assert status == 0
    assert [line.split()[0] for line in output.splitlines()] == list(targets.WORKLOADS)


def test_shapes_of_the_benchmarks() -> None:
    """A shape's name means what it means to ``bench``."""
    shapes = {f"{family.name}-{shape.name.lower()}": shape for family in (Additive(), Multiplicative()) for shape in family.shapes}
    shared = shapes.keys() & targets.WORKLOADS.keys()
    assert len(shared) == 6
    for name in shared:
        assert targets.WORKLOADS[name].title.endswith(f": {targets._text(shapes[name][1:])}")


@pytest.mark.parametrize("name", targets.WORKLOADS)
def test_workloads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They run; small, as attention's sizes are the only thing large in them."""
    if name.startswith(("additive", "multiplicative")):
        family, _, kind = name.partition("-")
        workload = (targets._steps if kind == "steps" else targets._attention)(family, (2, 3, 4, 16, 8))
        gradients = workload.make(torch.device("cpu"))()
        assert [g.shape[-1] for g in gradients] == [16, 16, 8, 16][: len(gradients)]  # type: ignore[attr-defined]
    else:
        monkeypatch.setattr(targets, "_words", lambda *_: (torch.tensor([[4, 5, 6], [7, 8, 0]]), torch.tensor([3, 2])))
        assert targets.WORKLOADS[name].make(torch.device("cpu"))() is not None


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["additive-nm"], ["'additive-nm' is neither a workload (additive-nmt, ", "nor module:function"]),
        (["toy:"], ["'toy:' is neither"]),
        (["nowhere:step"], ["no module 'nowhere' in "]),
        (["toy.inner:step"], ["no module 'toy.inner'"]),
        (["toy:stop"], ["has no 'stop'; its functions: broken, eager, hungry, idle, ragged, step"]),
        (["toy:QUERY.stop"], ["has no 'QUERY.stop'"]),
        (["toy:SIZES"], ["toy:SIZES is a str, not a function"]),
        (["toy:hungry"], ["toy:hungry is called without arguments, but missing a required argument: 'batch'"]),
        (["toy:idle", "--trace", "trace.txt"], ["--trace takes a file .json or .json.gz; got trace.txt"]),
        (["toy:idle", "--json", "."], [". is a folder; a file is wanted"]),
        (["toy:idle", "--device", "abacus"], ["--device: "]),
        (["toy:idle", "--device", "cuda"], ["--device cuda: torch sees no GPU"]),
        (["toy:idle", "--repeat", "0"], ["--repeat"]),
    ],
    ids=" ".join,
)  # fmt: skip
def test_errors(toy: Path, command: Command, monkeypatch: pytest.MonkeyPatch, arguments: list[str], parts: list[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_error(command("profile", *arguments), *parts)


def test_errors_of_the_function(toy: Path, command: Command) -> None:
    """With their traceback: they are the user's to mend."""
    with pytest.raises(ValueError, match="mine"):
        command("profile", "toy:broken")
    with pytest.raises(ModuleNotFoundError, match="nowhere_to_be_found"):
        command("profile", "importer:step")


def test_the_working_directory_is_searched(toy: Path) -> None:
    assert os.getcwd() not in sys.path
    assert targets.find("toy:idle", torch.device("cpu"))() is None


def test_one_of_several_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the current one from then on: what is waited for, and whose limits count."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name in ("cuda:1", "cuda", "cpu"):
        assert profiling._device(name) == torch.device(name)
    assert chosen == [torch.device("cuda", 1)]
