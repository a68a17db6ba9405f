"""How time and memory grow, for onepass and its peers: `python -m onepass.benchmarks.scaling` (`--quick`: under a minute)."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from . import catalogue, ceilings
from .exponents import fused
from .plan import thread_counts
from .progress import Bar
from .providers import PROVIDERS, mine, named, providers, variant
from .records import MISSING, Record, Results
from .scaling_report import draw, markdown
from .study import Study
from .workloads import BOTH, FAMILIES, Shape, Workload

assert catalogue
SLOW_COMPILERS = ("torch.compile", "FlexAttention")  # tens of seconds for a shape
KEPT = 3  # tensors of all terms that a formula keeps for its backward, at least: sum, tanh, gradient


@dataclass(frozen=True)
class Sweep:
    """One size, or two that are equal, over powers of two; every ``sparse``-th value also for memory, and every second of these for what
    compiles slowly."""

    axis: str
    kernel: str
    base: Shape
    first: int
    last: int
    sparse: int = 0

    def workloads(self, quick: bool) -> list[Workload]:
        last = max(self.first, self.last // 32) if quick else self.last
        sizes = [self.first << i for i in range((last // self.first).bit_length())]
        shapes = [self.base._replace(name=f"over {self.axis}", **dict.fromkeys(self.axis.split(" = "), size)) for size in sizes]
        return [Workload(self.kernel, FAMILIES[self.kernel].fitted(shape)) for shape in shapes]


BASE = Shape("", 2, 16, 128, 128, 128)
SWEEPS = (
    Sweep("S", "additive", BASE, 32, 32768, 2),
    Sweep("S", "multiplicative", BASE, 32, 32768, 2),
    Sweep("S", "additive layer", BASE, 32, 8192),
    Sweep("S", "additive decoding", BASE._replace(B=8), 32, 32768),
    Sweep("T", "additive", BASE, 1, 1024),
    Sweep("T", "multiplicative", BASE, 1, 1024),
    Sweep("A", "additive", BASE, 16, 4096),
    Sweep("A", "multiplicative", BASE, 16, 4096),
    Sweep("T = S", "additive", BASE._replace(B=1, A=64, D=64), 32, 1024, 2),
    Sweep("T = S", "multiplicative", BASE._replace(B=1, A=64, D=64), 32, 1024, 2),
)
THREADED = Shape("over threads", 8, 100, 400, 256, 256)


@dataclass
class Scaling:
    """A peer whose next call would take more than ``limit`` seconds, or its terms more memory than the machine has, is left out from there
    on."""

    study: Study
    limit: float
    quick: bool = False
    last: dict[tuple[str, str, str], tuple[float, int]] = field(default_factory=dict)  # of a sweep and provider: seconds, and terms

    def jobs(self) -> Iterator[tuple[str, Callable[[], Iterator[Record]]]]:
        for sweep in SWEEPS:
            for number, workload in enumerate(sweep.workloads(self.quick)):
                sparse, sparser = (bool(step) and number % step == 0 and not self.quick for step in (sweep.sparse, 2 * sweep.sparse))
                yield f"{sweep.kernel}, {workload.shape.name}", partial(self.point, workload, sparse, sparser)
        for kernel in ("additive", "multiplicative"):
            yield f"{kernel}, over threads", partial(self.threads, Workload(kernel, THREADED))

    def point(self, workload: Workload, with_memory: bool, with_compilers: bool) -> Iterator[Record]:
        direction = FAMILIES[workload.family].directions[-1]
        chosen = set()
        for name in self.study.only & providers(workload)[0].keys():
            if not with_compilers and name in SLOW_COMPILERS:
                continue
            if reason := self._reason(name, workload):
                yield Record.of(workload, name, direction, status=MISSING, reason=reason)
            else:
                chosen.add(name)
        for record in replace(self.study, only=chosen).speed(workload):
            if record.seconds and record.direction == direction:
                self.last[workload.family, workload.shape.name, record.provider] = record.quantiles["0.05"], terms(workload)
            yield record
        if with_memory:
            yield from replace(self.study, only=chosen.difference(SLOW_COMPILERS)).peaks(workload, direction)

    def _reason(self, name: str, workload: Workload) -> str:
        if mine(name):
            return ""
        needed, there = KEPT * 4 * terms(workload), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if not fused(name) and workload.family.startswith("additive") and needed > there:
            return f"it would keep {needed / 2**30:.0f} GiB, the machine has {there / 2**30:.0f}"
        seconds, at = self.last.get((workload.family, workload.shape.name, name), (0.0, 1))
        expected = seconds * terms(workload) / at
        return f"a call would take about {expected:.1f} s, the limit is {self.limit} s" if expected > self.limit else ""

    def threads(self, workload: Workload) -> Iterator[Record]:
        """jax has threads of its own, and is left out."""
        on_torch = {found.name for found in PROVIDERS if "jax" not in found.needs}.difference(SLOW_COMPILERS)
        yield from self.study.scaling(workload, BOTH, thread_counts(), on_torch.__contains__)


def terms(workload: Workload) -> int:
    _, B, T, S, A, _ = workload.shape
    return B * T * S * A


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Under a minute: short sweeps and turns, nothing that compiles.")] = False,
    provider: Annotated[list[str] | None, typer.Option(help="Repeatable; onepass is all of its backends.", show_default="all")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="In each, every provider has a turn.")] = 3,
    limit: Annotated[float, typer.Option(help="Seconds of a call beyond which a peer is left out.")] = 0.5,
    json: Annotated[Path | None, typer.Option(help="Write the results.", show_default=False)] = None,
    pictures: Annotated[Path | None, typer.Option(help="Draw into this folder.", show_default=False)] = None,
    page: Annotated[Path | None, typer.Option(help="Write the tables, in Markdown.", show_default=False)] = None,
) -> None:
    """Measure time and memory over S, T, A and threads, fit exponents, and say where onepass loses. Interrupted, it keeps what there is."""
    results = Results.here("cpu")
    results.ceilings["cpu float32"] = ceilings.measure("cpu")
    who = {name for name in named(provider, compiling=not quick) if provider or not variant(name)}
    study = Study(who, 1 if quick else rounds, 0.01 if quick else 0.05, results.ceilings)
    todo, complete = list(Scaling(study, limit, quick).jobs()), True
    with Bar(len(todo), len(todo)) as bar:
        try:
            for done, (title, records) in enumerate(todo):
                bar.begin(title, done)
                for record in records():
                    results.add(record)
        except KeyboardInterrupt:
            complete = False
    if json:
        results.save(json)
    drawn = draw(results, pictures) if pictures else []
    text = markdown(results, [os.path.relpath(path, page.parent) for path in drawn] if page else [])
    if page:
        page.write_text(text)
    else:
        print(text)
    raise typer.Exit(0 if complete else 130)


if __name__ == "__main__":
    typer.run(main)
