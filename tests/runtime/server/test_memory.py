"""Memory that a server has freed goes back to the system."""

from __future__ import annotations

import subprocess
import sys

import pytest

BLOCKS = """
import ctypes, os, sys, time
from branchwise.runtime.server.memory import return_freed_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

size = int(sys.argv[2])
if sys.argv[1] == "with":
    return_freed_memory(trim_seconds=0.1)
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = libc.free.argtypes = None
before, kept = resident(), []
for _ in range(3):  # the first round teaches glibc to take such blocks from the heap
    blocks = []
    for _ in range((100 << 20) // size):
        block = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(size)))
        ctypes.memset(block, 1, size)
        blocks.append(block)
        kept.append(libc.malloc(ctypes.c_size_t(2000)))  # small blocks between large ones keep the heap from shrinking
    for block in blocks:
        libc.free(block)
    del blocks
end = time.monotonic() + (60 if sys.argv[1] == "with" else 0.5)
while resident() - before >= 20 and time.monotonic() < end:
    time.sleep(0.05)
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
@pytest.mark.parametrize("size", [1 << 20, 1 << 16], ids=["large", "of-64-KB"])
def test_freed_blocks_go_back_to_the_system(size: int) -> None:
    def left(how: str) -> float:
        command = [sys.executable, "-c", BLOCKS, how, str(size)]
        return float(subprocess.run(command, capture_output=True, text=True, check=True, timeout=240).stdout)

    assert left("without") > 50, "otherwise this test shows nothing"
    assert left("with") < 20
