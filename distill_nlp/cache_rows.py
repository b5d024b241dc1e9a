"""The rows of a data set as the teacher's cache sees them: their tokens, their keys, and answers beside them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from distill_nlp.teacher import TEACHER_LOGITS
from distill_nlp.teacher_cache import KEY_BYTES

_CHUNK_ROWS = 8192
# Arrow counts the values of a list column in 32 bits, in each of its chunks.
CHUNK_VALUES = 2**31 - 1


def token_columns(dataset: Any, accepted: set[str] | None, tokenizer: Any, prefix: str = "") -> Any:
    """The columns that a teacher takes, as `DistillationTrainer` would hand them to it, under their bare names.

    Args:
        dataset: a tokenized `datasets.Dataset`.
        accepted: names that the teacher's forward declares; None if it takes any: those that the tokenizer makes.
        tokenizer: the teacher's.
        prefix: of its columns.

    Raises:
        ValueError: no `datasets.Dataset`, or no token ids in it.
    """
    if not hasattr(dataset, "with_format"):
        raise ValueError(
            f"the teacher's logits go beside the rows of a datasets.Dataset, got {type(dataset).__name__}; "
            "datasets.Dataset.from_list makes one"
        )
    wanted = set(tokenizer.model_input_names) if accepted is None else accepted
    names = {f"{prefix}{name}" for name in wanted - {"labels"}} - {TEACHER_LOGITS}
    columns = [name for name in dataset.column_names if name in names]
    if f"{prefix}input_ids" not in columns:
        raise ValueError(
            f"there are no token ids ({prefix}input_ids) in the data, only {', '.join(dataset.column_names)}"
        )
    tokens = dataset.select_columns(columns).with_format(None)
    return tokens.rename_columns({name: name.removeprefix(prefix) for name in columns}) if prefix else tokens


def keys_of(tokens: Any, prefix: str = "") -> tuple[list[bytes], np.ndarray]:
    """The keys and the lengths of all rows, see `row_keys`.

    Args:
        tokens: what `token_columns` gives.
        prefix: of the columns, for the errors.

    Raises:
        ValueError: columns that hold no lists of whole numbers, or lists of different lengths.
    """
    keys: list[bytes] = []
    lengths = [np.empty(0, dtype=np.int64)]
    for table in tokens.with_format("arrow").iter(batch_size=_CHUNK_ROWS):
        values, ends = {}, {}
        for name in table.column_names:
            lists = table.column(name).combine_chunks()
            flat = lists.flatten().to_numpy(zero_copy_only=False) if hasattr(lists, "value_lengths") else np.empty(0)
            if flat.dtype.kind not in "iu":
                raise ValueError(f"the column {prefix}{name} must hold lists of whole numbers, got {lists.type}")
            values[name] = flat
            ends[name] = np.cumsum(lists.value_lengths().to_numpy(zero_copy_only=False))
        for name in table.column_names:
            if not np.array_equal(ends[name], ends["input_ids"]):
                raise ValueError(f"the rows of {prefix}{name} are not as long as those of {prefix}input_ids")
        some_keys, some_lengths = row_keys(values, ends["input_ids"])
        keys += some_keys
        lengths.append(some_lengths)
    return keys, np.concatenate(lengths)


def row_keys(columns: Mapping[str, np.ndarray], ends: np.ndarray) -> tuple[list[bytes], np.ndarray]:
    """The key and the length of each row, both without the padding at its end.

    Args:
        columns: name -> whole numbers of all rows, one after the other; `attention_mask` is told by its name. A mask
            of ones is no part of the key: it says no more than that there is no padding.
        ends: (N,), where each row ends.
    """
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64) if len(ends) else ends.astype(np.int64)
    stops, gaps = ends.astype(np.int64), np.zeros(len(ends), dtype=bool)
    mask = columns.get("attention_mask")
    if mask is not None and not mask.all():
        real = np.flatnonzero(mask)
        rows = np.searchsorted(ends, real, side="right")
        # Of several values for one row numpy keeps the last. A row of padding alone is left as it is.
        stops = stops.copy()
        stops[rows] = real + 1
        gaps = np.bincount(rows, minlength=len(ends)) < stops - starts
    names = sorted(columns.keys() - {"attention_mask"})
    values = [memoryview(np.ascontiguousarray(columns[name], dtype="<i4")).cast("B") for name in names]
    plain = hashlib.blake2b(",".join(names).encode(), digest_size=KEY_BYTES)
    masked = hashlib.blake2b(",".join([*names, "attention_mask"]).encode(), digest_size=KEY_BYTES)
    keys = []
    for start, stop, gap in zip(starts.tolist(), stops.tolist(), gaps.tolist(), strict=True):
        key = (masked if gap else plain).copy()
        for column in values:
            key.update(column[4 * start : 4 * stop])
        if gap:
            key.update((mask[start:stop] != 0).tobytes())
        keys.append(key.digest())
    return keys, stops - starts


def with_column(dataset: Any, name: str, values: np.ndarray) -> Any:
    """The data set with (N, W) as a column of float32 lists, in the place of an older one of this name."""
    import pyarrow

    if name in dataset.column_names:
        dataset = dataset.remove_columns(name)
    count, width = values.shape
    step = max(CHUNK_VALUES // max(width, 1), 1)
    chunks = []
    for start in range(0, count, step):
        part = values[start : start + step]
        ends = pyarrow.array(np.arange(len(part) + 1) * width, type=pyarrow.int32())
        chunks.append(pyarrow.ListArray.from_arrays(ends, pyarrow.array(part.reshape(-1), type=pyarrow.float32())))
    column = pyarrow.chunked_array(chunks, type=pyarrow.list_(pyarrow.float32()))
    # Without one given, the data set would be known by a hash over the whole column.
    return dataset.add_column(name, column, new_fingerprint=os.urandom(8).hex())
