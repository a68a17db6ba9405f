"""One kernel at a time: everything that is found out about it, as what a JSON file holds."""

import importlib
from dataclasses import asdict
from typing import Any

from . import ptx_loops, sass
from .compiled import Entry, compile_entry, program, resources, source_of
from .devices import DEVICES, device_of, occupancy
from .predict import predict
from .traffic import TARGET as EXECUTED
from .traffic import execute

Record = dict[str, Any]
EXECUTION = "execution"


def entries(catalogue: str, target: str = EXECUTED) -> list[Entry]:
    """What the module ``catalogue`` lists, with the tiles of the target: as many for each."""
    found: list[Entry] = importlib.import_module(catalogue).entries(target)
    return found


def study(catalogue: str, number: int, target: str) -> Record:
    """A kernel compiled for a target. It is named by its place in the catalogue, since kernels cannot be sent to another process."""
    entry = entries(catalogue, target)[number]
    compiled = compile_entry(entry, target)
    needs = resources(compiled)
    record: Record = {"tile": entry.tile, "warps": entry.warps, **asdict(needs)}
    if compiled.binary is None:
        return record
    fits = occupancy(device_of(target), needs.registers, needs.shared, entry.warps)
    record |= {"occupancy": asdict(fits)}
    source = source_of(entry.hot)
    body = sass.hot_loop(program(compiled), source)
    if body is None:
        return record
    counted, trips = sass.issue(body), ptx_loops.unrolled(body, compiled.text, source, compiled.name)
    loop: Record = {"unrolled": trips, "slots": counted.slots, "fp32": counted.fp32}
    if entry.elements is not None:
        each = entry.elements * trips
        loop |= {"elements": each, "per_element": {name: count / each for name, count in counted.slots.items()}}
        loop |= {"slots_per_element": counted.total / each}
    return record | {"loop": loop}


def prediction(entry: Entry, record: Record, target: str, moved: int | None) -> Record | None:
    """For the device of the target, from what ``study`` found."""
    if "error" in record or not any(device.target == target for device in DEVICES):
        return None
    loop = record.get("loop", {})
    issue = sass.Issue(loop["slots"], loop["fp32"]) if loop else None
    device = device_of(target)
    found = predict(device, entry, issue, loop.get("elements"), moved)
    return {"device": device.name, "seconds": found.seconds, "limit": found.limit, "elements_per_second": found.elements_per_second}


def run(job: tuple[str, int, str]) -> Record:
    """A job of a worker: a catalogue, a kernel's number and a target, or ``EXECUTION`` in its place. What went wrong is told as text, since
    not every exception can be sent to another process."""
    catalogue, number, target = job
    try:
        return execute(entries(catalogue)[number]) if target == EXECUTION else study(catalogue, number, target)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
