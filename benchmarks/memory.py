"""The most memory that a piece of work holds at a time."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import torch


def peak_of(work: Callable[[], object], device: torch.device) -> int:
    """Most bytes that the work holds above what was held before it; on the CPU of Linux, of the whole process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    begin_peak()
    before = _status("VmRSS")
    work()
    return peak_since() - before


def begin_peak() -> None:
    """Has this process's peak start anew; a fresh process begins with that of the one that started it."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_since() -> int:
    """Most bytes that this process held since `begin_peak`, all of them."""
    return _status("VmHWM")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def return_freed_memory(at_once: bool) -> None:
    """Has the allocator give freed blocks back at once: a peak is then one of live tensors, and steps are slow."""
    if os.name == "posix":
        trim_threshold, mmap_threshold = -1, -3
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 1 << (20 if at_once else 25))
        libc.mallopt(trim_threshold, 1 << (20 if at_once else 30))
