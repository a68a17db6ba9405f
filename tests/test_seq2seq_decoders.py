"""Decoders: single steps beside teacher forcing, several hypotheses, padding, errors, copies and dropout."""

import copy
import dataclasses
import io
import pickle
from typing import Any

import pytest
import torch
from cases import by_eager
from seq2seq_cases import (
    DECODERS,
    A,
    E,
    H,
    M,
    V,
    at_once,
    by_steps,
    close,
    each_decoder,
    gradients,
    make_decoder,
    make_encoded,
    make_model,
    make_sources,
    make_symbols,
    same,
    some,
)
from tolerance import as_near

from onepass.seq2seq import Encoded, LuongDecoder, PlainDecoder

pytestmark = pytest.mark.usefixtures("backend", "one_thread")
LENGTHS = (5, 1, 7, 3)
either_way = pytest.mark.parametrize("way", [by_steps, at_once])
WITH_WEIGHTS = [name for name in DECODERS if "plain" not in name]


@each_decoder
def test_teacher_forcing_is_steps(kind: str) -> None:
    """All steps in one call give what single steps give, without gradients too."""
    decoder, encoded, symbols = make_decoder(kind), make_encoded(LENGTHS), make_symbols(4, 6)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            for found, expected in zip(at_once(decoder, encoded, symbols), by_steps(decoder, encoded, symbols), strict=True):
                close(found, expected)


@either_way
@each_decoder
def test_weights(kind: str, way: Any) -> None:
    """Exactly zero beyond the source; a distribution over it, or under the Gaussian of local-p at most one."""
    weights = way(make_decoder(kind), make_encoded(LENGTHS), make_symbols(4, 6))[1]
    if "plain" in kind:
        assert weights is None
        return
    assert list(weights.shape) == [4, 6, 7]
    assert not weights.masked_select((torch.arange(7) >= torch.tensor(LENGTHS)[:, None])[:, None]).any()
    assert (weights >= 0).all()
    if "local-p" in kind:
        assert (weights.sum(-1) <= 1 + 1e-12).all()
    else:
        close(weights.sum(-1), torch.ones(4, 6, dtype=torch.float64))


@either_way
@each_decoder
def test_batch_is_one_by_one(kind: str, way: Any) -> None:
    """A source's logits and weights depend neither on its neighbours nor on its padding."""
    decoder, encoded, symbols = make_decoder(kind), make_encoded(LENGTHS), make_symbols(4, 6)
    logits, weights = way(decoder, encoded, symbols)
    for row, length in enumerate(LENGTHS):
        alone_logits, alone_weights = way(decoder, some(encoded, [row]), symbols[row : row + 1])
        close(logits[row], alone_logits[0])
        close(None if weights is None else weights[row, :, :length], None if alone_weights is None else alone_weights[0])


@either_way
@pytest.mark.parametrize("kind", WITH_WEIGHTS)
def test_padding_is_never_read(kind: str, way: Any) -> None:
    """Encoder states beyond the lengths change no bit of the results if they are NaN, and none of the gradients either if they are
    numbers (the gradient of a key's projection is a product with all states); their own gradient is zero."""
    decoder, symbols, found = make_decoder(kind), make_symbols(4, 6), []
    padding = torch.arange(7) >= torch.tensor(LENGTHS)[:, None]
    for filling in (0.0, 1e3, torch.nan):
        clean = make_encoded(LENGTHS)
        states = clean.states.masked_fill(padding[..., None], filling).requires_grad_()
        outputs = way(decoder, Encoded(states, clean.lengths, clean.final), symbols)
        found.append([*outputs, *gradients(outputs, [states, *decoder.parameters()])])
        assert not found[-1][2][padding].any()
    for expected, numbers in zip(*found[:2], strict=True):
        same(numbers, expected)
    for expected, dirty in zip(found[0][:3], found[2][:3], strict=True):
        same(dirty, expected)


@each_decoder
def test_model(kind: str) -> None:
    """A model is its encoder and its decoder; symbols in the padding of the source change no bit, of gradients neither."""
    model = make_model(kind)
    source, lengths = make_sources(LENGTHS)
    symbols, found = make_symbols(4, 5), []
    for filling in (0, 3, 11):
        outputs = model(source.masked_fill(torch.arange(7) >= lengths[:, None], filling), lengths, symbols)
        found.append([*outputs, *gradients(outputs, list(model.parameters()))])
    for expected, *others in zip(*found, strict=True):
        for other in others:
            same(other, expected)
    for got, want in zip(found[0][:2], model.decoder(model.encoder(source, lengths), symbols), strict=True):
        same(got, want)


@each_decoder
def test_autocast(kind: str) -> None:
    """A training step under autocast: logits, weights and gradients near those of float32, in which parameters get theirs."""
    model, symbols = make_model(kind).float(), make_symbols(4, 6)
    source, lengths = make_sources(LENGTHS)

    def step() -> tuple[Any, ...]:
        logits, weights = model(source, lengths, symbols)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), symbols.flatten())
        return logits, weights, *torch.autograd.grad(loss, list(model.parameters()))

    expected = step()
    with torch.autocast("cpu", torch.bfloat16):
        logits, weights, *grads = step()
        with by_eager():
            eager_logits, eager_weights, *eager_grads = step()
    assert logits.dtype == torch.bfloat16
    assert all(grad.dtype == torch.float32 for grad in grads)
    found, eager, wanted = (torch.cat([grad.flatten() for grad in of_step]) for of_step in (grads, eager_grads, expected[2:]))
    as_near((logits, weights, found), (eager_logits, eager_weights, eager), (*expected[:2], wanted))


@pytest.mark.parametrize("way", ["bfloat16", "autocast"])
@pytest.mark.parametrize("kind", [kind for kind in DECODERS if "local" in kind])
def test_windows_of_a_long_source_in_bfloat16(kind: str, way: str) -> None:
    """Positions beyond 256, which bfloat16 does not count one by one, have the windows that float32 gives them."""
    decoder, encoded = make_decoder(kind, torch.float32), make_encoded((400,), torch.float32)
    if "local-p" in kind:
        torch.nn.init.zeros_(decoder.position_v.weight)  # p = S / 2
        encoded = dataclasses.replace(encoded, states=encoded.states[:, :399], lengths=torch.tensor([399]))
    state = dataclasses.replace(decoder.start(encoded), position=301)
    expected = decoder.step(torch.tensor([[5]]), state)[2] != 0
    assert 1 <= expected.sum() <= 5
    if way == "bfloat16":
        decoder, encoded = decoder.bfloat16(), Encoded(encoded.states.bfloat16(), encoded.lengths, encoded.final.bfloat16())
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        state = dataclasses.replace(decoder.start(encoded), position=301)
        assert torch.equal(decoder.step(torch.tensor([[5]]), state)[2] != 0, expected)


@each_decoder
def test_hypotheses(kind: str) -> None:
    """A step with K hypotheses is K decodings, of sources of mixed lengths."""
    decoder, encoded, hypotheses = make_decoder(kind), make_encoded(LENGTHS), 3
    symbols = torch.stack([make_symbols(4, 5, seed=k) for k in range(hypotheses)], 1)
    state = decoder.start(encoded).follow(torch.zeros(4, hypotheses, dtype=torch.int64))
    expected = [at_once(decoder, encoded, symbols[:, k]) for k in range(hypotheses)]
    for t in range(5):
        assert state.position == t
        assert all(carried.shape[:2] == (4, hypotheses) for carried in state.carried)
        logits, state, weights = decoder.step(symbols[..., t], state)
        assert list(logits.shape) == [4, hypotheses, V]
        for k, (one_logits, one_weights) in enumerate(expected):
            close(logits[:, k], one_logits[:, t])
            close(None if weights is None else weights[:, k], None if one_weights is None else one_weights[:, t])


@each_decoder
def test_follow(kind: str) -> None:
    """Hypotheses go on from the parents that they are given, some twice, some not at all; every source has its own."""
    decoder, encoded = make_decoder(kind), make_encoded(LENGTHS)
    generator = torch.Generator().manual_seed(5)
    state, prefixes, known = decoder.start(encoded), torch.zeros(4, 1, 0, dtype=torch.int64), 1
    for wanted in (3, 5, 2, 4, 1):
        parents = torch.randint(0, known, (4, wanted), generator=generator)
        state, known = state.follow(parents), wanted
        prefixes = prefixes.gather(1, parents[..., None].expand(-1, -1, prefixes.shape[-1]))
        nexts = torch.randint(3, V, (4, wanted), generator=generator)
        prefixes = torch.cat([prefixes, nexts[..., None]], -1)
        logits, state, weights = decoder.step(nexts, state)
        for k in range(wanted):
            one_logits, one_weights = at_once(decoder, encoded, prefixes[:, k])
            close(logits[:, k], one_logits[:, -1])
            close(None if weights is None else weights[:, k], None if one_weights is None else one_weights[:, -1])


@each_decoder
@pytest.mark.parametrize("rows", [[2], [3, 0], [1, 2, 3], [0, 1, 2, 3]], ids=str)
def test_select(kind: str, rows: list[int]) -> None:
    """Only the sources asked for go on, in the order asked for, from the step that they were at."""
    decoder, encoded, index = make_decoder(kind), make_encoded(LENGTHS), torch.tensor(rows)
    symbols = torch.stack([make_symbols(4, 6, seed=k) for k in range(2)], 1)
    state = decoder.start(encoded).follow(torch.zeros(4, 2, dtype=torch.int64))
    for t in range(3):
        _, state, _ = decoder.step(symbols[..., t], state)
    state = state.select(index)
    assert torch.equal(state.lengths, encoded.lengths[index])
    assert state.position == 3
    assert all(carried.shape[:2] == (len(rows), 2) for carried in state.carried)
    for t in range(3, 6):
        logits, state, weights = decoder.step(symbols[index][..., t], state)
        for k in range(2):
            one_logits, one_weights = at_once(decoder, encoded, symbols[:, k])
            close(logits[:, k], one_logits[index, t])
            close(None if weights is None else weights[:, k, : one_weights.shape[-1]], None if weights is None else one_weights[index, t])


@each_decoder
def test_states_stay(kind: str) -> None:
    """A step, follow and select leave the state that they are given as it was: it can be stepped again."""
    decoder, encoded = make_decoder(kind), make_encoded(LENGTHS)
    with torch.no_grad():
        _, state, _ = decoder.step(make_symbols(4, 1), decoder.start(encoded))
        before = [carried.clone() for carried in state.carried]
        first, _, _ = decoder.step(make_symbols(4, 2)[:, 1:], state)
        decoder.step(make_symbols(2, 2)[:, 1:], state.select(torch.tensor([1, 0])))
        decoder.step(torch.full((4, 3), 3), state.follow(torch.zeros(4, 3, dtype=torch.int64)))
        again, _, _ = decoder.step(make_symbols(4, 2)[:, 1:], state)
    same(again, first)
    assert state.position == 1
    for carried, expected in zip(state.carried, before, strict=True):
        same(carried, expected)


@each_decoder
def test_copies(kind: str) -> None:
    """deepcopy, pickle, torch.save and a state_dict give a decoder with the same results and gradients."""
    decoder, symbols = make_decoder(kind), make_symbols(4, 5)

    def outcome(one: Any) -> list[Any]:
        encoded = make_encoded(LENGTHS, grad=True)
        outputs = at_once(one, encoded, symbols)
        return [*outputs, *gradients(outputs, [encoded.states, encoded.final, *one.parameters()])]

    expected = outcome(decoder)
    file = io.BytesIO()
    torch.save(decoder, file)
    file.seek(0)
    other = make_decoder(kind, seed=9)
    assert other.load_state_dict(decoder.state_dict(), strict=True)
    for twin in (copy.deepcopy(decoder), pickle.loads(pickle.dumps(decoder)), torch.load(file, weights_only=False), other):
        for got, want in zip(outcome(twin), expected, strict=True):
            same(got, want)
    assert set(decoder.state_dict()) == {name for name, _ in decoder.named_parameters()}


ADDITIVE = "attention.query_layer attention.key_layer attention.v"
BAHDANAU = f"embedding {ADDITIVE} bridge input_layer context_layer gate_layer candidate_layer output"
RECURRENT = "embedding recurrence.rnn recurrence.bridge combine output"


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("plain", RECURRENT),
        ("bahdanau", BAHDANAU),
        ("bahdanau, maxout", f"{BAHDANAU} maxout"),
        ("dot", RECURRENT),
        ("concat", f"{RECURRENT} {ADDITIVE}"),
        ("local-p, concat", f"{RECURRENT} {ADDITIVE} position_layer position_v"),
    ],
)
def test_parameters(kind: str, names: str) -> None:
    """The names that the documentation gives are where the parameters are."""
    present = {name for name, _ in make_decoder(kind).named_parameters()}
    for name in names.split():
        assert any(one == name or one.startswith(f"{name}.") for one in present), name
    assert all(any(one == name or one.startswith(f"{name}.") for name in names.split()) for one in present)


@pytest.mark.parametrize(("kind", "maxout"), [("bahdanau", None), ("bahdanau, maxout", 4)])
def test_widths_of_bahdanau(kind: str, maxout: int | None) -> None:
    """Which layer has which width, as the appendix has them."""
    decoder = make_decoder(kind)
    shapes = {name: list(parameter.shape) for name, parameter in decoder.named_parameters()}
    assert shapes["input_layer.weight"] == [3 * H, E]
    assert shapes["context_layer.weight"] == [3 * H, M]
    assert shapes["gate_layer.weight"] == [2 * H, H]
    assert shapes["candidate_layer.weight"] == [H, H]
    assert shapes["bridge.weight"] == [H, M // 2]
    assert shapes["output.weight"] == [V, H + M + E if maxout is None else maxout]
    assert shapes.get("maxout.weight") == (None if maxout is None else [2 * maxout, H + M + E])
    assert "input_layer.bias" in shapes
    assert not {"context_layer.bias", "gate_layer.bias", "candidate_layer.bias"} & set(shapes)


@each_decoder
def test_dropout(kind: str) -> None:
    """Dropout changes training alone, draws anew at every call, follows the seed, and lets gradients through."""
    decoder, undropped = make_decoder(kind, dropout=0.4), make_decoder(kind)
    encoded, symbols = make_encoded(LENGTHS, grad=True), make_symbols(4, 5)
    for way in (by_steps, at_once):
        decoder.eval()
        same(way(decoder, encoded, symbols)[0], way(undropped, encoded, symbols)[0])
        decoder.train()
        found = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            outputs = way(decoder, encoded, symbols)
            found.append([*outputs, *gradients(outputs, [encoded.states, encoded.final, *decoder.parameters()])])
        assert not torch.equal(found[0][0], found[2][0])
        for first, again in zip(found[0], found[1], strict=True):
            same(again, first)
            assert first is None or first.isfinite().all()


@pytest.mark.parametrize("dropout", [-0.1, 1.5])
@pytest.mark.parametrize("kind", ["plain", "bahdanau", "concat"])
def test_dropout_out_of_range(kind: str, dropout: float) -> None:
    with pytest.raises(ValueError, match="dropout"):
        DECODERS[kind].make(dropout=dropout)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"score": "cosine"}, "'cosine'"),
        ({"score": "dot"}, "dot"),
        ({"window": "nearby"}, "'nearby'"),
        ({"window": "local-m"}, "half_width"),
        ({"window": "local-p"}, "half_width"),
        ({"window": "local-m", "half_width": 0}, "half_width"),
        ({"window": "local-p", "half_width": -2}, "half_width"),
        ({"half_width": 2}, "half_width"),
        ({"attention_dim": 4}, "attention_dim"),
        ({"score": "dot", "attention_dim": 4}, "attention_dim|dot"),
        ({"cell": "elman"}, "'elman'"),
    ],
    ids=str,
)
def test_arguments_of_luong(options: dict[str, Any], named: str) -> None:
    """What cannot be, or would have no effect, is named."""
    with pytest.raises(ValueError, match=named):
        LuongDecoder(V, E, H, M, **options)


def test_unknown_cell_of_plain() -> None:
    with pytest.raises(ValueError, match="'elman'"):
        PlainDecoder(V, E, H, M, cell="elman")


def test_attention_dim_of_concat() -> None:
    """``H`` unless given."""
    assert list(LuongDecoder(V, E, H, M, score="concat").attention.v.shape) == [H]
    assert list(LuongDecoder(V, E, H, M, score="concat", attention_dim=A).attention.v.shape) == [A]


def test_defaults_of_luong() -> None:
    """Global general attention with input feeding over a GRU, as documented."""
    decoder = LuongDecoder(V, E, H, M)
    assert list(decoder.recurrence.rnn.weight_ih_l0.shape)[1] == E + decoder.combine.weight.shape[0]
    assert isinstance(decoder.recurrence.rnn, torch.nn.GRU)
    assert list(decoder.attention.query_layer.weight.shape) == [M, H]
