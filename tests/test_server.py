"""A process without Python serves what torch exported: onepass's library brings the ops with it."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from onepass import AdditiveAttention, AttentionMemory, MultiplicativeAttention, _info, _library, additive_memory, multiplicative_memory

PAGE = Path(__file__).resolve().parents[1] / "docs" / "porting.md"
COMPILER = os.environ.get("CXX", "c++")
pytestmark = [
    pytest.mark.of_cpp,
    pytest.mark.skipif(_library.error is not None, reason=f"no CPU kernels: {_library.error}"),
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason="no compiler"),
]


class Decoder(nn.Module):
    """Three steps over a memory, and a call for all queries at once."""

    def __init__(self) -> None:
        super().__init__()
        self.additive = AdditiveAttention(12, 20, 16)
        self.multiplicative = MultiplicativeAttention(12, 20, "general")
        self.next = nn.Linear(20, 12)

    def forward(self, states: Tensor, queries: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        memory = self.additive.memory(states, lengths=lengths)
        state = queries[:, 0]
        for _ in range(3):
            context, weights = self.additive(state, memory, need_weights=True)
            state = torch.tanh(self.next(context))
        at_once, _ = self.multiplicative(queries, states, lengths=lengths, need_weights=True)
        return state, weights, at_once


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch_folder = Path(torch.__file__).parent
    includes = [f"-I{torch_folder}/include", f"-I{torch_folder}/include/torch/csrc/api/include"]
    libraries = [f"-L{torch_folder}/lib", f"-Wl,-rpath,{torch_folder}/lib", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", "-ldl"]
    made = tmp_path_factory.mktemp("server") / "server"
    source = Path(__file__).parent / "cpp/server.cpp"
    subprocess.run([COMPILER, "-std=c++20", "-O0", "-w", *includes, source, "-o", made, *libraries], check=True)
    return made


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("kind", ["aotinductor", "trace"])
@torch.no_grad()
def test_a_server_without_python(kind: str, server: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    decoder = Decoder().eval()
    example, served = ((torch.randn(B, S, 20), torch.randn(B, T, 12), torch.tensor([S, 1, 4])) for B, T, S in ((3, 4, 9), (3, 6, 11)))
    if kind == "aotinductor":
        program = tmp_path / "decoder.pt2"
        sizes = {0: None, 1: torch.export.Dim.DYNAMIC}
        exported = torch.export.export(decoder, example, dynamic_shapes=(sizes, sizes, {0: None}))
        torch._inductor.aoti_compile_and_package(exported, package_path=str(program))
        expected = torch._inductor.aoti_load_package(str(program))(*served)
    else:
        program = tmp_path / "decoder.pt"
        torch.jit.trace(decoder, example, check_trace=False).save(str(program))
        expected = decoder(*served)
    torch.save(served, tmp_path / "inputs")
    torch.save(tuple(expected), tmp_path / "expected")

    def serve(library: str) -> subprocess.CompletedProcess[str]:
        command = [server, library, program, tmp_path / "inputs", tmp_path / "expected"]
        return subprocess.run(command, check=False, capture_output=True, text=True)

    library = _library.path_of("_C")
    assert library is not None
    assert f"library     {library}" in _info.lines(measure=False)
    done = serve(library)
    assert (done.returncode, done.stderr) == (0, "")
    done = serve("libdl.so.2")  # without the library its ops are not known
    assert done.returncode == 4
    assert "onepass::additive" in done.stderr


class Encoder(nn.Module):
    """Without a product of torch's, whose bits may change from process to process."""

    def __init__(self, family: str) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.randn(20)) if family == "additive" else None

    def forward(self, states: Tensor, lengths: Tensor) -> AttentionMemory:
        if self.v is None:
            return multiplicative_memory(states, states, lengths=lengths)
        return additive_memory(states, states, self.v, lengths=lengths)


class Step(nn.Module):
    def forward(self, query: Tensor, memory: AttentionMemory) -> tuple[Tensor, Tensor | None]:
        return memory.attend(query, need_weights=True)


@pytest.mark.filterwarnings("ignore:.*LeafSpec")
@pytest.mark.parametrize("family", ["additive", "multiplicative"])
@torch.no_grad()
def test_a_memory_between_two_programs(family: str, server: Path, tmp_path: Path) -> None:
    """One program's memory is the next one's: the page's code, and the tensors handed over in C++."""
    torch.manual_seed(0)
    encoder, decoder, auto = Encoder(family).eval(), Step().eval(), torch.export.Dim.AUTO
    states, lengths, query = torch.randn(3, 9, 20), torch.tensor([9, 1, 4]), torch.randn(3, 20)
    exported = torch.export.export(encoder, (states, lengths), dynamic_shapes=({0: auto, 1: auto}, {0: auto}))
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if "ShapesCollection" in block)
    names = {"torch": torch, "encoder": encoder, "decoder": decoder, "states": states, "lengths": lengths, "query": query}
    exec(code, names)
    for name, program in (("encoder", exported), ("step", names["step"])):
        torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / f"{name}.pt2"))

    states, lengths, query = torch.randn(5, 11, 20), torch.tensor([11, 2, 0, 5, 7]), torch.randn(5, 20)
    encodes, steps = (torch._inductor.aoti_load_package(str(tmp_path / f"{name}.pt2")) for name in ("encoder", "step"))
    expected = steps(query, encodes(states, lengths))
    for got, want in zip(expected, decoder(query, encoder(states, lengths)), strict=True):
        assert torch.equal(got, want)
    for name, tensors in {"inputs": (states, lengths), "first": (query,), "expected": tuple(expected)}.items():
        torch.save(tensors, tmp_path / name)
    library = _library.path_of("_C")
    command = [server, library, *(tmp_path / name for name in ("encoder.pt2", "inputs", "expected", "step.pt2", "first"))]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
