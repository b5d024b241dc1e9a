"""The order of rows: batches of like lengths, and batches that each hold the same part of unlabelled rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch.utils.data import Sampler
from transformers import TrainingArguments

from distill_nlp.arguments import setting_of
from distill_nlp.arrow_columns import has_columns, known_lengths, labeled_rows, row_lengths
from distill_nlp.losses.base import IGNORE_INDEX
from distill_nlp.row_numbers import numbers

STRATEGIES = ("random", "sequential", "group_by_length")
# Batches that are sorted by length together, as Transformers' own LengthGroupedSampler has it.
_MEGA_BATCH = 50


class GroupedSampler(Sampler[int]):
    """Row numbers such that the rows of a batch have like lengths, in a new order each epoch.

    As Transformers' own for `group_by_length`, but the order depends on the seed and the epoch alone. That one draws
    from each process's global generator: ranks whose generators part, as by dropout on a CPU, take overlapping rows,
    and a training that goes on inside an epoch gets another order than it had.

    Args:
        lengths: (N,) tokens of each row.
        batch_size: rows of a batch on one device.
        seed: of the order, the same on all ranks.
        epoch: gives the number of the epoch that begins, from 0.
        ranks: batches that run at the same time; they are of like lengths.

    Example:
        >>> list(GroupedSampler(np.array([9, 2, 8, 3]), batch_size=2, seed=0))
        [0, 2, 3, 1]
    """

    def __init__(
        self,
        lengths: np.ndarray,
        batch_size: int,
        seed: int,
        epoch: Callable[[], int] = lambda: 0,
        ranks: int = 1,
    ) -> None:
        self._lengths, self._size, self._ranks = lengths, batch_size, ranks
        self._seed, self._epoch = seed % 2**64, epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        epoch = self._epoch()
        full = (count := len(self._lengths)) // self._size
        rows = np.random.default_rng([self._seed, 0, epoch]).permutation(count).astype(np.min_scalar_type(count))
        # What is left over for a last, smaller batch is drawn like any other row.
        last = rows[full * self._size :]
        rows = _sorted(rows[: full * self._size], self._lengths, self._size, full, self._ranks)
        batches = _shuffled(rows.reshape(full, self._size), self._lengths, self._ranks, [self._seed, 2, epoch])
        return numbers(np.concatenate([batches.reshape(-1), last]))


class MixedSampler(Sampler[int]):
    """Row numbers such that each batch holds `round(ratio * batch_size)` unlabelled rows, at least one of each kind.

    An epoch has as many rows as the data. Each kind is an endless series of passes over its rows, each in a new order,
    and an epoch goes on where the one before stopped: no row comes again before all of its kind came. It may come twice
    in the batch in which its kind begins anew. Rows that the loader drops (`drop_last`) count as having come; those
    that accelerate appends to fill the last batches of several ranks do not.

    The last batch, if smaller, keeps the ratio as nearly as it can. Within a batch the kinds are spread evenly, so that
    a piece of it (`split_batches`, or a batch that accelerate completes) keeps the ratio to within a row.

    The order depends on the seed and the epoch alone, and takes nothing from the global generators.

    Args:
        labeled: (N,) whether a row has a label.
        batch_size: rows of a batch on one device.
        ratio: part of unlabelled rows, in (0, 1).
        seed: of the order, the same on all ranks.
        epoch: gives the number of the epoch that begins, from 0. It is asked rather than told: on a resumed run of
            several ranks, accelerate's `set_epoch` stops at its wrappers of the batch sampler and never comes here.
        shuffle: False keeps the order of the data within each kind.
        lengths: (N,) tokens of each row; where given, rows of like lengths go together in both kinds, the longest of
            the epoch in its first batch.
        ranks: batches that run at the same time; with lengths, they are of like lengths.

    Raises:
        ValueError: no row of one of the kinds, or a batch too small for both.

    Example:
        >>> labeled = np.array([True, True, False, False, False, False])
        >>> list(MixedSampler(labeled, batch_size=3, ratio=0.7, seed=0, shuffle=False))
        [0, 2, 3, 1, 4, 5]
    """

    def __init__(
        self,
        labeled: np.ndarray,
        batch_size: int,
        ratio: float,
        seed: int,
        epoch: Callable[[], int] = lambda: 0,
        shuffle: bool = True,
        lengths: np.ndarray | None = None,
        ranks: int = 1,
    ) -> None:
        if batch_size < 2:
            raise ValueError(
                f"unlabeled_ratio needs at least 2 rows in a batch, one of each kind, got {batch_size}: raise "
                "per_device_train_batch_size, or leave unlabeled_ratio out"
            )
        # Labelled rows, then unlabelled ones.
        self._kinds = np.flatnonzero(labeled), np.flatnonzero(~labeled)
        if not len(self._kinds[0]):
            raise ValueError("no row has a label: unlabeled_ratio mixes labelled rows with unlabelled ones")
        if not len(self._kinds[1]):
            raise ValueError(
                f"no row is unlabelled: for unlabeled_ratio add rows with the label {IGNORE_INDEX}, or leave it out"
            )
        self._rows, self._size, self._ratio = len(labeled), batch_size, ratio
        self._seed, self._epoch = seed % 2**64, epoch
        self._shuffle, self._lengths, self._ranks = shuffle, lengths, ranks

    def __len__(self) -> int:
        return self._rows

    def __iter__(self) -> Iterator[int]:
        return numbers(self._order(self._epoch()))

    def _order(self, epoch: int) -> np.ndarray:
        """(N,) row numbers of one epoch."""
        full, rest = divmod(self._rows, self._size)
        whole, last = batch_pattern(self._size, self._ratio), batch_pattern(rest, self._ratio)
        drawn = []
        for kind, is_kind in enumerate((~whole, whole)):
            per_batch, in_last = is_kind.sum(), (last == kind).sum()
            rows = self._draw(kind, epoch, full * per_batch + in_last)
            if self._lengths is not None:
                rows = _sorted(rows, self._lengths, per_batch, full, self._ranks)
            drawn.append(rows)
        batches = np.empty((full, self._size), dtype=np.int64)
        end = np.empty(rest, dtype=np.int64)
        for kind, rows in enumerate(drawn):
            columns = np.flatnonzero(whole == kind)
            batches[:, columns] = rows[: full * len(columns)].reshape(full, len(columns))
            end[last == kind] = rows[full * len(columns) :]
        if self._lengths is not None:
            batches = _shuffled(batches, self._lengths, self._ranks, [self._seed, 2, epoch])
        return np.concatenate([batches.reshape(-1), end])

    def _draw(self, kind: int, epoch: int, count: int) -> np.ndarray:
        """(count,) rows of a kind: this epoch's part of the endless series of passes."""
        rows = self._kinds[kind]
        first, skipped = divmod(epoch * count, len(rows))
        passes = range(first, first + -(-(skipped + count) // len(rows)))
        series = [
            np.random.default_rng([self._seed, kind, number]).permutation(rows) if self._shuffle else rows
            for number in passes
        ]
        return np.concatenate([rows[:0], *series])[skipped : skipped + count]


def batch_pattern(size: int, ratio: float) -> np.ndarray:
    """(size,) whether a place of a batch is for an unlabelled row, evenly spread; at least one of each kind."""
    unlabeled = round(ratio * size)
    if size > 1:
        unlabeled = min(max(unlabeled, 1), size - 1)
    return np.diff(np.arange(size + 1) * unlabeled // max(size, 1)).astype(bool)


def _sorted(rows: np.ndarray, lengths: np.ndarray, per_batch: int, full: int, ranks: int) -> np.ndarray:
    """The rows, in each mega-batch the longest first; the last mega-batch holds what is left over."""
    # The same number of batches whatever there is of a kind in each, so that the k-th longest meet in one batch.
    mega = max(1, min(full // (4 * ranks), _MEGA_BATCH)) * ranks
    cuts = np.arange(1, full // mega) * mega * per_batch
    parts = np.split(rows, cuts)
    return np.concatenate([part[np.argsort(-lengths[part], kind="stable")] for part in parts])


def _shuffled(batches: np.ndarray, lengths: np.ndarray, ranks: int, seed: list[int]) -> np.ndarray:
    """Those of one step of all ranks stay together; the ones with the longest row come first."""
    steps = len(batches) // ranks
    if not steps:
        return batches
    together = batches[: steps * ranks].reshape(steps, -1)
    together = np.random.default_rng(seed).permutation(together)
    longest = lengths[together].max(axis=1).argmax()
    together[[0, longest]] = together[[longest, 0]]
    return np.concatenate([together.reshape(-1, batches.shape[1]), batches[steps * ranks :]])


def grouped_sampler(
    data: Any, args: TrainingArguments, batch_size: int, epoch: Callable[[], int]
) -> GroupedSampler | None:
    """The sampler of `group_by_length`, or None where the data have no `known_lengths`.

    The seed is `data_seed`, else `seed`.

    Args:
        data, args, batch_size, epoch: as of `mixed_sampler`.

    Example:
        >>> sampler = grouped_sampler(train, trainer.args, 16, epoch=lambda: int(trainer.state.epoch or 0))
    """
    lengths = known_lengths(data, args)
    return None if lengths is None else GroupedSampler(lengths, batch_size, _seed(args), epoch, args.world_size)


def mixed_sampler(data: Any, args: TrainingArguments, batch_size: int, epoch: Callable[[], int]) -> MixedSampler:
    """The sampler that `unlabeled_ratio` and `train_sampling_strategy` ask for.

    Lengths are those of the column `length_column_name`, else of `input_ids`. The seed is `data_seed`, else `seed`.

    Args:
        data: a `datasets.Dataset` with `labels`, -100 where there is none.
        args: with an `unlabeled_ratio`.
        batch_size: rows of a batch on one device.
        epoch: gives the number of the epoch that begins, from 0.

    Raises:
        ValueError: data, batch size or strategy that cannot serve; with what to do.

    Example:
        >>> sampler = mixed_sampler(train, trainer.args, 16, epoch=lambda: int(trainer.state.epoch or 0))
    """
    strategy = args.train_sampling_strategy
    if strategy not in STRATEGIES:
        raise ValueError(
            f"unlabeled_ratio goes with train_sampling_strategy {', '.join(STRATEGIES)}, got {strategy}: choose one of "
            "them, or leave unlabeled_ratio out"
        )
    if not has_columns(data):
        raise ValueError(
            f"unlabeled_ratio needs a datasets.Dataset whose rows can be picked by number, got {type(data).__name__}: "
            "make one by datasets.Dataset.from_list or from_generator, or leave unlabeled_ratio out"
        )
    labeled = labeled_rows(data)
    lengths = None
    if strategy == "group_by_length":
        known = args.length_column_name in data.column_names
        lengths = row_lengths(data, args.length_column_name if known else "input_ids")
    return MixedSampler(
        labeled,
        batch_size,
        setting_of(args, "unlabeled_ratio"),
        seed=_seed(args),
        epoch=epoch,
        shuffle=strategy != "sequential",
        lengths=lengths,
        ranks=args.world_size,
    )


def _seed(args: TrainingArguments) -> int:
    return args.seed if args.data_seed is None else args.data_seed
