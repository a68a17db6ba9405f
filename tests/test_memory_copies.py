"""What is made of a memory: copies with and without gradients, pickles, and trees of its tensors; and what of it may leave the process."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Dims, assert_same_bits
from memory_cases import build_for_memory, each_family, gradients, loss_of, remember, with_leaves
from torch import Tensor
from torch.utils import _pytree as pytree

import onepass


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@each_family
def test_detached(family: str, dtype: torch.dtype | None, mode: Callable[[], Any], backend: str) -> None:
    """Steps without gradients between those of training, over what training has prepared: the same bits, and its gradients stay what they
    are. The error of a step in the other mode names the way, which is the same wherever it is gone."""
    case = build_for_memory(family, Dims(3, 4, 11, 9, 5, 2), hidden="both")
    found = []
    for sampled in (False, True):
        leaves = with_leaves(case)
        memory = remember(leaves, backend, dtype=dtype)
        context, weights = memory.attend(leaves.query, need_weights=True)
        if sampled:
            made_outside = memory.detach()
            with mode():
                for use in (lambda: memory.attend(leaves.query), lambda: memory.select([0])):  # noqa: B023
                    with pytest.raises(RuntimeError, match=r"with them disabled: steps that train nothing, .* take memory.detach\(\);"):
                        use()
                for free in (memory.detach(), made_outside):
                    assert free._step_values.data_ptr() == memory._step_values.data_ptr()
                    for got, want in zip(free.attend(leaves.query, need_weights=True), (context, weights), strict=True):
                        assert not got.requires_grad
                        assert torch.equal(got, want)
                    assert torch.equal(free.select(torch.tensor([1])).scores(leaves.query[1:2]), free.scores(leaves.query)[1:2])
        loss_of(context, weights).backward()
        found.append(gradients(leaves))
    assert_same_bits(*found)
    if backend != "reference":
        with torch.no_grad():
            leaves.keys.add_(1)
        modified = "keys, values, v, lengths or mask of a memory have been modified by an inplace operation since it was made"
        for use in (memory.detach, lambda: pytree.tree_leaves(memory)):
            with pytest.raises(RuntimeError, match=f"{modified}: make the memory anew after an optimizer's step"):
                use()
    with mode():
        memory = remember(case, backend, dtype=dtype)
    with pytest.raises(RuntimeError, match="is used with them enabled: make it in the mode of its steps"):
        memory.attend(case.query)


def loaded(memory: onepass.AttentionMemory, weights_only: bool) -> onepass.AttentionMemory:
    file = io.BytesIO()
    torch.save(memory, file)
    file.seek(0)
    found: onepass.AttentionMemory = torch.load(file, weights_only=weights_only)
    return found


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}], ids=["as it is", "half"])
@pytest.mark.parametrize("heads", [0, 2])
@each_family
def test_copies(family: str, heads: int, options: dict[str, Any], backend: str) -> None:
    """A memory without gradients is copied, pickled and loaded, also where nothing but weights is; one with gradients says why not."""
    case = build_for_memory(family, Dims(3, 2, 5, 8, 4, heads), hidden="both")
    with torch.no_grad():
        memory = remember(case, backend, **options)
        expected = memory.attend(case.query, need_weights=True)
    memories = [
        copy.copy(memory), copy.deepcopy(memory), pickle.loads(pickle.dumps(memory)), loaded(memory, False), loaded(memory, True),
    ]  # fmt: skip
    with torch.no_grad():
        for found in memories:
            for got, want in zip(found.attend(case.query, need_weights=True), expected, strict=True):
                assert torch.equal(got, want)
    memory = remember(with_leaves(case), backend, **options)
    for copying in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="make it anew of its encoder states"):
            copying(memory)


ROWS = {
    "list": [2, 0, 0],
    "list of none": [],
    "list of booleans": [True, False, True],
    "slice": slice(0, 2),
    "slice of every second": slice(None, None, 2),
    "slice from the end": slice(-1, None),
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@each_family
def test_rows_without_a_tensor(family: str, rows: list[int] | slice, backend: str) -> None:
    """A list and a slice select what a tensor of the same rows does, gradients included."""
    case = build_for_memory(family, Dims(3, 4, 11, 9, 5, 2), hidden="both")
    found = []
    for given in (rows, torch.arange(3)[rows]):
        leaves = with_leaves(case)
        context, _ = remember(leaves, backend).select(given).attend(leaves.query[rows])
        loss_of(context).backward()
        found.append({**gradients(leaves), "context": context})
    assert_same_bits(*found)


@each_family
def test_rows_that_are_none(family: str, backend: str) -> None:
    memory = remember(build_for_memory(family, Dims(3, 2, 5, 8, 4)), backend)
    for rows in (1, None, (0, 1), "01", [0.0], [[0]]):
        with pytest.raises(TypeError, match=rf"rows must be a torch\.Tensor, a list of integers or a slice; got {type(rows).__name__}"):
            memory.select(rows)
    for rows in ([0, 3], [-1]):
        with pytest.raises(IndexError, match=r"rows must lie in \[0, B\) = \[0, 3\); got"):
            memory.select(rows)
    with pytest.raises(ValueError, match=r"boolean rows must be \[B\] = \[3\]; got \[2\]"):
        memory.select([True, False])


@pytest.mark.parametrize("to", [{"dtype": torch.bfloat16}, {"dtype": torch.float64}, {"device": "meta"}], ids=str)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@each_family
@torch.no_grad()
def test_a_tree_that_changes(family: str, dtype: torch.dtype | None, to: dict[str, Any], backend: str) -> None:
    """Of another dtype or device by now, as FSDP2's mixed precision makes it, a memory is made anew of these keys and values."""

    def changed(leaf: Tensor) -> Tensor:
        return leaf.to(**to) if leaf.is_floating_point() or "device" in to else leaf

    case = build_for_memory(family, Dims(3, 2, 5, 40, 4), hidden="both")
    memory = pytree.tree_map(changed, remember(case, backend, dtype=dtype))
    query = case.query.to(**to)
    context, weights = memory.attend(query, need_weights=True)
    assert (context.dtype, context.device, weights.shape) == (query.dtype, query.device, case.grad_weights.shape)
    if "device" not in to:
        inputs = {name: tensor.to(**to) for name, tensor in case.inputs().items()}
        kept = dtype if to["dtype"] != torch.float64 else None
        assert torch.equal(context, remember(case.replace(**inputs), backend, dtype=kept).attend(query)[0])


@pytest.mark.of_cpp
@torch.no_grad()
def test_nothing_of_the_heap_is_in_a_memory(isa: str) -> None:
    """What is prepared may leave the process, as a program's result: what no step reads is zeros (and would be NaN, see conftest.py)."""
    for A in (3, 8, 20):
        case = build_for_memory("additive", Dims(3, 2, 70, A, 4, 2), hidden="both")
        memory = remember(case, "cpu")
        assert memory._prepared is not None
        exponentials, sizes, weighting = memory._prepared
        assert memory.lengths is not None
        assert memory.mask is not None
        seen = (torch.arange(70) < memory.lengths[:, None])[:, None] & memory.mask[:, :, 0]
        assert not exponentials.masked_fill(seen[..., None], 0).any()
        assert not sizes.masked_fill(seen[..., None], 0).any()
        assert exponentials.isfinite().all()
        assert weighting.isfinite().all()


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}], ids=["as it is", "half"])
@pytest.mark.parametrize("heads", [0, 2])
@each_family
def test_a_tree_of_tensors(family: str, heads: int, options: dict[str, Any], backend: str) -> None:
    """Taken apart and put together again it gives the same results and gradients, to the bit, whatever was made of its leaves in between;
    each leaf has a name."""
    case = build_for_memory(family, Dims(3, 2, 5, 8, 4, heads), hidden="both")
    found = []
    for again in (False, True):
        leaves = with_leaves(case)
        memory = remember(leaves, backend, **options)
        if again:
            named = {pytree.keystr(path)[1:]: leaf for path, leaf in pytree.tree_leaves_with_path(memory)}
            assert all(isinstance(leaf, Tensor) for leaf in named.values())
            given = {name: getattr(memory, name) for name in ("keys", "values", "v", "lengths", "mask")}
            assert all(leaf is named.get(name) for name, leaf in given.items())
            texts = pytree.tree_map(lambda leaf: str(list(leaf.shape)), memory)
            assert pytree.tree_leaves(texts)[0] == str(list(case.keys.shape))
            parts, spec = pytree.tree_flatten(memory)
            memory = pytree.tree_unflatten(parts, pytree.treespec_loads(pytree.treespec_dumps(spec)))
        outputs = memory.attend(leaves.query, need_weights=True)
        loss_of(*outputs).backward()
        found.append({**gradients(leaves), "context": outputs[0], "weights": outputs[1]})
    assert_same_bits(*found)
