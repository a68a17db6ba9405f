"""The ops under the functions: their schemas, fakes and autograd are what torch expects of them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DTYPES, Case, Dims, bits, build, call

from onepass._validate import limits_of

DIMS = [Dims(2, 3, 5, 8, 4), Dims(2, 3, 5, 8, 4, heads=2), Dims(1, 4, 37, 12, 5)]
HIDDEN = ["none", "lengths", "holes", "both", "spans", "all three"]
pytestmark = pytest.mark.usefixtures("backend")


def common(case: Case) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Lengths (or spans in their place) and mask as the ops take them: int64, and expanded."""
    full = (*case.query.shape[:-1], case.keys.shape[-2])
    mask = case.mask[:, None] if case.mask is not None and case.mask.dim() < len(full) else case.mask
    return limits_of(case.lengths, case.spans, case.keys.shape[-2]), None if mask is None else mask.expand(full)


def forward_arguments(case: Case, keep_weights: bool = True) -> tuple[Any, ...]:
    lengths, mask = common(case)
    if case.family == "additive":
        return case.query, case.keys, case.values, case.v, lengths, mask
    if case.family == "scores":
        return case.query, case.keys, case.v, lengths, mask
    return case.query, case.keys, case.values, case.scale, lengths, mask, keep_weights


FORWARD = {"additive": "additive_forward", "scores": "additive_scores", "multiplicative": "multiplicative_forward"}


def op(name: str) -> Any:
    return getattr(torch.ops.onepass, name).default


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("dims", DIMS[:2], ids=str)
@pytest.mark.parametrize("family", FORWARD)
def test_forward(family: str, dims: Dims, hidden: str, dtype: torch.dtype, requires_grad: bool) -> None:
    """``torch.library.opcheck`` on the forward ops."""
    case = build(family, dims, dtype, hidden=hidden)
    case = case.replace(**{name: tensor.requires_grad_(requires_grad) for name, tensor in case.inputs().items()})
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op(FORWARD[family]), forward_arguments(case), test_utils=tests)


@pytest.mark.parametrize("keep_weights", [False, True])
@pytest.mark.parametrize("family", FORWARD)
def test_forward_traced(family: str, keep_weights: bool) -> None:
    """The same through AOTAutograd with dynamic shapes, gradients compared."""
    case = build(family, hidden="both")
    case = case.replace(**{name: tensor.requires_grad_() for name, tensor in case.inputs().items()})
    torch.library.opcheck(op(FORWARD[family]), forward_arguments(case, keep_weights), test_utils="test_aot_dispatch_dynamic")


def backward_arguments(case: Case, keep_weights: bool, context: bool = True, weights: bool = True) -> tuple[str, tuple[Any, ...]]:
    """A backward op and its arguments, its saved tensors from the forward op."""
    lengths, mask = common(case)
    saved = op(FORWARD[case.family])(*forward_arguments(case, keep_weights))
    if case.family == "scores":
        return "additive_scores_backward", (case.grad_weights, case.query, case.keys, case.v, lengths, mask, True)
    grads = (case.grad_context if context else None, case.grad_weights.to(saved[1].dtype) if weights else None)
    if case.family == "additive":
        return "additive_backward", (*grads, case.query, case.keys, case.values, case.v, saved[1], lengths, mask)
    return "multiplicative_backward", (*grads, case.query, case.keys, case.values, case.scale, saved[1], lengths, mask)


@pytest.mark.parametrize("arriving", [(True, True), (True, False), (False, True)], ids=["both", "context", "weights"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("family", FORWARD)
def test_backward(family: str, hidden: str, dtype: torch.dtype, arriving: tuple[bool, bool]) -> None:
    """``torch.library.opcheck`` on the backward ops, whichever gradients arrive."""
    for dims in DIMS:
        name, arguments = backward_arguments(build(family, dims, dtype, hidden=hidden), True, *arriving)
        torch.library.opcheck(op(name), arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


@pytest.mark.parametrize("family", FORWARD)
def test_backward_traced(family: str) -> None:
    """The same through AOTAutograd with dynamic shapes."""
    name, arguments = backward_arguments(build(family, hidden="both"), True)
    torch.library.opcheck(op(name), arguments, test_utils="test_aot_dispatch_dynamic")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_weights_not_kept(hidden: str, dtype: torch.dtype, backend: str) -> None:
    """Without its weights, multiplicative gives the same context, and its backward takes none of them."""
    case = build("multiplicative", DIMS[2], dtype, hidden=hidden)
    kept, dropped = (op("multiplicative_forward")(*forward_arguments(case, keep)) for keep in (True, False))
    assert dropped[1].numel() == 0
    # A GPU's matrix products round weights, or what is to become weights, to a half-width dtype.
    error = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(dtype) if backend == "triton" else None
    size = float(case.values.abs().max())
    torch.testing.assert_close(dropped[0], kept[0], **({} if error is None else {"atol": error * size, "rtol": error}))
    name, arguments = backward_arguments(case, False, weights=False)
    torch.library.opcheck(op(name), arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
    expected = op(name)(*backward_arguments(case, True, weights=False)[1])
    for got, want in zip(op(name)(*arguments), expected, strict=True):
        torch.testing.assert_close(got, want)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "sliced": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "of one row": lambda x: x[..., :1, :].expand_as(x),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [*HIDDEN, "spans of all"])
def test_query_not_asked_for(hidden: str, dtype: torch.dtype, backend: str) -> None:
    """Gradients of additive scores without the query's: those of keys and v are the same, also of gradients in float32 of half-width
    scores, in whatever layout, and where what arrives at hidden positions is NaN."""
    case = build("scores", DIMS[2], dtype, hidden="none" if hidden == "spans of all" else hidden)
    name, (arriving, *rest, _) = backward_arguments(case, True)
    visible = case.visible()
    if hidden == "spans of all":  # the same for every query, as an expanded tensor
        rest[3] = torch.tensor([2, 31]).expand(*case.query.shape[:2], 2)
        visible = ((torch.arange(case.keys.shape[-2]) >= 2) & (torch.arange(case.keys.shape[-2]) < 31)).expand(visible.shape)
    for given in (arriving, arriving.to(torch.float64 if dtype == torch.float64 else torch.float32)):
        torch.library.opcheck(op(name), (given, *rest, False), test_utils=("test_schema", "test_faketensor"))
        _, *asked = op(name)(given, *rest, True)
        unasked, *others = op(name)(given, *rest, False)
        poisoned = op(name)(given.masked_fill(~visible, torch.nan), *rest, False)[1:]
        assert unasked.shape == (0,)
        assert all(map(torch.equal, others, asked))
        assert all(map(torch.equal, poisoned, asked))
        for layout in LAYOUTS.values():
            laid, plain = (op(name)(x, *rest, False)[1:] for x in (layout(given), layout(given).contiguous()))
            assert all(map(torch.equal, laid, plain))


@pytest.mark.of_cpp
@pytest.mark.parametrize("family", FORWARD)
def test_direct_callers_meet_checks(family: str) -> None:
    """An op called without the function in front refuses what would read out of bounds, with the shapes that it got."""
    case = build(family)
    for name, wrong in {
        "keys": case.keys[..., :-1],
        "query": case.query[:1],
        "v": case.v[:-1],
        "values": case.values[:, :-1],
        "lengths": torch.tensor([5]),
        "mask": torch.ones(2, 3, 4, dtype=torch.bool),
    }.items():
        if name in case.inputs() or name in ("lengths", "mask"):
            arguments = list(forward_arguments(case))
            positions = [*case.inputs(), *(["scale"] if family == "multiplicative" else []), "lengths", "mask"]
            arguments[positions.index(name)] = wrong
            with pytest.raises(RuntimeError, match=r"must be .*; got"):
                op(FORWARD[family])(*arguments)


@pytest.mark.parametrize("family", FORWARD)
def test_op_is_the_function(family: str, backend: str) -> None:
    """The op's results are the function's, bit for bit."""
    case = build(family, hidden="both")
    outputs = op(FORWARD[family])(*forward_arguments(case))
    outputs = (outputs,) if family == "scores" else outputs[:2]
    for got, expected in zip(outputs, call(case, backend), strict=True):
        assert torch.equal(bits(got), bits(expected))


def step_arguments(case: Case, one_step: bool, backend: str, half: bool = False) -> tuple[str, tuple[Any, ...]]:
    """A step over a memory and its arguments; lengths (but for spans) and mask are the sources' own."""
    lengths = common(case)[0]
    if case.spans is not None:
        lengths = lengths[:, :1] if one_step else lengths
    elif lengths is not None:
        lengths = lengths if lengths.dim() == 1 else lengths[:, 0].contiguous()
    mask = None if (mask := common(case)[1]) is None else mask[..., :1, :]
    query = case.query.detach()[..., 0, :] if one_step else case.query.detach()
    query.requires_grad_(case.query.requires_grad)
    values = case.values.to(torch.bfloat16) if half else case.values
    if case.family == "multiplicative":
        return "multiplicative_step", (query, case.keys, values, case.scale, lengths, mask)
    own = None if case.spans is not None else lengths
    if backend == "triton":  # whose steps read the keys, and v
        empty = case.keys.new_empty((case.keys.shape[0], 0))
        return "additive_step", (query, case.keys, values, case.v, empty, empty, case.v.detach(), lengths, mask)
    prepared = op("additive_prepare")(case.keys.detach(), case.v.detach(), own, mask, half)
    return "additive_step", (query, case.keys, values, case.v, *prepared, lengths, mask)


@pytest.mark.parametrize("one_step", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("family", ["additive", "multiplicative"])
def test_steps(family: str, hidden: str, dtype: torch.dtype, one_step: bool, backend: str) -> None:
    """``torch.library.opcheck`` on the ops of a memory: preparing, steps, their backward, the sums over steps."""
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for dims in DIMS[:2]:
        case = build(family, dims, dtype, hidden=hidden)
        for half in (False, True) if dtype == torch.float32 else (False,):
            name, arguments = step_arguments(case, one_step, backend, half)
            torch.library.opcheck(op(name), arguments, test_utils=tests)
            context, weights = op(name)(*arguments)
            others = [argument for i, argument in enumerate(arguments[3:]) if family == "multiplicative" or i > 0]  # no v
            saved = (*arguments[:3], *others[:-2], weights, *others[-2:])
            for grads in ((torch.randn_like(context), torch.randn_like(weights)), (None, torch.randn_like(weights))):
                torch.library.opcheck(op(f"{name}_backward"), (*grads, *saved), test_utils=tests)
            of_scores = (*saved[:-3], None, *saved[-2:])
            torch.library.opcheck(op(f"{name}_backward"), (None, torch.randn_like(weights), *of_scores), test_utils=tests)
            torch.library.opcheck(op(f"{name}_scores"), (*arguments[:2], *arguments[3:]), test_utils=tests)
        narrow = weights.detach().to(dtype).requires_grad_(True)
        torch.library.opcheck(op("weighted_values"), (narrow, case.values, *arguments[-2:]), test_utils=tests)
        torch.library.opcheck(op("weighted_values_backward"), (context.detach(), case.values, *arguments[-2:]), test_utils=tests)
        if not one_step:
            torch.library.opcheck(op("source_sums"), (weights, case.grad_context, *arguments[-2:]), test_utils=tests)
            if family == "additive" and case.spans is None and backend == "cpu":
                prepare = (case.keys, case.v, *arguments[-2:], False)
                torch.library.opcheck(op("additive_prepare"), prepare, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("one_step", [False, True])
@pytest.mark.parametrize("family", ["additive", "multiplicative"])
def test_steps_traced(family: str, one_step: bool, backend: str) -> None:
    """A step through AOTAutograd with dynamic shapes, gradients compared."""
    case = build(family, hidden="both")
    case = case.replace(**{name: tensor.requires_grad_() for name, tensor in case.inputs().items()})
    name, arguments = step_arguments(case, one_step, backend)
    torch.library.opcheck(op(name), arguments, test_utils="test_aot_dispatch_dynamic")
    torch.library.opcheck(op(f"{name}_scores"), (*arguments[:2], *arguments[3:]), test_utils="test_aot_dispatch_dynamic")


@pytest.mark.parametrize("hidden", ["both", "all three"])
@pytest.mark.parametrize("one_step", [False, True])
def test_weighted_values_traced(one_step: bool, hidden: str, backend: str) -> None:
    """The context of given weights through AOTAutograd with dynamic shapes, gradients compared."""
    case = build("multiplicative", hidden=hidden)
    _, (_, _, values, _, lengths, mask) = step_arguments(case, one_step, backend)
    weights = (case.grad_weights[..., 0, :] if one_step else case.grad_weights).clone().requires_grad_()
    arguments = (weights, values.requires_grad_(), lengths, mask)
    torch.library.opcheck(op("weighted_values"), arguments, test_utils="test_aot_dispatch_dynamic")


@pytest.mark.of_cpp
def test_weighted_values_meet_checks() -> None:
    """Called directly, its ops refuse what would read out of bounds."""
    case = build("multiplicative")
    weights, values = case.grad_weights, case.values
    for arguments in ((weights[..., :-1], values), (weights, values[:1]), (weights[:1], values), (weights[0, 0], values)):
        with pytest.raises(RuntimeError, match=r"must be .*; got"):
            op("weighted_values")(*arguments, None, None)
    for arguments in ((case.grad_context[..., :-1], values), (case.grad_context[:1], values)):
        with pytest.raises(RuntimeError, match=r"must be .*; got"):
            op("weighted_values_backward")(*arguments, None, None)
    for spans in (torch.zeros(2, 3, 3, dtype=torch.int64), torch.zeros(2, 4, 2, dtype=torch.int64)):
        with pytest.raises(RuntimeError, match=r"spans, .*; got"):
            op("weighted_values")(weights, values, spans, None)


@pytest.mark.of_cpp
def test_steps_meet_checks() -> None:
    """Steps called directly refuse what would read out of bounds, and a memory of another instruction set."""
    case = build("additive")
    name, arguments = step_arguments(case, False, "cpu")
    wrong = {
        0: case.query[..., :-1],
        1: case.keys[:, :-1],
        2: case.values[:1],
        4: arguments[4][:, :-1],
        5: arguments[5][..., :1],
        6: arguments[6][..., 1:],
    }
    for position, tensor in wrong.items():
        changed = list(arguments)
        changed[position] = tensor
        with pytest.raises(RuntimeError, match=r"must be .*; got"):
            op(name)(*changed)
    weighting = arguments[6].clone()
    weighting[..., -4] = 3.0
    with pytest.raises(RuntimeError, match="vectors of 3 elements"):
        op(name)(*arguments[:6], weighting, None, None)


@pytest.mark.of_cpp
@pytest.mark.parametrize("family", ["additive", "multiplicative"])
def test_steps_of_float64_take_no_bfloat16(family: str) -> None:
    """Which kernels of float64 would read four times past its end."""
    case = build(family, dtype=torch.float64)
    name, arguments = step_arguments(case, False, "cpu")
    tried = [(name, arguments, position) for position in ((2, 4) if family == "additive" else (1, 2))]
    tried.append(("weighted_values", (case.grad_weights, case.values, None, None), 1))
    tried.append(("weighted_values_backward", (case.grad_context, case.values, None, None), 1))
    for called, given, position in tried:
        changed = list(given)
        changed[position] = changed[position].bfloat16()
        with pytest.raises(RuntimeError, match="has another dtype than the query"):
            op(called)(*changed)


@pytest.mark.of_cpp
@pytest.mark.parametrize("name", ["AVX2", "sse", "avx512 "])
def test_an_instruction_set_that_is_none(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not another one than was asked for, silently."""
    monkeypatch.setenv("ONEPASS_ISA", name)
    case = build("scores")
    with pytest.raises((RuntimeError, ValueError), match=f"ONEPASS_ISA must be one of what this machine runs, baseline.*got '{name}'"):
        op("additive_scores")(*forward_arguments(case))
