"""Bahdanau's decoder: attend from the previous state, then make the new one.

Bahdanau, Cho and Bengio 2015 (arXiv:1409.0473). Equation numbers are the paper's; those of the appendix have none and are named by
section.
"""

import torch
from torch import Tensor, nn

from onepass.modules import AdditiveAttention
from onepass.seq2seq.decoder import Decoder, DecoderState, Step
from onepass.seq2seq.encoder import Encoded


class BahdanauDecoder(Decoder):
    """The decoder of *Neural machine translation by jointly learning to align and translate*. A step, from ``s_{i-1}`` and ``y_{i-1}``:

    1. scores ``e_ij = v . tanh(W_a s_{i-1} + U_a h_j)`` (A.1.2), weights ``a_ij = softmax_j`` (eq. 6), context
       ``c_i = sum_j a_ij h_j`` (eq. 5);
    2. gates ``z_i = sigma(W_z E y_{i-1} + U_z s_{i-1} + C_z c_i)``, ``r_i`` likewise, candidate
       ``s~_i = tanh(W E y_{i-1} + U (r_i s_{i-1}) + C c_i)``, state ``s_i = (1 - z_i) s_{i-1} + z_i s~_i`` (A.1.1, A.2.2);
    3. ``p(y_i) = g(y_{i-1}, s_i, c_i)`` (eq. 4): logits ``W_o t_i``, where ``t_i`` takes the larger of each pair of
       ``U_o s_i + V_o E y_{i-1} + C_o c_i`` (maxout, A.2.2; the appendix prints ``s_{i-1}`` there, section 3.1 has ``s_i``, as here).

    The first state is ``s_0 = tanh(W_s h<_1)``, from the leftward encoder state of the first symbol (A.2.2).

    Args:
        num_symbols, embedding_dim, hidden_dim: ``V``, ``E``, ``H``. encoder_dim: ``M``. attention_dim: ``A``.
        maxout_dim: width of ``t_i``; None: logits straight from ``[s_i; c_i; E y_{i-1}]``.
        dropout: probability with which embeddings, and what the output layer reads, are dropped in training.

    Parameters: ``attention`` (:class:`onepass.AdditiveAttention`: ``W_a`` is its ``query_layer``, ``U_a`` its ``key_layer``), ``bridge``
    (``W_s``), ``input_layer`` (``W_z, W_r, W``, one over the other, with the biases), ``context_layer`` (``C_z, C_r, C``), ``gate_layer``
    (``U_z, U_r``), ``candidate_layer`` (``U``), ``maxout`` (``[U_o, C_o, V_o]``), ``output`` (``W_o``).
    """

    def __init__(
        self,
        num_symbols: int,
        embedding_dim: int,
        hidden_dim: int,
        encoder_dim: int,
        attention_dim: int,
        *,
        maxout_dim: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(num_symbols, embedding_dim, dropout)
        self.attention = AdditiveAttention(hidden_dim, encoder_dim, attention_dim)
        self.bridge = nn.Linear(encoder_dim // 2, hidden_dim)
        self.input_layer = nn.Linear(embedding_dim, 3 * hidden_dim)
        self.context_layer = nn.Linear(encoder_dim, 3 * hidden_dim, bias=False)
        self.gate_layer = nn.Linear(hidden_dim, 2 * hidden_dim, bias=False)
        self.candidate_layer = nn.Linear(hidden_dim, hidden_dim, bias=False)
        for matrix in (*self.gate_layer.weight.data.chunk(2), self.candidate_layer.weight.data):
            nn.init.orthogonal_(matrix)  # B.1
        features = hidden_dim + encoder_dim + embedding_dim
        self.maxout = None if maxout_dim is None else nn.Linear(features, 2 * maxout_dim)
        self.output = nn.Linear(features if maxout_dim is None else maxout_dim, num_symbols)

    def start(self, encoded: Encoded) -> DecoderState:
        leftward = encoded.final.chunk(2, -1)[1]
        memory = self.attention.memory(encoded.states, lengths=encoded.lengths)
        return DecoderState(memory, encoded.lengths, (torch.tanh(self.bridge(leftward)).unsqueeze(1),))

    def _embed(self, symbols: Tensor) -> Tensor:
        """``E y`` beside ``W_z E y, W_r E y, W E y``: what of a step does not depend on the states, for all symbols at once."""
        embedded = super()._embed(symbols)
        return torch.cat((embedded, self.input_layer(embedded)), -1)

    def _advance(self, embedded: Tensor, state: DecoderState) -> Step:
        (previous,) = state.carried
        H = previous.shape[-1]
        embedded, inputs = torch.split(embedded, [embedded.shape[-1] - 3 * H, 3 * H], -1)
        context, weights = self.attention(previous, state.memory, need_weights=True)
        inputs = inputs + self.context_layer(context)
        update, reset = torch.sigmoid(inputs[..., : 2 * H] + self.gate_layer(previous)).chunk(2, -1)
        candidate = torch.tanh(inputs[..., 2 * H :] + self.candidate_layer(reset * previous))
        new = torch.lerp(previous.to(candidate.dtype), candidate, update)  # dtypes differ under autocast
        return Step(torch.cat((new, context, embedded), -1), state.next(new), weights)

    def _predict(self, features: Tensor) -> Tensor:
        features = self.dropout(features)
        if self.maxout is not None:
            pairs = self.maxout(features)
            features = pairs.view(*pairs.shape[:-1], -1, 2).amax(-1)
        logits: Tensor = self.output(features)
        return logits
