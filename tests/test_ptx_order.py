"""Blocks that are put in order by fences and atomics: clean as it should be, and a race without any one of its parts."""

import numpy as np
import pytest
from ptx import Output
from ptx.machine import Machine
from ptx.write import run

BLOCKS, THREADS = 3, 64

# Each thread leaves its number; the last block to come adds up what its neighbours' threads left.
LAST_BLOCK = """
ld.param.u64 %rd0, [p0];
ld.param.u64 %rd1, [p1];
ld.param.u64 %rd2, [p2];
mov.u32 %r0, %ctaid.x;
mad.lo.u32 %r1, %r0, 64, %tid;
mad.wide.u32 %rd3, %r1, 4, %rd0;
st.global.u32 [%rd3], %r1;
bar.sync 0; // writes are over
setp.ne.u32 %q, %tid, 0;
@%q bra $wait;
membar.gl; // release
atom.global.inc.u32 %r2, [%rd1], 2;
membar.gl; // acquire
st.shared.u32 [flag], %r2;
$wait:
bar.sync 0; // the news is out
ld.shared.u32 %r2, [flag];
setp.ne.u32 %p1, %r2, 2;
@%p1 bra $end;
xor.b32 %r3, %tid, 63;
mul.wide.u32 %rd4, %r3, 4;
add.u64 %rd3, %rd0, %rd4;
ld.global.u32 %r4, [%rd3];
ld.global.u32 %r5, [%rd3+256];
ld.global.u32 %r6, [%rd3+512];
add.u32 %r4, %r4, %r5;
add.u32 %r4, %r4, %r6;
mul.wide.u32 %rd4, %tid, 4;
add.u64 %rd3, %rd2, %rd4;
st.global.u32 [%rd3], %r4;
$end:
"""


def last_block(body: str) -> tuple[Machine, np.ndarray, np.ndarray]:
    numbers, sums, counter = np.empty(BLOCKS * THREADS, np.uint32), np.zeros(THREADS, np.uint32), np.zeros(1, np.uint32)
    machine = run(body, [Output(numbers), counter, sums], BLOCKS, THREADS, ".shared .u32 flag;")
    return machine, sums, counter


def test_the_last_block() -> None:
    machine, sums, counter = last_block(LAST_BLOCK)
    assert not machine.findings
    assert (sums == 3 * np.arange(THREADS)[::-1] + 3 * THREADS).all()
    assert counter[0] == 0


@pytest.mark.parametrize("line", ["bar.sync 0; // writes are over", "membar.gl; // release", "membar.gl; // acquire"])
def test_each_part_is_needed(line: str) -> None:
    assert line in LAST_BLOCK
    machine, _, _ = last_block(LAST_BLOCK.replace(line, ""))
    assert "race between blocks" in {finding.kind for finding in machine.findings}


def test_a_fence_of_the_block_alone_is_not_enough() -> None:
    machine, _, _ = last_block(LAST_BLOCK.replace("membar.gl; // release", "membar.cta;"))
    assert "race between blocks" in {finding.kind for finding in machine.findings}


def test_who_did_not_wait_for_the_news() -> None:
    """Threads that learn by themselves that theirs is the last block have not met those who wrote."""
    early = LAST_BLOCK.replace("ld.shared.u32 %r2, [flag];", "mov.u32 %r2, %r0;").replace("bar.sync 0; // the news is out", "")
    machine, _, _ = last_block(early)
    assert "race between blocks" in {finding.kind for finding in machine.findings}


def test_a_block_that_writes_afterwards() -> None:
    """What a block writes behind its fence is not covered by it."""
    late = LAST_BLOCK.replace("st.shared.u32 [flag], %r2;", "st.shared.u32 [flag], %r2;\nst.global.u32 [%rd3], %r1;")
    machine, _, _ = last_block(late)
    assert "race between blocks" in {finding.kind for finding in machine.findings}
