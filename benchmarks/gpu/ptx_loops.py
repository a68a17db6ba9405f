"""The loops of PTX, to see how often the assembler has unrolled the one that it made the hot loop from."""

from collections.abc import Mapping, Sequence

import ptx
from ptx.parse import Label

from .sass import Instruction, Source, hot_loop, issue

SPECIAL = {"rcp", "rsqrt", "sqrt", "ex2", "lg2", "sin", "cos", "tanh", "div"}  # one MUFU each, whatever else it takes
ARITHMETIC = {"fma": "FFMA", "mul": "FMUL", "add": "FADD", "sub": "FADD"}


def program(text: str, name: str | None = None) -> list[Instruction]:
    """PTX of a kernel, or of the only one, under the names that the machine has for it, as far as it counts it; addresses are the
    instructions' numbers."""
    kernel = ptx.parse(text, name)
    found = []
    for number, item in enumerate(kernel.instructions):
        targets = tuple(kernel.labels[operand.name] for operand in item.operands if isinstance(operand, Label))
        opcode = counterpart(".".join((item.opcode, *item.parts)))
        falls = item.predicate is not None or item.opcode not in ("bra", "ret", "exit")
        found.append(Instruction(number, opcode, targets, falls, item.line))
    return found


def counterpart(opcode: str) -> str:
    """The machine's name for arithmetic; other opcodes as they are."""
    base, *parts = opcode.split(".")
    if base in SPECIAL and {"f32", "f16", "f16x2", "bf16", "bf16x2"} & set(parts):
        return f"MUFU.{base.upper()}"
    if base in ARITHMETIC and parts[-1:] in (["f32"], ["f32x2"]):
        return ARITHMETIC[base] + "2" * (parts[-1] == "f32x2")
    return "HMMA" if base == "mma" or opcode.startswith(("wgmma.mma", "tcgen05.mma")) else opcode


def weight(body: Sequence[Instruction]) -> tuple[int, int, int]:
    """What the assembler keeps the number of, the surest first: MUFU, tensor instructions, FP32 results (it fuses some)."""
    counted = issue(body)
    return counted.slots["mufu"], counted.slots["tensor"], counted.fp32


def executed(counts: Mapping[str, int]) -> tuple[int, int, int]:
    """The like of a whole launch, from what the PTX machine counted."""
    total = [0, 0, 0]
    for name, count in counts.items():
        each = weight([Instruction(0, counterpart(name), (), True)])
        total = [so_far + count * one for so_far, one in zip(total, each, strict=True)]
    return total[0], total[1], total[2]


def unrolled(machine_code: Sequence[Instruction], text: str, source: Source = None, name: str | None = None) -> int:
    """How many trips of the hot loop in the PTX ``text`` (of kernel ``name``) one trip of the hot loop ``machine_code`` makes."""
    body = hot_loop(program(text, name), source)
    if body is None:
        return 1
    pairs = zip(weight(machine_code), weight(body), strict=True)
    return next((max(1, round(mine / theirs)) for mine, theirs in pairs if mine and theirs), 1)
