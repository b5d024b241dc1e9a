"""The numbers of the rows of large data sets, in order, a part of them at a time in memory as Python's numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch.utils.data import Sampler
from transformers import TrainingArguments

LARGE = 1_000_000
"""Rows from which on PyTorch's own sampler, which holds a list of all numbers, takes too much: 40 bytes a row."""
_PART = 8192


def numbers(rows: np.ndarray) -> Iterator[int]:
    """The entries of an array, as Python's numbers.

    Example:
        >>> list(numbers(np.arange(3)))
        [0, 1, 2]
    """
    for start in range(0, len(rows), _PART):
        yield from rows[start : start + _PART].tolist()


class RandomOrder(Sampler[int]):
    """All row numbers, in a new order each epoch, by the seed and the epoch alone.

    Args:
        rows: of the data.
        seed: of the order, the same on all ranks.
        epoch: gives the number of the epoch that begins, from 0.

    Example:
        >>> list(RandomOrder(4, seed=0))
        [2, 1, 0, 3]
    """

    def __init__(self, rows: int, seed: int, epoch: Callable[[], int] = lambda: 0) -> None:
        self._rows, self._seed, self._epoch = rows, seed % 2**64, epoch

    def __len__(self) -> int:
        return self._rows

    def __iter__(self) -> Iterator[int]:
        return numbers(np.random.default_rng([self._seed, 3, self._epoch()]).permutation(self._rows))


def large_random_order(data: Any, args: TrainingArguments, epoch: Callable[[], int]) -> RandomOrder | None:
    """The sampler of `random` over a million rows or more; None: the Trainer's own serves.

    Args:
        data: to train on.
        args: whose `data_seed`, else `seed`, is taken.
        epoch: gives the number of the epoch that begins, from 0.

    Example:
        >>> sampler = large_random_order(train, trainer.args, epoch=lambda: int(trainer.state.epoch or 0))
    """
    if not hasattr(data, "__len__") or len(data) < LARGE:
        return None
    return RandomOrder(len(data), args.seed if args.data_seed is None else args.data_seed, epoch)
