"""An encoder and a decoder, together."""

from torch import Tensor, nn

from onepass.seq2seq.decoder import Decoder
from onepass.seq2seq.encoder import Encoder


class Seq2Seq(nn.Module):
    """A whole sequence-to-sequence model; search takes it as it is (:func:`onepass.seq2seq.beam_search`)."""

    def __init__(self, encoder: Encoder, decoder: Decoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def forward(self, source: Tensor, lengths: Tensor, symbols: Tensor) -> tuple[Tensor, Tensor | None]:
        """Teacher forcing.

        Args:
            source: ``[B, S]``, int64, padded with 0. lengths: ``[B]``, at least 1.
            symbols: ``[B, T]``, int64: the true target, its beginning symbol first, its last symbol left out.

        Returns:
            Logits ``[B, T, V]`` of what follows each symbol, and the alignment ``[B, T, S]`` (None without attention).
        """
        logits, weights = self.decoder(self.encoder(source, lengths), symbols)
        return logits, weights
