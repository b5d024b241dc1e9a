"""The labels of a split, checked row by row: one class per row, or any number of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from json import JSONDecodeError, loads
from typing import Any

from distill_nlp.config import DataSection
from distill_nlp.errors import UsageError, shown
from distill_nlp.labels import in_order, moved
from distill_nlp.losses.base import IGNORE_INDEX, MULTI_LABEL, SINGLE_LABEL, ProblemType

_LISTS = (
    'a row of several labels lists their indices or names, as [0, 3] or ["joy"], and [] where none applies; a vector '
    "with a number for each class is not taken"
)

# A single number for all labels is taken for a class beside others up to here.
_MANY = 1000


def problem_type_of(dataset: Any) -> ProblemType:
    """The kind of task by the column `labels`: lists of labels are multi-label."""
    return MULTI_LABEL if hasattr(dataset.features["labels"], "feature") else SINGLE_LABEL


def check_same_kind(dataset: Any, config: DataSection, split: str, wanted: ProblemType) -> None:
    """Refuses a split of lists beside a training split of single labels, and the other way round.

    Raises:
        UsageError: they differ.
    """
    # A column without any label has no kind; that is said with its row.
    if getattr(dataset.features["labels"], "dtype", None) == "null" or problem_type_of(dataset) == wanted:
        return
    kinds = {SINGLE_LABEL: "one label per row", MULTI_LABEL: "lists of labels"}
    raise UsageError(
        f"data: {config.label_column} holds {kinds[problem_type_of(dataset)]} in the split {split!r}, and "
        f"{kinds[wanted]} in {config.train_split!r}; write them alike in all splits"
    )


def label_names(train: Any, config: DataSection) -> list[str]:
    """Names of the classes: as the config says, as the data set says, or from the labels of train.

    Raises:
        UsageError: names that contradict each other or stand twice, numbers with gaps, or fewer than two classes
            in lists.
    """
    feature, several = train.features["labels"], problem_type_of(train) == MULTI_LABEL
    known = list(getattr(feature.feature if several else feature, "names", None) or [])
    if config.label_names is not None:
        if known and len(known) != len(config.label_names):
            raise UsageError(
                f"data.label_names has {len(config.label_names)} names, the data set has {len(known)} classes: {known}"
            )
        # Labels are numbers there: renamed in this way, all answers of the model would be wrong, and no score show it.
        if elsewhere := moved(known, config.label_names):
            raise UsageError(
                f"data.label_names {config.label_names} has {', '.join(elsewhere)} in another place than the data "
                f"set's own classes {known}: leave data.label_names out, or write it in their order"
            )
        if len(set(config.label_names)) < len(config.label_names):
            raise UsageError(f"data.label_names: a name stands twice in {config.label_names}")
        return list(config.label_names)
    if known:
        return known
    labels = train["labels"]
    _refuse_no_labels(enumerate(labels), several, config.train_split)
    names = _names_from({label for row in labels for label in row or ()} if several else set(labels), config)
    if several and len(names) < 2:
        raise UsageError(
            f"data: the lists of {config.train_split} name {len(names)} classes ({names}), at least 2 are needed; give "
            "data.label_names, or for one class a column of 0 and 1"
        )
    return names


def _names_from(values: set[Any], config: DataSection) -> list[str]:
    if all(isinstance(v, str) for v in values):
        _refuse_lists_in_text(values, config)
        return in_order(values)
    if all(isinstance(v, int) and not isinstance(v, bool) for v in values) and min(values) >= 0:
        # Of a single one, that all rows are alike is said instead. No counting up to a label of a billion.
        if len(values) <= max(values) and (len(values) > 1 or max(values) > _MANY):
            missing = next(i for i, value in enumerate([*sorted(values), -1]) if i != value)
            raise UsageError(
                f"data: the labels of {config.train_split} are {shown(sorted(values)[:20])}, and no row has {missing}; "
                "number them from 0 without gaps, or set data.label_names"
            )
        return [f"LABEL_{i}" for i in range(max(values) + 1)]
    if all(isinstance(v, bool) for v in values):
        return ["false", "true"]
    # What is wrong, and in which row, is said where the labels are mapped.
    return ["LABEL_0", "LABEL_1"]


def _refuse_lists_in_text(values: set[str], config: DataSection) -> None:
    """A csv has no lists: each different text of one would silently become a class."""
    if values and all(_is_list(value) for value in values):
        raise UsageError(
            f"data: {config.label_column} of {config.train_split} holds lists as text, such as {min(values)!r}; write "
            "them as lists into jsonl or parquet"
        )


def _is_list(text: str) -> bool:
    try:
        return isinstance(loads(text.replace("'", '"')), list)
    except JSONDecodeError:
        return False


def with_labels(dataset: Any, config: DataSection, split: str, names: list[str]) -> Any:
    """Maps labels to class indices, or lists of labels to (C,) numbers 0 and 1, each checked.

    Raises:
        UsageError: a label is missing, unknown, out of range or no label at all; with split and row.
    """
    from datasets import ClassLabel

    problem_type = problem_type_of(dataset)
    labels = mapped_labels(list(dataset["labels"]), problem_type, config, split, names)
    if problem_type == MULTI_LABEL:
        return with_vectors(dataset, labels)
    plain = dataset.remove_columns("labels").add_column("labels", labels)
    return plain.cast_column("labels", ClassLabel(names=names))


def mapped_labels(
    values: list[Any], problem_type: ProblemType, config: DataSection, split: str, names: list[str], first_row: int = 0
) -> list[Any]:
    """Class indices, or (C,) numbers 0.0 and 1.0, of labels as they were written, each checked.

    Args:
        values: of the column, those of a part of the rows.
        problem_type: whether they are lists.
        config: names the columns.
        split: that they are of, for messages.
        names: of the classes by index.
        first_row: number of the first value's row in the split.

    Raises:
        UsageError: a label is missing, unknown, out of range or no label at all; with split and row.

    Example:
        >>> mapped_labels(["good", "bad"], "single_label_classification", config, "train", ["bad", "good"])
        [1, 0]
    """
    several = problem_type == MULTI_LABEL
    numbered = list(enumerate(values, first_row))
    # First of all: in a csv, one missing label turns the others into floats.
    for row, value in numbered:
        if value is None or (isinstance(value, float) and math.isnan(value)):
            hint = "; [] says that none applies" if several else ""
            raise UsageError(f"data: row {row} of the split {split!r} has no label in {config.label_column}{hint}")
    index = {name: i for i, name in enumerate(names)}
    _refuse_no_labels(numbered, several, split)
    _refuse_mixed(numbered, split)
    if several:
        _refuse_vectors(numbered, split)
        rows = [{_in_list(value, _where(split, row), index) for value in found} for row, found in numbered]
        return [[float(c in row) for c in range(len(names))] for row in rows]
    labels = []
    for row, value in numbered:
        if not isinstance(value, bool | int | str):
            raise UsageError(
                f"{_where(split, row)} has the label {value!r} ({type(value).__name__}); a class is a whole number or "
                "a string"
            )
        labels.append(_index_of(int(value) if isinstance(value, bool) else value, _where(split, row), index))
    return labels


def _refuse_no_labels(numbered: Iterable[tuple[int, Any]], several: bool, split: str) -> None:
    """Lists and objects, which can be no label; what else is wrong with a label is said where it is mapped."""
    for row, value in numbered:
        for label in value or () if several else [value]:
            if isinstance(label, list | dict) or (several and label is None):
                hint = _LISTS if several else "a class is a whole number or a string"
                among = " among its labels" if several else " for a label"
                raise UsageError(f"{_where(split, row)} has {shown(label)} ({type(label).__name__}){among}; {hint}")


def _refuse_mixed(numbered: list[tuple[int, Any]], split: str) -> None:
    """Numbers and names side by side: 1 may be the second class, or a class named 1."""
    first: dict[bool, tuple[int, Any]] = {}
    for row, value in numbered:
        for label in value if isinstance(value, list) else [value]:
            first.setdefault(isinstance(label, str), (row, label))
    if len(first) == 2:
        (row, label), (other, name) = first[False], first[True]
        raise UsageError(
            f"data: row {row} of the split {split!r} has the label {shown(label)}, and row {other} {shown(name)}; "
            "write all labels as numbers or all as names"
        )


def with_vectors(dataset: Any, rows: list[list[float]]) -> Any:
    """The data set with (N, C) float32 `labels`, in the place of any others; -100 throughout: a row has none."""
    from datasets import List, Value

    if "labels" in dataset.column_names:
        dataset = dataset.remove_columns("labels")
    return dataset.add_column("labels", rows).cast_column("labels", List(Value("float32")))


def unlabeled(dataset: Any, problem_type: ProblemType, classes: int) -> Any:
    """The data set with `labels` that say that no row has one."""
    if problem_type == MULTI_LABEL:
        return with_vectors(dataset, [[float(IGNORE_INDEX)] * classes] * len(dataset))
    return dataset.add_column("labels", [IGNORE_INDEX] * len(dataset))


def _where(split: str, row: int) -> str:
    return f"data: row {row} of the split {split!r}"


def _in_list(value: Any, where: str, index: dict[str, int]) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise UsageError(f"{where} has {value!r} ({type(value).__name__}) among its labels; {_LISTS}")
    return _index_of(value, where, index)


def _index_of(value: int | str, where: str, index: dict[str, int]) -> int:
    if isinstance(value, str):
        if value not in index:
            raise UsageError(f"{where} has the label {value!r}, which is not among {list(index)} (data.label_names)")
        return index[value]
    if not 0 <= value < len(index):
        hint = "; rows without a label go into data.unlabeled" if value < 0 else ""
        raise UsageError(f"{where} has the label {value}, outside 0..{len(index) - 1} ({list(index)}){hint}")
    return value


def _refuse_vectors(numbered: list[tuple[int, list[Any]]], split: str) -> None:
    """Multi-hot vectors of whole numbers would pass as lists of the classes 0 and 1."""
    values = [value for _, value in numbered]
    alike = len({len(labels) for labels in values}) == 1 and {label for labels in values for label in labels} == {0, 1}
    repeats = ((row, labels) for row, labels in numbered if len(set(labels)) < len(labels))
    if alike and (found := next(repeats, None)) is not None:
        raise UsageError(f"{_where(split, found[0])} has the labels {found[1]}; {_LISTS}")


def check_classes(train: Any, split: str, names: list[str], notes: list[str]) -> None:
    """Refuses rows that are all labeled alike, and notes which classes no list names.

    Raises:
        UsageError: there is nothing to tell apart.
    """
    if problem_type_of(train) == SINGLE_LABEL:
        present = set(train["labels"])
        if len(present) < 2:
            only = names[next(iter(present))]
            raise UsageError(
                f"data: all {len(train)} rows of the split {split!r} have the label {only!r}; a classifier needs two"
            )
        return
    counts = Counter(map(tuple, train["labels"]))
    if len(counts) < 2:
        only = [name for name, value in zip(names, next(iter(counts)), strict=True) if value]
        raise UsageError(
            f"data: all {len(train)} rows of the split {split!r} have the labels {only}; a classifier needs rows that "
            "differ"
        )
    if absent := _absent(counts, names):
        notes.append(f"no row of {split} has {', '.join(absent)}")


def _absent(found: Iterable[tuple[float, ...]], names: list[str]) -> list[str]:
    present = {i for row in found for i, value in enumerate(row) if value}
    return [name for i, name in enumerate(names) if i not in present]
