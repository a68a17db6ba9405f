"""Kernels compiled for GPUs that are not here: what a catalogue lists, and what comes out for a target."""

import contextlib
import fcntl
import functools
import hashlib
import inspect
import io
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from . import sass

TO_LOOK_AT = ("-cubin", "-lineinfo", "-Xptxas", "-v", "--keep")  # besides the flags of the build


class Entry(Protocol):
    """A kernel as it would be launched: one line of a catalogue's ``entries()``."""

    @property
    def name(self) -> str: ...
    @property
    def tile(self) -> str: ...
    @property
    def shape(self) -> str: ...
    @property
    def function(self) -> Any: ...  # the @triton.jit function, or a CudaKernel
    @property
    def signature(self) -> dict[str, str]: ...  # of all arguments: "*fp32", "i32", ..., "constexpr"
    @property
    def constants(self) -> dict[str, Any]: ...  # values of the constexprs
    @property
    def amd(self) -> dict[str, Any]: ...  # those that are others for AMD
    @property
    def divisible(self) -> tuple[str, ...]: ...  # arguments that 16 divides
    @property
    def warps(self) -> int: ...
    @property
    def stages(self) -> int: ...
    @property
    def options(self) -> dict[str, Any]: ...  # more of the compiler's, as the launch gives them
    @property
    def hot(self) -> Any: ...  # the @triton.jit function that has the hot loop, or what counts a loop's work; None: no or but one loop
    @property
    def elements(self) -> float | None: ...  # of the work, done by a thread in one trip of the hot loop
    @property
    def work(self) -> float | None: ...  # elements that the launch of ``arguments`` has to do
    @property
    def arguments(self) -> Callable[[], list[Any]] | None: ...  # for the PTX machine, without constexprs; None: it is not executed
    @property
    def grid(self) -> tuple[int, int, int]: ...
    @property
    def necessary(self) -> int: ...  # bytes of global memory that these arguments cannot do without moving


@dataclass(frozen=True)
class Compiled:
    """For NVIDIA: text is PTX and binary a cubin; for AMD: assembly and no binary."""

    name: str
    text: str
    binary: bytes | None
    shared: int  # bytes of dynamic shared memory, or of LDS: all that Triton's kernels have


@dataclass(frozen=True)
class Resources:
    """Spills are instructions that store or load what has no register; for AMD, the registers so spilled."""

    registers: int
    spills: int
    stack: int  # bytes per thread
    shared: int


@dataclass(frozen=True)
class CudaKernel:
    """A kernel of csrc/cuda by its symbol, with the dynamic shared memory of its launch."""

    source: Path
    symbol: str
    shared: int

    def compile(self, target: str) -> Compiled:
        made = by_nvcc(self.source, target)
        return Compiled(self.symbol, (made / "kernels.ptx").read_text(), (made / "kernels.cubin").read_bytes(), self.shared)


def by_nvcc(source: Path, target: str) -> Path:
    """A folder with the PTX and the cubin of a file of csrc/cuda and ``said``, what ptxas says of them: made once for all processes that
    ask, until a source or the compiler changes."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise CompilationError("there is no nvcc")
    version = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    files = sorted(path for path in source.parents[1].rglob("*") if path.suffix in (".h", ".cuh", ".cu"))
    content = b"".join(path.read_bytes() for path in files)
    build = runpy.run_path(str(source.parent / "build.py"))
    flags = [*TO_LOOK_AT, *build["FLAGS"], build["machine_code"](target)]
    key = hashlib.sha256(content + f"{version} {flags} {source.name}".encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"onepass-cuda-{os.getuid()}" / key
    folder.parent.mkdir(mode=0o700, exist_ok=True)
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            return folder
        with tempfile.TemporaryDirectory(dir=folder.parent) as made:
            command = [nvcc, *flags, "--keep-dir", made, str(source), "-o", f"{made}/kernels.cubin"]
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            if done.returncode != 0:
                raise CompilationError(done.stderr)
            kept = Path(made, "kept")
            kept.mkdir()
            Path(made, "kernels.cubin").rename(kept / "kernels.cubin")
            Path(made, source.name).with_suffix(".ptx").rename(kept / "kernels.ptx")
            (kept / "said").write_text(done.stderr)
            kept.rename(folder)  # whole, or not at all
    return folder


class CompilationError(Exception):
    """What the compiler said."""


def compile_entry(entry: Entry, target: str, **options: Any) -> Compiled:
    """For compute capability ``target`` ("80"), or for an AMD architecture ("gfx942"); options come after the entry's own."""
    if isinstance(entry.function, CudaKernel):
        return entry.function.compile(target)
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    amd = target.startswith("gfx")
    names = entry.function.arg_names
    divisible = {(names.index(name),): [["tt.divisibility", 16]] for name in entry.divisible}
    constants = {**entry.constants, **(entry.amd if amd else {})}
    source = ASTSource(entry.function, entry.signature, constants, divisible)
    machine = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target), 32)
    options = {"num_warps": entry.warps, "num_stages": entry.stages, **entry.options, **options}
    with knobs.compilation.scope(), messages() as said:
        knobs.compilation.always_compile = amd  # a kernel out of the cache says nothing, also if it was a bad one
        result = triton.compile(source, target=machine, options=options)
    if amd and said:  # errors in inline assembly: LLVM prints them and goes on without the instruction
        raise CompilationError("; ".join(dict.fromkeys(said)))
    text = result.asm["amdgcn" if amd else "ptx"]
    return Compiled(result.metadata.name, text, None if amd else result.asm["cubin"], result.metadata.shared)


@contextlib.contextmanager
def messages() -> Iterator[list[str]]:
    """The lines that anything but Python writes to standard error meanwhile."""
    lines: list[str] = []
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile("w+") as file, contextlib.redirect_stderr(io.StringIO()):
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            lines += filter(None, (line.strip() for line in file))


def source_of(function: Any) -> sass.Source:
    """What tells the hot loop: the lines of a @triton.jit function, named as by instructions; other functions count the work themselves."""
    if function is None or inspect.isfunction(function):
        return function
    lines, first = inspect.getsourcelines(function.fn)
    name = Path(inspect.getfile(function.fn)).name
    return frozenset(f"{name}:{number}" for number in range(first, first + len(lines)))


def tool(path_of_tool: str, binary: bytes, *options: str) -> str:
    """What a tool prints about a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary)
        return subprocess.run([path_of_tool, *options, path], capture_output=True, text=True, check=True).stdout


@functools.cache  # several ask for it, and disassembling takes as long as compiling
def program(compiled: Compiled) -> list[sass.Instruction]:
    from triton import knobs

    assert compiled.binary is not None
    return sass.parse(tool(knobs.nvidia.nvdisasm.path, compiled.binary, "-c", "-g"), compiled.name)


def resources(compiled: Compiled) -> Resources:
    from triton import knobs

    if compiled.binary is None:
        found = {name: int(value) for name, value in re.findall(r"^[\s-]+\.(\w+):\s+(\d+)$", compiled.text, re.M)}
        # Scalar registers spill to lanes of vector registers, not to memory.
        return Resources(found["vgpr_count"], found["vgpr_spill_count"], found["private_segment_fixed_size"], compiled.shared)
    usage = tool(knobs.nvidia.cuobjdump.path, compiled.binary, "-res-usage").partition(f"Function {compiled.name}:")[2]
    found = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", usage.partition("Function ")[0])}
    spills = sum(item.kind == "local" for item in program(compiled))
    return Resources(found["REG"], spills, found["STACK"], compiled.shared + found["SHARED"])
