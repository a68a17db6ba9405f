"""What torch's profiler saw, sorted into kinds of work."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch.autograd import DeviceType  # type: ignore[attr-defined]

from onepass._calls import Call

KERNELS, PRODUCTS, OTHER, REST = "onepass kernels", "matrix products", "other torch ops", "Python, autograd, dispatch"
_PRODUCT = re.compile(r"aten::(_?addmm\w*|addmv_?|addbmm|baddbmm|bmm|dot|mkldnn_linear|mkldnn_rnn_layer|mm|mv|vdot)|mkldnn::_linear\w*")
_COMPILED = "## Call CompiledFxGraph"
_COMPILED_GRAPH = "graphs of torch.compile"


@dataclass
class Work:
    """All calls of one op, microseconds in all."""

    kind: str
    name: str
    calls: int = 0
    time: float = 0.0
    of_sizes: dict[Call, tuple[int, float]] = field(default_factory=dict)  # calls and time of an op of onepass


@dataclass(frozen=True)
class Profile:
    """``works``: all ops, longest first in each kind. ``busy``: microseconds in which any of them ran. ``kernels``: names of the GPU's that
    onepass launched. ``on_gpu``: whether times are the GPU's."""

    works: list[Work]
    busy: float
    kernels: list[str]
    on_gpu: bool


def sort_events(events: Iterable[Any]) -> Profile:
    """The work in torch's ``FunctionEvent``s. Of a GPU's, times are those of the kernels that an op launched.

    An op's own time counts, without the ops that it calls; but a matrix product, and what an op of onepass does once it is named, count
    as a whole. Nodes of autograd, ranges of the user's and an op of onepass around its named part are not work but the way to it.
    """
    events = list(events)
    device = [event for event in events if event.device_type != DeviceType.CPU and not event.is_user_annotation]
    sorting = _Sorting(on_gpu=bool(device))
    for event in events:
        if event.device_type == DeviceType.CPU and event.cpu_parent is None:
            sorting.visit(event)
    spans = [(event.time_range.start, event.time_range.end) for event in device] or sorting.spans
    works = sorted(sorting.works.values(), key=lambda work: ((KERNELS, PRODUCTS, OTHER).index(work.kind), -work.time))
    return Profile(works, union(spans), sorted(sorting.kernels), bool(device))


def union(spans: Iterable[tuple[float, float]]) -> float:
    """The length of what intervals cover together."""
    covered, end = 0.0, float("-inf")
    for first, last in sorted(spans):
        covered += max(0.0, last - max(first, end))
        end = max(end, last)
    return covered


class _Sorting:
    def __init__(self, on_gpu: bool) -> None:
        self.on_gpu = on_gpu
        self.works: dict[tuple[str, str], Work] = {}
        self.spans: list[tuple[float, float]] = []
        self.kernels: set[str] = set()

    def visit(self, event: Any, inside: bool = False) -> float:
        """Count an event and what it called; the time that was counted. ``inside``: of an op, whose time is spanned already."""
        call = Call.read(event.name)
        unnamed = event.name.startswith("onepass::") and call is None and not _calls_itself(event)
        if call is not None or unnamed:
            self.kernels.update(_launched(event))
            name = event.name.removeprefix("onepass::") if call is None else call.op
            return self._count(event, KERNELS, name, inside, self._whole(event), call)
        if _PRODUCT.fullmatch(event.name):
            return self._count(event, PRODUCTS, event.name, inside, self._whole(event))
        if event.is_user_annotation or not _is_op(event.name):
            return sum(self.visit(child, inside) for child in event.cpu_children)
        below = sum(self.visit(child, inside=True) for child in event.cpu_children)
        name = _COMPILED_GRAPH if event.name.startswith(_COMPILED) else event.name
        own = event.self_device_time_total if self.on_gpu else self._whole(event) - below
        return below + self._count(event, OTHER, name, inside, own)

    def _whole(self, event: Any) -> float:
        return float(event.device_time_total if self.on_gpu else event.time_range.elapsed_us())

    def _count(self, event: Any, kind: str, name: str, inside: bool, time: float, call: Call | None = None) -> float:
        if not inside:
            self.spans.append((event.time_range.start, event.time_range.end))
        work = self.works.setdefault((kind, name), Work(kind, name))
        work.calls += 1
        work.time += time
        if call is not None:
            calls, before = work.of_sizes.get(call, (0, 0.0))
            work.of_sizes[call] = (calls + 1, before + time)
        return time


def _is_op(name: str) -> bool:
    if name.startswith(_COMPILED):
        return True
    return re.match(r"(?!autograd::|torch::|onepass::|profiler::)\w+::\w", name) is not None


def _calls_itself(event: Any) -> bool:
    """Whether an op of onepass is named, or dispatched again, within."""
    return any(child.name.startswith("onepass::") or _calls_itself(child) for child in event.cpu_children)


def _launched(event: Any) -> set[str]:
    return {kernel.name for kernel in event.kernels}.union(*(_launched(child) for child in event.cpu_children))
