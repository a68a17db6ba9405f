"""A machine that executes PTX on numpy, to prove compiled kernels where there is no GPU.

``parse`` reads the text, ``Machine`` runs it: one numpy lane per thread, with the barriers, races, bounds and initialisation of the real
machine watched more closely than the real one does. It runs what nvcc and Triton make for sm_80.
"""

from .findings import Fault, Finding, Findings, PTXError
from .machine import Machine
from .memory import Buffer, Output, Traffic
from .parse import Kernel, parse

__all__ = ["Buffer", "Fault", "Finding", "Findings", "Kernel", "Machine", "Output", "PTXError", "Traffic", "parse"]
