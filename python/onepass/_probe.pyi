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
    """Compiler, flags, the torch built against, the version."""
