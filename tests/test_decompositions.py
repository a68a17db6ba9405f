"""Exported programs without the ops: what ONNX and other devices' compilers take, for layers, memories and raw scores alike."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Dims
from memory_cases import build_for_memory, each_family, remember
from torch import Tensor, nn

import onepass
from onepass import decompositions
from onepass._schemas import SCHEMAS

pytestmark = pytest.mark.of_cpp
PAGE = Path(__file__).resolve().parents[1] / "docs" / "porting.md"
DYNAMIC = torch.export.Dim.DYNAMIC
HALF = {"rtol": 2**-5, "atol": 2**-5}  # a score is of eight terms, each of about 1 and rounded by up to 2^-8 of itself


class Whole(nn.Module):
    """All that is done with a memory, and the functions."""

    def __init__(self, family: str, heads: int, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.family, self.dtype = family, dtype
        self.v = nn.Parameter(torch.randn(*([heads] if heads else []), 8))

    def forward(self, query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, mask: Tensor, spans: Tensor) -> tuple[Tensor, ...]:
        one, seen = query[..., 0, :], spans[:, 0]
        options: dict[str, Any] = {"lengths": lengths, "need_weights": True}
        if self.family == "additive":
            memory = onepass.additive_memory(keys, values, self.v, lengths=lengths, mask=mask, dtype=self.dtype)
            at_once = onepass.additive_attention(query, keys, values, self.v, spans=spans, **options)
            others = (onepass.additive_scores(query, keys, self.v, lengths=lengths),)
        else:
            memory = onepass.multiplicative_memory(keys, values, scale=0.5, lengths=lengths, mask=mask, dtype=self.dtype)
            at_once = onepass.multiplicative_attention(query, keys, values, scale=0.5, spans=spans, **options)
            others = (onepass.multiplicative_attention(query, keys, values)[0],)
        context, weights = memory.attend(one, need_weights=True)
        return (
            *others, *at_once, context, weights, *memory.attend(query, need_weights=True, spans=spans), memory.scores(one, spans=seen),
            memory.scores(query), memory.context(weights), memory.context(weights.unsqueeze(-2).expand(*query.shape[:-1], -1) * 2),
        )  # fmt: skip


def inputs(dims: Dims, dtype: torch.dtype) -> tuple[Tensor, ...]:
    case = build_for_memory("additive", dims, dtype)
    B, T, S = dims.batch, dims.steps, dims.source
    lengths = torch.arange(B) % (S + 1)  # a source of nothing too
    mask, first = torch.rand(B, S) < 0.8, torch.randint(0, S, (B, T))
    return case.query, case.keys, case.values, lengths, mask, torch.stack([first, (first + 3).clamp(max=S)], -1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("heads", [0, 2])
@each_family
@torch.no_grad()
def test_programs(family: str, heads: int, dtype: torch.dtype) -> None:
    """Results are the ops', in their dtypes, for any sizes, and none of the ops is left."""
    model = Whole(family, heads, None).to(dtype)
    example = inputs(Dims(4, 3, 7, 8, 6, heads), dtype)
    sizes = {0: DYNAMIC, 1 + bool(heads): DYNAMIC}
    shapes = (sizes, sizes, sizes, {0: DYNAMIC}, {0: DYNAMIC, 1: DYNAMIC}, {0: DYNAMIC, 1: DYNAMIC})
    program = torch.export.export(model, example, dynamic_shapes=shapes)
    assert ops_of(program)
    plain = program.run_decompositions(decompositions.table())
    assert not ops_of(plain)
    served = inputs(Dims(5, 2, 9, 8, 6, heads), dtype)
    tolerance = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else HALF
    for got, want in zip(plain.module()(*served), model(*served), strict=True):
        torch.testing.assert_close(got, want, **tolerance)


def ops_of(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if "onepass" in str(node.target)]


def test_the_pages_code() -> None:
    """The first of its two lines; the other wants ONNX."""
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if "decompositions" in block)
    layer = onepass.AdditiveAttention(6, 5, 8).eval()
    names = {"torch": torch, "onepass": onepass, "model": layer, "inputs": (torch.randn(3, 6), torch.randn(3, 7, 5))}
    with torch.no_grad():
        exec(code.splitlines()[0], names)
        torch.testing.assert_close(names["program"].module()(*names["inputs"])[0], layer(*names["inputs"])[0])


@each_family
@torch.no_grad()
def test_a_memory_in_half_the_bytes(family: str) -> None:
    model, example = Whole(family, 0, torch.bfloat16), inputs(Dims(4, 3, 7, 8, 6), torch.float32)
    plain = torch.export.export(model, example).run_decompositions(decompositions.table())
    for got, want in zip(plain.module()(*example), model(*example), strict=True):
        torch.testing.assert_close(got, want, **HALF)


def test_each_forward_op() -> None:
    """Those that only backwards have are left out; shapes and dtypes are those that the ops promise."""
    names = {schema[: schema.index("(")] for schema in SCHEMAS}
    backwards = {name for name in names if name.endswith("_backward")} | {"source_sums", "stack_steps"}
    table: dict[Any, Callable[..., Any]] = decompositions.table()
    assert {op._schema.name.split("::")[1] for op in table} == names - backwards
    assert len(table) == 2 * len(names - backwards)
    memory = remember(build_for_memory("additive"), "cpu")
    assert memory._prepared is not None
    found = table[torch.ops.onepass.additive_prepare.default](memory.keys, memory.v, None, None, False)
    for got, want in zip(found, memory._prepared, strict=True):
        assert (got.shape, got.dtype, got.any().item()) == (want.shape, want.dtype, False)
