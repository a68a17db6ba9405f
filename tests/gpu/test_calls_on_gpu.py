"""What surrounds the kernels on a GPU: torch.compile, autocast, opcheck, empty tensors, errors, names in a profile."""

import contextlib
import warnings

import pytest
import torch
from cases import Dims, build, by_eager, call
from gpu_cases import HERE, found, moved
from memory_cases import each_family, make_layer, remember
from tolerance import as_near, check
from torch import Tensor

import onepass

each_layer = pytest.mark.parametrize("kind", ["additive", "general"])
CASE = Dims(2, 3, 5, 8, 4)


def states(device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, n, width, generator=generator).to(device) for n, width in ((3, 6), (5, 8)))  # type: ignore[return-value]


@pytest.mark.parametrize("over_memory", [False, True], ids=["states", "memory"])
@each_layer
def test_compiled(kind: str, over_memory: bool) -> None:
    """In one graph, without a word of Dynamo's, and with gradients."""
    torch.compiler.reset()
    layer = make_layer(kind, torch.float32).to(HERE)
    query, memory = states(HERE)
    memory.requires_grad_()

    def model(query: Tensor, memory: Tensor) -> Tensor:
        if not over_memory:
            return layer(query, memory)[0]
        made = layer.memory(memory)
        return torch.stack([layer(one, made)[0] for one in query.unbind(1)], 1)

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*Dynamo")
        context = torch.compile(model, fullgraph=True, backend="aot_eager")(query, memory)
    torch.testing.assert_close(context, model(query, memory))
    grads = [torch.autograd.grad(result.square().sum(), memory)[0] for result in (context, model(query, memory))]
    torch.testing.assert_close(*grads)


@each_layer
def test_autocast(kind: str) -> None:
    """Under autocast a layer is as near to float32 as it is with torch's eager formula, over the states and over a memory."""
    layer, results = make_layer(kind, torch.float32), []
    exact = layer(*states(torch.device("cpu")), need_weights=True)
    for device in (torch.device("cpu"), HERE):
        query, memory = states(device)
        on_device = layer.to(device)
        with torch.autocast(device.type, torch.bfloat16), by_eager() if device != HERE else contextlib.nullcontext():
            results.append(on_device(query, memory, need_weights=True))
            steps = [on_device(one, on_device.memory(memory), need_weights=True) for one in query.unbind(1)]
            results.append((torch.stack([step[0] for step in steps], 1), torch.stack([step[1] for step in steps], 1)))
    eager, eager_steps, ours, our_steps = ([tensor.cpu() for tensor in result] for result in results)
    assert ours[0].dtype == torch.bfloat16
    as_near(ours, eager, exact)
    as_near(our_steps, eager_steps, exact)


def test_opcheck() -> None:
    """The CUDA ops have the schemas, fakes and gradients that they say."""
    case, ops = moved(build("additive", CASE, hidden="lengths")), torch.ops.onepass_cuda
    query, keys, values, v = (tensor.requires_grad_() for tensor in (case.query, case.keys, case.values, case.v))
    torch.library.opcheck(ops.additive_forward.default, (query, keys, values, v, case.lengths, None))
    torch.library.opcheck(ops.additive_scores.default, (query, keys, v, case.lengths, None))
    torch.library.opcheck(ops.multiplicative_forward.default, (query, keys, values, 1.0, case.lengths, None, True))


@pytest.mark.parametrize("empty", ["batch", "steps", "source", "width", "value_width"])
@each_family
def test_empty_dimensions(family: str, empty: str, gpu_backend: str) -> None:
    case = build(family, Dims(**{"batch": 2, "steps": 3, "source": 5, "width": 8, "value_width": 4, empty: 0}))
    check(found(case, gpu_backend), case)


def test_devices_that_differ() -> None:
    case = moved(build("additive", CASE))
    here = (case.query, case.keys, case.values)
    with pytest.raises(ValueError, match="lengths must be on the device of query, cuda:0; got cpu"):
        onepass.additive_attention(*here, case.v, lengths=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="v must be on the device of query, cuda:0; got cpu"):
        onepass.additive_attention(*here, case.v.cpu())
    with pytest.raises(ValueError, match="query must be on the device of the memory, cuda:0; got cpu"):
        remember(case, "auto").attend(case.query[:, 0].cpu())
    with pytest.raises(RuntimeError, match="it serves tensors on the cpu, not on cuda:0"):
        call(case, "cpu")


def test_what_cuda_does_not_serve() -> None:
    case = moved(build("additive", Dims(1, 1, 2, 20_000, 4)))
    with pytest.raises(RuntimeError, match="dtypes takes T = 1 and widths of A = 20000 and D = 4; backend 'triton' does"):
        call(case, "cuda")
    case = moved(build("multiplicative", Dims(2, 17, 5, 8, 4)))
    with pytest.raises(RuntimeError, match="it has kernels of multiplicative attention for up to 16 queries, not for 17"):
        call(case, "cuda")
    with pytest.raises(RuntimeError, match=r"it has no kernels of torch\.float16 over memories kept in torch\.bfloat16"):
        remember(moved(build("multiplicative", CASE, torch.float16)), "cuda", dtype=torch.bfloat16)


def test_names_in_a_profile(gpu_backend: str) -> None:
    """Each op with its sizes, and what its memory is kept in, whoever computes it."""
    case, stepped = moved(build("additive", CASE)), moved(build("multiplicative", CASE))
    memory = remember(stepped, gpu_backend, dtype=torch.bfloat16)

    def run() -> None:
        call(case, gpu_backend)
        memory.attend(stepped.query)

    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    names = [event.key for event in profile.key_averages()]
    assert "onepass::additive_forward [B 2, T 3, S 5, A 8, D 4] float32 cuda" in names
    assert "onepass::multiplicative_step [B 2, T 3, S 5, A 8, D 4] float32 over bfloat16 cuda" in names
