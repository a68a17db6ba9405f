"""Decoders beside the equations of their papers: every family, score, window, cell and depth, single steps and teacher forcing."""

import copy
import itertools
from typing import Any

import pytest
import torch
from seq2seq_cases import (
    DECODERS,
    LOCAL,
    A,
    Kind,
    V,
    at_once,
    by_steps,
    close,
    each_decoder,
    gradients,
    luong_kind,
    make_decoder,
    make_encoded,
    make_symbols,
)
from seq2seq_formulae import bahdanau, plain
from torch import Tensor

from onepass.seq2seq import BahdanauDecoder, Encoded, PlainDecoder

pytestmark = pytest.mark.usefixtures("backend", "one_thread")
LENGTHS = (5, 1, 7, 3)
either_way = pytest.mark.parametrize("way", [by_steps, at_once])

FAMILIES: dict[str, Kind] = {}
for depth, cell in itertools.product((1, 2), ("gru", "lstm")):
    FAMILIES[f"plain {depth} {cell}"] = Kind(plain, PlainDecoder, num_layers=depth, cell=cell)
    for score, window, fed in itertools.product(("dot", "general", "concat"), ("global", "local-m", "local-p"), (True, False)):
        told = {} if window == "global" else {"window": window, "half_width": 1 + depth}
        name = f"{score} {window} {'fed' if fed else 'unfed'} {depth} {cell}"
        FAMILIES[name] = luong_kind(score, input_feeding=fed, num_layers=depth, cell=cell, **told)
for width in (None, 1, 4):
    FAMILIES[f"bahdanau maxout {width}"] = Kind(bahdanau, BahdanauDecoder, A, maxout_dim=width)


def against_formula(kind: Kind, way: Any, lengths: tuple[int, ...], steps: int) -> None:
    """Logits, weights and the gradients of parameters and encoder states."""
    decoder = make_decoder(kind)
    encoded, symbols = make_encoded(lengths, grad=True), make_symbols(len(lengths), steps)
    found, expected = way(decoder, encoded, symbols), kind.formula(decoder, encoded, symbols)
    assert list(found[0].shape) == [len(lengths), steps, V]
    close(found[0], expected[0], "logits")
    close(found[1], expected[1], "weights")
    leaves = {"states": encoded.states, "final": encoded.final, **dict(decoder.named_parameters())}
    for name, got, want in zip(leaves, gradients(found, [*leaves.values()]), gradients(expected, [*leaves.values()]), strict=True):
        assert want.any() or max(lengths) == 1 or (name, expected[1]) == ("states", None), name
        close(got, want, f"gradient of {name}")


@either_way
@pytest.mark.parametrize("name", FAMILIES)
def test_formula(name: str, way: Any) -> None:
    """Every family, score, window, cell and depth is the equation of its paper."""
    against_formula(FAMILIES[name], way, LENGTHS, 5)


@either_way
@each_decoder
@pytest.mark.parametrize(("lengths", "steps"), [((1,), 1), ((1, 1), 4), ((2,), 9)], ids=str)
def test_formula_small(kind: str, way: Any, lengths: tuple[int, ...], steps: int) -> None:
    """Sources of one symbol, one step, and more steps than source positions."""
    against_formula(DECODERS[kind], way, lengths, steps)


@either_way
@each_decoder
def test_float32(kind: str, way: Any) -> None:
    """float32 is off by at most twice what the formula is off in float32, by what scores moved by a rounding would change, and by a
    rounding of the result for each step."""
    decoder, eps = make_decoder(kind, torch.float32), torch.finfo(torch.float32).eps
    encoded, symbols, formula = make_encoded(LENGTHS, torch.float32, grad=True), make_symbols(4, 5), DECODERS[kind].formula
    wide = copy.deepcopy(decoder).double()
    states, final = (tensor.detach().double().requires_grad_() for tensor in (encoded.states, encoded.final))
    wide_encoded = Encoded(states, encoded.lengths, final)

    def results(made: Any, outputs: tuple[Any, ...], states: Encoded) -> list[Tensor]:
        found = [output.detach() for output in outputs if output is not None]
        return found + gradients(outputs, [states.states, states.final, *made.parameters()])

    got = results(decoder, way(decoder, encoded, symbols), encoded)
    eager = results(decoder, formula(decoder, encoded, symbols), encoded)
    exact = results(wide, formula(wide, wide_encoded, symbols), wide_encoded)
    moved = [torch.zeros(()) for _ in exact]
    if "plain" not in kind:
        torch.manual_seed(0)
        nudged = [results(wide, formula(wide, wide_encoded, symbols, eps), wide_encoded) for _ in range(6)]
        moved = [torch.stack([(one[i] - want).abs().max() for one in nudged]).max() for i, want in enumerate(exact)]
    for result, theirs, want, change in zip(got, eager, exact, moved, strict=True):
        assert result.dtype == torch.float32
        bound = 2 * (theirs - want).abs().max() + 2 * change + 5 * eps * want.abs().max()
        assert float((result - want).abs().max()) <= float(bound)


@pytest.mark.parametrize("kind", [name for name in DECODERS if "plain" not in name])
def test_local_window(kind: str) -> None:
    """Without a window every weight of the source is positive; with one, the weights outside are exactly zero."""
    _, weights = at_once(make_decoder(kind), make_encoded((9, 2, 7)), make_symbols(3, 9))
    inside = (torch.arange(9) < torch.tensor([9, 2, 7])[:, None])[:, None].expand(3, 9, 9)
    if "local-m" in kind:
        centre = torch.minimum(torch.arange(9), torch.tensor([9, 2, 7])[:, None] - 1)[..., None]
        inside = inside & ((torch.arange(9) - centre).abs() <= 2)
    if "local-p" in kind:
        seen = weights > 0
        assert (seen.sum(-1) <= 5).all()
        assert (seen[..., 1:] & ~seen[..., :-1]).sum(-1).le(1).all()  # one run of positions
        assert seen.any(-1).all()
    else:
        assert torch.equal(weights > 0, inside)


@either_way
@pytest.mark.parametrize("score", ["dot", "general", "concat"])
@pytest.mark.parametrize("feeding", [True, False])
@pytest.mark.parametrize(("window", "half_width"), [("local-m", 9), ("local-m", 1000), ("local-p", 10**8)])
def test_wide_windows_are_global(score: str, feeding: bool, window: str, half_width: int, way: Any) -> None:
    """A window that holds every source is global attention, and a Gaussian of that width is 1."""
    local = make_decoder(luong_kind(score, window=window, half_width=half_width, input_feeding=feeding))
    everywhere = make_decoder(luong_kind(score, input_feeding=feeding))
    everywhere.load_state_dict({name: value for name, value in local.state_dict().items() if "position" not in name})
    encoded, symbols = make_encoded((9, 2, 7)), make_symbols(3, 12)
    for found, expected in zip(way(local, encoded, symbols), way(everywhere, encoded, symbols), strict=True):
        close(found, expected)


@pytest.mark.parametrize("kind", LOCAL)
@pytest.mark.parametrize("half_width", [1, 2, 3, 6])
@pytest.mark.parametrize("steer", [-30.0, 0.0, 30.0])
def test_windows_at_the_borders(kind: str, half_width: int, steer: float) -> None:
    """Windows cut at the source's first and last position: local-p is steered to either end, local-m walks off the last one."""
    again = luong_kind(**{**DECODERS[kind].options, "half_width": half_width})
    decoder = make_decoder(again)
    if "local-p" in kind:
        vector = decoder.position_v.weight if isinstance(decoder.position_v, torch.nn.Module) else decoder.position_v
        with torch.no_grad():
            vector.mul_(steer if steer else 1.0)
    encoded, symbols = make_encoded((9, 2, 7, 1)), make_symbols(4, 12)
    expected = again.formula(decoder, encoded, symbols)
    for way in (by_steps, at_once):
        found = way(decoder, encoded, symbols)
        close(found[0], expected[0])
        close(found[1], expected[1])
        assert torch.equal(found[1] == 0, expected[1] == 0)
