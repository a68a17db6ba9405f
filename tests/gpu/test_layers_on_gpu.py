"""Memories, layers and whole systems on a GPU, through the backends that it has."""

import copy

import pytest
import torch
from cases import Case, Dims, assert_same_bits, garbage
from gpu_cases import HERE, moved, there
from memory_cases import (
    PROGRAMS,
    as_stored,
    assert_near,
    attended,
    build_for_memory,
    by_step_or_at_once,
    each_family,
    each_layer,
    expected_gradients,
    gradients,
    layer_states,
    loss_of,
    make_layer,
    masked_over_memory,
    remember,
    settle_final_gradients,
    trained,
    with_leaves,
    with_masks,
)
from seq2seq_cases import each_decoder, make_model
from test_step_scores import build_hidden, check_scores, scored
from tolerance import check
from torch import Tensor, nn

from onepass.seq2seq import beam_search, greedy_search


@by_step_or_at_once
@pytest.mark.parametrize("hidden", ["none", "both", "per head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_family
def test_memory(family: str, dtype: torch.dtype, hidden: str, by_step: bool, gpu_backend: str) -> None:
    """What a memory gives, gradients of keys and values included, is within the functions' bounds."""
    case = build_for_memory(family, Dims(3, 3, 21, 20, 12, heads=2), dtype, hidden=hidden)
    check(there(attended(moved(case), gpu_backend, by_step)), case)


@by_step_or_at_once
@pytest.mark.parametrize("per_head", [False, True])
@each_family
def test_masks_of_queries(family: str, per_head: bool, by_step: bool, gpu_backend: str) -> None:
    """Beside what the memory hides; what no query sees is NaN."""
    case = build_for_memory(family, Dims(3, 3, 21, 20, 12, heads=2), hidden="both")
    seen, masks = with_masks(case, per_head)
    leaves = with_leaves(moved(garbage(seen, torch.nan)))
    memory = remember(leaves.replace(mask=moved(case).mask), gpu_backend)
    check(there(masked_over_memory(memory, leaves, masks.to(HERE), by_step)), seen)


@by_step_or_at_once
@pytest.mark.parametrize("hidden", ["lengths", "spans, mask and both"])
@each_family
def test_scores(family: str, hidden: str, by_step: bool, gpu_backend: str) -> None:
    """Raw scores over a memory, and their gradients."""
    case, seen, mask = build_hidden(family, Dims(3, 3, 21, 20, 12, heads=2), torch.float32, hidden)
    found = scored(moved(case), gpu_backend, by_step, moved(seen), None if mask is None else mask.to(HERE))
    check_scores(there(found), seen)


each_program = pytest.mark.parametrize("program", ["recurrent chain, every output", "beams and steps", "context and weights"])


@each_program
@each_family
def test_training(family: str, program: str, gpu_backend: str) -> None:
    """Deferred gradients are those of the steps one by one."""
    case = build_for_memory(family, Dims(2, 4, 9, 12, 6), hidden="both")
    found = there(trained(moved(case), gpu_backend, PROGRAMS[program]))
    assert_near(found, expected_gradients(case, PROGRAMS[program]))


@pytest.mark.of_gpu
@each_program
@each_family
def test_training_again(family: str, program: str, gpu_backend: str) -> None:
    """The same bits, whatever the GPU does first."""
    case = moved(build_for_memory(family, Dims(9, 20, 130, 64, 48), hidden="both"))
    first = there(trained(case, gpu_backend, PROGRAMS[program]))
    for _ in range(5):
        assert_same_bits(there(trained(case, gpu_backend, PROGRAMS[program])), first)


def gradients_of_steps(case: Case, backend: str, stream: torch.cuda.Stream) -> dict[str, Tensor]:
    """Of a loss whose steps run on the stream, over a memory of the current one."""
    leaves = with_leaves(case)
    memory = remember(leaves, backend)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        loss = sum(loss_of(*memory.attend(query, need_weights=True)) for query in leaves.query.unbind(-2))
    torch.cuda.current_stream().wait_stream(stream)
    loss.backward()
    return there(gradients(leaves))


@pytest.mark.of_gpu
@each_family
def test_steps_on_another_stream(family: str, gpu_backend: str) -> None:
    """The memory's gradients wait for what its steps leave."""
    case = moved(build_for_memory(family, Dims(9, 20, 1300, 64, 48), hidden="lengths"))
    expected = gradients_of_steps(case, gpu_backend, torch.cuda.current_stream())
    for _ in range(5):
        assert_same_bits(gradients_of_steps(case, gpu_backend, torch.cuda.Stream()), expected)


@pytest.mark.of_gpu
@each_family
def test_a_gpu_that_is_not_the_current_one(family: str, gpu_backend: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU here")
    case = build_for_memory(family, Dims(3, 4, 70, 24, 12), hidden="lengths")
    fields = {name: value for name, value in vars(case).items() if isinstance(value, Tensor)}
    second = case.replace(**{name: value.to(torch.device("cuda", 1)) for name, value in fields.items()})
    expected = there(attended(moved(case), gpu_backend, True))
    assert_same_bits({name: value.cpu() for name, value in attended(second, gpu_backend, True).items()}, expected)


@each_family
def test_many_queries_over_a_memory(family: str, gpu_backend: str) -> None:
    """More than the kernels of few take, in training."""
    case = build_for_memory(family, Dims(1, 18, 9, 12, 6), hidden="lengths")
    check(there(attended(moved(case), gpu_backend, by_step=False)), case)


@each_family
def test_selected_rows(family: str, gpu_backend: str) -> None:
    case = moved(build_for_memory(family, Dims(3, 2, 21, 20, 12), hidden="lengths"))
    whole = remember(case, gpu_backend).attend(case.query, need_weights=True)
    rows = torch.tensor([2, 0], device=HERE)
    part = remember(case, gpu_backend).select(rows).attend(case.query[rows], need_weights=True)
    for got, expected in zip(part, whole, strict=True):
        assert torch.equal(got, expected[rows])


@pytest.mark.parametrize("dims", [Dims(2, 2, 21, 20, 12), Dims(1, 1, 300, 9, 7), Dims(1, 18, 9, 12, 6)], ids=str)
@each_family
def test_memory_in_bfloat16(family: str, dims: Dims, gpu_backend: str) -> None:
    """Values are off by one rounding, scores by little more, however many queries come at once; ``"auto"`` finds a backend too."""
    case = build_for_memory(family, dims, hidden="lengths")
    found = there(attended(moved(case), gpu_backend, False, dtype=torch.bfloat16))
    exact, _ = remember(case, "reference").attend(case.query)
    assert found["context"].dtype == torch.float32
    reach = float(case.values.abs().max()) * (2.0**-8 + torch.expm1(2 * score_error(case)).item())
    assert (found["context"] - exact).abs().max() <= reach
    by_choice, _ = remember(moved(case), "auto", dtype=torch.bfloat16).attend(case.query.to(HERE))
    assert_near({"context": by_choice.cpu()}, {"context": found["context"]})


@by_step_or_at_once
@each_family
def test_bfloat16_gradients(family: str, by_step: bool, gpu_backend: str) -> None:
    """Those of what is stored; additive ones of keys and v take the keys as they were given."""
    case = build_for_memory(family, Dims(2, 3, 21, 20, 12), hidden="both")
    found = there(attended(moved(case), gpu_backend, by_step, dtype=torch.bfloat16))
    if family == "additive":
        settle_final_gradients(found, case, gpu_backend)
    check(found, as_stored(case, gpu_backend))


def score_error(case: Case) -> Tensor:
    """How far bfloat16 keys move a score at most: keys, and of additive attention its slope, rounded once."""
    if case.family == "multiplicative":
        return 2.0**-9 * abs(case.scale) * (case.query.abs() @ case.keys.abs().mT).max()
    return 2.0**-8 * (case.v.abs() * case.keys.abs()).sum(-1).max()


@each_layer
def test_layer(kind: str) -> None:
    """A layer moved to the GPU, over its memory and over the states, against itself on the CPU."""
    layer = make_layer(kind, torch.float32, num_heads=2)
    queries, states, lengths = layer_states(kind, 2, torch.float32)
    expected = run(layer, queries, states, lengths)
    for over_memory in (False, True):
        on_gpu = copy.deepcopy(layer).to(HERE)
        found = there(run(on_gpu, queries.to(HERE), states.to(HERE), lengths.to(HERE), over_memory))
        assert_near(found, expected)


def run(layer: nn.Module, queries: Tensor, states: Tensor, lengths: Tensor, over_memory: bool = False) -> dict[str, Tensor]:
    """Outputs and gradients."""
    layer.zero_grad()
    queries, states = (tensor.detach().clone().requires_grad_() for tensor in (queries, states))
    if over_memory:
        memory = layer.memory(states, lengths=lengths)  # type: ignore[operator]
        steps = [layer(query, memory, need_weights=True) for query in queries.unbind(1)]
        context, weights = torch.stack([step[0] for step in steps], 1), torch.stack([step[1] for step in steps], -2)
    else:
        context, weights = layer(queries, states, lengths=lengths, need_weights=True)
    loss_of(context, weights).backward()
    leaves = {**dict(layer.named_parameters()), "queries": queries, "states": states}
    return {"context": context.detach(), "weights": weights.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


@each_decoder
@torch.backends.cudnn.flags(enabled=False)
def test_system(kind: str) -> None:
    """A model's loss, its gradients and what its searches find are those of the CPU."""
    model = make_model(kind).float()
    generator = torch.Generator().manual_seed(3)
    source, lengths = torch.randint(3, 12, (3, 5), generator=generator), torch.tensor([5, 2, 4])
    target = torch.randint(3, 9, (3, 4), generator=generator)
    results, hypotheses = [], []
    for device in (torch.device("cpu"), HERE):  # without cuDNN, whose recurrences have TF32, and no backward in evaluation mode
        model = copy.deepcopy(model).to(device)
        model.zero_grad()
        logits, alignment = model(source.to(device), lengths.to(device), target.to(device))
        loss_of(logits, alignment).backward()
        found = {name: leaf.grad for name, leaf in model.named_parameters() if leaf.grad is not None}
        results.append({**{name: gradient.cpu() for name, gradient in found.items()}, "logits": logits.detach().cpu()})
        with torch.no_grad():
            found_by = [greedy_search(model, source.to(device), lengths.to(device), max_length=3)]
            found_by += beam_search(model, source.to(device), lengths.to(device), beams=2, max_length=2)
        hypotheses.append([hypothesis.symbols for row in found_by for hypothesis in row])
    assert_near(results[1], results[0])
    assert hypotheses[1] == hypotheses[0]


@pytest.mark.of_gpu
@each_family
def test_nothing_waits_for_the_gpu(family: str, gpu_backend: str) -> None:
    """A training step through a memory, with lengths, asks the device for nothing."""
    case = moved(build_for_memory(family, Dims(2, 2, 21, 20, 12), hidden="lengths"))

    def step() -> None:
        leaves = with_leaves(case)
        memory = remember(leaves, gpu_backend)
        torch.stack([memory.attend(query)[0] for query in leaves.query.unbind(-2)]).sum().backward()

    step()  # compiles, and looks at the device
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
