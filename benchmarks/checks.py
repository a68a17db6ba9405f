"""No speed without a passed check: results against float64, on the very input that is timed."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .workloads import FAMILIES, Exact, Workload

Standard = tuple[Sequence[Exact], float]  # the results, and of the sum of the magnitudes of its terms what one may be off by


def standard_apart(workload: Workload, keeps: torch.dtype, direction: str) -> Standard:
    """Of a provider that keeps inputs in fewer bits: the exact results of what it keeps."""
    family = FAMILIES[workload.family]
    kept, rounding = family.as_kept(workload, keeps)
    return family.expected(kept)[direction], rounding


def as_tensors(result: object) -> tuple[Tensor, ...]:
    """One result or several, of torch or of what numpy converts, as tensors on the CPU."""
    parts = result if isinstance(result, (tuple, list)) else (result,)
    return tuple(x.detach().cpu() if isinstance(x, Tensor) else _from_array(x) for x in parts)


def _from_array(array: object) -> Tensor:
    import numpy as np

    return torch.from_numpy(np.array(array))


def wrong(
    exact: Sequence[Exact],
    results: Mapping[str, Sequence[Tensor]],
    dtype: torch.dtype,
    apart: Mapping[str, Standard] | None = None,
    yardstick: str = "eager",
) -> dict[str, str]:
    """Providers of which an element is off by more than twice what the yardstick is off at most in that result, plus one rounding, in the
    dtype, of the sum of the magnitudes of that element's terms; and why. Some may have a standard of their own, ``apart``."""
    standards = {name: (apart or {}).get(name, (exact, torch.finfo(dtype).eps)) for name in results}
    problems: dict[str, str] = {}
    for name, got in results.items():
        if len(got) != len(exact):
            problems[name] = f"{len(got)} results, not {len(exact)}"
    for position in range(len(exact)):
        allowed = 2 * _largest(_error(results[yardstick][position], exact[position].value))
        for name in [name for name in results if name not in problems]:
            own, rounding = standards[name]
            value, size = own[position]
            error = _error(results[name][position], value)
            over = _largest(error - size * rounding) if error.shape == size.shape else float("inf")
            if not over <= allowed:
                problems[name] = f"output {position}: off by {over:.1e} beyond a rounding, allowed {allowed:.1e}"
    return problems


def _error(got: Tensor, value: Tensor) -> Tensor:
    return (got.double() - value).abs() if got.shape == value.shape else torch.full((), float("inf"))


def _largest(tensor: Tensor) -> float:
    """NaN if there is one; of nothing, 0."""
    return float(tensor.max()) if tensor.numel() else 0.0
