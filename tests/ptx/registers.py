"""Reading and writing operands: bound to an instruction once, run for every block that comes by."""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from .block import Block
from .findings import PTXError
from .parse import Immediate, Negated, Operand, Register, Special, Symbol
from .rounding import Array
from .values import UNSIGNED, WIDTH, decode, decoder, encode, immediate, is_signed, resize

Reader: TypeAlias = Callable[[Block], Array]
Writer: TypeAlias = Callable[[Block, Array, Array | None], None]
Step: TypeAlias = Callable[[Block, Array | None], None]


def reader(operand: Operand, type_: str) -> Reader:
    """Gives the operand's values, decoded, for all threads: the inactive ones too, whose results nobody keeps."""
    if isinstance(operand, Register):
        name, convert = operand.name, decoder(operand.type, type_)
        return lambda block: convert(block.registers[name])
    if isinstance(operand, Negated):
        name = operand.operand.name
        return lambda block: ~block.registers[name]
    if isinstance(operand, Immediate):
        literal = decode(immediate(operand.text, type_), type_)
        return lambda block: literal
    if isinstance(operand, Symbol):
        address = np.array(operand.address & ((1 << 8 * WIDTH[type_]) - 1), UNSIGNED[WIDTH[type_]])
        return lambda block: address
    if isinstance(operand, Special):
        name, width = operand.name, WIDTH[type_]
        return lambda block: decode(resize(special(block, name), width), type_)
    raise PTXError(f"cannot read {operand}")


def special(block: Block, name: str) -> Array:
    if name not in block.special:
        raise PTXError(f"this machine does not know the register {name}")
    return block.special[name]


def writer(operand: Operand, type_: str) -> Writer:
    """Encodes values and puts them into the register, in the threads of the mask."""
    if not isinstance(operand, Register):
        raise PTXError(f"cannot write {operand}")
    name = operand.name
    if name == "_":
        return lambda block, values, mask: None
    if (operand.type == "pred") != (type_ == "pred") or WIDTH[operand.type] < WIDTH[type_]:
        raise PTXError(f"a .{operand.type} register cannot hold .{type_}")
    width, signed = WIDTH[operand.type], is_signed(type_)

    def write(block: Block, values: Array, mask: Array | None) -> None:
        bits = encode(values, type_)
        if type_ != "pred":
            bits = resize(bits, width, signed)
        block.registers[name] = bits if mask is None else np.where(mask, bits, block.registers[name])

    return write


def fresh(registers: dict[str, str]) -> dict[str, Array]:
    """Registers as a block finds them: arbitrary."""
    return {name: np.array(False) if type_ == "pred" else arbitrary(WIDTH[type_]) for name, type_ in registers.items()}


def arbitrary(width: int) -> Array:
    return np.frombuffer(b"\xa5" * width, UNSIGNED[width]).reshape(())


def mask_lanes(block: Block, mask: Array | None, lanes: Array, values: Array) -> Array:
    """Values of the active lanes as an array over all threads."""
    if mask is None:
        return values
    full = np.zeros(block.threads, values.dtype)
    full[lanes] = values
    return full
