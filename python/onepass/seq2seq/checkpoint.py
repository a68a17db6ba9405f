"""Files of tensors that are whole or not there: safetensors, written beside the old file and then put in its place."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from onepass.seq2seq.data import DataError

FORMAT = 1  # of the metadata; to be raised when an older reader would misread it


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Replace ``path`` at once: whoever reads it, even after a power cut, finds the old file or the new one."""
    text = {"onepass": json.dumps({"format": FORMAT, **metadata})}
    write_bytes(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, text))


def write_bytes(path: Path, content: bytes) -> None:
    """As :func:`write_tensors`, of any content."""
    beside = path.with_name(f"{path.name}.part")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    if os.name == "posix":  # the rename itself must be on the disk
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the metadata. DataError: no such file, not safetensors, not written by onepass, or by a later version of it."""
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("onepass")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: not a safetensors file that can be read: {error}") from None
    if text is None:
        raise DataError(f"{path}: these tensors were not written by onepass: the metadata lack their description")
    try:
        metadata = dict(json.loads(text))
    except (TypeError, ValueError):
        metadata = {}
    if metadata.pop("format", None) != FORMAT:
        raise DataError(f"{path}: written by a version of onepass with another format than {FORMAT}")
    return tensors, metadata


@contextmanager
def described_as(path: Path, kind: str) -> Iterator[None]:
    """Where tensors and metadata are put to use: what does not fit is a DataError that names the file and the kind it should be."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{path} is not {kind} of this version of onepass: {str(error).splitlines()[0]}") from error
