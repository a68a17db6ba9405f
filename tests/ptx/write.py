"""Small PTX modules around a few lines of code, for tests of the machine itself."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .machine import Argument, Machine
from .memory import Output
from .parse import parse
from .rounding import Array

THREADS = 128
REGISTERS = """
    .reg .pred %p<32>, %q;
    .reg .b16 %h<32>;
    .reg .b32 %r<64>, %tid;
    .reg .f32 %f<32>;
    .reg .b64 %rd<32>;
"""


def module(body: str, parameters: Sequence[str] = (), outside: str = "") -> str:
    """A kernel ``k``. Parameters are PTX types in order, named p0, p1, ...; the body finds %tid and the registers above, and each line of
    it has a .loc of its own, counted from 1."""
    listed = ", ".join(f".param .{type_} p{index}" for index, type_ in enumerate(parameters))
    numbered = "\n".join(f".loc 1 {number} 0\n{line}" for number, line in enumerate(body.strip("\n").splitlines(), 1))
    head = '.version 8.0\n.target sm_80\n.address_size 64\n.file 1 "k.cu"\n'
    return f"{head}{outside}\n.visible .entry k({listed})\n{{\n{REGISTERS}\nmov.u32 %tid, %tid.x;\n{numbered}\nret;\n}}\n"


def machine(body: str, parameters: Sequence[str] = (), outside: str = "", approximate: bool = False) -> Machine:
    return Machine(parse(module(body, parameters, outside)), approximate=approximate)


def run(
    body: str, arguments: Sequence[Argument], grid: int = 1, block: int | tuple[int, ...] = 32, outside: str = "", dynamic_shared: int = 0,
    cluster: int = 1,
) -> Machine:  # fmt: skip
    """Runs a body whose parameters follow from the arguments: b32 for numbers of Python's, u64 for the rest."""
    types = ["b32" if isinstance(argument, int | float) else "u64" for argument in arguments]
    made = machine(body, types, outside)
    made.launch(grid, block, arguments, dynamic_shared, cluster)
    return made


def evaluate(code: str, results: Mapping[str, npt.DTypeLike], approximate: bool = False, **sources: npt.NDArray[Any]) -> dict[str, Array]:
    """Runs ``code`` once for each element of the sources, in a thread of its own.

    Sources and results are registers named as the keywords, of the width of their dtype; bool makes predicates. A last axis of two
    16-bit elements is one 32-bit register.
    """
    count = len(next(iter(sources.values())))
    outputs = {name: np.zeros(count, dtype) for name, dtype in results.items()}
    lines = ["mov.u32 %r1, %ctaid.x;", f"mad.lo.u32 %r0, %r1, {THREADS}, %tid;", f"setp.ge.u32 %q, %r0, {count};", "@%q ret;"]
    arguments: list[Argument] = []
    for name, array in sources.items():
        flat = array if array.ndim == 1 else np.ascontiguousarray(array).view(np.uint32).reshape(-1)
        lines += [declaration(name, flat.dtype), *transfer("ld", name, flat.dtype, len(arguments))]
        arguments.append(np.ascontiguousarray(flat))
    lines += [declaration(name, array.dtype) for name, array in outputs.items()]
    lines.append(code if code.rstrip().endswith(";") else code + ";")
    for name, array in outputs.items():
        lines += transfer("st", name, array.dtype, len(arguments))
        arguments.append(Output(array))
    made = machine("\n".join(lines), ["u64"] * len(arguments), approximate=approximate)
    made.launch(-(-count // THREADS), THREADS, arguments)
    assert not made.findings, made.findings
    return outputs


def declaration(name: str, dtype: "np.dtype[Any]") -> str:
    return f".reg .{'pred' if dtype == np.bool_ else f'b{max(16, 8 * dtype.itemsize)}'} %{name};"


def transfer(opcode: str, name: str, dtype: "np.dtype[Any]", parameter: int) -> list[str]:
    """A load or a store of the thread's element of an array parameter."""
    register, bits = ("%h0" if dtype == np.bool_ else f"%{name}"), 8 * dtype.itemsize
    address = [f"ld.param.u64 %rd0, [p{parameter}];", f"mad.wide.u32 %rd0, %r0, {dtype.itemsize}, %rd0;"]
    if opcode == "ld":
        return [*address, f"ld.global.u{bits} {register}, [%rd0];", *([f"setp.ne.u16 %{name}, %h0, 0;"] if dtype == np.bool_ else [])]
    return [*([f"selp.u16 %h0, 1, 0, %{name};"] if dtype == np.bool_ else []), *address, f"st.global.u{bits} [%rd0], {register};"]
