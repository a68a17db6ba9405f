"""Triton kernels compiled for GPUs that are not here: nothing spills, as many warps fit as the tiles are sized for, the hot loops keep to
their issue slots."""

from typing import Any

import pytest

pytest.importorskip("triton", reason="needs triton, to compile kernels")

import torch
from gpu import sass
from gpu.catalogue import BAR, Entry, entries
from gpu.compiled import compile_entry, program, resources, source_of
from gpu.devices import device_of, occupancy
from gpu.ptx_loops import unrolled
from gpu.traffic import TARGET, execute

from onepass.kernels.launches import recorded
from onepass.kernels.ops import OPS
from onepass.kernels.tiles import TRITON, WARPS, Device

NVIDIA = ("80", "90", "100", "120")
SLOTS = {  # of an element on sm_90, where T, S >= 64; scores' gradients without the query's
    "additive_forward: attend": 4.1, "additive_backward: tanh_gradients": 10.0, "additive_scores_backward: tanh_gradients": 8.5,
}  # fmt: skip
MOVED = [
    "additive_forward: attend", "additive_backward: weight_gradients", "additive_backward: tanh_gradients", "additive_backward: sums",
    "additive_scores_backward: tanh_gradients",
]  # fmt: skip
SPILLS: dict[str, int] = {}  # instructions that store or load one, by kernel; none elsewhere
BYTES = dict.fromkeys(MOVED, 1.3)  # past the L1, over the necessary ones
if TRITON < (3, 9):
    BYTES["additive_backward: sums"] = 2.0
if TRITON < (3, 8):  # with larger products, of which a thread holds more (kernels/tiles.py): it takes fewer columns at a time
    BYTES |= {"additive_forward: attend": 1.64, "additive_backward: sums": 2.8}
    SPILLS |= {"tanh_gradients": 12, "weight_gradients": 7, "attend_online": 8}
if TRITON < (3, 7):
    SLOTS |= {"additive_backward: tanh_gradients": 11.8, "additive_scores_backward: tanh_gradients": 10.5}
    SPILLS |= {"tanh_gradients": 93, "weight_gradients": 12, "attend": 43}


def different(target: str) -> list[Entry]:
    """One entry for each code that is made."""
    found = {(entry.name, str(entry.constants), str(entry.signature), entry.divisible): entry for entry in entries(target)}
    return list(found.values())


def names(target: str) -> list[str]:
    return [f"{entry.name} ({entry.tile}) {entry.shape}" for entry in different(target)]


def cases() -> list[Any]:
    """Every code for every target; with positions hidden, for one of each kind of machine: 9.0, 10.0 with packed arithmetic, and AMD's."""
    found = []
    for number, (entry, name) in enumerate(zip(different("80"), names("80"), strict=True)):
        hides = entry.constants.get("LIMITS", 0) > 0 or entry.constants.get("MASK", False) or entry.constants.get("HIDES", False)
        for target in ("90", "100", "gfx942") if hides else (*NVIDIA, "gfx942"):
            found.append(pytest.param(number, target, id=f"{target}-{name}"))
    return found


@pytest.mark.parametrize(("number", "target"), cases())
def test_fits(number: int, target: str) -> None:
    """No spills since Triton 3.8, eight warps to a processor. On AMD, what compiles without a word is what can be said."""
    entry = different(target)[number]
    compiled = compile_entry(entry, target)
    needs = resources(compiled)
    assert needs.spills <= SPILLS.get(entry.name.split(": ")[1], 0), needs
    if target in NVIDIA:
        fits = occupancy(device_of(target), needs.registers, needs.shared, entry.warps)
        assert fits.blocks * entry.warps >= WARPS, needs


@pytest.mark.parametrize("name", SLOTS)
def test_issue_slots(name: str) -> None:
    """Of the hot loop, an element of B T S A, in the tile for many queries."""
    entry = next(entry for entry in entries("90") if entry.name == name)
    compiled = compile_entry(entry, "90")
    source = source_of(entry.hot)
    body = sass.hot_loop(program(compiled), source)
    assert body is not None
    assert entry.elements is not None
    assert sass.issue(body).total / (entry.elements * unrolled(body, compiled.text, source)) <= SLOTS[name]


@pytest.mark.parametrize("name", MOVED)
def test_bytes(name: str) -> None:
    """Of global memory past the L1, for 64 queries, 512 positions and widths of 512, on the PTX machine: over those that must move."""
    entry = next(entry for entry in entries(TARGET) if entry.name == name)
    assert entry.shape == str(BAR)
    done = execute(entry)
    assert done["findings"] == []
    print(f"{name}: {done['ratio']:.3f}")
    assert done["ratio"] <= BYTES[name]


@pytest.mark.parametrize("family", ["additive", "multiplicative"])
def test_a_step_reads_once(family: str) -> None:
    """Keys and values of one query, split over many programs."""
    step = next(e for e in entries(TARGET) if e.name == f"{family}_forward: attend" and "T 1," in e.shape and e.constants["LIMITS"] == 0)
    done = execute(step)
    assert done["findings"] == []
    B, S, width = 2, 512, 256
    assert [done["arguments"][name]["loaded"] for name in ("p_k", "p_values")] == [4 * B * S * width] * 2


@pytest.mark.parametrize("target", ["80", "90"])
@pytest.mark.parametrize("hidden", ["nothing", "lengths", "spans", "mask"])
def test_float64(hidden: str, target: str) -> None:
    """Has instructions of its own for products: whatever hides positions, some are found."""
    B, T, S, A, D = 2, 5, 33, 12, 9
    query, keys, values, v = (torch.ones(sizes, dtype=torch.float64) for sizes in ((B, T, A), (B, S, A), (B, S, D), (A,)))
    gradient, weights = torch.ones(B, T, D, dtype=torch.float64), torch.ones(B, T, S, dtype=torch.float64)
    lengths = {"lengths": torch.tensor([S, 3]), "spans": torch.tensor([0, S]).expand(B, T, 2)}.get(hidden)
    seen = lengths, torch.ones(B, T, S, dtype=torch.bool) if hidden == "mask" else None
    with recorded(Device(132)) as launches:
        OPS["additive_forward"](query, keys, values, v, *seen)
        OPS["additive_backward"](gradient, None, query, keys, values, v, weights, *seen)
        OPS["multiplicative_forward"](query, keys, values, 1.0, *seen, False)
        OPS["multiplicative_backward"](gradient, None, query, keys, values, 1.0, weights, *seen)
    kernels = {launch.name for launch in launches if launch.compile(int(target)).asm["ptx"]}
    assert {"attend", "attend_online", "sums", "weight_gradients", "tanh_gradients"} <= kernels
