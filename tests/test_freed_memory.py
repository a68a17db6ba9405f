"""Tensors whose storage has been freed, as FSDP frees parameters, and sizes that cannot be: errors, where pointers would be followed."""

import copy

import pytest
import torch
from cases import assert_same_bits
from memory_cases import build_for_memory, remember
from torch import Tensor
from torch.utils import _pytree as pytree

import onepass

pytestmark = pytest.mark.of_cpp


def freed(tensor: Tensor, view: bool = False) -> Tensor:
    """It, or a view of what has been freed, as FSDP's parameters are: its pointer is not null."""
    whole = tensor.new_zeros(tensor.numel() + 8)
    tensor = whole[8:].view(tensor.shape) if view else tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize("view", [False, True])
def test_every_op_meets_freed_tensors(view: bool) -> None:
    """Whichever of its tensors it is: its memory has been freed, says the error, and not that it is absent."""
    for family in ("additive", "multiplicative"):
        case = build_for_memory(family, hidden="both")
        limits, mask, query = case.lengths, case.mask, case.query
        assert mask is not None
        mask = mask.expand(*query.shape[:-1], case.keys.shape[-2])
        weights, context = torch.rand(mask.shape), torch.rand(*query.shape[:-1], case.values.shape[-1])
        scored = (case.v,) if family == "additive" else (case.scale,)
        prepared = tuple(torch.ops.onepass.additive_prepare(case.keys, case.v, None, None, False)) if family == "additive" else scored
        step = (*scored, *prepared) if family == "additive" else scored
        calls = {
            "forward": (query, case.keys, case.values, *scored, limits, mask, *((True,) if family == "multiplicative" else ())),
            "step": (query, case.keys, case.values, *step, limits, mask),
            "step_scores": (query, case.keys, *step, limits, mask),
            "step_backward": (context, weights, query, case.keys, case.values, *prepared, weights, limits, mask),
        }
        if family == "additive":
            calls["scores"] = (query, case.keys, case.v, limits, mask)
            calls["scores_backward"] = (weights, query, case.keys, case.v, limits, mask, True)
            calls["backward"] = (context, weights, query, case.keys, case.values, case.v, weights, limits, mask)
            calls["prepare"] = (case.keys, case.v, limits, mask[:, :1], False)
        else:
            calls["backward"] = (context, weights, query, case.keys, case.values, case.scale, weights, limits, mask)
        named = {f"{family}_{name}": arguments for name, arguments in calls.items()}
        named["source_sums"] = (weights, query, limits, mask)
        named["weighted_values"] = (weights, case.values, limits, mask)
        named["weighted_values_backward"] = (context, case.values, limits, mask)
        named["stack_steps"] = ([query, query], True)
        for name, arguments in named.items():
            call = getattr(torch.ops.onepass, name)
            call(*arguments)
            for place, given in enumerate(arguments):
                if isinstance(given, float | bool | None):
                    continue
                gone = freed(given, view) if isinstance(given, Tensor) else [given[0], freed(given[1], view)]
                with pytest.raises(RuntimeError, match="has been freed"):
                    call(*arguments[:place], gone, *arguments[place + 1 :])


@pytest.mark.parametrize("trains", [False, True])
def test_steps_after_v_is_freed(trains: bool) -> None:
    """A memory keeps what its steps need of a parameter, also for scores that take tanh itself, and when some of its sources go on."""
    case = build_for_memory("additive", span="saturated")
    v = case.v.clone()
    with torch.set_grad_enabled(trains):
        memory = remember(case.replace(v=v), "cpu")
        before = {"context": memory.attend(case.query)[0], "scores": memory.scores(case.query)}
        v.untyped_storage().resize_(0)
        assert_same_bits({"context": memory.attend(case.query)[0], "scores": memory.scores(case.query)}, before)
        some = torch.arange(case.keys.shape[0])
        assert_same_bits({"context": memory.select(some).attend(case.query)[0]}, {"context": before["context"]})
        copies = [memory.detach()] if trains else [copy.deepcopy(memory), pytree.tree_map(lambda x: x, memory)]
    with torch.no_grad():
        for made in copies:
            assert_same_bits({"context": made.attend(case.query)[0], "scores": made.scores(case.query)}, before)
        if not trains:
            assert_same_bits({"scores": torch.vmap(memory.scores)(case.query[None])[0]}, {"scores": before["scores"]})


def test_a_memory_of_freed_parameters() -> None:
    case = build_for_memory("additive")
    with pytest.raises(RuntimeError, match=r"memory of v .* has been freed"):
        remember(case.replace(v=freed(case.v)), "cpu")


def test_what_has_no_elements_has_no_memory() -> None:
    assert onepass.multiplicative_attention(torch.empty(0, 3, 4), torch.empty(0, 5, 4), torch.empty(0, 5, 2))[0].shape == (0, 3, 2)


@pytest.mark.parametrize("positions", [2**62 + 2**15, 2**62, 2**61])
def test_sizes_that_overflow(positions: int) -> None:
    """Of weights whose number of bytes is none that an address has, also where it goes round to a small one."""
    keys = torch.zeros(1, 1, 1).expand(1, positions, 1)
    with pytest.raises(RuntimeError, match="aoti_torch_empty_strided"):
        torch.ops.onepass.multiplicative_forward(torch.zeros(1, 4, 1), keys, keys, 1.0, None, None, True)


@pytest.mark.parametrize("with_mask", [True, False])
def test_more_positions_than_an_index_counts(with_mask: bool) -> None:
    source = 2**31 + 64
    keys = torch.zeros(1, 1, 1).expand(1, source, 1)
    mask = torch.zeros(1, 1, 1, dtype=torch.bool).expand(1, 1, source) if with_mask else None
    spans = None if with_mask else torch.tensor([[[source - 2, source]]])
    with pytest.raises(RuntimeError, match="with a mask or spans a source has at most 2147483647 positions; got 2147483712"):
        torch.ops.onepass.multiplicative_forward(torch.zeros(1, 1, 1), keys, keys, 1.0, spans, mask, False)


def test_sizes_of_a_memory_in_other_strides() -> None:
    case = build_for_memory("additive", span="saturated")
    exponentials, sizes, weighting = torch.ops.onepass.additive_prepare(case.keys, case.v, None, None, False)
    wide = torch.full((*sizes.shape[:-1], 7), 0.5)
    wide[..., :2] = sizes

    def scores(of: Tensor) -> Tensor:
        found: Tensor = torch.ops.onepass.additive_step_scores(case.query, case.keys, case.v, exponentials, of, weighting, None, None)
        return found

    assert_same_bits({"scores": scores(wide[..., :2])}, {"scores": scores(sizes)})

