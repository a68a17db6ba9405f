"""Instruction set, build and measured ceilings of the CPU kernels; free of torch. Compiled from csrc/probe."""

from typing import Any

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

def cuda_launches(
    op: str,
    sizes: list[int],
    dtype: int,
    processors: int,
    capability: int,
    queries: int = 0,
    kept: int | None = None,
    of_query: bool = True,
) -> list[dict[str, Any]]:
    """The launches of an op's CUDA kernels, as a GPU would be given them, for sizes B, H, T, S, A, D; none where no kernel takes them.

    op: ``"additive_forward"``, ``"additive_backward"``, ``"score_gradients"``, or ``"step_forward"`` and ``"step_backward"`` after a family
    and ``_``; dtype: 0 float32, 1 float64, 2 bfloat16, 3 float16; capability: 90 for 9.0; queries: of a tile of the forward, 0 for
    as many as are fastest; kept: the dtype of a step's memory, if another; of_query: whether ``additive_backward`` is asked for the query's
    gradient. Of each: ``kernel``, its symbol; ``blocks``, ``threads``, ``shared`` (bytes), ``splits`` of the source, ``cluster``, blocks
    that run side by side; ``resident`` (blocks that a processor is meant to hold), ``seconds``, predicted; and of all together ``scratch``,
    the sizes of the op's scratch tensors, and ``cut``, how the backward cuts its work: ``BackwardParts`` of
    csrc/cuda/additive_backward.h."""
