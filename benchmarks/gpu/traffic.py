"""Executes an entry on the PTX machine of the tests, for the bytes that it moves and for whatever it does wrong."""

from typing import Any

from ptx import Machine, parse

from . import ptx_loops, sass
from .compiled import Compiled, Entry, compile_entry, resources, source_of
from .devices import device_of, l1_share, occupancy

TARGET = "80"  # what the machine understands


def execute(entry: Entry) -> dict[str, Any]:
    """Bytes by argument, what was found, and how much of the arithmetic the hot loop has."""
    assert entry.arguments is not None
    compiled = compile_entry(entry, TARGET)
    cache = l1_of(entry, compiled)
    machine = Machine(parse(compiled.text, compiled.name), cache=cache)
    machine.launch(entry.grid, 32 * entry.warps, entry.arguments(), compiled.shared)
    names = [name for name, type_ in entry.signature.items() if type_ != "constexpr"]
    given = dict(zip((parameter.name for parameter in machine.kernel.parameters), names, strict=False))
    moved = {given.get(name, name): vars(traffic) for name, traffic in machine.global_bytes.items()}
    total = {key: sum(traffic[key] for traffic in moved.values()) for key in ("loaded", "stored", "fetched", "written")}
    return {
        "findings": [str(finding) for finding in machine.findings],
        "l1": cache,
        "arguments": {name: traffic for name, traffic in moved.items() if any(traffic.values())},
        "asked": total["loaded"] + total["stored"],
        "moved": total["fetched"] + total["written"],
        "ratio": (total["fetched"] + total["written"]) / entry.necessary,
        "hot_share": hot_share(entry, compiled, machine),
    }


def l1_of(entry: Entry, compiled: Compiled) -> int:
    """The L1 that one of the blocks on a full SM has to itself."""
    needs, device = resources(compiled), device_of(TARGET)
    return l1_share(device, needs.shared, occupancy(device, needs.registers, needs.shared, entry.warps).blocks)


def hot_share(entry: Entry, compiled: Compiled, machine: Machine) -> float | None:
    """The part of the executed arithmetic that the hot loop must have had to do the entry's work. Above 1, its numbers are wrong."""
    body = sass.hot_loop(ptx_loops.program(compiled.text, compiled.name), source_of(entry.hot))
    if body is None or entry.elements is None or entry.work is None:
        return None
    trips = entry.work / (32 * entry.elements)  # of warps
    pairs = zip(ptx_loops.weight(body), ptx_loops.executed(machine.counts), strict=True)
    return next((trips * each / total for each, total in pairs if each and total), None)
