"""The network: a bidirectional GRU encoder and a GRU decoder that attends with :class:`onepass.AdditiveAttention`.

Shapes: ``B`` words, ``S`` letters, ``T`` phonemes, ``K`` beams, ``H`` decoder width, ``M`` memory width (both directions of the
encoder).
"""

from dataclasses import dataclass

import torch
from data import PAD, Batch
from torch import Tensor, nn

from onepass import AdditiveAttention, AttentionMemory


@dataclass(frozen=True)
class Sizes:
    """The widths of the network."""

    embedding: int = 64
    encoder: int = 192
    decoder: int = 256
    attention: int = 128


class Speaker(nn.Module):
    """Letters in, phonemes out.

    The order is Luong's (arXiv:1508.04025, section 3): the decoder state ``h_t`` is the query, the context ``c_t`` comes from it,
    and ``h~_t = tanh(W [c_t; h_t])`` predicts the phoneme. No state depends on a context, so in training all ``T`` queries of a
    batch go through one attention call. In the search they come one by one, all hypotheses of a word over its one attention memory.
    Score and first decoder state are Bahdanau's (arXiv:1409.0473, appendices A.1.2, A.2.2).
    """

    def __init__(self, letters: int, phonemes: int, sizes: Sizes) -> None:
        super().__init__()
        memory = 2 * sizes.encoder
        self.letter_embedding = nn.Embedding(letters, sizes.embedding, padding_idx=PAD)
        self.phoneme_embedding = nn.Embedding(phonemes, sizes.embedding, padding_idx=PAD)
        self.encoder = nn.GRU(sizes.embedding, sizes.encoder, batch_first=True)
        self.backward_encoder = nn.GRU(sizes.embedding, sizes.encoder, batch_first=True)
        self.bridge = nn.Linear(sizes.encoder, sizes.decoder)
        self.decoder = nn.GRU(sizes.embedding, sizes.decoder, batch_first=True)
        self.attention = AdditiveAttention(sizes.decoder, memory, sizes.attention)
        self.combine = nn.Linear(memory + sizes.decoder, sizes.decoder)
        self.output = nn.Linear(sizes.decoder, phonemes)

    def forward(self, batch: Batch, need_weights: bool = False) -> tuple[Tensor, Tensor | None]:
        """Teacher forcing: the logits ``[B, T, phonemes]`` after each of the true phonemes, and the alignment ``[B, T, S]``."""
        memory, state = self.encode(batch.letters, batch.lengths)
        queries, _ = self.advance(batch.phonemes[:, :-1], state)
        return self.predict(queries, memory, need_weights)

    def encode(self, letters: Tensor, lengths: Tensor) -> tuple[AttentionMemory, Tensor]:
        """The attention memory of the letters ``[B, S]``, projected once, and the decoder's first state ``[1, B, H]``."""
        # The backward direction is a GRU of its own over the words turned round, so that it starts at a letter and never in the padding.
        # A packed sequence would do as well, but made forward and backward of the encoder a third slower on a CPU.
        turn = (lengths[:, None] - 1 - torch.arange(letters.shape[1], device=letters.device)) % letters.shape[1]
        rightward, _ = self.encoder(self.letter_embedding(letters))
        leftward, _ = self.backward_encoder(self.letter_embedding(letters.gather(1, turn)))
        leftward = leftward.gather(1, turn[..., None].expand_as(leftward))
        state = torch.tanh(self.bridge(leftward[:, 0]))
        return self.attention.memory(torch.cat((rightward, leftward), -1), lengths=lengths), state.unsqueeze(0)

    def advance(self, phonemes: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """The decoder states ``[B, T, H]`` after each of the phonemes ``[B, T]``, and the last one ``[1, B, H]``."""
        queries, state = self.decoder(self.phoneme_embedding(phonemes), state)
        return queries, state

    def predict(self, queries: Tensor, memory: AttentionMemory, need_weights: bool = False) -> tuple[Tensor, Tensor | None]:
        """The logits ``[B, T, phonemes]`` of what follows each decoder state, and the alignment ``[B, T, S]``.

        The states may be the steps of one word (``T``) or hypotheses about it (``K``): to the attention both are queries.
        """
        context, alignment = self.attention(queries, memory, need_weights=need_weights)
        attentional = torch.tanh(self.combine(torch.cat((context, queries), -1)))
        return self.output(attentional), alignment
