"""benchmarks/gpuless.py: occupancy, predictions, and all of it on small kernels."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpuless
import pytest
from gpu import sass
from gpu.compiled import CompilationError, compile_entry, messages, program, resources, source_of
from gpu.devices import device_of, l1_share, occupancy
from gpu.predict import predict
from gpu.study import EXECUTION, prediction, run, study

from onepass.kernels.tiles import TRITON

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton, to compile kernels")


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "blocks", "limit"),
    [  # what cudaOccMaxActiveBlocksPerMultiprocessor of cuda_occupancy.h (CUDA 13.0) gives
        ("80", 32, 0, 4, 16, "registers"),
        ("80", 32, 0, 1, 32, "blocks"),
        ("80", 64, 0, 4, 8, "registers"),
        ("80", 128, 40000, 8, 2, "registers"),
        ("80", 205, 2048, 2, 4, "registers"),
        ("80", 32, 49152, 8, 3, "shared memory"),
        ("80", 255, 0, 8, 1, "registers"),
        ("80", 168, 0, 16, 0, "registers"),
        ("90", 32, 160000, 4, 1, "shared memory"),
        ("90", 72, 49152, 6, 4, "registers"),
        ("100", 32, 101376, 16, 2, "shared memory"),
        ("120", 32, 0, 16, 3, "threads"),
        ("120", 32, 0, 1, 24, "blocks"),
        ("120", 32, 160000, 1, 0, "shared memory"),
    ],
)
def test_occupancy(target: str, registers: int, shared: int, warps: int, blocks: int, limit: str) -> None:
    found = occupancy(device_of(target), registers, shared, warps)
    assert (found.blocks, found.warps, found.limit) == (blocks, blocks * warps, limit)


def test_share_of_l1() -> None:
    """192 KB on an A100: nothing set apart; 2 x 9 KB become 32, 3 x 49 become 164."""
    shares = [l1_share(device_of("80"), shared, blocks) for shared, blocks in ((0, 1), (8192, 2), (49152, 3))]
    assert shares == [(192 - 8) * 1024, 80 * 1024, 28 * 1024 // 3]


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The kernels of gpuless_entries, compiled anew."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found: list[Any] = importlib.import_module("gpuless_entries").entries("80")
    return found


@needs_triton
def test_prediction(small: list[Any]) -> None:
    """On an A100, 8 blocks of 1e9 elements with 4 issue slots, 2 of them FP32, and half a MUFU each; and 2 GB of traffic."""
    entry = replace(small[0], work=1e9, necessary=2 * 10**9, grid=(4, 2, 1))
    issue = sass.Issue({"fma": 20, "mufu": 5, "other": 15}, 20)
    found = predict(device_of("80"), entry, issue, 10.0, None)
    assert found.seconds == pytest.approx(
        {"issue": 4e9 / 128 / 8 / 1.41e9, "mufu": 0.5e9 / 16 / 8 / 1.41e9, "fp32": 2e9 / 64 / 8 / 1.41e9, "bytes": 2e9 / 2.039e12}
    )
    assert found.limit in ("issue", "mufu", "fp32")
    assert found.elements_per_second == pytest.approx(108 * 1.41e9 * 32)
    assert predict(device_of("80"), entry, issue, 10.0, 3 * 10**9).seconds["bytes"] == pytest.approx(3e9 / 2.039e12)
    assert predict(device_of("80"), replace(entry, necessary=10**6), None, None, 10**9).seconds == pytest.approx({"bytes": 1e6 / 2.039e12})


@needs_triton
def test_spills_are_found(small: list[Any]) -> None:
    entry = replace(small[0], constants={"BT": 16, "BS": 64})
    forced = compile_entry(entry, "90", maxnreg=32)
    found = resources(forced)
    assert found.registers <= 32
    assert found.spills == sum(item.kind == "local" for item in program(forced)) > 10
    assert found.stack > 0


@needs_triton
@pytest.mark.skipif(TRITON < (3, 8), reason="there such an error ends the process")
def test_amd_errors_are_found(small: list[Any]) -> None:
    """LLVM prints them and leaves the instruction out; a second time the kernel would come from the cache, without a word."""
    inline = importlib.import_module("gpuless_entries").inline
    entry = replace(small[1], function=inline, constants={"B": 256, "ASM": True})
    entry = replace(entry, signature={**entry.signature, "ASM": "constexpr"})
    for _ in range(2):
        with pytest.raises(CompilationError, match="error"):
            compile_entry(entry, "gfx942")
    assert resources(compile_entry(replace(entry, amd={"ASM": False}), "gfx942")).registers > 0


def test_messages_of_other_languages() -> None:
    with messages() as said:
        os.write(2, b"error: one\n\n  two\n")
        print("of Python's own", file=sys.stderr)
    assert said == ["error: one", "two"]


@needs_triton
def test_hot_loop_of_a_kernel(small: list[Any]) -> None:
    """One reciprocal and at least two FP32 operations an element, whatever else the division takes."""
    record = study("gpuless_entries", 0, "90")
    loop = record["loop"]
    assert loop["per_element"]["mufu"] == 1
    assert loop["fp32"] >= 2 * loop["elements"]
    assert loop["slots_per_element"] * loop["elements"] == sum(loop["slots"].values())
    compiled = compile_entry(small[0], "90")
    assert len(sass.hot_loop(program(compiled), source_of(small[0].function)) or []) == sum(loop["slots"].values())
    assert sass.hot_loop(program(compiled), source_of(small[1].function)) is None
    found = prediction(small[0], record, "90", None)
    assert found is not None
    assert found["device"] == "H100"
    assert prediction(small[0], {"error": ""}, "90", None) is None


@needs_triton
def test_errors_are_told(small: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the compiler (no power of two) and of the PTX machine (a block too many)."""
    bad = [replace(small[1], constants={"B": 100}), replace(small[1], grid=(3, 1, 1))]
    monkeypatch.setattr("gpuless_entries.entries", lambda target: bad)
    assert "CompilationError" in run(("gpuless_entries", 0, "90"))["error"]
    assert "out of bounds" in run(("gpuless_entries", 1, EXECUTION))["error"]


@needs_triton
def test_all(tmp_path: Path) -> None:
    script, path = Path(gpuless.__file__), tmp_path / "result.json"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(script), "--catalogue", "gpuless_entries", "--targets", "80", "--json", str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Prediction, not measured" in done.stdout
    outer, double = json.loads(path.read_text())["kernels"]
    assert not gpuless.failures([outer, double])
    assert outer["execution"]["hot_share"] == 1
    assert outer["execution"]["arguments"]["p_q"]["fetched"] == 4 * 32 * 24
    assert outer["execution"]["arguments"]["p_k"]["fetched"] == 2 * 4 * 24 * 32  # by each of two blocks
    assert outer["execution"]["ratio"] == pytest.approx(1.3)
    assert double["execution"]["ratio"] == 1
    assert "loop" not in double["targets"]["80"]
    assert double["targets"]["80"]["prediction"]["limit"] == "bytes"
    assert outer["targets"]["80"]["spills"] == 0


def test_tiles_of_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    """A target's lines have its own tile and warps; where it did not compile, sm_80's tile."""
    tables: list[list[list[str]]] = []
    monkeypatch.setattr(gpuless, "show", lambda title, columns, rows: tables.append(rows))
    fits = {"occupancy": {"blocks": 3, "limit": "threads"}}
    large, small = {"tile": "64", "warps": 4, **fits}, {"tile": "32", "warps": 2, **fits}
    predicted = {"prediction": {"device": "H100", "seconds": {"bytes": 1e-6}, "limit": "bytes", "elements_per_second": None}}
    targets = {"80": {"error": "no"}, "90": large | predicted, "100": large | predicted, "120": small | predicted}
    kernel: dict[str, Any] = {"name": "k", "tile": "16", "shape": "B 1", "elements": 1.0, "warps": 1, "targets": targets}
    gpuless.show_compiled([kernel])
    gpuless.show_predictions([kernel])
    compiled, predictions = tables
    assert [(row[0], row[5]) for row in compiled] == [("k: 16", ""), ("k: 64", "3 x 4"), ("", "3 x 4"), ("k: 32", "3 x 2")]
    assert [row[:2] for row in predictions] == [["k: 64", "B 1"], ["", ""], ["k: 32", ""]]
    assert [line.partition(",")[0] for line in gpuless.failures([kernel])] == ["k (16)", "k (64)", "k (64)", "k (32)"]


def test_failures() -> None:
    """Everything that a table shows as a number may be wrong in a way that is said."""
    kernel: dict[str, Any] = {
        "name": "k",
        "elements": 1.0,
        "tile": "t",
        "targets": {"80": {"occupancy": {}}, "90": {"error": "no"}},
        "execution": {"findings": ["race"], "hot_share": 4.0},
    }
    compiled, loop, executed, share = gpuless.failures([kernel])
    assert (compiled, loop, executed) == ("k (t), 90: no", "k (t), 80: no hot loop", "k (t), executed: race")
    assert "4.00 of what was executed" in share
    assert not gpuless.failures([{**kernel, "targets": {}, "execution": {"findings": [], "hot_share": None}}])
