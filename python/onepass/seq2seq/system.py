"""A model with its configuration and vocabularies: what is trained, kept in a file, and asked."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from onepass.seq2seq import cmudict
from onepass.seq2seq.bahdanau import BahdanauDecoder
from onepass.seq2seq.checkpoint import described_as, read_tensors, write_tensors
from onepass.seq2seq.config import Config, ModelConfig, SearchConfig, config_from_dict, config_to_dict
from onepass.seq2seq.data import DataError, Splits, Symbols, Vocabulary, pad, read_pairs
from onepass.seq2seq.decoder import Decoder, PlainDecoder
from onepass.seq2seq.encoder import Encoder
from onepass.seq2seq.luong import LuongDecoder
from onepass.seq2seq.model import Seq2Seq
from onepass.seq2seq.search import beam_search


@dataclass(frozen=True)
class Decoded:
    """A hypothesis in symbols. ``alignment``: weights ``[T, S]``, the end symbol's last, or None."""

    symbols: Symbols
    score: float
    log_probability: float
    ended: bool
    alignment: Tensor | None


@dataclass(frozen=True)
class System:
    """A model that knows its symbols."""

    config: Config
    source: Vocabulary
    target: Vocabulary
    model: Seq2Seq

    @classmethod
    def of(cls, config: Config, splits: Splits) -> "System":
        """An untrained one; the vocabularies are those of the training examples."""
        source = Vocabulary.of(example.source for example in splits.train)
        target = Vocabulary.of(reference for example in splits.train for reference in example.references)
        return cls(config, source, target, build_model(config.model, len(source), len(target)))

    def save(self, path: Path) -> None:
        """Weights, with the configuration and the vocabularies as metadata."""
        write_tensors(path, self.model.state_dict(), self.description())

    @classmethod
    def load(cls, path: Path) -> "System":
        """What :meth:`save` kept, ready to decode. DataError: as :func:`onepass.seq2seq.checkpoint.read_tensors`."""
        tensors, metadata = read_tensors(path)
        with described_as(path, "the model.safetensors of a run"):
            system = cls.described(metadata, path)
            system.model.load_state_dict(tensors)
        system.model.eval()
        return system

    def description(self) -> dict[str, Any]:
        return {"config": config_to_dict(self.config), "source": list(self.source.symbols), "target": list(self.target.symbols)}

    @classmethod
    def described(cls, metadata: dict[str, Any], path: Path) -> "System":
        """An untrained one like the one that :meth:`description` was taken of."""
        config = config_from_dict(metadata["config"], path.parent)
        source, target = Vocabulary(metadata["source"]), Vocabulary(metadata["target"])
        return cls(config, source, target, build_model(config.model, len(source), len(target)))

    def decode(
        self,
        sources: Sequence[Symbols],
        search: SearchConfig | None = None,
        *,
        n_best: int = 1,
        need_weights: bool = False,
        chunk: int = 256,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[Decoded]]:
        """The ``n_best`` hypotheses of every source, in the order given.

        ``search`` defaults to the configuration's. Sources of about one length are decoded together, ``chunk`` at a time; ``progress``
        hears how many are done. DataError: an empty source, a symbol that was not in the training examples.
        """
        search = self.config.search if search is None else search
        options = dataclasses.asdict(search) | {"max_length": search.max_length or None}
        numbers = [self.source.numbers(source) for source in sources]
        for place, source in enumerate(sources):
            if not source:
                raise DataError(f"source {place + 1} is empty")
        device = next(self.model.parameters()).device
        by_length = sorted(range(len(sources)), key=lambda i: len(sources[i]))
        found: dict[int, list[Decoded]] = {}
        self.model.eval()
        for start in range(0, len(by_length), chunk):
            rows = by_length[start : start + chunk]
            batch, lengths = pad([numbers[i] for i in rows])
            hypotheses = beam_search(self.model, batch.to(device), lengths.to(device), n_best=n_best, need_weights=need_weights, **options)
            for i, best in zip(rows, hypotheses, strict=True):
                found[i] = [
                    Decoded(self.target.sequence(one.symbols), one.score, one.log_probability, one.ended, one.alignment) for one in best
                ]
            if progress is not None:
                progress(len(found))
        return [found[i] for i in range(len(sources))]


def load_splits(config: Config) -> Splits:
    """The examples that a configuration names. DataError: as :func:`read_pairs` and :func:`onepass.seq2seq.cmudict.load`."""
    data = config.data
    if data.task == "cmudict":
        return cmudict.load(data.stress, config.seed, data.phrase_words)
    return Splits(*(read_pairs(path, data.source, data.target) for path in (data.train, data.validation, data.test)))


def build_model(config: ModelConfig, source_symbols: int, target_symbols: int) -> Seq2Seq:
    """The model that a configuration describes, with torch's random numbers for its first weights."""
    options: dict[str, Any] = {"num_layers": config.num_layers, "cell": config.cell, "dropout": config.dropout}
    encoder = Encoder(source_symbols, config.embedding_dim, config.encoder_dim, **options)
    widths = (target_symbols, config.embedding_dim, config.decoder_dim, encoder.output_dim)
    decoder: Decoder
    if config.decoder == "plain":
        decoder = PlainDecoder(*widths, **options)
    elif config.decoder == "bahdanau":
        maxout = config.maxout_dim or None
        decoder = BahdanauDecoder(*widths, config.attention_dim, maxout_dim=maxout, dropout=config.dropout)
    else:
        decoder = LuongDecoder(
            *widths,
            score=config.score,
            attention_dim=config.attention_dim if config.score == "concat" else None,
            window=config.window,
            half_width=config.half_width or None,
            input_feeding=config.input_feeding,
            **options,
        )
    return Seq2Seq(encoder, decoder)
