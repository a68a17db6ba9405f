"""Attention memories to test: how one is made of a case, what comes out of it, and decoders that train through it."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from cases import Case, Dims, Results, build, call
from tolerance import bounds
from torch import Tensor, nn

import onepass
from onepass import reference

FAMILIES = ("additive", "multiplicative")
HIDDEN = ("none", "lengths", "padding", "holes", "both", "nothing", "per head")
Attend = Callable[..., tuple[Any, Any]]
Program = Callable[[Attend, Tensor], Tensor]
Layer = Callable[..., nn.Module]
QUERY_DIM, KEY_DIM = 6, 8
each_family = pytest.mark.parametrize("family", FAMILIES)
each_heads = pytest.mark.parametrize("heads", [0, 2])
by_step_or_at_once = pytest.mark.parametrize("by_step", [True, False], ids=["by step", "at once"])

LAYERS: dict[str, Layer] = {
    "additive": lambda **options: onepass.AdditiveAttention(QUERY_DIM, KEY_DIM, 10, **options),
    "normalized": lambda **options: onepass.AdditiveAttention(QUERY_DIM, KEY_DIM, 10, normalize=True, **options),
    "without bias": lambda **options: onepass.AdditiveAttention(QUERY_DIM, KEY_DIM, 10, bias=False, **options),
    "general": lambda **options: onepass.MultiplicativeAttention(QUERY_DIM, KEY_DIM, "general", bias=True, **options),
    "dot": lambda **options: onepass.MultiplicativeAttention(KEY_DIM, KEY_DIM, **options),
    "scaled dot": lambda **options: onepass.MultiplicativeAttention(KEY_DIM, KEY_DIM, "scaled_dot", **options),
}
each_layer = pytest.mark.parametrize("kind", LAYERS)


def build_for_memory(
    family: str,
    dims: Dims | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    hidden: str = "none",
    span: str = "normal",
    seed: int = 0,
) -> Case:
    """A case whose positions are hidden alike from all queries: lengths from 0 to S, masks with holes and with rows of nothing."""
    dims = dims or Dims()
    case = build(family, dims, dtype, span=span, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    lengths = torch.randint(0, dims.source + 1, (dims.batch,), generator=generator)
    if dims.batch > 1:
        lengths[0], lengths[-1] = dims.source, 0
    holes = torch.rand(*dims.lead()[: 2 if hidden == "per head" else 1], 1, dims.source, generator=generator) < 0.6
    holes[1:2] = False  # one row sees nothing
    if hidden in ("lengths", "both"):
        case = case.replace(lengths=lengths)
    if hidden in ("holes", "both", "per head"):
        case = case.replace(mask=holes)
    if hidden == "padding":
        case = case.replace(mask=(torch.arange(dims.source) < lengths[:, None])[:, None])
    if hidden == "nothing":
        case = case.replace(mask=torch.zeros(dims.batch, 1, dims.source, dtype=torch.bool))
    return case


def remember(case: Case, backend: str, **options: Any) -> "onepass.AttentionMemory":
    """The case's memory."""
    options = {"lengths": case.lengths, "mask": case.mask, "backend": backend, **options}
    if case.family == "additive":
        return onepass.additive_memory(case.keys, case.values, case.v, **options)
    return onepass.multiplicative_memory(case.keys, case.values, **{"scale": case.scale, **options})


def functions(case: Case, backend: str) -> Attend:
    """What ``AttentionMemory.attend`` promises to equal: the function, called anew for every step."""

    def attend(query: Tensor, need_weights: bool = False) -> tuple[Any, ...]:
        return call(case.replace(query=query), backend, need_weights=need_weights)

    return attend


def attended(case: Case, backend: str, by_step: bool, **options: Any) -> Results:
    """Outputs and gradients of all of the case's queries, attended at once or one by one."""
    leaves = with_leaves(case)
    memory = remember(leaves, backend, **options)
    if by_step:
        steps = [memory.attend(query, need_weights=True) for query in leaves.query.unbind(-2)]
        context, weights = (torch.stack(parts, -2) for parts in zip(*steps, strict=True))
    else:
        context, weights = memory.attend(leaves.query, need_weights=True)
    inputs = leaves.inputs()
    grads = torch.autograd.grad([context, weights], list(inputs.values()), [case.grad_context, case.grad_weights], allow_unused=True)
    found = {"context": context.detach(), "weights": weights.detach()}
    for (name, leaf), grad in zip(inputs.items(), grads, strict=True):
        found[f"d_{name}"] = torch.zeros_like(leaf) if grad is None else grad
    return found


def with_masks(case: Case, per_head: bool = False, seed: int = 3) -> tuple[Case, Tensor]:
    """The case whose queries see what the memory's mask and one of their own show, and the latter; one query sees nothing, and nobody the
    second position."""
    sizes = (*case.query.shape[:-1], case.keys.shape[-2])
    if case.query.dim() == 4 and not per_head:
        sizes = sizes[:1] + sizes[2:]
    own = torch.rand(sizes, generator=torch.Generator().manual_seed(seed)) < 0.7
    own[0, ..., -1, :] = False
    own[..., 1] = False
    wide = own.unsqueeze(1) if case.query.dim() == 4 and not per_head else own
    memory = case.mask
    if memory is not None and case.query.dim() == 4 and memory.dim() == 3:
        memory = memory.unsqueeze(1)
    return case.replace(mask=wide if memory is None else wide & memory), own


def masked_over_memory(memory: "onepass.AttentionMemory", leaves: Case, masks: Tensor, by_step: bool) -> Results:
    """Outputs and gradients of the case's queries, each with its mask."""
    if by_step:
        pairs = zip(leaves.query.unbind(-2), masks.unbind(-2), strict=True)
        one = [memory.attend(query, True, mask=mask.unsqueeze(-2) if mask.dim() == 3 else mask) for query, mask in pairs]
        context, weights = (torch.stack(parts, -2) for parts in zip(*one, strict=True))
    else:
        context, weights = memory.attend(leaves.query, True, mask=masks)
    found = {"context": context.detach(), "weights": weights.detach()}
    torch.autograd.backward([context, weights], [leaves.grad_context, leaves.grad_weights])
    return {**found, **{f"d_{name}": grad for name, grad in gradients(leaves).items()}}


def as_stored(case: Case, backend: str) -> Case:
    """The case whose keys and values are those that a bfloat16 memory holds: additive keys on a CPU through their rounded exponentials."""
    values = case.values.bfloat16().float()
    if case.family == "additive" and backend == "reference":
        return case.replace(values=values)
    if case.family == "multiplicative" or backend in ("triton", "cuda"):
        return case.replace(keys=case.keys.bfloat16().float(), values=values)
    return case.replace(keys=((2 * case.keys).exp().bfloat16().double().log() / 2).float(), values=values)


def final_gradients(case: Case, backend: str) -> dict[str, Tensor]:
    """Additive gradients of keys and v in fp64: of the scores as stored, then through the keys as they were given."""
    stored, wide = as_stored(case, backend).to(torch.float64), with_leaves(case.to(torch.float64))
    scores = reference.additive_scores(stored.query, stored.keys, stored.v).requires_grad_()
    results = reference.attend(scores, stored.values, stored.visible(), need_weights=True)
    (grad_scores,) = torch.autograd.grad(results, scores, [stored.grad_context, stored.grad_weights])
    grads = torch.autograd.grad(reference.additive_scores(wide.query, wide.keys, wide.v), [wide.keys, wide.v], grad_scores)
    return dict(zip(("d_keys", "d_v"), grads, strict=True))


def settle_final_gradients(found: Results, case: Case, backend: str) -> None:
    """Checks them, and puts those of the case as stored in their place."""
    stored = as_stored(case, backend)
    for name, exact in final_gradients(case, backend).items():
        excess = (found[name].double() - exact).abs() / bounds(case)[name].tolerance
        assert excess.max() <= 1, f"{name}: {float(excess.max()):.3g} times the bound"
        found[name] = bounds(stored)[name].exact.float()


def with_leaves(case: Case, names: Iterable[str] | None = None) -> Case:
    """The case with copies of its inputs, of which the named ones (by default all) are leaves that require a gradient."""
    chosen = set(case.inputs() if names is None else names)
    return case.replace(**{name: tensor.detach().clone().requires_grad_(name in chosen) for name, tensor in case.inputs().items()})


def gradients(case: Case, clear: bool = False) -> Results:
    """The ``.grad`` of every input of a case, zeros where there is none; ``clear`` removes them."""
    found = {}
    for name, leaf in case.inputs().items():
        found[name] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.clone()
        leaf.grad = None if clear else leaf.grad
    return found


def assert_near(found: Results, expected: Results) -> None:
    """Equal up to rounding: 512 machine epsilons of the largest element, in the dtype of what was found."""
    assert found.keys() == expected.keys()
    for name in expected:
        got, want = found[name].detach(), expected[name].detach()
        assert got.shape == want.shape, name
        limit = 512 * torch.finfo(got.dtype).eps * float(want.abs().amax()) if want.numel() else 0.0
        error = float((got.double() - want.double()).abs().amax()) if want.numel() else 0.0
        assert error <= limit, f"{name}: off by {error:.3g}, {limit:.3g} is allowed"


def loss_of(*outputs: Tensor | None) -> Tensor:
    """A number to differentiate: every element counts, each by another factor."""
    total: Any = 0.0
    for output in outputs:
        if output is not None:
            total = total + (output * torch.arange(1, output.numel() + 1).to(output).sin().view_as(output)).sum()
    return total  # type: ignore[no-any-return]


def sparsemax(scores: Tensor) -> Tensor:
    """Martins and Astudillo 2016, algorithm 1; zeros for a row of nothing."""
    ranked = scores.sort(-1, descending=True).values
    sums = ranked.masked_fill(ranked == -torch.inf, 0.0).cumsum(-1)
    ranks = torch.arange(1, scores.shape[-1] + 1).to(scores)
    support = (1 + ranks * ranked > sums).sum(-1, keepdim=True)
    threshold = (sums.gather(-1, (support - 1).clamp(min=0)) - 1) / support.clamp(min=1)
    return (scores - threshold).clamp(min=0.0)


def _separate(attend: Attend, queries: Tensor) -> Tensor:
    return torch.stack([loss_of(attend(query)[0]) for query in queries.unbind(-2)]).sum()


def _some(attend: Attend, queries: Tensor) -> Tensor:
    contexts = [attend(query)[0] for query in queries.unbind(-2)]
    return loss_of(contexts[1], contexts[3])


def _shuffled(attend: Attend, queries: Tensor) -> Tensor:
    contexts = {step: attend(queries[..., step, :])[0] for step in (2, 0, 3, 1)}
    return torch.stack([(step + 1) * loss_of(contexts[step]).tanh() for step in (1, 2, 3, 0)]).sum()


def next_query(query: Tensor, context: Tensor) -> Tensor:
    """A decoder's recurrence, without parameters."""
    return query + 0.5 * torch.tanh(context @ torch.eye(context.shape[-1], query.shape[-1]).to(context))


def _chain(attend: Attend, queries: Tensor) -> Tensor:
    first, *others = queries.unbind(-2)
    context = attend(first)[0]
    for query in others:
        context = attend(next_query(query, context))[0]
    return loss_of(context)


def _chain_of_all(attend: Attend, queries: Tensor) -> Tensor:
    first, *others = queries.unbind(-2)
    context, weights = attend(first, need_weights=True)
    outputs = [context, weights]
    for query in others:
        context, weights = attend(next_query(query, context), need_weights=True)
        outputs += [context, weights]
    return loss_of(*outputs)


def _coverage(attend: Attend, queries: Tensor) -> Tensor:
    covered, loss = None, torch.zeros((), dtype=queries.dtype)
    for query in queries.unbind(-2):
        weights = attend(query, need_weights=True)[1]
        covered, loss = (weights, loss) if covered is None else (covered + weights, loss + torch.minimum(covered, weights).sum())
    return loss + loss_of(covered)


def _with_coverage(attend: Attend, queries: Tensor) -> Tensor:
    return _coverage(attend, queries) + _separate(attend, queries)


def _beams(attend: Attend, queries: Tensor) -> Tensor:
    several, weights = attend(queries, need_weights=True)
    return loss_of(several, attend(queries[..., 0, :])[0], attend(queries[..., 1:3, :])[0], weights, attend(queries[..., :0, :])[0])


def _twice(attend: Attend, queries: Tensor) -> Tensor:
    query = queries[..., 0, :]
    return loss_of(attend(query)[0]).square() + loss_of(attend(query)[0])


PROGRAMS: dict[str, Program] = {
    "separate steps": _separate,
    "some steps reach the loss": _some,
    "any order": _shuffled,
    "recurrent chain": _chain,
    "recurrent chain, every output": _chain_of_all,
    "weights alone": _coverage,
    "context and weights": _with_coverage,
    "beams and steps": _beams,
    "one query twice": _twice,
}
each_program = pytest.mark.parametrize("program", PROGRAMS)


def expected_gradients(case: Case, program: Program) -> Results:
    """The undeferred gradients of a program, by the formulae in fp64."""
    leaves = with_leaves(case.to(torch.float64))
    program(functions(leaves, "reference"), leaves.query).backward()  # type: ignore[no-untyped-call]
    return gradients(leaves)


def trained(case: Case, backend: str, program: Program) -> Results:
    """The gradients of a program through one memory."""
    leaves = with_leaves(case)
    program(remember(leaves, backend).attend, leaves.query).backward()  # type: ignore[no-untyped-call]
    return gradients(leaves)


def double(family: str, heads: int = 0, seed: int = 0, hidden: str = "both") -> Case:
    """A case in fp64."""
    return build_for_memory(family, Dims(3, 4, 9, 7, 6, heads), torch.float64, hidden=hidden, seed=seed)


def step_losses(case: Case, backend: str) -> list[Tensor]:
    """One loss per step of one memory, independent of each other."""
    memory = remember(case, backend)
    return [loss_of(*memory.attend(query, need_weights=True)) for query in case.query.unbind(-2)]


def expected_of_steps(case: Case, *steps: int) -> Results:
    """The undeferred gradients of the sum of some of those losses."""
    return expected_gradients(
        case,
        lambda attend, queries: torch.stack([loss_of(*attend(queries[..., step, :], need_weights=True)) for step in steps]).sum(),
    )


def make_layer(kind: str, dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return LAYERS[kind](**options).to(dtype)


def layer_states(kind: str, steps: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Queries ``[B, T, query_dim]``, encoder states and lengths, of which one is 0."""
    generator = torch.Generator().manual_seed(1)
    queries = torch.randn(3, steps, KEY_DIM if "dot" in kind else QUERY_DIM, generator=generator, dtype=dtype)
    return queries, torch.randn(3, 11, KEY_DIM, generator=generator, dtype=dtype), torch.tensor([11, 0, 4])


class Decoder(nn.Module):
    """A small encoder and recurrent decoder, whose attention goes through a memory unless ``deferred`` is False."""

    def __init__(self, deferred: bool = True) -> None:
        super().__init__()
        self.encoder = nn.Linear(5, KEY_DIM)
        self.attention = onepass.AdditiveAttention(QUERY_DIM, KEY_DIM, 10)
        self.cell = nn.GRUCell(KEY_DIM, QUERY_DIM)
        self.deferred = deferred

    def forward(self, source: Tensor, steps: int = 3) -> Tensor:
        states = self.encoder(source)
        attend = functools.partial(self.attention, memory=self.attention.memory(states) if self.deferred else states)
        state, outputs = states.new_zeros(states.shape[0], QUERY_DIM), []
        for _ in range(steps):
            state = self.cell(attend(state)[0], state)
            outputs.append(state)
        return torch.stack(outputs, 1)
