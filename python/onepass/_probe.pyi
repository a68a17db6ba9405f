"""Instruction set, build and measured ceilings of the CPU kernels; free of torch. Compiled from csrc/probe."""

def isa() -> str:
    """The instruction set in use."""

def isas() -> list[str]:
    """Those that this machine runs, lowest first."""

def force_isa(name: str) -> None:
    """Use this instruction set from now on (sets ONEPASS_ISA for the process). ValueError if the machine does not run it."""

def ceilings(threads: int = 1, seconds: float = 0.1, bytes: int = 1 << 28) -> dict[str, float]:
    """Measured, all threads together, per second: float32 multiply-adds ("fma"), accurate float32 reciprocals ("reciprocal"), and
    bytes read ("read") from `bytes` of memory."""

def build() -> dict[str, str]:
    """Compiler, flags, the torch built against, the version, and the compute capabilities built for or why there are none ("cuda")."""

def cuda_seconds(additive: bool, sizes: list[int], dtype: int, processors: int, capability: int) -> float:
    """Predicted seconds of the CUDA kernels' forward pass of sizes B, H, T, S, A, D; dtype: 0 float32, 1 float64, 2 bfloat16, 3
    float16; capability: 90 for 9.0."""
