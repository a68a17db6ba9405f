"""Which backends there are, why one cannot serve a call, and which one ``"auto"`` takes."""

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from onepass import _library
from onepass._validate import DTYPES

Answer = TypeVar("Answer", bound=Callable[..., object])
NAMES = ("cpu", "cuda", "triton", "reference")
OLDEST_GPU = (8, 0)  # compute capability
FEW = 16  # queries over one source: what the CUDA kernels of steps serve, of both families


def not_supported_reasons(backend: str, device: torch.device, family: str = "additive", queries: int = 1) -> list[str]:
    """Why the backend cannot serve tensors on the device, in a call of the family with so many queries; empty if it can."""
    if backend == "reference":
        return []
    if backend == "cpu":
        reasons = [] if _library.error is None else [_library.error]
        return reasons if device.type == "cpu" else [*reasons, f"it serves tensors on the cpu, not on {device}"]
    if backend == "cuda":
        return _cuda_reasons(device, family, queries)
    reasons = [] if _library.triton_error is None else [_library.triton_error]
    if device.type == "cpu" and _library.INTERPRETED:
        return reasons
    if device.type != "cuda":
        return [*reasons, f"it serves tensors on a GPU, not on {device}"]
    if torch.version.hip is None and (capability := _capability(device)) < OLDEST_GPU:
        reasons.append(f"it needs compute capability 8.0 or newer; {device} has {capability[0]}.{capability[1]}")
    return reasons


def _cuda_reasons(device: torch.device, family: str, queries: int) -> list[str]:
    reasons = [] if _library.cuda_error is None else [_library.cuda_error]
    if device.type != "cuda" or torch.version.hip is not None:
        return [*reasons, f"it serves tensors on an NVIDIA GPU, not on {device}{' of ROCm' if torch.version.hip else ''}"]
    if reasons:
        return reasons
    major, minor = _capability(device)
    if not serves(_library.cuda_archs, 10 * major + minor):
        built = ", ".join(f"{arch[:-1]}.{arch[-1]}" for arch in _library.cuda_archs)
        reasons.append(
            f"it was built for compute capabilities {built}, {device} has {major}.{minor}: "
            f"install onepass again with ONEPASS_CUDA_ARCHS={major}{minor}"
        )
    runtime, driver = _cuda_versions()
    if driver // 1000 < runtime // 1000:
        made, served = (f"{version // 1000}.{version % 1000 // 10}" for version in (runtime, driver))
        reasons.append(
            f"it was built with CUDA {made}, the driver serves CUDA {served}: update the driver, or install onepass again with an nvcc "
            "that is no newer"
        )
    if family == "multiplicative" and queries > FEW:
        reasons.append(f"it has kernels of multiplicative attention for up to {FEW} queries, not for {queries}")
    return reasons


def serves(archs: tuple[str, ...], capability: int) -> bool:
    """Whether code built for the architectures runs: that of the same generation which is no newer, or the newest one's PTX."""
    built = [int(arch) for arch in archs]
    same = any(arch // 10 == capability // 10 and arch <= capability for arch in built)
    return same or max(built, default=capability + 1) <= capability


def _asked_once(question: Answer) -> Answer:
    """The answer is kept, and a constant of compiled graphs, which know no caches."""
    kept = functools.cache(question)

    @functools.wraps(question)
    def answer(*arguments: Any) -> Any:
        return kept(*arguments)

    return torch.compiler.assume_constant_result(answer)  # type: ignore[no-any-return, no-untyped-call]


@_asked_once
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@_asked_once
def _cuda_versions() -> tuple[int, int]:
    """The CUDA runtime that the kernels were built with, and the one that the driver serves: 13000 for 13.0."""
    runtime, driver = torch.ops.onepass_cuda.versions()
    return runtime, driver


def pick_backend(
    backend: str,
    query: Tensor,
    keys: Tensor,
    values: Tensor | None = None,
    family: str = "additive",
    kept: torch.dtype | None = None,
) -> str:
    """The name of the backend that serves the call; raises where a named one cannot. ``query``: ``[B, (H,) T, A]``; ``kept``: the dtype of
    a memory that has another."""
    queries = query.shape[-2]
    if backend == "auto":
        served = [name for name in ("cpu", "cuda", "triton") if not not_supported_reasons(name, query.device, family, queries)]
        if served == ["cuda", "triton"] and not torch.compiler.is_compiling():
            return faster(query, keys, values, family == "additive", kept)
        if served:
            return served[0]
        if not torch.compiler.is_compiling():
            _say_once(query.device)
        return "reference"
    if backend not in NAMES:
        raise ValueError(f"backend must be one of {('auto', *NAMES)}; got {backend!r}")
    reasons = not_supported_reasons(backend, query.device, family, queries)
    if reasons:
        raise RuntimeError(f"backend {backend!r} cannot serve this call: {'; '.join(reasons)}")
    return backend


def faster(query: Tensor, keys: Tensor, values: Tensor | None, additive: bool, kept: torch.dtype | None) -> str:
    """``"cuda"`` or ``"triton"``, by the time that each's launch is predicted to take."""
    from onepass._probe import cuda_launches  # there, since the CUDA kernels are
    from onepass.kernels.ops import device_of
    from onepass.kernels.tiles import attend_seconds

    H = query.shape[1] if query.dim() == 4 else 1
    sizes = [query.shape[0], H, query.shape[-2], keys.shape[-2], query.shape[-1], 0 if values is None else values.shape[-1]]
    device = device_of(query.device)
    op = "additive_forward" if additive and sizes[2] > FEW else f"{'additive' if additive else 'multiplicative'}_step_forward"
    dtype = DTYPES.index(query.dtype)
    launches = cuda_launches(op, sizes, dtype, device.processors, device.capability, kept=dtype if kept is None else DTYPES.index(kept))
    seconds = sum(launch["seconds"] for launch in launches) if launches else math.inf
    return "cuda" if seconds <= attend_seconds(*sizes, query.dtype, additive, device) else "triton"


@functools.cache
def _say_once(device: torch.device) -> None:
    reasons = "; ".join(not_supported_reasons("triton" if device.type == "cuda" else "cpu", device))
    warnings.warn(f"onepass runs its plain torch reference, which is slow and large: {reasons}", stacklevel=4)
