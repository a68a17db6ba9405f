"""CUDA kernels of decoding steps, as compiled for sm_80 and, in clusters, for sm_90, executed on the PTX machine: right within the
contract's bounds, without a race, an overrun, a misaligned access or an uninitialised read, in one part of the source and in several."""

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import cuda_machine
import pytest
import torch
from cases import Case, Dims, assert_same_bits, build, call, garbage, results
from cuda_step import Steps
from ptx import Kernel
from tolerance import check
from torch import Tensor

pytestmark = pytest.mark.skipif(cuda_machine.NVCC is None, reason="needs nvcc, to compile kernels to PTX")

STEP = Dims(batch=2, steps=1, source=37, width=12, value_width=20)
FEW = dataclasses.replace(STEP, steps=3)


class Ops:
    """The ops on a device. What all steps share in the backward is summed in float64 from what the step gives."""

    def __init__(self) -> None:
        self.device = Steps()
        self.kept: torch.dtype | None = None  # of keys and values, if they are another's than the query

    def forward(self, query: Tensor, keys: Tensor, values: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        kept = self.kept or query.dtype
        return self.device.forward(query, keys.to(kept), values.to(kept), *others)

    def backward(self, grad_context: Tensor | None, grad_weights: Tensor | None, query: Tensor, keys: Tensor, values: Tensor,
                 *others: Any) -> tuple[Tensor, Tensor]:  # fmt: skip
        kept = self.kept or query.dtype
        return self.device.backward(grad_context, grad_weights, query, keys.to(kept), values.to(kept), *others)

    def additive_forward(self, query: Tensor, keys: Tensor, values: Tensor, v: Tensor, lengths: Tensor | None,
                         mask: Tensor | None) -> tuple[Tensor, Tensor]:  # fmt: skip
        return self.forward(query, keys, values, v, 1.0, lengths, mask)

    def multiplicative_forward(self, query: Tensor, keys: Tensor, values: Tensor, scale: float, lengths: Tensor | None,
                               mask: Tensor | None, keep_weights: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
        return self.forward(query, keys, values, None, scale, lengths, mask)

    def additive_backward(self, grad_context: Tensor | None, grad_weights: Tensor | None, query: Tensor, keys: Tensor, values: Tensor,
                          v: Tensor, weights: Tensor, lengths: Tensor | None, mask: Tensor | None) -> tuple[Tensor, ...]:  # fmt: skip
        limits = (lengths, mask)
        grad_query, grad_scores = self.backward(grad_context, grad_weights, query, keys, values, v, 1.0, weights, *limits)
        tangent = torch.tanh(query.double().unsqueeze(-2) + keys.double().unsqueeze(-3))
        g = grad_scores.double().unsqueeze(-1)
        terms = torch.where(g == 0, 0.0, g * (1 - tangent * tangent) * v.double()[..., None, None, :])
        grad_v = torch.where(g == 0, 0.0, g * tangent).sum((-3, -2)).sum(0)
        return grad_query, terms.sum(-3).to(keys.dtype), values_gradient(weights, grad_context, values), grad_v.to(v.dtype)

    def multiplicative_backward(self, grad_context: Tensor | None, grad_weights: Tensor | None, query: Tensor, keys: Tensor,
                                values: Tensor, scale: float, weights: Tensor, lengths: Tensor | None,
                                mask: Tensor | None) -> tuple[Tensor, ...]:  # fmt: skip
        limits = (lengths, mask)
        grad_query, grad_scores = self.backward(grad_context, grad_weights, query, keys, values, None, scale, weights, *limits)
        return grad_query, (grad_scores.double().mT @ query.double()).to(keys.dtype), values_gradient(weights, grad_context, values)


def values_gradient(weights: Tensor, grad_context: Tensor | None, values: Tensor) -> Tensor:
    if grad_context is None:
        return torch.zeros_like(values)
    return (weights.double().mT @ grad_context.double()).to(values.dtype)


@pytest.fixture(scope="module")
def ops() -> Iterator[Ops]:
    """Ops of CPU tensors are those of the kernels."""
    made = Ops()
    library = torch.library.Library("onepass", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        for family in ("additive", "multiplicative"):
            for direction in ("forward", "backward"):
                library.impl(f"{family}_{direction}", getattr(made, f"{family}_{direction}"), "CPU", allow_override=True)
    yield made
    library._destroy()


@pytest.fixture
def machine(ops: Ops) -> Callable[..., Any]:
    """Runs a function on the machine, without findings."""

    def run(
        function: Callable[[], Any], *, splits: int = 1, cluster: int = 1, kept: torch.dtype | None = None, **options: Any
    ) -> Any:
        ops.device, ops.kept = Steps(**options), kept
        found = function()
        assert not ops.device.findings, "\n".join(ops.device.findings)
        assert {(launch.splits, launch.cluster) for launch in ops.device.launches} == {(splits, cluster)}
        return found

    return run


def checked(machine: Callable[..., Any], case: Case, **options: Any) -> None:
    check(machine(lambda: results(case, "cpu"), **options), case)


@pytest.mark.parametrize("hidden", ["none", "lengths", "lengths per query", "holes", "spans", "nothing"])
@pytest.mark.parametrize("family", ["additive", "multiplicative"])
def test_visibility(machine: Callable[..., Any], family: str, hidden: str) -> None:
    checked(machine, build(family, FEW, hidden=hidden))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["additive", "multiplicative"])
def test_dtype(machine: Callable[..., Any], family: str, dtype: torch.dtype) -> None:
    for dims in (STEP, FEW) if family == "additive" else (FEW,):
        checked(machine, build(family, dims, dtype, hidden="lengths"))


@pytest.mark.parametrize("hidden", ["lengths", "holes"])
@pytest.mark.parametrize("family", ["additive", "multiplicative"])
def test_split_source(machine: Callable[..., Any], family: str, hidden: str) -> None:
    """Parts of the source, combined by the last block of each batch and head."""
    dims = Dims(batch=2, steps=1, source=150, width=16, value_width=24, heads=1)
    checked(machine, build(family, dims, hidden=hidden), processors=4, splits=4)


@pytest.mark.parametrize("family", ["additive", "multiplicative"])
def test_many_queries(machine: Callable[..., Any], family: str) -> None:
    """More than sixteen go in groups."""
    checked(machine, build(family, Dims(batch=1, steps=18, source=70, width=20, value_width=12), hidden="holes"), processors=2, splits=2)


@pytest.mark.parametrize("width", [1, 9, 64])
def test_width(machine: Callable[..., Any], width: int) -> None:
    """Channels too few to merge, and numbers of them that no vector divides."""
    checked(machine, build("additive", Dims(batch=1, steps=2, source=9, width=width, value_width=3)))


def test_heads(machine: Callable[..., Any]) -> None:
    checked(machine, build("additive", Dims(batch=1, steps=2, source=20, width=12, value_width=8, heads=2), hidden="holes"))


def test_approximate_instructions(machine: Callable[..., Any]) -> None:
    checked(machine, build("additive", FEW), approximate=True)


@pytest.mark.parametrize("steps", [5, 16])
@pytest.mark.parametrize("family", ["additive", "multiplicative"])
def test_beams(machine: Callable[..., Any], family: str, steps: int) -> None:
    """Queries that neighbouring lanes share."""
    checked(machine, build(family, Dims(batch=1, steps=steps, source=40, width=40, value_width=36), hidden="holes"))


SPANS = ("tiny", "wide", "cancelling 11", "cancelling 60", "mixed channels", "huge", "huge v", "zero v", "huge values")


@pytest.mark.parametrize("span", SPANS)
def test_ranges(machine: Callable[..., Any], span: str) -> None:
    checked(machine, build("additive", FEW, span=span))


@pytest.mark.parametrize("family", ["additive", "multiplicative"])
@pytest.mark.parametrize("hidden", ["lengths", "holes"])
def test_garbage_changes_no_bit(machine: Callable[..., Any], family: str, hidden: str) -> None:
    dims = Dims(batch=2, steps=2, source=70, width=12, value_width=20)
    case = build(family, dims, hidden=hidden)
    options: dict[str, Any] = {"processors": 2, "splits": 2}
    clean, dirty = (machine(functools.partial(results, each, "cpu"), **options) for each in (case, garbage(case, float("nan"))))
    of_steps = ("context", "weights", "d_query")
    assert_same_bits({name: dirty[name] for name in of_steps}, {name: clean[name] for name in of_steps})


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("splits", [1, 2])
def test_not_finite(machine: Callable[..., Any], bad: float, splits: int) -> None:
    """A key and a value: what the formula gives to those that see them, nothing to others."""
    case = build("additive", Dims(batch=2, steps=3, source=70, width=12, value_width=8), hidden="lengths per query")
    for name in ("keys", "values"):
        tensor = getattr(case, name).clone()
        tensor[0, 11, 2] = bad
        changed = case.replace(**{name: tensor})
        sees = changed.visible()[0, :, 11]
        outputs = machine(functools.partial(call, changed, "cpu"), processors=splits, splits=splits)
        for got, expected in zip(outputs, call(changed, "reference"), strict=True):
            torch.testing.assert_close(got[0][sees], expected[0][sees], equal_nan=True, atol=1e-5, rtol=1e-5)
            assert got[0][~sees].isfinite().all()
            assert got[1].isfinite().all()


SIZES = (Dims(1, 2, 0, 5, 4), Dims(1, 1, 3, 0, 0), Dims(1, 1, 3, 4, 0), Dims(1, 1, 1, 1100, 1100), Dims(0, 1, 4, 4, 4))


@pytest.mark.parametrize("dims", SIZES, ids=str)
def test_sizes(machine: Callable[..., Any], dims: Dims) -> None:
    checked(machine, build("additive", dims))


def test_rows_out_of_line(machine: Callable[..., Any]) -> None:
    """Rows of larger tensors that start at no multiple of 16 bytes give the bits of rows that do."""
    case = build("additive", FEW)
    wider = {name: torch.nn.functional.pad(tensor, (1, 2), value=torch.nan) for name, tensor in case.inputs().items()}
    apart = case.replace(**{name: tensor[..., 1:-2] for name, tensor in wider.items()})
    assert_same_bits(*(machine(functools.partial(results, each, "cpu")) for each in (apart, case)))


def test_one_gradient_alone(machine: Callable[..., Any]) -> None:
    case = build("multiplicative", STEP, hidden="lengths")
    checked(machine, case.replace(grad_context=None))
    checked(machine, case.replace(grad_weights=None))


def test_again(machine: Callable[..., Any]) -> None:
    case = build("additive", Dims(batch=1, steps=2, source=130, width=12, value_width=8))
    first, second = (machine(functools.partial(results, case, "cpu"), processors=2, splits=4) for _ in range(2))
    assert_same_bits(first, second)


ONE_PART: dict[str, Any] = {"capability": 90, "processors": 132, "splits": 4, "cluster": 4}
THREE_PARTS: dict[str, Any] = {"capability": 90, "processors": 3, "splits": 6, "cluster": 2}


def of_parts(parts: dict[str, Any], steps: int = 1, width: int = 16, value_width: int = 24, heads: int = 0) -> Dims:
    """Several parts are taken only where what they leave is little beside keys and values."""
    if parts is THREE_PARTS:
        return Dims(batch=1, steps=steps, source=600, width=64, value_width=192)
    return Dims(batch=1, steps=steps, source=150, width=width, value_width=value_width, heads=heads)


@pytest.mark.parametrize("hidden", ["none", "lengths", "holes", "nothing"])
@pytest.mark.parametrize("family", ["additive", "multiplicative"])
def test_clusters(machine: Callable[..., Any], family: str, hidden: str) -> None:
    """Blocks that put together what they found."""
    for steps in (1, 3):
        checked(machine, build(family, of_parts(ONE_PART, steps), hidden=hidden), **ONE_PART)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("family", ["additive", "multiplicative"])
def test_several_clusters(machine: Callable[..., Any], family: str, steps: int) -> None:
    """What these leave, the last block to finish combines."""
    checked(machine, build(family, of_parts(THREE_PARTS, steps), hidden="holes" if steps == 1 else "lengths per query"), **THREE_PARTS)


@pytest.mark.parametrize("parts", [ONE_PART, THREE_PARTS], ids=["one part", "three parts"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtype_in_clusters(machine: Callable[..., Any], dtype: torch.dtype, parts: dict[str, Any]) -> None:
    several = (("additive", 1), ("additive", 2), ("multiplicative", 2)) if parts is ONE_PART else (("additive", 1),)
    for family, steps in several:
        dims = of_parts(parts, steps, 20, 11)
        checked(machine, build(family, dims if parts is ONE_PART else dataclasses.replace(dims, value_width=191), dtype), **parts)


@pytest.mark.parametrize("steps", [5, 16])
@pytest.mark.parametrize("family", ["additive", "multiplicative"])
def test_beams_in_clusters(machine: Callable[..., Any], family: str, steps: int) -> None:
    """A cluster reads its queries once. More columns than threads take at a time, and widths that no vector divides."""
    checked(machine, build(family, of_parts(ONE_PART, steps, 40, 36), hidden="spans"), **ONE_PART)
    checked(machine, build(family, of_parts(ONE_PART, steps, 9, 301), hidden="lengths per query"), **ONE_PART)
    checked(machine, build(family, of_parts(ONE_PART, steps, 301, 9)), **ONE_PART)


def rounded(case: Case) -> Case:
    """Of keys and values that bfloat16 holds."""
    return case.replace(keys=case.keys.bfloat16().to(case.keys.dtype), values=case.values.bfloat16().to(case.values.dtype))


@pytest.mark.parametrize("parts", [{}, ONE_PART, THREE_PARTS], ids=["one block", "one part", "three parts"])
@pytest.mark.parametrize("family", ["additive", "multiplicative"])
def test_memory_in_bfloat16(machine: Callable[..., Any], family: str, parts: dict[str, Any]) -> None:
    """Float32 queries over keys and values in bfloat16 give what they give over the same numbers in float32."""
    if parts is THREE_PARTS:
        shapes = [dataclasses.replace(of_parts(parts), value_width=288)]
    elif parts is ONE_PART:
        shapes = [of_parts(parts, 1), of_parts(parts, 2), of_parts(parts, 16, 37, 29)]
    else:
        shapes = [STEP, FEW, Dims(batch=1, steps=5, source=40, width=37, value_width=29)]
    for dims in shapes:
        checked(machine, rounded(build(family, dims, hidden="holes")), kept=torch.bfloat16, **parts)


@pytest.mark.parametrize("span", ["wide", "cancelling 60", "huge"])
def test_ranges_of_a_memory_in_bfloat16(machine: Callable[..., Any], span: str) -> None:
    checked(machine, rounded(build("additive", FEW, span=span)), kept=torch.bfloat16)


def test_garbage_in_a_memory_in_bfloat16(machine: Callable[..., Any]) -> None:
    case = rounded(build("additive", dataclasses.replace(FEW, source=70), hidden="lengths"))
    options: dict[str, Any] = {"processors": 2, "splits": 2, "kept": torch.bfloat16}
    clean, dirty = (machine(functools.partial(results, each, "cpu"), **options) for each in (case, garbage(case, float("nan"))))
    of_steps = ("context", "weights", "d_query")
    assert_same_bits({name: dirty[name] for name in of_steps}, {name: clean[name] for name in of_steps})


def test_columns_of_some_threads(machine: Callable[..., Any]) -> None:
    """Where columns are too few for all threads and too many for two groups, some have none."""
    checked(machine, build("additive", of_parts(ONE_PART, 16, 200, 12)), **ONE_PART)


def test_eight_blocks_of_unequal_work(machine: Callable[..., Any]) -> None:
    dims = Dims(batch=1, steps=3, source=249, width=16, value_width=24)
    checked(machine, build("additive", dims, hidden="lengths"), processors=132, capability=90, splits=8, cluster=8)


def test_a_block_without_work(machine: Callable[..., Any]) -> None:
    """The pieces before it have a position more than a 64th."""
    dims = Dims(batch=1, steps=1, source=2049, width=8, value_width=8)
    checked(machine, build("multiplicative", dims), processors=132, capability=90, splits=64, cluster=8)


@pytest.mark.parametrize(("width", "value_width"), [(0, 8), (8, 0), (0, 0)])
@pytest.mark.parametrize("steps", [1, 16])
def test_no_columns_in_clusters(machine: Callable[..., Any], steps: int, width: int, value_width: int) -> None:
    for family in ("additive", "multiplicative"):
        checked(machine, build(family, of_parts(ONE_PART, steps, width, value_width)), **ONE_PART)


def test_a_part_of_infinite_scores(machine: Callable[..., Any]) -> None:
    """Scores of -inf weigh nothing beside others, if all that one part sees are so."""
    case = build("multiplicative", of_parts(THREE_PARTS))
    keys = case.keys.clone()
    keys[:, :250] = -torch.sign(case.query[0, 0]) * 1e38
    changed = case.replace(keys=keys, query=case.query * 1e3)
    got, expected = machine(functools.partial(call, changed, "cpu"), **THREE_PARTS), call(changed, "reference")
    assert (expected[1][..., :250] == 0).all()
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_heads_in_clusters(machine: Callable[..., Any]) -> None:
    parts = {**ONE_PART, "processors": 4}
    checked(machine, build("additive", of_parts(ONE_PART, 2, 12, 8, heads=2), hidden="holes"), **parts)


@pytest.mark.parametrize("span", SPANS)
def test_ranges_in_clusters(machine: Callable[..., Any], span: str) -> None:
    checked(machine, build("additive", of_parts(ONE_PART, 3), span=span), **ONE_PART)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("parts", [ONE_PART, THREE_PARTS], ids=["one part", "three parts"])
@pytest.mark.parametrize("family", ["additive", "multiplicative"])
def test_not_finite_in_clusters(machine: Callable[..., Any], family: str, parts: dict[str, Any], bad: float) -> None:
    case = build(family, of_parts(parts, 2), hidden="lengths per query")
    for name in ("keys", "values"):
        tensor = getattr(case, name).clone()
        tensor[0, 11, 2] = bad
        changed = case.replace(**{name: tensor})
        sees = changed.visible()[0, :, 11]
        got, expected = machine(functools.partial(call, changed, "cpu"), **parts), call(changed, "reference")
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one[0][sees], other[0][sees], equal_nan=True, atol=1e-5, rtol=1e-5)
            assert one[0][~sees].isfinite().all()


@pytest.mark.parametrize("family", ["additive", "multiplicative"])
def test_gradients_alone_and_garbage_in_clusters(machine: Callable[..., Any], family: str) -> None:
    case = build(family, of_parts(ONE_PART, 2), hidden="holes")
    checked(machine, case.replace(grad_context=None), **ONE_PART)
    checked(machine, case.replace(grad_weights=None), **ONE_PART)
    found = [machine(functools.partial(results, each, "cpu"), **ONE_PART) for each in (case, garbage(case, float("nan")), case)]
    of_steps = ("context", "weights", "d_query")
    for other in found[1:]:
        assert_same_bits({name: other[name] for name in of_steps}, {name: found[0][name] for name in of_steps})


@pytest.mark.parametrize(("opcode", "capability"), [("bar", 80), ("membar", 80), ("bar", 90), ("membar", 90), ("barrier", 90)])
def test_what_orders_threads_and_blocks_is_needed(opcode: str, capability: int) -> None:
    """Without the barriers of blocks or of clusters, or without the fences, the machine finds races."""

    def keeps(item: Any) -> bool:
        return bool(item.opcode != opcode)

    def without(source: str, name: str, architecture: str) -> Kernel:
        kernel = cuda_machine.kernel(source, name, architecture)
        kept = [item for item in kernel.instructions if keeps(item)]
        if len(kept) == len(kernel.instructions):
            raise ValueError(f"there is no {opcode}")
        labels = {label: sum(keeps(item) for item in kernel.instructions[:place]) for label, place in kernel.labels.items()}
        return dataclasses.replace(kernel, instructions=kept, labels=labels)

    case = build("additive", of_parts(THREE_PARTS))
    device = Steps(kernel_of=without, capability=capability, processors=3)
    with contextlib.suppress(AssertionError):  # counters that are not zero again
        device.forward(case.query, case.keys, case.values, case.v, 1.0, None, None)
    assert any("race" in finding for finding in device.findings)


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_each_barrier_of_the_cluster_is_needed(direction: str, number: int) -> None:
    """The shares of queries are there; all are done with them; what blocks found is there; all are done with that."""

    def without(source: str, name: str, architecture: str) -> Kernel:
        kernel = cuda_machine.kernel(source, name, architecture)
        if direction not in name:
            return kernel
        barriers = [place for place, item in enumerate(kernel.instructions) if item.opcode == "barrier"]
        if len(barriers) != 8:
            raise ValueError(f"{len(barriers)} halves of barriers")
        left_out = barriers[2 * number : 2 * number + 2]
        kept = [item for place, item in enumerate(kernel.instructions) if place not in left_out]
        labels = {label: place - sum(each < place for each in left_out) for label, place in kernel.labels.items()}
        return dataclasses.replace(kernel, instructions=kept, labels=labels)

    case = build("additive", of_parts(ONE_PART, 3))
    device = Steps(kernel_of=without, capability=90, processors=132)
    context, weights = device.forward(case.query, case.keys, case.values, case.v, 1.0, None, None)
    if direction == "backward":
        grads = torch.ones_like(context), torch.ones_like(weights)
        device.backward(*grads, case.query, case.keys, case.values, case.v, 1.0, weights, None, None)
    assert device.findings
    assert all(launch.cluster == 4 for launch in device.launches)
