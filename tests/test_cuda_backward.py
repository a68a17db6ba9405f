"""The CUDA backward of additive scores: its compiled code on the PTX machine, right within the contract's bounds and without a finding; and
what compilers make of it for each architecture."""

import dataclasses
from typing import Any

import cuda_backward
import pytest
import torch
from cases import Case, Dims, Results, assert_same_bits, build, garbage, results
from cuda_backward import additive_backward
from cuda_machine import NVCC, compiled, launches, sizes_of
from gpu import sass
from ptx import Kernel
from tolerance import check

pytestmark = pytest.mark.skipif(NVCC is None, reason="needs nvcc, to compile kernels")

SMALL = Dims(batch=2, steps=3, source=37, width=12)
ARCHITECTURES = {"80": 164, "86": 100, "89": 100, "90": 228, "100": 228, "120": 100}  # and the KB of shared memory of a processor
SLOTS = {"90": 8.5, "100": 5.5}  # of an element


def clean(case: Case, processors: int = 1, architecture: str = "80", **options: Any) -> Results:
    found, machines = additive_backward(case, processors, architecture, **options)
    for machine in machines:
        assert not machine.findings, "\n".join(map(str, machine.findings))
    return found


def checked(case: Case, *where: Any, approximate: bool = False) -> None:
    found = clean(case, *where, approximate=approximate) | {"scores": results(case, "cpu")["scores"]}
    check(found, case, approximate=approximate)


@pytest.mark.parametrize("hidden", ["none", "lengths", "lengths per query", "holes", "shared", "spans", "one row hidden", "nothing"])
def test_visibility(hidden: str) -> None:
    checked(build("scores", SMALL, hidden=hidden))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtype(dtype: torch.dtype) -> None:
    checked(build("scores", SMALL, dtype, hidden="lengths"))


@pytest.mark.parametrize("width", [1, 9, 64, 130])
def test_width(width: int) -> None:
    """A lane's channels missing, one or both, and several blocks of channels; two tiles of queries."""
    checked(build("scores", Dims(batch=1, steps=17, source=9, width=width)))


def test_heads() -> None:
    checked(build("scores", Dims(batch=1, steps=5, source=20, width=12, heads=2), hidden="holes"))


@pytest.mark.parametrize("dims", [Dims(0, 3, 5, 4), Dims(2, 0, 5, 4), Dims(2, 3, 0, 4), Dims(2, 3, 5, 0)], ids=str)
def test_nothing_there(dims: Dims) -> None:
    checked(build("scores", dims))


@pytest.mark.parametrize(
    ("dims", "processors", "parts"), [(Dims(1, 3, 150, 12), 1, (2, 1)), (Dims(1, 50, 20, 12), 8, (1, 4))], ids=["source", "queries"]
)
def test_parts(dims: Dims, processors: int, parts: tuple[int, int]) -> None:
    """The source is split where it is too long for a block, queries where processors are idle; parts are added in order."""
    sizes = (1, 1, dims.steps, dims.source, dims.width, 0)
    assert tuple(launches("additive_backward", sizes, torch.float32, processors=processors)[0].cut[:2]) == parts
    checked(build("scores", dims, hidden="lengths"), processors)


@pytest.mark.parametrize(
    "span", ["zero", "small", "wide", "huge query", "cancelling 11", "cancelling 60", "one channel cancelling", "mixed channels", "huge v"]
)
def test_ranges(span: str) -> None:
    """Where reciprocals cannot merge, and where tanh is small."""
    checked(build("scores", SMALL, span=span))


@pytest.mark.parametrize("width", [4, 7, 8])
@pytest.mark.parametrize("span", ["wide", "cancelling 11", "large v"])
def test_few_channels(span: str, width: int) -> None:
    """Of one position too, whose gradients of v have no other terms to hide an error behind."""
    for seed in range(8):
        checked(build("scores", Dims(1, 3, 1, width), span=span, seed=seed))


def test_approximate_instructions() -> None:
    """``rcp.approx`` and ``ex2.approx`` as far off as they may be: within what that is granted, and of more queries without."""
    checked(build("scores", SMALL), approximate=True)
    case = build("scores", Dims(batch=1, steps=17, source=20, width=12))
    check(clean(case, approximate=True) | {"scores": results(case, "cpu")["scores"]}, case)


@pytest.mark.parametrize("architecture", ["90", "100"])
def test_architectures(architecture: str) -> None:
    """That of 10.0 packs two numbers into an instruction."""
    checked(build("scores", SMALL, hidden="lengths"), 1, architecture)


@pytest.mark.parametrize("hidden", ["lengths", "padding", "holes"])
@pytest.mark.parametrize("bad", [float("nan"), 3e4], ids=str)
def test_garbage_changes_no_bit(hidden: str, bad: float) -> None:
    """In keys that nobody sees, and in gradients of scores that are hidden."""
    case = build("scores", SMALL, hidden=hidden)
    dirty = garbage(case, bad)
    assert_same_bits(clean(dirty.replace(grad_weights=case.grad_weights.masked_fill(~case.visible(), bad))), clean(case))


def test_keys_that_others_see_change_no_bit() -> None:
    """A key far out of range sends its tile the careful way, on which whoever does not see it gets what he got before."""
    case = build("scores", Dims(batch=1, steps=4, source=24, width=12))
    mask = torch.ones(1, 4, 24, dtype=torch.bool)
    mask[:, :3, 5] = False
    case = case.replace(mask=mask)
    far = case.keys.clone()
    far[:, 5] = 1e6
    before, after = clean(case), clean(case.replace(keys=far))
    assert torch.equal(before["d_query"][:, :3], after["d_query"][:, :3])
    others = torch.arange(24) != 5
    assert torch.equal(before["d_keys"][:, others], after["d_keys"][:, others])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite(bad: float) -> None:
    """A query of NaN reaches its own gradients and those of the keys that it sees."""
    case = build("scores", SMALL, hidden="lengths")
    query = case.query.clone()
    query[0, 1, 3] = bad
    checked(case.replace(query=query))


@pytest.mark.parametrize(
    ("dims", "processors", "dtype", "hidden", "span"),
    [
        (SMALL, 1, torch.float32, "holes", "normal"),
        (SMALL, 1, torch.float64, "lengths", "normal"),
        (Dims(1, 17, 37, 70), 1, torch.bfloat16, "spans", "mixed channels"),
        (Dims(1, 3, 150, 12), 1, torch.float32, "lengths", "normal"),
        (Dims(1, 50, 20, 12), 8, torch.float32, "none", "small"),
    ],
    ids=str,
)
def test_query_not_asked_for(dims: Dims, processors: int, dtype: torch.dtype, hidden: str, span: str) -> None:
    """Gradients of keys and v are the same bits, where the source or queries are split too; the query's has no memory."""
    case = build("scores", dims, dtype, hidden=hidden, span=span)
    asked = clean(case, processors)
    asked.pop("d_query")
    assert_same_bits(clean(case, processors, of_query=False), asked)
    with_it, without = (launches("additive_backward", sizes_of(case), dtype, processors=processors, of_query=of) for of in (True, False))
    assert without[0].scratch == [0, *with_it[0].scratch[1:]]
    assert without[0].cut == with_it[0].cut
    assert (with_it[0].scratch[0] > 0) == (with_it[0].splits > 1)
    assert with_it[1].blocks - without[1].blocks == -(-with_it[0].scratch[0] // (with_it[0].splits * 256))


def test_repeats() -> None:
    case = build("scores", Dims(batch=2, steps=18, source=40, width=70), hidden="holes")
    assert_same_bits(clean(case), clean(case))


def test_a_deleted_barrier_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = cuda_backward.kernel

    def without_barriers(*of: str) -> Kernel:
        kernel = whole(*of)
        keeps = [item.opcode not in ("bar", "barrier") for item in kernel.instructions]
        assert not all(keeps)
        kept = [item for item, keep in zip(kernel.instructions, keeps, strict=True) if keep]
        return dataclasses.replace(kernel, instructions=kept, labels={name: sum(keeps[:place]) for name, place in kernel.labels.items()})

    monkeypatch.setattr(cuda_backward, "kernel", without_barriers)
    _, machines = additive_backward(build("scores", Dims(batch=1, steps=20, source=20, width=12)))
    assert all(any("race" in finding.kind for finding in machine.findings) for machine in machines)


def test_wavefronts() -> None:
    """Nothing meets a bank of shared memory twice."""
    _, machines = additive_backward(build("scores", Dims(batch=1, steps=64, source=128, width=64)))
    for machine in machines:
        assert machine.counts["shared wavefronts"] == machine.counts["shared wavefronts at least"] > 0


def test_traffic() -> None:
    """Past the L1, everything is read and written once, but gradients of scores once for each 64 channels."""
    case = build("scores", Dims(batch=1, steps=64, source=64, width=256))
    _, machines = additive_backward(case, cache=64 * 1024)
    moved = {name: traffic.fetched + traffic.written for name, traffic in machines[0].global_bytes.items()}
    rows, scores = 64 * 256 * 4, 64 * 64 * 4
    assert moved["additive_backward_f32_param_0.grad_scores.data"] == 4 * scores
    assert sum(moved.values()) / (4 * rows + scores) <= 1.3


@pytest.mark.parametrize("target", ARCHITECTURES)
def test_fits(target: str) -> None:
    """No spills, and as many blocks on a processor as launches count on."""
    kernels = compiled("additive_backward.cu", target)
    assert len(kernels) == 8
    assert all((kernel.spills, kernel.stack) == (0, 0) for kernel in kernels.values())
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for source in (5, 48, 100, 128, 400):
            found = launches("additive_backward", (32, 1, 64, source, 512, 0), dtype, processors=132, capability=int(target))[0]
            registers = -(-kernels[found.kernel].registers // 8) * 8 * found.threads
            assert found.resident * registers <= 65536
            assert found.resident * (found.shared + 1024) <= ARCHITECTURES[target] * 1024


@pytest.mark.parametrize("target", SLOTS)
def test_issue_slots(target: str) -> None:
    """Of the hot loop, whose trips have two queries with a lane's two channels and eight positions."""
    name = "additive_backward_f32"
    loops = [sass.issue(body) for body in sass.loops(compiled("additive_backward.cu", target)[name].program(name))]
    reciprocals = 2 * 2 * 8 // 2
    hot = [loop for loop in loops if loop.slots["mufu"] == reciprocals and loop.slots["global"] == 0]
    assert len(hot) == 1
    print(f"sm_{target}: {hot[0].total} slots for {2 * reciprocals} elements")
    assert hot[0].total / (2 * reciprocals) <= SLOTS[target]
