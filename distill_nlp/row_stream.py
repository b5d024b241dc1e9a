"""The order of streamed rows: mixed in a buffer, batches of like lengths, the same after a restart and on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, count, islice
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from distill_nlp.sampling import STRATEGIES, batch_pattern

Row = dict[str, Any]

WINDOW = 50
"""Batches that are sorted by length together, as in `sampling`."""


class RowStream(IterableDataset):
    """An endless series of encoded rows for a `Trainer` with `max_steps`.

    Each kind of rows is read from its beginning again when it ends, in a new order: a buffer of `shuffle_buffer` rows
    is filled, and each row that comes takes the place of a random one, which goes on. In windows of 50 batches the rows
    of a rank are then encoded, sorted by their lengths and cut into batches, which are shuffled, on all ranks alike;
    the very first one is the longest of its window. With two kinds, each batch holds `round(ratio * batch_size)` rows
    of the second.

    The order depends on the seed and the number of ranks alone. Every rank reads all rows and takes its own part of
    each window: a row is trained once in a pass. So does every worker of a loader, and takes its turn of the batches.
    accelerate must take each rank's batches out of those of all (`dispatch_batches=False`); the places of other ranks
    hold None.

    Args:
        kinds: one or two that give their rows, with a `text`, each time that they are iterated over.
        encode: rows to encoded rows, in order, each with its `input_ids`.
        column_names: of the encoded rows.
        batch_size: rows of a batch on one device.
        ratio: part of the second kind, in (0, 1).
        seed: of the order.
        shuffle_buffer: rows among which is drawn; 1: the order stays.
        strategy: "group_by_length", "random" (no sorting) or "sequential" (neither sorting nor mixing).
        rank, ranks: of the launch.

    Raises:
        ValueError: an unknown strategy, a batch too small for two kinds, or two kinds without a ratio.

    Example:
        >>> stream = RowStream([rows], encode, ["input_ids", "labels"], batch_size=16, seed=0)
        >>> trainer = DistillationTrainer(..., train_dataset=stream)
    """

    def __init__(
        self,
        kinds: Sequence[Iterable[Row]],
        encode: Callable[[list[Row]], list[Row]],
        column_names: Sequence[str],
        batch_size: int,
        ratio: float | None = None,
        seed: int = 0,
        shuffle_buffer: int = 10_000,
        strategy: str = "group_by_length",
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        if strategy not in STRATEGIES:
            raise ValueError(f"rows of a stream are ordered by {', '.join(STRATEGIES)}, got {strategy}: choose one")
        if (len(kinds) == 2) != (ratio is not None):
            raise ValueError(
                "unlabeled_ratio is needed where unlabeled rows are streamed beside labeled ones, and there alone"
            )
        if ratio is not None and batch_size < 2:
            raise ValueError(
                f"unlabeled_ratio needs at least 2 rows in a batch, one of each kind, got {batch_size}: raise "
                "per_device_train_batch_size, or leave data.unlabeled out"
            )
        self._kinds, self._encode, self.column_names = kinds, encode, list(column_names)
        self._size, self._rank, self._ranks = batch_size, rank, ranks
        self._seed, self._buffer = seed % 2**64, 1 if strategy == "sequential" else shuffle_buffer
        self._grouped = strategy == "group_by_length"
        # (B,) the kind of each place in a batch.
        self._pattern = np.zeros(batch_size, int) if ratio is None else batch_pattern(batch_size, ratio).astype(int)

    def __iter__(self) -> Iterator[Row | None]:
        worker = get_worker_info()
        own, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        before, after = self._rank * self._size, (self._ranks - self._rank - 1) * self._size
        for number, batch in enumerate(self._batches()):
            # A loader takes a batch of each worker in turn.
            if number % workers == own:
                yield from [None] * before
                yield from batch
                yield from [None] * after

    def first(self, rows: int) -> list[Row]:
        """So many rows of this rank's beginning, encoded."""
        return list(islice(chain.from_iterable(self._batches()), rows))

    def _batches(self) -> Iterator[list[Row]]:
        """This rank's batches, encoded."""
        series = [self._series(kind) for kind in range(len(self._kinds))]
        for window in count():
            drawn = [self._draw(rows, kind) for kind, rows in enumerate(series)]
            batches = [self._assembled([next(rows) for rows in drawn]) for _ in range(WINDOW)]
            yield from self._shuffled(batches, window) if self._grouped else batches

    def _draw(self, series: Iterator[Row], kind: int) -> Iterator[list[Row]]:
        """A kind's part of each batch of a window, the longest first; the k-th longest of all ranks run together."""
        of_batch = int((self._pattern == kind).sum())
        size = WINDOW * of_batch
        rows = list(islice(series, size * self._ranks))
        rows = self._encode(rows[size * self._rank : size * (self._rank + 1)])
        if self._grouped:
            rows.sort(key=_length, reverse=True)
        return (rows[i * of_batch : (i + 1) * of_batch] for i in range(WINDOW))

    def _assembled(self, parts: list[list[Row]]) -> list[Row]:
        own = [iter(part) for part in parts]
        return [next(own[kind]) for kind in self._pattern]

    def _shuffled(self, batches: list[list[Row]], window: int) -> list[list[Row]]:
        order = np.random.default_rng([self._seed, 2, window]).permutation(len(batches))
        if window == 0:
            # What takes most memory comes first, as far as it can be known: the longest, which all ranks have at 0.
            order = np.concatenate([[0], order[order != 0]])
        return [batches[i] for i in order]

    def _series(self, kind: int) -> Iterator[Row]:
        """A kind's passes, one after the other."""
        for number in count():
            if self._buffer < 2:
                yield from self._kinds[kind]
            else:
                yield from _mixed(self._kinds[kind], self._buffer, np.random.default_rng([self._seed, kind, number]))


def _length(row: Row) -> int:
    return len(row["input_ids"])


def _mixed(rows: Iterable[Row], size: int, rng: np.random.Generator) -> Iterator[Row]:
    """The rows in another order, at most `size` of them held at a time."""
    held: list[Row] = []
    for row in rows:
        if len(held) < size:
            held.append(row)
            continue
        place = int(rng.integers(size))
        held[place], row = row, held[place]
        yield row
    for place in rng.permutation(len(held)):
        yield held[place]
