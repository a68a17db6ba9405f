"""Instructions that each CPU kernel takes for an element, counted by callgrind: the same on a busy machine as on a quiet one.

    python tests/instructions.py        counts anew and writes tests/instructions.json

The AVX2 path, as valgrind knows no AVX-512. A batch entry more costs so many instructions for its elements ``T S A`` (of a step ``S A``).
"""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ROOT / "tests/instructions.json"
ALLOWED = 0.03


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def other_machine() -> str | None:
    """Why this machine cannot run what is counted, or None."""
    if os.uname().sysname != "Linux" or os.uname().machine != "x86_64":
        return "the counts are of x86-64 Linux"
    return None if " avx2" in Path("/proc/cpuinfo").read_text() else "this machine lacks AVX2"


def no_valgrind() -> str | None:
    return None if shutil.which("valgrind") else "valgrind is not installed (Debian: apt-get install valgrind)"


def count(folder: Path, *flags: str) -> tuple[str, dict[str, float]]:
    """The compiler, and instructions per element of each kernel, as the install compiles it, with more flags after."""
    setup = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
    command = [os.environ.get("CXX", "c++"), *setup["FLAGS"], *setup["ISA_FLAGS"]["_avx2.cpp"], *flags]
    run(*command, ROOT / "tests/cpp/hot_loops.cpp", ROOT / "csrc/cpu/kernels_avx2.cpp", "-o", folder / "hot_loops", cwd=folder)
    printed = run("valgrind", "--tool=callgrind", "--callgrind-out-file=counted", folder / "hot_loops", cwd=folder)
    compiler, *lines = printed.splitlines()
    of_kernel = defaultdict(list)
    for line in lines:
        number, name, entries, elements = line.split()
        total = re.search(r"^totals: (\d+)$", (folder / f"counted.{number}").read_text(), re.MULTILINE)
        assert total is not None, line
        of_kernel[name].append((int(entries), int(elements), int(total[1])))
    return compiler, {name: _of_an_entry(*counts) for name, counts in of_kernel.items()}


def _of_an_entry(one: tuple[int, int, int], two: tuple[int, int, int]) -> float:
    return (two[2] - one[2]) / (two[1] - one[1])


def strays(figures: dict[str, float], counted: dict[str, float]) -> list[str]:
    """What differs from the figures by more than is allowed, up or down."""
    lines = [f"{name}: counted, but not in the figures" for name in counted.keys() - figures.keys()]
    for name, figure in figures.items():
        now = counted.get(name, 0.0)
        if not abs(now - figure) <= ALLOWED * figure:
            lines.append(f"{name}: {now:.4g} instructions per element, {figure:.4g} in the figures ({now / figure - 1:+.1%})")
    return sorted(lines)


def main() -> None:
    if reason := other_machine() or no_valgrind():
        sys.exit(reason)
    with tempfile.TemporaryDirectory() as folder:
        compiler, kernels = count(Path(folder))
    figures = {"compiler": compiler, "instructions per element": {name: float(f"{value:.4g}") for name, value in kernels.items()}}
    FIGURES.write_text(json.dumps(figures, indent=2) + "\n")
    print(FIGURES.read_text(), end="")


if __name__ == "__main__":
    main()
