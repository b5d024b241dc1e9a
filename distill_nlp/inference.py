"""Batched prediction with any sequence classifier."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from distill_nlp.capture import forward_with_features
from distill_nlp.losses.base import POOLINGS
from distill_nlp.modeling import accepted_arguments
from distill_nlp.out_of_memory import free_cached, is_out_of_memory, memory_errors

logger = logging.getLogger(__name__)


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


def batched_answers(
    model: nn.Module,
    tokenizer: Any,
    batches: Iterable[Sequence[dict[str, Any]]],
    autocast: torch.dtype | None = None,
    states: Sequence[tuple[int, str]] = (),
) -> Iterator[list[np.ndarray]]:
    """The logits of each batch of encoded rows, then its pooled states, float32, in the order of the batches.

    A batch is given out when the next one has been started: an accelerator works on while rows are being padded.

    Args:
        model: a classifier; put into eval, run where it is, in its own dtype.
        tokenizer: pads.
        batches: of encoded rows (`input_ids`, ...).
        autocast: dtype to run under, none where not given.
        states: (layer, "first" or "mean"); layers as `forward_with_features` counts them.

    Returns:
        Per batch (B, C), then (B, H) for each of `states`.
    """
    model.eval()
    # An exported model has no parameters, and answers on the CPU.
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    layers = {layer for layer, _ in states}
    started: list[torch.Tensor] | None = None
    for rows in batches:
        inputs = collate(tokenizer, rows, model, device)
        with torch.inference_mode(), torch.autocast(device.type, autocast, enabled=autocast is not None):
            features = forward_with_features(model, inputs, layers, set())
        # As the losses pool, which run without autocast.
        with torch.inference_mode():
            mask = inputs.get("attention_mask")
            pooled = [POOLINGS[how](features.hidden_states[layer], mask) for layer, how in states]
        if started is not None:
            yield _arrays(started)
        started = [features.logits, *pooled]
    if started is not None:
        yield _arrays(started)


def encoded_rows(
    tokenizer: Any, texts: Sequence[str], pairs: Sequence[str] | None, max_length: int | None
) -> list[dict[str, Any]]:
    """Token ids of N texts as rows for `predict_logits`, cut and not padded.

    Args:
        tokenizer: of the model.
        texts: N of them, one at least.
        pairs: the N second texts, or None. With them the rows have `token_type_ids`, whatever the tokenizer makes of
            its own accord: it is for the model to leave them out.
        max_length: of a row in tokens, the template's included; None: no limit.
    """
    columns = [list(texts)] if pairs is None else [list(texts), list(pairs)]
    types = None if pairs is None else True
    encoded = tokenizer(*columns, truncation=True, max_length=max_length, return_token_type_ids=types)
    return [{key: encoded[key][i] for key in encoded} for i in range(len(texts))]


def _arrays(tensors: Sequence[torch.Tensor]) -> list[np.ndarray]:
    return [tensor.float().cpu().numpy() for tensor in tensors]


def batched_logits(
    model: nn.Module, tokenizer: Any, batches: Iterable[Sequence[dict[str, Any]]], autocast: torch.dtype | None = None
) -> Iterator[np.ndarray]:
    """The logits alone, see `batched_answers`."""
    return (logits for (logits,) in batched_answers(model, tokenizer, batches, autocast))


def predict_logits(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[dict[str, Any]],
    batch_size: int = 64,
    description: str | None = None,
    autocast: torch.dtype | None = None,
) -> np.ndarray:
    """The logits of every row, in the order of the rows: (N, C), float32.

    Where the memory does not suffice for a batch, it goes on with half as many rows.

    Args:
        model: a classifier; put into eval, run where it is, in its own dtype.
        tokenizer: pads.
        rows: encoded rows (`input_ids`, ...), e.g. a tokenized `datasets.Dataset` or a list of dicts.
        batch_size: rows of one forward pass.
        description: shown with a progress bar; no bar without.
        autocast: dtype to run under, none where not given.

    Raises:
        DistillError: the memory does not suffice for one row.
    """
    rows = rows if isinstance(rows, list) else rows.to_list()
    while batch_size > 1:
        try:
            return _predict(model, tokenizer, rows, batch_size, description, autocast)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        batch_size //= 2
        logger.warning("out of memory; going on with batches of %d", batch_size)
        free_cached()
    with memory_errors(description or "prediction", "one text of this length is too much for this device: cut texts"):
        return _predict(model, tokenizer, rows, 1, description, autocast)


def _predict(
    model: nn.Module,
    tokenizer: Any,
    rows: list[dict[str, Any]],
    batch_size: int,
    description: str | None,
    autocast: torch.dtype | None,
) -> np.ndarray:
    from tqdm.auto import tqdm

    batches = length_sorted_batches([len(row["input_ids"]) for row in rows], batch_size)
    found = batched_logits(model, tokenizer, ([rows[i] for i in indices] for indices in batches), autocast)
    bar = tqdm(found, total=len(batches), desc=description, disable=True if description is None else None, leave=False)
    logits: np.ndarray | None = None
    for indices, outputs in zip(batches, bar, strict=True):
        if logits is None:
            logits = np.empty((len(rows), outputs.shape[-1]), dtype=np.float32)
        logits[indices] = outputs
    return np.empty((0, 0), dtype=np.float32) if logits is None else logits
