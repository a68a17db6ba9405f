"""How setup.py compiles csrc/cuda, into ``onepass/_cuda``: a library that loads into a torch with CUDA of 2.10 or newer, and that any
torch can build."""

import os
import pathlib
import re
import shutil
import subprocess

OLDEST = (12, 8)  # the first nvcc that knows all of ARCHS
ARCHS = ("80", "86", "89", "90", "100", "120")
SAME_AS = {"89": "86"}  # no kernel knows the difference: the first half of the compiler, which takes longer, runs once for both
FLAGS = ("-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden")


def nvcc() -> str | None:
    """The compiler: ``$CUDA_HOME/bin/nvcc`` where that variable is set, else the one on the path."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")


def why_not(switch: str) -> str | None:
    """Why the CUDA kernels cannot be built here, or None; ``switch``: ONEPASS_CUDA."""
    archs()  # says what is wrong with them, whatever else is
    if switch == "0":
        return "ONEPASS_CUDA=0 when onepass was installed"
    compiler = nvcc()
    if compiler is None:
        home = os.environ.get("CUDA_HOME")
        where = f"in $CUDA_HOME/bin, {home}/bin," if home else "on the path"
        return f"there was no nvcc {where} when onepass was installed (install the CUDA toolkit, set CUDA_HOME, and install onepass again)"
    said = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release (\d+)\.(\d+)", said)
    if found is None:
        return f"{compiler} does not tell its version"
    version = int(found[1]), int(found[2])
    return None if version >= OLDEST else f"{compiler} is {version[0]}.{version[1]}, {OLDEST[0]}.{OLDEST[1]} or newer is needed"


def archs() -> list[str]:
    """What to build for, 90 for 9.0: of ONEPASS_CUDA_ARCHS, or all."""
    given = re.findall(r"[^ ,;]+", os.environ.get("ONEPASS_CUDA_ARCHS", ""))
    if unknown := [arch for arch in given if not re.fullmatch(r"\d{2,3}[af]?", arch)]:
        raise SystemExit(f"onepass: ONEPASS_CUDA_ARCHS takes numbers such as {' '.join(ARCHS)}; got {' '.join(unknown)}")
    return given or list(ARCHS)


def code() -> list[str]:
    """Machine code for each architecture, and PTX of the newest for those to come."""
    flags = [machine_code(arch) for arch in archs()]
    newest = max((arch for arch in archs() if arch.isdigit()), key=int, default=None)
    return flags + ([f"-gencode=arch=compute_{newest},code=compute_{newest}"] if newest else [])


def machine_code(arch: str) -> str:
    return f"-gencode=arch=compute_{SAME_AS.get(arch, arch)},code=sm_{arch}"


def compile_one(source: str, target: str) -> None:
    """One .cu file."""
    pathlib.Path(target).parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([str(nvcc()), "-c", source, "-o", target, *FLAGS, *host(), *code()], check=True)


def host() -> list[str]:
    """The compiler that nvcc takes for the host's part: ``$CXX``, where $NVCC_CCBIN does not name another."""
    named = os.environ.get("CXX", "").split()  # perhaps behind ccache
    return ["-ccbin", named[-1]] if named and "NVCC_CCBIN" not in os.environ else []


def runtime() -> tuple[list[str], list[str], list[str]]:
    """Folders of headers, folders of libraries, and libraries of the CUDA runtime, which is linked in."""
    home = pathlib.Path(os.environ.get("CUDA_HOME") or home_of(str(nvcc())))
    folders = [str(folder) for name in ("lib64", "lib", "targets/x86_64-linux/lib") if (folder := home / name).is_dir()]
    return [str(home / "include")], folders, ["cudart_static", "dl", "rt", "pthread"]


def home_of(compiler: str) -> str:
    """The toolkit's folder, as nvcc itself knows it, which may be a script elsewhere."""
    said = subprocess.run([compiler, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True, check=False).stderr
    found = re.search(r"^#\$ TOP=(.*)$", said, re.M)
    return found[1] if found else str(pathlib.Path(compiler).resolve().parent.parent)
