"""A GPU where there is none: ``STAND_IN_GPU=80 pytest tests/gpu`` runs the tests of a GPU on it, of compute capability 8.0 there.

Tensors of device "cuda" lie in the host's memory, and torch's own ops run on them there (``tests/cpp/stand_in_gpu.cpp``). The library's
calls, from Python through the op to the launch, are those of a real GPU; the kernels that they launch, CUDA's and Triton's, run as compiled
on the PTX machine, on the bytes that the launch gives them. What the machine finds (races, overruns, uninitialised reads) fails the test.

Importing this sets it up where the switch is set, before the library is imported.
"""

import ctypes
import functools
import importlib.machinery
import importlib.util
import sys
import time
import types
from typing import Any

import numpy as np
import stand_in_library
import torch
from gpu.compiled import by_nvcc
from ptx import Buffer, Kernel, Machine, Struct
from stand_in_library import CAPABILITY, SOURCES
from torch import Tensor

PROCESSORS = 4
findings: list[str] = []  # of the machine, since the last look
launched: list[str] = []  # kernels, with the blocks of a cluster where those are several
library: Any = stand_in_library.library


@functools.cache
def kernel(symbol: str) -> Kernel:
    """The kernel of csrc/cuda, compiled for the GPU."""
    import cuda_machine  # which imports the library

    target = str(CAPABILITY)
    entry = f".entry {symbol}("
    sources = (path for path in sorted(SOURCES.glob("*.cu")) if entry in (by_nvcc(path, target) / "kernels.ptx").read_text())
    return cuda_machine.kernel(next(sources).name, symbol, target)


def launch(symbol: bytes, blocks: int, threads: int, shared: int, cluster: int, argument: int) -> int:
    """What the CUDA runtime calls: the kernel's one argument lies at an address. 0 if all went well."""
    try:
        launched.append(symbol.decode() + (f" by {cluster}" if cluster > 1 else ""))
        code = kernel(symbol.decode())
        words = np.frombuffer(ctypes.string_at(argument, code.parameters[0].size), np.uint64)
        memory: dict[int, Buffer] = {}
        machine = Machine(code)
        machine.launch(blocks, threads, [Struct({str(n): pointer(word, memory) for n, word in enumerate(words)})], shared, cluster)
        findings.extend(map(str, machine.findings))
    except Exception as problem:  # none may pass through C++
        findings.append(f"{symbol.decode()}: {problem!r}")
        return 1
    return 0


def block_of(address: int) -> tuple[int, int, bool] | None:
    """The block of the GPU's memory in which an address lies: where it begins, its bytes, and whether nothing has written it up to now."""
    base, size, fresh = ctypes.c_uint64(), ctypes.c_int64(), ctypes.c_int()
    there = library.stand_in_block(ctypes.c_uint64(address), ctypes.byref(base), ctypes.byref(size), ctypes.byref(fresh))
    return (base.value, size.value, bool(fresh.value)) if there else None


def pointer(word: np.uint64, memory: dict[int, Buffer]) -> Any:
    """A word of an argument as the machine takes it: where it points into the GPU's memory, the block and how far into it."""
    block = block_of(int(word))
    if block is None:
        return word
    base, size, fresh = block
    if base not in memory:
        memory[base] = Buffer(np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(base)), 0, fresh)
    return memory[base], int(word) - base


def is_fresh(tensor: Tensor) -> bool:
    block = block_of(tensor.data_ptr())
    return block is not None and block[2]


def on_host(argument: Any) -> Any:
    """A tensor of the GPU as one of the host, over the same memory."""
    return torch.ops.stand_in_gpu.on_host(argument) if isinstance(argument, Tensor) and argument.is_cuda else argument


class StandInFinder:
    """Has onepass load the library as its ``onepass._cuda``."""

    @staticmethod
    def find_spec(name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        return importlib.util.spec_from_file_location(name, library._name) if name == "onepass._cuda" else None


class Event:
    """Of the one stream, whose work is done once it is asked for."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.seconds = 0.0

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "Event") -> float:
        return 1e3 * (end.seconds - self.seconds)


def pretend() -> None:
    """torch says that it has the GPU."""
    major, minor = divmod(CAPABILITY, 10)
    properties = types.SimpleNamespace(
        name="a stand-in", major=major, minor=minor, multi_processor_count=PROCESSORS, warp_size=32, L2_cache_size=1 << 20
    )
    torch.cuda.Event = Event  # type: ignore[assignment, misc]
    answers: dict[str, Any] = {
        "_exchange_device": 0, "_maybe_exchange_device": 0, "current_stream": "the only stream", "_sleep": None,
        "_lazy_init": None, "is_available": True, "device_count": 1, "current_device": 0, "synchronize": None,
        "is_current_stream_capturing": False, "get_device_properties": properties, "get_device_name": properties.name,
        "get_device_capability": (major, minor), "get_rng_state": torch.empty(0), "set_rng_state": None,
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.backends.cudnn.enabled = False


def gru_cell(input: Tensor, hidden: Tensor, state: Tensor, *biases: Tensor | None) -> tuple[Tensor, Tensor]:
    """``aten::_thnn_fused_gru_cell``, which only GPUs have."""
    (r_i, z_i, n_i), (r_h, z_h, n_h) = (gates.chunk(3, 1) for gates in with_biases(input, hidden, biases))
    n = torch.tanh(n_i + torch.sigmoid(r_i + r_h) * n_h)
    return n + torch.sigmoid(z_i + z_h) * (state - n), state.new_empty(0)


def lstm_cell(input: Tensor, hidden: Tensor, cell: Tensor, *biases: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """``aten::_thnn_fused_lstm_cell``."""
    of_input, of_hidden = with_biases(input, hidden, biases)
    i, f, g, o = (of_input + of_hidden).chunk(4, 1)
    cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(cell), cell, cell.new_empty(0)


def with_biases(input: Tensor, hidden: Tensor, biases: tuple[Tensor | None, ...]) -> list[Tensor]:
    given = (*biases, None, None)[:2]
    return [gates if bias is None else gates + bias for gates, bias in zip((input, hidden), given, strict=True)]


def give_cells() -> torch.library.Library:
    """Made of ops that know their gradients."""
    ops = torch.library.Library("aten", "IMPL")
    for key in ("CUDA", "AutogradCUDA"):
        ops.impl("_thnn_fused_gru_cell", gru_cell, key)
        ops.impl("_thnn_fused_lstm_cell", lstm_cell, key)
    return ops


def give_triton() -> None:
    """Triton's launches go to the machine too."""
    import triton_machine

    from onepass.kernels import parts
    from onepass.kernels.launches import Launch

    def run(kernel: Any, programs: int, *arguments: Any, **given: Any) -> None:
        if programs > 0:
            launched.append(kernel.__name__)
            machine = triton_machine.run(Launch(kernel, programs, tuple(map(on_host, arguments)), given), fresh=is_fresh)
            findings.extend(map(str, machine.findings))

    parts.launch = run


if CAPABILITY:
    library.stand_in_set.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
    called = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, *[ctypes.c_int] * 4, ctypes.c_void_p)(launch)
    library.stand_in_set(called, PROCESSORS, CAPABILITY)
    sys.meta_path.insert(0, StandInFinder)
    pretend()
    cells = give_cells()
