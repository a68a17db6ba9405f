"""Contract 7: a named backend never falls back; ``auto`` takes the best that serves, and says so if that is the reference."""

import importlib.util
import inspect
import subprocess
import sys
import warnings
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from cases import FAMILIES, build, call

import onepass
from onepass import _backends, _info, _library


@pytest.fixture
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """As on a machine without a compiler."""
    reason = "the CPU kernels were left at home"
    monkeypatch.setattr(_library, "error", reason)
    _backends._say_once.cache_clear()
    yield reason
    _backends._say_once.cache_clear()


@pytest.mark.parametrize("name", ["gpu", "", "CPU", "Triton"])
@pytest.mark.parametrize("family", FAMILIES)
def test_unknown(family: str, name: str) -> None:
    """An unknown backend is named, beside those that there are."""
    with pytest.raises(ValueError, match=rf"backend must be one of \('auto', 'cpu', 'cuda', 'triton', 'reference'\); got '{name}'"):
        call(build(family), name)


@pytest.mark.parametrize("family", FAMILIES)
def test_named_and_not_built(family: str, nothing_compiled: str) -> None:
    """``cpu`` raises the reason why it is not there."""
    with pytest.raises(RuntimeError, match=f"backend 'cpu' cannot serve this call: {nothing_compiled}"):
        call(build(family), "cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_named_and_wrong_device(family: str, backend: str) -> None:
    """``cpu`` names the device that it got and the one that it takes."""
    case = build(family)
    elsewhere = case.replace(**{name: tensor.to("meta") for name, tensor in case.inputs().items()})
    with pytest.raises(RuntimeError, match=r"backend 'cpu' cannot serve this call: .*serves tensors on the cpu, not on meta"):
        call(elsewhere, "cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_takes_the_kernels(family: str, backend: str) -> None:
    """``auto`` gives the bits of the backend under test, without a word where that is compiled."""
    case = build(family)
    with warnings.catch_warnings():
        if backend != "reference":
            warnings.simplefilter("error")
        found = call(case, "auto")
    for got, expected in zip(found, call(case, backend), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.filterwarnings("default")
def test_auto_says_once_that_it_takes_the_reference(nothing_compiled: str) -> None:
    """Nothing compiled: one warning with the reason, pointing at the caller, and the reference's result."""
    case = build("additive")
    with pytest.warns(UserWarning, match=f"plain torch reference.*{nothing_compiled}") as caught:
        context, _ = onepass.additive_attention(case.query, case.keys, case.values, case.v)
    assert caught[0].filename == __file__
    assert torch.equal(context, call(case, "reference")[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for family in FAMILIES:
            call(build(family), "auto")


def test_libraries_that_python_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library of other sources, as after an update without a build, is not taken; where there is none, Python defines the ops."""
    monkeypatch.setattr(_library, "SCHEMAS", ("stack_steps(Tensor[] steps) -> Tensor",))
    with pytest.raises(ImportError, match=r"onepass::\* was built from other sources than its Python"):
        _library._library("onepass", None)
    library = _library._library("onepass_of_a_test", "not built")
    assert str(torch.ops.onepass_of_a_test.stack_steps.default._schema) == "onepass_of_a_test::stack_steps(Tensor[] steps) -> Tensor"
    library._destroy()  # type: ignore[no-untyped-call]


@pytest.fixture
def compiled_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where Triton is installed and compiles: ``TRITON_INTERPRET`` is not set."""
    monkeypatch.setattr(_library, "INTERPRETED", False)
    monkeypatch.setattr(_library, "triton_error", None)


@pytest.mark.usefixtures("compiled_triton")
@pytest.mark.parametrize("family", FAMILIES)
def test_triton_without_a_gpu(family: str) -> None:
    """``triton`` named for tensors of the CPU raises, and says what it serves; ``info`` says so too."""
    with pytest.raises(RuntimeError, match="backend 'triton' cannot serve this call: it serves tensors on a GPU, not on cpu"):
        call(build(family), "triton")
    assert "backend     triton on cpu: not available: it serves tensors on a GPU, not on cpu" in _info.lines(measure=False)


def test_triton_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Triton it says how to get it, whatever the device."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(_library, "_cuda_ops", SimpleNamespace(impl=lambda *_: None))  # ops have their kernels, and take no others
    reason = _library._register_triton()
    assert reason == "triton is not installed (`pip install triton`)"
    monkeypatch.setattr(_library, "triton_error", reason)
    assert reason in _backends.not_supported_reasons("triton", torch.device("cpu"))
    with pytest.raises(RuntimeError, match="backend 'triton' cannot serve this call: triton is not installed"):
        call(build("additive"), "triton")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("has_numbers", [True, False])
def test_auto_serves_other_devices(family: str, has_numbers: bool, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that no kernel serves gets the reference, with a warning; but meta, where nothing is slow or large."""
    case = build(family)
    elsewhere = case.replace(**{name: tensor.to("meta") for name, tensor in case.inputs().items()})
    _backends._say_once.cache_clear()
    if has_numbers:
        monkeypatch.setattr(torch.Tensor, "is_meta", False)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        outputs = call(elsewhere, "auto")
    assert ["not on meta" in str(warning.message) for warning in said] == [True] * has_numbers
    assert all(output is not None and output.device.type == "meta" for output in outputs)


def test_reasons(nothing_compiled: str) -> None:
    """All reasons are given at once, and none for the reference."""
    assert _backends.not_supported_reasons("reference", torch.device("meta")) == []
    assert _backends.not_supported_reasons("cpu", torch.device("cpu")) == [nothing_compiled]
    assert len(_backends.not_supported_reasons("cpu", torch.device("meta"))) == 2


def test_import_and_calls_leave_the_compiler_alone() -> None:
    """torch's compiler, and Triton and sympy with it, would take longer to import than torch."""
    calls = """
        import sys, torch, onepass
        query, keys = torch.ones(2, 3, 8, requires_grad=True), torch.ones(2, 5, 8)
        onepass.additive_attention(query, keys, keys, torch.ones(8))[0].sum().backward()
        layer = onepass.MultiplicativeAttention(8, 8)
        layer(query[:, 0], layer.memory(keys))[0].sum().backward()
        print(*sorted({"torch._dynamo", "torch._inductor", "triton", "sympy"} & set(sys.modules)))
    """
    done = subprocess.run([sys.executable, "-c", inspect.cleandoc(calls)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == (["triton"] if _library.INTERPRETED else [])


def test_constants_of_graphs_are_marked_as_torch_marks_them() -> None:
    def marked() -> None: ...

    torch.compiler.assume_constant_result(marked)
    assert vars(marked).items() <= vars(_backends._capability).items()
    assert len(vars(marked)) == 1
