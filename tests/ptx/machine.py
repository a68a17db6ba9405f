"""Launches kernels: places arguments, runs clusters of blocks one after another, collects findings and counts."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from .access import CopyQueue, elements, space_of
from .block import Block
from .cache import SectorCache
from .findings import Findings, Position
from .memory import Buffer, GlobalMemory, LocalMemory, ParameterMemory, SharedMemory, Traffic
from .operation import CARRY
from .parse import Immediate, Instruction, Kernel, Parameter
from .program import program
from .races import BlockRaces, Clock
from .registers import fresh
from .rounding import Array
from .schedule import Scheduler
from .values import WIDTH

Argument: TypeAlias = "npt.NDArray[Any] | Buffer | Struct | int | float | bool | bytes | np.generic"
SHARED_LIMIT = 232448  # bytes that a block may have at most on any device so far
CLUSTER_LIMIT = 8  # blocks of a cluster that every device with clusters takes


@dataclass(frozen=True)
class Struct:
    """A struct by value: arrays and buffers are pointers, with a number beside one that many bytes into it; numbers have the width of their
    numpy type; None is a null pointer."""

    fields: Mapping[str, "npt.NDArray[Any] | Buffer | tuple[npt.NDArray[Any] | Buffer, int] | Struct | np.generic | None"]


@dataclass(frozen=True)
class Launch:
    """What all blocks of a launch share."""

    grid: Position
    block: Position
    dynamic_shared: int
    cluster: int
    memory: GlobalMemory
    parameters: ParameterMemory


class Machine:
    """Runs one kernel. What it reports adds up over launches; ``global_bytes`` is by argument name.

    With ``approximate``, instructions that the hardware approximates are off by up to their documented error, always the same for the
    same operands. ``limit`` is how many steps a block may take. ``cache`` is how many bytes of L1 each block has to itself, so that
    ``global_bytes`` says what moves past it.
    """

    def __init__(self, kernel: Kernel, *, approximate: bool = False, limit: int = 10_000_000, cache: int | None = None) -> None:
        self.kernel, self.limit, self.cache = kernel, limit, cache
        self.lines = program(kernel, approximate)
        self.units = {space: narrowest(kernel, space) for space in ("global", "shared", "local")}
        self.findings = Findings()
        self.counts: Counter[str] = Counter()
        self.global_bytes: dict[str, Traffic] = {}

    def launch(self, grid: Sequence[int] | int, block: Sequence[int] | int, arguments: Sequence[Argument],
               dynamic_shared: int = 0, cluster: int = 1) -> None:  # fmt: skip
        """Arrays are read and written in place; wrap one in ``Output`` whose contents do not count. Missing last arguments are zero.
        ``cluster`` blocks along x make up one."""
        blocks, threads = extents(grid), extents(block)
        if blocks[0] % cluster or not 1 <= cluster <= CLUSTER_LIMIT:
            raise ValueError(f"clusters of {cluster} blocks cannot make up a grid of {blocks}")
        if self.kernel.required_threads and extents(self.kernel.required_threads) != threads:
            raise ValueError(f"the kernel requires blocks of {self.kernel.required_threads}, not {threads}")
        if len(arguments) > len(self.kernel.parameters):
            raise ValueError(f"{len(arguments)} arguments for {len(self.kernel.parameters)} parameters")
        shared = self.kernel.layouts["shared"].size + dynamic_shared
        if shared > SHARED_LIMIT:
            raise ValueError(f"{shared} bytes of shared memory")
        memory, parameters = self._place(arguments)
        memory.several_blocks = int(np.prod(blocks)) > 1
        launch = Launch(blocks, threads, dynamic_shared, cluster, memory, parameters)
        positions = [(x, y, z) for z, y, x in itertools.product(*(range(extent) for extent in reversed(blocks)))]
        now = 0
        try:
            with np.errstate(all="ignore"):
                for first in range(0, len(positions), cluster):
                    members = [self._block(launch, positions[number], number, now) for number in range(first, first + cluster)]
                    now = self._run(members, now)
        finally:
            memory.write_back()
            for name, traffic in memory.traffic.items():
                self.global_bytes.setdefault(name, Traffic()).add(traffic)

    def _place(self, arguments: Sequence[Argument]) -> tuple[GlobalMemory, ParameterMemory]:
        """Buffers in global memory, and the bytes of the parameters. An array given twice is one buffer."""
        buffers: dict[tuple[int, int], tuple[str, Buffer]] = {}
        for parameter, argument in zip(self.kernel.parameters, arguments, strict=False):
            for name, buffer in pointers(parameter.name, argument):
                buffers.setdefault(key(buffer.array), (name, buffer))
        for (_, first), (_, second) in itertools.combinations(buffers.values(), 2):
            if np.may_share_memory(first.array, second.array):
                raise ValueError("two array arguments overlap without being the same")
        layout = self.kernel.layouts["global"]
        memory = GlobalMemory(list(layout.initial.items()), layout.size, list(buffers.values()), self.units["global"])

        def address(pointer: npt.NDArray[Any] | Buffer) -> int:
            return memory.address(list(buffers).index(key(pointer.array if isinstance(pointer, Buffer) else pointer)))

        content = bytearray(self.kernel.parameter_bytes)
        for parameter, argument in zip(self.kernel.parameters, arguments, strict=False):
            if isinstance(argument, np.ndarray | Buffer):
                argument = address(argument)
            elif isinstance(argument, Struct):
                argument = packed(argument, address)[0]
            content[parameter.offset : parameter.offset + parameter.size] = scalar_bytes(parameter, argument)
        return memory, ParameterMemory(bytes(content))

    def _run(self, blocks: list[Block], now: int) -> int:
        """Runs a cluster, its blocks in turn from one of its barriers to the next, at times from ``now`` on; returns the last one."""
        for block in blocks:
            block.cluster = blocks
            if len(blocks) > 1:
                block.shared.blocks = BlockRaces(len(block.shared.initialised))
        left = [Scheduler(block, self.lines, self.limit) for block in blocks]
        while left:
            waiting = []
            for scheduler in left:
                block = scheduler.block
                block.clock.start(now + 1)
                if not scheduler.run():
                    waiting.append(scheduler)
                else:
                    block.shared.left = True
                now = block.clock.now
            for block in blocks:
                if block.shared.left and block.shared.visited:
                    block.report("leaves a cluster early", "others are in its shared memory, with no barrier of the cluster after that", 0)
                block.shared.meet()
            left = waiting
            if left:
                left[0].block.global_.order.meet([scheduler.block.number for scheduler in left], now)
            for scheduler in left:
                scheduler.go_on()
        return now

    def _block(self, launch: Launch, position: Position, number: int, now: int) -> Block:
        threads = int(np.prod(launch.block))
        sizes = {space: self.kernel.layouts[space].size for space in ("shared", "local")}
        return Block(
            position=position,
            number=number,
            threads=threads,
            instructions=self.kernel.instructions,
            findings=self.findings,
            counts=self.counts,
            clock=Clock(threads, now + 1),
            special=special_registers(launch, position, number, sizes["shared"]),
            registers={**fresh(self.kernel.registers), CARRY.name: np.array(False)},
            shared=SharedMemory(sizes["shared"] + launch.dynamic_shared, self.units["shared"]),
            local=LocalMemory(threads, sizes["local"], self.units["local"]),
            global_=launch.memory,
            parameters=launch.parameters,
            copies=CopyQueue(threads),
            cache=None if self.cache is None else SectorCache(self.cache),
        )


def narrowest(kernel: Kernel, space: str) -> int:
    """Bytes of the narrowest access that the kernel makes to a space; 4 where it makes none."""
    return min((access_bytes(instruction) for instruction in kernel.instructions if touches(instruction, space)), default=4)


def pointers(name: str, argument: Any) -> Iterator[tuple[str, Buffer]]:
    """The buffers that an argument points to, by name."""
    if isinstance(argument, Struct):
        for field, value in argument.fields.items():
            yield from pointers(f"{name}.{field}", value)
    elif isinstance(argument, tuple):
        yield from pointers(name, argument[0])
    elif isinstance(argument, np.ndarray | Buffer):
        yield name, argument if isinstance(argument, Buffer) else Buffer(argument)


def packed(struct: Struct, address: Callable[[npt.NDArray[Any] | Buffer], int]) -> tuple[bytes, int]:
    """A struct's bytes as C++ lays them out, and its alignment."""
    content, widest = b"", 1
    for value in struct.fields.values():
        if isinstance(value, Struct):
            part, alignment = packed(value, address)
        else:
            if isinstance(value, tuple):
                value = np.uint64(address(value[0]) + value[1])
            elif not isinstance(value, np.generic):
                value = np.uint64(0 if value is None else address(value))
            part = value.tobytes()
            alignment = len(part)
        content += bytes(-len(content) % alignment) + part
        widest = max(widest, alignment)
    return content + bytes(-len(content) % widest), widest


def key(array: npt.NDArray[Any]) -> tuple[int, int]:
    return array.ctypes.data, array.nbytes


def extents(given: Sequence[int] | int) -> Position:
    x, y, z = (*((given,) if isinstance(given, int) else given), 1, 1, 1)[:3]
    return int(x), int(y), int(z)


def scalar_bytes(parameter: Parameter, argument: Any) -> bytes:
    """An argument by value, in the bytes of its parameter. Where PTX says .b32 only, a float is told from an integer by its Python type."""
    if isinstance(argument, int) and parameter.type in ("f32", "f64"):
        argument = float(argument)
    if isinstance(argument, float) and parameter.type[0] in "su":
        raise ValueError(f"a float for {parameter.name}, which is .{parameter.type}")
    if isinstance(argument, bytes):
        content = argument
    elif isinstance(argument, np.generic):
        content = argument.tobytes()
    elif isinstance(argument, float):
        content = (np.float32 if parameter.size == 4 else np.float64)(argument).tobytes()
    else:
        content = (int(argument) & ((1 << 8 * parameter.size) - 1)).to_bytes(parameter.size, "little")
    if len(content) != parameter.size:
        raise ValueError(f"{len(content)} bytes for {parameter.name}, which has {parameter.size}")
    return content


def touches(instruction: Instruction, space: str) -> bool:
    if instruction.opcode == "cp":
        return "async" in instruction.parts and space in ("shared", "global") and len(instruction.operands) > 1
    if instruction.opcode == "ldmatrix":
        return space == "shared"
    return instruction.opcode in ("ld", "ldu", "st", "atom", "red") and space_of(instruction) in (space, f"{space}_cluster", "generic")


def access_bytes(instruction: Instruction) -> int:
    if instruction.opcode == "cp":
        size = instruction.operands[2]
        return int(size.text, 0) if isinstance(size, Immediate) and len(instruction.operands) == 3 else 4
    return 16 if instruction.opcode == "ldmatrix" else min(16, WIDTH[instruction.type] * elements(instruction))


def special_registers(launch: Launch, position: Position, number: int, static_shared: int) -> dict[str, Array]:
    grid, block, dynamic = launch.grid, launch.block, launch.dynamic_shared
    lanes = np.arange(int(np.prod(block)), dtype=np.uint32)
    lane, width, height = lanes % np.uint32(32), np.uint32(block[0]), np.uint32(block[1])
    one = np.uint32(1)
    found: dict[str, Any] = {
        "%tid.x": lanes % width,
        "%tid.y": lanes // width % height,
        "%tid.z": lanes // (width * height),
        "%laneid": lane,
        "%warpid": lanes // np.uint32(32),
        "%nwarpid": np.uint32(64),
        "%smid": np.uint32(0),
        "%nsmid": np.uint32(1),
        "%lanemask_eq": one << lane,
        "%lanemask_lt": (one << lane) - one,
        "%lanemask_le": (np.uint32(2) << lane) - one,
        "%lanemask_gt": ~((np.uint32(2) << lane) - one),
        "%lanemask_ge": ~((one << lane) - one),
        "%cluster_ctarank": np.uint32(number % launch.cluster),
        "%cluster_nctarank": np.uint32(launch.cluster),
        "%dynamic_smem_size": np.uint32(dynamic),
        "%total_smem_size": np.uint32(static_shared + dynamic),
        "%clock": np.uint32(0),
        "%clock64": np.uint64(0),
        "%globaltimer": np.uint64(0),
    }
    for index, axis in enumerate("xyz"):
        found[f"%ntid.{axis}"], found[f"%nctaid.{axis}"] = np.uint32(block[index]), np.uint32(grid[index])
        found[f"%ctaid.{axis}"] = np.uint32(position[index])
    return {name: np.asarray(value) for name, value in found.items()}
