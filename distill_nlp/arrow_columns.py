"""What is known of all rows by a column alone, read from Arrow without the rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from transformers import TrainingArguments

from distill_nlp.losses.base import IGNORE_INDEX

# Rows that Arrow reads at a time: the token ids of a large data set are never in memory as a whole.
_CHUNK = 8192


def has_columns(data: Any) -> bool:
    """Whether data are a `datasets.Dataset`, or give their columns as one does."""
    return all(hasattr(data, name) for name in ("__len__", "column_names", "select_columns", "with_format"))


def known_lengths(data: Any, args: TrainingArguments) -> np.ndarray | None:
    """(N,) the numbers of the column `length_column_name`, else the lengths of `input_ids`; None without both.

    Example:
        >>> known_lengths(Dataset.from_dict({"input_ids": [[2, 5, 3], [2, 3]]}), TrainingArguments())
        array([3, 2], dtype=int32)
    """
    if not has_columns(data):
        return None
    name = next((n for n in (args.length_column_name, "input_ids") if n in data.column_names), None)
    return None if name is None else row_lengths(data, name)


def labeled_rows(data: Any) -> np.ndarray:
    """(N,) whether each row of a `datasets.Dataset` has a label: none of its entries is -100.

    Raises:
        ValueError: there is no column `labels`.

    Example:
        >>> labeled_rows(Dataset.from_dict({"labels": [1, -100, 0]}))
        array([ True, False,  True])
    """
    import pyarrow.compute as pc

    if "labels" not in data.column_names:
        raise ValueError(
            f"there is no column labels to tell labelled rows from unlabelled ones, only "
            f"{', '.join(data.column_names)}: rename the column, with {IGNORE_INDEX} where a row has no label"
        )
    found = [np.empty(0, dtype=bool)]
    for column in _chunks(data, "labels"):
        labeled = np.ones(len(column), dtype=bool)
        if hasattr(column, "flatten"):
            values = pc.list_flatten(column).to_numpy(zero_copy_only=False)
            labeled[pc.list_parent_indices(column).to_numpy()[values == IGNORE_INDEX]] = False
        else:
            labeled = column.to_numpy(zero_copy_only=False) != IGNORE_INDEX
        found.append(labeled)
    return np.concatenate(found)


def row_lengths(data: Any, name: str) -> np.ndarray:
    """(N,) the lengths of a column of lists, or the numbers of a column of lengths."""
    import pyarrow.compute as pc

    if name not in data.column_names:
        raise ValueError(
            f"group_by_length needs the column {name} (or a column of lengths, length_column_name), there is: "
            f"{', '.join(data.column_names)}; or set train_sampling_strategy to random"
        )
    found = [np.empty(0, dtype=np.int32)]
    for column in _chunks(data, name):
        numbers = pc.list_value_length(column) if hasattr(column, "flatten") else column
        found.append(numbers.to_numpy(zero_copy_only=False))
    return np.concatenate(found)


def _chunks(data: Any, name: str) -> Iterator[Any]:
    """A column as Arrow arrays, in order."""
    for table in data.select_columns([name]).with_format("arrow").iter(batch_size=_CHUNK):
        yield table.column(name).combine_chunks()
