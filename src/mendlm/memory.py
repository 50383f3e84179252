"""How much memory there is, and a piece of work takes at its peak: of the process on a CPU, of the allocator on a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
from pathlib import Path

import torch


def forget_peak(device: torch.device) -> None:
    """Measure the peak anew from here on; where the system cannot, it stays that of the whole process.

    What the C library keeps of freed memory is given back before, where it can: new work that took it would show no rise.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_mb(device: torch.device) -> float:
    """The peak since then, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with contextlib.suppress(OSError):
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 1024
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def room(device: torch.device) -> int | None:
    """Bytes that a device can take: what is free of a card, and all memory and swap of a CPU; None where it is not known."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for later
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    with contextlib.suppress(OSError):
        if device.type == "cpu":
            lines = Path("/proc/meminfo").read_text().splitlines()
            return sum(int(line.split()[1]) for line in lines if line.startswith(("MemTotal:", "SwapTotal:"))) * 1024
    return None
