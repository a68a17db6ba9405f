"""What setup.py asks of its environment: switches, and torch, whose headers the kernels are built against."""

import importlib.machinery
import os
import pathlib
import platform
import runpy
import sys
import sysconfig

AGAIN = "pip install --force-reinstall --no-deps --no-cache-dir --no-build-isolation onepass-attention"


def switch(name: str) -> str:
    """0, 1 or auto."""
    value = os.environ.get(name) or "auto"
    if value not in ("0", "1", "auto"):
        raise SystemExit(f"onepass: {name} is 0, 1 or auto; got {value}")
    return value


def jobs() -> int:
    """How many files to compile at once."""
    value = os.environ.get("ONEPASS_JOBS") or str(os.cpu_count() or 1)
    if not value.isdecimal() or int(value) < 1:
        raise SystemExit(f"onepass: ONEPASS_JOBS is a number of at least 1; got {value}")
    return int(value)


def folder_of_torch() -> pathlib.Path | None:
    """Where torch is installed, without importing it; also from an isolated build, which hides the environment's packages."""
    paths = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    spec = importlib.machinery.PathFinder.find_spec("torch", paths)
    found = pathlib.Path(spec.origin).parent if spec and spec.origin else None
    return found if found and (found / "include/torch/csrc/stable/library.h").exists() else None


def version_of_torch(torch: pathlib.Path) -> str:
    return str(runpy.run_path(str(torch / "version.py"))["__version__"])


def why_not(torch: pathlib.Path | None) -> str | None:
    """Why the CPU kernels cannot be built here, or None."""
    if switch("ONEPASS_CPU") == "0":
        return "ONEPASS_CPU=0"
    if platform.system() not in ("Linux", "Darwin"):
        return f"no build for {platform.system()} yet"
    if torch is None:
        return f"no torch >= 2.10 in this environment: install it first, then `{AGAIN}`"
    numbers = tuple(int(part) for part in version_of_torch(torch).split("+")[0].split(".")[:2])
    return None if numbers >= (2, 10) else f"torch {version_of_torch(torch)} is there, 2.10 or newer is needed"
