"""What a benchmark leaves behind, as one JSON file.

    {"schema": 1, "made": ISO time, "commit": of the sources or null, "device": name, "machine": text, "threads": all of them,
     "versions": {package: version}, "ceilings": {device and dtype: {name: per second}},    see ceilings.py
     "conditions": {what else may matter: text},
     "records": [{
       "kernel": family, "provider": name, "direction": "forward" | "forward + backward",
       "shape": {"name", "B", "T", "S", "A", "D"}, "dtype": name, "device": "cpu" | "cuda", "threads": number,
       "status": "measured" | "wrong" | "missing" | "failed", "reason": why, where it is not "measured",
       "seconds": [median of each round], or empty, "quantiles": {"0.05": seconds, ...} of all calls,
       "metrics": {name: value}}]}

A record's key is its first seven fields. Metrics: "elements/s", "FLOP/s", "bytes/s" (of what cannot be avoided: workloads.Cost), "of
ceiling", "over eager", "over best peer" (medians of the rounds' ratios), "over one thread", "compile seconds" (the first call, less a
later one), "peak bytes" (beyond inputs and results), "of budget" (of the peak that onepass promises, with the inputs that the promise
counts), and what a family adds.
"""

import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import onepass
from onepass import _info

from .workloads import Shape, Workload

SCHEMA = 1
PACKAGES = ("torch", "triton", "jax", "keras", "numpy")
MEASURED, WRONG, MISSING, FAILED = "measured", "wrong", "missing", "failed"
Key = tuple[str, str, str, Shape, str, str, int]


@dataclass
class Record:
    kernel: str
    provider: str
    direction: str
    shape: Shape
    dtype: str
    device: str
    threads: int
    status: str = MEASURED
    reason: str = ""
    seconds: list[float] = field(default_factory=list)
    quantiles: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, workload: Workload, provider: str, direction: str, **more: Any) -> "Record":
        dtype, threads = str(workload.dtype).removeprefix("torch."), more.pop("threads", torch.get_num_threads())
        return cls(workload.family, provider, direction, workload.shape, dtype, workload.device, threads, **more)

    @property
    def key(self) -> Key:
        return self.kernel, self.provider, self.direction, self.shape, self.dtype, self.device, self.threads

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass
class Results:
    made: str
    commit: str | None
    device: str
    machine: str
    threads: int
    versions: dict[str, str]
    ceilings: dict[str, dict[str, float]] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    conditions: dict[str, str] = field(default_factory=dict)
    schema: int = SCHEMA

    @classmethod
    def here(cls, device: str) -> "Results":
        found = {name: version for name in PACKAGES if (version := _version(name)) is not None}
        versions = {"onepass": onepass.__version__, **found}
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return cls(now, _commit(), device_name(device), machine(), torch.get_num_threads(), versions, conditions=conditions())

    def add(self, record: Record) -> None:
        """Under its key; to a record that is there already it adds its metrics."""
        there = next((other for other in self.records if other.key == record.key), None)
        if there is None:
            self.records.append(record)
        else:
            there.metrics.update(record.metrics)

    def timed(self) -> list[Record]:
        return [record for record in self.records if record.seconds]

    def save(self, path: Path) -> None:
        shaped = [{**asdict(record), "shape": record.shape._asdict()} for record in self.records]
        path.write_text(json.dumps({**asdict(self), "records": shaped}, indent=1))


def load(path: Path) -> Results:
    """Raises ``ValueError`` for what is not such a file, or not there."""
    try:
        found = json.loads(path.read_text())
        if found.get("schema") != SCHEMA:
            raise ValueError(f"schema {found.get('schema')!r}, this version reads {SCHEMA}")
        records = [Record(**{**record, "shape": Shape(**record["shape"])}) for record in found.pop("records")]
        return Results(**found, records=records)
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as problem:
        raise ValueError(f"{path} holds no results of a benchmark: {problem}") from problem


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    names = (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name"))
    return next(names, "CPU")


def machine() -> str:
    import platform

    probe = _info.probe()
    isa = f", {probe.isa()}" if probe is not None else ""
    return f"{platform.system()} {platform.machine()}{isa}, Python {platform.python_version()}"


SWITCHES = ("ONEPASS_", "TRITON_", "TORCH", "OMP_", "GOMP_", "KMP_", "MKL_", "MALLOC_", "XLA_", "LD_PRELOAD", "GLIBC_")


def conditions() -> dict[str, str]:
    """The command, the processor's own numbers, how the kernels were compiled, and the variables that torch and its peers heed, folders
    aside."""
    probe = _info.probe()
    names = ("cpu family", "model\t", "stepping", "cache size")
    numbers = dict.fromkeys(line for line in _lines("/proc/cpuinfo") if line.startswith(names))
    command = shlex.join(["python", "-m", "onepass", *sys.argv[1:]])
    found = {"command": command, "processor": ", ".join(" ".join(line.split()) for line in numbers)}
    if probe is not None:
        found["built"] = ", ".join(f"{name} {value}" for name, value in probe.build().items())
    return found | {name: value for name, value in sorted(os.environ.items()) if name.startswith(SWITCHES) and "_DIR" not in name}


def caption(results: Results) -> str:
    """Conditions in a line."""
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items() if name != "numpy")
    commit = f" at {results.commit[:10]}" if results.commit else ""
    plural = "" if results.threads == 1 else "s"
    return f"{results.device}, {results.threads} thread{plural}, {results.machine}; {versions}{commit}; {results.made[:10]}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of the working tree that tracks this file, if one does; `+` where something was changed since."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=here.parent, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        return git("describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+")
    except (OSError, subprocess.CalledProcessError):
        return None


def _lines(path: str) -> Iterable[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return ()
