"""What the C library is told, in a process of its own, since it holds for good."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from trl_drcd.compat.glibc import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(16_000_000)  # 64 MB: above 32 MB glibc maps every block anew
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
before, told = faults(), keep_freed_memory()
for _ in range(4):  # until there is room
    faults()
print(before, told, faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone")
def test_big_tensors_reuse_their_pages(monkeypatch):
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_"):
        monkeypatch.delenv(name, raising=False)
    out = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout.split()
    if out[1] != "True":
        pytest.skip("no glibc, or an accelerator")
    assert int(out[0]) > 5 * 30  # 5 times 15,625 pages, or 31 where pages are huge
    assert int(out[2]) < int(out[0]) / 20
