"""The library of the GPU's stand-in: ``tests/cpp/stand_in_gpu.cpp``, the host's half of ``csrc/cuda``, in place of ``onepass/_cuda``.

Importing this builds and loads it where the switch is set. That has to be before torch is imported, which then takes the GPU for one.
"""

import ctypes
import fcntl
import hashlib
import importlib.util
import os
import runpy
import subprocess
import sys
import tempfile
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CAPABILITY = int(os.environ.get("STAND_IN_GPU", "0"))  # 80 for 8.0; 0 for none
SOURCES = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
CPP = Path(__file__).parent / "cpp"


def build() -> tuple[Path, Path]:
    """The library and what it looks for torch's stream in. Made once for all processes that ask, until a source, torch or the compiler
    changes."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    torch = Path(spec.origin).parent
    ours = CPP / "stand_in_gpu.cpp"
    suffixes = (".h", ".cuh", ".cu", ".cpp", ".py")
    files = [torch / "version.py", ours, CPP / "torch_cuda.cpp", SOURCES.parents[1] / "python/onepass/schemas.inc"]
    files += sorted(path for path in SOURCES.parent.rglob("*") if path.suffix in suffixes)
    compiler = os.environ.get("CXX", "c++")
    said = subprocess.run([compiler, "--version"], check=True, capture_output=True).stdout
    key = hashlib.sha256(b"".join(path.read_bytes() for path in files) + said).hexdigest()[:16]
    made = Path(tempfile.gettempdir()) / f"onepass-cuda-{os.getuid()}" / f"stand-in-{key}"
    made.parent.mkdir(mode=0o700, exist_ok=True)
    with open(f"{made}.lock", "w") as lock, tempfile.TemporaryDirectory(dir=made.parent) as folder:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            whole = Path(folder, "whole")
            whole.mkdir()
            named = ["-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so"]
            subprocess.run([compiler, *named, CPP / "torch_cuda.cpp", "-o", whole / "libtorch_cuda.so"], check=True)
            link(compiler, torch, [ours, SOURCES / "ops.cpp", *sorted(SOURCES.glob("*.cu"))], whole / "stand_in.so")
            whole.rename(made)
    return made / "stand_in.so", made / "libtorch_cuda.so"


def link(compiler: str, torch: Path, sources: list[Path], whole: Path) -> None:
    toolkit = types.SimpleNamespace(**runpy.run_path(str(SOURCES / "build.py")))
    stable = f"-DTORCH_TARGET_VERSION={runpy.run_path(str(SOURCES.parents[1] / 'setup.py'))['TARGET_TORCH']}"
    folders = [torch / "include", torch / "include/torch/csrc/api/include", *toolkit.runtime()[0]]
    host = [compiler, "-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-Wno-psabi", *(f"-I{folder}" for folder in folders)]
    gpu = [toolkit.nvcc(), *toolkit.FLAGS, "-Ofc=max", "-gencode=arch=compute_80,code=compute_80"]  # of which only the host's half is run

    def compiled(source: Path) -> str:
        command = gpu if source.suffix == ".cu" else [*host, stable] if source.parent == SOURCES else host
        target = str(whole.with_name(f"{source.name}.o"))
        subprocess.run([*command, "-c", str(source), "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    libraries = [f"-L{torch / 'lib'}", f"-Wl,-rpath,{torch / 'lib'}", "-ltorch_cpu", "-lc10"]
    subprocess.run([compiler, "-shared", *objects, *libraries, "-o", str(whole)], check=True)


def load() -> ctypes.CDLL:
    if "torch" in sys.modules:
        raise ImportError("torch was imported before the library that it is to take for a GPU")
    whole, torch_cuda = build()
    ctypes.CDLL(str(torch_cuda), ctypes.RTLD_LOCAL)  # as torch loads it
    return ctypes.CDLL(str(whole), ctypes.RTLD_LOCAL)


library = load() if CAPABILITY else None
