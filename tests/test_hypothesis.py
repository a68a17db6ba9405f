"""Everything at once: shapes, strides, masks, ranges, dtypes and instruction sets that hypothesis finds."""

import os

import hypothesis
import pytest
import torch
from cases import DTYPES, FAMILIES, MASKS, RANGES, Case, Dims, assert_same_bits, build, garbage, results
from hypothesis import strategies as st
from isas import machine_isas
from test_strides import LAYOUTS, Layout, lay
from tolerance import check

sizes = st.one_of(st.integers(0, 9), st.sampled_from([15, 16, 17, 31, 33, 64, 67]))


@st.composite
def cases(draw: st.DrawFn, family: str) -> Case:
    """Any call of a family."""
    dims = Dims(draw(st.integers(0, 3)), draw(sizes), draw(sizes), draw(sizes), draw(sizes), draw(st.integers(0, 3)))
    case = build(
        family,
        dims,
        draw(st.sampled_from(DTYPES)),
        hidden=draw(st.sampled_from(MASKS)),
        span=draw(st.sampled_from(list(RANGES))),
        seed=draw(st.integers(0, 2**32 - 1)),
    )
    if family != "scores" and draw(st.booleans()):
        case = case.replace(grad_context=None)
    return case


@pytest.mark.parametrize("family", FAMILIES)
def test_any_call(family: str, backend: str) -> None:
    """Results and gradients are within tolerance, poison in the padding and odd strides or not, whatever the threads."""
    width = torch.get_num_threads()

    @hypothesis.settings(max_examples=10 if backend == "triton" else 250)
    @hypothesis.given(
        case=cases(family),
        bad=st.sampled_from([0.0, torch.nan, torch.inf, 1e30]),
        layouts=st.dictionaries(st.sampled_from(["query", "keys", "values", "v", "grad_context"]), st.sampled_from(LAYOUTS)),
        isa=st.sampled_from(machine_isas(backend)),
        threads=st.integers(1, 3),
    )
    def holds(case: Case, bad: float, layouts: dict[str, Layout], isa: str, threads: int) -> None:
        if backend == "reference" and case.query.dtype in (torch.bfloat16, torch.float16):
            case = case.to(torch.float32)
        for name, layout in layouts.items():
            if getattr(case, name) is not None and getattr(case, name).numel():
                case = lay(case, layout, (name,))
        os.environ["ONEPASS_ISA"] = isa
        torch.set_num_threads(threads)
        found = results(garbage(case, bad), backend)
        check(found, case)
        if backend == "cpu":
            torch.set_num_threads(1)
            assert_same_bits(results(garbage(case, 0.0), backend), found)

    try:
        holds()
    finally:
        torch.set_num_threads(width)
