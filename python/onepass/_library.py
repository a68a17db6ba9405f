"""Loads the compiled ops, or keeps the reason why they are not there."""

import importlib.util
import pathlib

import torch


def _load() -> str | None:
    """Load ``onepass/_C`` into torch; the reason in words if that cannot be."""
    spec = importlib.util.find_spec("onepass._C")
    if spec is None or spec.origin is None:
        return "the CPU kernels were not built (no C++ compiler or no torch at install time; see `python -m onepass info`)"
    try:
        torch.ops.load_library(spec.origin)  # type: ignore[no-untyped-call]
    except OSError as problem:
        return f"the CPU kernels in {pathlib.Path(spec.origin).name} do not load into torch {torch.__version__}: {problem}"
    return None


error = _load()
if error is None:
    from onepass import _autograd  # noqa: F401  registers fakes and gradients
