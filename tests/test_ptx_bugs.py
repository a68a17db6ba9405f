"""Seeded bugs that the PTX machine has to find, each beside the sound program, which has to be clean."""

import re
from collections.abc import Sequence

import numpy as np
import pytest
from ptx import Fault, Finding, Machine, Output, parse
from ptx.machine import Argument
from ptx.write import module, run

TILE = ".shared .align 16 .b8 tile[512];\nld.param.u64 %rd0, [p0];\nld.param.u64 %rd1, [p1];\n"


def findings(body: str, arguments: Sequence[Argument], grid: int = 1, block: int = 64) -> list[Finding]:
    """Everything that a run reports, whether it ends in a fault or not. There are two array arguments; those not given are not used."""
    unused = [np.zeros(1, np.uint32) for _ in range(2 - len(arguments))]
    try:
        return run(body, [*arguments, *unused], grid, block).findings
    except Fault as fault:
        return [fault.finding]


def without(body: str, pattern: str, replacement: str = "") -> str:
    """The broken program; lines keep their numbers."""
    broken, count = re.subn(pattern, replacement, body)
    assert count == 1
    return broken


EXCHANGE = f"""{TILE}
    shl.b32 %r1, %tid, 2;
    st.shared.u32 [%r1], %tid;
    bar.sync 0;
    xor.b32 %r2, %r1, 128;
    ld.shared.u32 %r3, [%r2];
    bar.sync 1;
    st.shared.u32 [%r1], %r3;"""


def test_deleted_barrier() -> None:
    """Between a write and a read, and between a read and the next write."""
    assert not findings(EXCHANGE, [])
    for deleted in (r"bar\.sync 0;", r"bar\.sync 1;"):
        (found, *_) = findings(without(EXCHANGE, deleted, ""), [])
        assert found.kind == "shared race"
    (found,) = findings(without(EXCHANGE, r"bar\.sync 1;"), [])
    assert found.instruction == "st.shared.u32 [%r1], %r3"
    assert "k.cu:9 `ld.shared.u32" in found.other
    assert found.count == 1
    assert "it writes what another read" in found.detail


def test_barrier_of_other_threads_does_not_help() -> None:
    """A barrier that only half the block takes part in orders nothing for the other half."""
    body = EXCHANGE.replace("bar.sync 0;", "setp.lt.u32 %p1, %tid, 64;\n@%p1 bar.sync 0, 64;").replace("%r1, 128", "%r1, 256")
    (found,) = findings(body, [], block=128)
    assert (found.kind, found.thread, found.count) == ("shared race", 64, 2)  # those who did not wait, and those who did


def test_warps_that_leave_count_as_having_come() -> None:
    """The block's barrier waits for them to come or to leave, so what they wrote before is in order."""
    body = EXCHANGE.replace("bar.sync 0;", "setp.ge.u32 %p1, %tid, 32;\n@%p1 ret;\nbar.sync 0;")
    assert not findings(body, [])
    assert [found.kind for found in findings(without(body, r"\nbar\.sync 0;"), [])] == ["shared race"]


COPIES = f"""{TILE}
    .shared .align 16 .b8 stages[2048];
    mad.wide.u32 %rd2, %tid, 16, %rd0;
    shl.b32 %r1, %tid, 4;
    mov.u32 %r20, stages;
    add.u32 %r1, %r1, %r20;
    mov.u32 %r9, 0;
    st.shared.v4.u32 [%r1], {{%r9, %r9, %r9, %r9}};
    cp.async.cg.shared.global [%r1], [%rd2], 16;
    cp.async.commit_group;
    cp.async.cg.shared.global [%r1+1024], [%rd2+1024], 16;
    cp.async.commit_group;
    cp.async.wait_group 1;
    bar.sync 0;
    sub.u32 %r2, 2032, %r1;
    ld.shared.u32 %r3, [%r2];
    cp.async.wait_group 0;
    bar.sync 0;
    ld.shared.u32 %r4, [%r2+1024];"""


def test_weakened_wait() -> None:
    """The second tile is read although its group may be under way; that the first wait leaves one is right."""
    source = np.arange(512, dtype=np.uint32)
    assert not findings(COPIES, [source])
    found = findings(without(COPIES, "wait_group 0", "wait_group 1"), [source])
    assert found[0].kind == "shared access during a copy"
    assert found[0].instruction == "ld.shared.u32 %r4, [%r2+1024]"
    assert "cp.async.cg.shared.global [%r1+1024]" in found[0].other
    found = findings(without(COPIES, "wait_group 1", "wait_group 2"), [source])
    assert found[0].kind == "shared access during a copy"
    assert found[0].instruction == "ld.shared.u32 %r3, [%r2]"


def test_copy_seen_by_others_needs_a_barrier() -> None:
    found = findings(re.sub(r"wait_group 0;\n    bar\.sync 0;", "wait_group 0;\n", COPIES), [np.arange(512, dtype=np.uint32)])
    assert [item.kind for item in found] == ["shared race"]


def test_stage_overwritten_while_it_is_read() -> None:
    """A copy into a buffer that other threads may still be reading."""
    more = COPIES.replace(
        "ld.shared.u32 %r3, [%r2];", "ld.shared.u32 %r3, [%r2];\nbar.sync 2;\ncp.async.cg.shared.global [%r1], [%rd2], 16;"
    )
    source = np.arange(512, dtype=np.uint32)
    assert not findings(more, [source])
    (found,) = findings(without(more, r"bar\.sync 2;"), [source])
    assert (found.kind, found.instruction) == ("shared race", "cp.async.cg.shared.global [%r1], [%rd2], 16")


WALK = f"""{TILE}
    setp.ge.u32 %p1, %tid, {{count}};
    @%p1 bra $end;
    shl.b32 %r1, %tid, 2;
    st.shared.u32 [%r1], %tid;
    mad.wide.u32 %rd2, %tid, 4, %rd0;
    ld.global.u32 %r2, [%rd2];
    mad.wide.u32 %rd3, %tid, 4, %rd1;
    st.global.u32 [%rd3], %r2;
    $end:"""


def test_overruns_by_one() -> None:
    sound = WALK.format(count=128)
    source, target = np.arange(128, dtype=np.uint32), np.empty(128, np.uint32)
    assert not findings(sound, [source, Output(target)], block=160)
    (found,) = findings(WALK.format(count=129), [source, Output(target)], block=160)
    assert (found.kind, found.thread, found.line) == ("shared access out of bounds", 128, "k.cu:8")
    assert "offset 512 of 512" in found.detail
    (found,) = findings(sound, [source[:127].copy(), Output(target)], block=160)
    assert (found.kind, found.thread, found.line) == ("global access out of bounds", 127, "k.cu:10")
    assert "offset 508 of 508 in p0" in found.detail
    (found,) = findings(sound, [source, Output(target[:127].copy())], block=160)
    assert (found.kind, found.thread, found.line) == ("global access out of bounds", 127, "k.cu:12")
    (found,) = findings(
        without(sound, r"mad\.wide\.u32 %rd3, %tid, 4, %rd1;", "mad.wide.s32 %rd3, -4, 1, %rd1;"), [source, Output(target)], block=160
    )
    assert found.kind == "global access out of bounds"


def test_uninitialised_reads() -> None:
    sound = f"""{TILE}
        shl.b32 %r1, %tid, 2;
        st.shared.u32 [%r1], %tid;
        bar.sync 0;
        ld.shared.u32 %r2, [%r1+{{offset}}];
        mad.wide.u32 %rd2, %tid, 4, %rd0;
        {{store}}
        ld.global.u32 %r3, [%rd2];"""
    array = np.arange(64, dtype=np.uint32)
    store = "st.global.u32 [%rd2], %tid;"
    assert not findings(sound.format(offset=0, store=store), [Output(array)])
    (found,) = findings(sound.format(offset=4, store=store), [Output(array)])
    assert (found.kind, found.thread) == ("uninitialised shared read", 63)
    (found,) = findings(sound.format(offset=0, store=""), [Output(array)])
    assert (found.kind, found.instruction) == ("uninitialised global read", "ld.global.u32 %r3, [%rd2]")
    assert not findings(sound.format(offset=0, store=""), [array])


def test_shared_memory_does_not_outlive_a_block() -> None:
    first = "mov.u32 %r1, %ctaid.x;\nsetp.eq.u32 %p1, %r1, 0;\n@%p1 st.shared.u32 [tile], %r1;"
    body = f"{TILE}\n{first}\nbar.sync 0;\nld.shared.u32 %r2, [tile];"
    found = findings(body, [], grid=2, block=1)
    assert [(item.kind, item.block) for item in found] == [("uninitialised shared read", (1, 0, 0))]


def test_misaligned_accesses() -> None:
    accesses = "st.shared.v4.u32 [%r1+{}], {{%r1, %r1, %r1, %r1}};\nld.global.v2.u32 {{%r2, %r3}}, [%rd0+{}];"
    body = f"{TILE}\nmov.u32 %r1, tile;\n{accesses}"
    source = np.zeros(64, np.uint32)
    assert not findings(body.format(32, 8), [source], block=1)
    assert [found.kind for found in findings(body.format(8, 8), [source], block=1)] == ["misaligned shared access"]
    assert [found.kind for found in findings(body.format(16, 4), [source], block=1)] == ["misaligned global access"]
    copy = f"{TILE}\ncp.async.cg.shared.global [tile+{{}}], [%rd0+{{}}], 16;\ncp.async.wait_all;"
    assert not findings(copy.format(16, 16), [source], block=1)
    assert [found.kind for found in findings(copy.format(8, 16), [source], block=1)] == ["misaligned shared access"]
    assert [found.kind for found in findings(copy.format(16, 8), [source], block=1)] == ["misaligned global access"]


BLOCKS = """
    ld.param.u64 %rd0, [p0];
    ld.param.u64 %rd1, [p1];
    mov.u32 %r1, %ctaid.x;
    mad.lo.u32 %r2, %r1, {stride}, %tid;
    mad.wide.u32 %rd2, %r2, {width}, %rd0;
    {write}
    mad.wide.u32 %rd3, %r2, {width}, %rd1;
    ld.global.u32 %r3, [%rd3];"""


def test_blocks_that_write_the_same_element() -> None:
    """Even if they write the same; neighbours, of bytes too, are fine, and so are atomics."""
    for width, stored in ((4, "st.global.u32 [%rd2], %r2;"), (1, "st.global.u8 [%rd2], %r2;")):
        body = BLOCKS.replace("ld.global.u32 %r3, [%rd3];", "")
        arrays = [Output(np.empty(512, np.uint32))]
        assert not findings(body.format(stride=64, width=width, write=stored), arrays, grid=3)
        (found,) = findings(body.format(stride=63, width=width, write=stored), arrays, grid=3)
        assert (found.kind, found.block, found.thread) == ("race between blocks", (1, 0, 0), 0)
        assert found.line in found.other
        assert found.count == 2
    atomic = BLOCKS.format(stride=63, width=4, write="red.global.add.u32 [%rd2], 1;").replace("ld.global.u32 %r3, [%rd3];", "")
    assert not findings(atomic, [np.zeros(512, np.uint32)], grid=3)


def test_block_that_reads_what_another_writes() -> None:
    """In either order of the blocks, and against an atomic."""
    array = np.zeros(512, np.uint32)
    for write in ("st.global.u32 [%rd2], %r2;", "red.global.add.u32 [%rd2], %r2;"):
        assert not findings(BLOCKS.format(stride=64, width=4, write=write), [array, array], grid=2)
        reports = findings(BLOCKS.format(stride=64, width=4, write=write).replace("[%rd3]", "[%rd3+4]"), [array, array], grid=2)
        (found,) = [item for item in reports if item.kind == "race between blocks"]
        assert (found.kind, found.block) == ("race between blocks", (1, 0, 0))  # it writes what the first block had read
        assert "k.cu:8 `ld.global.u32" in found.other
    backwards = BLOCKS.format(stride=64, width=4, write="st.global.u32 [%rd2+4], %r2;")
    (found, *_) = [item for item in findings(backwards, [array, array], grid=2) if item.kind == "race between blocks"]
    assert (found.block, found.instruction) == ((1, 0, 0), "ld.global.u32 %r3, [%rd3]")


def test_threads_that_race_in_global_memory() -> None:
    body = f"""{TILE}
        mad.wide.u32 %rd2, %tid, 4, %rd0;
        st.global.u32 [%rd2], %tid;
        bar.sync 0;
        xor.b32 %r1, %tid, 40;
        mad.wide.u32 %rd3, %r1, 4, %rd0;
        ld.global.u32 %r2, [%rd3];"""
    array = np.zeros(64, np.uint32)
    assert not findings(body, [array])
    (found,) = findings(without(body, r"bar\.sync 0;"), [array])
    assert (found.kind, found.instruction) == ("global race", "ld.global.u32 %r2, [%rd3]")


def test_lanes_that_store_to_one_address() -> None:
    """Different values at once are a race; the same value is what compilers do with replicated results."""
    body = f"{TILE}\nst.shared.u32 [tile], {{}};\nst.global.u32 [%rd0], {{}};"
    array = np.zeros(1, np.uint32)
    assert not findings(body.format(7, 7), [array])
    assert [found.kind for found in findings(body.format("%tid", 7), [array])] == ["shared race"]
    assert [found.kind for found in findings(body.format(7, "%tid"), [array])] == ["global race"]


def test_divergent_barrier() -> None:
    """A barrier in a branch that splits a warp, or that some lanes have left before."""
    body = "setp.lt.u32 %p1, %tid, {};\n@!%p1 bra $other;\nbar.sync 0;\nbra $end;\n$other:\nbar.sync 0;\n$end:"
    assert not findings(body.format(32), [])
    assert not findings(body.format(64), [])
    found = findings(body.format(48), [])
    assert {(item.kind, item.instruction) for item in found} == {("divergent barrier", "bar.sync 0")}
    leave = "setp.ge.u32 %p1, %tid, {};\n@%p1 ret;\nbar.sync 0;"
    assert not findings(leave.format(32), [])
    assert [item.kind for item in findings(leave.format(40), [])] == ["divergent barrier"]
    unaligned = body.replace("bar.sync", "barrier.sync")
    assert not findings(unaligned.format(48), [])


def test_deadlock() -> None:
    """Threads that wait at barriers which the others never come to."""
    body = "setp.lt.u32 %p1, %tid, 32;\n@%p1 bar.sync 1;\n@!%p1 bar.sync {};"
    assert not findings(body.format(1), [])
    (found,) = findings(body.format(2), [])
    assert found.kind == "deadlock"
    assert "32 at `@%p1 bar.sync 1`; 32 at `@!%p1 bar.sync 2`" in found.detail


def test_warp_operation_names_an_exited_lane() -> None:
    leave = "setp.ge.u32 %p1, %tid, 40;\n@%p1 ret;\nsetp.ge.u32 %p2, %tid, 32;\nselp.b32 %r5, 0xff, -1, %p2;"
    body = f"{leave}\nshfl.sync.bfly.b32 %r1, %tid, 1, 31, {{}};"
    assert not findings(body.format("%r5"), [])
    (found,) = findings(body.format(-1), [])
    assert (found.kind, found.thread) == ("warp operation names an exited lane", 32)
    late = "setp.lt.u32 %p1, %tid, 8;\n@%p1 bra $vote;\nret;\n$vote:\nvote.sync.ballot.b32 %r1, %p1, {};"
    assert not findings(late.format(255), [], block=32)
    assert [item.kind for item in findings(late.format(511), [], block=32)] == ["warp operation names an exited lane"]


def test_other_misuse_of_warp_operations() -> None:
    shuffle = "setp.lt.u32 %p1, %tid, 16;\n@%p1 shfl.sync.idx.b32 %r1, %tid, {}, 31, {};"
    assert not findings(shuffle.format(3, 0xFFFF), [], block=32)
    assert [item.kind for item in findings(shuffle.format(20, 0xFFFF), [], block=32)] == ["shuffle from an inactive lane"]
    assert [item.kind for item in findings(shuffle.format(3, 0xFF), [], block=32)] == ["lane outside its mask"]
    assert [item.kind for item in findings(shuffle.format(3, -1), [], block=32)] == ["warp operation names an exited lane"]


def test_masks_that_disagree() -> None:
    body = "setp.lt.u32 %p1, %tid, 16;\nselp.b32 %r1, {}, 0xffff0000, %p1;\nshfl.sync.bfly.b32 %r2, %tid, 1, 31, %r1;"
    assert not findings(body.format(0xFFFF), [], block=32)
    assert [item.kind for item in findings(body.format(-1), [], block=32)] == ["warp operation with different masks"]


def test_null_pointers() -> None:
    body = "ld.param.u64 %rd0, [p0];\nld.global.u32 %r1, [%rd0+64];"
    for access in (body, body.replace("ld.global", "ld")):
        (found,) = findings(access, [np.uint64(0)], block=1)
        assert found.kind == "global access out of bounds"
        assert "outside every buffer" in found.detail


def test_endless_loop() -> None:
    machine = Machine(parse(module("$again:\nadd.u32 %r1, %r1, 1;\nbra $again;")), limit=1000)
    with pytest.raises(Fault, match="no end"):
        machine.launch(1, 32, [])


def test_findings_say_where() -> None:
    (found,) = findings(without(EXCHANGE, r"bar\.sync 1;"), [])
    text = str(found)
    for part in ("shared race", "`st.shared.u32 [%r1], %r3`", "k.cu:11", "block (0, 0, 0)", "thread 0", "k.cu:9"):
        assert part in text


def test_write_to_an_input() -> None:
    """An array that numpy may not write is one that the kernel may not."""
    body = f"{TILE}\nmad.wide.u32 %rd2, %tid, 4, %rd0;\nst.global.u32 [%rd2], %tid;"
    array = np.zeros(64, np.uint32)
    assert not findings(body, [array])
    array.flags.writeable = False
    assert [found.kind for found in findings(body, [array])] == ["write to a read-only buffer"]


def test_atomics_race_with_plain_accesses_only() -> None:
    """Two atomics need nothing between them; an atomic and a load or a store of another thread do."""
    first = "shl.b32 %r1, %tid, 2;\nxor.b32 %r2, %r1, 128;\nmov.u32 %r3, 0;\nst.shared.u32 [%r1], %r3;\nbar.sync 0;"
    add, other, load = "red.shared.add.u32 [%r1], 1;", "red.shared.add.u32 [%r2], 1;", "ld.shared.u32 %r4, [%r2];"
    strong = load.replace("ld.", "ld.volatile.")
    for sound in (f"{add}\n{other}", f"{add}\n{strong}\n{other}", f"{add}\nbar.sync 0;\n{load}", f"{load}\nbar.sync 0;\n{add}"):
        assert not findings(f"{TILE}\n{first}\n{sound}", [])
    for broken in (f"{add}\n{load}", f"{load}\n{add}", f"{add}\nst.shared.u32 [%r2], %r3;"):
        assert [found.kind for found in findings(f"{TILE}\n{first}\n{broken}", [])] == ["shared race"]


def test_blocks_that_mix_atomics_and_stores() -> None:
    """A cell that one block stores to and others update by atomics, in either order of the blocks."""
    body = """
        ld.param.u64 %rd0, [p0];
        mov.u32 %r1, %ctaid.x;
        setp.{}.u32 %p1, %r1, 1;
        setp.ne.u32 %p2, %tid, 0;
        @%p2 bra $end;
        @%p1 st.global.u32 [%rd0], %r1;
        @!%p1 red.global.add.u32 [%rd0], 1;
        $end:"""
    for storing in ("lt", "eq", "gt"):
        reports = findings(body.format(storing), [np.zeros(1, np.uint32)], grid=3)
        assert {found.kind for found in reports} == {"race between blocks"}
        assert reports[0].block == (2 if storing == "gt" else 1, 0, 0)
