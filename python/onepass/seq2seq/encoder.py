"""The encoder: a bidirectional recurrent network over the source.

Shapes: ``B`` sources, ``S`` source positions, ``M`` width of an encoder state (both directions).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


def _dtypes_without_lstm() -> tuple[torch.dtype, ...]:
    """Those of which oneDNN has no LSTM on this CPU: of bfloat16 where there is no AVX-512, of float16 at best one without gradients."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return ()
    return (torch.float16,) if torch.ops.mkldnn._is_mkldnn_bf16_supported() else (torch.float16, torch.bfloat16)


WITHOUT_LSTM = _dtypes_without_lstm()


class LSTM(nn.LSTM):
    """torch's, but under autocast to a dtype of which oneDNN lacks it, where torch's raises an error: there in the dtype of its weights."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        weight = self.weight_ih_l0
        if not (weight.is_cpu and torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") in WITHOUT_LSTM):
            return super().forward(input, hx)
        with torch.autocast("cpu", enabled=False):
            return super().forward(input.to(weight.dtype), None if hx is None else tuple(part.to(weight.dtype) for part in hx))


CELLS: dict[str, type[nn.GRU] | type[nn.LSTM]] = {"gru": nn.GRU, "lstm": LSTM}


@dataclass(frozen=True)
class Encoded:
    """Encoder states ``[B, S, M]`` (zeros beyond the lengths), lengths ``[B]``, and ``final`` ``[B, M]``: the rightward state at the last
    symbol beside the leftward state at the first."""

    states: Tensor
    lengths: Tensor
    final: Tensor


class Encoder(nn.Module):
    """Bahdanau's annotations (arXiv:1409.0473, section 3.2): each state holds the rightward and the leftward state of its symbol.

    Args:
        num_symbols: size of the source vocabulary; symbol 0 is padding.
        embedding_dim: width of a symbol's embedding.
        hidden_dim: width of one direction; a state is ``output_dim = 2 * hidden_dim`` wide.
        num_layers: recurrent layers.
        cell: ``"gru"`` or ``"lstm"``. Under autocast on a CPU of which oneDNN has no LSTM of that dtype (bfloat16 without AVX-512,
            float16 with gradients anywhere) torch's own raises an error; this one, and the decoders', then runs in its weights' dtype.
        dropout: probability with which embeddings, and states between layers, are dropped in training.
    """

    def __init__(
        self, num_symbols: int, embedding_dim: int, hidden_dim: int, *, num_layers: int = 1, cell: str = "gru", dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.output_dim = 2 * hidden_dim
        self.embedding = nn.Embedding(num_symbols, embedding_dim, padding_idx=0)
        self.dropout = nn.Dropout(dropout)
        self.rnn = recurrence(embedding_dim, hidden_dim, num_layers, cell, dropout, bidirectional=True)

    def forward(self, source: Tensor, lengths: Tensor) -> Encoded:
        """Encode symbols ``source [B, S]`` (int64), of which ``lengths [B]`` count, each at least 1. What lies beyond is not read."""
        if source.dim() != 2 or lengths.shape != source.shape[:1]:
            raise ValueError(f"source must be [B, S] and lengths [B]; got {list(source.shape)} and {list(lengths.shape)}")
        on_host = lengths.cpu()  # for which a GPU is waited for once
        shortest, longest = (int(on_host.min()), int(on_host.max())) if len(on_host) else (1, 1)
        if len(on_host) and not 1 <= shortest <= longest <= source.shape[1]:
            raise ValueError(f"lengths must lie in [1, {source.shape[1]}]; got {shortest} to {longest}")
        beyond = torch.arange(source.shape[1], device=source.device) >= lengths.unsqueeze(-1)
        embedded = self.dropout(self.embedding(source.masked_fill(beyond, 0)))
        if len(on_host) and shortest == source.shape[1]:  # nothing to pack away, and a plain run is faster
            states, _ = self.rnn(embedded)
        else:
            packed = nn.utils.rnn.pack_padded_sequence(embedded, on_host, batch_first=True, enforce_sorted=False)
            states, _ = nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=source.shape[1])
        half = self.output_dim // 2
        last = states[torch.arange(len(lengths), device=states.device), lengths - 1, :half]
        return Encoded(states, lengths, torch.cat((last, states[:, 0, half:]), -1))


def recurrence(
    input_dim: int, hidden_dim: int, num_layers: int, cell: str, dropout: float, bidirectional: bool = False
) -> nn.GRU | nn.LSTM:
    """A recurrent network of torch, batch first; dropout lies between layers."""
    if cell not in CELLS:
        raise ValueError(f"cell must be 'gru' or 'lstm'; got {cell!r}")
    between = dropout if num_layers > 1 else 0.0
    return CELLS[cell](input_dim, hidden_dim, num_layers, batch_first=True, dropout=between, bidirectional=bidirectional)
