"""Batches to measure on before training, without a trace in the order of training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset
from transformers import Trainer

from distill_nlp.projections import spread_rows


def sample_batches(trainer: Trainer, count: int) -> Iterator[dict[str, Any]]:
    """Batches of rows spread over the training data, or of a stream's first rows, this rank's share, on its device.

    Args:
        trainer: whose data, collator and batch size are used.
        count: batches, on each rank.

    Raises:
        ValueError: the data cannot be read by number.
    """
    data, collate, args = trainer.train_dataset, trainer.data_collator, trainer.args
    size, rank, ranks = args.per_device_train_batch_size, args.process_index, args.world_size
    if hasattr(data, "first"):
        # A stream of rows: the beginning of this rank's own.
        data, rank, ranks = data.first(count * size), 0, 1
    if hasattr(data, "column_names") and hasattr(data, "__len__"):
        data = trainer._remove_unused_columns(data, description="training")
    else:
        collate = trainer._get_collator_with_removed_columns(collate, description="training")
    rows = spread_rows(data, count * size * ranks)[rank::ranks]
    # A generator of its own: a loader draws a seed even where it shuffles nothing.
    loader = DataLoader(Subset(data, rows), size, collate_fn=collate, generator=torch.Generator())
    return map(trainer._prepare_inputs, loader)
