"""Gradients: gradcheck in fp64, through every output, for any subset of the inputs; first derivatives only."""

import itertools
from collections.abc import Callable

import pytest
import torch
from cases import FAMILIES, MASKS, Case, Dims, assert_same_bits, build, call, results
from tolerance import check
from torch import Tensor


def differentiable(case: Case, backend: str, need_weights: bool = True) -> tuple[list[Tensor], Callable[..., tuple[Tensor, ...]]]:
    """The case's inputs as leaves, and the call as a function of them; hidden scores, which are ``-inf``, are left out."""
    names = list(case.inputs())
    leaves = [tensor.clone().requires_grad_() for tensor in case.inputs().values()]
    visible = case.visible()

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        changed = case.replace(**dict(zip(names, tensors, strict=True)))
        if case.family == "scores":
            (scores,) = call(changed, backend)
            return (scores.masked_fill(~visible, 0.0),)
        return tuple(output for output in call(changed, backend, need_weights=need_weights) if output is not None)

    return leaves, function


def gradcheck(function: Callable[..., tuple[Tensor, ...]], leaves: list[Tensor], backend: str) -> bool:
    """torch's, of every element; in the interpreter, of random combinations of them."""
    return torch.autograd.gradcheck(function, leaves, fast_mode=backend == "triton")


@pytest.mark.parametrize("hidden", MASKS)
@pytest.mark.parametrize("heads", [0, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradcheck(family: str, heads: int, hidden: str, backend: str) -> None:
    """Every input's gradient is the derivative, through context and weights together."""
    leaves, function = differentiable(build(family, Dims(2, 3, 4, 5, 3, heads), torch.float64, hidden=hidden), backend)
    assert gradcheck(function, leaves, backend)


@pytest.mark.parametrize("dims", [Dims(1, 1, 1, 1, 1), Dims(2, 2, 19, 3, 1), Dims(1, 5, 3, 21, 9), Dims(3, 1, 7, 4, 6)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradcheck_of_shapes(family: str, dims: Dims, backend: str, isa: str) -> None:
    """The same for other shapes and every instruction set."""
    leaves, function = differentiable(build(family, dims, torch.float64), backend)
    assert gradcheck(function, leaves, backend)


@pytest.mark.parametrize("span", ["wide", "cancelling 22", "one channel cancelling", "small"])
@pytest.mark.parametrize("family", ["additive", "scores"])
def test_gradcheck_of_ranges(family: str, span: str, backend: str) -> None:
    """The same where tanh is nearly linear, and where it is nearly flat."""
    leaves, function = differentiable(build(family, Dims(2, 3, 4, 5, 3), torch.float64, span=span), backend)
    assert gradcheck(function, leaves, backend)


@pytest.mark.parametrize("family", ["additive", "multiplicative"])
@pytest.mark.parametrize(("source", "value_width"), [(3, 4), (9, 2)])
def test_gradcheck_without_weights(family: str, source: int, value_width: int, backend: str) -> None:
    """The same when no weights are returned, kept for the backward or not."""
    case = build(family, Dims(2, 3, source, 5, value_width), torch.float64, hidden="lengths")
    leaves, function = differentiable(case, backend, need_weights=False)
    assert gradcheck(function, leaves, backend)


@pytest.mark.parametrize("family", FAMILIES)
def test_subsets_of_inputs(family: str, backend: str) -> None:
    """An input's gradient has the same bits whichever others require one."""
    case = build(family, Dims(2, 3, 11, 9, 5), hidden="lengths")
    expected = results(case, backend)
    names = list(case.inputs())
    for count in range(1, len(names) + 1):
        for chosen in itertools.combinations(names, count):
            leaves = {name: getattr(case, name).clone().requires_grad_() for name in chosen}
            arriving = [case.grad_weights] if family == "scores" else [case.grad_context, case.grad_weights]
            pairs = zip(call(case.replace(**leaves), backend), arriving, strict=True)
            reached = [(output, grad) for output, grad in pairs if output is not None and output.requires_grad]
            torch.autograd.backward([output for output, _ in reached], [grad for _, grad in reached])
            for name, leaf in leaves.items():
                assert leaf.grad is not None, (chosen, name)
                assert torch.equal(leaf.grad, expected[f"d_{name}"]), (chosen, name)


@pytest.mark.parametrize("family", ["additive", "multiplicative"])
@pytest.mark.parametrize("through", ["context", "weights"])
@pytest.mark.parametrize("hidden", ["none", "both"])
def test_one_output_alone(family: str, through: str, hidden: str, backend: str, isa: str) -> None:
    """A loss of the context alone, or of the weights alone, is as accurate as of both."""
    case = build(family, Dims(2, 5, 23, 14, 6), hidden=hidden)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in case.inputs().items()}
    context, weights = call(case.replace(**leaves), backend)
    output, arriving = (context, case.grad_context) if through == "context" else (weights, case.grad_weights)
    grads = torch.autograd.grad(output, list(leaves.values()), arriving, allow_unused=True)
    found = {"context": context.detach(), "weights": weights.detach()}
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        found[f"d_{name}"] = torch.zeros_like(leaf) if grad is None else grad
    other = "grad_weights" if through == "context" else "grad_context"
    check(found, case.replace(**{other: torch.zeros_like(getattr(case, other))}))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_accumulate(family: str, backend: str) -> None:
    """Two calls on the same tensors add their gradients, as the steps of a decoder do."""
    case = build(family, Dims(2, 3, 7, 5, 4), torch.float64)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in case.inputs().items()}
    arriving = [case.grad_weights] if family == "scores" else [case.grad_context, case.grad_weights]
    for _ in range(2):
        torch.autograd.backward([output for output in call(case.replace(**leaves), backend) if output is not None], arriving)
    alone = results(case, backend)
    for name, leaf in leaves.items():
        assert leaf.grad is not None, name
        assert torch.equal(leaf.grad, 2 * alone[f"d_{name}"]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_double_backward_is_refused(family: str, backend: str) -> None:
    """A second derivative raises, in words, and names the way out, which works."""
    if backend != "reference":
        leaves, function = differentiable(build(family, Dims(2, 2, 3, 4, 2), torch.float64), backend)
        grads = torch.autograd.grad(function(*leaves)[0].square().sum(), leaves, create_graph=True)
        with pytest.raises(RuntimeError, match=r"first derivatives only; for a second one name backend='reference'"):
            torch.autograd.grad(grads[0].sum(), leaves)
    leaves, function = differentiable(build(family, Dims(2, 2, 3, 4, 2), torch.float64), "reference")
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_gradients(family: str, backend: str) -> None:
    """``no_grad`` and ``inference_mode`` give the bits of training, and results that require no gradient."""
    case = build(family, Dims(2, 3, 11, 9, 5), hidden="lengths")
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in case.inputs().items()}
    names = ("scores",) if family == "scores" else ("context", "weights")
    trained = dict(zip(names, call(case.replace(**leaves), backend), strict=True))
    assert all(output is not None and output.requires_grad for output in trained.values())
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            found = dict(zip(names, call(case.replace(**leaves), backend), strict=True))
            assert all(output is not None and not output.requires_grad for output in found.values())
            assert_same_bits(found, {name: output.detach() for name, output in trained.items()})


@pytest.mark.parametrize("span", ["normal", "wide", "cancelling 22"])
@pytest.mark.parametrize("family", ["additive", "scores"])
def test_a_power_of_two_upstream(family: str, span: str, backend: str, isa: str) -> None:
    """A loss times a power of two has gradients times that power, to the last bit: no step on the way leaves the normal numbers, not even,
    but for Triton's kernels, with gradients of scores that are about to leave them."""
    case = build(family, Dims(2, 7, 37, 45, 6), span=span, hidden="both")
    given = {name: grad for name in ("grad_context", "grad_weights") if (grad := getattr(case, name)) is not None}
    once = results(case, backend)
    for power in (-60 if backend == "triton" else -100, -40, 15, 40, 80):
        got = results(case.replace(**{name: grad * 2.0**power for name, grad in given.items()}), backend)
        for name, expected in once.items():
            times = 2.0**power if name.startswith("d_") else 1.0
            large = expected.abs() > 2.0**-20  # times the power still a normal number
            assert large.any(), name
            assert torch.equal(got[name][large], (expected * times)[large]), (name, power)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_huge_upstream(family: str, backend: str, isa: str) -> None:
    """Gradients of scores near the largest number, for one query of many: nothing overflows that need not."""
    case = build(family, Dims(1, 6, 23, 34, 5))
    for name in ("grad_context", "grad_weights"):
        if (grad := getattr(case, name)) is not None:
            getattr(case, name)[:, 2] = grad[:, 2] * 2.0**110
    check(results(case, backend), case)


@pytest.mark.parametrize("dims", [Dims(2, 3, 5, 4, 900_005), Dims(2, 3, 5, 900_005, 4)], ids=str)
@pytest.mark.parametrize("family", ["additive", "multiplicative"])
def test_gradients_larger_than_a_cache(family: str, dims: Dims, backend: str, isa: str) -> None:
    """What is stored past the caches, 36 MB, has the bits of what is not: of each batch entry alone, 18 MB."""
    if backend != "cpu":
        pytest.skip("only the CPU kernels store past caches")
    case = build(family, dims)
    whole = results(case, backend)
    for b in range(2):
        entry = {name: tensor[b : b + 1] for name, tensor in case.inputs().items() if name != "v"}
        arriving = {name: getattr(case, name)[b : b + 1] for name in ("grad_context", "grad_weights")}
        alone = results(case.replace(**entry, **arriving), backend)
        for name in ("d_query", "d_keys", "d_values"):
            assert torch.equal(whole[name][b : b + 1], alone[name]), name
