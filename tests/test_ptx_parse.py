"""What the PTX machine reads out of a module: layout, names, lines, and what it refuses."""

import numpy as np
import pytest
from ptx import Machine, PTXError, parse
from ptx.parse import Address, Immediate, Instruction, Negated, Pair, Register, Symbol, Vector, split
from ptx.values import GLOBAL_WINDOW, integer
from ptx.write import module, run

TWO = """
.version 8.0
.target sm_80
.address_size 64
.file 1 "/some/where/kernels.cu"
.global .align 4 .b8 table[8] = {1, 2, 3, 4, 0x05, 6, 7, 255};
.const .align 8 .u32 pair[2] = {7, 0xffffffff};
.extern .shared .align 16 .b8 dynamic[];
.visible .entry first(.param .u32 count) { ret; }
.visible .entry second(
    .param .u8 flag, .param .u64 .ptr .global .align 16 data, /* a comment; with { braces */
    .param .align 8 .b8 by_value[12], .param .u32 last)
.maxntid 128, 1, 1
.reqntid 64
{
    .reg .pred %p<3>;
    .reg .b32 %r<4>, %single;
    .shared .align 8 .b8 tile[20];
    .shared .u64 barrier;
    .local .align 4 .b8 stack[12];
    .loc 1 12 3
    mov.u32 %r1, tile; // a trailing comment
    @!%p1 ld.shared.v2.b32 {%r1, %r2}, [%r1+-8];
    .loc 1 0 0
    setp.lt.and.s32 %p1|%p2, %r1, -5, !%p2;
    {   .reg .b32 %r1;  .reg .f32 t;
        .loc 1 14 1, function_name $info, inlined_at 1 9 2
        mov.b32 %r1, 0f3F800000; }
    mov.u32 %r3, dynamic;
$loop:
    @%p1 bra.uni $loop;
    .pragma "nounroll";
    st.shared::cta.b32 [ %r3 + 4 ], %single;
    ld.global.u8 %r2, [table+3];
    ret;
}
"""


def test_layout() -> None:
    kernel = parse(TWO, "second")
    assert [(p.name, p.type, p.offset, p.size) for p in kernel.parameters] == [
        ("flag", "u8", 0, 1),
        ("data", "u64", 8, 8),
        ("by_value", "b8", 16, 12),
        ("last", "u32", 28, 4),
    ]
    assert kernel.parameter_bytes == 32
    assert kernel.required_threads == (64,)
    shared = kernel.layouts["shared"].symbols
    assert (shared["tile"].address, shared["barrier"].address, shared["dynamic"].address) == (0, 24, 32)
    assert kernel.layouts["local"].size == 12
    assert kernel.layouts["global"].initial == {0: bytes([1, 2, 3, 4, 5, 6, 7, 255]), 8: bytes([7, 0, 0, 0, 255, 255, 255, 255])}
    assert kernel.registers == {
        **{f"%p{i}": "pred" for i in range(3)},
        **{f"%r{i}": "b32" for i in range(4)},
        "%single": "b32",
        "%r1@1": "b32",
        "t@1": "f32",
    }


def test_instructions() -> None:
    kernel = parse(TWO, "second")
    word = {name: Register(name, kernel.registers[name]) for name in kernel.registers}
    move, load, compare, inner, dynamic, branch, store, table, end = kernel.instructions
    assert move == Instruction("mov.u32 %r1, tile", "kernels.cu:12", "mov", ("u32",), (word["%r1"], Symbol("tile", "shared", 0)))
    assert load.operands == (Vector((word["%r1"], word["%r2"])), Address(word["%r1"], -8))
    assert (load.predicate, load.negated, load.type) == (word["%p1"], True, "b32")
    assert compare.operands == (Pair(word["%p1"], word["%p2"]), word["%r1"], Immediate("-5"), Negated(word["%p2"]))
    assert compare.line == "kernels.cu:12"  # line 0 is the compiler's own: it belongs to what stands around it
    assert inner.operands == (word["%r1@1"], Immediate("0f3F800000"))
    assert inner.line == "kernels.cu:14"
    assert dynamic.operands[1] == Symbol("dynamic", "shared", 32)
    assert kernel.labels["$loop"] == kernel.instructions.index(branch)
    assert store.parts == ("shared", "b32")
    assert store.operands[0] == Address(word["%r3"], 4)
    assert table.operands[1] == Address(Symbol("table", "global", GLOBAL_WINDOW), 3)
    assert end.opcode == "ret"


def test_numbers_and_lists() -> None:
    assert [integer(text) for text in ("12", "-12", "0x1F", "0b101", "017", "0", "4294967295U", "0xffU")] == [
        12,
        -12,
        31,
        5,
        15,
        0,
        4294967295,
        255,
    ]
    assert split("{%a, %b}, [%c+4], (x, y), 3") == ["{%a, %b}", "[%c+4]", "(x, y)", "3"]
    assert split("") == []


def test_choice_of_kernel() -> None:
    assert parse(TWO, "first").name == "first"
    with pytest.raises(PTXError, match="name one"):
        parse(TWO)
    with pytest.raises(PTXError, match="0 kernels named 'third'"):
        parse(TWO, "third")


def test_unknown_instructions_are_named_where_they_are_reached() -> None:
    body = "setp.eq.u32 %p1, %tid, 1000;\n@%p1 bra $there;\nbra $end;\n$there:\nwgmma.fence.sync.aligned;\n$end:"
    assert not run(body, []).findings
    with pytest.raises(PTXError, match=r"wgmma\.fence\.sync\.aligned.*k\.cu:5"):
        run(body.replace("1000", "3"), [])
    with pytest.raises(PTXError, match=r"prmt\.b32\.f4e"):
        run("prmt.b32.f4e %r1, %r1, %r1, %r1;", [])
    with pytest.raises(PTXError, match="not an operand"):
        parse(module("mov.u32 %r1, %unknown;"))
    with pytest.raises(PTXError, match="too narrow"):
        run("add.u64 %rd1, %r1, %rd1;", [])
    with pytest.raises(PTXError, match="does not end"):
        parse(module("").rstrip("}\n"))


def test_arguments() -> None:
    machine = Machine(parse(module("ret;", ["u64", "b32", "f32"])))
    machine.launch(1, 32, [np.zeros(4), 3, 1.5])
    with pytest.raises(ValueError, match="4 arguments for 3"):
        machine.launch(1, 32, [1, 2, 3, 4])
    with pytest.raises(ValueError, match="overlap"):
        Machine(parse(module("ret;", ["u64", "u64"]))).launch(1, 32, [(both := np.zeros(8))[:5], both[3:]])
    with pytest.raises(ValueError, match="a float for p0"):
        machine.launch(1, 32, [1.5])
    with pytest.raises(ValueError, match="contiguous"):
        machine.launch(1, 32, [np.zeros((4, 4)).T])
    with pytest.raises(ValueError, match="2 bytes for p1"):
        machine.launch(1, 32, [np.zeros(1), np.uint16(1)])
    with pytest.raises(ValueError, match="shared memory"):
        machine.launch(1, 32, [], dynamic_shared=1 << 20)
    with pytest.raises(ValueError, match="requires blocks"):
        Machine(parse(TWO, "second")).launch(1, 32, [])
