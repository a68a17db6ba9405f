"""Every provider computes what its family's reference does, or says why it cannot; a wrong one is refused."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from onepass.benchmarks import catalogue, g2p, installed, keras_peers
from onepass.benchmarks.check_peers import verdict
from onepass.benchmarks.checks import as_tensors, standard_apart, wrong
from onepass.benchmarks.layer_providers import Parts
from onepass.benchmarks.providers import EAGER, PROVIDERS, Provider, UnavailableError
from onepass.benchmarks.workloads import BOTH, FAMILIES, FORWARD, Shape, Workload

assert catalogue

COMPILERS = ("torch.compile", "FlexAttention")  # seconds for each case, of formulas that eager's cases have
CASES = [(found, family) for found in PROVIDERS for family in sorted(found.families) if found.name not in COMPILERS]
OF_LAYERS = [(found, family) for found, family in CASES if "layer" in family and found.name != EAGER]


def ids(cases: list[tuple[Provider, str]]) -> list[str]:
    return [f"{found.name}-{family}" for found, family in cases]


def small(family: str, dtype: torch.dtype = torch.float32) -> Workload:
    return Workload(family, FAMILIES[family].small, dtype).make()


def named(name: str, family: str) -> Provider:
    (found,) = (found for found in PROVIDERS if found.name == name and family in found.families)
    return found


@pytest.mark.parametrize(("provider", "family"), CASES, ids=ids(CASES))
def test_a_provider_is_right_or_says_why_it_is_not_there(provider: Provider, family: str) -> None:
    assert verdict(provider, family) == "; ".join(provider.not_supported_reasons(small(family)))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_exact_results_are_eagers_in_float64(family: str) -> None:
    """To less than one rounding of float32, or the check could not tell who is wrong."""
    workload = small(family, torch.float64)
    exact = FAMILIES[family].expected(workload)
    for direction in FAMILIES[family].directions:
        results = as_tensors(named(EAGER, family).prepare(workload, direction)())
        assert len(results) == len(exact[direction])
        for result, (value, size) in zip(results, exact[direction], strict=True):
            assert (size >= value.abs() * (1 - 1e-6)).all()
            assert ((result - value).abs() <= torch.finfo(torch.float32).eps * size).all()


@pytest.mark.parametrize("direction", [FORWARD, BOTH])
@pytest.mark.parametrize(("provider", "family"), OF_LAYERS, ids=ids(OF_LAYERS))
def test_a_wrong_weight_is_refused(provider: Provider, family: str, direction: str) -> None:
    workload = small(family)
    if reasons := provider.not_supported_reasons(workload):
        pytest.skip("; ".join(reasons))
    exact = FAMILIES[family].expected(workload)[direction]
    eager = as_tensors(named(EAGER, family).prepare(workload, direction)())
    for name in set(workload.tensors) - {"query", "memory", "upstream"}:
        other = small(family)
        with torch.no_grad():
            other.tensors[name] *= 1.01
        results = as_tensors(provider.prepare(other, direction)())
        assert list(wrong(exact, {EAGER: eager, provider.name: results}, workload.dtype)) == [provider.name], name


@pytest.mark.parametrize("family", [f"{function} {kind}" for function in ("additive", "multiplicative") for kind in ("steps", "decoding")])
def test_a_memory_in_fewer_bits_is_held_to_what_it_keeps(family: str) -> None:
    """Half a percent more in multiplicative keys or values is refused; in additive ones, whose exponentials may round either way, five."""
    workload, provider, direction = small(family), named("onepass cpu, bfloat16", family), FAMILIES[family].directions[0]
    if reasons := provider.not_supported_reasons(workload):
        pytest.skip("; ".join(reasons))
    exact = FAMILIES[family].expected(workload)[direction]
    eager = as_tensors(named(EAGER, family).prepare(workload, direction)())
    apart = {provider.name: standard_apart(workload, torch.bfloat16, direction)}
    assert wrong(exact, {EAGER: eager, provider.name: as_tensors(provider.prepare(workload, direction)())}, torch.float32, apart) == {}
    for name in ("keys", "values"):
        other = small(family)
        with torch.no_grad():
            other.tensors[name] *= 1.05 if family.startswith("additive") else 1.005
        results = as_tensors(provider.prepare(other, direction)())
        assert list(wrong(exact, {EAGER: eager, provider.name: results}, torch.float32, apart)) == [provider.name], name


class Foreign(nn.Module):
    """As a peer may have it: matrices ``[in, out]``, ``v [A, 1]``, biases that the family has not."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(shape.A, shape.A))
        self.u = nn.Linear(shape.D, shape.A)
        self.v = nn.Parameter(torch.randn(shape.A, 1))

    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        scores = torch.tanh((query @ self.w).unsqueeze(1) + self.u(memory)) @ self.v
        return (torch.softmax(scores, 1) * memory).sum(1)


def test_a_layer_of_other_conventions_is_given_the_weights_and_its_gradients_are_turned_back() -> None:
    shape = FAMILIES["additive layer"].small
    workload = small("additive layer")
    layer = Foreign(shape)
    names = {"W_q": "w", "W_k": "u.weight", "v": "v"}
    parts = Parts(layer, names, lambda memory: lambda query: layer(query, memory), transposed=("W_q",))
    exact = FAMILIES["additive layer"].expected(workload)
    for direction in (FORWARD, BOTH):
        results = {name: as_tensors(run()) for name, run in (
            (EAGER, named(EAGER, "additive layer").prepare(workload, direction)), ("foreign", parts.run(workload, direction))
        )}  # fmt: skip
        assert wrong(exact[direction], results, workload.dtype) == {}
    assert not layer.u.bias.requires_grad
    assert not layer.u.bias.any()


def test_only_a_layer_that_can_takes_all_queries_at_once() -> None:
    calls = []

    def at_once(query: Tensor, memory: Tensor) -> Tensor:
        calls.append(query.shape)
        return query

    def step(query: Tensor) -> Tensor:
        calls.append(query.shape)
        return query

    for family, expected in (("additive layer", [(2, 3, 16)]), ("additive layer steps", 3 * [(2, 16)])):
        calls.clear()
        Parts(nn.Identity(), {}, lambda memory: step, at_once).run(small(family), FORWARD)()
        assert calls == expected


def test_opennmt_has_one_width() -> None:
    for width, reasons in ((16, []), (24, ["its layer has one width for all states; got 16 and 24"])):
        workload = Workload("additive layer", FAMILIES["additive layer"].small._replace(D=width))
        assert named("OpenNMT-py", "additive layer").more_reasons(workload) == reasons


def package(folder: Path, name: str, **files: str) -> None:
    (folder / name).mkdir()
    for file, text in {"__init__": "raise RuntimeError('heavy')", **files}.items():
        (folder / name / f"{file}.py").write_text(text)


def test_a_module_comes_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    layer = "import absent_one.deep\nfrom absent_one import thing\nfrom .other import value"
    package(tmp_path, "heavy_peer", layer=layer, other="value = 3")
    package(tmp_path, "other_peer", layer="import absent_two")
    found = installed.module("heavy_peer.layer", without=("absent_one",))
    assert found.value == 3
    with pytest.raises(TypeError):
        found.thing(1)
    assert not [name for name in sys.modules if name.startswith("absent_one")]
    assert [finder for finder in sys.meta_path if type(finder).__module__ == installed.__name__] == []
    with pytest.raises(ModuleNotFoundError, match="absent_two"):
        installed.module("other_peer.layer", without=("absent_one",))
    with pytest.raises(ModuleNotFoundError, match="no_such_peer"):
        installed.module("no_such_peer.layer")


def test_keras_on_another_backend_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = SimpleNamespace(backend=SimpleNamespace(backend=lambda: "torch"))
    monkeypatch.setitem(sys.modules, "keras", elsewhere)
    with pytest.raises(UnavailableError, match="KERAS_BACKEND=jax"):
        keras_peers.function(small("additive"), FORWARD)


def test_peers_are_pinned_and_bring_no_torch() -> None:
    lines = (Path(installed.__file__).with_name("peers.txt")).read_text().splitlines()
    pins = [line.split("#")[0].strip() for line in lines if not line.startswith("#")]
    assert pins
    assert all(pin.count("==") == 1 for pin in pins)
    assert not any(pin.startswith("torch") for pin in pins)


def test_the_training_step_changes_nothing() -> None:
    """Or its later calls would not be the problem that was checked."""
    run = g2p.fused(small(g2p.NAME), BOTH)
    for one, other in zip(as_tensors(run()), as_tensors(run()), strict=True):
        assert torch.equal(one, other)


def test_limits_of_a_decoding_step() -> None:
    family, workload = FAMILIES["additive decoding"], small("additive decoding")
    cost = family.cost(workload, FORWARD)
    assert (cost.multiply_adds, cost.bytes) == (2 * 5 * (3 * 16 + 16), 4 * 2 * 5 * (16 + 16))
    slow = {"fma": 1.0, "read": 1.0}  # arithmetic is the longer
    found = family.metrics(workload, FORWARD, {"onepass cpu": [1000.0, 1280.0, 3000.0], "read": [1.0]}, slow)
    assert found["onepass cpu"]["limit seconds"] == cost.multiply_adds == 640
    assert found["onepass cpu"]["of the limit"] == 0.5
    assert "read" not in found
    assert family.metrics(workload, FORWARD, {"onepass cpu": [1.0], "read": [1.0]}, {}) == {}


def test_what_beams_and_overhead_add() -> None:
    seconds = {"onepass cpu": [1.0, 2.0], "onepass cpu, copies": [3.0, 6.0], EAGER: [9.0, 9.0]}
    assert FAMILIES["additive beams"].metrics(small("additive beams"), FORWARD, seconds, {}) == {"onepass cpu": {"over copies": 3.0}}
    steps = FAMILIES["additive overhead"].metrics(small("additive overhead"), FORWARD, {EAGER: [0.02]}, {})
    assert steps[EAGER]["microseconds a step"] == pytest.approx(20)
