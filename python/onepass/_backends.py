"""Which backends there are, why one cannot serve a call, and which one ``"auto"`` takes."""

import bisect
import functools
import math
import sys
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
JETSON = 87  # runs no code of the others of its generation, nor they its
FEW = 16  # queries over one source: what the CUDA kernels of steps serve, of both families
STEPS = (1, 4, 8, FEW)  # numbers of queries up to which they need the same room


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
        built = ", ".join(map(shown, _library.cuda_archs))
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
    if not _finds_streams():
        reasons.append(f"it finds no CUDA streams in torch {torch.__version__}")
    if family == "multiplicative" and queries > FEW:
        reasons.append(f"it has kernels of multiplicative attention for up to {FEW} queries, not for {queries}")
    return reasons


def serves(archs: tuple[str, ...], capability: int) -> bool:
    """Whether code built for the architectures runs: that of the same generation which is no newer, or the newest one's PTX. Code for one
    of a kind ("90a", or 8.7, which is Jetson's) runs on that one alone, and has no PTX, nor has that for a family ("100f")."""

    def runs(number: int, kind: str) -> bool:
        alone = kind == "a" or JETSON in (number, capability)
        return number == capability if alone else number // 10 == capability // 10 and number <= capability

    built = [_parsed(arch) for arch in archs]
    newest = max([number for number, kind in built if not kind], default=capability + 1)
    return newest <= capability or any(runs(number, kind) for number, kind in built)


def shown(arch: str) -> str:
    """As NVIDIA writes it: 9.0a for 90a."""
    number, kind = _parsed(arch)
    return f"{number // 10}.{number % 10}{kind}"


def _parsed(arch: str) -> tuple[int, str]:
    number = arch.rstrip("af")
    return int(number), arch[len(number) :]


def _asked_once(question: Answer) -> Answer:
    """The answer is kept, and a constant of compiled graphs, which know no caches."""
    kept = functools.cache(question)

    @functools.wraps(question)
    def answer(*arguments: Any) -> Any:
        return kept(*arguments)

    # What torch.compiler.assume_constant_result does; calling that would import the compiler, which takes longer than torch itself.
    answer._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return answer  # type: ignore[return-value]


@_asked_once
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@_asked_once
def _cuda_versions() -> tuple[int, int]:
    """The CUDA runtime that the kernels were built with, and the one that the driver serves: 13000 for 13.0."""
    runtime, driver = torch.ops.onepass_cuda.versions()
    return runtime, driver


@_asked_once
def _finds_streams() -> bool:
    return bool(torch.ops.onepass_cuda.finds_streams())


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
    if backend == "auto" and query.device.type == "cpu" and _library.error is None:
        return "cpu"
    queries = query.shape[-2]
    if backend == "auto":
        served = [name for name in ("cpu", "cuda", "triton") if not not_supported_reasons(name, query.device, family, queries)]
        if served == ["cuda", "triton"]:
            return faster(query, keys, values, family == "additive", kept)
        if served:
            return served[0]
        if not torch.compiler.is_compiling() and not query.is_meta:
            _say_once(query.device)
        return "reference"
    if backend not in NAMES:
        raise ValueError(f"backend must be one of {('auto', *NAMES)}; got {backend!r}")
    reasons = not_supported_reasons(backend, query.device, family, queries)
    if reasons:
        raise RuntimeError(f"backend {backend!r} cannot serve this call: {'; '.join(reasons)}")
    return backend


def faster(query: Tensor, keys: Tensor, values: Tensor | None, additive: bool, kept: torch.dtype | None) -> str:
    """``"cuda"`` or ``"triton"``, by the time that each's launch is predicted to take. A graph may be for any sizes but widths: there it is
    ``"cuda"`` wherever that has kernels for them, of any number of queries, but for scores, of which few take much longer in CUDA."""
    A, D = query.shape[-1], 0 if values is None else values.shape[-1]
    if torch.compiler.is_compiling():
        anyhow = has_kernels(A, query.dtype) if additive else most_queries(False, A, D, query.dtype, kept)[0] == FEW
        return "cuda" if anyhow and values is not None else "triton"
    H = query.shape[1] if query.dim() == 4 else 1
    sizes = query.shape[0], H, query.shape[-2], keys.shape[-2], A, D
    return _faster(tuple(map(int, sizes)), values is None, additive, query.dtype, kept, query.device)


@functools.lru_cache(4096)
def _faster(
    sizes: tuple[int, ...], scores: bool, additive: bool, dtype: torch.dtype, kept: torch.dtype | None, device: torch.device
) -> str:
    from onepass.kernels.parts import device_of  # there, since Triton serves the call
    from onepass.kernels.tiles import attend_seconds

    gpu = device_of(device)
    launches = _launches(op_of(additive, scores, sizes[2]), sizes, dtype, kept, gpu.processors, gpu.capability)
    seconds = sum(launch["seconds"] for launch in launches) if launches else math.inf
    return "cuda" if seconds <= attend_seconds(*sizes, dtype, additive, gpu) else "triton"


def op_of(additive: bool, scores: bool, queries: int) -> str:
    """Whose launches a call in CUDA is: the step's up to FEW queries, but for scores alone."""
    if additive and (scores or queries > FEW):
        return "additive_forward"
    return f"{'additive' if additive else 'multiplicative'}_step_forward"


def _launches(
    op: str, sizes: tuple[int, ...], dtype: torch.dtype, kept: torch.dtype | None, processors: int = 1, capability: int = 80
) -> list[dict[str, Any]]:
    from onepass._probe import cuda_launches  # there, since the CUDA kernels are

    number = DTYPES.index(dtype)
    return cuda_launches(op, list(sizes), number, processors, capability, kept=number if kept is None else DTYPES.index(kept))


def most_queries(additive: bool, A: int, D: int, dtype: torch.dtype, kept: torch.dtype | None) -> tuple[int, int]:
    """How many queries at a time a memory may be asked in CUDA, at most, forward and backward. A step's forward needs room for rows of A,
    its backward for rows of D; but additive attention of alike dtypes has a forward of any number."""
    family = "additive" if additive else "multiplicative"
    keys, values = (widest(f"{family}_step_{direction}", dtype, kept) for direction in ("forward", "backward"))
    forward = max([0, *(T for T, most in zip(STEPS, keys, strict=True) if most >= A)])
    backward = max([0, *(T for T, most in zip(STEPS, values, strict=True) if most >= D)])
    if additive:
        return sys.maxsize if kept is None and has_kernels(A, dtype) else forward, backward
    return min(forward, backward), min(forward, backward)  # of one backend, where each step has all its gradients


def has_kernels(A: int, dtype: torch.dtype) -> bool:
    """Whether CUDA has additive attention of any number of queries."""
    return bool(widest("additive_forward", dtype, None)[-1] >= A)


@_asked_once
def widest(op: str, dtype: torch.dtype, kept: torch.dtype | None) -> tuple[int, ...]:
    """The widest rows that the CUDA kernels of an op take, for each of STEPS."""

    def least_too_wide(T: int) -> int:
        return bisect.bisect(range(1 << 16), 0, key=lambda width: not _launches(op, (1, 1, T, 1, width, width), dtype, kept))

    return tuple(least_too_wide(T) - 1 for T in STEPS)


@functools.cache
def _say_once(device: torch.device) -> None:
    reasons = "; ".join(not_supported_reasons("triton" if device.type == "cuda" else "cpu", device))
    warnings.warn(f"onepass runs its plain torch reference, which is slow and large: {reasons}", stacklevel=4)
