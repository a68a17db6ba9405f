"""onepass.benchmarks: who takes part and who is right; what is counted and measured."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import tolerance
import torch
from cases import Case
from torch import Tensor

from onepass.benchmarks import catalogue, ceilings, memory, plan, providers, timing
from onepass.benchmarks.checks import wrong
from onepass.benchmarks.providers import EAGER, PROVIDERS, UnavailableError, differentiated, eager_additive, provider
from onepass.benchmarks.records import FAILED, MEASURED, MISSING, WRONG, Record
from onepass.benchmarks.study import Study
from onepass.benchmarks.workloads import BOTH, FAMILIES, FORWARD, Cost, Exact, Run, Shape, Workload

assert catalogue
TINY = Shape("tiny", 2, 3, 5, 16, 4)
FUNCTIONS = ("additive", "multiplicative", "scores")


def tiny(family: str = "additive") -> Workload:
    return Workload(family, FAMILIES[family].fitted(TINY))


@pytest.fixture
def more() -> Iterator[None]:
    """Providers that a test registers are gone after it."""
    before = list(PROVIDERS)
    yield
    PROVIDERS[:] = before


def study(*names: str, family: str = "additive") -> dict[tuple[str, str], Record]:
    found = Study({"onepass cpu", EAGER, *names}, rounds=2, turn=1e-4).speed(tiny(family))
    return {(record.provider, record.direction): record for record in found}


def scaled(factor: float, workload: Workload, direction: str) -> Run:
    return differentiated(lambda *inputs: eager_additive(*inputs) * factor, workload, direction)


@pytest.mark.parametrize("family", FUNCTIONS)
def test_a_run_has_times_and_metrics(family: str) -> None:
    found = study(family=family)
    assert set(found) == {(name, direction) for name in ("onepass cpu", EAGER) for direction in (FORWARD, BOTH)}
    for (name, _), record in found.items():
        assert record.status == MEASURED
        assert len(record.seconds) == 2
        assert record.quantiles["0.05"] <= record.quantiles["0.5"] <= record.quantiles["0.95"]
        assert record.metrics["elements/s"] == pytest.approx(2 * 3 * 5 * 16 / record.median)
        assert ("over best peer" in record.metrics) == (name != EAGER)
    assert found[EAGER, FORWARD].metrics["over eager"] == 1.0


@pytest.mark.parametrize("size", [1.0, 8.0])
@pytest.mark.parametrize("T", [1, 3, 40])
@pytest.mark.parametrize("family", FUNCTIONS)
def test_no_more_is_granted_than_the_contract_grants(family: str, T: int, size: float) -> None:
    """One rounding of the sums of the terms' magnitudes is within the derived floor of every element, also where tanh is flat."""
    workload = Workload(family, FAMILIES[family].fitted(TINY._replace(T=T)))
    workload.make()
    for x in workload.inputs[:2]:
        x.detach().mul_(size)
    query, keys, *rest = (x.detach() for x in workload.inputs)
    values, v = (rest[0] if family != "scores" else keys[..., :0]), (rest[-1] if family != "multiplicative" else query.new_zeros(16))
    upstream = {"grad_weights" if family == "scores" else "grad_context": workload.tensors["upstream"]}
    floors = tolerance.floors(Case(family, query, keys, values, v, **upstream).to(torch.float64), torch.float32, torch.float32)
    exact = FAMILIES[family].expected(workload)
    names = ("scores" if family == "scores" else "context", "d_query", "d_keys", *(("d_values",) if family != "scores" else ()))
    names += () if family == "multiplicative" else ("d_v",)
    for name, (_, size) in zip(names, (*exact[FORWARD], *exact[BOTH]), strict=True):
        assert (torch.finfo(torch.float32).eps * size <= floors[name] * (1 + 1e-9)).all(), name


@pytest.mark.usefixtures("more")
def test_a_wrong_provider_has_no_time() -> None:
    provider("off", {"additive"})(lambda workload, direction: scaled(1.001, workload, direction))
    provider("NaN", {"additive"})(lambda workload, direction: scaled(float("nan"), workload, direction))
    found = study("off", "NaN")
    for name in ("off", "NaN"):
        for direction in (FORWARD, BOTH):
            assert found[name, direction].status == WRONG
            assert found[name, direction].reason.startswith("output 0: off by")
            assert not found[name, direction].seconds
    assert found["onepass cpu", BOTH].seconds


@pytest.mark.usefixtures("more")
def test_who_is_not_there_says_why() -> None:
    prepare = providers.eager
    provider("absent", {"additive"}, needs={"no_such.module": "pip install it"})(prepare)
    provider("elsewhere", {"additive"}, devices=("cuda",))(prepare)
    provider("wide", {"additive"}, dtypes=(torch.float64,))(prepare)

    @provider("half", {"additive"})
    def half(workload: Workload, direction: str) -> Run:
        if direction == BOTH:
            raise UnavailableError("it has no backward")
        return prepare(workload, direction)

    @provider("crash", {"additive"})
    def crash(workload: Workload, direction: str) -> Run:
        raise RuntimeError("out of luck\nmore")

    found = study("absent", "elsewhere", "wide", "half", "crash")
    assert found["absent", FORWARD].reason == "no_such.module is not installed (pip install it)"
    assert found["elsewhere", FORWARD].reason == "it serves cuda here, not cpu"
    assert found["wide", FORWARD].reason == "it serves float64 here, not float32"
    assert {found[name, BOTH].status for name in ("absent", "elsewhere", "wide", "half")} == {MISSING}
    assert found["half", FORWARD].status == MEASURED
    assert found["half", BOTH].reason == "it has no backward"
    assert (found["crash", FORWARD].status, found["crash", FORWARD].reason) == (FAILED, "RuntimeError: out of luck")


@pytest.mark.usefixtures("more")
def test_without_eager_nobody_has_a_time() -> None:
    def out_of_memory(workload: Workload, direction: str) -> Run:
        raise MemoryError("of 3 TiB")

    PROVIDERS[:] = [replace(p, prepare=out_of_memory) if p.name == EAGER else p for p in PROVIDERS]
    found = study()
    assert (found[EAGER, FORWARD].status, found[EAGER, FORWARD].reason) == (FAILED, "MemoryError: of 3 TiB")
    assert (found["onepass cpu", FORWARD].status, found["onepass cpu", FORWARD].seconds) == (MISSING, [])


def test_names_of_providers() -> None:
    assert "onepass reference" not in providers.named(None)
    assert {"onepass cpu", "onepass reference"} <= providers.named(["onepass"])
    assert providers.named(["eager"]) == {"eager"}
    assert not {"torch.compile", "jax.jit"} & providers.named(None, compiling=False)
    with pytest.raises(ValueError, match=r"no provider torch\.jit; there are"):
        providers.named(["eager", "torch.jit"])


def test_the_check_grants_twice_eagers_error_and_a_rounding() -> None:
    value, size, eps = torch.ones(2).double(), torch.tensor([1.0, 4.0]).double(), torch.finfo(torch.float32).eps

    def verdict(*off: float) -> bool:
        results: dict[str, tuple[Tensor, ...]] = {"eager": (value + eps,), "other": (value + torch.tensor(off).double(),)}
        return not wrong([Exact(value, size)], results, torch.float32)

    assert verdict(2.9 * eps, 5.9 * eps)
    assert not verdict(3.1 * eps, 0)
    assert not verdict(0, 6.1 * eps)
    assert not verdict(float("nan"), 0)
    results = {"eager": (value,), "long": (value, value), "wide": (torch.ones(3),)}
    assert set(wrong([Exact(value, size)], results, torch.float32)) == {"long", "wide"}


@pytest.mark.parametrize("family", FUNCTIONS)
def test_sizes_bound_the_exact_results_and_bytes_are_those_of_inputs_and_results(family: str) -> None:
    workload = tiny(family).make()
    exact = FAMILIES[family].expected(workload)
    for direction in (FORWARD, BOTH):
        for value, size in exact[direction]:
            assert value.shape == size.shape
            assert bool((value.abs() <= size * (1 + 1e-12)).all())
    moved = sum(x.nbytes for x in workload.inputs) + 4 * exact[FORWARD][0].value.numel()
    assert FAMILIES[family].cost(workload, FORWARD).bytes == moved
    assert FAMILIES[family].cost(workload, BOTH).bytes == moved + 4 * sum(x.value.numel() for x in exact[BOTH])


def test_the_roofline() -> None:
    rates = {"fma": 100.0, "read": 20.0, "cache": 50.0}
    assert ceilings.attainable(1.0, rates) == 20.0
    assert ceilings.attainable(5.0, rates) == ceilings.attainable(50.0, rates) == 100.0
    assert ceilings.attainable(1.0, rates, "cache") == 50.0
    assert ceilings.share(Cost(1, 100, 10), 2.0, rates) == 0.5  # a second of arithmetic, half a second of bytes
    assert ceilings.share(Cost(1, 100, 40), 4.0, rates) == 0.5  # two seconds of bytes


def test_everyone_has_a_turn_in_every_round() -> None:
    calls: list[str] = []
    runs: dict[str, Run] = {name: lambda name=name: calls.append(name) for name in "ab"}  # type: ignore[misc]
    after: list[int] = []
    seconds = timing.rounds(runs, 3, turn=2.0, clock=lambda run: run() or 1.0, after_round=lambda: after.append(len(calls)))  # type: ignore[func-returns-value]
    assert calls == list("aaabbb" * 4)  # once untimed, then two of a second each; a round to warm up
    assert seconds == {name: [[1.0, 1.0]] * 3 for name in "ab"}
    assert after == [6, 12, 18, 24]


def test_memory_is_what_a_call_takes_beyond_its_results() -> None:
    """In a process of its own: what this one has freed before may serve again, and stays resident."""
    run = "lambda: torch.ones(1 << 23).repeat(2)[: 1 << 23].clone()"  # 32 and 64 MiB, then a result of 32
    code = f"import torch; from onepass.benchmarks import memory; run = {run}; run(); print(memory.beyond_results(run, 'cpu'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) / 2**20 == pytest.approx(64, abs=4)


def test_peaks_of_processes() -> None:
    workload = Workload("additive", Shape("", 4, 32, 64, 64, 16))
    whole = 4 * 4 * 32 * 64 * 64  # a tensor of B T S A floats, of which eager keeps several
    assert memory.peak(EAGER, workload, BOTH) > whole
    assert memory.peak("onepass cpu", workload, BOTH) < whole / 2
    with pytest.raises(UnavailableError, match="no backward on a CPU"):
        memory.peak("FlexAttention", tiny("multiplicative"), BOTH)


def test_a_plan_takes_names_and_sizes() -> None:
    measured = Study({EAGER}, rounds=2)
    named = plan.jobs(measured, families=["additive", "scores"], shapes=["NMT", "2x3x4x5x6"])
    assert [job.title for job in named] == ["additive, NMT", "additive, 2x3x4x5x6", "scores, NMT", "scores, 2x3x4x5x6"]
    assert {job.steps for job in named} == {6}  # two directions, two rounds and one to warm up
    titles = [job.title for job in plan.jobs(measured, families=["additive"], bars=True)]
    assert titles[:3] == ["additive, NMT", "additive, summarisation", "additive, torch 128x10"]
    assert {"memory, additive, S 4096", "threads, additive, NMT"} <= set(titles)
    quick = [job.title for job in plan.jobs(measured, quick=True)]
    assert [title for title in quick if not title.startswith(("memory", "threads"))] == [f"{family}, G2P" for family in FUNCTIONS]
    for wanted, message in (
        ({"families": ["dot"]}, "no family 'dot'; there are additive"),
        ({"shapes": ["NTM"]}, "no shape 'NTM'; there are NMT"),
        ({"shapes": ["2x3x4"]}, "sizes are B, T, S, A and D"),
        ({"dtypes": ["float8"]}, "no dtype 'float8'"),
    ):
        with pytest.raises(ValueError, match=message):
            plan.jobs(measured, **wanted)  # type: ignore[arg-type]
