"""Luong's decoder: make the new state, then attend from it.

Luong, Pham and Manning 2015 (arXiv:1508.04025). Equation numbers are the paper's.
"""

import torch
from torch import Tensor, nn

from onepass.memory import AttentionMemory
from onepass.modules import AdditiveAttention, MultiplicativeAttention
from onepass.seq2seq.decoder import Decoder, DecoderState, Recurrence, Step
from onepass.seq2seq.encoder import Encoded


class LuongDecoder(Decoder):
    """The decoder of *Effective approaches to attention-based neural machine translation*. A step, from ``h_{t-1}`` and ``y_{t-1}``:

    1. state ``h_t = f([E y_{t-1}; h~_{t-1}], h_{t-1})``; with input feeding (section 3.3) the input holds the last attentional state
       ``h~_{t-1}``, at first zeros;
    2. scores over the encoder states (eq. 8), *dot* ``h_t . m_s``, *general* ``h_t . W_a m_s`` or *concat* ``v . tanh(W_a [h_t; m_s])``,
       their softmax (eq. 7), context ``c_t``;
    3. attentional state ``h~_t = tanh(W_c [c_t; h_t])`` (eq. 5), logits ``W_s h~_t`` (eq. 6).

    Local attention (section 3.2) looks at the window ``[p_t - D, p_t + D]`` of the source only: *local-m* has ``p_t = t``, *local-p*
    predicts ``p_t = S sigmoid(v_p . tanh(W_p h_t))`` (eq. 9) and multiplies the weights by ``exp(-(s - p_t)^2 / (2 sigma^2))`` with
    ``sigma = D / 2`` (eq. 10). Positions ``s`` and steps ``t`` count from 0, ``S`` is the source's length, and local-m stays at the last
    position once ``t`` is past it.

    Without input feeding no state waits for a context, and training computes all steps in one call.

    Args:
        num_symbols, embedding_dim, hidden_dim: ``V``, ``E``, ``H``. encoder_dim: ``M``; the score *dot* needs ``H = M``.
        score: ``"dot"``, ``"general"`` or ``"concat"``. attention_dim: ``A``, of *concat* alone (default ``H``).
        window: ``"global"``, ``"local-m"`` or ``"local-p"``. half_width: ``D``, at least 1, of local attention alone.
        input_feeding, num_layers, cell: as above. dropout: of embeddings, between layers, and of attentional states before the output.

    Parameters: ``attention`` (a layer of :mod:`onepass`), ``recurrence``, ``combine`` (``W_c``), ``output`` (``W_s``), for local-p
    ``position_layer`` (``W_p``) and ``position_v`` (``v_p``), both without bias.
    """

    def __init__(
        self,
        num_symbols: int,
        embedding_dim: int,
        hidden_dim: int,
        encoder_dim: int,
        *,
        score: str = "general",
        attention_dim: int | None = None,
        window: str = "global",
        half_width: int | None = None,
        input_feeding: bool = True,
        num_layers: int = 1,
        cell: str = "gru",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(num_symbols, embedding_dim, dropout)
        if score not in ("dot", "general", "concat"):
            raise ValueError(f"score must be 'dot', 'general' or 'concat'; got {score!r}")
        if window not in ("global", "local-m", "local-p"):
            raise ValueError(f"window must be 'global', 'local-m' or 'local-p'; got {window!r}")
        if (window == "global") != (half_width is None) or (half_width is not None and half_width < 1):
            raise ValueError(f"half_width belongs to local attention, and is then at least 1; got {half_width} with window={window!r}")
        if attention_dim is not None and score != "concat":
            raise ValueError(f"attention_dim belongs to score='concat'; got {attention_dim} with score={score!r}")
        self.window, self.half_width, self.input_feeding = window, half_width or 0, input_feeding
        self.attention: AdditiveAttention | MultiplicativeAttention
        if score == "concat":
            self.attention = AdditiveAttention(hidden_dim, encoder_dim, attention_dim or hidden_dim)
        else:
            self.attention = MultiplicativeAttention(hidden_dim, encoder_dim, score)
        fed = hidden_dim if input_feeding else 0
        self.recurrence = Recurrence(embedding_dim + fed, hidden_dim, encoder_dim, num_layers, cell, dropout)
        self.combine = nn.Linear(encoder_dim + hidden_dim, hidden_dim)
        self.output = nn.Linear(hidden_dim, num_symbols)
        predicts = window == "local-p"
        self.position_layer = nn.Linear(hidden_dim, hidden_dim, bias=False) if predicts else None
        self.position_v = nn.Linear(hidden_dim, 1, bias=False) if predicts else None

    def start(self, encoded: Encoded) -> DecoderState:
        carried = self.recurrence.start(encoded.final)
        if self.input_feeding:
            carried = (*carried, encoded.states.new_zeros(len(encoded.lengths), 1, self.combine.out_features))
        return DecoderState(self.attention.memory(encoded.states, lengths=encoded.lengths), encoded.lengths, carried)

    def _advance(self, embedded: Tensor, state: DecoderState) -> Step:
        if not self.input_feeding:
            hidden, carried = self.recurrence(embedded, state.carried)
            attentional, weights = self._attend(hidden, state, torch.full_like(hidden[..., 0], state.position, dtype=torch.int64))
            return Step(attentional, state.next(*carried), weights)
        *carried_before, fed = state.carried
        hidden, carried = self.recurrence(torch.cat((embedded, fed), -1), tuple(carried_before))
        attentional, weights = self._attend(hidden, state, torch.full_like(hidden[..., 0], state.position, dtype=torch.int64))
        return Step(attentional, state.next(*carried, attentional), weights)

    def _unroll(self, embedded: Tensor, state: DecoderState) -> Step:
        if self.input_feeding:
            return super()._unroll(embedded, state)
        hidden, carried = self.recurrence.unroll(embedded, state.carried)
        steps = torch.arange(embedded.shape[1], device=embedded.device) + state.position
        attentional, weights = self._attend(hidden, state, steps.expand(hidden.shape[:2]))
        return Step(attentional, state.next(*carried, steps=embedded.shape[1]), weights)

    def _predict(self, features: Tensor) -> Tensor:
        logits: Tensor = self.output(self.dropout(features))
        return logits

    def _attend(self, hidden: Tensor, state: DecoderState, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Attentional states and weights of ``hidden [B, N, H]``, N hypotheses or N steps, ``steps [B, N]`` being their ``t``."""
        memory = state.memory
        assert memory is not None
        if self.window == "global":
            context, weights = self.attention(hidden, memory, need_weights=True)
        else:
            context, weights = self._attend_locally(hidden, memory, self._centres(hidden, state.lengths, steps), state.lengths)
        return torch.tanh(self.combine(torch.cat((context, hidden), -1))), weights

    def _centres(self, hidden: Tensor, lengths: Tensor, steps: Tensor) -> Tensor:
        """``p_t``, ``[B, N]``."""
        if self.position_layer is None or self.position_v is None:
            return torch.minimum(steps, (lengths - 1).unsqueeze(-1))
        logits = self.position_v(torch.tanh(self.position_layer(hidden))).squeeze(-1)
        wide = torch.promote_types(logits.dtype, torch.float32)  # bfloat16 has 8 bits for a position
        return torch.sigmoid(logits.to(wide)) * lengths.unsqueeze(-1)

    def _attend_locally(self, hidden: Tensor, memory: AttentionMemory, centres: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        D = self.half_width
        first = torch.ceil(centres.detach() - D).long().clamp_min(0)
        last = torch.minimum(torch.floor(centres.detach() + D).long() + 1, lengths.unsqueeze(-1))
        spans = torch.stack((first, last), -1)
        context, weights = self.attention(hidden, memory, spans=spans, need_weights=True)
        if self.window == "local-p":
            distance = torch.arange(weights.shape[-1], device=weights.device) - centres.unsqueeze(-1)
            weights = weights * torch.exp(-2.0 * (distance / D).square()).to(weights.dtype)  # sigma = D / 2
            context = memory.context(weights.to(memory.keys.dtype), spans=spans)
        return context, weights
