"""Leaves no trace: the random generators go on as if nothing had been drawn."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def no_trace() -> Iterator[None]:
    """Restores the generators of Python, NumPy and PyTorch (CPU and accelerators), and gives memory back."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    accelerator = torch.accelerator.current_accelerator()
    module = None if accelerator is None else getattr(torch, accelerator.type, None)
    states = module.get_rng_state_all() if hasattr(module, "get_rng_state_all") else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if states is not None:
            module.set_rng_state_all(states)
        gc.collect()
        if module is not None and hasattr(module, "empty_cache"):
            module.empty_cache()
