"""Who computes the families: each provider a few lines, registered with what it needs and serves.

``prepare`` makes a ``Run`` from a workload and a direction: its results are those of the family's ``expected``, in that order. What it
does before it returns is not timed. It raises ``UnavailableError`` for a reason that only trying can find.
"""

import importlib
import importlib.util
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import onepass
from onepass import _backends

from .workloads import BOTH, Run, Workload

Prepare = Callable[[Workload, str], Run]
Formula = Callable[..., Tensor]
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
EAGER = "eager"  # the yardstick of errors, and of speed: every family has it


class UnavailableError(Exception):
    """Why a provider cannot serve a workload."""


@dataclass(frozen=True)
class Provider:
    name: str
    families: frozenset[str]
    prepare: Prepare
    needs: dict[str, str] = field(default_factory=dict)  # modules to import, and what to install for each
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: Collection[torch.dtype] = FLOATS
    compiles: bool = False  # on its first call
    optional: bool = False  # measured only where asked for by its name
    keeps: torch.dtype | None = None  # what it rounds its inputs to, if to less than their own dtype
    more_reasons: Callable[[Workload], list[str]] = lambda workload: []

    def not_supported_reasons(self, workload: Workload) -> list[str]:
        """Why it cannot serve the workload; empty if it can. Nothing is imported to find out."""
        reasons = [] if workload.family in self.families else [f"it has no {workload.family}"]
        reasons += [f"{module} is not installed ({fix})" for module, fix in self.needs.items() if not _installed(module)]
        if workload.device not in self.devices:
            reasons.append(f"it serves {', '.join(self.devices)} here, not {workload.device}")
        if workload.dtype not in self.dtypes:
            reasons.append(f"it serves {', '.join(map(_plain, self.dtypes))} here, not {_plain(workload.dtype)}")
        return reasons or self.more_reasons(workload)


PROVIDERS: list[Provider] = []


def provider(name: str, families: Collection[str], **more: Any) -> Callable[[Prepare], Prepare]:
    """Registers ``prepare`` under the name, for these families; a name may be registered again for others."""

    def add(prepare: Prepare) -> Prepare:
        assert not any(name == other.name and other.families & set(families) for other in PROVIDERS), f"{name!r} is there already"
        PROVIDERS.append(Provider(name, frozenset(families), prepare, **more))
        return prepare

    return add


def providers(workload: Workload) -> tuple[dict[str, Provider], dict[str, str]]:
    """Those of the workload's family, and why others of them cannot serve it. Those of onepass come first, then ``eager``."""
    of_family = [found for found in PROVIDERS if workload.family in found.families]
    ordered = sorted(of_family, key=lambda found: (not mine(found.name), found.name != EAGER))
    missing = {found.name: "; ".join(reasons) for found in ordered if (reasons := found.not_supported_reasons(workload))}
    return {found.name: found for found in ordered if found.name not in missing}, missing


def named(asked: Collection[str] | None, compiling: bool = True) -> set[str]:
    """Names of providers; ``onepass`` is all of its backends, None all that are not optional, of those perhaps without what compiles."""
    if asked is None:
        return {found.name for found in PROVIDERS if not found.optional and (compiling or not found.compiles)}
    known = {found.name for found in PROVIDERS}
    names = {name for name in known if name in asked or ("onepass" in asked and mine(name))}
    if strange := set(asked) - known - {"onepass"}:
        raise ValueError(f"no provider {', '.join(sorted(strange))}; there are onepass, {', '.join(sorted(known))}")
    return names


REFERENCE = "onepass reference"  # which is as eager


def mine(name: str) -> bool:
    return name.split()[0] == "onepass"


def variant(name: str) -> bool:
    """Whether it does other work than those without a comma in their names: over copies, in fewer bits, or by another formula."""
    return "," in name


def differentiated(function: Formula, workload: Workload, direction: str) -> Run:
    """A function of the workload's inputs: without gradients, or the gradients of all inputs."""
    inputs, upstream = workload.inputs, workload.tensors["upstream"]
    if direction == BOTH:
        return lambda: torch.autograd.grad(function(*inputs), inputs, upstream)
    fixed = [x.detach() for x in inputs]

    def forward() -> object:
        with torch.no_grad():
            return function(*fixed)

    return forward


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent of it
        return False


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


FUNCTIONS: dict[str, Formula] = {
    "additive": lambda *inputs, backend: onepass.additive_attention(*inputs, backend=backend)[0],
    "multiplicative": lambda *inputs, backend: onepass.multiplicative_attention(*inputs, backend=backend)[0],
    "scores": onepass.additive_scores,
}


def eager_scores(query: Tensor, keys: Tensor, v: Tensor) -> Tensor:
    return torch.tanh(query.unsqueeze(2) + keys.unsqueeze(1)) @ v


def eager_additive(query: Tensor, keys: Tensor, values: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(eager_scores(query, keys, v), -1) @ values


def eager_multiplicative(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return torch.softmax(query @ keys.transpose(1, 2), -1) @ values


def identity_scores(query: Tensor, keys: Tensor, v: Tensor) -> Tensor:
    """The same by onepass's identity, in plain torch: wrong where an exponential overflows or ``1 - 2r`` cancels."""
    x = torch.exp(2 * query).unsqueeze(2) * torch.exp(2 * keys).unsqueeze(1)
    return v.sum() - 2 * (v / (1 + x)).sum(-1)


def identity_additive(query: Tensor, keys: Tensor, values: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(identity_scores(query, keys, v), -1) @ values


def fused_multiplicative(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """SDPA with a dimension of heads: without one torch takes its formula in the place of a fused kernel."""
    heads = query.unsqueeze(1), keys.unsqueeze(1), values.unsqueeze(1)
    return torch.nn.functional.scaled_dot_product_attention(*heads, scale=1.0).squeeze(1)


FORMULAE: dict[str, Formula] = {"additive": eager_additive, "multiplicative": eager_multiplicative, "scores": eager_scores}
IDENTITY: dict[str, Formula] = {"additive": identity_additive, "scores": identity_scores}


def _backend(name: str) -> None:
    def reasons(workload: Workload) -> list[str]:
        family = "multiplicative" if workload.family == "multiplicative" else "additive"
        return _backends.not_supported_reasons(name, torch.device(workload.device), family, workload.shape.T)

    @provider(f"onepass {name}", FUNCTIONS, optional=f"onepass {name}" == REFERENCE, more_reasons=reasons)
    def prepare(workload: Workload, direction: str) -> Run:
        function = FUNCTIONS[workload.family]
        return differentiated(lambda *inputs: function(*inputs, backend=name), workload, direction)


for backend in _backends.NAMES:
    _backend(backend)


@provider(EAGER, FORMULAE)
def eager(workload: Workload, direction: str) -> Run:
    return differentiated(FORMULAE[workload.family], workload, direction)


@provider("torch.compile", FORMULAE, compiles=True)
def compiled(workload: Workload, direction: str) -> Run:
    return differentiated(torch.compile(FORMULAE[workload.family], dynamic=False), workload, direction)


@provider("torch.compile, identity", IDENTITY, compiles=True)
def compiled_identity(workload: Workload, direction: str) -> Run:
    return differentiated(torch.compile(IDENTITY[workload.family], dynamic=False), workload, direction)


@provider("SDPA", {"multiplicative"})
def sdpa(workload: Workload, direction: str) -> Run:
    return differentiated(fused_multiplicative, workload, direction)


@provider("FlexAttention", {"multiplicative"}, compiles=True)
def flex(workload: Workload, direction: str) -> Run:
    if workload.device == "cpu" and direction == BOTH:
        raise UnavailableError("it has no backward on a CPU")
    attention: Formula = torch.compile(importlib.import_module("torch.nn.attention.flex_attention").flex_attention, dynamic=False)
    return differentiated(lambda *inputs: attention(*(x.unsqueeze(1) for x in inputs), scale=1.0).squeeze(1), workload, direction)


JAX: dict[str, Any] = {"needs": {"jax": "pip install jax"}, "devices": ("cpu",), "dtypes": (torch.float32,), "compiles": True}


def jax_function(family: str, identity: bool = False) -> Callable[..., Any]:
    jax = importlib.import_module("jax")
    jnp = jax.numpy

    def function(query: Any, keys: Any, *rest: Any) -> Any:
        if family == "multiplicative":
            scores = query @ keys.transpose(0, 2, 1)
        elif identity:
            x = jnp.exp(2 * query)[:, :, None] * jnp.exp(2 * keys)[:, None]
            scores = rest[-1].sum() - 2 * (rest[-1] / (1 + x)).sum(-1)
        else:
            scores = jnp.tanh(query[:, :, None] + keys[:, None]) @ rest[-1]
        return scores if family == "scores" else jax.nn.softmax(scores, -1) @ rest[0]

    return function


def in_jax(function: Callable[..., Any], workload: Workload, direction: str) -> Run:
    jax = importlib.import_module("jax")
    arrays = [jax.numpy.asarray(tensor.detach().numpy()) for tensor in workload.inputs]
    upstream = jax.numpy.asarray(workload.tensors["upstream"].numpy())
    run = jax.jit((lambda *a: jax.vjp(function, *a)[1](upstream)) if direction == BOTH else function)
    return lambda: jax.block_until_ready(run(*arrays))


@provider("jax.jit", FORMULAE, **JAX)
def jax_jit(workload: Workload, direction: str) -> Run:
    return in_jax(jax_function(workload.family), workload, direction)


@provider("jax.jit, identity", IDENTITY, **JAX)
def jax_identity(workload: Workload, direction: str) -> Run:
    return in_jax(jax_function(workload.family, identity=True), workload, direction)
