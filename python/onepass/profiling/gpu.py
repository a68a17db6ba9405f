"""What a GPU has besides: the command that looks into a kernel, and Proton's tree.

Nsight Compute and Proton take the place of torch's profiler, so each runs the target in a process of its own, by ``profile TARGET --bare``.
"""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.tree import Tree


def ncu(kernels: Sequence[str], bare: Sequence[str]) -> str:
    """Nsight Compute on the kernels that onepass launched, in one call after the warm-up."""
    names = "|".join(re.escape(name) for name in kernels)
    options = ["--set", "full", "--nvtx", "--profile-from-start", "off", "--kernel-name", f"regex:^({names})$", "-o", "onepass"]
    return shlex.join(["ncu", *options, *bare])


def bare_command(target: str, device: str) -> list[str]:
    return ["python", "-m", "onepass", "profile", target, "--device", device, "--bare"]


def proton_tree(target: str, device: str, folder: Path) -> Tree | str:
    """What Proton measured of one call, or why there is nothing."""
    if importlib.util.find_spec("triton") is None or importlib.util.find_spec("triton.profiler") is None:
        return "Proton is not there (it comes with triton)"
    name = folder / "proton"
    main = str(Path(__file__).parents[1] / "__main__.py")
    command = [sys.executable, "-m", "triton.profiler.proton", "-n", str(name), "-k", "triton", main, *bare_command(target, device)[3:]]
    done = subprocess.run(command, capture_output=True, text=True)
    found = name.with_suffix(".hatchet")
    if done.returncode != 0 or not found.exists():
        return f"Proton measured nothing: {(done.stderr or done.stdout).strip()[-300:]}"
    return tree_of(json.loads(found.read_text()))


def tree_of(database: list[dict[str, Any]]) -> Tree:
    """Proton's database as a tree, each branch with the milliseconds beneath it."""
    root = Tree("Proton: milliseconds of GPU time, one call and its warm-up")
    for child in sorted(database[0]["children"], key=_nanoseconds, reverse=True):
        _grow(root, child)
    return root


def _grow(tree: Tree, node: dict[str, Any]) -> None:
    if _nanoseconds(node) > 0:
        branch = tree.add(f"{_nanoseconds(node) / 1e6:.3f}  {node['frame']['name']}")
        for child in sorted(node["children"], key=_nanoseconds, reverse=True):
            _grow(branch, child)


def _nanoseconds(node: dict[str, Any]) -> float:
    return float(node["metrics"].get("time (ns)", 0)) + sum(map(_nanoseconds, node["children"]))
