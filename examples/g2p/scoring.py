"""Phoneme and word error rates against a dictionary that allows several pronunciations."""

from collections.abc import Sequence
from dataclasses import dataclass

from data import Pronunciation, Word


@dataclass(frozen=True)
class ErrorRates:
    """Counts over held-out words: ``phonemes`` and ``words`` in all, and how many of them are wrong."""

    phonemes: int
    phoneme_errors: int
    words: int
    word_errors: int

    @property
    def phoneme_error_rate(self) -> float:
        return self.phoneme_errors / max(1, self.phonemes)

    @property
    def word_error_rate(self) -> float:
        return self.word_errors / max(1, self.words)


def error_rates(words: Sequence[Word], predictions: Sequence[Pronunciation]) -> ErrorRates:
    """A word is right if any pronunciation of the dictionary is hit; its phoneme errors are counted against the nearest one."""
    phonemes = phoneme_errors = word_errors = 0
    for word, predicted in zip(words, predictions, strict=True):
        errors, length = min((edit_distance(predicted, said), len(said)) for said in word.pronunciations)
        phonemes += length
        phoneme_errors += errors
        word_errors += errors > 0
    return ErrorRates(phonemes, phoneme_errors, len(words), word_errors)


def edit_distance(predicted: Pronunciation, said: Pronunciation) -> int:
    """The fewest substitutions, insertions and deletions between the two (Levenshtein 1966), one row of the table at a time."""
    row = list(range(len(said) + 1))
    for i, phoneme in enumerate(predicted, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(said, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (phoneme != other))
    return row[-1]
