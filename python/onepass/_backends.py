"""Which backends there are, why one cannot serve a call, and which one ``"auto"`` takes."""

import functools
import warnings

import torch
from torch import Tensor

from onepass import _library

NAMES = ("cpu", "triton", "reference")
OLDEST_GPU = (8, 0)  # compute capability


def not_supported_reasons(backend: str, device: torch.device) -> list[str]:
    """Why the backend cannot serve tensors on the device; empty if it can."""
    if backend == "reference":
        return []
    if backend == "cpu":
        reasons = [] if _library.error is None else [_library.error]
        return reasons if device.type == "cpu" else [*reasons, f"it serves tensors on the cpu, not on {device}"]
    reasons = [] if _library.triton_error is None else [_library.triton_error]
    if device.type == "cpu" and _library.INTERPRETED:
        return reasons
    if device.type != "cuda":
        return [*reasons, f"it serves tensors on a GPU, not on {device}"]
    if torch.version.hip is None and (capability := _capability(device)) < OLDEST_GPU:
        reasons.append(f"it needs compute capability 8.0 or newer; {device} has {capability[0]}.{capability[1]}")
    return reasons


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def pick_backend(backend: str, query: Tensor) -> str:
    """The name of the backend that serves the call; raises where a named one cannot."""
    if backend == "auto":
        for name in ("cpu", "triton"):
            if not not_supported_reasons(name, query.device):
                return name
        if not torch.compiler.is_compiling():
            _say_once(query.device)
        return "reference"
    if backend not in NAMES:
        raise ValueError(f"backend must be one of {('auto', *NAMES)}; got {backend!r}")
    reasons = not_supported_reasons(backend, query.device)
    if reasons:
        raise RuntimeError(f"backend {backend!r} cannot serve this call: {'; '.join(reasons)}")
    return backend


@functools.cache
def _say_once(device: torch.device) -> None:
    reasons = "; ".join(not_supported_reasons("triton" if device.type == "cuda" else "cpu", device))
    warnings.warn(f"onepass runs its plain torch reference, which is slow and large: {reasons}", stacklevel=4)
