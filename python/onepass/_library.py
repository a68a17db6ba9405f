"""The ops ``onepass::*``: defined here, implemented for CPU tensors by ``onepass/_C`` and for GPU tensors by ``onepass.kernels``.

Where ``TRITON_INTERPRET=1``, Triton runs its kernels on CPU tensors, to look for errors in them, and they take the place of ``_C``.
"""

import importlib
import importlib.util
import os
import pathlib
from collections.abc import Callable
from typing import Any

import torch

from onepass._calls import call_of
from onepass._schemas import SCHEMAS

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_ops = torch.library.Library("onepass", "DEF")  # type: ignore[no-untyped-call]


def _define() -> None:
    for schema in SCHEMAS:
        _ops.define(schema)  # type: ignore[no-untyped-call]


def _load_cpu() -> str | None:
    """Load ``onepass/_C`` into torch; the reason in words if that cannot be."""
    if INTERPRETED:
        return "TRITON_INTERPRET=1 runs the Triton kernels in its place"
    spec = importlib.util.find_spec("onepass._C")
    if spec is None or spec.origin is None:
        return "the CPU kernels were not built (no C++ compiler or no torch at install time; see `python -m onepass info`)"
    try:
        torch.ops.load_library(spec.origin)  # type: ignore[no-untyped-call]
    except OSError as problem:
        return f"the CPU kernels in {pathlib.Path(spec.origin).name} do not load into torch {torch.__version__}: {problem}"
    return None


def _in_triton(name: str) -> Callable[..., Any]:
    """The op on Triton, which is imported when the first call comes."""

    def call(*arguments: Any) -> Any:
        op = importlib.import_module("onepass.kernels.ops").OPS[name]
        if not torch.autograd.profiler._is_profiler_enabled:
            return op(*arguments)
        with torch._C._profiler._RecordFunctionFast(str(call_of(name, arguments))):  # an op, so that kernels count as its own
            return op(*arguments)

    return call


def _register_triton() -> str | None:
    """Give GPU tensors to the Triton kernels; the reason in words if that cannot be."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (`pip install triton`)"
    for schema in SCHEMAS:
        name = schema[: schema.index("(")]
        if name != "additive_prepare":  # only the CPU kernels prepare
            for key in ("CUDA", "CPU") if INTERPRETED else ("CUDA",):
                _ops.impl(name, _in_triton(name), key)  # type: ignore[no-untyped-call]
    return None


_define()
error = _load_cpu()
triton_error = _register_triton()
from onepass import _autograd  # noqa: E402, F401  registers fakes and gradients
