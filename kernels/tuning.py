"""Off unless ``ONEPASS_TUNE=1``: tiles found by trying neighbours of those of ``onepass.kernels.tiles``, once for each op, dtype and sizes
up to the next power of two. Which of them wins may differ from process to process, and with it the last bits of results."""

import functools
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from onepass.kernels.tiles import Tile, power_of_2

GAIN = 0.97  # what a tile's time has to be below, over the fastest so far
RUNS = 5
Tiles = dict[str, Tile]  # by kernel


class Local(threading.local):
    """Of a thread, as autograd has its own: tiles ``given`` in place of the rules' own, which ``met`` has, each with what may change."""

    def __init__(self) -> None:
        self.given: Tiles = {}
        self.met: dict[str, tuple[Tile, tuple[str, ...]]] = {}


_here = Local()
_best: dict[Any, Tiles] = {}
_searching = threading.Lock()


def chosen(kernel: str, tile: Tile, *sizes: str) -> Tile:
    """The tile that a launch takes where the rules say ``tile``, of which ``sizes`` may be others."""
    _here.met[kernel] = tile, sizes
    given = _here.given.get(kernel)
    return tile if given is None else replace(given, parts=tile.parts)


def tuned(op: Callable[..., Any]) -> Callable[..., Any]:
    """The op, which where tuning is on looks for its tiles when sizes are new; but not while a CUDA graph is being recorded."""

    @functools.wraps(op)
    def call(*arguments: Any) -> Any:
        if os.environ.get("ONEPASS_TUNE", "0") != "1":
            return op(*arguments)
        key = (op.__name__, *map(kind, arguments))
        with _searching:
            if key not in _best:
                if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                    return op(*arguments)
                _best[key] = search(lambda: op(*arguments))
        with instead(_best[key]):
            return op(*arguments)

    return call


def kind(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.dtype, argument.device, *map(power_of_2, argument.shape)
    return argument if isinstance(argument, bool) else argument is None


def search(run: Callable[[], Any]) -> Tiles:
    """Kernel after kernel, from each tile to its fastest neighbour until none is faster."""
    _here.met.clear()
    run()
    met = dict(_here.met)
    best = {kernel: tile for kernel, (tile, _) in met.items()}
    fastest = seconds(run)
    for kernel, (_, sizes) in met.items():
        tried = {best[kernel]}
        while around := [tile for tile in neighbours(best[kernel], sizes) if tile not in tried]:
            tried.update(around)
            found = {tile: seconds_with(best | {kernel: tile}, run) for tile in around}
            tile = min(found, key=lambda tile: found[tile])
            if found[tile] >= GAIN * fastest:
                break
            best[kernel], fastest = tile, found[tile]
    return best


def neighbours(tile: Tile, sizes: tuple[str, ...]) -> Iterator[Tile]:
    """One size halved or doubled, as far as a matrix product can have it; half or twice the warps; a stage fewer or more."""
    for name in sizes:
        yield from (replace(tile, **{name: size}) for size in (getattr(tile, name) // 2, 2 * getattr(tile, name)) if 16 <= size <= 256)
    yield from (replace(tile, warps=warps) for warps in (tile.warps // 2, 2 * tile.warps) if 1 <= warps <= 16)
    yield from (replace(tile, stages=stages) for stages in (tile.stages - 1, tile.stages + 1) if 1 <= stages <= 4)


@contextmanager
def instead(tiles: Tiles) -> Iterator[None]:
    before, _here.given = _here.given, tiles
    try:
        yield
    finally:
        _here.given = before


def seconds_with(tiles: Tiles, run: Callable[[], Any]) -> float:
    """Infinite where the compiler or the device cannot have such tiles."""
    with instead(tiles):
        try:
            return seconds(run)
        except Exception:
            return float("inf")


def seconds(run: Callable[[], Any]) -> float:
    """Of a call after the first, which compiles."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    run()
    taken = []
    for _ in range(RUNS):
        wait()
        start = time.perf_counter()
        run()
        wait()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)
