"""Cases on a GPU."""

import dataclasses

import pytest
import torch
from cases import Case, Results, results
from torch import Tensor

from onepass._backends import not_supported_reasons

HERE = torch.device("cuda", 0)
BACKENDS = ("triton", "cuda")


def moved(case: Case) -> Case:
    """The case, on the GPU."""
    fields = {field.name: getattr(case, field.name) for field in dataclasses.fields(case)}
    return case.replace(**{name: value.to(HERE) for name, value in fields.items() if isinstance(value, Tensor)})


def there(found: Results) -> Results:
    """Results on the host; each of them was on the GPU."""
    assert {tensor.device for tensor in found.values()} <= {HERE}
    return {name: tensor.cpu() for name, tensor in found.items()}


def reasons_against(backend: str, family: str, steps: int) -> list[str]:
    """Why a backend does not serve calls of a family of cases."""
    return not_supported_reasons(backend, HERE, "multiplicative" if family == "multiplicative" else "additive", steps)


def found(case: Case, backend: str) -> Results:
    """Of a call on the GPU; a skip with the reasons why the backend does not serve it."""
    if reasons := reasons_against(backend, case.family, case.steps()):
        pytest.skip("; ".join(reasons))
    return there(results(moved(case), backend))
