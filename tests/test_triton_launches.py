"""What a call of a Triton op does before its kernels run: nothing that would wait for the device, or depend on what tensors hold."""

import importlib

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs triton, whose kernels are launched")

from onepass.kernels import parts
from onepass.kernels.launches import recorded
from onepass.kernels.ops import OPS
from onepass.kernels.tiles import Device

B, T, S, A, D = 2, 20, 70, 12, 8


def arguments(op: str, lengths: Tensor | None, mask: Tensor | None) -> list[object]:
    """On a device that has no numbers: who asks for one gets an error."""
    query, keys, values, v = (torch.empty(sizes, device="meta") for sizes in ((B, T, A), (B, S, A), (B, S, D), (A,)))
    weights, context = (torch.empty(sizes, device="meta") for sizes in ((B, T, S), (B, T, D)))
    none = torch.empty((B, 0), device="meta")
    prepared = (none, none, v)
    first: dict[str, list[object]] = {
        "additive_forward": [query, keys, values, v],
        "additive_backward": [context, weights, query, keys, values, v, weights],
        "additive_scores": [query, keys, v],
        "additive_scores_backward": [weights, query, keys, v],
        "multiplicative_forward": [query, keys, values, 0.5],
        "multiplicative_backward": [context, weights, query, keys, values, 0.5, torch.empty((0,), device="meta")],
        "additive_step": [query, keys, values, v, *prepared],
        "additive_step_scores": [query, keys, v, *prepared],
        "additive_step_backward": [context, weights, query, keys, values, *prepared, weights],
        "multiplicative_step": [query, keys, values, 0.5],
        "multiplicative_step_scores": [query, keys, 0.5],
        "multiplicative_step_backward": [context, weights, query, keys, values, 0.5, weights],
        "source_sums": [weights, query],
        "weighted_values": [weights, values],
        "weighted_values_backward": [context, values],
    }
    return [*first[op], lengths, mask, *([False] if op in ("multiplicative_forward", "additive_scores_backward") else [])]


@pytest.mark.parametrize("hidden", ["none", "lengths", "lengths per query", "spans", "mask"])
@pytest.mark.parametrize("op", sorted(OPS.keys() - {"stack_steps"}))
def test_nothing_waits_for_the_device(op: str, hidden: str) -> None:
    sizes = {"lengths": (B,), "lengths per query": (B, T), "spans": (B, T, 2)}.get(hidden)
    lengths = None if sizes is None else torch.empty(sizes, dtype=torch.int64, device="meta")
    mask = torch.empty((B, T, S), dtype=torch.bool, device="meta") if hidden == "mask" else None
    with recorded(Device(132)) as launches:
        OPS[op](*arguments(op, lengths, mask))
    assert launches


def test_the_check_itself() -> None:
    with pytest.raises(RuntimeError, match="meta"):
        torch.empty(1, device="meta").item()


@pytest.mark.parametrize("D", [64, 256])
def test_online_softmax_writes_no_weights(D: int) -> None:
    """Where nobody asks for them and values are no wider than 256."""
    query, keys, values = (torch.zeros(sizes) for sizes in ((B, 300, A), (B, 400, A), (B, 400, D)))
    with recorded(Device(132)) as launches:
        OPS["multiplicative_forward"](query, keys, values, 1.0, None, None, False)
    tensors = [value for launch in launches for value in launch.arguments if isinstance(value, Tensor)]
    assert [launch.name for launch in launches] == ["attend_online"]
    assert max(tensor.numel() for tensor in tensors) == max(tensor.numel() for tensor in (query, keys, values)) < B * 300 * 400


@pytest.mark.parametrize("source", [256, 257, 5000, 100_000])
@pytest.mark.parametrize("processors", [1, 132])
def test_terms_added_one_by_one(source: int, processors: int) -> None:
    """No program of the gradients of additive scores has so many positions that roundings add up."""
    query, keys, v, scores = (torch.empty(sizes, device="meta") for sizes in ((B, 3, A), (B, source, A), (A,), (B, 3, source)))
    with recorded(Device(processors)) as launches:
        OPS["additive_scores_backward"](scores, query, keys, v, None, None, True)
    (launch,) = (launch for launch in launches if launch.name == "tanh_gradients")
    assert launch.passed["per_group"] <= 256


@pytest.mark.parametrize("processors", [1, 132])
def test_query_not_asked_for(processors: int) -> None:
    """Its gradient has no parts then; all else is the same."""
    query, keys, v, scores = (torch.zeros(sizes) for sizes in ((B, T, A), (B, S, A), (A,), (B, T, S)))
    found = []
    for of_query in (True, False):
        with recorded(Device(processors)) as launches:
            OPS["additive_scores_backward"](scores, query, keys, v, None, None, of_query)
        assert [launch.name for launch in launches] == ["weight_gradients", "tanh_gradients"]
        found.append(launches[1])
    asked, unasked = found
    tensors = [{name: tuple(value.shape) for name, value in each.passed.items() if isinstance(value, Tensor)} for each in found]
    assert tensors[0].pop("p_dq") == (asked.passed["groups"], B, 1, T, A)
    assert tensors[1].pop("p_dq") == tensors[1]["p_gradients"]
    assert unasked.passed["p_dq"].data_ptr() == unasked.passed["p_gradients"].data_ptr()
    assert tensors[0] == tensors[1]
    assert {**asked.given, "QUERY": False} == unasked.given
    assert asked.programs == unasked.programs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vendor", ["nvidia", "amd"])
def test_options_that_the_compiler_takes(vendor: str, dtype: torch.dtype) -> None:
    """A launch refuses all others; many queries too, whose tiles say how many registers a thread may have."""
    backend = importlib.import_module(f"triton.backends.{vendor}.compiler")
    known = (backend.CUDAOptions if vendor == "nvidia" else backend.HIPOptions).__dataclass_fields__
    device = Device(132) if vendor == "nvidia" else Device(304, lanes=64, unit="gcn")
    query, keys, values, v = (torch.zeros(sizes, dtype=dtype) for sizes in ((2, 80, 24), (2, 300, 24), (2, 300, 40), (24,)))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weights, context = torch.zeros(2, 80, 300, dtype=wide), torch.zeros(2, 80, 40, dtype=dtype)
    with recorded(device) as launches:
        for few in (1, 80):
            few_weights, few_context, few_query = weights[:, :few], context[:, :few], query[:, :few]
            OPS["additive_forward"](few_query, keys, values, v, None, None)
            OPS["additive_backward"](few_context, few_weights, few_query, keys, values, v, few_weights, None, None)
            for kept in (weights[:, :few], weights.new_empty(0)):
                OPS["multiplicative_backward"](few_context, None, few_query, keys, values, 1.0, kept, None, None)
            OPS["multiplicative_forward"](few_query, keys, values, 1.0, None, None, False)
    assert len(launches) > 15
    assert not {name for launch in launches for name in launch.options} - set(known)


@pytest.mark.parametrize(("unit", "precision"), [("ptx", "tf32"), ("gcn", "ieee")])
def test_tf32(unit: str, precision: str) -> None:
    """Products of float32 follow torch's own, by its older switch and its newer, after which the older one's getter is an error."""
    matmul, query = torch.backends.cuda.matmul, torch.zeros(1, 1, 1)

    def found() -> object:
        with recorded(Device(132, unit=unit)):
            return parts.arithmetic(query)["PRECISION"]

    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "ieee"
        assert found() == "ieee"
        matmul.fp32_precision = "tf32"
        assert found() == precision
        matmul.fp32_precision = "ieee"
        torch.set_float32_matmul_precision("high")
        assert found() == precision
        torch.set_float32_matmul_precision("highest")
        assert found() == "ieee"
    finally:
        matmul.fp32_precision = before
