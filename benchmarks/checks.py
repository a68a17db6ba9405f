"""No speed without a passed check: results against float64, on the very input that is timed."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .workloads import Exact


def as_tensors(result: object) -> tuple[Tensor, ...]:
    """One result or several, of torch or of what numpy converts, as tensors on the CPU."""
    parts = result if isinstance(result, (tuple, list)) else (result,)
    return tuple(x.detach().cpu() if isinstance(x, Tensor) else _from_array(x) for x in parts)


def _from_array(array: object) -> Tensor:
    import numpy as np

    return torch.from_numpy(np.array(array))


def wrong(exact: Sequence[Exact], results: Mapping[str, Sequence[Tensor]], dtype: torch.dtype, yardstick: str = "eager") -> dict[str, str]:
    """Providers of which an element is off by more than twice what the yardstick is off at most in that result, plus one rounding, in the
    dtype, of the sum of the magnitudes of that element's terms; and why."""
    problems: dict[str, str] = {}
    for name, got in results.items():
        if len(got) != len(exact):
            problems[name] = f"{len(got)} results, not {len(exact)}"
    for position, (value, size) in enumerate(exact):
        off = {name: _error(got[position], value) for name, got in results.items() if name not in problems}
        allowed = 2 * _largest(off[yardstick])
        for name, error in off.items():
            over = _largest(error - size * torch.finfo(dtype).eps) if error.shape == size.shape else float("inf")
            if not over <= allowed:
                problems[name] = f"output {position}: off by {over:.1e} beyond a rounding, allowed {allowed:.1e}"
    return problems


def _error(got: Tensor, value: Tensor) -> Tensor:
    return (got.double() - value).abs() if got.shape == value.shape else torch.full((), float("inf"))


def _largest(tensor: Tensor) -> float:
    """NaN if there is one; of nothing, 0."""
    return float(tensor.max()) if tensor.numel() else 0.0
