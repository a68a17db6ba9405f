"""An eager call goes past the Python that torch runs for gradients of a registered op. Nothing but time may tell the two ways apart."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import FAMILIES, Dims, build, call
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from onepass._library import ops_of

pytestmark = [pytest.mark.of_cpp, pytest.mark.parametrize("family", FAMILIES)]


def leaves_of(family: str) -> list[Tensor]:
    return [tensor.requires_grad_() for tensor in build(family, Dims(2, 3, 5, 9, 4)).inputs().values()]


def output(family: str, inputs: list[Tensor]) -> Tensor:
    """The context, or the scores."""
    case = build(family, Dims(2, 3, 5, 9, 4), hidden="none" if family == "scores" else "lengths")
    found: Tensor = call(case.replace(**dict(zip(case.inputs(), inputs, strict=True))), "cpu")[0]
    return found


@pytest.fixture
def as_registered(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From then on calls take the op as torch has it."""
    return lambda: monkeypatch.setattr("onepass.functional.call_op", lambda taken, op, *given: getattr(ops_of(taken), op)(*given))


def test_it_is_another_way(family: str, as_registered: Callable[[], None]) -> None:
    assert type(output(family, leaves_of(family)).grad_fn).__name__.startswith("onepass_")
    as_registered()
    assert type(output(family, leaves_of(family)).grad_fn).__name__.startswith("Generated")


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_are_the_same(family: str, batched: bool, as_registered: Callable[[], None]) -> None:
    def gradients() -> tuple[Tensor, ...]:
        leaves = leaves_of(family)
        found = output(family, leaves)
        arriving = torch.linspace(-1, 1, 7 * found.numel()).view(7, *found.shape)
        return torch.autograd.grad(found, leaves, arriving if batched else arriving[0], is_grads_batched=batched)

    short = gradients()
    as_registered()
    for one, other in zip(short, gradients(), strict=True):
        assert torch.equal(one, other)


def test_what_is_saved_is_the_same(family: str, as_registered: Callable[[], None]) -> None:
    def saved() -> list[list[int]]:
        shapes: list[list[int]] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (shapes.append(list(x.shape)), x)[1], lambda x: x):
            output(family, leaves_of(family))
        return sorted(shapes)

    short = saved()
    as_registered()
    assert short == saved()


def test_an_input_changed_in_place_is_noticed(family: str) -> None:
    for changed in range(len(leaves_of(family))):
        inputs = [leaf * 1 for leaf in leaves_of(family)]
        found = output(family, inputs)
        inputs[changed].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            found.sum().backward()


def test_without_data(family: str) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        leaves = [mode.from_tensor(leaf) for leaf in leaves_of(family)]
        output(family, leaves).sum().backward()
        assert [leaf.grad.shape for leaf in leaves if leaf.grad is not None] == [leaf.shape for leaf in leaves]


def test_a_graph_has_both_ops(family: str) -> None:
    """One that is made of what an eager call dispatches: no compiler, no transform."""

    def gradients(*inputs: Tensor) -> Any:
        return torch.autograd.grad(output(family, list(inputs)).sum(), inputs)

    targets = [str(node.target) for node in make_fx(gradients)(*leaves_of(family)).graph.nodes]
    forward, backward = (target for target in targets if "onepass" in target)
    assert "backward" in backward
    assert "backward" not in forward


def test_whoever_overrides_functions_is_in_the_graph(family: str) -> None:
    """A mode, or a kind of tensor, that computes with gradients on the way to the op."""
    factor = torch.tensor(2.0, requires_grad=True)

    def scaled(function: Any, arguments: Any, options: Any) -> Any:
        arguments = [x.plain if isinstance(x, Wrapped) else x for x in arguments]
        if "onepass" in str(function):
            arguments = [arguments[0] * factor, *arguments[1:]]
        return function(*arguments, **(options or {}))

    class Scaled(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return scaled(function, args, kwargs)

    class Wrapped(Tensor):
        plain: Tensor

        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            with torch._C.DisableTorchFunctionSubclass():
                return scaled(function, args, kwargs)

    leaves = leaves_of(family)
    wrapped = leaves[0].detach().as_subclass(Wrapped)
    wrapped.plain = leaves[0]
    with Scaled():
        by_mode = output(family, leaves)
    expected = output(family, [leaves[0] * factor, *leaves[1:]])
    inputs = [*leaves, factor]
    upstream = torch.linspace(-1, 1, expected.numel()).view_as(expected)
    want = torch.autograd.grad(expected, inputs, upstream)
    for found in (by_mode, output(family, [wrapped, *leaves[1:]])):
        for got, exact in zip(torch.autograd.grad(found, inputs, upstream), want, strict=True):
            assert torch.equal(got, exact)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_autograd(family: str) -> None:
    """A graph of the backward of an eager call."""
    expected, leaves = leaves_of(family), leaves_of(family)
    output(family, expected).sum().backward()
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(lambda: torch.compiler.disable(output)(family, leaves).sum().backward(), backend="eager")()
    for got, want in zip(leaves, expected, strict=True):
        assert torch.equal(got.grad, want.grad)  # type: ignore[arg-type]
