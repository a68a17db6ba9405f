"""Memory of large results is used again, never while somebody holds it; in a fresh process, since this one keeps none (conftest.py)."""

import os
import pathlib
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

PRELUDE = """
import gc, os, threading, torch, onepass
torch.manual_seed(0)
query, keys, v = torch.randn(4, 64, 8), torch.randn(4, 2048, 8), torch.randn(8)   # scores: 2 MiB
def scores(q=query, k=keys): return onepass.additive_scores(q, k, v, backend="cpu")
def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) * 1024
exact = scores().clone()
"""
Run = Callable[..., None]
pytestmark = pytest.mark.of_cpp
keeps = pytest.mark.skipif(torch.__version__.startswith("2.10."), reason="torch 2.10 takes no memory from others")


@pytest.fixture
def run(backend: str) -> Run:
    if backend == "reference":
        pytest.skip("eager keeps no memory")

    def program(text: str, **environment: str) -> None:
        inherited = {name: value for name, value in os.environ.items() if name != "ONEPASS_KEEP_MIB"}
        inherited["PYTHONPATH"] = os.pathsep.join(
            [str(pathlib.Path(__file__).resolve().parents[1] / "python"), inherited.get("PYTHONPATH", "")]
        )
        done = subprocess.run([sys.executable, "-c", PRELUDE + text], env={**inherited, **environment}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    return program


@keeps
def test_used_again(run: Run) -> None:
    """The next call of the size lies where the last one lay, once that is gone, and is as exact."""
    run("""
first = scores(); place = first.data_ptr(); del first
again = scores()
assert again.data_ptr() == place
assert torch.equal(again, exact)
""")


def test_not_while_held(run: Run) -> None:
    """A result, a view of it, a numpy array on it: each keeps the memory from being used."""
    run("""
import numpy as np
held = scores(); view = scores()[1, 3]; array = scores().numpy()
for _ in range(5): assert not torch.equal(scores(query + 1), exact)
assert torch.equal(held, exact) and torch.equal(view, exact[1, 3]) and np.array_equal(array, exact.numpy())
""")


@keeps
def test_sizes_that_nearly_fit(run: Run) -> None:
    """A kept block serves a smaller result of nearly its size; one much smaller gets memory of its own."""
    run("""
first = scores(); place = first.data_ptr(); del first
nearly = scores(k=keys[:, :1900])
assert nearly.data_ptr() == place and torch.equal(nearly, exact[..., :1900])
del nearly
small = scores(k=keys[:, :1100])
assert small.data_ptr() != place and torch.equal(small, exact[..., :1100])
""")


@keeps
def test_sizes_that_grow(run: Run) -> None:
    """A block of 4 MiB or more has room for what grows to the next 2 MiB, and takes no memory for it before."""
    run("""
many = torch.randn(4, 256, 8)
scores(many, keys[:, :64])
before = resident()
first = scores(many, keys[:, :1100])    # 4.3 MiB
assert resident() - before < 5 << 20
place = first.data_ptr(); del first
for size in range(1101, 1536, 60):
    grown = scores(many, keys[:, :size])
    assert grown.data_ptr() == place and torch.equal(grown, onepass.additive_scores(many, keys[:, :size], v, backend="cpu"))
    del grown
""")


def test_no_more_than_the_limit_is_kept(run: Run) -> None:
    """64 results of 8 MiB and more, all different in size: no more than the limit stays when they are gone."""
    run(
        """
before = resident()
for batch in range(16, 80): onepass.additive_scores(torch.randn(batch, 64, 8), torch.randn(batch, 2048, 8), v, backend="cpu")
gc.collect()
assert resident() - before < (32 + 24) * 2**20, resident() - before
""",
        ONEPASS_KEEP_MIB="32",
        MALLOC_ARENA_MAX="1",
    )


def test_switched_off(run: Run) -> None:
    """``ONEPASS_KEEP_MIB=0``: plain torch memory, which a resize may change."""
    run("result = scores(); result.untyped_storage().resize_(0)", ONEPASS_KEEP_MIB="0")


def test_threads(run: Run) -> None:
    """Four threads at once, each with results of its own that outlive the call."""
    run("""
wrong = []
def work(shift):
    mine = scores(query + shift).clone()
    held = []
    for _ in range(30):
        held.append(scores(query + shift))
        if len(held) > 3: held.pop(0)
        if not all(torch.equal(x, mine) for x in held): wrong.append(shift)
threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not wrong
""")


def test_after_a_fork(run: Run) -> None:
    """A forked process goes on with what it has, without touching its parent's."""
    run("""
torch.set_num_threads(1)
held = scores()
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(scores(), exact) and not torch.equal(scores(query + 1), exact) else 1)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(held, exact) and torch.equal(scores(), exact)
""")


@pytest.mark.parametrize("limit", ["-5", "many", "1.5", "9" * 20])
def test_a_limit_that_is_none(run: Run, limit: str) -> None:
    with pytest.raises(AssertionError, match=f"ONEPASS_KEEP_MIB must be a number of mebibytes; got '{limit}'"):
        run("", ONEPASS_KEEP_MIB=limit)
