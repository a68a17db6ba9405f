"""benchmarks/gpuless.py: machine code taken apart, occupancy, predictions, and all of it on small kernels."""

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
from gpu import ptx_loops, sass
from gpu.compiled import CompilationError, compile_entry, messages, program, resources, source_of
from gpu.devices import device_of, l1_share, occupancy
from gpu.predict import predict
from gpu.study import EXECUTION, prediction, run, study
from ptx.write import module

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton, to compile kernels")

NESTED = """
        .section        .text.first,"ax",@progbits
.text.first:
        /*0000*/                   EXIT ;
        .section        .text.k,"ax",@progbits
.text.k:
        //## File "/somewhere/kernels.py", line 7
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   ISETP.GE.AND P0, PT, R0, 0x1, PT ;
        /*0020*/              @!P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0030*/                   LDG.E R2, desc[UR4][R4.64] ;
.L_x_2:
        /*0040*/                   LDS.128 R8, [R3] ;
        //## File "/somewhere/kernels.py", line 9
        /*0050*/                   FFMA.FTZ R6, R2, R8, R6 ;
        /*0060*/               @P1 FFMA2 R10, R2, R8, R10 ;
        //## File "/elsewhere/arithmetic.py", line 3
        /*0070*/                   MUFU.RCP R7, R6 ;
        /*0080*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0090*/                   SHFL.BFLY PT, R9, R6, 0x1, 0x1f ;
        /*00a0*/                   STL [R1], R9 ;
        /*00b0*/                   BRA.U UP0, `(.L_x_2) ;
        //## File "/somewhere/kernels.py", line 11
        /*00c0*/                   FADD R6, R6, R7 ;
        /*00d0*/               @P0 CALL.REL.NOINC `(.L_x_3) ;
        /*00e0*/                   BRA `(.L_x_1) ;
.L_x_3:
        /*00f0*/                   HMMA.16816.F32 R8, R2, R4, R8 ;
.L_x_0:
        /*0100*/                   EXIT ;
.L_x_4:
        /*0110*/                   BRA `(.L_x_4);
"""


def addresses(body: list[sass.Instruction] | None) -> list[int]:
    assert body is not None
    return [item.address for item in body]


def test_nested_loops() -> None:
    """The outer loop is left by a call that does not come back; the branch to itself after the end is no loop, since nobody gets there."""
    code = sass.parse(NESTED, "k")
    assert [addresses(body) for body in sass.loops(code)] == [list(range(0x30, 0xF0, 16)), list(range(0x40, 0xC0, 16))]
    body = sass.hot_loop(code)
    assert addresses(body) == list(range(0x40, 0xC0, 16))
    counted = sass.issue(body or [])
    classes = {"fma": 2, "tensor": 0, "mufu": 1, "shared": 1, "global": 0, "local": 1, "shuffle": 1, "barrier": 1, "other": 1}
    assert (counted.slots, counted.fp32, counted.total) == (classes, 3, 8)
    assert sorted({item.line for item in code}) == ["arithmetic.py:3", "kernels.py:11", "kernels.py:7", "kernels.py:9"]
    assert addresses(sass.hot_loop(code, {"kernels.py:11"})) == list(range(0x30, 0xF0, 16))


def test_functions_have_to_be_told_apart() -> None:
    assert len(sass.parse(NESTED, "first")) == 1
    with pytest.raises(ValueError, match="which"):
        sass.parse(NESTED)


def listing(*lines: str) -> list[sass.Instruction]:
    """Each line in a place of its own, which branches name as .L0, .L1, ...; it is the source line too."""
    return sass.parse("\n".join(f'//## File "k.py", line {n}\n.L{n}:\n/*{16 * n:04x}*/ {line} ;' for n, line in enumerate(lines)))


def test_waiting_is_no_work() -> None:
    """A loop that spins inside the one that computes does not hide it; it counts once."""
    code = listing(
        "MOV R1, R2", "UTCHMMA gdesc[UR4]", "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4]", "@!P0 BRA `(.L2)", "@P1 BRA `(.L1)", "EXIT"
    )
    assert [len(body) for body in sass.loops(code)] == [4, 2]
    assert addresses(sass.hot_loop(code)) == [0x10, 0x20, 0x30, 0x40]


def test_most_work_is_hottest() -> None:
    """The unrolled loop, not the one for the trips that are left."""
    code = listing("FADD R1, R1, R2", "FADD R1, R1, R3", "@P0 BRA `(.L0)", "FADD R1, R1, R2", "@P0 BRA `(.L3)", "EXIT")
    assert addresses(sass.hot_loop(code)) == [0, 0x10, 0x20]
    assert addresses(sass.hot_loop(code, {"k.py:3", "k.py:4"})) == [0x30, 0x40]
    assert sass.hot_loop(code, {"other.py:3"}) is None


def test_branches_within_a_loop() -> None:
    """Both ways belong to it, and so does every branch back to the same start."""
    code = listing(
        "NOP", "FMUL R1, R1, R2", "@P0 BRA `(.L5)", "MUFU.EX2 R1, R1", "@P2 BRA `(.L1)", "FADD R1, R1, R1", "@P1 BRA `(.L1)", "EXIT"
    )
    assert [addresses(body) for body in sass.loops(code)] == [list(range(0x10, 0x70, 16))]


def test_calls_come_back() -> None:
    """What a loop calls is no part of it, but what follows the call is."""
    code = listing("FADD R1, R1, R2", "CALL.REL.NOINC `(.L4)", "@P0 BRA `(.L0)", "EXIT", "MUFU.RCP R1, R1", "RET.REL.NODEC R2 0x0")
    assert addresses(sass.hot_loop(code)) == [0, 0x10, 0x20]


def test_no_loop() -> None:
    assert sass.hot_loop(listing("FADD R1, R1, R2", "EXIT")) is None
    assert sass.hot_loop(listing("IADD3 R1, R1, R2, RZ", "@P0 BRA `(.L0)", "EXIT")) is None


def test_indirect_branches_are_refused() -> None:
    with pytest.raises(ValueError, match="indirect"):
        listing("BRX R2 -0x40", "EXIT")
    with pytest.raises(ValueError, match="nowhere"):
        listing("BRA `(.L7)", "EXIT")


def test_classes() -> None:
    expected = {
        "fma": "FADD2.FTZ FMUL32I FFMA",
        "tensor": "HGMMA.64x64x16.F32 IMMA.16832.S8.S8 DMMA.884",
        "shared": "LDSM.16.M88.4 STS.128",
        "global": "LDGSTS.E.BYPASS.128 STG.E RED.E.ADD UTMALDG.2D",
        "local": "LDL.64",
        "other": "HFMA2.MMA FSETP.GT LDC.64 IMAD NOP",
    }
    for kind, opcodes in expected.items():
        assert {opcode: listing(f"{opcode} R1, R2")[0].kind for opcode in opcodes.split()} == dict.fromkeys(opcodes.split(), kind)


def test_unrolled_by_the_assembler() -> None:
    """Four reciprocals a trip where the PTX has one."""
    loop = "AGAIN:\n{body}add.u32 %r1, %r1, 1;\nsetp.lt.u32 %p1, %r1, 64;\n@%p1 bra AGAIN;"
    rcp, fma = "rcp.approx.ftz.f32 %f1, %f1;\n", "fma.rn.f32 %f2, %f1, %f1, %f2;\n"
    code = listing(*["MUFU.RCP R1, R1", "FFMA R2, R1, R1, R2"] * 4, "@P0 BRA `(.L0)", "EXIT")
    body = sass.hot_loop(code) or []
    assert ptx_loops.unrolled(body, module(loop.format(body=rcp + fma))) == 4
    assert ptx_loops.unrolled(body, module(loop.format(body=2 * rcp + fma))) == 2
    assert ptx_loops.unrolled(body, module(loop.format(body=2 * fma))) == 2
    assert ptx_loops.unrolled(body, module("add.f32 %f1, %f1, %f1;")) == 1


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
    found: list[Any] = importlib.import_module("gpuless_entries").entries()
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
    monkeypatch.setattr("gpuless_entries.entries", lambda: bad)
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
