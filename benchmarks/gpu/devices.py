"""Published limits and rates of NVIDIA GPUs, and how many blocks of a kernel fit on one multiprocessor (SM).

Limits per SM are those of the CUDA Programming Guide's table "Technical Specifications per Compute Capability"; how registers and shared
memory are rounded up, and the sizes that shared memory can be set to, are from `cuda_occupancy.h` of CUDA 13.0. FP32 and MUFU rates are
those of the CUDA Best Practices Guide's table "Throughput of Native Arithmetic Instructions".
"""

from dataclasses import dataclass

KB = 1024
REGISTER_UNIT = 256  # registers are given to warps in so many
SHARED_UNIT, SHARED_RESERVED = 128, 1 * KB  # bytes; what CUDA itself takes of each block since sm_80
MOST_REGISTERS = 255  # of a thread
CARVEOUTS = (0, 8, 16, 32, 64, 100, 132, 164, 196, 228)  # KB that can be set apart as shared memory, as far as the device has them


@dataclass(frozen=True)
class Device:
    """A product and its compute capability. Rates are per second for the whole device, or per SM and clock."""

    name: str
    target: str  # "80" for sm_80
    sms: int
    clock: float  # Hz, the highest that is promised for FP32 work
    bandwidth: float  # bytes of device memory per second
    l2: int  # bytes
    fp32: int  # lanes: multiply-adds per SM and clock
    threads: int  # per SM
    blocks: int  # per SM
    shared: int  # bytes per SM
    l1: int  # bytes per SM that L1 and shared memory have together
    mufu: int = 16  # results per SM and clock
    schedulers: int = 4  # each issues one warp instruction per clock
    registers: int = 64 * KB  # per SM

    @property
    def shared_per_block(self) -> int:
        return self.shared - SHARED_RESERVED


DEVICES = (
    # NVIDIA A100 Tensor Core GPU Architecture, table "Comparison of NVIDIA Data Center GPUs"; bandwidth of the data sheet's 80 GB SXM.
    Device("A100", "80", 108, 1.41e9, 2.039e12, 40 * KB**2, 64, 2048, 32, 164 * KB, 192 * KB),
    # NVIDIA H100 Tensor Core GPU Architecture, table "Comparison of NVIDIA A100 and H100"; 1.98 GHz is the boost clock of FP32 work.
    Device("H100", "90", 132, 1.98e9, 3.352e12, 50 * KB**2, 128, 2048, 32, 228 * KB, 256 * KB),
    # What the driver reports of a B200: 148 SMs, 126.5 MB of L2, 7680 bits of memory bus at 3.996 GHz, double data rate. 1.965 GHz gives
    # the 75 TFLOPS of FP32 per GPU in the data sheet of HGX B200.
    Device("B200", "100", 148, 1.965e9, 7.672e12, 126 * KB**2, 128, 2048, 32, 228 * KB, 256 * KB),
    # NVIDIA RTX Blackwell GPU Architecture, appendix on the GeForce RTX 5090.
    Device("RTX 5090", "120", 170, 2.407e9, 1.792e12, 96 * KB**2, 128, 1536, 24, 100 * KB, 128 * KB),
)


def device_of(target: str) -> Device:
    return next(device for device in DEVICES if device.target == target)


@dataclass(frozen=True)
class Occupancy:
    """Blocks and warps that an SM holds at once, and what keeps it from holding more."""

    blocks: int
    warps: int
    limit: str  # "registers", "shared memory", "threads" or "blocks"


def occupancy(device: Device, registers: int, shared: int, warps: int) -> Occupancy:
    """For a kernel of ``registers`` per thread, ``shared`` bytes and ``warps`` per block. Zero blocks: it cannot be launched."""
    per_warp = up(max(registers, 1) * 32, REGISTER_UNIT)
    resident = device.registers // device.schedulers // per_warp * device.schedulers  # each scheduler has registers of its own
    fits = registers <= MOST_REGISTERS and per_warp * up(warps, device.schedulers) <= device.registers
    most = {
        "registers": resident // warps if fits else 0,
        "shared memory": device.shared // shared_taken(shared) if shared <= device.shared_per_block else 0,
        "threads": device.threads // (32 * warps),
        "blocks": device.blocks,
    }
    limit = min(most, key=most.__getitem__)
    return Occupancy(most[limit], most[limit] * warps, limit)


def l1_share(device: Device, shared: int, blocks: int) -> int:
    """Bytes of L1 that each of ``blocks`` resident blocks has if they share alike: what shared memory leaves, set to its next size."""
    used = shared_taken(shared) * blocks
    carveout = next(size * KB for size in CARVEOUTS if size * KB >= min(used, device.shared))
    return (device.l1 - carveout) // max(blocks, 1)


def shared_taken(shared: int) -> int:
    """What a block takes off the SM's shared memory."""
    return up(shared + SHARED_RESERVED, SHARED_UNIT)


def up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
