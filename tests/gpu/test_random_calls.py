"""Calls and memories of any kind on a GPU: sizes, dtypes, ranges, what is hidden."""

import random

import pytest
import stand_in_gpu
import torch
from cases import DTYPES, FAMILIES, MASKS, RANGES, Dims, build
from gpu_cases import BACKENDS, found, moved, reasons_against, there
from memory_cases import HIDDEN, attended, build_for_memory
from tolerance import check

STEPS = (1, 1, 2, 3, 5, 8, 16, 17, 20)
SOURCES = (1, 2, 5, 16, 31, 33, 64, 70, 130)
WIDTHS = (1, 3, 7, 8, 9, 12, 16, 33, 64)


def drawn(rand: random.Random) -> Dims:
    """Few enough elements for the stand-in, too."""
    while True:
        dims = Dims(
            rand.randint(1, 3),
            rand.choice(STEPS),
            rand.choice(SOURCES),
            rand.choice(WIDTHS),
            rand.randint(1, 33),
            rand.choice((0, 0, 1, 2)),
        )
        if dims.batch * max(1, dims.heads) * dims.steps * dims.source * dims.width <= 20_000:
            return dims


@pytest.mark.parametrize("seed", range(10 if stand_in_gpu.CAPABILITY else 100))
def test_any_call(seed: int) -> None:
    rand = random.Random(seed)
    family, dtype, dims = rand.choice(FAMILIES), rand.choice(DTYPES), drawn(rand)
    options = {"span": rand.choice(list(RANGES)) if dtype in (torch.float32, torch.float64) else "normal", "seed": seed}
    if family != "scores" and rand.random() < 0.5:
        hidden = rand.choice([kind for kind in HIDDEN if dims.heads or kind != "per head"])
        case = build_for_memory(family, dims, dtype, hidden=hidden, **options)
        check(there(attended(moved(case), rand.choice(BACKENDS), by_step=rand.random() < 0.5)), case)
    else:
        case = build(family, dims, dtype, hidden=rand.choice(MASKS), **options)
        check(found(case, rand.choice([name for name in BACKENDS if not reasons_against(name, family, dims.steps)])), case)
