"""Instruction sets to test."""

import importlib

ISAS = ("baseline", "avx2", "avx512")


def machine_isas(backend: str) -> tuple[str, ...]:
    """Those of this machine; backends other than the C++ kernels have none of their own."""
    if backend != "cpu":
        return ("baseline",)
    return tuple(name for name in ISAS if name in importlib.import_module("onepass._probe").isas())
