"""What to measure, as jobs: of families, shapes and dtypes that a user named, or of those that a quick run or the README takes."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from .providers import FLOATS, FUNCTIONS, PROVIDERS, mine, providers
from .records import Record
from .study import Study
from .workloads import FAMILIES, Family, Shape, Workload

OVER_S = Shape("over S", 4, 32, 128, 128, 128)  # for peak memory
LENGTHS, LENGTHS_QUICK = (128, 256, 512, 1024, 2048, 4096), (128, 512, 2048)
Thing = TypeVar("Thing")


@dataclass(frozen=True)
class Job:
    """A part of the whole; ``steps`` is how often it calls ``Study.after_round``."""

    title: str
    steps: int
    records: Callable[[], Iterator[Record]]


def speed(study: Study, workload: Workload) -> Job:
    steps = len(FAMILIES[workload.family].directions) * (study.rounds + 1)
    return Job(f"{workload.family}, {workload.shape.name}", steps, partial(study.speed, workload))


def memory(study: Study, workload: Workload) -> Job:
    direction = FAMILIES[workload.family].directions[-1]
    title = f"memory, {workload.family}, S {workload.shape.S}"
    return Job(title, len(study.with_peaks(workload)), partial(study.peaks, workload, direction))


def threads(study: Study, workload: Workload) -> Iterator[Job]:
    own = sum(map(mine, study.only & providers(workload)[0].keys()))
    for direction in FAMILIES[workload.family].directions:
        title = f"threads, {workload.family}, {workload.shape.name}"
        yield Job(title, own * (study.rounds + 1), partial(study.scaling, workload, direction, thread_counts()))


def thread_counts() -> list[int]:
    """Powers of two up to all of them, and all of them."""
    most = torch.get_num_threads()
    return sorted({1, most} | {1 << i for i in range(most.bit_length()) if 1 << i <= most})


def jobs(
    study: Study,
    device: str = "cpu",
    families: Collection[str] | None = None,
    shapes: Sequence[str] | None = None,
    dtypes: Sequence[str] = ("float32",),
    quick: bool = False,
    bars: bool = False,
) -> list[Job]:
    """Raises ``ValueError`` for names that nothing has."""
    chosen = [_known(FAMILIES, name, "family") for name in families] if families else [f for f in FAMILIES.values() if f.quick or not quick]
    for family in chosen if families else ():
        if not any(found.name in study.only and family.name in found.families for found in PROVIDERS):
            raise ValueError(f"no provider that is asked for has {family.name}")
    formats = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}
    kinds = [_known(formats, name, "dtype") for name in dtypes]
    taken = {family.name: list(_shapes(family, shapes, quick, bars)) for family in chosen}
    for name in shapes or ():
        if not any(shape.name == name for of_family in taken.values() for shape in of_family):
            there = dict.fromkeys(shape.name for family in chosen for shape in family.shapes)
            raise ValueError(f"no shape {name!r}; there are {', '.join(there)}, or sizes as 32x32x48x512x1024")
    every = [Workload(family.name, shape, dtype, device) for family in chosen for dtype in kinds for shape in taken[family.name]]
    found = [speed(study, workload) for workload in every]
    if bars or quick:
        found += [memory(study, workload) for workload in _over_s(chosen, device, quick)]
        of_bars = [workload for workload in every if bars and workload.shape.name in FAMILIES[workload.family].bars]
        promised = [w for w in of_bars if FAMILIES[w.family].budget(w, FAMILIES[w.family].directions[-1])]
        found += [memory(study, workload) for workload in promised]
        scaled = [w for w in every if w.family == "additive" or (w in of_bars and w.family in FUNCTIONS)]
        found += [job for workload in scaled if device == "cpu" for job in threads(study, workload)]
    return found


def _shapes(family: Family, asked: Sequence[str] | None, quick: bool, bars: bool) -> Iterator[Shape]:
    if asked:
        for name in asked:
            yield from _sized(family, name) if name[:1].isdigit() else (shape for shape in family.shapes if shape.name == name)
    elif quick:
        yield min(family.shapes, key=lambda shape: shape.B * shape.T * shape.S * (shape.A + shape.D))
    else:
        yield from (shape for shape in family.shapes if not bars or shape.name in family.bars)


def _sized(family: Family, text: str) -> Iterator[Shape]:
    sizes = [int(size) if size.isdigit() else 0 for size in text.split("x")]
    if len(sizes) != 5 or min(sizes) < 1:
        raise ValueError(f"sizes are B, T, S, A and D, as 32x32x48x512x1024; got {text!r}")
    yield family.fitted(Shape(text, *sizes))


def _over_s(families: Sequence[Family], device: str, quick: bool) -> Iterator[Workload]:
    if any(family.name == "additive" for family in families):
        for S in LENGTHS_QUICK if quick else LENGTHS:
            yield Workload("additive", OVER_S._replace(S=S), device=device)


def _known(names: Mapping[str, Thing], name: str, kind: str) -> Thing:
    if name not in names:
        raise ValueError(f"no {kind} {name!r}; there are {', '.join(names)}")
    return names[name]
