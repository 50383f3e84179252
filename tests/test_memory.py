"""What a piece of work takes at its peak, with memory that earlier work has freed."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

REUSED = """
import torch
from mendlm import memory

def work():
    return [torch.ones(20_000) for _ in range(2000)]  # 160 MB

kept = work()
above = torch.ones(20_000)  # what is freed lies below it, so that the heap cannot shrink by itself
del kept
memory.forget_peak(torch.device("cpu"))
before = memory.peak_mb(torch.device("cpu"))
again = work()
print(memory.peak_mb(torch.device("cpu")) - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library keeps what is freed")
def test_memory_that_was_freed_before_counts_anew() -> None:
    done = subprocess.run([sys.executable, "-c", REUSED], check=True, capture_output=True, text=True, timeout=120)
    assert 140 < float(done.stdout) < 180
