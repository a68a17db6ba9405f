"""What can be profiled: workloads that have a name, and functions of the user's."""

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import onepass
from onepass.benchmarks.workloads import NMT, SPEECH, SUMMARISATION, Shape
from onepass.seq2seq import BahdanauDecoder, Encoder, Seq2Seq, beam_search
from onepass.seq2seq.data import PAD, DataError

Run = Callable[[], object]
FAMILIES = ("additive", "multiplicative")
STEPS = Shape("steps", 64, 50, 50, 512, 1024)


@dataclass(frozen=True)
class Workload:
    """``make(device)`` gives what is called."""

    title: str
    make: Callable[[torch.device], Run]


def _inputs(family: str, sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, ...]:
    """Query, keys, values and, if additive, v, as large as a trained model's projections."""
    B, T, S, A, D = sizes
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g) * scale).to(device).requires_grad_()

    scale = 0.5 if family == "additive" else A**-0.25
    v = (normal(A, scale=A**-0.5),) if family == "additive" else ()
    return normal(B, T, A, scale=scale), normal(B, S, A, scale=scale), normal(B, S, D), *v


def _attention(family: str, sizes: tuple[int, ...]) -> Workload:
    attention: Callable[..., tuple[Tensor, Tensor | None]]
    attention = onepass.additive_attention if family == "additive" else onepass.multiplicative_attention

    def make(device: torch.device) -> Run:
        inputs = _inputs(family, sizes, device)
        upstream = torch.ones(*sizes[:2], sizes[4], device=device)
        return lambda: torch.autograd.grad(attention(*inputs)[0], inputs, upstream)

    return Workload(f"{family} attention, forward and backward: {_text(sizes)}", make)


def _steps(family: str, sizes: tuple[int, ...]) -> Workload:
    memory = onepass.additive_memory if family == "additive" else onepass.multiplicative_memory

    def make(device: torch.device) -> Run:
        query, *others = _inputs(family, sizes, device)
        upstream = [torch.ones(sizes[0], sizes[4], device=device)] * sizes[1]

        def run() -> object:
            over = memory(*others)
            contexts = [over.attend(one)[0] for one in query.unbind(1)]
            return torch.autograd.grad(contexts, (query, *others), upstream)

        return run

    return Workload(f"{family} attention one query at a time, forward and backward: {_text(sizes)}", make)


def _sizes(family: str, shape: Shape) -> tuple[int, ...]:
    """B, T, S, A, D, as the benchmarks' workload of that name has them: in multiplicative attention values are as wide as keys."""
    _, B, T, S, A, D = shape
    return B, T, S, A, A if family == "multiplicative" else D


def _text(sizes: tuple[int, ...]) -> str:
    return ", ".join(f"{name} {size}" for name, size in zip("BTSAD", sizes, strict=True))


def _model(symbols: int, width: int, device: torch.device) -> Seq2Seq:
    torch.manual_seed(0)
    encoder = Encoder(symbols, embedding_dim=width // 2, hidden_dim=width)
    decoder = BahdanauDecoder(
        symbols, embedding_dim=width // 2, hidden_dim=2 * width, encoder_dim=encoder.output_dim, attention_dim=width
    )
    return Seq2Seq(encoder, decoder).to(device)


def _words(count: int, longest: int, symbols: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Made-up words, padded, the longest among them, and their lengths."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(longest // 3, longest + 1, (count,), generator=g)
    lengths[0] = longest
    words = torch.randint(3, symbols, (count, longest), generator=g)
    return words.masked_fill(torch.arange(longest) >= lengths[:, None], PAD).to(device), lengths.to(device)


def _beam(device: torch.device) -> Run:
    model = _model(2000, 256, device).eval()
    source, lengths = _words(16, 30, 2000, device)
    return lambda: beam_search(model, source, lengths, beams=5, max_length=30)


def _training(device: torch.device) -> Run:
    model = _model(42, 160, device)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    (source, lengths), (target, _) = _words(64, 12, 42, device), _words(64, 11, 42, device)

    def run() -> object:
        optimizer.zero_grad()
        logits, _ = model(source, lengths, target[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten(), ignore_index=PAD)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.detach()

    return run


WORKLOADS = {
    **{
        f"{family}-{shape.name.lower()}": _attention(family, _sizes(family, shape))
        for family in FAMILIES
        for shape in (NMT, SUMMARISATION, SPEECH)
    },
    **{f"{family}-steps": _steps(family, _sizes(family, STEPS)) for family in FAMILIES},
    "beam": Workload("beam search, 5 beams, 16 sentences of up to 30 symbols, a Bahdanau decoder of width 512", _beam),
    "g2p": Workload("one training step of grapheme-to-phoneme: 64 made-up words, a Bahdanau decoder of width 320", _training),
}


def find(target: str, device: torch.device) -> Run:
    """What to call for a workload's name or ``module:function``. DataError: there is no such, or it needs arguments."""
    if target in WORKLOADS:
        return WORKLOADS[target].make(device)
    module_name, colon, path = target.partition(":")
    if not colon or not module_name or not path:
        raise DataError(f"{target!r} is neither a workload ({', '.join(WORKLOADS)}) nor module:function")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as missing:
        if missing.name is None or not (module_name + ".").startswith(missing.name + "."):
            raise  # the module is there, but not what it imports
        raise DataError(f"no module {module_name!r} in {os.getcwd()} or among what is installed ({missing})") from None
    found: object = module
    for name in path.split("."):
        if not hasattr(found, name):
            there = sorted(name for name, value in vars(module).items() if inspect.isfunction(value) and not name.startswith("_"))
            raise DataError(f"{module_name} ({module.__file__}) has no {path!r}; its functions: {', '.join(there) or 'none'}")
        found = getattr(found, name)
    if not callable(found):
        raise DataError(f"{target} is a {type(found).__name__}, not a function")
    try:
        inspect.signature(found).bind()
    except ValueError:
        return found  # written in C, without a signature
    except TypeError as problem:
        raise DataError(f"{target} is called without arguments, but {problem}: wrap it in a function that makes them") from None
    return found
