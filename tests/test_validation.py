"""Contract 7: a call that cannot be served says what it got and what it takes."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from cases import FAMILIES, Case, Dims, build, call
from torch import Tensor

import onepass

of_cpp = pytest.mark.of_cpp  # the Triton kernels clamp what is out of range
B, T, S, A, D, H = 2, 3, 5, 8, 4, 2
PLAIN, HEADS = Dims(B, T, S, A, D), Dims(B, T, S, A, D, H)


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def refused(case: Case, backend: str, error: type[Exception], message: str) -> None:
    """The call raises the error with the message, which is given literally."""
    with pytest.raises(error, match=re.escape(message)):
        call(case, backend)


SHAPES: list[tuple[Dims, dict[str, Any], str]] = [
    (PLAIN, {"keys": zeros(S, A)}, "keys must be [B, S, A] or, with heads, [B, H, S, A]; got [5, 8]"),
    (PLAIN, {"keys": zeros(1, B, H, S, A)}, "keys must be [B, S, A] or, with heads, [B, H, S, A]; got [1, 2, 2, 5, 8]"),
    (PLAIN, {"query": zeros(A)}, "query must be [B, T, A], or [B, A] for one step, to go with keys [2, 5, 8]; got [8]"),
    (PLAIN, {"query": zeros()}, "query must be [B, T, A], or [B, A] for one step, to go with keys [2, 5, 8]; got []"),
    (
        PLAIN,
        {"query": zeros(B, H, T, A)},
        "query must be [B, T, A], or [B, A] for one step, to go with keys [2, 5, 8]; got [2, 2, 3, 8]",
    ),
    (
        HEADS,
        {"query": zeros(B, A)},
        "query must be [B, H, T, A], or [B, H, A] for one step, to go with keys [2, 2, 5, 8]; got [2, 8]",
    ),
    (PLAIN, {"query": zeros(B + 1, T, A)}, "query and keys must agree in batch size; got [3, 3, 8] and [2, 5, 8]"),
    (PLAIN, {"query": zeros(B + 1, A)}, "query and keys must agree in batch size; got [3, 1, 8] and [2, 5, 8]"),
    (
        HEADS,
        {"query": zeros(B, H + 1, T, A)},
        "query and keys must agree in batch size and heads; got [2, 3, 3, 8] and [2, 2, 5, 8]",
    ),
    (
        PLAIN,
        {"query": zeros(B, T, A + 1)},
        "query and keys must agree in attention width A (the last dimension); got [2, 3, 9] and [2, 5, 8]",
    ),
]
VALUES: list[tuple[Dims, dict[str, Any], str]] = [
    (PLAIN, {"values": zeros(S, D)}, "values must have the rank of keys [2, 5, 8]; got [5, 4]"),
    (HEADS, {"values": zeros(B, S, D)}, "values must have the rank of keys [2, 2, 5, 8]; got [2, 5, 4]"),
    (
        PLAIN,
        {"values": zeros(B, S + 1, D)},
        "values and keys must agree in batch and source dimensions; got [2, 6, 4] and [2, 5, 8]",
    ),
    (PLAIN, {"values": zeros(1, S, D)}, "values and keys must agree in batch and source dimensions; got [1, 5, 4] and [2, 5, 8]"),
]
V: list[tuple[Dims, dict[str, Any], str]] = [
    (PLAIN, {"v": zeros(A + 1)}, "v must be [A] = [8] for keys [2, 5, 8]; got [9]"),
    (PLAIN, {"v": zeros(1, A)}, "v must be [A] = [8] for keys [2, 5, 8]; got [1, 8] (a Linear's weight is weight[0])"),
    (PLAIN, {"v": zeros(A, 1)}, "v must be [A] = [8] for keys [2, 5, 8]; got [8, 1]"),
    (HEADS, {"v": zeros(A)}, "v must be [H, A] = [2, 8] for keys [2, 2, 5, 8]; got [8]"),
    (HEADS, {"v": zeros(A, H)}, "v must be [H, A] = [2, 8] for keys [2, 2, 5, 8]; got [8, 2]"),
]


@pytest.mark.parametrize(("dims", "changes", "message"), SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_and_sizes(family: str, dims: Dims, changes: dict[str, Any], message: str, backend: str) -> None:
    refused(build(family, dims).replace(**changes), backend, ValueError, message)


@pytest.mark.parametrize(("dims", "changes", "message"), VALUES)
@pytest.mark.parametrize("family", ["additive", "multiplicative"])
def test_values(family: str, dims: Dims, changes: dict[str, Any], message: str, backend: str) -> None:
    refused(build(family, dims).replace(**changes), backend, ValueError, message)


@pytest.mark.parametrize(("dims", "changes", "message"), V)
@pytest.mark.parametrize("family", ["additive", "scores"])
def test_v(family: str, dims: Dims, changes: dict[str, Any], message: str, backend: str) -> None:
    refused(build(family, dims).replace(**changes), backend, ValueError, message)


@pytest.mark.parametrize("name", ["query", "keys", "values", "v"])
@pytest.mark.parametrize("family", FAMILIES)
def test_kinds(family: str, name: str, backend: str) -> None:
    """Every tensor must be a tensor, of a dtype that is served, of query's dtype, on query's device."""
    case = build(family, PLAIN)
    if name not in case.inputs():
        return
    tensor = getattr(case, name)
    refused(case.replace(**{name: tensor.tolist()}), backend, TypeError, f"{name} must be a torch.Tensor; got list")
    refused(case.replace(**{name: None}), backend, TypeError, f"{name} must be a torch.Tensor; got NoneType")
    for dtype in (torch.int64, torch.complex64, torch.bool):
        wrong = case.replace(**{name: tensor.to(dtype)})
        refused(wrong, backend, TypeError, f"{name} must be float32, float64, bfloat16 or float16; got {dtype}")
    if name != "query":
        for dtype in (torch.float64, torch.bfloat16):
            refused(
                case.replace(**{name: tensor.to(dtype)}),
                backend,
                TypeError,
                f"{name} must have the dtype of query, torch.float32; got {dtype}",
            )
        refused(
            case.replace(**{name: tensor.to("meta")}),
            backend,
            ValueError,
            f"{name} must be on the device of query, cpu; got meta",
        )


LENGTHS: list[Any] = [
    ([5, 2], TypeError, "lengths must be a torch.Tensor of integers; got list"),
    (5, TypeError, "lengths must be a torch.Tensor of integers; got int"),
    (torch.tensor([5.0, 2.0]), TypeError, "lengths must be int64 or int32; got torch.float32: lengths.long()"),
    (torch.tensor([5, 2], dtype=torch.uint8), TypeError, "lengths must be int64 or int32; got torch.uint8: lengths.long()"),
    (torch.tensor([True, False]), TypeError, "lengths must be int64 or int32; got torch.bool"),
    (torch.tensor([5, 2], device="meta"), ValueError, "lengths must be on the device of query, cpu; got meta"),
    (torch.tensor([5]), ValueError, "lengths must be [B] = [2] or, per query, [B, T] = [2, 3]; got [1]"),
    (torch.tensor(5), ValueError, "lengths must be [B] = [2] or, per query, [B, T] = [2, 3]; got []"),
    (torch.full((3, 2), 5), ValueError, "lengths must be [B] = [2] or, per query, [B, T] = [2, 3]; got [3, 2]"),
    (torch.full((2, 1), 5), ValueError, "lengths must be [B] = [2] or, per query, [B, T] = [2, 3]; got [2, 1]"),
    pytest.param(torch.tensor([5, 6]), RuntimeError, "lengths must lie in [0, 5], got", marks=of_cpp),
    pytest.param(torch.tensor([-1, 2]), RuntimeError, "lengths must lie in [0, 5], got", marks=of_cpp),
    pytest.param(torch.tensor([5, 2**40]), RuntimeError, "lengths must lie in [0, 5], got", marks=of_cpp),
    pytest.param(torch.tensor([5, -(2**31)], dtype=torch.int32), RuntimeError, "lengths must lie in [0, 5], got", marks=of_cpp),
    pytest.param(torch.tensor([[5, 5, 5], [0, 6, 5]]), RuntimeError, "lengths must lie in [0, 5], got", marks=of_cpp),
]


@pytest.mark.parametrize(("lengths", "error", "message"), LENGTHS)
@pytest.mark.parametrize("dims", [PLAIN, HEADS], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_lengths(family: str, dims: Dims, lengths: Any, error: type[Exception], message: str, backend: str) -> None:
    refused(build(family, dims).replace(lengths=lengths), backend, error, message)


@pytest.mark.of_cpp
@pytest.mark.parametrize("bad", [6, -1])
@pytest.mark.parametrize("family", FAMILIES)
def test_lengths_out_of_range_are_quoted(family: str, bad: int, backend: str) -> None:
    """The message quotes the number that is out of range."""
    with pytest.raises(RuntimeError, match=rf"lengths must lie in \[0, 5\], got .*{bad}"):
        call(build(family, PLAIN).replace(lengths=torch.tensor([bad, 3])), backend)


def shown(*shape: int, device: str = "cpu") -> Tensor:
    return torch.ones(shape, dtype=torch.bool, device=device)


NO_MASK = "mask must be a boolean tensor, True where a query attends; got "
AS_MASK = "mask.bool(), or ~mask.bool() where it is 1 at what is hidden"
MASKS: list[tuple[Dims, Any, type[Exception], str]] = [
    (PLAIN, [[True]], TypeError, f"{NO_MASK}list"),
    (PLAIN, zeros(B, T, S), TypeError, f"{NO_MASK}torch.float32: {AS_MASK}; of 0 and -inf, mask == 0"),
    (PLAIN, torch.ones(B, T, S, dtype=torch.uint8), TypeError, f"{NO_MASK}torch.uint8: {AS_MASK}"),
    (PLAIN, shown(B, T, S, device="meta"), ValueError, "mask must be on the device of query, cpu; got meta"),
    (
        PLAIN,
        shown(B, S),
        ValueError,
        "mask must broadcast to [B, T, S] = [2, 3, 5]; got [2, 5] (a padding mask [B, S] is written mask[:, None, :])",
    ),
    (PLAIN, shown(B, T, S + 1), ValueError, "mask must broadcast to [B, T, S] = [2, 3, 5]; got [2, 3, 6]"),
    (PLAIN, shown(B, T + 1, S), ValueError, "mask must broadcast to [B, T, S] = [2, 3, 5]; got [2, 4, 5]"),
    (PLAIN, shown(B, 1, T, S), ValueError, "mask must broadcast to [B, T, S] = [2, 3, 5]; got [2, 1, 3, 5]"),
    (PLAIN, shown(0), ValueError, "mask must broadcast to [B, T, S] = [2, 3, 5]; got [0]"),
    (HEADS, shown(B, H + 1, T, S), ValueError, "mask must broadcast to [B, H, T, S] = [2, 2, 3, 5]; got [2, 3, 3, 5]"),
    (HEADS, shown(B + 1, T, S), ValueError, "mask must broadcast to [B, H, T, S] = [2, 2, 3, 5]; got [3, 3, 5]"),
]


@pytest.mark.parametrize(("dims", "mask", "error", "message"), MASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_masks(family: str, dims: Dims, mask: Any, error: type[Exception], message: str, backend: str) -> None:
    refused(build(family, dims).replace(mask=mask), backend, error, message)


SCALES: list[tuple[Any, str]] = [
    (None, "scale must be a number; got NoneType"),
    ("1", "scale must be a number; got str"),
    (1j, "scale must be a number; got complex"),
    (torch.tensor(0.5), "scale must be a number; got a tensor of shape []: multiply the query by it, with scale=1.0"),
    (torch.ones(2, requires_grad=True), "scale must be a number; got a tensor of shape [2]: multiply the query by it, with scale=1.0"),
]


@pytest.mark.parametrize(("scale", "message"), SCALES)
@pytest.mark.parametrize("dims", [PLAIN, HEADS], ids=str)
def test_scales(dims: Dims, scale: Any, message: str, backend: str) -> None:
    """A tensor's gradient would be lost: it is not taken for a number."""
    case = build("multiplicative", dims).replace(scale=scale)
    refused(case, backend, TypeError, message)
    with pytest.raises(TypeError, match=re.escape(message)):
        onepass.reference.multiplicative_attention(case.query, case.keys, case.values, scale=scale)


def test_scales_of_any_kind(backend: str) -> None:
    """Whatever is a real number."""
    case = build("multiplicative", PLAIN)
    expected = call(case.replace(scale=2.0), backend)
    for scale in (2, np.float32(2), np.int64(2)):
        for found, want in zip(call(case.replace(scale=scale), backend), expected, strict=True):
            assert torch.equal(found, want)


@pytest.mark.of_cpp
@pytest.mark.parametrize("family", FAMILIES)
def test_errors_come_in_every_mode(family: str, backend: str) -> None:
    """``no_grad``, ``inference_mode`` and autocast check as training does."""
    case = build(family, PLAIN).replace(lengths=torch.tensor([6, 3]))
    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with mode:
            refused(case, backend, RuntimeError, "lengths must lie in [0, 5]")
