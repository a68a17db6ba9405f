"""Tile sizes: pure functions of shapes, dtypes and the device, to frozen dataclasses. ``benchmarks/gpuless.py`` shows what they cost."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """What of a GPU decides: ``lanes`` of a warp (64 on AMD), streaming multiprocessors (or compute units), and ``unit``, whose
    instructions it has (``onepass.kernels.arithmetic``)."""

    processors: int
    lanes: int = 32
    unit: str = "ptx"


INTERPRETER = Device(processors=4, unit="plain")


@dataclass(frozen=True)
class Tile:
    """Positions of T, S, A and D that a program takes at a time (those that it has), warps, pipeline stages, and into how many
    parts the source is split."""

    BT: int = 0
    BS: int = 0
    BA: int = 0
    BK: int = 0
    BD: int = 0
    warps: int = 4
    stages: int = 2
    parts: int = 1


def attend_tile(rows: int, T: int, S: int, D: int, dtype: torch.dtype, additive: bool, device: Device) -> Tile:
    """Of ``attend``, for ``rows`` = B H. Additive scores live in registers, 32 a thread, beside as many temporaries."""
    BT = 64 if T > 32 else 32 if T > 16 else 16
    BS = 64
    if dtype == torch.float64:
        BT, BS = min(BT, 32), 32
    BD = min(32 if BT > 32 else 64, max(16, power_of_2(D)))
    warps = max(1, BT * BS // 1024) if additive else 4
    splits = parts(rows * -(-T // BT), S, BS, device) if T <= 16 else 1
    return Tile(BT, BS, 32, 16, BD, warps * 32 // device.lanes or 1, 2, splits)


def online_tile(T: int, D: int, dtype: torch.dtype) -> Tile:
    """Of ``attend_online``; a program has all of D up to 256."""
    wide = dtype == torch.float64
    return Tile(BT=16 if T <= 16 or wide else 64 if D <= 128 else 32, BS=32 if wide or D > 128 else 64, BA=32, BD=max(16, min(256 if not wide else 64, power_of_2(D))))


def products_tile(T: int, S: int, D: int, dtype: torch.dtype) -> Tile:
    """Of the kernels that are matrix products: gradients of weights, sums over the source and over queries."""
    wide = dtype == torch.float64
    return Tile(BT=16 if T <= 16 or wide else 32, BS=32 if wide else 64, BD=32 if wide or D <= 32 else 64)


def tanh_gradients_tile(rows: int, S: int, A: int, dtype: torch.dtype, device: Device) -> Tile:
    """One warp, so that no sum crosses warps; four channels a thread, and 16 positions, fill its registers."""
    BA = 4 * device.lanes
    return Tile(BS=8 if dtype == torch.float64 else 16, BA=BA, warps=1, stages=1, parts=parts(rows * -(-A // BA), S, 64, device, most=8))


def parts(programs: int, S: int, least: int, device: Device, most: int = 64) -> int:
    """Into how many parts of at least ``least`` positions the source goes, so that some eight programs meet on each processor."""
    return max(1, min(most, S // least, -(-8 * device.processors // max(programs, 1))))


def power_of_2(number: int) -> int:
    """The smallest power of 2 that is not less."""
    return 1 << max(number - 1, 0).bit_length()
