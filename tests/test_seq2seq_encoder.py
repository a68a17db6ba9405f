"""The encoder: torch's recurrences in both directions over sources of mixed lengths, what it gives beyond them, and its errors."""

import copy
import pickle

import pytest
import torch
from seq2seq_cases import M, U, close, gradients, make_encoder, make_sources, same
from seq2seq_formulae import encode

from onepass.seq2seq import Encoder
from onepass.seq2seq.encoder import _dtypes_without_lstm

pytestmark = pytest.mark.usefixtures("one_thread")
each_cell = pytest.mark.parametrize("cell", ["gru", "lstm"])
each_depth = pytest.mark.parametrize("num_layers", [1, 2, 3])


@each_cell
@each_depth
@pytest.mark.parametrize(("lengths", "source"), [((5, 1, 7, 3), 7), ((4,), 4), ((1, 1), 1), ((2, 5), 8)], ids=str)
def test_formula(cell: str, num_layers: int, lengths: tuple[int, ...], source: int) -> None:
    """States and last states are those of each source by itself, and so are the gradients of all parameters."""
    encoder = make_encoder(cell=cell, num_layers=num_layers)
    symbols, counts = make_sources(lengths, source=source)
    found = encoder(symbols, counts)
    states, final = encode(encoder, symbols, counts)
    assert torch.equal(found.lengths, counts)
    assert list(found.states.shape) == [len(lengths), source, M]
    close(found.states, states, "states")
    close(found.final, final, "final")
    assert not found.states[torch.arange(source) >= counts[:, None]].any()
    parameters = dict(encoder.named_parameters())
    grads, expected = (gradients(outputs, [*parameters.values()]) for outputs in ((found.states, found.final), (states, final)))
    for name, got, want in zip(parameters, grads, expected, strict=True):
        assert want.any() or (max(lengths) == 1 and "weight_hh" in name), name
        close(got, want, name)


@each_cell
def test_float32(cell: str) -> None:
    """float32 gives float32, as far from float64 as twice the formula in float32, and a rounding of each of S steps."""
    encoder = make_encoder(torch.float32, cell=cell, num_layers=2).requires_grad_(False)
    symbols, counts = make_sources((5, 1, 7, 3))
    found = encoder(symbols, counts)
    eager, exact = encode(encoder, symbols, counts), encode(copy.deepcopy(encoder).double(), symbols, counts)
    for got, theirs, want in zip((found.states, found.final), eager, exact, strict=True):
        assert got.dtype == torch.float32
        bound = 2 * float((theirs - want).abs().max()) + 7 * torch.finfo(torch.float32).eps * float(want.abs().max())
        assert float((got - want).abs().max()) <= bound


@each_cell
@each_depth
def test_batch_is_one_by_one(cell: str, num_layers: int) -> None:
    """A source's states depend neither on its neighbours nor on its padding."""
    encoder = make_encoder(cell=cell, num_layers=num_layers)
    lengths = (3, 8, 1, 8, 5)
    symbols, counts = make_sources(lengths)
    together = encoder(symbols, counts)
    for row, length in enumerate(lengths):
        alone = encoder(symbols[row : row + 1, :length], counts[row : row + 1])
        close(together.states[row, :length], alone.states[0])
        close(together.final[row], alone.final[0])


@each_cell
@pytest.mark.parametrize("garbage", [3, U - 1, U, -1, 2**40], ids=str)
def test_padding_is_never_read(cell: str, garbage: int) -> None:
    """No symbol beyond the lengths changes a bit, not even one that the embedding does not have."""
    encoder = make_encoder(cell=cell, num_layers=2)
    symbols, counts = make_sources((3, 7, 1, 5), source=8)
    clean, dirty = encoder(symbols, counts), encoder(symbols.masked_fill(torch.arange(8) >= counts[:, None], garbage), counts)
    same(dirty.states, clean.states)
    same(dirty.final, clean.final)
    parameters = list(encoder.parameters())
    dirty_grads, clean_grads = (gradients((found.states, found.final), parameters) for found in (dirty, clean))
    for got, want in zip(dirty_grads, clean_grads, strict=True):
        same(got, want)


def test_order_of_lengths() -> None:
    """Sources need no order: a permuted batch gives the permuted states."""
    encoder = make_encoder(num_layers=2)
    symbols, counts = make_sources((3, 7, 1, 5))
    order = torch.tensor([2, 0, 3, 1])
    straight, permuted = encoder(symbols, counts), encoder(symbols[order], counts[order])
    close(permuted.states, straight.states[order])
    close(permuted.final, straight.final[order])
    assert torch.equal(permuted.lengths, counts[order])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lengths", [(5, 1, 7, 3), (4, 4)], ids=str)
def test_lstm_under_autocast_to_what_the_cpu_lacks(lengths: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs in the dtype of its weights, where torch's has an error: packed and not, from states of either dtype. On every machine: some
    lack neither."""
    monkeypatch.setattr("onepass.seq2seq.encoder.WITHOUT_LSTM", (dtype,))
    encoder = make_encoder(cell="lstm", num_layers=2).float()
    symbols, counts = make_sources(lengths)
    inputs = torch.randn(len(lengths), 1, encoder.rnn.input_size).to(dtype)
    state = tuple(torch.randn(4, len(lengths), encoder.rnn.hidden_size).to(dtype) for _ in range(2))
    expected, (stepped, _) = encoder(symbols, counts), encoder.rnn(inputs.float(), tuple(part.float() for part in state))
    with torch.autocast("cpu", dtype):
        found, (step, _) = encoder(symbols, counts), encoder.rnn(inputs, state)
    assert torch.equal(found.states, expected.states)
    assert torch.equal(step, stepped)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="oneDNN is not there, whose LSTMs this is about")
def test_float16_whatever_the_processor_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where oneDNN has an LSTM of float16, on a processor with arithmetic of it, that has no gradients."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: True)
    assert torch.float16 in _dtypes_without_lstm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_runs(dtype: torch.dtype) -> None:
    """Whatever this machine lacks. How near its results are, the decoders' tests say."""
    encoder = make_encoder(cell="lstm").float()
    with torch.autocast("cpu", dtype):
        states = encoder(*make_sources((4, 4))).states
    states.float().sum().backward()
    assert 0 < float(states.detach().abs().max()) < 1
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in encoder.parameters())


@each_cell
def test_attributes(cell: str) -> None:
    """What other code reads of an encoder: its embedding, torch's bidirectional recurrence, and the width of its states."""
    encoder = make_encoder(cell=cell, num_layers=2)
    assert isinstance(encoder.rnn, {"gru": torch.nn.GRU, "lstm": torch.nn.LSTM}[cell])
    assert encoder.rnn.bidirectional
    assert encoder.rnn.batch_first
    assert encoder.output_dim == M
    assert list(encoder.embedding.weight.shape) == [U, 5]
    assert {name.split(".")[0] for name, _ in encoder.named_parameters()} == {"embedding", "rnn"}


@pytest.mark.parametrize("lengths", [(0, 4), (4, -1), (5, 4)], ids=str)
def test_lengths_out_of_range(lengths: tuple[int, int]) -> None:
    """Lengths below 1 or beyond the source are an error, not an empty or a made-up state."""
    with pytest.raises(ValueError, match="lengths"):
        make_encoder()(torch.full((2, 4), 3), torch.tensor(lengths))


@pytest.mark.parametrize(("source", "lengths"), [((4,), (1,)), ((2, 4, 1), (2,)), ((2, 4), (3,)), ((2, 4), (2, 1)), ((2, 4), ())], ids=str)
def test_wrong_shapes(source: tuple[int, ...], lengths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"source|lengths"):
        make_encoder()(torch.full(source, 3), torch.ones(lengths, dtype=torch.int64))


def test_unknown_cell() -> None:
    with pytest.raises(ValueError, match="'elman'"):
        Encoder(U, 5, 4, cell="elman")


@each_cell
def test_dropout(cell: str) -> None:
    """Dropout changes training alone, draws anew at every call, and follows the seed; the padding stays zero."""
    encoder = make_encoder(cell=cell, num_layers=2, dropout=0.4)
    plain = make_encoder(cell=cell, num_layers=2)
    symbols, counts = make_sources((3, 7, 1, 5))
    same(encoder(symbols, counts).states, plain(symbols, counts).states)
    encoder.train()
    torch.manual_seed(0)
    first, second = encoder(symbols, counts), encoder(symbols, counts)
    assert not torch.equal(first.states, second.states)
    torch.manual_seed(0)
    again = encoder(symbols, counts)
    same(again.states, first.states)
    same(again.final, first.final)
    assert not first.states[torch.arange(7) >= counts[:, None]].any()


@each_cell
def test_copies(cell: str) -> None:
    """deepcopy, pickle and a state_dict give an encoder with the same results."""
    encoder = make_encoder(cell=cell, num_layers=2)
    symbols, counts = make_sources((3, 7, 1, 5))
    other = make_encoder(cell=cell, num_layers=2, seed=9)
    other.load_state_dict(encoder.state_dict())
    for twin in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder)), other):
        same(twin(symbols, counts).states, encoder(symbols, counts).states)
