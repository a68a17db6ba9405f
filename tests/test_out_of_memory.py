"""A call for which there is no memory is a MemoryError, on one thread and on several, and changes no bit of the next one."""

import subprocess
import sys

import pytest

SCRIPT = """
import hashlib, resource, torch
from onepass import multiplicative_attention

torch.set_num_threads({threads})
large, small = ([torch.randn(4, n, 16, generator=torch.Generator().manual_seed(n)) for n in (128, s, s)] for s in (1_000_000, 20_000))
with torch.no_grad():
    multiplicative_attention(*(x[:, :64] for x in small))
    mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + (64 << 20), resource.RLIM_INFINITY))
    for _ in range({failures}):
        try:
            multiplicative_attention(*large)
        except MemoryError:
            print("no memory")
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(hashlib.sha256(bytes(multiplicative_attention(*small)[0].untyped_storage())).hexdigest())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps a process to the address space that it is given")
@pytest.mark.parametrize("threads", [1, 2])
def test_no_memory(threads: int) -> None:
    def run(failures: int) -> list[str]:
        script = SCRIPT.format(threads=threads, failures=failures)
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.splitlines()

    assert run(failures=2) == ["no memory", "no memory", *run(failures=0)]
