"""What every decoder offers to training and search, and the decoder without attention.

A decoder advances hypotheses: ``B`` sources with ``K`` hypotheses each, all over one attention memory per source. Training is the case
``K = 1`` with the true symbols, ``T`` of them, given. Widths: ``E`` embedding, ``H`` decoder state, ``M`` encoder state, ``V`` symbols.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from onepass.memory import AttentionMemory
from onepass.seq2seq.encoder import Encoded, recurrence


@dataclass(frozen=True)
class DecoderState:
    """What a decoder carries from a step to the next.

    Attributes: ``memory`` of the ``B`` sources (None without attention), their ``lengths [B]``, ``carried``: tensors ``[B, K, width]``
    that belong to hypotheses, ``position``: symbols read so far.
    """

    memory: AttentionMemory | None
    lengths: Tensor
    carried: tuple[Tensor, ...]
    position: int = 0

    def follow(self, parents: Tensor) -> "DecoderState":
        """The state of hypotheses that continue the hypotheses ``parents [B, K']`` of their source."""
        carried = (part.gather(1, parents[..., None].expand(-1, -1, part.shape[-1])) for part in self.carried)
        return replace(self, carried=tuple(carried))

    def select(self, rows: Tensor) -> "DecoderState":
        """The state of some of the sources, by index ``[N]``."""
        memory = None if self.memory is None else self.memory.select(rows)
        return replace(self, memory=memory, lengths=self.lengths[rows], carried=tuple(part[rows] for part in self.carried))

    def next(self, *carried: Tensor, steps: int = 1) -> "DecoderState":
        """The state after ``steps`` more symbols."""
        return replace(self, carried=carried, position=self.position + steps)


class Step(NamedTuple):
    """Features that predict the next symbol ``[B, K, ...]``, the state after it, and the weights ``[B, K, S]`` (None without attention)."""

    features: Tensor
    state: DecoderState
    weights: Tensor | None


class Decoder(nn.Module):
    """The interface: :meth:`start`, :meth:`step` and, for training, :meth:`forward`.

    A subclass says how it starts, how one step goes from embedded symbols to features (:meth:`_advance`), and how features become
    logits (:meth:`_predict`). Where no step waits for the attention of the one before it, it also says how all go at once
    (:meth:`_unroll`).
    """

    def __init__(self, num_symbols: int, embedding_dim: int, dropout: float) -> None:
        super().__init__()
        self.num_symbols = num_symbols
        self.embedding = nn.Embedding(num_symbols, embedding_dim, padding_idx=0)
        self.dropout = nn.Dropout(dropout)

    def start(self, encoded: Encoded) -> DecoderState:
        """The state before the first symbol, of one hypothesis (``K = 1``) per source."""
        raise NotImplementedError

    def step(self, symbols: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState, Tensor | None]:
        """Read one symbol per hypothesis, ``[B, K]``: logits ``[B, K, V]`` of the next, the state, weights ``[B, K, S]`` or None."""
        features, state, weights = self._advance(self._embed(symbols), state)
        return self._predict(features), state, weights

    def forward(self, encoded: Encoded, symbols: Tensor) -> tuple[Tensor, Tensor | None]:
        """Teacher forcing: read ``symbols [B, T]``; logits ``[B, T, V]`` of what follows each, weights ``[B, T, S]`` or None."""
        features, _, weights = self._unroll(self._embed(symbols), self.start(encoded))
        return self._predict(features), weights

    def _embed(self, symbols: Tensor) -> Tensor:
        embedded: Tensor = self.dropout(self.embedding(symbols))
        return embedded

    def _advance(self, embedded: Tensor, state: DecoderState) -> Step:
        """One step of every hypothesis, from what :meth:`_embed` made of its symbol, ``[B, K, ...]``."""
        raise NotImplementedError

    def _predict(self, features: Tensor) -> Tensor:
        raise NotImplementedError

    def _unroll(self, embedded: Tensor, state: DecoderState) -> Step:
        """All steps ``[B, T, ...]``, one after the other."""
        features, weights = [], []
        for one in torch.split(embedded, 1, dim=1):
            step = self._advance(one, state)
            state = step.state
            features.append(step.features)
            weights.append(step.weights)
        attended = [part for part in weights if part is not None]
        return Step(torch.cat(features, 1), state, torch.cat(attended, 1) if attended else None)


class Recurrence(nn.Module):
    """A GRU or LSTM whose state is kept as tensors ``[B, K, layers * H]``: hidden states and, of an LSTM, cells.

    The first state is ``tanh(W final)``, from the encoder's last states.
    """

    def __init__(self, input_dim: int, hidden_dim: int, final_dim: int, num_layers: int, cell: str, dropout: float) -> None:
        super().__init__()
        self.rnn = recurrence(input_dim, hidden_dim, num_layers, cell, dropout)
        self.parts = 2 if cell == "lstm" else 1
        self.bridge = nn.Linear(final_dim, self.parts * num_layers * hidden_dim)

    def start(self, final: Tensor) -> tuple[Tensor, ...]:
        return torch.tanh(self.bridge(final)).unsqueeze(1).chunk(self.parts, -1)

    def forward(self, inputs: Tensor, carried: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One step of ``K`` hypotheses, ``inputs [B, K, ...]``."""
        B, K = inputs.shape[:2]
        outputs, carried = self.unroll(inputs.reshape(B * K, 1, -1), tuple(part.reshape(B * K, 1, -1) for part in carried))
        return outputs.view(B, K, -1), tuple(part.reshape(B, K, -1) for part in carried)

    def unroll(self, inputs: Tensor, carried: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """``T`` steps of one hypothesis, ``inputs [B, T, ...]``."""
        alike = [part.to(inputs.dtype) for part in carried]  # dtypes differ under autocast
        layers = [part.view(len(part), self.rnn.num_layers, -1).transpose(0, 1).contiguous() for part in alike]
        outputs, last = self.rnn(inputs, tuple(layers) if self.parts == 2 else layers[0])
        after = last if self.parts == 2 else (last,)
        return outputs, tuple(part.transpose(0, 1).reshape(len(inputs), 1, -1) for part in after)


class PlainDecoder(Decoder):
    """The encoder-decoder without attention (Sutskever et al. 2014, arXiv:1409.3215): all that it knows of the source is its first state.

    ``h_t = f(E y_{t-1}, h_{t-1})``, ``h_0 = tanh(W final)``; logits ``W_s tanh(W_h h_t)``.

    Args:
        num_symbols, embedding_dim, hidden_dim: ``V``, ``E``, ``H``. encoder_dim: ``M``, width of ``Encoded.final``.
        num_layers, cell, dropout: as in :class:`onepass.seq2seq.Encoder`; features are dropped too.
    """

    def __init__(
        self,
        num_symbols: int,
        embedding_dim: int,
        hidden_dim: int,
        encoder_dim: int,
        *,
        num_layers: int = 1,
        cell: str = "gru",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(num_symbols, embedding_dim, dropout)
        self.recurrence = Recurrence(embedding_dim, hidden_dim, encoder_dim, num_layers, cell, dropout)
        self.combine = nn.Linear(hidden_dim, hidden_dim)
        self.output = nn.Linear(hidden_dim, num_symbols)

    def start(self, encoded: Encoded) -> DecoderState:
        return DecoderState(None, encoded.lengths, self.recurrence.start(encoded.final))

    def _advance(self, embedded: Tensor, state: DecoderState) -> Step:
        hidden, carried = self.recurrence(embedded, state.carried)
        return Step(torch.tanh(self.combine(hidden)), state.next(*carried), None)

    def _unroll(self, embedded: Tensor, state: DecoderState) -> Step:
        hidden, carried = self.recurrence.unroll(embedded, state.carried)
        return Step(torch.tanh(self.combine(hidden)), state.next(*carried, steps=embedded.shape[1]), None)

    def _predict(self, features: Tensor) -> Tensor:
        logits: Tensor = self.output(self.dropout(features))
        return logits
