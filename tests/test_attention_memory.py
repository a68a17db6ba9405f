"""An attention memory gives, step by step, what the functions give; rows are selected; it says why it cannot."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DTYPES, RANGES, Case, Dims, assert_same_bits, build, garbage
from memory_cases import (
    HIDDEN,
    assert_near,
    attended,
    build_for_memory,
    by_step_or_at_once,
    each_family,
    each_heads,
    functions,
    gradients,
    loss_of,
    remember,
    with_leaves,
)
from tolerance import check
from torch import Tensor

import onepass

SHAPES = [
    Dims(1, 1, 1, 1, 1),
    Dims(2, 3, 5, 7, 40),
    Dims(3, 2, 67, 33, 1),
    Dims(2, 4, 67, 100, 40),
    Dims(9, 2, 1, 7, 5),
    Dims(2, 5, 5, 33, 40, heads=2),
    Dims(1, 3, 67, 7, 1, heads=3),
]
EMPTY = [
    Dims(2, 0, 5, 7, 4),
    Dims(2, 3, 0, 7, 4),
    Dims(0, 3, 5, 7, 4),
    Dims(2, 3, 5, 0, 4),
    Dims(2, 3, 5, 7, 0),
    Dims(0, 0, 0, 0, 0),
    Dims(2, 3, 0, 7, 4, heads=2),
    Dims(2, 0, 5, 7, 4, heads=2),
]


@by_step_or_at_once
@pytest.mark.parametrize("dims", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_family
def test_shapes(family: str, dtype: torch.dtype, dims: Dims, by_step: bool, backend: str, isa: str) -> None:
    """Results and gradients of odd sizes are within the functions' tolerances, one query or all at a time."""
    case = build_for_memory(family, dims, dtype)
    check(attended(case, backend, by_step), case)


@pytest.mark.parametrize("span", RANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@each_family
def test_ranges(family: str, dtype: torch.dtype, span: str, backend: str, isa: str) -> None:
    """So they are for all finite inputs: overflowing exponentials, tiny numbers, cancelling channels."""
    case = build_for_memory(family, Dims(2, 3, 21, 37, 10), dtype, span=span)
    for by_step in (True, False):
        check(attended(case, backend, by_step), case)


@by_step_or_at_once
@pytest.mark.parametrize("factor", [100.0, 1e-3, 1e-30])
@each_family
def test_large_and_small_keys(family: str, factor: float, by_step: bool, backend: str, isa: str) -> None:
    """Keys alone so large that their exponentials overflow, or so small that they round to 1."""
    case = build_for_memory(family, Dims(2, 3, 21, 37, 10), hidden="both")
    case = case.replace(keys=case.keys * factor)
    check(attended(case, backend, by_step), case)


@each_heads
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_family
def test_masks(family: str, dtype: torch.dtype, hidden: str, heads: int, backend: str) -> None:
    """Lengths and masks of every kind, with NaN in what they hide."""
    case = build_for_memory(family, Dims(4, 3, 41, 20, 13, heads), dtype, hidden=hidden)
    for by_step in (True, False):
        check(attended(garbage(case, torch.nan), backend, by_step), case)


@by_step_or_at_once
@pytest.mark.parametrize("hidden", HIDDEN[1:])
@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
@each_family
def test_padding_changes_no_bit(family: str, bad: float, hidden: str, by_step: bool, backend: str, isa: str) -> None:
    """What is hidden has weight and gradient 0, and nothing in it reaches a result; a row that sees nothing gives zeros."""
    case = build_for_memory(family, Dims(4, 3, 21, 19, 7, 2), hidden=hidden)
    found = attended(garbage(case, bad), backend, by_step)
    assert_same_bits(found, attended(case, backend, by_step))
    visible = case.visible()
    assert not found["weights"][~visible].any()
    assert not found["context"][~visible.any(-1)].any()
    assert not found["d_query"][~visible.any(-1)].any()
    assert not found["d_keys"][~visible.any(-2)].any()
    assert not found["d_values"][~visible.any(-2)].any()
    if hidden != "nothing":
        torch.testing.assert_close(found["weights"].sum(-1), visible.any(-1).float())


@pytest.mark.parametrize("hidden", ["none", "lengths", "padding"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dims", EMPTY, ids=str)
@each_family
def test_empty_dimensions(family: str, dims: Dims, dtype: torch.dtype, hidden: str, backend: str) -> None:
    """Any dimension may be empty, one query or several at a time."""
    case = build_for_memory(family, dims, dtype, hidden=hidden)
    check(attended(case, backend, by_step=False), case)
    if dims.steps:
        check(attended(case, backend, by_step=True), case)


@each_heads
@each_family
def test_shapes_of_results(family: str, heads: int, backend: str) -> None:
    """Results have the rank of the query, and weights come only if asked for."""
    case = build(family, Dims(2, 3, 5, 8, 4, heads))
    lead, memory = list(case.query.shape[:-2]), remember(case, backend)
    context, weights = memory.attend(case.query[..., 0, :])
    assert (list(context.shape), weights) == ([*lead, 4], None)
    context, weights = memory.attend(case.query)
    assert (list(context.shape), weights) == ([*lead, 3, 4], None)
    context, weights = memory.attend(case.query[..., 0, :], need_weights=True)
    assert (list(context.shape), list(weights.shape)) == ([*lead, 4], [*lead, 5])
    context, weights = memory.attend(case.query, True)
    assert (list(context.shape), list(weights.shape)) == ([*lead, 3, 4], [*lead, 3, 5])


@each_heads
@each_family
def test_weights_change_nothing(family: str, heads: int, backend: str) -> None:
    """Context and gradients are as right when no weights are asked for."""
    case = build_for_memory(family, Dims(2, 3, 21, 9, 5, heads), torch.float64, hidden="both")
    leaves, expected = with_leaves(case), with_leaves(case)
    loss_of(remember(leaves, backend).attend(leaves.query)[0]).backward()
    loss_of(functions(expected, "reference")(expected.query)[0]).backward()
    assert_near(gradients(leaves), gradients(expected))


@pytest.mark.parametrize("scale", [0.0, 1.0, -2.5, 1e-3])
@by_step_or_at_once
def test_scale(scale: float, by_step: bool, backend: str) -> None:
    """Multiplicative scores are scaled, by any number."""
    case = build("multiplicative", Dims(2, 3, 17, 9, 5)).replace(scale=scale)
    check(attended(case, backend, by_step), case)


@each_heads
@each_family
def test_mask_ranks(family: str, heads: int, backend: str) -> None:
    """A mask ``[B, S]`` is the mask ``[B, 1, S]``, and with heads ``[B, 1, 1, S]`` of them all."""
    case = build_for_memory(family, Dims(3, 2, 11, 8, 6, heads), hidden="holes")
    assert case.mask is not None
    expected = attended(case, backend, by_step=True)
    assert_same_bits(attended(case, backend, True, mask=case.mask[:, 0]), expected)
    if heads:
        assert_same_bits(attended(case, backend, True, mask=case.mask[:, None]), expected)


@each_family
def test_attributes(family: str, backend: str) -> None:
    """A memory shows its tensors; what it lacks is None."""
    case = build_for_memory(family, hidden="both")
    assert case.mask is not None
    memory, bare = remember(case, backend), remember(case, backend, lengths=None, mask=None)
    assert isinstance(memory, onepass.AttentionMemory)
    assert torch.equal(memory.keys, case.keys)
    assert torch.equal(memory.values, case.values)
    assert torch.equal(memory.lengths, case.lengths)
    assert torch.equal(memory.mask.reshape(case.mask.shape), case.mask)
    assert bare.lengths is None
    assert bare.mask is None


@by_step_or_at_once
@each_family
def test_strides(family: str, by_step: bool, backend: str) -> None:
    """Time-major states, a slice and an expanded tensor give the bits of their contiguous copies."""
    case = build_for_memory(family, Dims(3, 4, 11, 9, 6), hidden="both")
    odd = case.replace(
        keys=case.keys.transpose(0, 1).contiguous().transpose(0, 1),
        values=torch.cat([case.values, case.values], -1)[..., :6],
        query=case.query.mT.contiguous().mT,
        v=torch.stack([case.v, case.v], -1)[:, 0],
    )
    expected = with_leaves(case)
    outcomes = []
    for inputs in (odd, expected):
        tensors = {name: tensor.detach().requires_grad_() for name, tensor in inputs.inputs().items()}
        memory = remember(inputs.replace(**tensors), backend)
        steps = tensors["query"].unbind(1) if by_step else [tensors["query"]]
        contexts = [memory.attend(query)[0] for query in steps]
        torch.stack([context.sum() for context in contexts]).sum().backward()
        outcomes.append([*contexts, *(tensor.grad for tensor in tensors.values())])
    for got, want in zip(*outcomes, strict=True):
        assert torch.equal(got, want)


@by_step_or_at_once
@pytest.mark.parametrize(
    ("dims", "hidden"),
    [
        (Dims(1, 3, 131, 24, 40), "none"),
        (Dims(1, 2, 1100, 24, 40), "lengths"),
        (Dims(2, 4, 37, 24, 10, heads=3), "both"),
        (Dims(7, 2, 45, 40, 33), "lengths"),
        (Dims(1, 2, 1200, 70, 50), "both"),
        (Dims(5, 20, 61, 70, 50), "holes"),
        (Dims(5, 20, 61, 70, 50), "moving spans"),
    ],
    ids=str,
)
@each_family
def test_threads_and_repeats(
    family: str, dims: Dims, hidden: str, by_step: bool, backend: str, isa: str, set_threads: Callable[[int], None]
) -> None:
    """1, 2 and 3 threads, and another run, give the same bits, forward and backward."""
    if backend == "reference":
        pytest.xfail("torch's matrix products promise no such thing")
    case = build_for_memory(family, dims, hidden=hidden)
    set_threads(1)
    expected = attended(case, backend, by_step)
    for count in (1, 2, 3):
        set_threads(count)
        assert_same_bits(attended(case, backend, by_step), expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@each_heads
@each_family
def test_without_gradients(family: str, heads: int, mode: Callable[[], Any], backend: str) -> None:
    """``no_grad`` and ``inference_mode`` give the results of training, which require no gradient; select works there."""
    case = build_for_memory(family, Dims(3, 4, 11, 9, 5, heads), hidden="both")
    expected = with_leaves(case)
    context, weights = remember(expected, backend).attend(expected.query, need_weights=True)
    with mode():
        memory = remember(with_leaves(case), backend)
        selected = memory.select(torch.tensor([2, 0, 0])).attend(case.query[[2, 0, 0]], need_weights=True)
        for got, want in zip(memory.attend(case.query, need_weights=True), (context, weights), strict=True):
            assert not got.requires_grad
            torch.testing.assert_close(got, want.detach())
        for got, want in zip(selected, (context, weights), strict=True):
            assert not got.requires_grad
            torch.testing.assert_close(got, want.detach()[[2, 0, 0]])


ROWS = {
    "permuted": torch.tensor([3, 1, 0, 2]),
    "repeated": torch.tensor([1, 1, 3, 0, 1, 3, 3]),
    "one": torch.tensor([2]),
    "none": torch.tensor([], dtype=torch.int64),
    "boolean": torch.tensor([True, False, True, False]),
    "all": torch.ones(4, dtype=torch.bool),
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("hidden", ["none", "both", "per head"])
@each_heads
@each_family
def test_select(family: str, heads: int, hidden: str, rows: Tensor, backend: str) -> None:
    """Selected rows give the results and gradients of the inputs' rows; the first memory goes on as before."""
    case = build_for_memory(family, Dims(4, 3, 11, 9, 5, heads), torch.float64, hidden=hidden)
    outcomes = []
    for named in (backend, "function"):
        leaves = with_leaves(case)
        if named == "function":
            picked = {name: None if (t := getattr(leaves, name)) is None else t[rows] for name in ("keys", "values", "lengths", "mask")}
            attend, attend_rows = functions(leaves, "reference"), functions(leaves.replace(**picked), "reference")
        else:
            memory = remember(leaves, backend)
            selected = memory.select(rows)
            assert torch.equal(selected.keys, case.keys[rows])
            assert torch.equal(selected.values, case.values[rows])
            attend, attend_rows = memory.attend, selected.attend
        before = attend(leaves.query[..., 0, :])[0]
        context, weights = attend_rows(leaves.query[rows][..., 1, :], need_weights=True)
        loss_of(before, context, weights, attend(leaves.query[..., 2, :])[0]).backward()
        outcomes.append({"context": context.detach(), "weights": weights.detach(), **gradients(leaves)})
    assert_near(*outcomes)


@each_family
def test_select_what_is_not_there(family: str, backend: str) -> None:
    memory = remember(build_for_memory(family), backend)
    for row in (memory.keys.shape[0], -1):
        with pytest.raises(IndexError, match=rf"rows must lie in \[0, B\) = \[0, {memory.keys.shape[0]}\); got \[0, {row}\]"):
            memory.select(torch.tensor([0, row]))
    nothing = onepass.multiplicative_memory(torch.randn(2, 0, 4), torch.randn(2, 0, 4), backend=backend)
    with pytest.raises(IndexError, match=r"rows must lie in \[0, B\) = \[0, 2\); got \[5\]"):
        nothing.select(torch.tensor([5]))


@each_family
def test_select_of_a_selection(family: str, backend: str) -> None:
    """Beam search: selections of selections, whose steps all count in the gradients of the first keys."""
    case = build_for_memory(family, Dims(4, 3, 11, 9, 5), torch.float64, hidden="both")
    first, second = torch.tensor([2, 2, 0, 3, 1]), torch.tensor([4, 0, 0, 1])
    leaves, expected = with_leaves(case), with_leaves(case)
    memory = remember(leaves, backend).select(first)
    loss = loss_of(memory.attend(leaves.query[first, 0])[0])
    memory = memory.select(second)
    (loss + loss_of(memory.attend(leaves.query[first][second, 1])[0])).backward()
    context = functions(expected, "reference")(expected.query)[0]
    loss_of(context[first, 0]).add(loss_of(context[first][second, 1])).backward()
    assert_near(gradients(leaves), gradients(expected))


@pytest.mark.parametrize("rows", [torch.tensor([0, 4]), torch.tensor([True, False, True])], ids=["index", "boolean"])
def test_select_out_of_range(rows: Tensor, backend: str) -> None:
    """Rows that are not there are an error, never a read beyond the end."""
    memory = remember(build("additive", Dims(4)), backend)
    with pytest.raises((IndexError, ValueError, RuntimeError)):
        memory.select(rows)


def refused(case: Case, backend: str, error: Any, message: str, **options: Any) -> None:
    """Making the memory, or at the latest its first step, raises the error with a message that matches."""

    def make_and_attend() -> None:
        remember(case, backend, **options).attend(case.query)

    with pytest.raises(error, match=message):
        make_and_attend()


PLAIN, HEADS = Dims(2, 3, 5, 8, 4), Dims(2, 3, 5, 8, 4, 2)
WRONG = [  # dims, changes, error, message
    (PLAIN, {"query": torch.zeros(2, 3, 9)}, ValueError, r"query.*\[2, 3, 9\]"),
    (PLAIN, {"query": torch.zeros(2, 7)}, ValueError, r"query.*\[2, .*7\]"),
    (PLAIN, {"query": torch.zeros(3, 3, 8)}, ValueError, r"query.*\[3, 3, 8\]"),
    (PLAIN, {"query": torch.zeros(1, 8)}, ValueError, r"query.*\[1, .*8\]"),
    (PLAIN, {"query": torch.zeros(8)}, ValueError, r"query.* \[8\]"),
    (PLAIN, {"query": torch.zeros(2, 2, 3, 8)}, ValueError, r"query.* \[2, 2, 3, 8\]"),
    (HEADS, {"query": torch.zeros(2, 8)}, ValueError, r"query.* \[2, 8\]"),
    (HEADS, {"query": torch.zeros(2, 3, 3, 8)}, ValueError, r"query.*\[2, 3, 3, 8\]"),
    (PLAIN, {"query": torch.zeros(2, 3, 8, dtype=torch.float64)}, TypeError, r"dtype.*float"),
    (PLAIN, {"query": torch.zeros(2, 3, 8, dtype=torch.bfloat16)}, TypeError, r"dtype.*float"),
    (PLAIN, {"query": [[0.0] * 8]}, TypeError, r"query.*list"),
    (PLAIN, {"values": torch.zeros(2, 5, 4, dtype=torch.float64)}, TypeError, r"dtype.*float"),
    (PLAIN, {"values": torch.zeros(2, 6, 4)}, ValueError, r"values.*2, 6, 4"),
    (HEADS, {"values": torch.zeros(2, 5, 4)}, ValueError, r"values.*2, 5, 4"),
    (PLAIN, {"keys": torch.zeros(5, 8)}, ValueError, r"keys.* \[5, 8\]"),
    (PLAIN, {"keys": torch.zeros(2, 5, 8, dtype=torch.int64)}, TypeError, r"keys.*int64"),
    (PLAIN, {"lengths": torch.full((2, 3), 5)}, ValueError, r"lengths.*\[2, 3\]"),
    (PLAIN, {"lengths": torch.full((2, 1), 5)}, ValueError, r"lengths.*\[2, 1\]"),
    (PLAIN, {"lengths": torch.full((3,), 5)}, ValueError, r"lengths.*\[3\]"),
    (PLAIN, {"lengths": torch.tensor(5)}, ValueError, r"lengths.*\[\]"),
    (PLAIN, {"lengths": torch.tensor([5.0, 2.0])}, TypeError, r"lengths.*float32"),
    pytest.param(PLAIN, {"lengths": torch.tensor([6, 2])}, RuntimeError, r"lengths.*\[0, 5\]", marks=pytest.mark.of_cpp),
    pytest.param(PLAIN, {"lengths": torch.tensor([5, -1])}, RuntimeError, r"lengths.*\[0, 5\]", marks=pytest.mark.of_cpp),
    (PLAIN, {"mask": torch.ones(2, 6, dtype=torch.bool)}, ValueError, r"mask.*6"),
    (PLAIN, {"mask": torch.ones(3, 1, 5, dtype=torch.bool)}, ValueError, r"mask.*3"),
    (PLAIN, {"mask": torch.ones(2, 3, 5, dtype=torch.bool)}, ValueError, r"mask.*\[2, 3, 5\]"),
    (PLAIN, {"mask": torch.ones(2, 2, 1, 5, dtype=torch.bool)}, ValueError, r"mask.*2, .*5"),
    (HEADS, {"mask": torch.ones(2, 3, 1, 5, dtype=torch.bool)}, ValueError, r"mask.*\[2, 3, 1, 5\]"),
    (HEADS, {"mask": torch.ones(2, 2, 3, 5, dtype=torch.bool)}, ValueError, r"mask.*2, .*5"),
    (PLAIN, {"mask": torch.ones(2, 1, 5)}, TypeError, r"mask.*bool"),
]


@pytest.mark.parametrize(("dims", "changes", "error", "message"), WRONG)
@each_family
def test_errors(family: str, dims: Dims, changes: dict[str, Any], error: type[Exception], message: str, backend: str) -> None:
    """What does not fit is refused in words that name it, with gradients and without."""
    case = build(family, dims).replace(**changes)
    for mode in (contextlib.nullcontext(), torch.no_grad()):
        with mode:
            refused(case, backend, error, message)


@pytest.mark.parametrize("v", [torch.zeros(9), torch.zeros(2, 8), torch.zeros(8, dtype=torch.float64), None], ids=str)
def test_v_errors(v: Any, backend: str) -> None:
    """So is a ``v`` of another width, rank or dtype."""
    refused(build("additive", PLAIN).replace(v=v), backend, (TypeError, ValueError), r"\bv\b")


@pytest.mark.parametrize("storage", [torch.float16, torch.float64, torch.int64, "bfloat16"], ids=str)
@each_family
def test_storage_dtype_errors(family: str, storage: Any, backend: str) -> None:
    """float32 keys are stored as they are or in bfloat16, and in nothing else."""
    refused(build(family, PLAIN), backend, (TypeError, ValueError), "dtype", dtype=storage)


@each_family
def test_unknown_backend(family: str, backend: str) -> None:
    """A backend that is not there is refused, by its name."""
    refused(build(family, PLAIN), "gpu", ValueError, "backend.*gpu")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@each_family
def test_grad_mode_errors(family: str, mode: Callable[[], Any], backend: str) -> None:
    """A memory that was made without gradients cannot be trained through, nor one made for training used without them."""
    case = with_leaves(build(family, PLAIN))
    trains = remember(case, backend)
    with mode():
        without = remember(case, backend)
        without.attend(case.query)
        with pytest.raises(RuntimeError, match="grad"):
            trains.attend(case.query)
    with pytest.raises(RuntimeError, match="grad"):
        without.attend(case.query)
    assert trains.attend(case.query)[0].requires_grad


@each_family
def test_lengths_made_in_inference_mode(family: str, backend: str) -> None:
    """They have no version to watch; results and gradients are those of other lengths."""
    case = build_for_memory(family, hidden="lengths")
    assert case.lengths is not None
    with torch.inference_mode():
        lengths = case.lengths.clone()
    assert_same_bits(attended(case.replace(lengths=lengths), backend, True), attended(case, backend, True))


@pytest.mark.of_cpp
@each_family
def test_function_transforms(family: str, backend: str) -> None:
    """A memory made within one, or outside: derivatives are refused, ``vmap`` is served; the reference has them all."""
    case = build_for_memory(family)
    outside = remember(case, backend)

    def inside(query: torch.Tensor) -> torch.Tensor:
        return remember(case, backend).attend(query)[0]

    for attend in (inside, lambda query: outside.attend(query)[0]):
        mapped = torch.func.vmap(attend)(torch.stack([case.query, 2 * case.query]))
        torch.testing.assert_close(mapped[1], outside.attend(2 * case.query)[0])
        derivatives = (
            lambda: torch.func.jvp(attend, (case.query,), (case.query,))[1],  # noqa: B023
            lambda: torch.func.grad(lambda query: loss_of(attend(query)))(case.query),  # noqa: B023
        )
        for derivative, named in zip(derivatives, ("forward-mode derivatives", "gradients of function transforms"), strict=True):
            if backend == "reference":
                assert derivative().any()
                continue
            with pytest.raises(RuntimeError, match=f"onepass has no {named} .* name backend='reference'"):
                derivative()


@pytest.mark.parametrize("scale", [None, "2", torch.tensor(2.0)], ids=["nothing", "text", "a tensor"])
def test_scale_that_is_no_number(scale: Any, backend: str) -> None:
    case = build_for_memory("multiplicative")
    with pytest.raises(TypeError, match="scale must be a number"):
        remember(case, backend, scale=scale)


@each_family
@pytest.mark.parametrize("hidden", ["lengths", "lengths of int32", "mask"])
@pytest.mark.parametrize("with_grad", [False, True])
def test_what_is_hidden_stays_hidden(family: str, hidden: str, with_grad: bool, backend: str) -> None:
    """Lengths and mask are those that the memory was made with: of other positions nothing was prepared."""
    case = build_for_memory(family, Dims(2, 3, 40, 32, 8), torch.float64)
    lengths = torch.tensor([3, 7], dtype=torch.int32 if hidden == "lengths of int32" else torch.int64)
    seen = torch.arange(40) < lengths[:, None]
    given, wider = (seen.clone(), True) if hidden == "mask" else (lengths.clone(), 40)
    with torch.set_grad_enabled(with_grad):
        memory = remember(case.replace(**{"mask" if hidden == "mask" else "lengths": given}), backend)
        given.fill_(wider)
        _, weights = memory.attend(case.query, need_weights=True)
    assert not weights.masked_select(~seen[:, None]).any()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, dtype=torch.float64))


@each_family
def test_keys_changed_before_a_selection(family: str, backend: str) -> None:
    """Where a step's own backward would say so: in what is selected, and under a transform, which does not defer."""
    if backend == "reference":
        pytest.skip("it prepares nothing")
    case = build_for_memory(family, Dims(2, 3, 5, 8, 6), torch.float64)
    keys = case.keys.requires_grad_() * 1
    memory = remember(case.replace(keys=keys), backend)
    with torch.no_grad():
        keys.add_(1)
    for use in (lambda: memory.select(torch.tensor([1])), lambda: torch.vmap(lambda q: memory.attend(q)[0])(case.query.transpose(0, 1))):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            use()
