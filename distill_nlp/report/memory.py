"""How much memory a pass takes beside the weights."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

RESIDENT = "growth of the process's resident memory"
CUDA = "growth of the memory allocated on the GPU"


def pass_memory(run: Callable[[], Any], device: Any) -> dict[str, Any]:
    """Memory at its peak while `run` runs, over what was there before; the weights lie in that already.

    Args:
        run: a forward pass.
        device: where it runs: on CUDA by the allocator's peak, on the CPU by the resident memory of this process,
            which Linux alone tells.

    Returns:
        `mb` (10^6 bytes) and `how` it was read; both None where it cannot be.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return {"mb": _megabytes(torch.cuda.max_memory_allocated(device) - before), "how": CUDA}
    if torch.device(device).type != "cpu":
        # That of this process says nothing of what lies elsewhere.
        run()
        return {"mb": None, "how": None}
    gc.collect()
    with suppress(OSError, AttributeError):
        # Pages that the allocator keeps from earlier passes would be taken without growth.
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as reset:
            reset.write("5")  # the peak begins anew
        before = _resident("VmRSS")
        run()
        return {"mb": _megabytes(max(_resident("VmHWM") - before, 0)), "how": RESIDENT}
    except (OSError, StopIteration):
        return {"mb": None, "how": None}


def _resident(name: str) -> int:
    """Bytes, of `VmRSS` (now) or `VmHWM` (at the peak)."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _megabytes(size: int) -> float:
    return round(size / 1e6, 1)
