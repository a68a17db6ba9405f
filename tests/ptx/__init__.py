"""A machine that executes PTX on numpy, to prove compiled kernels where there is no GPU.

``parse`` reads the text, ``Machine`` runs it: one numpy lane per thread, with the barriers, races, bounds and initialisation of the real
machine watched more closely than the real one does. It runs what nvcc and Triton make for sm_80, and nvcc's clusters of sm_90::

    machine = Machine(parse(text, "kernel"))
    machine.launch(grid, block, [inputs, Output(result), 3, 0.5], dynamic_shared=0)
    assert not machine.findings
    machine.counts["mma"], machine.global_bytes["kernel_param_0"].loaded

Faults (bounds, alignment, deadlocks) end a launch; races, uninitialised reads, copies that nobody waited for and divergent barriers are
collected. Blocks run one after another, those of a cluster in turn from barrier to barrier, and all warps of a block at one pace: what is
found is found whatever the order on a real machine, because accesses are judged by what orders them. Not there: calls of functions,
brx.idx, mbarrier, bulk copies, work between a cluster's arrival and its wait, wgmma and tcgen05.
"""

from .findings import Fault, Finding, Findings, PTXError
from .machine import Machine, Struct
from .memory import Buffer, Output, Traffic
from .parse import Kernel, parse

__all__ = ["Buffer", "Fault", "Finding", "Findings", "Kernel", "Machine", "Output", "PTXError", "Struct", "Traffic", "parse"]
