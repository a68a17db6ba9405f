"""Loads, stores, copies and atomics of the PTX machine: data, and what is counted."""

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from ptx import Buffer, Fault, Output, Traffic
from ptx.write import machine, run

ADDRESS = "ld.param.u64 %rd{0}, [p{0}];"
POINTERS = "ld.param.u64 %rd0, [p0];\nld.param.u64 %rd1, [p1];\n"


@pytest.mark.parametrize(
    ("dtype", "vector"), [(f"u{width}", vector) for width in (1, 2, 4, 8) for vector in (1, 2, 4) if width * vector <= 16]
)
def test_vectors(dtype: Any, vector: int) -> None:
    """Every width of a vector load and store, through shared memory."""
    width = np.dtype(dtype).itemsize
    size, bits = width * vector, 8 * width
    prefix = {1: "h", 2: "h", 4: "r", 8: "rd"}[width]
    names = ", ".join(f"%{prefix}{10 + index}" for index in range(vector))
    words, operand = (f".v{vector}", f"{{{names}}}") if vector > 1 else ("", names)
    source = np.random.default_rng(0).integers(0, 1 << 8 * width, (32, vector), dtype, endpoint=False)
    target = np.empty_like(source)
    body = f"""
        .shared .align 16 .b8 tile[{32 * size}];
        {POINTERS}
        mad.wide.u32 %rd2, %tid, {size}, %rd0;
        mad.wide.u32 %rd3, %tid, {size}, %rd1;
        mov.u32 %r1, tile;
        mad.lo.u32 %r1, %tid, {size}, %r1;
        ld.global{words}.b{bits} {operand}, [%rd2];
        st.shared{words}.b{bits} [%r1], {operand};
        ld.shared{words}.b{bits} {operand}, [%r1];
        st.global{words}.b{bits} [%rd3], {operand};"""
    made = run(body, [source, Output(target)])
    assert not made.findings
    assert np.array_equal(target, source)
    assert made.global_bytes == {"p0": Traffic(source.nbytes, 0), "p1": Traffic(0, source.nbytes)}
    sectors = -(-source.nbytes // 32)
    assert (made.counts["global sectors loaded"], made.counts["global sectors stored"]) == (sectors, sectors)
    assert made.counts["shared wavefronts"] == 2 * max(1, source.nbytes // 128)


def test_signed_loads_extend() -> None:
    source, target = np.arange(-16, 16, dtype=np.int8), np.empty(32, np.int32)
    body = f"""{POINTERS}
        cvt.u64.u32 %rd2, %tid;
        add.u64 %rd2, %rd2, %rd0;
        mad.wide.u32 %rd3, %tid, 4, %rd1;
        ld.global.s8 %r1, [%rd2];
        st.global.s32 [%rd3], %r1;"""
    run(body, [source, Output(target)])
    assert np.array_equal(target, source)


def test_generic_addresses() -> None:
    """One generic load whose lanes go to global, shared and local memory, with the addresses that cvta gives."""
    source, target = np.arange(32, dtype=np.uint32) + 100, np.empty(32, np.uint32)
    body = f"""{POINTERS}
        .shared .u32 tile[32];
        .local .align 4 .b8 stack[8];
        mov.u64 %rd2, tile;
        mad.wide.u32 %rd2, %tid, 4, %rd2;
        add.u32 %r1, %tid, 1000;
        st.shared.u32 [%rd2], %r1;
        mov.u64 %rd3, stack;
        add.u32 %r2, %tid, 5000;
        st.local.u32 [%rd3+4], %r2;
        cvta.shared.u64 %rd2, %rd2;
        cvta.local.u64 %rd3, %rd3;
        add.u64 %rd3, %rd3, 4;
        mad.wide.u32 %rd4, %tid, 4, %rd0;
        cvta.global.u64 %rd4, %rd4;
        rem.u32 %r3, %tid, 3;
        setp.eq.u32 %p1, %r3, 1;
        setp.eq.u32 %p2, %r3, 2;
        selp.b64 %rd4, %rd2, %rd4, %p1;
        selp.b64 %rd4, %rd3, %rd4, %p2;
        ld.u32 %r4, [%rd4];
        mad.wide.u32 %rd5, %tid, 4, %rd1;
        st.u32 [%rd5], %r4;
        cvta.to.shared.u64 %rd6, %rd2;
        cvt.u32.u64 %r5, %rd6;
        ld.shared.u32 %r6, [%r5];
        setp.ne.u32 %p3, %r6, %r1;
        @%p3 trap;"""
    made = run(body, [source, Output(target)])
    assert not made.findings
    lane = np.arange(32)
    assert np.array_equal(target, np.choose(lane % 3, [lane + 100, lane + 1000, lane + 5000]))


def test_parameters() -> None:
    """Scalars, floats, and a struct by value."""
    target = np.empty(4, np.uint32)
    outside = ""
    body = """
        ld.param.u64 %rd0, [p0];
        ld.param.u32 %r1, [p1];
        ld.param.f32 %f1, [p2];
        ld.param.u16 %h1, [p3+2];
        cvt.u32.u16 %r2, %h1;
        ld.param.v2.u32 {%r3, %r4}, [p4];
        st.global.v4.b32 [%rd0], {%r1, %f1, %r2, %r4};"""
    made = machine(body, ["u64", "s32", "f32", "b32", "b64"], outside)
    made.launch(1, 1, [Output(target), -2, 0.5, np.uint32(0xABCD1234), struct.pack("<II", 1, 77)])
    assert list(target) == [0xFFFFFFFE, 0x3F000000, 0xABCD, 77]


def test_module_variables_and_dynamic_shared() -> None:
    outside = ".global .align 4 .b8 table[8] = {1, 2, 3, 4, 5, 6, 7, 8};\n.extern .shared .align 16 .b8 dynamic[];"
    target = np.empty(3, np.uint32)
    body = """
        .shared .u32 fixed;
        ld.param.u64 %rd0, [p0];
        mov.u64 %rd1, table;
        ld.global.u32 %r1, [%rd1+4];
        mov.u32 %r2, dynamic;
        st.shared.u32 [%r2+60], %r1;
        ld.shared.u32 %r3, [dynamic+60];
        mov.u32 %r4, %dynamic_smem_size;
        st.global.u32 [%rd0], %r3;
        st.global.u32 [%rd0+4], %r4;
        st.global.u32 [%rd0+8], %r2;"""
    made = run(body, [Output(target)], block=1, outside=outside, dynamic_shared=64)
    assert not made.findings
    assert list(target) == [0x08070605, 64, 16]


@pytest.mark.parametrize(("stride", "wavefronts"), [(1, 1), (2, 2), (3, 1), (16, 16), (32, 32), (33, 1), (0, 1)])
def test_bank_conflicts(stride: int, wavefronts: int) -> None:
    body = f"""
        .shared .b8 tile[{4 * 33 * 32}];
        mad.lo.u32 %r1, %tid, {4 * stride}, 0;
        setp.eq.u32 %p1, %tid, 0;
        {"@%p1 " if stride == 0 else ""}st.shared.u32 [%r1], %tid;
        bar.sync 0;
        ld.shared.u32 %r2, [%r1];"""
    made = run(body, [])
    assert not made.findings
    assert made.counts["shared wavefronts"] == wavefronts + (1 if stride == 0 else wavefronts)
    assert made.counts["shared wavefronts at least"] == 2


def test_wide_accesses_take_a_wavefront_for_each_quarter_warp() -> None:
    """16 bytes per lane: eight lanes fill all banks; rows of 128 bytes put them all on the same four."""
    body = ".shared .align 16 .b8 tile[4096];\nmul.lo.u32 %r1, %tid, {};\nst.shared.v4.u32 [%r1], {{%tid, %tid, %tid, %tid}};"
    assert run(body.format(16), []).counts["shared wavefronts"] == 4
    conflicts = run(body.format(128), []).counts
    assert (conflicts["shared wavefronts"], conflicts["shared wavefronts at least"]) == (32, 4)
    # each quarter of the warp on banks of its own
    apart = "and.b32 %r2, %tid, 7;\nshr.u32 %r3, %tid, 3;\nshl.b32 %r3, %r3, 4;\nmad.lo.u32 %r1, %r2, 128, %r3;"
    assert run(body.replace("mul.lo.u32 %r1, %tid, {};", apart).format(), []).counts["shared wavefronts"] == 32


@pytest.mark.parametrize(("stride", "sectors", "bytes_"), [(4, 4, 128), (0, 1, 4), (32, 32, 128), (8, 8, 128), (128, 32, 128)])
def test_global_traffic(stride: int, sectors: int, bytes_: int) -> None:
    source = np.zeros(2048, np.uint32)
    body = f"ld.param.u64 %rd0, [p0];\nmad.wide.u32 %rd1, %tid, {stride}, %rd0;\nld.global.u32 %r1, [%rd1];"
    made = run(body, [source])
    assert made.counts["global sectors loaded"] == sectors
    assert made.counts["global requests loaded"] == 1
    assert made.global_bytes["p0"] == Traffic(bytes_, 0)
    made.launch(1, 64, [source])
    assert made.global_bytes["p0"] == Traffic(3 * bytes_, 0)


def test_buffer_offsets() -> None:
    """A buffer may start where vectors do not, and bounds are those of the array."""
    source = np.arange(8, dtype=np.uint32)
    body = "ld.param.u64 %rd0, [p0];\nld.global.v2.u32 {%r1, %r2}, [%rd0+24];"
    run(body, [source], block=1)
    run(body, [Buffer(source, offset=8)], block=1)
    with pytest.raises(Fault, match="misaligned"):
        run(body, [Buffer(source, offset=4)], block=1)


def test_same_array_twice_is_one_buffer() -> None:
    array = np.arange(32, dtype=np.uint32)
    body = f"""{POINTERS}
        mad.wide.u32 %rd2, %tid, 4, %rd0;
        mad.wide.u32 %rd3, %tid, 4, %rd1;
        ld.global.u32 %r1, [%rd2];
        add.u32 %r1, %r1, 5;
        st.global.u32 [%rd3], %r1;"""
    assert not run(body, [array, array]).findings
    assert np.array_equal(array, np.arange(32) + 5)


COPY = """
    .shared .align 16 .b8 tile[1024];
    ld.param.u64 %rd0, [p0];
    ld.param.u64 %rd1, [p1];
    mad.wide.u32 %rd2, %tid, 16, %rd0;
    shl.b32 %r1, %tid, 4;
    cp.async.cg.shared.global [%r1], [%rd2], 16;
    cp.async.commit_group;
    cp.async.ca.shared.global [%r1+512], [%rd2+512], 8;
    cp.async.ca.shared.global [%r1+520], [%rd2+520], 4;
    cp.async.ca.shared.global [%r1+524], [%rd2+524], 4, {size};
    cp.async.commit_group;
    cp.async.wait_group 1;
    ld.shared.v4.u32 {{%r4, %r5, %r6, %r7}}, [%r1];
    {wait};
    ld.shared.v4.u32 {{%r8, %r9, %r10, %r11}}, [%r1+512];
    mad.wide.u32 %rd3, %tid, 16, %rd1;
    st.global.v4.u32 [%rd3], {{%r4, %r5, %r6, %r7}};
    st.global.v4.u32 [%rd3+512], {{%r8, %r9, %r10, %r11}};"""


@pytest.mark.parametrize("size", [4, 2, 0])
@pytest.mark.parametrize("wait", ["cp.async.wait_group 0", "cp.async.wait_all"])
def test_asynchronous_copies(size: int, wait: str) -> None:
    """Two groups, the second with a copy that reads fewer bytes than it writes and fills up with zeros."""
    source, target = np.random.default_rng(1).integers(0, 2**32, 256, np.uint32), np.empty(256, np.uint32)
    made = run(COPY.format(size=size, wait=wait), [source, Output(target)])
    assert not made.findings
    expected = source.copy()
    expected[128 + 3 :: 4] &= np.uint32((1 << 8 * size) - 1)
    assert np.array_equal(target, expected)
    assert made.global_bytes["p0"].loaded == 512 + 32 * (12 + size)


def test_copies_that_read_nothing_may_point_anywhere() -> None:
    """Masked tiles are filled this way beyond the end of a tensor."""
    body = """
        .shared .align 16 .b8 tile[512];
        ld.param.u64 %rd0, [p0];
        mad.wide.u32 %rd2, %tid, 16, %rd0;
        shl.b32 %r1, %tid, 4;
        setp.lt.u32 %p1, %tid, 2;
        selp.b32 %r2, 16, 0, %p1;
        cp.async.cg.shared.global [%r1], [%rd2], 16, %r2;
        cp.async.wait_all;
        ld.shared.u32 %r3, [%r1];
        setp.ne.u32 %p2, %r3, 9;
        setp.ne.and.u32 %p3, %r3, 0, %p2;
        @%p3 trap;"""
    assert not run(body, [np.full(8, 9, np.uint32)]).findings


def test_wait_of_some_threads() -> None:
    """Those who did not wait have not got their data."""
    body = """
        .shared .align 16 .b8 tile[1024];
        ld.param.u64 %rd0, [p0];
        mad.wide.u32 %rd2, %tid, 16, %rd0;
        shl.b32 %r1, %tid, 4;
        setp.lt.u32 %p1, %tid, 40;
        cp.async.cg.shared.global [%r1], [%rd2], 16;
        cp.async.commit_group;
        @%p1 cp.async.wait_group 0;
        @%p1 ld.shared.u32 %r3, [%r1];"""
    source = np.zeros(256, np.uint32)
    assert not run(body, [source], block=64).findings
    assert [finding.thread for finding in run(body.replace("@%p1 ld", "ld"), [source], block=64).findings] == [40, 40]


def test_shared_addresses_wrap() -> None:
    body = ".shared .u32 tile[4];\nmov.u32 %r1, 0xfffffffc;\nst.shared.u32 [%r1+8], %tid;\nld.shared.u32 %r2, [tile+4];"
    assert not run(body, [], block=1).findings


def test_waits_are_per_thread() -> None:
    """Threads that commit an empty group more wait for copies which the others leave under way."""
    body = """
        .shared .align 16 .b8 tile[1024];
        ld.param.u64 %rd0, [p0];
        mad.wide.u32 %rd2, %tid, 16, %rd0;
        shl.b32 %r1, %tid, 4;
        setp.lt.u32 %p1, %tid, 40;
        cp.async.cg.shared.global [%r1], [%rd2], 16;
        cp.async.commit_group;
        @%p1 cp.async.commit_group;
        cp.async.wait_group 1;
        @%p1 ld.shared.u32 %r3, [%r1];"""
    assert not run(body, [np.zeros(256, np.uint32)], block=64).findings
    assert [finding.kind for finding in run(body.replace("@%p1 ld", "ld"), [np.zeros(256, np.uint32)], block=64).findings] == [
        "shared access during a copy",
        "uninitialised shared read",
    ]


ATOMICS: dict[str, tuple[Callable[[int, int], int], str]] = {
    "add.u32": (lambda old, b: old + b, "u4"),
    "min.s32": (min, "i4"),
    "max.u32": (max, "u4"),
    "and.b32": (lambda old, b: old & b, "u4"),
    "or.b32": (lambda old, b: old | b, "u4"),
    "xor.b32": (lambda old, b: old ^ b, "u4"),
    "exch.b32": (lambda old, b: b, "u4"),
    "inc.u32": (lambda old, b: 0 if old >= b else old + 1, "u4"),
    "dec.u32": (lambda old, b: b if old == 0 or old > b else old - 1, "u4"),
    "add.u64": (lambda old, b: old + b, "u8"),
    "add.f32": (lambda old, b: old + b, "f4"),
    "max.s64": (max, "i8"),
}


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize("name", ATOMICS)
def test_atomics(name: str, space: str) -> None:
    """All lanes update one of four cells; the result and what each lane saw are those of the lanes in order."""
    function, dtype = ATOMICS[name]
    bits = 8 * np.dtype(dtype).itemsize
    register = "r" if bits == 32 else "rd"
    values = np.random.default_rng(2).integers(0, 20, 64).astype(dtype)
    cells, seen = np.array([3, 7, 0, 11], dtype), np.empty(64, dtype)
    through = f"""
        cvt.u64.u32 %rd5, %r1;
        setp.lt.u32 %p1, %tid, 4;
        mad.wide.u32 %rd6, %tid, {bits // 8}, %rd0;
        mad.wide.u32 %rd5, %tid, {bits // 8}, cells;
        @%p1 ld.global.b{bits} %{register}20, [%rd6];
        @%p1 st.shared.b{bits} [%rd5], %{register}20;
        bar.sync 0;"""
    body = f"""
        .shared .b{bits} cells[4];
        ld.param.u64 %rd0, [p0];
        ld.param.u64 %rd1, [p1];
        ld.param.u64 %rd2, [p2];
        and.b32 %r1, %tid, 3;
        {through if space == "shared" else ""}
        mad.wide.u32 %rd3, %r1, {bits // 8}, {"cells" if space == "shared" else "%rd0"};
        mad.wide.u32 %rd4, %tid, {bits // 8}, %rd1;
        ld.global.b{bits} %{register}10, [%rd4];
        atom.{space}.{name} %{register}11, [%rd3], %{register}10;
        mad.wide.u32 %rd4, %tid, {bits // 8}, %rd2;
        st.global.b{bits} [%rd4], %{register}11;
        bar.sync 0;
        {f"@%p1 ld.shared.b{bits} %{register}20, [%rd5];" if space == "shared" else ""}
        {f"@%p1 st.global.b{bits} [%rd6], %{register}20;" if space == "shared" else ""}"""
    expected, order = [item.item() for item in cells], []
    for lane, value in enumerate(values):
        order.append(expected[lane % 4])
        expected[lane % 4] = function(expected[lane % 4], value.item())
    assert not run(body, [cells, values, Output(seen)], block=64).findings
    assert cells.tolist() == expected
    assert seen.tolist() == order


def test_compare_and_swap_and_red() -> None:
    """A spin over cas adds up like red does, between blocks too."""
    body = f"""{POINTERS}
        setp.ne.u32 %p1, %tid, 0;
        @%p1 ret;
        ld.relaxed.gpu.global.u32 %r1, [%rd0];
        $again:
        add.u32 %r2, %r1, 3;
        atom.global.cas.b32 %r3, [%rd0], %r1, %r2;
        setp.ne.u32 %p2, %r3, %r1;
        mov.u32 %r1, %r3;
        @%p2 bra $again;
        red.global.add.u32 [%rd1], 3;"""
    cells = np.zeros(2, np.uint32)
    first, second = cells[:1].copy(), cells[1:].copy()
    assert not run(body, [first, second], grid=5).findings
    assert (int(first[0]), int(second[0])) == (15, 15)


def test_packed_atomics() -> None:
    """Pairs of f16 are added half by half."""
    cells, values = np.array([1.5, -2.0], np.float16), np.arange(64, dtype=np.float16)
    body = f"{POINTERS}mad.wide.u32 %rd2, %tid, 4, %rd1;\nld.global.b32 %r1, [%rd2];\nred.global.add.noftz.f16x2 [%rd0], %r1;"
    assert not run(body, [cells, values]).findings
    assert cells.tolist() == [1.5 + values[::2].sum(), -2 + values[1::2].sum()]


def test_cache_hints_change_nothing() -> None:
    source, target = np.arange(128, dtype=np.uint32), np.empty(128, np.uint32)
    body = f"""{POINTERS}
        .shared .align 16 .b8 tile[512];
        createpolicy.fractional.L2::evict_last.b64 %rd9, 1.0;
        mad.wide.u32 %rd2, %tid, 16, %rd0;
        mad.wide.u32 %rd3, %tid, 16, %rd1;
        shl.b32 %r1, %tid, 4;
        cp.async.cg.shared.global.L2::cache_hint [%r1], [%rd2], 16, %rd9;
        cp.async.wait_all;
        ld.shared.v4.b32 {{%r2, %r3, %r4, %r5}}, [%r1];
        ld.global.nc.L1::evict_last.L2::cache_hint.v4.b32 {{%r6, %r7, %r8, %r9}}, [%rd2], %rd9;
        setp.ne.u32 %p1, %r5, %r9;
        @%p1 trap;
        st.global.L2::cache_hint.v4.b32 [%rd3], {{%r2, %r3, %r4, %r5}}, %rd9;"""
    assert not run(body, [source, Output(target)]).findings
    assert np.array_equal(target, source)
