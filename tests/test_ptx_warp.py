"""Control flow and what threads do together on the PTX machine: divergence, barriers, shuffles, votes, matrices."""

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from ptx import Fault, Output
from ptx.rounding import Array
from ptx.write import run

STORE = "ld.param.u64 %rd0, [p{0}];\nmad.wide.u32 %rd0, %tid, 4, %rd0;\nst.global.u32 [%rd0], %r{1};"
LANES = np.arange(32)


def per_thread(body: str, block: int = 32, results: int = 1, **given: Array) -> list[Array]:
    """Runs a body whose results are %r1, %r2, ...; given arrays of 32-bit words are loaded into registers of their names."""
    loads = [
        f".reg .b32 %{name};\nld.param.u64 %rd0, [p{index}];\nmad.wide.u32 %rd0, %tid, 4, %rd0;\nld.global.u32 %{name}, [%rd0];"
        for index, name in enumerate(given)
    ]
    stores = [STORE.format(len(given) + index, 1 + index) for index in range(results)]
    outputs = [np.zeros(block, np.uint32) for _ in range(results)]
    made = run("\n".join((*loads, body, *stores)), [*given.values(), *map(Output, outputs)], block=block)
    assert not made.findings, made.findings
    return outputs


def test_predicates() -> None:
    (found,) = per_thread("mov.u32 %r1, 1;\nsetp.lt.u32 %p1, %tid, 7;\n@%p1 add.u32 %r1, %r1, 10;\n@!%p1 add.u32 %r1, %r1, 100;")
    assert np.array_equal(found, np.where(LANES < 7, 11, 101))


def test_loops_of_different_lengths() -> None:
    """Each lane sums the numbers up to its own."""
    body = """
        mov.u32 %r1, 0;
        mov.u32 %r2, 0;
        $again:
        setp.gt.u32 %p1, %r2, %tid;
        @%p1 bra $done;
        add.u32 %r1, %r1, %r2;
        add.u32 %r2, %r2, 1;
        bra.uni $again;
        $done:
        add.u32 %r1, %r1, 1000;"""
    (found,) = per_thread(body, block=64)
    lanes = np.arange(64)
    assert np.array_equal(found, 1000 + lanes * (lanes + 1) // 2)


def test_divergent_paths_meet_again() -> None:
    """Both sides of a branch run once, and what follows runs once for the whole warp."""
    body = """
        and.b32 %r2, %tid, 1;
        setp.eq.u32 %p1, %r2, 0;
        @%p1 bra $even;
        mul.lo.u32 %r1, %tid, 3;
        bra $join;
        $even:
        sub.u32 %r1, %tid, 5;
        $join:
        xor.b32 %r1, %r1, 85;
        vote.sync.ballot.b32 %r3, 1, 0xffffffff;
        add.u32 %r1, %r1, %r3;"""
    output = np.zeros(32, np.uint32)
    made = run(f"{body}\n{STORE.format(0, 1)}", [Output(output)])
    assert np.array_equal(output, ((np.where(LANES % 2, LANES * 3, LANES - 5) ^ 85) - 1).astype(np.uint32))
    counts = made.counts
    assert (counts["mul.u32"], counts["sub.u32"], counts["xor.b32"], counts["vote"], counts["bra"]) == (1, 1, 1, 1, 2)


def test_early_exit() -> None:
    output = np.zeros(96, np.uint32)
    made = run(f"setp.ge.u32 %p1, %tid, 40;\n@%p1 ret;\nmov.u32 %r1, 7;\n{STORE.format(0, 1)}", [output], block=96)
    assert np.array_equal(output, np.where(np.arange(96) < 40, 7, 0))
    assert made.counts["st.global"] == 2  # the third warp has left


def test_special_registers() -> None:
    """Threads of a block of (3, 4, 5) in a grid of (2, 3)."""
    output = np.zeros(2 * 3 * 60, np.uint32)
    body = """
        mov.u32 %r1, %tid.y;
        mov.u32 %r2, %tid.z;
        mov.u32 %r3, %ntid.x;
        mov.u32 %r4, %ntid.y;
        mad.lo.u32 %r5, %r2, %r4, %r1;
        mad.lo.u32 %r5, %r5, %r3, %tid;
        mov.u32 %r6, %ctaid.x;
        mov.u32 %r7, %ctaid.y;
        mov.u32 %r8, %nctaid.x;
        mad.lo.u32 %r9, %r7, %r8, %r6;
        mad.lo.u32 %r10, %r9, 60, %r5;
        ld.param.u64 %rd0, [p0];
        mad.wide.u32 %rd0, %r10, 4, %rd0;
        mov.u32 %r11, %laneid;
        mov.u32 %r12, %warpid;
        mad.lo.u32 %r13, %r12, 32, %r11;
        setp.ne.u32 %p1, %r13, %r5;
        @%p1 trap;
        mov.u32 %r14, %lanemask_lt;
        popc.b32 %r14, %r14;
        setp.ne.u32 %p1, %r14, %r11;
        @%p1 trap;
        st.global.u32 [%rd0], %r10;"""
    made = run(body.replace("%p1 trap", "%p1 trap"), [Output(output)], grid=(2, 3), block=(3, 4, 5))
    assert not made.findings
    assert np.array_equal(output, np.arange(360))


def shuffled(mode: str, lane: int, b: int, c: int) -> tuple[int, bool]:
    """The source lane and the predicate, after the manual's pseudo-code."""
    segment, clamp = c >> 8 & 31, c & 31
    highest, lowest = (lane & segment) | (clamp & ~segment), lane & segment
    source = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": lowest | (b & ~segment)}[mode]
    found = source >= highest if mode == "up" else source <= highest
    return (source if found else lane), found


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("width", [32, 16, 8, 4])
def test_shuffles(mode: str, width: int) -> None:
    clamp = (32 - width) << 8 | (0 if mode == "up" else 31)
    values = np.random.default_rng(0).integers(0, 2**32, 64, np.uint32)
    for b in (0, 1, 3, 16, 31):
        body = f"shfl.sync.{mode}.b32 %r1|%p1, %a, {b}, {clamp}, 0xffffffff;\nselp.u32 %r2, 1, 0, %p1;"
        found, valid = per_thread(body, 64, 2, a=values)
        expected = [shuffled(mode, lane, b, clamp) for lane in LANES]
        sources = np.array([source for source, _ in expected])
        assert np.array_equal(found.reshape(2, 32), values.reshape(2, 32)[:, sources])
        assert np.array_equal(valid.reshape(2, 32), [[int(ok) for _, ok in expected]] * 2)


def test_shuffle_by_a_register_and_in_half_warps() -> None:
    """Each lane asks another lane; halves that diverged shuffle apart, under masks of their own."""
    values = np.arange(32, dtype=np.uint32) * 7
    wanted = np.random.default_rng(1).permutation(32).astype(np.uint32)
    (found,) = per_thread("shfl.sync.idx.b32 %r1, %a, %b, 31, -1;", a=values, b=wanted)
    assert np.array_equal(found, values[wanted])
    body = """
        setp.lt.u32 %p1, %tid, 16;
        selp.b32 %r5, 0xffff, 0xffff0000, %p1;
        @%p1 bra $low;
        add.u32 %a, %a, 1;
        $low:
        shfl.sync.bfly.b32 %r1, %a, 1, 31, %r5;
        @%p1 shfl.sync.up.b32 %r1, %a, 2, 0, 0xffff;"""
    (found,) = per_thread(body, a=values)
    expected = np.where(LANES < 16, values[np.where(LANES < 2, LANES, LANES - 2)], values[LANES ^ 1] + 1)
    assert np.array_equal(found, expected)


def test_votes() -> None:
    flags = np.random.default_rng(2).integers(0, 2, 96).astype(np.uint32)
    flags[32:64], flags[64:] = 1, 0
    body = """
        setp.ne.u32 %p1, %a, 0;
        vote.sync.ballot.b32 %r1, %p1, 0xffffffff;
        vote.sync.any.pred %p2, %p1, 0xffffffff;
        vote.sync.all.pred %p3, %p1, 0xffffffff;
        vote.sync.uni.pred %p4, !%p1, 0xffffffff;
        selp.u32 %r2, 1, 0, %p2;
        selp.u32 %r3, 1, 0, %p3;
        selp.u32 %r4, 1, 0, %p4;"""
    ballot, anyone, everyone, uniform = per_thread(body, 96, 4, a=flags)
    words = [sum(int(flag) << lane for lane, flag in enumerate(warp)) for warp in flags.reshape(3, 32)]
    assert np.array_equal(ballot, np.repeat(words, 32))
    assert [list(found[::32]) for found in (anyone, everyone, uniform)] == [[1, 1, 0], [0, 1, 0], [0, 1, 1]]


def test_matches_and_reductions() -> None:
    values = np.random.default_rng(3).integers(0, 5, 64).astype(np.uint32)
    values[32:] = 9
    same, all_same, ok = per_thread(
        "match.any.sync.b32 %r1, %a, 0xffffffff;\nmatch.all.sync.b32 %r2|%p1, %a, 0xffffffff;\nselp.u32 %r3, 1, 0, %p1;", 64, 3, a=values
    )
    warps = values.reshape(2, 32)
    expected = [[sum(1 << i for i in range(32) if warp[i] == value) for value in warp] for warp in warps]
    assert np.array_equal(same.reshape(2, 32), expected)
    assert np.array_equal(all_same, np.repeat([0, 0xFFFFFFFF], 32))
    assert np.array_equal(ok, np.repeat([0, 1], 32))
    signed = np.random.default_rng(4).integers(-50, 50, 64).astype(np.int32)
    for name, function in {"add.s32": np.sum, "min.s32": np.min, "max.s32": np.max}.items():
        (found,) = per_thread(f"redux.sync.{name} %r1, %a, 0xffffffff;", 64, a=signed.view(np.uint32))
        assert np.array_equal(found.view(np.int32), np.repeat(function(signed.reshape(2, 32), axis=1), 32))
    (found,) = per_thread("redux.sync.or.b32 %r1, %a, 0xffffffff;", 64, a=values)
    assert np.array_equal(found, np.repeat(np.bitwise_or.reduce(warps, 1), 32))


def test_active_mask() -> None:
    (found,) = per_thread("mov.u32 %r1, 0;\nsetp.lt.u32 %p1, %tid, 5;\n@!%p1 bra $end;\nactivemask.b32 %r1;\n$end:")
    assert np.array_equal(found, np.where(LANES < 5, 31, 0))


def test_block_barriers() -> None:
    """A tile turned round through shared memory, and the reductions of barriers."""
    body = """
        .shared .u32 tile[96];
        shl.b32 %r5, %tid, 2;
        mad.lo.u32 %r6, %tid, 3, 1;
        st.shared.u32 [%r5], %r6;
        setp.lt.u32 %p1, %tid, 10;
        barrier.red.popc.aligned.u32 %r2, 0, %p1;
        bar.red.and.pred %p2, 0, %p1;
        bar.red.or.pred %p3, 0, !%p1;
        selp.u32 %r3, 1, 0, %p2;
        selp.u32 %r4, 1, 0, %p3;
        sub.u32 %r7, 380, %r5;
        ld.shared.u32 %r1, [%r7];"""
    turned, count, everyone, anyone = per_thread(body, 96, 4)
    assert np.array_equal(turned, 3 * np.arange(96)[::-1] + 1)
    assert (set(count), set(everyone), set(anyone)) == ({10}, {0}, {1})


def test_named_barriers() -> None:
    """One warp produces and goes on, another waits for it; a third has nothing to do with them."""
    body = """
        .shared .u32 tile[32];
        mov.u32 %r1, 0;
        and.b32 %r5, %tid, 31;
        shl.b32 %r5, %r5, 2;
        setp.lt.u32 %p1, %tid, 32;
        @%p1 st.shared.u32 [%r5], %tid;
        @%p1 bar.arrive 1, 64;
        @%p1 bra $end;
        setp.ge.u32 %p2, %tid, 64;
        @%p2 bra $end;
        bar.sync 1, 64;
        ld.shared.u32 %r1, [%r5];
        add.u32 %r1, %r1, 1;
        $end:"""
    (found,) = per_thread(body, 96)
    assert np.array_equal(found, np.concatenate([np.zeros(32), LANES + 1, np.zeros(32)]))
    with pytest.raises(Fault, match="deadlock"):
        per_thread(body.replace("bar.arrive 1", "bar.arrive 2"), 96)


def test_warp_synchronous_code() -> None:
    """Within a warp, bar.warp.sync orders what lanes write and read; between warps it does not."""
    body = """
        .shared .u32 tile[64];
        shl.b32 %r5, %tid, 2;
        xor.b32 %r6, %r5, {};
        st.shared.u32 [%r5], %tid;
        bar.warp.sync 0xffffffff;
        ld.shared.u32 %r1, [%r6];
        bar.warp.sync 0xffffffff;
        st.shared.u32 [%r5], %r1;"""
    assert np.array_equal(per_thread(body.format(4), 64)[0], np.arange(64) ^ 1)
    findings = run(body.format(128), [], block=64).findings
    assert {finding.kind for finding in findings} == {"shared race"}
    for number, sync in enumerate(re.finditer(r"bar\.warp\.sync 0xffffffff;", body)):
        findings = run((body[: sync.start()] + body[sync.end() :]).format(4), [], block=64).findings
        assert [finding.kind for finding in findings] == ["shared race"]
        assert ("writes" in findings[0].detail) == (number == 1)
        assert findings[0].count == 1


@pytest.mark.parametrize("transposed", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count: int, transposed: str) -> None:
    """Lane l of matrix i gets elements (l / 4, 2 (l % 4)) and its right neighbour, or of the transpose."""
    names = ", ".join(f"%r{1 + index}" for index in range(count))
    body = f"""
        .shared .align 16 .b8 tile[1024];
        shl.b32 %r10, %tid, 4;
        st.shared.v4.u32 [%r10], {{%a, %b, %c, %d}};
        bar.sync 0;
        and.b32 %r11, %r10, 511;
        xor.b32 %r11, %r11, 112;
        ldmatrix.sync.aligned.m8n8.x{count}{transposed}.shared.b16 {{{names}}}, [%r11];"""
    words = np.random.default_rng(5).integers(0, 2**32, (64, 4), np.uint32)
    found = per_thread(body, 64, count, **{name: np.ascontiguousarray(words[:, index]) for index, name in enumerate("abcd")})
    rows = words.view(np.uint16)[:32][np.arange(32) ^ 7]  # the addresses go through the rows of each matrix from the last
    for index in range(count):
        matrix = rows[8 * index : 8 * index + 8]
        matrix = matrix.T if transposed else matrix
        assert np.array_equal(found[index].view(np.uint16).reshape(2, 8, 8), [matrix] * 2)


def fragment(matrix: Array, kind: str, bits: int) -> Array:
    """The registers [n, 32] of a matrix as the manual lays them out, for elements of 16 or 32 bits."""
    group, thread = LANES // 4, LANES % 4
    packed = 32 // bits
    registers = []
    if kind == "a":
        for index in range(matrix.size // 32 // packed):
            column = thread * packed + 4 * packed * (index // 2)
            registers.append([matrix[group + 8 * (index % 2), column + element] for element in range(packed)])
    elif kind == "b":
        for index in range(matrix.size // 32 // packed):
            registers.append([matrix[thread * packed + 4 * packed * index + element, group] for element in range(packed)])
    else:
        registers = [[matrix[group + 8 * (index // 2), 2 * thread + index % 2]] for index in range(4)]
    stacked = np.ascontiguousarray(np.stack([np.stack(items, -1) for items in registers]))
    return stacked.view(np.uint32).reshape(len(registers), 32)


@pytest.mark.parametrize(("type_", "depth"), [("f16", 16), ("f16", 8), ("bf16", 16), ("bf16", 8), ("tf32", 8), ("tf32", 4)])
def test_mma(type_: str, depth: int) -> None:
    """Against a product in float64 of the same rounded elements; tf32 does not see the low 13 bits."""
    rng = np.random.default_rng(6)
    a, b = rng.standard_normal((16, depth)).astype(np.float32), rng.standard_normal((depth, 8)).astype(np.float32)
    c = rng.standard_normal((16, 8)).astype(np.float32)
    convert: Callable[[Array], tuple[Array, Array]] = {
        "f16": lambda x: (x.astype(np.float16).view(np.uint16), x.astype(np.float16).astype(np.float32)),
        "bf16": lambda x: (torch.from_numpy(x).bfloat16().view(torch.int16).numpy(), torch.from_numpy(x).bfloat16().float().numpy()),
        "tf32": lambda x: (x.view(np.uint32), (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)),
    }[type_]
    (a_bits, a), (b_bits, b) = convert(a), convert(b)
    bits = 32 if type_ == "tf32" else 16
    given = {
        f"{kind}{index}": row
        for kind, matrix in (("a", a_bits), ("b", b_bits), ("c", c))
        for index, row in enumerate(fragment(matrix, kind, bits if kind != "c" else 32))
    }
    listed = {kind: ", ".join(f"%{name}" for name in given if name[0] == kind) for kind in "abc"}
    opcode = f"mma.sync.aligned.m16n8k{depth}.row.col.f32.{type_}.{type_}.f32"
    body = f"{opcode} {{%r1, %r2, %r3, %r4}}, {{{listed['a']}}}, {{{listed['b']}}}, {{{listed['c']}}};"
    found = np.stack(per_thread(body, 32, 4, **given))
    expected = (a.astype(np.float64) @ b.astype(np.float64) + c).astype(np.float32)
    assert np.array_equal(found, fragment(expected, "c", 32))


def test_mma_with_f16_accumulators() -> None:
    rng = np.random.default_rng(7)
    a, b, c = (rng.standard_normal(shape).astype(np.float16) for shape in ((16, 16), (16, 8), (16, 8)))
    group, thread = LANES // 4, LANES % 4
    words = [np.ascontiguousarray(c[group + 8 * half].reshape(32, 4, 2)[LANES, thread]).view(np.uint32).reshape(32) for half in range(2)]
    given = {f"{kind}{index}": row for kind, matrix in (("a", a), ("b", b)) for index, row in enumerate(fragment(matrix, kind, 16))}
    body = "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%r1, %r2}, {%a0, %a1, %a2, %a3}, {%b0, %b1}, {%c0, %c1};"
    found = per_thread(body, 32, 2, **given, c0=words[0], c1=words[1])
    exact = (a.astype(np.float64) @ b.astype(np.float64) + c).astype(np.float16)
    for half in range(2):
        assert np.array_equal(found[half].view(np.float16).reshape(32, 2), exact[group + 8 * half].reshape(32, 4, 2)[LANES, thread])
