"""Sequences of symbols as numbers: examples, vocabularies, ragged storage, batches of about one length, files of pairs."""

import hashlib
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from typing import Literal

import torch
from torch import Tensor

PAD, BOS, EOS = 0, 1, 2
SPECIAL = ("<pad>", "<bos>", "<eos>")

Symbols = tuple[str, ...]
Unit = Literal["characters", "words"]


class DataError(ValueError):
    """Something that was given is wrong; the message says what and where, and a traceback would add nothing."""


@dataclass(frozen=True)
class Example:
    """A source and at least one reference. Of several references each is right. DataError: an empty source, no reference."""

    source: Symbols
    references: tuple[Symbols, ...]

    def __post_init__(self) -> None:
        if not self.source:
            raise DataError("an example needs a source of at least one symbol; got an empty one")
        if not self.references:
            raise DataError(f"an example needs at least one reference; {_shown(self.source)} has none")


@dataclass(frozen=True)
class Splits:
    """Examples for training, for a glance at progress, and for the final figures."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]


@contextmanager
def naming(place: object) -> Iterator[None]:
    """Puts where it came from, a file or a split, before what a DataError says."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{place}: {error}") from None


class Vocabulary:
    """Numbers for symbols: PAD, BOS and EOS are 0, 1 and 2, then come the symbols in alphabetical order.

    ``symbols`` may repeat themselves, and may hold the three special names: ``Vocabulary(vocabulary.symbols)`` is the same again.
    """

    symbols: tuple[str, ...]

    def __init__(self, symbols: Iterable[str]) -> None:
        self.symbols = (*SPECIAL, *sorted(set(symbols).difference(SPECIAL)))
        self._number = {symbol: number for number, symbol in enumerate(self.symbols) if number >= len(SPECIAL)}

    @classmethod
    def of(cls, sequences: Iterable[Symbols]) -> "Vocabulary":
        """The vocabulary of everything in the sequences. DataError: a sequence that holds the name of a special symbol."""
        found = {symbol for sequence in sequences for symbol in sequence}
        if taken := found.intersection(SPECIAL):
            raise DataError(f"the symbols {', '.join(SPECIAL)} have a meaning of their own; rename {min(taken)!r} in the data")
        return cls(found)

    def __len__(self) -> int:
        return len(self.symbols)

    def numbers(self, sequence: Symbols) -> list[int]:
        """The numbers of the symbols, without BOS and EOS. DataError: a symbol that is not known, or one of the special names."""
        try:
            return [self._number[symbol] for symbol in sequence]
        except KeyError as missing:
            known = list(self._number)
            more = f", ... ({len(known)} in all)" if len(known) > 20 else ""
            raise DataError(
                f"unknown symbol {missing.args[0]!r} in {_shown(sequence)}; known are {', '.join(map(repr, known[:20])) or 'none'}{more}"
            ) from None

    def sequence(self, numbers: Iterable[int]) -> Symbols:
        """The symbols of the numbers up to the first EOS, without PAD and BOS. DataError: a number that no symbol has."""
        found = []
        for number in numbers:
            if number == EOS:
                break
            if not 0 <= number < len(self.symbols):
                raise DataError(f"symbols have the numbers 0 to {len(self.symbols) - 1}; got {number}")
            if number not in (PAD, BOS):
                found.append(self.symbols[number])
        return tuple(found)


@dataclass(frozen=True)
class Batch:
    """Pairs of a source and one of its references; int64, padded with PAD.

    source ``[B, S]``; lengths ``[B]``, symbols of each source; target ``[B, T + 1]``, from BOS to EOS; target_lengths ``[B]``, symbols
    to predict: those of the reference and EOS, at most ``T``.
    """

    source: Tensor
    lengths: Tensor
    target: Tensor
    target_lengths: Tensor

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(self.source.to(device), self.lengths.to(device), self.target.to(device), self.target_lengths.to(device))


class Pairs:
    """Every (source, reference) of the examples, in their order, and batches of them.

    Kept ragged, a source once for all its references: one long line costs its own length, not that of a padded table.
    DataError: a symbol that a vocabulary lacks.

    lengths, target_lengths ``[N]``: as in :class:`Batch`.
    """

    lengths: Tensor
    target_lengths: Tensor

    def __init__(self, examples: Iterable[Example], source_vocabulary: Vocabulary, target_vocabulary: Vocabulary) -> None:
        sources, targets = array("q"), array("q")
        source_starts, lengths, target_starts, target_lengths = array("q"), array("q"), array("q"), array("q")
        for example in examples:
            start = len(sources)
            sources.extend(source_vocabulary.numbers(example.source))
            for reference in example.references:
                source_starts.append(start)
                lengths.append(len(example.source))
                target_starts.append(len(targets))
                target_lengths.append(len(reference) + 1)
                targets.extend((BOS, *target_vocabulary.numbers(reference), EOS))
        self._sources, self._source_starts, self.lengths = _tensor(sources), _tensor(source_starts), _tensor(lengths)
        self._targets, self._target_starts, self.target_lengths = _tensor(targets), _tensor(target_starts), _tensor(target_lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def epoch(self, size: int, seed: int, epoch: int, pool: int = 64) -> list[Tensor]:
        """The rows of every batch of an epoch, each pair once: int64 ``[size]``, fewer in the last batch of a pool.

        They depend on the pairs and these arguments alone, so that a resumed run goes on as if it had not stopped. The pairs are
        shuffled, sorted by (source length, target length) inside pools of ``pool`` batches and cut; then the batches are shuffled.
        """
        if size < 1 or pool < 1:
            raise ValueError(f"size and pool must be at least 1; got {size} and {pool}")
        # Not seed + epoch: seed 0 would go through the orders of seed 1, one epoch later.
        digest = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
        if not len(self):
            return []
        key = self.lengths * (int(self.target_lengths.max()) + 1) + self.target_lengths
        cut: list[Tensor] = []
        for rows in torch.split(torch.randperm(len(self), generator=generator), pool * size):
            cut += torch.split(rows[key[rows].argsort(stable=True)], size)
        return [cut[i] for i in torch.randperm(len(cut), generator=generator).tolist()]

    def batch(self, rows: Tensor) -> Batch:
        """The pairs of the rows, int64 ``[B]``, padded to the longest of them. ValueError: no row."""
        if not len(rows):
            raise ValueError("a batch needs at least one row; got none")
        lengths, target_lengths = self.lengths[rows], self.target_lengths[rows]
        source = _gather(self._sources, self._source_starts[rows], lengths)
        return Batch(source, lengths, _gather(self._targets, self._target_starts[rows], target_lengths + 1), target_lengths)


def pad(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """The sequences filled up with PAD, ``[B, S]``, and their lengths ``[B]``; both int64."""
    width = max(map(len, sequences), default=0)
    rows = [[*sequence, *[PAD] * (width - len(sequence))] for sequence in sequences]
    lengths = [len(sequence) for sequence in sequences]
    return torch.tensor(rows, dtype=torch.int64).view(len(rows), width), torch.tensor(lengths, dtype=torch.int64)


def split_symbols(text: str, unit: Unit) -> Symbols:
    """The ``"characters"`` of the text, or its ``"words"``: what white space separates. Equal symbols are one object."""
    if unit not in ("characters", "words"):
        raise ValueError(f"a text is cut into 'characters' or 'words'; got {unit!r}")
    return tuple(map(sys.intern, text if unit == "characters" else text.split()))


def read_pairs(path: str | PathLike[str], source: Unit = "characters", target: Unit = "characters") -> list[Example]:
    """The examples of a UTF-8 file with a pair per line: the source, a tab, the target.

    Lines with the same source become one example, its references in the order of the file and without duplicates. Empty lines are
    skipped. DataError, with the path and the number of the line: not one tab, a side of nothing but white space, bytes that are not
    UTF-8; with the path: a file that is missing, cannot be read or holds no pair.
    """
    found: dict[Symbols, dict[Symbols, None]] = {}
    for place, line in _lines(path):
        sides = line.split("\t")
        if len(sides) != 2:
            raise DataError(f"{place}: a line is a source, one tab and a target; got {len(sides) - 1} tabs in {_cut(line)!r}")
        for name, side in zip(("source", "target"), sides, strict=True):
            if not side.strip():
                raise DataError(f"{place}: the {name} is empty in {_cut(line)!r}")
        found.setdefault(split_symbols(sides[0], source), {})[split_symbols(sides[1], target)] = None
    if not found:
        raise DataError(f"{path}: the file is empty; it needs at least one line with a source, a tab and a target")
    return [Example(symbols, tuple(references)) for symbols, references in found.items()]


def _lines(path: str | PathLike[str]) -> Iterator[tuple[str, str]]:
    """``path:number`` and text of every line that is not empty; only a line feed, or both of CR LF, ends one."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8").removesuffix("\n").removesuffix("\r")
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{path}:{number}: not UTF-8 at byte {error.start + 1} of the line ({error.reason}); convert the file to UTF-8"
                    ) from None
                if text.strip() or "\t" in text:
                    yield f"{path}:{number}", text
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _tensor(numbers: "array[int]") -> Tensor:
    return torch.frombuffer(numbers, dtype=torch.int64) if numbers else torch.empty(0, dtype=torch.int64)


def _gather(flat: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
    """``flat[start : start + length]`` of every row, padded: ``[B, max(lengths)]``."""
    positions = torch.arange(int(lengths.max()))
    there = positions < lengths[:, None]
    return torch.where(there, flat[torch.where(there, starts[:, None] + positions, 0)], PAD)


def _shown(sequence: Symbols) -> str:
    """A sequence as in a message: put together if it is of characters, and cut if it is long."""
    return f'"{_cut(("" if all(len(symbol) == 1 for symbol in sequence) else " ").join(sequence))}"'


def _cut(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
