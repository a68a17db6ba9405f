"""Where the time went: events of torch's profiler as kinds of work, and the floors that kernels are held against; GPUs by imitations."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

import onepass
from onepass._calls import Call
from onepass.profiling import floors, gpu
from onepass.profiling.events import KERNELS, OTHER, PRODUCTS, Profile, sort_events, union

NAME = "onepass::additive_forward [B 2, T 4, S 8, A 16, D 32] float32 cpu"


def event(name: str, start: float, end: float, *children: Any, device: float | None = None, kernels: tuple[str, ...] = ()) -> Any:
    """As torch's, on the host; with ``device`` microseconds of kernels that it launched itself."""
    total = (device or 0.0) + sum(child.device_time_total for child in children)
    made = SimpleNamespace(
        name=name, device_type=DeviceType.CPU, is_user_annotation=False, cpu_parent=None, cpu_children=list(children),
        time_range=SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start),
        kernels=[SimpleNamespace(name=kernel) for kernel in kernels], device_time_total=total, self_device_time_total=device or 0.0,
    )  # fmt: skip
    for child in children:
        child.cpu_parent = made
    return made


def flat(*roots: Any) -> list[Any]:
    return [one for root in roots for one in (root, *flat(*root.cpu_children))]


def times(profile: Profile) -> dict[tuple[str, str], tuple[int, float]]:
    return {(work.kind, work.name): (work.calls, work.time) for work in profile.works}


def test_kinds() -> None:
    """A kernel's dispatch is not the kernel's; a product is one thing; an op of others has what these leave."""
    kernel = event("onepass::additive_forward", 0, 40, event("Autograd", 2, 38, event(NAME, 5, 35, event("aten::clone", 6, 8))))
    linear = event("aten::linear", 50, 90, event("aten::t", 51, 55), event("aten::addmm", 60, 85, event("aten::copy_", 61, 63)))
    node = event("autograd::engine::evaluate_function: MmBackward0", 100, 130, event("MmBackward0", 101, 129, event("aten::mm", 105, 115)))
    profile = sort_events(flat(kernel, linear, node))
    assert times(profile) == {
        (KERNELS, "additive_forward"): (1, 30),
        (PRODUCTS, "aten::addmm"): (1, 25),
        (PRODUCTS, "aten::mm"): (1, 10),
        (OTHER, "aten::linear"): (1, 11),
        (OTHER, "aten::t"): (1, 4),
    }
    assert [work.of_sizes for work in profile.works if work.kind == KERNELS] == [{Call.read(NAME): (1, 30.0)}]
    assert (profile.busy, profile.on_gpu, profile.kernels) == (30 + 40 + 10, False, [])


def test_what_is_not_work() -> None:
    """Ranges of the user's, even if named like an op, and autograd; ops of onepass without a name still count."""
    mine = event("model::forward", 0, 20, event("aten::add", 5, 10))
    mine.is_user_annotation = True
    profile = sort_events(flat(mine, event("Optimizer.step#Adam.step", 20, 30), event("onepass::additive_step", 30, 34)))
    assert times(profile) == {(KERNELS, "additive_step"): (1, 4), (OTHER, "aten::add"): (1, 5)}
    assert profile.busy == 9


def test_a_real_profile() -> None:
    """All time is somewhere once: what is counted covers what is spanned."""
    layer = torch.nn.Linear(8, 16)
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiler:
        query = layer(torch.rand(2, 4, 8)).relu()
        context, _ = onepass.additive_attention(query, torch.rand(2, 5, 16), torch.rand(2, 5, 6), torch.rand(16))
        context.sum().backward()
    profile = sort_events(profiler.events() or ())
    assert {work.name for work in profile.works if work.kind == KERNELS} == {"additive_forward", "additive_backward"}
    assert {work.name for work in profile.works if work.kind == PRODUCTS} == {"aten::addmm", "aten::mm"}
    assert {"aten::relu", "aten::sum"} <= {work.name for work in profile.works if work.kind == OTHER}
    assert sum(work.time for work in profile.works) == pytest.approx(profile.busy)


def test_union() -> None:
    assert union([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4
    assert union([]) == 0


def on_gpu() -> list[Any]:
    name = NAME.replace("cpu", "cuda")
    named = event(name, 1, 9, event("aten::empty", 2, 3), device=70.0, kernels=("attend", "combine"))
    step = event("step", 0, 30, event("onepass::additive_forward", 0, 10, named), device=100.0, kernels=("step",))
    step_on_gpu, attend, product = (event(*span) for span in (("step", 100, 200), ("attend", 100, 170), ("gemm", 150, 200)))
    for one in (step_on_gpu, attend, product):
        one.device_type = DeviceType.CUDA
    step.is_user_annotation = step_on_gpu.is_user_annotation = True
    return [*flat(step, event("aten::mm", 20, 25, device=50.0, kernels=("gemm",))), step_on_gpu, attend, product]


def test_a_gpu() -> None:
    """Times are the GPU's, kernels that overlap keep it busy once, and ranges of the user's, which torch gives to the GPU too, are none."""
    profile = sort_events(on_gpu())
    assert times(profile) == {(KERNELS, "additive_forward"): (1, 70), (PRODUCTS, "aten::mm"): (1, 50)}
    assert (profile.busy, profile.on_gpu, profile.kernels) == (100, True, ["attend", "combine"])


def test_ncu() -> None:
    command = gpu.ncu(["attend", "sum.1"], gpu.bare_command("model:step", "cuda:1"))
    assert command == (
        r"ncu --set full --nvtx --profile-from-start off --kernel-name 'regex:^(attend|sum\.1)$' -o onepass "
        "python -m onepass profile model:step --device cuda:1 --bare"
    )


def test_proton() -> None:
    def node(name: str, time: float, *children: Any) -> dict[str, Any]:
        return {"frame": {"name": name}, "metrics": {"time (ns)": time} if time else {}, "children": list(children)}

    tree = gpu.tree_of([node("ROOT", 0, node("small", 1e6), node("model", 0, node("attend", 3e6), node("empty", 0))), {"CUDA": {}}])
    assert [branch.label for branch in tree.children] == ["3.000  model", "1.000  small"]
    assert [branch.label for branch in tree.children[0].children] == ["3.000  attend"]


def call(op: str, **changed: Any) -> Call:
    sizes = {"B": 2, "H": 1, "T": 4, "S": 8, "A": 16, "D": 32, "dtype": "float32", "kept": "float32", "device": "cpu", "pairs": 64}
    return Call(op, **(sizes | changed))


def test_arithmetic() -> None:
    assert floors.slots(call("additive_forward")) == 64 * (3 * 16 + 32)
    assert floors.slots(call("additive_backward")) == 64 * (8 * 16 + 2 * 32)
    assert floors.slots(call("additive_backward", device="cuda")) == 64 * (7 * 16 + 2 * 32)
    assert floors.slots(call("additive_step_backward")) == 64 * (6 * 16 + 32)
    assert floors.slots(call("multiplicative_forward", pairs=None)) == 64 * (16 + 32)
    assert floors.slots(call("stack_steps")) == 0


def test_bytes() -> None:
    """Visible sources once, in the dtype that the memory keeps."""
    step = {"T": 1, "pairs": 10}
    assert floors.moved(call("additive_step", **step)) == 4 * (10 * 48 + 2 * 48 + 10)
    assert floors.moved(call("additive_step", **step, kept="bfloat16")) == 2 * 10 * 48 + 4 * (2 * 48 + 10)
    assert floors.moved(call("additive_backward")) == 2 * floors.moved(call("additive_forward"))


def test_floors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The longer of both; float64 has half the arithmetic; reading is measured on as much memory as the call touches."""
    sizes = []

    def ceilings(threads: int, seconds: float, bytes: int) -> dict[str, float]:
        sizes.append((threads, bytes))
        return {"fma": 1e9, "read": 4e9}

    monkeypatch.setattr(floors, "probe", lambda: SimpleNamespace(ceilings=ceilings))
    floors.ceilings_of.cache_clear()
    assert floors.floor(call("additive_forward"), 1) == floors.Floor(64 * 80 / 1e9, "arithmetic")
    assert floors.floor(call("additive_forward", dtype="float64"), 1) == floors.Floor(64 * 80 / 0.5e9, "arithmetic")
    copied = call("stack_steps", S=0, A=0, pairs=0)
    assert floors.floor(copied, 1) == floors.Floor(2 * 4 * 8 * 32 / 4e9, "read bandwidth")
    assert sizes == [(1, 8192), (1, 4096)]  # each size once, a page at least
    monkeypatch.setattr(floors, "probe", lambda: None)
    assert floors.floor(copied, 1) is None
    floors.ceilings_of.cache_clear()


def test_ceilings_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """An A100's, from its clocks: 9.75 T multiply-adds/s, 1.555 TB/s."""
    found = SimpleNamespace(
        major=8, minor=0, multi_processor_count=108, clock_rate=1_410_000, memory_clock_rate=1_215_000, memory_bus_width=5120
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    floors.ceilings_of.cache_clear()
    ceilings = floors.ceilings_of("cuda", 1, 1 << 20)
    floors.ceilings_of.cache_clear()
    assert ceilings.multiply_adds == pytest.approx(9.75e12, rel=1e-3)
    assert ceilings.read == pytest.approx(1.555e12, rel=1e-3)
