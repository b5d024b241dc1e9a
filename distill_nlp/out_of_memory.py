"""Too little memory: told apart from other errors, and said in one line."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate.utils.memory import should_reduce_batch_size

from distill_nlp.errors import DistillError

# Where memory is taken outside of PyTorch's allocator; accelerate does not know them.
_OTHER_WORDS = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or PyTorch on the CPU, had too little memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, RuntimeError) and any(words in str(error) for words in _OTHER_WORDS):
        return True
    return isinstance(error, Exception) and should_reduce_batch_size(error)


@contextmanager
def memory_errors(what: str, advice: str) -> Iterator[None]:
    """Turns running out of memory into one line.

    Args:
        what: was being done.
        advice: what to lower.

    Raises:
        DistillError: the memory did not suffice.

    Example:
        >>> with memory_errors("student, seed 0", "lower data.max_length"):
        ...     trainer.train()
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise DistillError(f"{what}: out of memory; {advice}") from error


def free_cached() -> None:
    """Gives back what PyTorch holds for later."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def that_fit(rows: int, run: Callable[[int], object]) -> int:
    """So many rows, or a half, a quarter, ..., for which the memory suffices to run."""
    while True:
        try:
            run(rows)
            return rows
        except (RuntimeError, MemoryError) as error:
            if rows == 1 or not is_out_of_memory(error):
                raise
        rows //= 2
        free_cached()
