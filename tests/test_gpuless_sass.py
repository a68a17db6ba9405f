"""benchmarks/gpu/sass.py: loops and issue slots of machine code that can be counted by hand."""

import pytest
from gpu import ptx_loops, sass
from ptx.write import module

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


def test_work_by_a_function() -> None:
    """The loop with exponentials has more reciprocals, and is not meant."""
    exact = ["MUFU.RCP R1, R1", "MUFU.RCP R2, R2", "MUFU.EX2 R3, R3", "@P0 BRA `(.L0)"]
    code = listing(*exact, "MUFU.RCP R1, R1", "FFMA R1, R1, R2", "@P0 BRA `(.L4)", "EXIT")
    assert addresses(sass.hot_loop(code, sass.reciprocals_alone)) == [0x40, 0x50, 0x60]
    assert sass.hot_loop(listing(*exact, "EXIT"), sass.reciprocals_alone) is None


def test_calls_come_back() -> None:
    """What a loop calls is no part of it, but what follows the call is."""
    code = listing("FADD R1, R1, R2", "CALL.REL.NOINC `(.L4)", "@P0 BRA `(.L0)", "EXIT", "MUFU.RCP R1, R1", "RET.REL.NODEC R2 0x0")
    assert addresses(sass.hot_loop(code)) == [0, 0x10, 0x20]


def test_no_loop() -> None:
    assert sass.hot_loop(listing("FADD R1, R1, R2", "EXIT")) is None
    assert sass.hot_loop(listing("IADD3 R1, R1, R2, RZ", "@P0 BRA `(.L0)", "EXIT")) is None


def test_indirect_branches() -> None:
    """They go where the disassembler says; back to a loop's first instruction too."""
    code = listing("FADD R1, R1, R2", 'BRX R2 -0x40 (*"BRANCH_TARGETS .L0,.L3"*)', "MUFU.RCP R1, R1", "EXIT")
    assert code[1].targets == (0, 0x30)
    assert not code[1].falls
    assert addresses(sass.hot_loop(code)) == [0, 0x10]


def test_branches_to_nowhere_known_are_refused() -> None:
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
