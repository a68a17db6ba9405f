"""The papers' equations in plain torch, a position and a step at a time: what encoder and decoders are checked against.

Every function reads the weights out of the module's parameters, so that autograd through it gives the gradients to compare with. Nothing
of onepass computes here.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Cell = Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]


def linear(layer: Any, x: Tensor) -> Tensor:
    product = x @ layer.weight.T
    return product if layer.bias is None else product + layer.bias


def cell_of(rnn: nn.Module, layer: int, suffix: str = "") -> Cell:
    """One step of one layer of torch's GRU or LSTM, by the equations of their documentation; the first of its states is its output."""
    w_in, w_state, b_in, b_state = (getattr(rnn, f"{name}_l{layer}{suffix}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))

    def gru(x: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (h,) = states
        from_x, from_h = (x @ w_in.T + b_in).chunk(3, -1), (h @ w_state.T + b_state).chunk(3, -1)
        r, z = torch.sigmoid(from_x[0] + from_h[0]), torch.sigmoid(from_x[1] + from_h[1])
        return ((1 - z) * torch.tanh(from_x[2] + r * from_h[2]) + z * h,)

    def lstm(x: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        h, c = states
        i, f, g, o = (x @ w_in.T + b_in + h @ w_state.T + b_state).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c

    return gru if isinstance(rnn, nn.GRU) else lstm


def encode(encoder: Any, source: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """``(states, final)``, of every source by itself, without its padding."""
    rnn = encoder.rnn
    states, finals = [], []
    for row, length in zip(source.tolist(), lengths.tolist(), strict=True):
        below = [encoder.embedding.weight[symbol] for symbol in row[:length]]
        for layer in range(rnn.num_layers):
            zero = below[0].new_zeros(rnn.hidden_size)
            ways = []
            for suffix, inputs in (("", below), ("_reverse", below[::-1])):
                cell, state, outputs = cell_of(rnn, layer, suffix), (zero,) if isinstance(rnn, nn.GRU) else (zero, zero), []
                for x in inputs:
                    state = cell(x, state)
                    outputs.append(state[0])
                ways.append(outputs)
            rightward, leftward = ways[0], ways[1][::-1]
            below = [torch.cat(pair) for pair in zip(rightward, leftward, strict=True)]
        finals.append(torch.cat([rightward[-1], leftward[0]]))
        padding = below[0].new_zeros(source.shape[1] - length, below[0].shape[0])
        states.append(torch.cat([torch.stack(below), padding]))
    return torch.stack(states), torch.stack(finals)


def attend(scores: Tensor, states: Tensor, visible: Tensor, nudge: float, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Softmax over the visible positions (times ``factor``) and the context; ``nudge`` moves every score that far, up or down."""
    if nudge:
        scores = scores + nudge * (torch.randint(0, 2, scores.shape) * 2 - 1)
    top = scores.detach().masked_fill(~visible, -torch.inf).amax(-1, keepdim=True)
    shares = torch.where(visible, (scores - top).exp(), 0.0)
    weights = shares / shares.sum(-1, keepdim=True)
    if factor is not None:
        weights = torch.where(visible, weights * factor, 0.0)
    return (weights.unsqueeze(-1) * states).sum(1), weights


class Recurrence:
    """The stacked recurrence of plain and Luong decoders: its first states from the encoder, and one step."""

    def __init__(self, recurrence: Any, final: Tensor) -> None:
        rnn = recurrence.rnn
        self.cells = [cell_of(rnn, layer) for layer in range(rnn.num_layers)]
        kinds = 1 if isinstance(rnn, nn.GRU) else 2
        first = torch.tanh(linear(recurrence.bridge, final)).chunk(kinds * rnn.num_layers, -1)
        self.states = [tuple(first[kind * rnn.num_layers + layer] for kind in range(kinds)) for layer in range(rnn.num_layers)]

    def step(self, x: Tensor) -> Tensor:
        for layer, cell in enumerate(self.cells):
            self.states[layer] = cell(x, self.states[layer])
            x = self.states[layer][0]
        return x


def plain(decoder: Any, encoded: Any, symbols: Tensor) -> tuple[Tensor, None]:
    recurrence = Recurrence(decoder.recurrence, encoded.final)
    logits = []
    for t in range(symbols.shape[1]):
        h = recurrence.step(decoder.embedding.weight[symbols[:, t]])
        logits.append(linear(decoder.output, torch.tanh(linear(decoder.combine, h))))
    return torch.stack(logits, 1), None


def bahdanau(decoder: Any, encoded: Any, symbols: Tensor, nudge: float = 0.0) -> tuple[Tensor, Tensor]:
    """Bahdanau et al. 2015, appendix A, with ``s_i`` in the deep output."""
    states, half = encoded.states, encoded.states.shape[-1] // 2
    visible = torch.arange(states.shape[1]) < encoded.lengths[:, None]
    v = decoder.attention.v
    keys = linear(decoder.attention.key_layer, states)
    s = torch.tanh(linear(decoder.bridge, encoded.final[:, half:]))
    logits, rows = [], []
    for i in range(symbols.shape[1]):
        y = decoder.embedding.weight[symbols[:, i]]
        scores = torch.tanh(linear(decoder.attention.query_layer, s)[:, None] + keys) @ v
        c, weights = attend(scores, states, visible, nudge * float(v.detach().abs().sum()))
        from_y, from_c, from_s = linear(decoder.input_layer, y), linear(decoder.context_layer, c), linear(decoder.gate_layer, s)
        width = s.shape[-1]
        z = torch.sigmoid((from_y + from_c)[:, :width] + from_s[:, :width])
        r = torch.sigmoid((from_y + from_c)[:, width : 2 * width] + from_s[:, width:])
        candidate = torch.tanh((from_y + from_c)[:, 2 * width :] + linear(decoder.candidate_layer, r * s))
        s = (1 - z) * s + z * candidate
        t = torch.cat([s, c, y], -1)
        if decoder.maxout is not None:
            wide = linear(decoder.maxout, t)
            t = torch.maximum(wide[:, 0::2], wide[:, 1::2])
        logits.append(linear(decoder.output, t))
        rows.append(weights)
    return torch.stack(logits, 1), torch.stack(rows, 1)


def luong_window(decoder: Any, window: str, half_width: int | None, h: Tensor, lengths: Tensor, source: int, t: int) -> tuple[Tensor, Any]:
    """What a step sees of the source, and for local-p the Gaussian."""
    places = torch.arange(source)
    visible = places < lengths[:, None]
    if window == "global":
        return visible, None
    assert half_width is not None
    if window == "local-m":
        centre = torch.minimum(torch.full_like(lengths, t), lengths - 1).to(h.dtype)
    else:
        v = decoder.position_v.weight[0] if isinstance(decoder.position_v, nn.Module) else decoder.position_v
        centre = lengths * torch.sigmoid(torch.tanh(h @ decoder.position_layer.weight.T) @ v)
    away = places.to(h.dtype) - centre[:, None]
    visible = visible & (away.detach().abs() <= half_width)
    return visible, None if window == "local-m" else torch.exp(-away.square() / (2 * (half_width / 2) ** 2))


def luong(
    decoder: Any,
    encoded: Any,
    symbols: Tensor,
    nudge: float = 0.0,
    *,
    score: str,
    window: str = "global",
    half_width: int | None = None,
    input_feeding: bool = True,
) -> tuple[Tensor, Tensor]:
    """Luong et al. 2015, section 3, with positions and steps from 0."""
    states, attention = encoded.states, decoder.attention
    recurrence = Recurrence(decoder.recurrence, encoded.final)
    attentional = states.new_zeros(symbols.shape[0], decoder.combine.weight.shape[0])
    logits, rows = [], []
    for t in range(symbols.shape[1]):
        x = decoder.embedding.weight[symbols[:, t]]
        h = recurrence.step(torch.cat([x, attentional], -1) if input_feeding else x)
        if score == "concat":
            scores = torch.tanh(linear(attention.query_layer, h)[:, None] + linear(attention.key_layer, states)) @ attention.v
            size = float(attention.v.detach().abs().sum())
        else:
            query = linear(attention.query_layer, h) if score == "general" else h
            scores = (query[:, None] * states).sum(-1)
            size = float((query[:, None] * states).detach().abs().sum(-1).max())
        visible, gaussian = luong_window(decoder, window, half_width, h, encoded.lengths, states.shape[1], t)
        c, weights = attend(scores, states, visible, nudge * size, gaussian)
        attentional = torch.tanh(linear(decoder.combine, torch.cat([c, h], -1)))
        logits.append(linear(decoder.output, attentional))
        rows.append(weights)
    return torch.stack(logits, 1), torch.stack(rows, 1)
