"""Tile sizes: pure functions of shapes, dtypes and the device, to frozen dataclasses. ``benchmarks/gpuless.py`` shows what they cost."""

import re
from dataclasses import dataclass

import torch

try:
    from triton import __version__ as _triton
except ImportError:
    _triton = "0"

CLOCK = 1.8e9  # Hz, near enough for predictions that are compared with each other
SLOTS = 4.0  # issue slots of an additive score's channel
TOGETHER = 256  # positions whose terms are added up one by one
WARPS = 8  # that share a processor at least: what registers and shared memory of the tiles for float32 and narrower leave room for
TRITON = tuple(int(number) for number in re.findall(r"\d+", _triton)[:2])  # (3, 9) for 3.9.1
SHORT_PRODUCTS = TRITON >= (3, 8)  # whether a product of two matrices of float32 may be of 8 terms; before it is of 16 at least


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
    BD = 128 if warps == 8 else 64  # so that a thread copies 16 bytes of values: fewer go through the L1
    splits = parts(rows * -(-T // BT), S, BS, device, warps)
    BA, BK = 32, 16
    if dtype == torch.float32:  # without tensor cores a thread holds all of its operands
        BA, BK, BD = (16, 8, BD) if SHORT_PRODUCTS else (16, 16, BD // 2)
    BD = min(BD, max(16, power_of_2(D)))
    return Tile(BT, BS, BA, BK, BD, max(1, warps * 32 // device.lanes), 2, splits, registers=all_registers(device))


def attend_seconds(
    B: int, H: int, T: int, S: int, A: int, D: int, dtype: torch.dtype, additive: bool, device: Device
) -> float:
    """What ``attend`` is predicted to take at least: issue slots of its hot loops over their rate."""
    tile = attend_tile(B * H, T, S, D, dtype, additive, False, device)
    slots = 100.0 if dtype == torch.float64 else SLOTS if additive else 1.0
    of_program = tile.BT * -(-S // tile.parts) * (slots * A + D) / (4 * device.lanes)
    waves = -(-B * H * -(-T // tile.BT) * tile.parts // device.processors)
    return waves * of_program / CLOCK


def online_tile(T: int, D: int, dtype: torch.dtype, hides: bool, device: Device) -> Tile:
    """Of ``attend_online``; a program has all of D up to 256; where masks or spans take registers too, 128 of it, or more warps."""
    if dtype == torch.float64:
        return Tile(BT=16, BS=32, BA=32, BD=min(64, max(16, power_of_2(D))))
    tight = hides and dtype == torch.float32
    BT = 16 if T <= 16 or tight else 64 if D <= 128 else 32
    BS = 64 if D <= 128 else 32
    warps = 256 // device.lanes if hides and not tight and D > 128 else 4
    return Tile(BT, BS, BA=32, BD=max(16, min(128 if tight else 256, power_of_2(D))), warps=warps, registers=all_registers(device))


def products_tile(rows: int, T: int, S: int, dtype: torch.dtype, hides: bool, by_query: bool, device: Device) -> Tile:
    """Of ``weight_gradients``, for ``rows`` = B H: as large as registers allow, so that rows and values are read few times. Masks and what
    queries see by themselves take registers too."""
    if dtype == torch.float64:
        return Tile(BT=16, BS=32, BD=32, parts=parts(rows * -(-T // 16), S, 32, device, 4))
    BT, wide = 16 if T <= 16 else 32, dtype == torch.float32
    if T > 32 and S > 64 and not hides and rows * -(-T // 64) * -(-S // 128) >= device.processors:
        splits = parts(rows * -(-T // 64), S, 128, device, 8)
        return Tile(BT=64, BS=128, BD=16 if wide else 32, warps=8, parts=splits, registers=all_registers(device))
    splits = parts(rows * -(-T // BT), S, 64, device, 4)
    registers = all_registers(device) if BT == 16 or not wide else None
    return Tile(BT, BS=64, BD=16 if by_query and wide else 32, parts=splits, registers=registers)


def sums_tile(over_source: bool, rows: int, T: int, S: int, D: int, dtype: torch.dtype, hides: bool, device: Device) -> Tile:
    """Of ``sums``, for ``rows`` = B H; ``parts`` is into how many the columns go. Where enough programs remain, one has all columns of its
    positions, and finds their weights in the cache after the first."""
    wide = dtype == torch.float32
    if dtype == torch.float64:
        return Tile(BT=16, BS=32, BD=32, parts=max(1, -(-D // 32)))
    if over_source and T > 32 and D > 64 and not hides and rows * -(-T // 64) * -(-D // 128) >= device.processors:
        return Tile(BT=64, BS=16 if wide else 32, BD=128, warps=8, parts=-(-D // 128), registers=all_registers(device))
    if not over_source and S > 64 and not hides and rows * -(-S // 128) >= device.processors:
        BT, BD = (16, 64) if not wide else (8, 64) if SHORT_PRODUCTS else (16, 32)
        return Tile(BT, BS=128, BD=BD, warps=8, parts=1, registers=all_registers(device))
    BT = 16 if T <= 16 or not over_source else 32  # a sum over queries takes few at a time: masks need registers
    return Tile(BT, BS=64, BD=32, parts=max(1, -(-D // 32)), registers=all_registers(device) if BT == 16 or not wide else None)


def tanh_gradients_tile(rows: int, T: int, S: int, A: int, device: Device) -> Tile:
    """A lane has one channel and up to 64 queries, whose sums fill its registers; where it has few, several positions at a time to wait
    for. The source is split as long as the parts of dq take no more memory than keys, or 64 positions each; and so that none has more than
    TOGETHER, of which a sum is good as it comes."""
    BT = queries_together(T)
    BA = min(128, max(device.lanes, power_of_2(A)))
    warps = BA // device.lanes
    splits = max(-(-S // TOGETHER), parts(rows * -(-A // BA), S, min(64, max(16, T)), device, warps))
    return Tile(BT, BS=max(1, 16 // BT), BA=BA, warps=warps, stages=1, parts=splits, registers=all_registers(device))


def queries_together(T: int) -> int:
    """Of as many passes over the source as 64 queries at a time make; eights, but for very few."""
    return max(2, T + T % 2) if T < 7 else 8 * -(-T // (8 * -(-T // 64)))


def all_registers(device: Device) -> int | None:
    """That a thread may have on NVIDIA's, whose compiler may be told so; AMD's takes no such option."""
    return 255 if device.unit == "ptx" else None


def parts(programs: int, S: int, least: int, device: Device, warps: int, most: int = 64) -> int:
    """Into how many parts of at least ``least`` positions the source goes, so that WARPS meet on each processor."""
    return max(1, min(most, S // least, -(-WARPS * device.processors // max(programs * warps, 1))))


def power_of_2(number: int) -> int:
    """The smallest power of 2 that is not less."""
    return 1 << max(number - 1, 0).bit_length()
