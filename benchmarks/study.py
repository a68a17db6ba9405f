"""One workload after another: prepare, check, take turns, record; then memory and threads."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from . import ceilings, memory, timing
from .checks import as_tensors, standard_apart, wrong
from .providers import EAGER, Provider, UnavailableError, mine, providers, variant
from .records import FAILED, MISSING, WRONG, Record
from .workloads import FAMILIES, Run, Workload


@dataclass
class Study:
    """How to measure: which providers, in turns of so many seconds in so many rounds."""

    only: set[str]
    rounds: int = 5
    turn: float = 0.2
    ceilings: dict[str, dict[str, float]] = field(default_factory=dict)  # as in records.Results
    after_round: Callable[[], None] = lambda: None

    def speed(self, workload: Workload) -> Iterator[Record]:
        """A record for each direction and provider. Eager runs in any case: what others may be off by depends on it."""
        family = FAMILIES[workload.family]
        there, missing = providers(workload)
        torch.compiler.reset()  # every shape compiled for itself
        workload.make()
        exact = family.expected(workload)
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(family.threads or threads)
            for direction in family.directions:
                prepared = {name: found for name, found in there.items() if name in self.only or name == EAGER}
                runs, firsts, results, problems = self._tried(prepared, workload, direction)
                if EAGER not in results:
                    reason = "its results cannot be judged without eager's"
                    problems += [Record.of(workload, name, direction, status=MISSING, reason=reason) for name in results]
                    runs = {}
                apart = {name: standard_apart(workload, keeps, direction) for name in runs if (keeps := there[name].keeps)}
                wrongs = wrong(exact[direction], results, workload.dtype, apart) if runs else {}
                timed = {name: run for name, run in runs.items() if name in self.only and name not in wrongs}
                problems += [Record.of(workload, name, direction, status=WRONG, reason=reason) for name, reason in wrongs.items()]
                problems += [Record.of(workload, name, direction, status=MISSING, reason=reason) for name, reason in missing.items()]
                yield from (record for record in problems if record.provider in self.only)
                if timed:
                    yield from self._timed(workload, direction, timed, {name: firsts[name] for name in timed if there[name].compiles})
        finally:
            torch.set_num_threads(threads)
            workload.tensors.clear()

    def _tried(
        self, there: dict[str, Provider], workload: Workload, direction: str
    ) -> tuple[dict[str, Run], dict[str, float], dict[str, tuple[Tensor, ...]], list[Record]]:
        """Runs, seconds of the first calls, their results; and who could not."""
        runs: dict[str, Run] = {}
        firsts: dict[str, float] = {}
        results: dict[str, tuple[Tensor, ...]] = {}
        problems = []
        for name, provider in there.items():
            try:
                runs[name] = provider.prepare(workload, direction)
                start = time.perf_counter()
                results[name] = as_tensors(runs[name]())
                firsts[name] = time.perf_counter() - start
            except Exception as problem:
                status, reason = MISSING, str(problem)
                if not isinstance(problem, UnavailableError):
                    status, reason = FAILED, f"{type(problem).__name__}: {reason.strip().partition(chr(10))[0]}"
                problems.append(Record.of(workload, name, direction, status=status, reason=reason))
        return {name: runs[name] for name in results}, firsts, results, problems

    def _timed(self, workload: Workload, direction: str, runs: dict[str, Run], firsts: dict[str, float]) -> Iterator[Record]:
        family = FAMILIES[workload.family]
        cost = family.cost(workload, direction)
        together = {**runs, **family.beside(workload, direction)}
        calls = timing.rounds(together, self.rounds, self.turn, timing.clock_of(workload.device), self.after_round)
        seconds = timing.medians(calls)
        rates = self.ceilings.get(f"{workload.device} {str(workload.dtype).removeprefix('torch.')}", {})
        more = family.metrics(workload, direction, seconds, rates)
        for name in runs:
            median = statistics.median(seconds[name])
            metrics = {"elements/s": cost.elements / median, "FLOP/s": 2 * cost.multiply_adds / median}
            if not variant(name):  # of which the cost is not
                metrics["bytes/s"] = cost.bytes / median
            if rates and not variant(name):
                metrics["of ceiling"] = ceilings.share(cost, median, rates)
            if EAGER in runs:
                metrics["over eager"] = timing.ratio(seconds, name, EAGER)
            peers = [peer for peer in runs if not mine(peer) and not variant(peer)]
            if mine(name) and peers:
                metrics["over best peer"] = timing.ratio(seconds, name, min(peers, key=lambda peer: statistics.median(seconds[peer])))
            if name in firsts:
                metrics["compile seconds"] = max(0.0, firsts[name] - median)
            quantiles = {str(q): timing.quantile([t for times in calls[name] for t in times], q) for q in timing.QUANTILES}
            metrics.update(more.get(name, {}))
            yield Record.of(workload, name, direction, seconds=seconds[name], quantiles=quantiles, metrics=metrics)

    def with_peaks(self, workload: Workload) -> list[str]:
        """Whose peak memory is measured: of all but peers' variants."""
        there, _ = providers(workload)
        return [name for name in there if name in self.only and (mine(name) or not variant(name))]

    def peaks(self, workload: Workload, direction: str) -> Iterator[Record]:
        for name in self.with_peaks(workload):
            record = Record.of(workload, name, direction)
            try:
                peak = memory.peak(name, workload, direction)
                record.metrics["peak bytes"] = peak
                if mine(name) and (budget := FAMILIES[workload.family].budget(workload, direction)):
                    record.metrics["of budget"] = (peak + FAMILIES[workload.family].budgeted_inputs(workload)) / budget
            except UnavailableError as reason:
                record = replace(record, status=MISSING, reason=str(reason))
            except RuntimeError as problem:
                record = replace(record, status=FAILED, reason=str(problem))
            yield record
            self.after_round()

    def scaling(
        self, workload: Workload, direction: str, counts: Sequence[int], who: Callable[[str], bool] = mine
    ) -> Iterator[Record]:
        """Over numbers of threads, one of them 1, of providers on torch's threads; the counts take turns."""
        there, _ = providers(workload)
        threads = torch.get_num_threads()
        workload.make()
        for name in filter(who, filter(self.only.__contains__, there)):
            run = there[name].prepare(workload, direction)

            def on(count: int, run: Run = run) -> Run:
                def timed() -> object:
                    torch.set_num_threads(count)
                    return run()

                return timed

            try:
                calls = timing.rounds({str(count): on(count) for count in counts}, self.rounds, self.turn, after_round=self.after_round)
            finally:
                torch.set_num_threads(threads)
            seconds = timing.medians(calls)
            for count in counts:
                metrics = {"over one thread": timing.ratio(seconds, str(count), "1")}
                quantiles = {str(q): timing.quantile([t for times in calls[str(count)] for t in times], q) for q in timing.QUANTILES}
                yield Record.of(workload, name, direction, threads=count, seconds=seconds[str(count)], quantiles=quantiles, metrics=metrics)
        workload.tensors.clear()
