"""Tile sizes: pure functions of shapes, dtypes and the device, to frozen dataclasses. ``benchmarks/gpuless.py`` shows what they cost."""

from dataclasses import dataclass

import torch

WARPS = 8  # that share a processor at least: what registers and shared memory of the tiles for float32 and narrower leave room for


@dataclass(frozen=True)
class Device:
    """What of a GPU decides: streaming multiprocessors (or compute units), ``lanes`` of a warp (64 on AMD), ``unit``, whose instructions
    it has (``onepass.kernels.arithmetic``), and NVIDIA's compute capability, 80 for 8.0."""

    processors: int
    lanes: int = 32
    unit: str = "ptx"
    capability: int = 80


INTERPRETER = Device(processors=4, unit="plain")


@dataclass(frozen=True)
class Tile:
    """Positions of T, S, A and D that a program takes at a time (those that it has; BK positions of S in a matrix product), warps, pipeline
    stages, and into how many parts the source is split; ``registers`` overrules the compiler's own limit of a thread's."""

    BT: int = 0
    BS: int = 0
    BA: int = 0
    BK: int = 0
    BD: int = 0
    warps: int = 4
    stages: int = 2
    parts: int = 1
    registers: int | None = None


def attend_tile(rows: int, T: int, S: int, D: int, dtype: torch.dtype, additive: bool, hides: bool, device: Device) -> Tile:
    """Of ``attend``, for ``rows`` = B H. Additive scores live in registers, beside more temporaries: 32 of a thread where there are many
    queries, else 16, or where masks or spans take registers too."""
    if dtype == torch.float64:
        return Tile(BT=16, BS=32, BA=32, BK=16, BD=32, warps=4, parts=parts(rows * -(-T // 16), S, 32, device, 4))
    most = 32 if hides or device.capability >= 100 else 64  # packed arithmetic takes pairs of registers, and more of them
    BT = min(most, 64 if T > 32 else 32 if T > 16 else 16)
    wide = -(-S // 128) * 128 <= 1.1 * (-(-S // 64) * 64)  # the wider tile reads queries half as often
    BS = 128 if additive and wide and BT == 64 else 64
    warps = BT * BS // (1024 if BT == 64 else 512) if additive else 4
    BD = min(128 if warps == 8 else 64, max(16, power_of_2(D)))  # so that a thread copies 16 bytes of values: fewer go through the L1
    splits = parts(rows * -(-T // BT), S, BS, device, warps)
    BA, BK = (16, 8) if dtype == torch.float32 else (32, 16)  # without tensor cores a thread holds all of its operands
    return Tile(BT, BS, BA, BK, BD, max(1, warps * 32 // device.lanes), 2, splits, registers=255)


def online_tile(T: int, D: int, dtype: torch.dtype, hides: bool) -> Tile:
    """Of ``attend_online``; a program has all of D up to 256, or 128 where masks or spans take registers too."""
    if dtype == torch.float64:
        return Tile(BT=16, BS=32, BA=32, BD=min(64, max(16, power_of_2(D))))
    tight = hides and dtype == torch.float32
    BT = 16 if T <= 16 or tight else 64 if D <= 128 else 32
    BS = 64 if D <= 128 else 32
    return Tile(BT, BS, BA=32, BD=max(16, min(128 if tight else 256, power_of_2(D))), registers=255)


def products_tile(T: int, dtype: torch.dtype) -> Tile:
    """Of the kernels that are matrix products: gradients of weights, sums over the source and over queries."""
    if dtype == torch.float64:
        return Tile(BT=16, BS=32, BD=32)
    narrow = dtype != torch.float32  # whose products, left to themselves, are given 96 registers on sm_100, and spill
    return Tile(BT=16 if T <= 16 else 32, BS=64, BD=32, registers=255 if narrow else None)


def tanh_gradients_tile(rows: int, S: int, A: int, dtype: torch.dtype, device: Device) -> Tile:
    """One warp, so that no sum crosses warps; four channels a thread, and 8 positions, fill its registers."""
    BA = 4 * device.lanes
    return Tile(BS=8, BA=BA, warps=1, stages=1, parts=parts(rows * -(-A // BA), S, 64, device, 1, most=8), registers=255)


def parts(programs: int, S: int, least: int, device: Device, warps: int, most: int = 64) -> int:
    """Into how many parts of at least ``least`` positions the source goes, so that WARPS meet on each processor."""
    return max(1, min(most, S // least, -(-WARPS * device.processors // max(programs * warps, 1))))


def power_of_2(number: int) -> int:
    """The smallest power of 2 that is not less."""
    return 1 << max(number - 1, 0).bit_length()
