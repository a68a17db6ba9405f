"""Clusters on the PTX machine: blocks that read each other's shared memory, clean as it should be, and found where a part is missing."""

from typing import Any

import numpy as np
import pytest
from ptx import Fault, Output, PTXError
from ptx.machine import Machine
from ptx.write import run

CLUSTER, CLUSTERS, THREADS = 4, 2, 64
SYNC = "barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;"
SHARED = f".shared .align 16 .b8 mine[{4 * THREADS}];"

# Each thread leaves its number for the next block, which adds a thousand.
NEIGHBOURS = f"""
ld.param.u64 %rd0, [p0];
mov.u32 %r0, %ctaid.x;
mad.lo.u32 %r1, %r0, {THREADS}, %tid;
mov.u32 %r2, mine;
mad.lo.u32 %r3, %tid, 4, %r2;
st.shared.u32 [%r3], %r1;
{SYNC} // all is there
mov.u32 %r4, %cluster_ctarank;
add.u32 %r4, %r4, 1;
and.b32 %r4, %r4, {CLUSTER - 1};
mapa.shared::cluster.u32 %r5, %r3, %r4;
ld.shared::cluster.u32 %r6, [%r5];
{SYNC} // before a block leaves
add.u32 %r6, %r6, 1000;
mad.wide.u32 %rd1, %r1, 4, %rd0;
st.global.u32 [%rd1], %r6;
"""
FIRST, LAST = f"{SYNC} // all is there", f"{SYNC} // before a block leaves"


def launch(body: str, *arguments: Any, cluster: int = CLUSTER) -> tuple[Machine, np.ndarray]:
    numbers = np.empty(CLUSTER * CLUSTERS * THREADS, np.uint32)
    machine = run(body, [Output(numbers), *arguments], CLUSTER * CLUSTERS, THREADS, SHARED, cluster=cluster)
    return machine, numbers.reshape(CLUSTERS, CLUSTER, THREADS)


def kinds(machine: Machine) -> set[str]:
    return {finding.kind for finding in machine.findings}


def test_neighbours() -> None:
    machine, numbers = launch(NEIGHBOURS)
    assert not machine.findings, machine.findings
    own = np.arange(numbers.size).reshape(numbers.shape)
    assert (numbers == np.roll(own, -1, 1) + 1000).all()
    assert machine.counts["cluster bytes"] == 4 * numbers.size
    assert machine.counts["barrier.cluster.wait"] == 2 * CLUSTER * CLUSTERS * THREADS // 32


def test_a_block_alone() -> None:
    """Without a cluster a block is its own."""
    body = NEIGHBOURS.replace(f"and.b32 %r4, %r4, {CLUSTER - 1};", "mov.u32 %r4, 0;")
    machine, numbers = launch(body, cluster=1)
    assert not machine.findings
    assert (numbers.reshape(-1) == np.arange(numbers.size) + 1000).all()


def test_own_addresses() -> None:
    """An address of the block's own shared memory is one of the cluster's."""
    body = NEIGHBOURS.replace("ld.shared::cluster.u32 %r6, [%r5];", "ld.shared::cluster.u32 %r6, [%r3];")
    machine, numbers = launch(body)
    assert not machine.findings
    assert (numbers.reshape(-1) == np.arange(numbers.size) + 1000).all()


def test_what_is_not_there_yet() -> None:
    machine, _ = launch(NEIGHBOURS.replace(FIRST, ""))
    assert kinds(machine) >= {"race between blocks", "uninitialised shared read"}


def test_a_block_that_leaves() -> None:
    machine, _ = launch(NEIGHBOURS.replace(LAST, ""))
    assert kinds(machine) == {"leaves a cluster early", "shared memory of a block that has left"}


def test_writing_what_another_reads() -> None:
    """Between two barriers, in either order."""
    after = NEIGHBOURS.replace("ld.shared::cluster.u32 %r6, [%r5];", "ld.shared::cluster.u32 %r6, [%r5];\nst.shared.u32 [%r3], %r6;")
    before = NEIGHBOURS.replace("ld.shared::cluster.u32 %r6, [%r5];", "st.shared.u32 [%r3], %r1;\nld.shared::cluster.u32 %r6, [%r5];")
    for body in (after, before):
        machine, _ = launch(body)
        assert kinds(machine) == {"race between blocks"}


def test_writing_to_another() -> None:
    """A block may; two may not, and nor may two threads of one."""
    write = NEIGHBOURS.replace("ld.shared::cluster.u32 %r6, [%r5];", "st.shared::cluster.u32 [%r5], %r1;\nmov.u32 %r6, 0;")
    machine, _ = launch(write)
    assert not machine.findings
    everyone = write.replace("mapa.shared::cluster.u32 %r5, %r3, %r4;", "mapa.shared::cluster.u32 %r5, %r3, 0;")
    machine, _ = launch(everyone)
    assert kinds(machine) == {"race between blocks"}
    one_place = write.replace("mapa.shared::cluster.u32 %r5, %r3, %r4;", "mapa.shared::cluster.u32 %r5, %r2, %r4;\nand.b32 %r1, %tid, 32;")
    machine, _ = launch(one_place)
    assert "shared race" in kinds(machine)


# Each thread's number comes from global memory by an asynchronous copy, which arrives where a wait demands it.
COPY = f"""
ld.param.u64 %rd0, [p0];
ld.param.u64 %rd2, [p1];
mov.u32 %r2, mine;
mad.lo.u32 %r3, %tid, 4, %r2;
mad.wide.u32 %rd3, %tid, 4, %rd2;
cp.async.ca.shared.global [%r3], [%rd3], 4;
{SYNC} // under way
cp.async.wait_all;
{SYNC} // all is there
mov.u32 %r4, %cluster_ctarank;
xor.b32 %r4, %r4, 1;
mapa.shared::cluster.u32 %r5, %r3, %r4;
ld.shared::cluster.u32 %r6, [%r5];
{SYNC} // before a block leaves
mov.u32 %r0, %ctaid.x;
mad.lo.u32 %r1, %r0, {THREADS}, %tid;
mad.wide.u32 %rd1, %r1, 4, %rd0;
st.global.u32 [%rd1], %r6;
"""


def test_copies() -> None:
    """What arrives behind a barrier is written there."""
    source = np.arange(THREADS, dtype=np.uint32) + 7
    machine, numbers = launch(COPY, source)
    assert not machine.findings
    assert (numbers == source).all()
    machine, _ = launch(COPY.replace(FIRST, ""), source)
    assert "race between blocks" in kinds(machine)


GLOBAL = f"""
ld.param.u64 %rd0, [p0];
ld.param.u64 %rd2, [p1];
mov.u32 %r0, %ctaid.x;
mad.lo.u32 %r1, %r0, {THREADS}, %tid;
mad.wide.u32 %rd3, %r1, 4, %rd2;
st.global.u32 [%rd3], %r1;
{SYNC} // all is there
xor.b32 %r2, %r1, %mask;
mad.wide.u32 %rd3, %r2, 4, %rd2;
ld.global.u32 %r6, [%rd3];
mad.wide.u32 %rd1, %r1, 4, %rd0;
st.global.u32 [%rd1], %r6;
"""


def through_global(mask: int, body: str = GLOBAL) -> tuple[Machine, np.ndarray]:
    return launch(body.replace("%mask", str(mask)), Output(np.empty(CLUSTER * CLUSTERS * THREADS, np.uint32)))


def test_global_memory() -> None:
    """What blocks of a cluster left there before a barrier, the others may read behind it: those of another cluster may not."""
    machine, numbers = through_global(THREADS)
    assert not machine.findings
    assert (numbers.reshape(-1) == np.arange(numbers.size) ^ THREADS).all()
    machine, _ = through_global(THREADS, GLOBAL.replace(FIRST, ""))
    assert kinds(machine) >= {"race between blocks"}
    machine, _ = through_global(CLUSTER * THREADS)
    assert kinds(machine) >= {"race between blocks"}


def test_a_thread_that_does_not_come() -> None:
    apart = NEIGHBOURS.replace(FIRST, f"setp.eq.u32 %p1, %tid, 5;\n@%p1 bra $wait;\n{SYNC}\n$wait:\nbar.sync 0;")
    with pytest.raises(Fault, match="deadlock"):
        launch(apart)


def test_a_warp_that_comes_in_pieces() -> None:
    apart = NEIGHBOURS.replace(FIRST, f"setp.eq.u32 %p1, %tid, 5;\n@%p1 bra $other;\n{SYNC}\nbra $on;\n$other:\n{SYNC}\n$on:")
    machine, _ = launch(apart)
    assert "divergent barrier" in kinds(machine)


@pytest.mark.parametrize(
    ("line", "instead", "says"),
    [
        (f"and.b32 %r4, %r4, {CLUSTER - 1};", "", f"block {CLUSTER} of a cluster of {CLUSTER}"),
        ("[%r5]", f"[%r5+{4 * THREADS}]", "shared access out of bounds"),
        ("[%r5]", "[%r5+2]", "misaligned shared access"),
        ("[%r5]", f"[%r5+{CLUSTER << 24}]", f"an address of block .* of a cluster of {CLUSTER}"),
    ],
)
def test_faults(line: str, instead: str, says: str) -> None:
    with pytest.raises(Fault, match=says):
        launch(NEIGHBOURS.replace(line, instead))


def test_what_it_does_not_know() -> None:
    """Rather than to take an order for granted that there is not."""
    between = NEIGHBOURS.replace(FIRST, FIRST.replace(";\n", ";\nadd.u32 %r4, %r4, 0;\n", 1))
    wait = "barrier.cluster.wait.acquire.aligned;"
    behind_a_label = FIRST.replace(wait, f"$late:\n{wait}") + "\nsetp.ne.u32 %p1, %tid, %tid;\n@%p1 bra $late;"
    one_alone = FIRST.replace("barrier.cluster.wait", "@%p1 barrier.cluster.wait")
    for barrier in (between, *(NEIGHBOURS.replace(FIRST, instead) for instead in (wait, behind_a_label, one_alone))):
        with pytest.raises(PTXError, match="the wait right behind it"):
            launch(barrier)
    with pytest.raises(PTXError):
        launch(NEIGHBOURS.replace("arrive.release", "arrive.relaxed"))
    with pytest.raises(ValueError, match="clusters of 3 blocks"):
        launch(NEIGHBOURS, cluster=3)
