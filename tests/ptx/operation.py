"""Instructions whose results depend on their sources alone: what they read and write, as what, and a function of numpy arrays between."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from .findings import PTXError
from .parse import Instruction, Operand, Register

CARRY = Register("%carry", "pred")  # the flag that add.cc sets and addc reads

Typed: TypeAlias = tuple[Operand, str]


@dataclass(frozen=True)
class Error:
    """How far an approximate instruction may be off: the larger of ``relative`` times the result and ``absolute``."""

    relative: float
    absolute: float = 0.0


@dataclass(frozen=True)
class Operation:
    """``apply`` takes the decoded sources and gives one array, or a tuple of as many as there are results."""

    results: tuple[Typed, ...]
    sources: tuple[Typed, ...]
    apply: Callable[..., Any]
    error: Error | None = None


Builder: TypeAlias = Callable[[Instruction], Operation]


def elementwise(instruction: Instruction, type_: str, apply: Callable[..., Any], result: str = "", error: Error | None = None) -> Operation:
    """The usual case: the first operand is the result, all others are sources of one type."""
    first, *sources = instruction.operands
    return Operation(((first, result or type_),), tuple((source, type_) for source in sources), apply, error)


def unsupported(instruction: Instruction) -> PTXError:
    return PTXError(f"this machine does not know `{instruction.text}` [{instruction.line}]")
