"""The CPU kernels take as many instructions for an element as the figures in instructions.json say: a slow-down is seen without a clock."""

import json
import os
from pathlib import Path

import instructions
import pytest


def test_instructions_per_element(tmp_path: Path) -> None:
    if reason := instructions.other_machine():
        pytest.skip(reason)
    if reason := instructions.no_valgrind():
        (pytest.fail if "CI" in os.environ else pytest.skip)(reason)
    figures = json.loads(instructions.FIGURES.read_text())
    compiler, counted = instructions.count(tmp_path)
    if compiler != figures["compiler"]:
        pytest.skip(f"the figures are of {figures['compiler']}; {compiler} makes other code")
    strays = instructions.strays(figures["instructions per element"], counted)
    assert not strays, "\n".join([*strays, "if that is wanted: `python tests/instructions.py` writes the new figures"])


@pytest.mark.parametrize(("now", "strays"), [(2.0, 0), (2.059, 0), (1.941, 0), (2.061, 1), (1.939, 1), (float("nan"), 1)])
def test_both_ways(now: float, strays: int) -> None:
    assert [line.split(":")[0] for line in instructions.strays({"a": 2.0, "b": 1.0}, {"a": now, "b": 1.0})] == ["a"] * strays


def test_kernels_that_are_new_or_gone() -> None:
    assert [line.split(":")[0] for line in instructions.strays({"a": 2.0}, {"b": 1.0})] == ["a", "b"]
