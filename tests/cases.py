"""Calls to test: their inputs, how they are made, and what comes out of them, gradients included."""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import onepass
from onepass import _library

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FAMILIES = ("additive", "multiplicative", "scores")
Results = dict[str, Tensor]


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What the contract computes a dtype in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclasses.dataclass(frozen=True)
class Dims:
    """Sizes of a call; ``heads`` 0 is a call without a head dimension."""

    batch: int = 2
    steps: int = 3
    source: int = 5
    width: int = 8
    value_width: int = 4
    heads: int = 0

    def lead(self) -> tuple[int, ...]:
        return (self.batch, self.heads) if self.heads else (self.batch,)

    def __str__(self) -> str:
        return "x".join(str(size) for size in (*self.lead(), self.steps, self.source, self.width, self.value_width))


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of a family with the gradients that arrive at its outputs."""

    family: str
    query: Tensor
    keys: Tensor
    values: Tensor
    v: Tensor
    lengths: Tensor | None = None
    mask: Tensor | None = None
    spans: Tensor | None = None
    scale: float = 1.0
    grad_context: Any = None  # a tensor, or None where nothing arrives
    grad_weights: Any = None

    def inputs(self) -> dict[str, Tensor]:
        """The differentiable inputs that the family takes."""
        names = {
            "additive": ("query", "keys", "values", "v"),
            "multiplicative": ("query", "keys", "values"),
            "scores": ("query", "keys", "v"),
        }
        return {name: getattr(self, name) for name in names[self.family]}

    def to(self, dtype: torch.dtype) -> "Case":
        tensors = {name: getattr(self, name) for name in ("query", "keys", "values", "v", "grad_context", "grad_weights")}
        return self.replace(**{name: None if tensor is None else tensor.to(dtype) for name, tensor in tensors.items()})

    def replace(self, **changes: Any) -> "Case":
        return dataclasses.replace(self, **changes)

    def steps(self) -> int:
        return self.query.shape[-2]

    def visible(self) -> Tensor:
        """``[B, (H,) T, S]``: which positions each query sees, written out from the contract's words."""
        full = (*self.query.shape[:-1], self.keys.shape[-2])
        visible = torch.ones(full, dtype=torch.bool)
        if self.lengths is not None:
            per_query = self.lengths if self.lengths.dim() == 2 else self.lengths[:, None].expand(full[0], self.steps())
            seen = torch.arange(full[-1]) < per_query[:, :, None]
            visible &= seen[:, None] if len(full) == 4 else seen
        if self.spans is not None:
            spans = self.spans if self.spans.dim() == 3 else self.spans[:, None]
            positions = torch.arange(full[-1])
            seen = (positions >= spans[:, :, :1]) & (positions < spans[:, :, 1:])
            visible &= seen[:, None] if len(full) == 4 else seen
        if self.mask is not None:
            heads_share = len(full) == 4 and self.mask.dim() == 3
            visible &= self.mask[:, None] if heads_share else self.mask
        return visible


def call(case: Case, backend: str, **options: Any) -> tuple[Any, ...]:
    """The family's public function; ``(scores,)`` or ``(context, weights)``, of which weights may be None."""
    common: dict[str, Any] = {"lengths": case.lengths, "mask": case.mask, "spans": case.spans, "backend": backend}
    if case.family == "scores":
        return (onepass.additive_scores(case.query, case.keys, case.v, **common),)
    options.setdefault("need_weights", True)
    if case.family == "additive":
        return onepass.additive_attention(case.query, case.keys, case.values, case.v, **common, **options)
    return onepass.multiplicative_attention(case.query, case.keys, case.values, scale=case.scale, **common, **options)


@contextlib.contextmanager
def by_eager() -> Iterator[None]:
    """``"auto"`` takes the reference on a CPU: what anything built upon the functions would give with torch's eager formula."""
    before, _library.error = _library.error, "a test runs the reference"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        _library.error = before


def outputs_of(case: Case) -> tuple[str, ...]:
    return ("scores",) if case.family == "scores" else ("context", "weights")


def results(case: Case, backend: str) -> Results:
    """Outputs and gradients of a call, by name; gradients of inputs are ``d_query`` and so on."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in case.inputs().items()}
    need_weights = case.grad_weights is not None
    outputs = call(case.replace(**leaves), backend, **({} if case.family == "scores" else {"need_weights": need_weights}))
    named = {name: output for name, output in zip(outputs_of(case), outputs, strict=True) if output is not None}
    arriving = [case.grad_weights] if case.family == "scores" else [case.grad_context, case.grad_weights]
    pairs = [(output, grad) for output, grad in zip(outputs, arriving, strict=True) if grad is not None]
    if pairs:
        grads = torch.autograd.grad([pair[0] for pair in pairs], list(leaves.values()), [pair[1] for pair in pairs], allow_unused=True)
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
            named[f"d_{name}"] = torch.zeros_like(leaf) if grad is None else grad
    return {name: tensor.detach() for name, tensor in named.items()}


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def _pairs(query: Tensor, keys: Tensor, size: float) -> None:
    query += size
    keys -= size


def _one_channel(query: Tensor, keys: Tensor, size: float) -> None:
    query[..., :1] += size
    keys[..., :1] -= size


def _scaled(*tensors: Tensor, by: float) -> None:
    for tensor in tensors:
        tensor *= by


def _per_channel(query: Tensor, keys: Tensor) -> None:
    powers = torch.logspace(-3, 3, query.shape[-1], dtype=query.dtype)
    query *= powers
    keys *= powers.flip(0)


RANGES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], None]] = {
    "normal": lambda q, k, u, v: None,
    "zero": lambda q, k, u, v: _scaled(q, k, by=0.0),
    "small": lambda q, k, u, v: _scaled(q, k, by=1e-3),
    "tiny": lambda q, k, u, v: _scaled(q, k, by=1e-30),
    "wide": lambda q, k, u, v: _scaled(q, k, by=4.0),
    "saturated": lambda q, k, u, v: _scaled(q, k, by=100.0),
    "huge": lambda q, k, u, v: _scaled(q, k, by=1e30),
    "huge query": lambda q, k, u, v: _scaled(q, by=1e30),
    "cancelling 11": lambda q, k, u, v: _pairs(q, k, 11.0),
    "cancelling 22": lambda q, k, u, v: _pairs(q, k, 22.0),
    "cancelling 40": lambda q, k, u, v: _pairs(q, k, 40.0),
    "cancelling 60": lambda q, k, u, v: _pairs(q, k, 60.0),
    "cancelling -60": lambda q, k, u, v: _pairs(q, k, -60.0),
    "one channel cancelling": lambda q, k, u, v: _one_channel(q, k, 60.0),
    "one channel cancelling 5000": lambda q, k, u, v: _one_channel(q, k, 5000.0),
    "mixed channels": lambda q, k, u, v: _per_channel(q, k),
    "huge values": lambda q, k, u, v: _scaled(u, by=1e30),
    "tiny values": lambda q, k, u, v: _scaled(u, by=1e-30),
    "large v": lambda q, k, u, v: _scaled(v, by=100.0),
    "huge v": lambda q, k, u, v: _scaled(v, by=1e30),
    "zero v": lambda q, k, u, v: _scaled(v, by=0.0),
}

MASKS = (
    "none",
    "lengths",
    "int32 lengths",
    "lengths per query",
    "padding",
    "holes",
    "all",
    "nothing",
    "one row hidden",
    "both",
    "shared",
    "spans",
    "moving spans",
    "int32 spans",
    "one span",
    "all three",
)


def hide(kind: str, dims: Dims, generator: torch.Generator) -> dict[str, Tensor]:
    """``lengths``, ``mask`` and ``spans`` of a kind."""
    batch, steps, source = dims.batch, dims.steps, dims.source

    def drawn(*shape: int) -> Tensor:
        lengths = torch.randint(0, source + 1, shape, generator=generator)
        if lengths.numel() > 1:
            lengths.view(-1)[0], lengths.view(-1)[-1] = source, 0
        return lengths

    def holes(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator) < 0.6

    if kind == "none":
        return {}
    if kind == "lengths":
        return {"lengths": drawn(batch)}
    if kind == "int32 lengths":
        return {"lengths": drawn(batch).int()}
    if kind == "lengths per query":
        return {"lengths": drawn(batch, steps)}
    if kind == "padding":
        return {"mask": (torch.arange(source) < drawn(batch)[:, None])[:, None, :]}
    if kind == "holes":
        return {"mask": holes(*dims.lead(), steps, source)}
    if kind == "all":
        return {"mask": torch.ones(batch, 1, source, dtype=torch.bool)}
    if kind == "nothing":
        return {"mask": torch.zeros(1, 1, 1, dtype=torch.bool)}
    if kind == "one row hidden":
        mask = torch.ones(batch, steps, source, dtype=torch.bool)
        mask[:1, :1] = False
        return {"mask": mask}
    if kind == "both":
        return {"lengths": drawn(batch), "mask": holes(batch, steps, source)}
    if kind == "shared":
        return {"mask": holes(1, steps, source)}
    if kind in ("spans", "int32 spans"):  # anywhere, of any width, empty and turned round too
        spans = torch.randint(0, source + 1, (batch, steps, 2), generator=generator)
        return {"spans": spans.int() if kind == "int32 spans" else spans}
    if kind == "moving spans":  # Luong's monotonic windows
        first = (torch.arange(steps) * max(source - 2, 1) // max(steps, 1)).expand(batch, steps)
        return {"spans": torch.stack([first, first + 3], -1).clamp(max=source)}
    if kind == "one span":
        return {"spans": torch.tensor([source // 3, source - source // 4]).expand(batch, steps, 2)}
    if kind == "all three":
        first = drawn(batch, steps) // 2
        return {"lengths": drawn(batch, steps), "mask": holes(batch, steps, source), "spans": torch.stack([first, first + source // 2], -1)}
    raise ValueError(kind)


def build(
    family: str,
    dims: Dims | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    hidden: str = "none",
    span: str = "normal",
    seed: int = 0,
) -> Case:
    """A case of normal numbers, changed as ``span`` (a key of ``RANGES``) says; scores are of the order of one."""
    dims = dims or Dims()
    generator = torch.Generator().manual_seed(seed)
    query = _normal(generator, *dims.lead(), dims.steps, dims.width)
    keys = _normal(generator, *dims.lead(), dims.source, dims.width)
    values = _normal(generator, *dims.lead(), dims.source, dims.value_width)
    v = _normal(generator, *dims.lead()[1:], dims.width) / max(dims.width, 1) ** 0.5
    RANGES[span](query, keys, values, v)
    limit = torch.finfo(dtype).max / 4
    query, keys, values, v = (tensor.clamp(-limit, limit) for tensor in (query, keys, values, v))
    shown = hide(hidden, dims, generator)
    grad_context = _normal(generator, *dims.lead(), dims.steps, dims.value_width)
    grad_weights = _normal(generator, *dims.lead(), dims.steps, dims.source)
    case = Case(family, query, keys, values, v, grad_context=grad_context, grad_weights=grad_weights)
    return case.replace(**shown, scale=max(dims.width, 1) ** -0.5).to(dtype)


def garbage(case: Case, bad: float) -> Case:
    """The case with ``bad`` in every key and value that no query sees."""
    unseen = ~case.visible().any(-2)[..., None]
    bad = max(-torch.finfo(case.keys.dtype).max, min(torch.finfo(case.keys.dtype).max, bad)) if abs(bad) < float("inf") else bad
    return case.replace(keys=case.keys.masked_fill(unseen, bad), values=case.values.masked_fill(unseen, bad))


def bits(tensor: Tensor) -> Tensor:
    """A tensor's bit patterns, so that NaN equals itself and -0 differs from 0."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def assert_same_bits(got: Results, expected: Results) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        differing = int((bits(got[name]) != bits(tensor)).sum())
        assert differing == 0, f"{name}: {differing} of {tensor.numel()} elements differ in a bit"
