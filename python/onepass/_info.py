"""``python -m onepass info``: versions, backends with the reasons for each that is not available, instruction set, ceilings."""

import importlib
import platform
from typing import Any

import torch

from onepass import _backends, _library
from onepass._version import __version__


def probe() -> Any:
    """The module ``onepass._probe``, or None where it was not built."""
    try:
        return importlib.import_module("onepass._probe")
    except ImportError:
        return None


def lines(measure: bool = True) -> list[str]:
    """What is there, a line each."""
    out = [f"onepass     {__version__}", f"torch       {torch.__version__}"]
    out.append(f"python      {platform.python_version()} on {platform.machine()}")
    devices = [torch.device("cpu")] + [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    for name in _backends.NAMES:
        for device in devices:
            reasons = _backends.not_supported_reasons(name, device)
            out.append(f"backend     {name} on {device}: " + ("available" if not reasons else f"not available: {'; '.join(reasons)}"))
    found = probe()
    if found is None:
        return [*out, "probe       not built: no instruction set and no ceilings to show"]
    build = found.build()
    out.append(f"built       by {build['compiler']} against torch {build['torch']} ({build['flags']})")
    if _library.error is None:
        out.append(f"library     {_library.path_of('_C')}")
    archs = ", ".join(map(_backends.shown, _library.cuda_archs))
    out.append(f"cuda        kernels for compute capabilities {archs}" if archs else f"cuda        {_library.cuda_error}")
    try:
        out.append(f"isa         {found.isa()} of {', '.join(found.isas())} (ONEPASS_ISA takes a lower one)")
    except ValueError as wrong:
        return [*out, f"isa         {wrong}"]
    for threads in sorted({1, torch.get_num_threads()}) if measure else ():
        c = found.ceilings(threads)
        plural = "" if threads == 1 else "s"
        out.append(
            f"ceilings    {threads} thread{plural}: {c['fma'] / 1e9:.1f} G fp32 multiply-adds/s, "
            f"{c['reciprocal'] / 1e9:.1f} G reciprocals/s, {c['read'] / 1e9:.1f} GB/s read from memory"
        )
    return out
