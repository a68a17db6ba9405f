"""How a profiler names a call: ``onepass::additive_forward [B 32, T 32, S 48, A 512, D 1024] float32 cpu``.

The C++ ops name themselves (csrc/ops/named.h); ops in Python are named here, and names of both are read here.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_NAME = re.compile(r"onepass::(?P<op>\w+) \[(?P<sizes>[^]]*)\] (?P<dtype>\w+)(?: over (?P<kept>\w+))? (?P<device>\w+)")


@dataclass(frozen=True)
class Call:
    """An op and its sizes; 0 for one that it lacks. ``kept``: the dtype of the memory. ``pairs``: how many ``(b, h, t, s)`` are visible,
    None where that cannot be known without waiting for a GPU."""

    op: str
    B: int
    H: int
    T: int
    S: int
    A: int
    D: int
    dtype: str
    kept: str
    device: str
    pairs: int | None

    @classmethod
    def read(cls, name: str) -> "Call | None":
        """The call of that name; None if it is another's."""
        found = _NAME.fullmatch(name)
        if found is None:
            return None
        given = dict(part.split(" ") for part in found["sizes"].split(", "))
        B, H, T, S, A, D = (int(given.get(size, size == "H")) for size in "BHTSAD")
        pairs = B * H * T * S if "pairs" not in given else None if given["pairs"] == "?" else int(given["pairs"])
        return cls(found["op"], B, H, T, S, A, D, found["dtype"], found["kept"] or found["dtype"], found["device"], pairs)

    @property
    def sizes(self) -> str:
        sizes = {"B": self.B, "H": 0 if self.H == 1 else self.H, "T": self.T, "S": self.S, "A": self.A, "D": self.D}
        parts = [f"{size} {n}" for size, n in sizes.items() if n or size == "B"]
        if self.pairs != self.B * self.H * self.T * self.S:
            parts.append(f"pairs {'?' if self.pairs is None else self.pairs}")
        return ", ".join(parts)

    def __str__(self) -> str:
        dtype = self.dtype if self.kept == self.dtype else f"{self.dtype} over {self.kept}"
        return f"onepass::{self.op} [{self.sizes}] {dtype} {self.device}"


def call_of(op: str, arguments: Sequence[Any]) -> Call:
    """The call that a Triton op gets; with lengths or a mask its pairs are not known."""
    schema = getattr(torch.ops.onepass, op).default._schema
    given = {argument.name: value for argument, value in zip(schema.arguments, arguments, strict=True)}
    if "steps" in given:
        step: Tensor = given["steps"][0]
        *lead, W = step.shape[:-2] + step.shape[-1:] if given["several"] else step.shape
        T = sum(step.shape[-2] if given["several"] else 1 for step in given["steps"])
        return Call(op, lead[0], lead[1] if len(lead) > 1 else 1, T, 0, 0, W, *_dtypes(step, step), step.device.type, 0)
    keys, values = given.get("keys"), given.get("values")

    def first(*names: str) -> Tensor:
        found: Tensor = next(given[name] for name in names if given.get(name) is not None)
        return found

    query, source = first("query", "rows", "grad_context", "weights"), first("keys", "values", "rows")
    A, D = (0 if tensor is None else tensor.shape[-1] for tensor in (keys, given.get("rows", values)))
    S = given["weights"].shape[-1] if "rows" in given else source.shape[-2]
    B, H = source.shape[0], source.shape[1] if source.dim() == 4 else 1
    T = query.shape[-2] if query.dim() == source.dim() else 1
    hidden = given["lengths"] is not None or given["mask"] is not None
    kept = source if values is None else values
    return Call(op, B, H, T, S, A, D, *_dtypes(query, kept), source.device.type, None if hidden else B * H * T * S)


def _dtypes(query: Tensor, kept: Tensor) -> tuple[str, str]:
    return str(query.dtype).removeprefix("torch."), str(kept.dtype).removeprefix("torch.")
