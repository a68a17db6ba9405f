"""What else happens to a graph happens to deferred gradients: checkpoints, hooks, exceptions, refusals, processes, 10,000 steps."""

import gc
import itertools
import os
import pathlib
import subprocess
import sys
import tempfile
import weakref
from typing import Any

import pytest
import torch
from memory_cases import (
    FAMILIES,
    PROGRAMS,
    Decoder,
    assert_near,
    double,
    each_family,
    each_layer,
    each_program,
    expected_gradients,
    expected_of_steps,
    gradients,
    layer_states,
    loss_of,
    make_layer,
    next_query,
    remember,
    with_leaves,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

HERE = pathlib.Path(__file__).parent


CHECKPOINTS = ["each step", "all steps", "memory and steps", "every other step"]


@pytest.mark.parametrize("what", CHECKPOINTS)
@pytest.mark.parametrize("program", ["recurrent chain", "recurrent chain, every output", "separate steps", "context and weights"])
@each_family
def test_checkpoint(family: str, program: str, what: str, backend: str) -> None:
    """Recomputing steps in the backward counts each of them once."""
    leaves = with_leaves(double(family))
    memory = remember(leaves, backend)
    count = itertools.count()

    def attend(query: Tensor, need_weights: bool = False) -> Any:
        if what == "every other step" and next(count) % 2:
            return memory.attend(query, need_weights)
        return checkpoint(memory.attend, query, need_weights, use_reentrant=False)

    def all_steps(queries: Tensor) -> Tensor:
        return PROGRAMS[program]((memory if what == "all steps" else remember(leaves, backend)).attend, queries)

    if what in ("each step", "every other step"):
        loss = PROGRAMS[program](attend, leaves.query)
    else:
        loss = checkpoint(all_steps, leaves.query, use_reentrant=False)
    loss.backward()
    assert_near(gradients(leaves), expected_gradients(leaves, PROGRAMS[program]))


@each_program
@each_family
def test_saved_tensors_elsewhere(family: str, program: str, backend: str) -> None:
    """What a step keeps goes through torch's hooks for saved tensors, which may move it."""
    leaves = with_leaves(double(family))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.detach().clone(), lambda tensor: tensor):
        loss = PROGRAMS[program](remember(leaves, backend).attend, leaves.query)
    loss.backward()
    assert_near(gradients(leaves), expected_gradients(leaves, PROGRAMS[program]))


@pytest.mark.parametrize(
    ("family", "name"),
    [
        (family, name)
        for family in FAMILIES
        for name in ("query", "keys", "values", "v", "lengths", "mask")
        if (family, name) != ("multiplicative", "v")
    ],
)
def test_changes_in_place(family: str, name: str, backend: str) -> None:
    """An input overwritten between the step and its backward is an error, but for what a memory has copied."""
    leaves = with_leaves(double(family))
    parts = {key: None if (t := getattr(leaves, key)) is None else t.clone() for key in ("query", "keys", "values", "v", "lengths", "mask")}
    case = leaves.replace(**parts)
    memory = remember(case, backend)
    steps = [case.query[..., step, :].clone() for step in range(4)]
    losses = [loss_of(*memory.attend(step, need_weights=True)) for step in steps]
    changed = steps[1] if name == "query" else parts[name]
    assert changed is not None
    with torch.no_grad():
        changed.zero_()
    loss = torch.stack(losses).sum()
    if name in ("lengths", "mask"):  # of which a memory has copies
        loss.backward()
        assert_near(gradients(leaves), expected_of_steps(leaves, 0, 1, 2, 3))
        return
    if backend != "reference":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        return
    try:  # torch's own formulae have copied some of the inputs at the step
        loss.backward()
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)  # noqa: PT017
    else:
        assert_near(gradients(leaves), expected_of_steps(leaves, 0, 1, 2, 3))


@each_layer
@pytest.mark.parametrize("heads", [1, 2])
def test_hooks(kind: str, heads: int, backend: str) -> None:
    """Hooks on the encoder's output, on parameters and after accumulation fire once, with the whole gradient."""
    queries, source, lengths = layer_states(kind)
    outcomes = []
    for deferred in (True, False):
        layer, encoder = make_layer(kind, num_heads=heads), torch.nn.Linear(8, 8).double()
        torch.nn.init.eye_(encoder.weight)
        torch.nn.init.zeros_(encoder.bias)
        states = encoder(source).tanh()
        seen: dict[str, list[Tensor]] = {}
        states.register_hook(lambda grad, seen=seen: seen.setdefault("states", []).append(grad.clone()))
        parameters = {**dict(layer.named_parameters()), "encoder": encoder.weight}
        for name, leaf in parameters.items():
            leaf.register_post_accumulate_grad_hook(lambda leaf, name=name, seen=seen: seen.setdefault(name, []).append(leaf.grad.clone()))
        memory = layer.memory(states, lengths=lengths) if deferred else states
        options = {} if deferred else {"lengths": lengths}
        loss_of(*[layer(query, memory, **options)[0] for query in queries.unbind(1)]).backward()
        assert {name: len(grads) for name, grads in seen.items()} == dict.fromkeys([*parameters, "states"], 1)
        outcomes.append({name: grads[0] for name, grads in seen.items()})
    assert_near(*outcomes)


@each_family
def test_hooks_change_gradients(family: str, backend: str) -> None:
    """What a hook on the keys returns replaces their gradient, once, as a hook on a context replaces what the step gets."""
    leaves = with_leaves(double(family))
    expected = expected_gradients(leaves, lambda attend, queries: 3.0 * PROGRAMS["separate steps"](attend, queries))
    keys = leaves.keys * 1.0
    keys.register_hook(lambda grad: 2.0 * grad)
    memory = remember(leaves.replace(keys=keys), backend)
    contexts = [memory.attend(query)[0] for query in leaves.query.unbind(1)]
    for context in contexts:
        context.register_hook(lambda grad: 3.0 * grad)
    torch.stack([loss_of(context) for context in contexts]).sum().backward()
    assert_near(gradients(leaves), {**expected, "keys": 2.0 * expected["keys"]})


class BrokenOffError(Exception):
    """What a hook raises in the middle of a backward."""


@pytest.mark.parametrize("where", [0, 1, 2, 3])
@pytest.mark.parametrize("program", ["recurrent chain, every output", "separate steps"])
@each_family
def test_exception_in_a_backward(family: str, program: str, where: int, backend: str) -> None:
    """After a backward that a hook broke off, the retained graph and a new memory give right gradients."""
    leaves = with_leaves(double(family))
    expected = expected_gradients(leaves, PROGRAMS[program])
    memory, steps, broken = remember(leaves, backend), itertools.count(), [True]

    def interrupt(grad: Tensor) -> None:
        if broken[0]:
            raise BrokenOffError

    def attend(query: Tensor, need_weights: bool = False) -> Any:
        query = query * 1.0
        if next(steps) == where:
            query.register_hook(interrupt)
        return memory.attend(query, need_weights)

    loss = PROGRAMS[program](attend, leaves.query)
    for _ in range(2):
        with pytest.raises(BrokenOffError):
            loss.backward(retain_graph=True)
    gradients(leaves, clear=True)
    broken[0] = False
    PROGRAMS[program](remember(leaves, backend).attend, leaves.query).backward()
    assert_near(gradients(leaves, clear=True), expected)
    loss.backward(retain_graph=True)
    assert_near(gradients(leaves, clear=True), expected)
    loss.backward()
    assert_near(gradients(leaves), expected)


@each_family
def test_exception_in_a_backward_of_other_steps(family: str, backend: str) -> None:
    """Steps of a backward that was broken off do not count in the next one, which goes through others of the same memory."""
    case = double(family)
    leaves = with_leaves(case)
    memory, broken = remember(leaves, backend), [True]
    query = leaves.query * 1.0  # after the memory, so that its hook runs before the keys' gradient

    def interrupt(grad: Tensor) -> None:
        if broken[0]:
            raise BrokenOffError

    query.register_hook(interrupt)
    losses = [loss_of(*memory.attend(query[..., step, :], need_weights=True)) for step in range(4)]
    with pytest.raises(BrokenOffError):
        (losses[0] + losses[1]).backward(retain_graph=True)
    broken[0] = False
    gradients(leaves, clear=True)
    (losses[2] + losses[3]).backward()
    assert_near(gradients(leaves), expected_of_steps(case, 2, 3))


@each_family
def test_a_failed_backward_keeps_no_memory(family: str, backend: str) -> None:
    """Memories whose backward raised go with their last reference. (What the engine holds of the last backward that failed may stay.)"""

    def break_off(grad: Tensor) -> None:
        raise BrokenOffError

    def fail() -> Any:
        leaves = with_leaves(double(family))
        memory = remember(leaves.replace(keys=1 * leaves.keys, values=1 * leaves.values), backend)
        steps = [memory.attend(query, need_weights=True) for query in (1 * leaves.query).unbind(-2)]
        contexts = [context + memory.context(0.5 * weights) for context, weights in steps]
        contexts[1].register_hook(break_off)
        with pytest.raises(BrokenOffError):
            loss_of(*contexts).backward()
        return weakref.ref(memory)

    memories = [fail() for _ in range(5)]
    gc.collect()
    assert sum(memory() is not None for memory in memories) <= 1


@each_program
@each_family
def test_second_backward_is_refused(family: str, program: str, backend: str) -> None:
    """Without ``retain_graph`` a second backward is torch's error."""
    leaves = with_leaves(double(family))
    loss = PROGRAMS[program](remember(leaves, backend).attend, leaves.query)
    loss.backward()
    with pytest.raises(RuntimeError, match=r"backward.*second time"):
        loss.backward()


@each_family
def test_keys_changed_within_a_backward(family: str, backend: str) -> None:
    """By a hook, after the step's part of it and before the memory's own."""
    if backend == "reference":
        pytest.skip("its steps are done with the keys by then")
    leaves = with_leaves(double(family))

    def change(grad: Tensor) -> None:
        with torch.no_grad():
            leaves.keys.mul_(3)

    memory = remember(leaves, backend)
    query = leaves.query * 1
    query.register_hook(change)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss_of(memory.attend(query)[0]).backward()


@pytest.mark.parametrize("what", ["attend", "context"])
@each_family
def test_gradient_penalty_is_refused(family: str, what: str, backend: str) -> None:
    """Also where only values have a gradient, of a loss that is linear in the context: it is not zero, silently."""
    leaves = with_leaves(double(family), ["query", "values"])
    memory = remember(leaves, backend)
    weights = torch.softmax(leaves.query @ leaves.keys.mT, -1)
    context = memory.attend(leaves.query)[0] if what == "attend" else memory.context(weights)
    (grad,) = torch.autograd.grad(context.sum(), leaves.values, create_graph=True)
    if backend == "reference":
        assert torch.autograd.grad(grad.square().sum(), leaves.query)[0].any()
        return
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(grad.square().sum(), leaves.query)


@pytest.mark.parametrize("name", ["query", "keys", "values"])
@each_program
@each_family
def test_second_derivative_is_refused(family: str, program: str, name: str, backend: str) -> None:
    """Differentiating a gradient says that there are first derivatives only."""
    if backend == "reference":
        pytest.xfail("the formulae in plain torch have second derivatives")
    leaves = with_leaves(double(family))
    loss = PROGRAMS[program](remember(leaves, backend).attend, leaves.query)
    if name == "values" and program == "weights alone":
        loss = loss + PROGRAMS["separate steps"](remember(leaves, backend).attend, leaves.query)

    def differentiate_twice() -> None:
        (grad,) = torch.autograd.grad(loss.square(), [getattr(leaves, name)], create_graph=True)
        torch.autograd.grad(grad.square().sum(), [leaves.query])

    with pytest.raises(RuntimeError, match="first derivatives"):
        differentiate_twice()


@each_layer
@pytest.mark.parametrize("heads", [1, 2])
def test_layer_in_a_chain(kind: str, heads: int, backend: str) -> None:
    """A layer's recurrent steps over its memory give every parameter and the encoder states the gradients of the steps over them."""
    queries, states, lengths = layer_states(kind)
    outcomes = []
    for deferred in (True, False):
        layer = make_layer(kind, num_heads=heads)
        leaves = {"queries": queries.clone().requires_grad_(), "states": states.clone().requires_grad_(), **dict(layer.named_parameters())}
        memory = layer.memory(leaves["states"], lengths=lengths) if deferred else leaves["states"]
        options = {} if deferred else {"lengths": lengths}
        state, losses = leaves["queries"][:, 0], []
        for step in range(4):
            context, weights = layer(state, memory, need_weights=True, **options)
            state = next_query(leaves["queries"][:, step], context)
            losses.append(loss_of(state, weights))
        torch.stack(losses).sum().backward()
        outcomes.append({name: leaf.grad for name, leaf in leaves.items()})
    assert_near(*outcomes)


@each_layer
@pytest.mark.parametrize("frozen", ["states", "parameters", "queries"])
def test_frozen_parts_of_a_model(kind: str, frozen: str, backend: str) -> None:
    """A frozen encoder, frozen layer or constant queries: the others' gradients are what they are with all."""
    queries, states, lengths = layer_states(kind)
    outcomes = []
    for everything in (True, False):
        layer = make_layer(kind)
        leaves = {"queries": queries.clone(), "states": states.clone(), **dict(layer.named_parameters())}
        for name, leaf in leaves.items():
            leaf.requires_grad_(everything or (name if name in ("queries", "states") else "parameters") != frozen)
        memory = layer.memory(leaves["states"], lengths=lengths)
        loss_of(*[layer(query, memory)[0] for query in leaves["queries"].unbind(1)]).backward()
        outcomes.append({name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None})
    with_all, found = outcomes
    of_all_parameters = {name for name in with_all if name not in ("queries", "states")}
    assert set(with_all) - set(found) == (of_all_parameters if frozen == "parameters" else {frozen})
    assert_near(found, {name: with_all[name] for name in found})


DISTRIBUTED = """
import gc, sys; rank, backend, meeting, out = int(sys.argv[1]), *sys.argv[2:]
import torch; from onepass import _library; from memory_cases import Decoder
_library.error = "these tests run the reference" if backend == "reference" else _library.error
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
torch.manual_seed(rank)  # DistributedDataParallel makes rank 0's parameters everyone's
model = torch.nn.parallel.DistributedDataParallel(Decoder().double())
for batch in torch.load(f"{out}/batches.pt")[rank]:
    model(batch).square().sum().backward()
torch.save({name: leaf.grad for name, leaf in model.module.named_parameters()}, f"{out}/grads{rank}.pt")
torch.distributed.barrier()
del model; gc.collect()  # it holds the group, whose threads must not outlive the interpreter
torch.distributed.destroy_process_group()
"""


def test_distributed_data_parallel(backend: str, tmp_path: pathlib.Path) -> None:
    """Two processes, two batches each: everyone's gradients are the mean over the processes of those computed alone, undeferred."""
    generator = torch.Generator().manual_seed(0)
    batches = torch.randn(2, 2, 3, 9, 5, generator=generator, dtype=torch.float64)
    torch.save(batches, tmp_path / "batches.pt")
    command = [sys.executable, "-W", "ignore", "-c", DISTRIBUTED]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with tempfile.TemporaryDirectory() as folder:
        arguments = [backend, f"{folder}/meeting", str(tmp_path)]
        ranks = [subprocess.Popen([*command, str(rank), *arguments], cwd=HERE, env=environment) for rank in (0, 1)]
        try:
            assert [process.wait(timeout=120) for process in ranks] == [0, 0]
        finally:
            for process in ranks:
                process.kill()
    torch.manual_seed(0)
    model = Decoder(deferred=False).double()
    for batch in batches.flatten(0, 1):
        (model(batch).square().sum() / 2).backward()
    expected = {name: leaf.grad for name, leaf in model.named_parameters()}
    for rank in (0, 1):
        assert_near(torch.load(tmp_path / f"grads{rank}.pt"), expected)


LEAK = """
import gc, sys; backend, family = sys.argv[1:]
import torch; from onepass import _library; from cases import Dims; from measure import memory; from memory_cases import *
_library.error = "these tests run the reference" if backend == "reference" else _library.error
torch.set_num_threads(1)
leaves = with_leaves(build_for_memory(family, Dims(2, 1, 24, 16, 16), hidden="lengths"))
query = leaves.query[:, 0]
kept = remember(leaves, backend)
loss = loss_of(kept.attend(query)[0], kept.attend(query * 2)[0])

def train():
    made, context = remember(leaves, backend), query
    for _ in range(10):
        context = made.attend(query + context)[0]
    context.sum().backward()

def differentiate():
    torch.autograd.grad(loss, [leaves.query], retain_graph=True)

def grown(function, count):
    for _ in range(200):
        function()
    gc.collect()
    objects, bytes = len(gc.get_objects()), memory("VmRSS")
    for _ in range(count):
        function()
    gc.collect()
    return len(gc.get_objects()) - objects, memory("VmRSS") - bytes

print(*grown(train, 1000), *grown(differentiate, 2000))
"""


@each_family
def test_nothing_is_kept(family: str, backend: str) -> None:
    """10,000 steps of training, and 2,000 gradients of the query over one retained graph, leave no object and no memory behind."""
    if backend == "triton":
        pytest.skip("so many launches take hours in Triton's interpreter")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-W", "ignore", "-c", LEAK, backend, family]
    printed = subprocess.run(command, cwd=HERE, env=environment, check=True, capture_output=True, text=True).stdout
    objects, grown, more_objects, more_grown = (int(number) for number in printed.split())
    assert max(objects, more_objects) < 100
    assert max(grown, more_grown) < 2 * 2**20
