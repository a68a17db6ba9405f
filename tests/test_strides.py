"""Contract 6: any strides; others than a unit last one may be copied, but give the same numbers."""

import dataclasses
import mmap
from collections.abc import Callable

import pytest
import torch
from cases import FAMILIES, Case, Dims, build, call, results
from tolerance import check
from torch import Tensor

DIMS = Dims(3, 7, 19, 24, 10)


def sliced(tensor: Tensor) -> Tensor:
    """A slice of a larger tensor of NaN, in every dimension."""
    room = tensor.new_full([size + 3 for size in tensor.shape], torch.nan)
    window = room[tuple(slice(1, size + 1) for size in tensor.shape)]
    return window.copy_(tensor)


def transposed(tensor: Tensor) -> Tensor:
    """Batch and rows swapped in memory, as a time-major model keeps them; the last stride stays one."""
    return tensor.transpose(0, -2).contiguous().transpose(0, -2) if tensor.dim() > 1 else tensor


def column_major(tensor: Tensor) -> Tensor:
    """The last stride is not one."""
    return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor.repeat_interleave(2)[::2]


def every_other(tensor: Tensor) -> Tensor:
    """The last stride is two, with NaN in between."""
    room = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan)
    room[..., ::2] = tensor
    return room[..., ::2]


def expanded(tensor: Tensor) -> Tensor:
    """One batch entry for all, with a stride of zero."""
    return tensor[:1].expand(tensor.shape) if tensor.dim() > 1 else tensor


def constant(tensor: Tensor) -> Tensor:
    """One number per row, with a last stride of zero."""
    return tensor[..., :1].expand(tensor.shape)


Layout = Callable[[Tensor], Tensor]
LAYOUTS: list[Layout] = [sliced, transposed, column_major, every_other, expanded, constant]
DIFFERENTIABLE = ("query", "keys", "values", "v")


def lay(case: Case, layout: Layout, names: tuple[str, ...]) -> Case:
    changed = {name: layout(tensor) for name in names if (tensor := getattr(case, name)) is not None}
    return case.replace(**changed)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [0, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_inputs(family: str, heads: int, dtype: torch.dtype, layout: Layout, backend: str, isa: str) -> None:
    """All inputs at once, in each layout."""
    case = lay(build(family, dataclasses.replace(DIMS, heads=heads), dtype, hidden="both"), layout, DIFFERENTIABLE)
    check(results(case, backend), case)


@pytest.mark.parametrize("name", [*DIFFERENTIABLE, "grad_context", "grad_weights"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_tensor(family: str, layout: Layout, name: str, backend: str) -> None:
    """One input, or one arriving gradient, in each layout, among contiguous others."""
    case = lay(build(family, DIMS, hidden="lengths"), layout, (name,))
    check(results(case, backend), case)


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_and_lengths(family: str, backend: str) -> None:
    """Masks that are slices, transposes or expanded, and lengths that are every other element of a tensor."""
    case = build(family, DIMS, hidden="holes")
    assert case.mask is not None
    wide = torch.ones(DIMS.batch + 1, DIMS.steps + 2, 2 * DIMS.source, dtype=torch.bool)
    wide[1:, 2:, ::2] = case.mask
    lengths = torch.full((2 * DIMS.batch,), -7)
    lengths[::2] = torch.tensor([4, 0, 19])
    per_query = lengths[::2].expand(DIMS.steps, DIMS.batch).mT
    for mask in (
        wide[1:, 2:, ::2],
        case.mask.mT.contiguous().mT,
        case.mask[:1],
        case.mask[:, :1].expand_as(case.mask),
        case.mask[0],
        case.mask[0, 0],
    ):
        for count in (None, lengths[::2], per_query):
            chosen = case.replace(mask=mask, lengths=count)
            check(results(chosen, backend), chosen)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_of_a_sum(family: str, backend: str) -> None:
    """The gradient of ``sum()`` arrives with strides of zero; a loss may use part of an output."""
    case = build(family, DIMS)
    leaves = {name: tensor.requires_grad_() for name, tensor in case.inputs().items()}
    last = [output for output in call(case, backend) if output is not None][-1]
    last.mT[:, 3].sum().backward()
    arriving = torch.zeros_like(last)
    arriving[..., 3] = 1
    expected = case.replace(
        **{name: leaf.detach() for name, leaf in leaves.items()},
        grad_weights=arriving,
        grad_context=torch.zeros_like(case.grad_context),
    )
    found = {f"d_{name}": torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}
    outputs = {name: result for name, result in results(expected, backend).items() if name not in found}
    check({**outputs, **found}, expected)


@pytest.mark.plain_memory
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["query", "keys", "values"])
def test_offsets_beyond_two_to_the_31(name: str, family: str, backend: str) -> None:
    """Batch entries that lie over 2^31 elements apart, in a mapping of which only the touched pages exist."""
    case = build(family, Dims(3, 4, 9, 16, 8))
    tensor = getattr(case, name)
    apart = 2**30 + 2**29 + 64
    size = tensor.element_size() * (2 * apart + tensor[0].numel())
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # named from Python 3.13 on
    room = torch.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve), dtype=tensor.dtype)
    far = torch.as_strided(room, tensor.shape, (apart, tensor.shape[-1], 1)).copy_(tensor)
    assert far.stride(0) * 2 > 2**31
    found = results(case.replace(**{name: far}), backend)
    check(found, case)


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_are_not_written(family: str, backend: str) -> None:
    """A call and its backward leave the versions and the contents of their inputs alone."""
    case = build(family, DIMS, hidden="both")
    tensors = {**case.inputs(), "lengths": case.lengths, "mask": case.mask}
    before = {name: (tensor.clone(), tensor._version) for name, tensor in tensors.items() if tensor is not None}
    results(case, backend)
    for name, (content, version) in before.items():
        assert torch.equal(getattr(case, name), content), name
        assert getattr(case, name)._version == version, name
