"""A kernel's instructions, bound to what carries them out."""

import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import access, approximate, arithmetic, convert, logic, warp
from .approximate import perturbed
from .block import Block
from .findings import PTXError
from .operation import Builder, Operation, unsupported
from .parse import Immediate, Instruction, Kernel, Label, Operand, Vector
from .registers import Reader, Step, reader, writer
from .rounding import Array
from .values import WIDTH

OPERATIONS: dict[str, Builder] = {**arithmetic.BUILDERS, **logic.BUILDERS, **convert.BUILDERS, **approximate.BUILDERS}
NOTHING = {"nanosleep", "prefetch", "prefetchu", "griddepcontrol", "discard", "applypriority", "createpolicy"}


@dataclass(frozen=True)
class Barrier:
    """``threads`` is None where all have to come, with ``cluster`` all of the cluster. ``reduce`` combines a predicate over them and writes
    it."""

    number: Reader
    threads: Reader | None
    waits: bool
    aligned: bool
    reduce: Callable[[Block, Array], None] | None
    cluster: bool = False


@dataclass(frozen=True)
class Line:
    """One of ``step``, ``target``, ``barrier`` and ``leaves`` says what is done; ``members`` is there where lanes wait for each other."""

    instruction: Instruction
    name: str
    guard: Reader | None = None
    step: Step | None = None
    members: Reader | None = None
    target: int | None = None
    barrier: Barrier | None = None
    leaves: bool = False


_bound: "weakref.WeakKeyDictionary[Kernel, dict[bool, list[Line]]]" = weakref.WeakKeyDictionary()


def program(kernel: Kernel, approximates: bool) -> list[Line]:
    """Bound once for all machines: a line keeps nothing of what it does."""
    known = _bound.setdefault(kernel, {})
    if approximates not in known:
        known[approximates] = bind(kernel, approximates)
    return known[approximates]


def bind(kernel: Kernel, approximates: bool) -> list[Line]:
    found = [line(kernel, instruction, approximates) for instruction in kernel.instructions]
    barriers = [place for place, each in enumerate(found) if each.name.startswith("barrier.cluster.")]
    entered = set(kernel.labels.values())
    for arrival, wait in itertools.zip_longest(barriers[::2], barriers[1::2]):
        here, following = found[arrival], found[arrival + 1] if wait == arrival + 1 else None
        names = here.name, "" if following is None else following.name
        alike = following is not None and here.instruction.predicate == following.instruction.predicate
        if names != ("barrier.cluster.arrive", "barrier.cluster.wait") or not alike or wait in entered:
            at = here.instruction.line
            raise PTXError(f"a cluster's barrier is an arrival and the wait right behind it, for the same threads [{at}]")
    return found


def line(kernel: Kernel, instruction: Instruction, approximates: bool) -> Line:
    opcode, parts = instruction.opcode, instruction.parts
    common: dict[str, Any] = {"instruction": instruction, "name": class_name(instruction), "guard": guard(instruction)}
    if opcode == "bra":
        label = instruction.operands[0]
        assert isinstance(label, Label)
        return Line(**common, target=kernel.labels[label.name])
    if opcode in ("ret", "exit"):
        return Line(**common, leaves=True)
    try:
        if opcode == "barrier" and parts[0] == "cluster":
            return Line(**common, **cluster_barrier(instruction))
        if opcode in ("bar", "barrier") and parts[0] != "warp":
            return Line(**common, barrier=barrier(instruction))
        if opcode in warp.BUILDERS or (opcode == "bar" and parts[:2] == ("warp", "sync")):
            build = warp.BUILDERS.get(opcode, warp.warp_barrier)
            return Line(**common, step=build(instruction), members=warp.members(instruction) if "sync" in parts else None)
        return Line(**common, step=step(instruction, approximates))
    except (PTXError, ValueError, KeyError, StopIteration, AssertionError) as error:
        return Line(**common, step=refusal(instruction, error))


def refusal(instruction: Instruction, error: Exception) -> Step:
    """An unknown instruction is an error only where it is reached: compilers leave calls for asserts that never fail."""
    known = instruction.opcode in OPERATIONS or instruction.opcode in access.BUILDERS or instruction.opcode in warp.BUILDERS
    refused = PTXError(f"{unsupported(instruction)}: {error}") if known else unsupported(instruction)

    def step(block: Block, mask: Array | None) -> None:
        raise refused

    return step


def guard(instruction: Instruction) -> Reader | None:
    if instruction.predicate is None:
        return None
    name, negated = instruction.predicate.name, instruction.negated
    return lambda block: ~block.registers[name] if negated else block.registers[name]


def step(instruction: Instruction, approximates: bool) -> Step:
    opcode = instruction.opcode
    if opcode in access.BUILDERS:
        return access.BUILDERS[opcode](instruction)
    if opcode == "activemask":
        return warp.activemask(instruction)
    if opcode in NOTHING:
        return lambda block, mask: None
    if opcode == "trap":
        return trap
    if opcode not in OPERATIONS:
        raise unsupported(instruction)
    return run(OPERATIONS[opcode](instruction), approximates)


def trap(block: Block, mask: Array | None) -> None:
    raise block.fault("trap", "the kernel gave up", int(block.active(mask)[0]))


def run(operation: Operation, approximates: bool) -> Step:
    readers = [reader(operand, type_) for operand, type_ in operation.sources]
    writers = [writer(operand, type_) for operand, type_ in operation.results]
    apply = perturbed(operation, operation.error) if approximates and operation.error else operation.apply
    if len(writers) == 1:
        (write,) = writers

        def single(block: Block, mask: Array | None) -> None:
            write(block, apply(*[read(block) for read in readers]), mask)

        return single

    def several(block: Block, mask: Array | None) -> None:
        for write, values in zip(writers, apply(*[read(block) for read in readers]), strict=True):
            write(block, values, mask)

    return several


def barrier(instruction: Instruction) -> Barrier:
    """bar and barrier: sync, arrive, red."""
    parts = tuple(part for part in instruction.parts if part not in ("cta", "aligned"))
    operands = list(instruction.operands)
    reduce = None
    if parts[0] == "red":
        target, predicate = operands.pop(0), operands.pop()
        reduce = reduction(parts[1], target, predicate)
    elif parts[0] not in ("sync", "arrive"):
        raise unsupported(instruction)
    number: Operand = operands[0] if operands else Immediate("0")
    threads = reader(operands[1], "u32") if len(operands) > 1 else None
    aligned = instruction.opcode == "bar" or "aligned" in instruction.parts
    return Barrier(reader(number, "u32"), threads, parts[0] != "arrive", aligned, reduce)


def cluster_barrier(instruction: Instruction) -> dict[str, Any]:
    """barrier.cluster.arrive, which says nothing to the thread itself, and barrier.cluster.wait behind it."""
    if "relaxed" in instruction.parts or instruction.parts[1] not in ("arrive", "wait"):
        raise unsupported(instruction)
    if instruction.parts[1] == "arrive":
        return {"step": lambda block, mask: None}
    return {"barrier": Barrier(lambda block: np.zeros(1, np.uint32), None, True, "aligned" in instruction.parts, None, cluster=True)}


def reduction(name: str, target: Operand, predicate: Operand) -> Callable[[Block, Array], None]:
    read, write = reader(predicate, "pred"), writer(target, "u32" if name == "popc" else "pred")

    def combine(block: Block, mask: Array) -> None:
        said = block.spread(read(block))[mask]
        result = {"popc": said.sum(), "and": said.all(), "or": said.any()}[name]
        write(block, block.spread(result), mask)

    return combine


def class_name(instruction: Instruction) -> str:
    """What executed instructions are counted as: the opcode with its space and vector, or with its type."""
    opcode, parts = instruction.opcode, instruction.parts
    if opcode in ("ld", "st", "atom", "red", "ldu"):
        vector = next((f".{part}" for part in parts if part in ("v2", "v4", "v8")), "")
        return f"{opcode}.{access.space_of(instruction)}{vector}"
    if opcode == "cp":
        return ".".join((opcode, *(part for part in parts if part in ("async", "commit_group", "wait_group", "wait_all"))))
    if opcode == "bar" and parts[:1] == ("warp",):
        return "bar.warp"
    if opcode == "barrier" and parts[:1] == ("cluster",):
        return ".".join((opcode, *parts[:2]))
    if opcode in OPERATIONS and parts and parts[-1] in WIDTH and not isinstance(instruction.operands[0], Vector):
        return f"{opcode}.{parts[-1]}"
    return opcode
