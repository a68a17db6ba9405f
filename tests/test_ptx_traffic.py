"""What the PTX machine counts as moved past an L1, on access patterns that can be counted by hand."""

from typing import Any

import numpy as np
import pytest
from ptx import Buffer, Machine, Output, Traffic, parse
from ptx.write import module

LOAD = "ld.param.u64 %rd0, [p0];\nmad.wide.u32 %rd1, %tid, {stride}, %rd0;\n"
TWICE = LOAD + "ld.global{how}.u32 %r1, [%rd1];\nld.global{how}.u32 %r2, [%rd1];"


def moved(body: str, arguments: list[Any], cache: int | None, block: int = 32, grid: int = 1) -> dict[str, Traffic]:
    machine = Machine(parse(module(body, ["u64"] * len(arguments))), cache=cache)
    machine.launch(grid, block, arguments)
    assert not machine.findings
    return machine.global_bytes


def source(words: int = 2048) -> Any:
    return np.zeros(words, np.uint32)


def test_nothing_without_a_cache() -> None:
    assert moved(TWICE.format(stride=4, how=""), [source()], None)["p0"] == Traffic(256, 0)


@pytest.mark.parametrize(("stride", "once"), [(4, 128), (0, 32), (8, 256), (32, 1024), (128, 1024)])
def test_whole_sectors_once(stride: int, once: int) -> None:
    assert moved(TWICE.format(stride=stride, how=""), [source()], 1024)["p0"].fetched == once


def test_least_recently_used_leaves() -> None:
    """Of 32 sectors in order, a cache with room for 31 has lost each when it is asked for again; a larger one has it."""
    body = TWICE.format(stride=32, how="")
    assert [moved(body, [source()], 32 * room)["p0"].fetched for room in (0, 31, 32)] == [2048, 2048, 1024]


def test_use_keeps_a_sector() -> None:
    """A, B, A, C, A with room for two: A stays."""
    order = "".join(f"ld.global.u32 %r1, [%rd0+{32 * place}];\n" for place in (0, 1, 0, 2, 0))
    assert moved("ld.param.u64 %rd0, [p0];\n" + order, [source()], 64, block=1)["p0"].fetched == 3 * 32


@pytest.mark.parametrize("how", [".cg", ".cv", ".nc.L1::no_allocate", ".volatile"])
def test_loads_past_the_cache(how: str) -> None:
    text = TWICE.format(stride=4, how=how).replace("ld.global.volatile", "ld.volatile.global")
    assert moved(text, [source()], 1024)["p0"].fetched == 256


def test_each_block_begins_with_nothing() -> None:
    assert moved(TWICE.format(stride=4, how=""), [source()], 1024, grid=3)["p0"] == Traffic(3 * 256, 0, 3 * 128, 0)


def test_warps_share() -> None:
    """Two warps that read the same, by way of the cache and not."""
    same = "and.b32 %tid, %tid, 31;\n" + LOAD.format(stride=4) + "ld.global{how}.u32 %r1, [%rd1];"
    assert moved(same.format(how=""), [source()], 1024, block=64)["p0"].fetched == 128
    assert moved(same.format(how=".cg"), [source()], 1024, block=64)["p0"].fetched == 256


def test_stores_go_through() -> None:
    """Sectors that they touch, each time; and reading back what was stored misses."""
    target = np.empty(2048, np.uint32)
    body = LOAD.format(stride=64) + "st.global.u32 [%rd1], %tid;\nst.global.u32 [%rd1], %tid;\nld.global.u32 %r1, [%rd1];"
    assert moved(body, [Output(target)], 4096)["p0"] == Traffic(128, 256, 1024, 2048)


def test_buffers_that_share_no_sector() -> None:
    """Eight bytes past an aligned address, 128 bytes touch five sectors."""
    assert moved(LOAD.format(stride=4) + "ld.global.u32 %r1, [%rd1];", [Buffer(source(32), offset=8)], 1024)["p0"].fetched == 160


@pytest.mark.parametrize(("how", "fetched"), [("cg", 1024), ("ca", 512)])
def test_asynchronous_copies(how: str, fetched: int) -> None:
    """Those of 16 bytes pass L1 by where the kernel says so."""
    copy = f"cp.async.{how}.shared.global [%r1], [%rd1], 16;\n"
    body = ".shared .align 16 .b8 tile[1024];\nshl.b32 %r1, %tid, 4;\n" + LOAD.format(stride=16) + copy
    body += "add.u32 %r1, %r1, 512;\n" + copy + "cp.async.wait_all;"
    assert moved(body, [source()], 4096)["p0"] == Traffic(1024, 0, fetched, 0)
