"""Whole sequence-to-sequence systems: encoder, decoders, search, training."""

from onepass.seq2seq.bahdanau import BahdanauDecoder
from onepass.seq2seq.data import BOS, EOS, PAD
from onepass.seq2seq.decoder import Decoder, DecoderState, PlainDecoder
from onepass.seq2seq.encoder import Encoded, Encoder
from onepass.seq2seq.luong import LuongDecoder
from onepass.seq2seq.model import Seq2Seq
from onepass.seq2seq.search import Hypothesis, beam_search, greedy_search

__all__ = [
    "BOS",
    "EOS",
    "PAD",
    "BahdanauDecoder",
    "Decoder",
    "DecoderState",
    "Encoded",
    "Encoder",
    "Hypothesis",
    "LuongDecoder",
    "PlainDecoder",
    "Seq2Seq",
    "beam_search",
    "greedy_search",
]
