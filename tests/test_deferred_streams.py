"""Steps of a memory on another stream of a GPU than the memory's own: the root waits for what they leave. With streams that take notes."""

from types import SimpleNamespace

import pytest
import torch

from onepass._deferred import Deposit, Deposits


class Stream:
    def __init__(self, name: str) -> None:
        self.name, self.waits_for = name, []

    def wait_stream(self, other: "Stream") -> None:
        self.waits_for.append(other.name)


class OfStreams:
    """As much of a GPU's tensor as the deposits touch."""

    def __init__(self) -> None:
        self.used_on: list[str] = []

    def record_stream(self, stream: Stream) -> None:
        self.used_on.append(stream.name)


@pytest.fixture
def deposits(monkeypatch: pytest.MonkeyPatch) -> Deposits:
    keys, values = torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)
    made = Deposits(keys, values, None, None, None, None, None)
    made.keys = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
    monkeypatch.setattr(torch._C, "_current_graph_task_id", lambda: 7)
    monkeypatch.setattr(torch._C, "_will_engine_execute_node", lambda node: True)
    return made


@pytest.mark.parametrize("of_steps", [["own"], ["own", "own"], ["side"], ["side", "own", "third"]], ids="-".join)
def test_streams(deposits: Deposits, of_steps: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    streams = {name: Stream(name) for name in ("own", "side", "third")}
    current = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams[current[-1]])
    left = [OfStreams() for _ in of_steps]
    for name, tensor in zip(of_steps, left, strict=True):
        current.append(name)
        deposits.leave(SimpleNamespace(grad_fn="a node"), Deposit(tensor, None, None, tensor, None, None, 0, None))
    current.append("own")
    assert [step.query for step in deposits.take()] == left
    others = sorted(set(of_steps) - {"own"})
    assert sorted(streams["own"].waits_for) == others
    assert all(tensor.used_on == (["own"] if others else []) for tensor in left)
    assert deposits.take() == []


def test_a_backward_that_does_not_come_to_the_root(deposits: Deposits, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left, and no stream kept."""
    monkeypatch.setattr(torch._C, "_will_engine_execute_node", lambda node: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: pytest.fail("nobody asked"))
    deposits.leave(SimpleNamespace(grad_fn="a node"), Deposit(OfStreams(), None, None, None, None, None, 0, None))
    assert deposits.take() == []
