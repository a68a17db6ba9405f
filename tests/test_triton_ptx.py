"""Triton kernels as compiled for sm_80, executed on the PTX machine: right within the contract's bounds, and without a race, an overrun, a
misaligned access or an uninitialised read, over both families, both directions, every kind of visibility and every dtype."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tolerance
import torch
from cases import Case, Dims, build, garbage, results
from tolerance import check

pytest.importorskip("triton", reason="needs triton, to compile kernels to PTX")

import triton_machine
from triton_machine import executed, ops_of_triton

import onepass
from onepass._validate import limits_of
from onepass.kernels.ops import OPS
from onepass.kernels.tiles import Device

SMALL = Dims(batch=2, steps=3, source=37, width=12, value_width=20)


@pytest.fixture(scope="module")
def on_the_machine() -> Iterator[None]:
    with ops_of_triton():
        yield


@pytest.fixture
def machine(on_the_machine: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs a function on the machine, without findings."""
    monkeypatch.setattr(tolerance, "factors_are_rounded", True)

    def run(function: Callable[[], Any], *, processors: int = 1, approximate: bool = False, kernels: set[str] | None = None) -> Any:
        with executed(Device(processors), approximate) as done:
            found = function()
        assert not done.findings, "\n".join(map(str, done.findings))
        assert kernels is None or kernels <= set(done.names)
        return found

    return run


def checked(machine: Callable[..., Any], case: Case, **options: Any) -> None:
    check(machine(lambda: results(case, "cpu"), **options), case)


@pytest.mark.parametrize("hidden", ["none", "lengths", "lengths per query", "holes", "spans"])
@pytest.mark.parametrize("family", ["additive", "multiplicative", "scores"])
def test_visibility(machine: Callable[..., Any], family: str, hidden: str) -> None:
    """Forward and backward, with garbage where nothing is visible."""
    case = build(family, SMALL, hidden=hidden)
    checked(machine, case)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["additive", "multiplicative"])
def test_dtype(machine: Callable[..., Any], family: str, dtype: torch.dtype) -> None:
    checked(machine, build(family, SMALL, dtype, hidden="lengths"))


@pytest.mark.parametrize("family", ["additive", "multiplicative"])
def test_split_source(machine: Callable[..., Any], family: str) -> None:
    """Few queries on many processors: parts of the source, combined."""
    case = build(family, Dims(batch=1, steps=1, source=150, width=16, value_width=24), hidden="lengths")
    checked(machine, case, processors=4, kernels={"attend", "combine"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["additive", "multiplicative"])
def test_large_tiles(machine: Callable[..., Any], family: str, dtype: torch.dtype) -> None:
    """Those of many queries, neither dimension whole."""
    checked(machine, build(family, Dims(batch=1, steps=40, source=130, width=12, value_width=70), dtype, hidden="lengths"))


@pytest.mark.parametrize("kind", ["lengths", "lengths per query", "spans"])
def test_limits_are_clamped(machine: Callable[..., Any], kind: str) -> None:
    """What only the device has seen may lie anywhere: the kernels take the nearest numbers within."""
    case = build("additive", SMALL)
    far, near = torch.tensor([[-3, 20, 99], [36, 38, 2**40]]), torch.tensor([[0, 20, 37], [36, 37, 37]])
    if kind == "lengths":
        far, near = far[:, 2] - 2 * torch.tensor([50, 0]), torch.tensor([0, 37])
    elif kind == "spans":
        far, near = torch.stack([far - 30, far], -1), torch.stack([(far - 30).clamp(0, 37), near], -1)

    def forward(limits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return OPS["additive_forward"](case.query, case.keys, case.values, case.v, limits, None)

    for got, expected in zip(*(machine(functools.partial(forward, limits)) for limits in (far, near)), strict=True):
        assert torch.equal(got, expected)


def test_widths_of_2048(machine: Callable[..., Any]) -> None:
    checked(machine, build("multiplicative", Dims(batch=1, steps=2, source=5, width=2048, value_width=2048)))


def test_float32_matmul_precision(machine: Callable[..., Any]) -> None:
    """Allowed to, products of float32 round their factors to tf32, 11 bits; else they do not."""
    case = build("multiplicative", Dims(batch=1, steps=17, source=40, width=32, value_width=16))
    weights = torch.full((1, 17, 40), 1 / 40)
    before = torch.get_float32_matmul_precision()
    exact = weights.double() @ case.values.double()
    off = {}
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            got = machine(lambda: OPS["weighted_values"](weights, case.values, None, None))
            off[precision] = float(((got.double() - exact).abs() / (weights.double() @ case.values.double().abs())).max())
    finally:
        torch.set_float32_matmul_precision(before)
    assert off["highest"] <= 40 * 2.0**-24
    assert 40 * 2.0**-24 < off["high"] <= 2 * 2.0**-11 + 40 * 2.0**-24


def test_heads(machine: Callable[..., Any]) -> None:
    checked(machine, build("additive", Dims(batch=1, steps=5, source=20, width=12, value_width=8, heads=2), hidden="holes"))


@pytest.mark.parametrize("width", [1, 9, 64])
def test_width(machine: Callable[..., Any], width: int) -> None:
    """Channels too few to merge, and numbers of them that no vector divides."""
    checked(machine, build("additive", Dims(batch=1, steps=17, source=9, width=width, value_width=3)))


def test_large_numbers(machine: Callable[..., Any]) -> None:
    """Where reciprocals cannot merge, the exact way is taken."""
    case = build("additive", SMALL)
    checked(machine, case.replace(query=case.query * 60, keys=-case.query[:, :1].expand_as(case.keys) * 60 + case.keys))


@pytest.mark.parametrize(
    ("steps", "width", "dtype", "hidden", "span", "processors"),
    [
        (3, 12, torch.float32, "none", "normal", 1),
        (3, 12, torch.float32, "spans", "normal", 4),
        (3, 12, torch.float32, "holes", "one channel cancelling", 1),
        (3, 12, torch.float32, "lengths", "small", 4),
        (3, 12, torch.bfloat16, "lengths per query", "wide", 1),
        (3, 12, torch.float64, "lengths", "normal", 4),
        (70, 9, torch.float32, "none", "mixed channels", 4),
        (5, 8, torch.float32, "none", "normal", 1),
    ],
    ids=str,
)
def test_query_not_asked_for(
    machine: Callable[..., Any], steps: int, width: int, dtype: torch.dtype, hidden: str, span: str, processors: int
) -> None:
    """Gradients of keys and v are the same bits on every way to them: merged reciprocals, out of their range, small, few channels."""
    case = build("scores", Dims(batch=2, steps=steps, source=37, width=width), dtype, hidden=hidden, span=span)
    given = case.grad_weights, case.query, case.keys, case.v, limits_of(case.lengths, case.spans, 37), case.mask
    backward = functools.partial(OPS["additive_scores_backward"], *given)
    asked, unasked = (machine(functools.partial(backward, of_query), processors=processors) for of_query in (True, False))
    assert unasked[0].shape == (0,)
    assert all(map(torch.equal, unasked[1:], asked[1:]))


def test_approximate_instructions(machine: Callable[..., Any]) -> None:
    """``rcp.approx`` and ``ex2.approx`` as far off as they may be."""
    checked(machine, build("additive", SMALL), approximate=True)


@pytest.mark.parametrize("family", ["additive", "multiplicative"])
def test_without_weights(machine: Callable[..., Any], family: str) -> None:
    """Multiplicative attention that keeps no weights corrects its softmax as it goes on."""
    case = build(family, Dims(batch=1, steps=20, source=90, width=16, value_width=8), hidden="lengths")
    arguments = [case.query, case.keys, case.values, *([case.v] if family == "additive" else [])]
    attention = getattr(onepass, f"{family}_attention")
    context, _ = machine(
        lambda: attention(*arguments, lengths=case.lengths), kernels={"attend" if family == "additive" else "attend_online"}
    )
    exact, _ = getattr(onepass.reference, f"{family}_attention")(*(tensor.double() for tensor in arguments), lengths=case.lengths)
    torch.testing.assert_close(context.double(), exact, atol=5e-6, rtol=0)


def test_garbage_changes_no_bit(machine: Callable[..., Any]) -> None:
    case = build("additive", SMALL, hidden="lengths")
    clean, dirty = (machine(functools.partial(results, each, "cpu")) for each in (case, garbage(case, float("nan"))))
    for name, expected in clean.items():
        assert torch.equal(dirty[name], expected), name


def test_memory_steps(machine: Callable[..., Any]) -> None:
    """Steps over a memory, with deferred gradients, against the reference's undeferred ones."""
    case = build("additive", Dims(batch=2, steps=2, source=11, width=12, value_width=8), hidden="lengths")

    def gradients(dtype: torch.dtype, backend: str) -> tuple[torch.Tensor, ...]:
        inputs = [tensor.to(dtype).requires_grad_() for tensor in (case.keys, case.values, case.v, case.query)]
        memory = onepass.additive_memory(*inputs[:3], lengths=case.lengths, backend=backend)
        if backend != "reference":
            memory._prepared = (inputs[0].new_empty((2, 0)), inputs[0].new_empty((2, 0)), inputs[2].detach())
        contexts = [memory.attend(query)[0] for query in inputs[3].unbind(1)]
        return torch.autograd.grad(torch.stack(contexts, 1).square().sum(), inputs)

    got = machine(lambda: gradients(torch.float32, "cpu"))
    for result, exact in zip(got, gradients(torch.float64, "reference"), strict=True):
        torch.testing.assert_close(result.double(), exact, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["additive", "multiplicative"])
def test_bfloat16_memory(machine: Callable[..., Any], family: str) -> None:
    """A float32 query over keys and values kept in bfloat16: the bits of the same numbers kept in float32."""
    case = build(family, SMALL, hidden="lengths")
    about = (case.v, *[case.v.new_empty(0)] * 2, case.v) if family == "additive" else (0.5,)
    gradients = case.grad_context, case.grad_weights

    def step(kept: torch.dtype) -> tuple[torch.Tensor, ...]:
        keys, values = (tensor.bfloat16().to(kept) for tensor in (case.keys, case.values))
        found = OPS[f"{family}_step"](case.query, keys, values, *about, case.lengths, None)
        of_backward = about[1:] if family == "additive" else about
        gradient = OPS[f"{family}_step_backward"](*gradients, case.query, keys, values, *of_backward, found[1], case.lengths, None)
        return *found, *gradient

    narrow, wide = (machine(functools.partial(step, kept)) for kept in (torch.bfloat16, torch.float32))
    for got, expected in zip(narrow, wide, strict=True):
        assert torch.equal(got, expected)


def test_a_deleted_barrier_is_found(machine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores are read back by other threads than those that wrote them: without the barrier between, the machine says so."""
    compiled = triton_machine.compiled

    def keeps(item: Any) -> bool:
        return item.opcode not in ("bar", "barrier")

    def without_barriers(launch: Any) -> Any:
        kernel, warps, shared = compiled(launch)
        kept = [item for item in kernel.instructions if keeps(item)]
        assert len(kept) < len(kernel.instructions)
        labels = {name: sum(keeps(item) for item in kernel.instructions[:place]) for name, place in kernel.labels.items()}
        return dataclasses.replace(kernel, instructions=kept, labels=labels), warps, shared

    monkeypatch.setattr(triton_machine, "compiled", without_barriers)
    case = build("additive", Dims(batch=1, steps=40, source=70, width=12, value_width=8))
    with executed(Device(1)) as done:
        onepass.additive_attention(case.query, case.keys, case.values, case.v)
    assert any("race" in finding.kind for finding in done.findings)
