"""Symbol and sequence error rates against references of which each is right, over all examples and by length of the source."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from onepass.seq2seq.data import Example, Symbols


@dataclass(frozen=True)
class ErrorRates:
    """Counts: ``symbols`` and ``sequences`` in all, and how many of them are wrong. A rate of nothing is 0."""

    symbols: int
    symbol_errors: int
    sequences: int
    sequence_errors: int

    @property
    def symbol_error_rate(self) -> float:
        """Edits per symbol of the references; above 1 where predictions are far too long."""
        return self.symbol_errors / max(1, self.symbols)

    @property
    def sequence_error_rate(self) -> float:
        return self.sequence_errors / max(1, self.sequences)


def error_rates(examples: Sequence[Example], predictions: Sequence[Symbols]) -> ErrorRates:
    """A prediction is right if it hits any reference; its symbol errors are counted against the nearest one, of several the shortest.

    ValueError: not one prediction per example.
    """
    if len(examples) != len(predictions):
        raise ValueError(f"each example needs one prediction; got {len(examples)} examples and {len(predictions)} predictions")
    symbols = symbol_errors = sequence_errors = 0
    for example, predicted in zip(examples, predictions, strict=True):
        errors, length = min((edit_distance(predicted, reference), len(reference)) for reference in example.references)
        symbols += length
        symbol_errors += errors
        sequence_errors += errors > 0
    return ErrorRates(symbols, symbol_errors, len(examples), sequence_errors)


def error_by_length(examples: Sequence[Example], predictions: Sequence[Symbols], edges: Sequence[int]) -> list[tuple[str, ErrorRates]]:
    """The error rates of sources up to each edge and beyond the last: edges 10 and 20 give "1-10", "11-20" and "21+".

    A bin without examples is there too, with counts of 0. ValueError: edges that do not ascend from 1 or more.
    """
    if any(low >= high for low, high in zip([0, *edges], edges, strict=False)):
        raise ValueError(f"edges must ascend, the first at least 1; got {list(edges)}")
    if len(examples) != len(predictions):
        raise ValueError(f"each example needs one prediction; got {len(examples)} examples and {len(predictions)} predictions")
    bins: list[tuple[list[Example], list[Symbols]]] = [([], []) for _ in range(len(edges) + 1)]
    for example, predicted in zip(examples, predictions, strict=True):
        inside, said = bins[bisect_left(edges, len(example.source))]
        inside.append(example)
        said.append(predicted)
    firsts = [1, *(edge + 1 for edge in edges)]
    names = [str(low) if low == high else f"{low}-{high}" for low, high in zip(firsts, edges, strict=False)]
    return [(name, error_rates(*found)) for name, found in zip([*names, f"{firsts[-1]}+"], bins, strict=True)]


def edit_distance(predicted: Symbols, reference: Symbols) -> int:
    """The fewest substitutions, insertions and deletions between the two (Levenshtein 1966), one row of the table at a time."""
    if predicted == reference:
        return 0
    row = list(range(len(reference) + 1))
    for i, symbol in enumerate(predicted, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(reference, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (symbol != other))
    return row[-1]
