"""Which backends there are, why one cannot serve a call, and which one ``"auto"`` takes."""

import functools
import warnings

import torch
from torch import Tensor

from onepass import _library

NAMES = ("cpu", "reference")


def not_supported_reasons(backend: str, device: torch.device) -> list[str]:
    """Why the backend cannot serve tensors on the device; empty if it can."""
    if backend == "reference":
        return []
    reasons = [] if _library.error is None else [_library.error]
    if device.type != "cpu":
        reasons.append(f"it serves tensors on the cpu, not on {device}")
    return reasons


def pick_backend(backend: str, query: Tensor) -> str:
    """The name of the backend that serves the call; raises where a named one cannot."""
    if backend == "auto":
        if not not_supported_reasons("cpu", query.device):
            return "cpu"
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
    reasons = "; ".join(not_supported_reasons("cpu", device))
    warnings.warn(f"onepass runs its plain torch reference, which is slow and large: {reasons}", stacklevel=4)
