"""Batched prediction with any sequence classifier."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from distill_nlp.capture import logits_of
from distill_nlp.modeling import accepted_arguments


def collate(tokenizer: Any, rows: Sequence[dict[str, Any]], model: nn.Module, device: Any) -> dict[str, torch.Tensor]:
    """Pads encoded rows to the longest and keeps what the model takes, on its device."""
    accepted = accepted_arguments(model)
    keys = [k for k in rows[0] if k != "labels" and (accepted is None or k in accepted)]
    batch = tokenizer.pad([{k: row[k] for k in keys} for row in rows], return_tensors="pt")
    return {k: v.to(device) for k, v in batch.items()}


def length_sorted_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Row indices in batches of like lengths: little padding. Longest first, so that out of memory shows at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def batched_logits(
    model: nn.Module,
    tokenizer: Any,
    batches: Iterable[Sequence[dict[str, Any]]],
    autocast: torch.dtype | None = None,
) -> Iterator[np.ndarray]:
    """The logits of each batch of encoded rows, float32, in the order of the batches.

    A batch is given out when the next one has been started: an accelerator works on while rows are being padded.
    """
    model.eval()
    device = next(model.parameters()).device
    started: torch.Tensor | None = None
    for rows in batches:
        with torch.inference_mode(), torch.autocast(device.type, autocast, enabled=autocast is not None):
            logits = logits_of(model(**collate(tokenizer, rows, model, device)))
        if started is not None:
            yield started.float().cpu().numpy()
        started = logits
    if started is not None:
        yield started.float().cpu().numpy()


def predict_logits(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[dict[str, Any]],
    batch_size: int = 64,
    description: str | None = None,
) -> np.ndarray:
    """The logits of every row, in the order of the rows: (N, C), float32.

    Args:
        model: a classifier; put into eval, run where it is, in its own dtype.
        tokenizer: pads.
        rows: encoded rows (`input_ids`, ...), e.g. a tokenized `datasets.Dataset` or a list of dicts.
        batch_size: rows of one forward pass.
        description: shown with a progress bar; no bar without.
    """
    from tqdm.auto import tqdm

    rows = rows if isinstance(rows, list) else rows.to_list()
    batches = length_sorted_batches([len(row["input_ids"]) for row in rows], batch_size)
    found = batched_logits(model, tokenizer, ([rows[i] for i in indices] for indices in batches))
    bar = tqdm(found, total=len(batches), desc=description, disable=True if description is None else None, leave=False)
    logits: np.ndarray | None = None
    for indices, outputs in zip(batches, bar, strict=True):
        if logits is None:
            logits = np.empty((len(rows), outputs.shape[-1]), dtype=np.float32)
        logits[indices] = outputs
    return np.empty((0, 0), dtype=np.float32) if logits is None else logits
