"""Calls drawn at random, each beside eager's formula of it: `python -m onepass.benchmarks.random_calls` says where onepass is slower.

Whoever chooses the shapes of a benchmark leaves some out. Here sizes, dtype, heads, layout and what queries see are drawn; a result is
checked before it is timed."""

import json as text_of
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import onepass

from . import timing
from .progress import Bar
from .records import Results, caption
from .scaling_report import table
from .workloads import BOTH, FORWARD

SIZES = {"B": (1, 128), "T": (1, 256), "S": (2, 2048), "A": (8, 1024), "D": (8, 1024)}
MOST_TERMS, MOST_NUMBERS = 3e7, 1e7  # B H T S A of eager's tensor, and in inputs and result
HIDDEN = ("nothing", "nothing", "lengths", "lengths per query", "mask of the source", "mask")
DTYPES = ("float32", "float32", "float32", "float64", "bfloat16", "float16")
ROUNDS, TURN = 3, 0.01
SHOWN = 25
FUNCTIONS: dict[str, Any] = {
    "additive": onepass.additive_attention,
    "multiplicative": onepass.multiplicative_attention,
    "scores": onepass.additive_scores,
}


@dataclass(frozen=True)
class Call:
    family: str
    direction: str
    dtype: str
    hidden: str
    layout: str
    B: int
    H: int
    T: int
    S: int
    A: int
    D: int


@dataclass(frozen=True)
class Timed:
    """Median milliseconds of both, and how many times as fast as eager onepass is: the median of the rounds' own ratios. ``wrong``: why
    there are none."""

    call: Call
    ratio: float
    onepass: float
    eager: float
    wrong: str = ""


def draw(chance: random.Random) -> Call:
    """Sizes evenly over their logarithms, and one in two a multiple of 16; heads share out the widths."""
    while True:
        sizes = {name: round(math.exp(chance.uniform(math.log(low), math.log(high)))) for name, (low, high) in SIZES.items()}
        if chance.random() < 0.5:
            sizes.update({name: -(-sizes[name] // 16) * 16 for name in "SAD"})
        H = chance.choice((1, 1, 1, 2, 4, 8))
        sizes["A"], sizes["D"] = (max(8, sizes[name] // H) for name in "AD")
        B, T, S, A, D = sizes.values()
        if B * H * T * S * A <= MOST_TERMS and B * H * (S * (A + D) + T * (A + D + S)) <= MOST_NUMBERS:
            family, direction = chance.choice(("additive", "multiplicative", "multiplicative", "scores")), chance.choice((FORWARD, BOTH))
            layout = chance.choice(("batch first", "batch first", "time first"))
            return Call(family, direction, chance.choice(DTYPES), chance.choice(HIDDEN), layout, B, H, T, S, A, D)


class Prepared:
    """The tensors of a call, and the two who compute it."""

    def __init__(self, call: Call, seed: int) -> None:
        self.call, self._generator = call, torch.Generator().manual_seed(seed)
        scale = call.A**-0.25 if call.family == "multiplicative" else 0.5
        inputs = [self._rows(call.T, call.A, scale), self._rows(call.S, call.A, scale)]
        if call.family != "scores":
            inputs.append(self._rows(call.S, call.D, 1.0))
        if call.family != "multiplicative":
            inputs.append(torch.randn(*self._lead()[1:], call.A, generator=self._generator) * call.A**-0.5)
        self.inputs = [x.to(getattr(torch, call.dtype)) for x in inputs]
        self.upstream = torch.randn(*self._lead(), call.T, call.S if call.family == "scores" else call.D, generator=self._generator)
        self.options, self.visible = self._hides()

    def _lead(self) -> tuple[int, ...]:
        return (self.call.B,) if self.call.H == 1 else (self.call.B, self.call.H)

    def _rows(self, count: int, width: int, scale: float) -> Tensor:
        lead = self._lead()
        if self.call.layout == "batch first":
            return torch.randn(*lead, count, width, generator=self._generator) * scale
        rows = torch.randn(count, *lead, width, generator=self._generator) * scale
        return rows.permute(*range(1, len(lead) + 1), 0, -1)

    def _hides(self) -> tuple[dict[str, Tensor], Tensor | None]:
        """What onepass takes, and what eager does; every query sees something."""
        call, per_query = self.call, self.call.hidden == "lengths per query"
        if call.hidden == "nothing":
            return {}, None
        lengths = torch.randint(call.S // 2, call.S + 1, (call.B, call.T if per_query else 1), generator=self._generator)
        visible = torch.arange(call.S) < lengths.unsqueeze(-1)
        if call.hidden == "mask":
            visible = torch.rand(call.B, call.T, call.S, generator=self._generator) < 0.7
            visible[..., 0] = True
        by_name = {"lengths": lengths if per_query else lengths[:, 0]} if "lengths" in call.hidden else {"mask": visible}
        return by_name, visible if call.H == 1 else visible.unsqueeze(1)

    def onepass(self, *inputs: Tensor) -> Tensor:
        found = FUNCTIONS[self.call.family](*inputs, **self.options)
        result: Tensor = found if self.call.family == "scores" else found[0]
        return result

    def eager(self, query: Tensor, keys: Tensor, *others: Tensor) -> Tensor:
        if self.call.family == "multiplicative":
            scores = query @ keys.transpose(-1, -2)
        else:
            v = others[-1] if self.call.H == 1 else others[-1][:, None, :, None]
            scores = (torch.tanh(query.unsqueeze(-2) + keys.unsqueeze(-3)) @ v).view(*query.shape[:-1], keys.shape[-2])
        if self.visible is not None:
            scores = scores.masked_fill(~self.visible, -math.inf)
        return scores if self.call.family == "scores" else torch.softmax(scores, -1) @ others[0]

    def run(self, function: Any, dtype: torch.dtype | None = None) -> Sequence[Tensor]:
        inputs = [x.detach().to(dtype or x.dtype) for x in self.inputs]
        if self.call.direction == FORWARD:
            with torch.no_grad():
                return (function(*inputs),)
        for x in inputs:
            x.requires_grad_()
        return torch.autograd.grad(function(*inputs), inputs, self.upstream.to(inputs[0].dtype))

    def wrong(self) -> str:
        """Why a result of onepass is: further in norm from the one in float64 than twice eager, and one rounding of the magnitudes of what
        it sums. As signs are random, ``n`` terms have ``n ** 0.5`` times the magnitude of their sum; those of a score,
        ``|v| (2 - tanh)``, have up to eight times that of ``v tanh``."""
        call = self.call
        magnitude = 8 * max(call.A, call.B * call.T * call.S) ** 0.5  # of a score, and of the longest sum, the gradient of v
        for place, (exact, mine, theirs) in enumerate(
            zip(self.run(self.eager, torch.float64), self.run(self.onepass), self.run(self.eager), strict=True)
        ):
            seen = exact.isfinite()  # scores of what is hidden are not
            if not torch.equal(mine.isfinite(), seen) and torch.equal(theirs.isfinite(), seen):
                return f"output {place}: not finite where eager's is, or the other way round"
            off, granted = (float((x.double() - exact)[seen].norm()) for x in (mine, theirs))
            if not off <= 2 * granted + magnitude * torch.finfo(mine.dtype).eps * float(exact[seen].norm()):
                return f"output {place}: off by {off:.1e} in norm, eager by {granted:.1e}"
        return ""

    def timed(self) -> Timed:
        if problem := self.wrong():
            return Timed(self.call, math.nan, math.nan, math.nan, problem)
        runs = {"onepass": lambda: self.run(self.onepass), "eager": lambda: self.run(self.eager)}
        seconds = timing.medians(timing.rounds(runs, ROUNDS, TURN))
        mine, theirs = (1e3 * sorted(seconds[name])[ROUNDS // 2] for name in runs)
        return Timed(self.call, timing.ratio(seconds, "onepass", "eager"), mine, theirs)


def measured(seconds: float, seed: int) -> Iterator[Timed]:
    chance, start, count = random.Random(seed), time.monotonic(), 0
    while time.monotonic() - start < seconds:
        yield Prepared(draw(chance), count).timed()
        count += 1


def markdown(found: Sequence[Timed], conditions: str, seed: int) -> str:
    wrong = [one for one in found if one.wrong]
    timed = sorted((one for one in found if not one.wrong), key=lambda one: one.ratio)
    groups: dict[tuple[str, str, str], list[float]] = {}
    for one in timed:
        groups.setdefault((one.call.family, one.call.direction, one.call.dtype), []).append(one.ratio)
    rows = [
        [*group, str(len(ratios)), *(f"{timing.quantile(ratios, q):.2f}" for q in (0.05, 0.5, 0.95)), str(sum(r < 1 for r in ratios))]
        for group, ratios in sorted(groups.items())
    ]
    slowest = [[f"{one.ratio:.2f}", f"{one.onepass:.3g}", f"{one.eager:.3g}", *map(str, astuple(one.call))] for one in timed[:SHOWN]]
    parts = [
        f"# Calls drawn at random\n\n{len(timed)} calls of seed {seed}, as `python -m onepass.benchmarks.random_calls` draws them, each "
        f"checked and then timed beside eager's formula: {conditions}.\n\nHow many times as fast as eager:\n",
        table(("family", "direction", "dtype", "calls", "5 %", "median", "95 %", "slower than eager"), rows),
        f"\n{sum(one.ratio < 1 for one in timed)} of {len(timed)} are slower than eager. The slowest beside it, in milliseconds:\n",
        table(("over eager", "onepass", "eager", *Call.__dataclass_fields__), slowest),
        *(f"\nWrong, {one.wrong}: {one.call}" for one in wrong),
    ]
    return "\n".join(parts) + "\n"


def main(
    seconds: Annotated[float, typer.Option(min=0.0, help="How long to draw calls.")] = 300.0,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    json: Annotated[Path | None, typer.Option(help="Write every call and its times.", show_default=False)] = None,
    page: Annotated[Path | None, typer.Option(help="Write the tables, in Markdown.", show_default=False)] = None,
) -> None:
    """Time onepass beside eager in calls drawn at random. Interrupted, it keeps what there is. Status 1: a result of onepass is wrong."""
    conditions, found, complete, start, tenths = caption(Results.here("cpu")), [], True, time.monotonic(), 0
    with Bar(10, 10) as bar:
        try:
            bar.begin("calls", 0)
            for one in measured(seconds, seed):
                found.append(one)
                if (done := int(10 * (time.monotonic() - start) / seconds)) > tenths and done < 10:
                    tenths = done
                    bar.begin(f"{len(found)} calls, {sum(other.ratio < 1 for other in found)} slower than eager", done)
        except KeyboardInterrupt:
            complete = False
    if json:
        json.write_text(text_of.dumps([asdict(one) for one in found], indent=1))
    text = markdown(found, conditions, seed)
    if page:
        page.write_text(text)
    else:
        print(text)
    raise typer.Exit(130 if not complete else any(one.wrong for one in found))


if __name__ == "__main__":
    typer.run(main)
