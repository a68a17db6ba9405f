"""Under a profiler every op carries its sizes in a name, in C++ and in Python alike; without one it has none."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity

import onepass
from onepass._calls import Call, call_of
from onepass._library import _in_triton
from onepass._schemas import SCHEMAS

B, H, T, S, A, D = 2, 3, 4, 5, 16, 7


def recorded(run: Callable[[], object]) -> list[str]:
    """The names of the ops of onepass that are named, in order."""
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    return [event.name for event in profiler.events() or () if Call.read(event.name) is not None]


def arguments_of(op: str, heads: bool, dtype: torch.dtype = torch.float32) -> list[Any]:
    """What the op takes: one query where it is a step of a memory without heads."""
    lead = (B, H) if heads else (B,)
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    one = ("step" in op or "weighted" in op) and not heads

    def of(*sizes: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.rand(*lead, *(sizes[1:] if one and sizes[0] == T else sizes), dtype=dtype)

    query, keys, values, v = of(T, A), of(S, A), of(S, D), torch.rand(*lead[1:], A, dtype=dtype)
    named: dict[str, Any] = {
        "query": query, "keys": keys, "values": values, "v": v, "weights": of(T, S, dtype=dtype if "weighted" in op else wide),
        "grad_context": of(T, D), "grad_weights": None, "grad_scores": of(T, S), "scale": 1.0, "rows": of(T, D),
        "steps": [of(T, D)] * 3, "several": heads, "half": False, "keep_weights": True, "lengths": None, "mask": None,
        "of_query": True,
    }  # fmt: skip
    if "step" in op and "additive" in op:
        prepared = torch.ops.onepass.additive_prepare(keys, v, None, None, False)
        named |= dict(zip(("exponentials", "sizes", "weighting"), prepared, strict=True))
    return [named[argument.name] for argument in getattr(torch.ops.onepass, op).default._schema.arguments]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("op", [schema[: schema.index("(")] for schema in SCHEMAS])
def test_all_ops(op: str, heads: bool, dtype: torch.dtype) -> None:
    """Named by C++ as Python would name them, and read back to the same."""
    arguments = arguments_of(op, heads, dtype)
    (name,) = recorded(lambda: getattr(torch.ops.onepass, op)(*arguments))
    call = Call.read(name)
    assert call is not None
    assert str(call) == name
    if op == "additive_prepare":  # has no query; what it keeps is in the accumulator's dtype
        assert call == Call(op, B, H if heads else 1, 1, S, A, 0, str(dtype)[6:], "float32", "cpu", call.B * call.H * S)
    else:
        assert call == call_of(op, arguments)


def test_the_text() -> None:
    names = recorded(lambda: onepass.additive_attention(torch.ones(B, T, A), torch.ones(B, S, A), torch.ones(B, S, D), torch.ones(A)))
    assert names == ["onepass::additive_forward [B 2, T 4, S 5, A 16, D 7] float32 cpu"]
    memory = onepass.multiplicative_memory(torch.ones(B, H, S, A), torch.ones(B, H, S, D), dtype=torch.bfloat16)
    names = recorded(lambda: memory.attend(torch.ones(B, H, A)))
    assert names == ["onepass::multiplicative_step [B 2, H 3, T 1, S 5, A 16, D 7] float32 over bfloat16 cpu"]


@pytest.mark.parametrize("heads", [False, True])
def test_visible_pairs(heads: bool) -> None:
    """As many as the reference's mask has."""
    lead = (B, H) if heads else (B,)
    inputs = torch.ones(*lead, T, A), torch.ones(*lead, S, A), torch.ones(*lead, S, D)
    lengths, mask = torch.tensor([S, 2]), torch.rand(*lead, T, S) > 0.5
    first = torch.randint(0, S, (B, T))
    spans = torch.stack([first, first + torch.randint(-1, 3, (B, T))], -1).clamp(0, S)
    source = torch.arange(S)
    within_lengths = (source < lengths[:, None])[:, None].expand(B, T, S)
    within_spans = (source >= spans[..., :1]) & (source < spans[..., 1:])

    def pairs(**limits: Any) -> int | None:
        (name,) = recorded(lambda: onepass.multiplicative_attention(*inputs, **limits))
        call = Call.read(name)
        assert call is not None
        return call.pairs

    def expected(visible: Tensor) -> int:
        return int((visible.unsqueeze(1) if heads and visible.dim() == 3 else visible).expand(*lead, T, S).sum())

    assert pairs() == B * (H if heads else 1) * T * S
    assert pairs(lengths=lengths) == expected(within_lengths)
    assert pairs(spans=spans) == expected(within_spans)
    assert pairs(mask=mask) == expected(mask)
    together = within_lengths & within_spans
    assert pairs(lengths=lengths, spans=spans, mask=mask) == expected((together.unsqueeze(1) if heads else together) & mask)


def test_backward_and_compiled(fresh_compiler: None) -> None:
    query, keys, values = (torch.rand(B, n, A, requires_grad=True) for n in (T, S, S))

    def run(query: Tensor) -> Tensor:
        return onepass.additive_attention(query, keys, values, torch.ones(A))[0].sum()

    sizes = "[B 2, T 4, S 5, A 16, D 16] float32 cpu"
    expected = [f"onepass::additive_forward {sizes}", f"onepass::additive_backward {sizes}"]
    assert recorded(lambda: run(query).backward()) == expected
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    compiled(query)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert recorded(lambda: compiled(query).backward()) == expected


def test_ops_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Named under a profiler alone; what a GPU hides is not counted."""
    ops = importlib.import_module("onepass.kernels.ops")
    names: list[str] = []
    record = torch._C._profiler._RecordFunctionFast
    monkeypatch.setattr(torch._C._profiler, "_RecordFunctionFast", lambda name: names.append(name) or record(name))
    monkeypatch.setitem(ops.OPS, "multiplicative_step", lambda *arguments: len(arguments))
    op = _in_triton("multiplicative_step")
    arguments = torch.ones(B, A), torch.ones(B, S, A), torch.ones(B, S, D), 1.0, torch.tensor([1, 2]), None
    assert op(*arguments) == 6
    assert names == []
    assert recorded(lambda: op(*arguments)) == ["onepass::multiplicative_step [B 2, T 1, S 5, A 16, D 7, pairs ?] float32 cpu"] == names
    read = Call.read(names[0])
    assert read is not None
    assert read.pairs is None


@pytest.mark.parametrize("name", ["onepass::additive_forward", "aten::mm", "onepass::f [B 2]", "a onepass::f [B 2] float32 cpu"])
def test_other_names(name: str) -> None:
    assert Call.read(name) is None
