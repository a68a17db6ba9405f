"""The ops ``onepass::*``: implemented for CPU tensors by ``onepass/_C`` and for GPU tensors in Triton, ``onepass.kernels``. The same ops as
``onepass_cuda::*`` are those of the CUDA kernels, ``onepass/_cuda``; what these lack is Triton's there too. The libraries define the ops,
so that a process without Python has them; where a library is not there, they are defined here.

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

IN_CUDA = {  # the ops that onepass/_cuda has
    "additive_forward", "additive_backward", "additive_scores", "additive_scores_backward", "additive_step", "additive_step_backward",
    "multiplicative_forward", "multiplicative_step", "multiplicative_step_backward",
}  # fmt: skip
OF_CPU = {"additive_prepare"}  # those that the CPU kernels alone have
NAMESPACES = ("onepass", "onepass_cuda")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def ops_of(backend: str) -> Any:
    """The namespace of a backend's ops."""
    return torch.ops.onepass_cuda if backend == "cuda" else torch.ops.onepass


def _library(namespace: str, error: str | None) -> torch.library.Library:
    """A namespace whose ops are defined: by its compiled library, unless an error is why there is none."""
    library = torch.library.Library(namespace, "DEF" if error else "FRAGMENT")  # type: ignore[no-untyped-call]
    for schema in SCHEMAS:
        if error:
            library.define(schema)  # type: ignore[no-untyped-call]
        elif not _has(namespace, schema):
            raise ImportError(f"onepass's library of {namespace}::* was built from other sources than its Python: install onepass again")
    return library


def _has(namespace: str, schema: str) -> bool:
    wanted = torch._C.parse_schema(f"{namespace}::{schema}")
    return any(str(found) == str(wanted) for found in torch._C._jit_get_schemas_for_operator(wanted.name))


def _load(name: str, kernels: str, not_built: str) -> str | None:
    """Load ``onepass/name`` into torch; the reason in words if that cannot be."""
    path = path_of(name)
    if path is None:
        return _not_built(kernels, not_built)
    try:
        torch.ops.load_library(path)  # type: ignore[no-untyped-call]
    except OSError as problem:
        return f"the {kernels} kernels in {pathlib.Path(path).name} do not load into torch {torch.__version__}: {problem}"
    return None


def path_of(name: str) -> str | None:
    """Where the library ``onepass/name`` lies."""
    spec = importlib.util.find_spec(f"onepass.{name}")
    return None if spec is None else spec.origin


def _not_built(kernels: str, why: str) -> str:
    return f"the {kernels} kernels were not built ({why}; see `python -m onepass info`)"


def _load_cpu() -> str | None:
    if INTERPRETED:
        return "TRITON_INTERPRET=1 runs the Triton kernels in its place"
    return _load("_C", "CPU", "no C++ compiler, no torch, or ONEPASS_CPU=0 at install time")


def _load_cuda() -> str | None:
    said = cuda_build()
    if not said[:1].isdigit():  # a library that lies there all the same is of an earlier build
        return _not_built("CUDA", said)
    return _load("_cuda", "CUDA", f"nvcc failed for {said}")


def cuda_build() -> str:
    """The compute capabilities that the CUDA kernels were built for, 90 for 9.0, or why they were not."""
    try:
        return str(importlib.import_module("onepass._probe").build()["cuda"])
    except ImportError:
        return "no C++ compiler when onepass was installed"


def _in_triton(name: str) -> Callable[..., Any]:
    """The op on Triton, which is imported when the first call comes."""

    def call(*arguments: Any) -> Any:
        op = importlib.import_module("onepass.kernels.ops").OPS[name]
        with _device_of(arguments):
            if not torch.autograd.profiler._is_profiler_enabled:
                return op(*arguments)
            with torch._C._profiler._RecordFunctionFast(str(call_of(name, arguments))):  # an op, so that kernels count as its own
                return op(*arguments)

    return call


def _device_of(arguments: tuple[Any, ...]) -> Any:
    """Makes the tensors' device the current one, where Triton launches."""
    tensors = arguments[0] if isinstance(arguments[0], list) else arguments
    return torch.cuda.device_of(next(tensor for tensor in tensors if tensor is not None))  # type: ignore[no-untyped-call]


def _register_triton() -> str | None:
    """Give GPU tensors to the Triton kernels; the reason in words if that cannot be."""
    missing = None if importlib.util.find_spec("triton") else "triton is not installed (`pip install triton`)"
    for schema in SCHEMAS:
        name = schema[: schema.index("(")]
        if name in OF_CPU:
            continue
        if missing is None:
            for key in ("CUDA", "CPU") if INTERPRETED else ("CUDA",):
                _ops.impl(name, _in_triton(name), key)  # type: ignore[no-untyped-call]
        if name not in IN_CUDA or cuda_error is not None:
            call = _in_triton(name) if missing is None else _refuses(name, missing)
            _cuda_ops.impl(name, call, "CUDA")  # type: ignore[no-untyped-call]
    return missing


def _refuses(name: str, missing: str) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        raise RuntimeError(f"backend 'cuda' takes {name} from Triton: {missing}")

    return call


error = _load_cpu()
cuda_error = _load_cuda()
_ops, _cuda_ops = _library("onepass", error), _library("onepass_cuda", cuda_error)
cuda_archs = () if cuda_error else tuple(cuda_build().split())
triton_error = _register_triton()
