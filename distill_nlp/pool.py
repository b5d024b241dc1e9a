"""What a teacher's cached answers say of unlabelled rows: which to keep, and labels for them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distill_nlp.arrow_columns import labeled_rows
from distill_nlp.teacher import TEACHER_LOGITS


@dataclass(frozen=True)
class PoolCounts:
    """What became of the unlabelled rows at a gate.

    Args:
        threshold: the least confidence of a row that is kept.
        kept, dropped: numbers of rows.
        classes: of the kept ones, how many the teacher gives each label, in the order of the logits' labels.
    """

    threshold: float
    kept: int
    dropped: int
    classes: tuple[int, ...]

    def summary(self, names: Sequence[str]) -> str:
        """One line for the terminal.

        Args:
            names: of the labels, in the order of `classes`.

        Raises:
            ValueError: not as many names as labels.

        Example:
            >>> PoolCounts(0.9, kept=3, dropped=1, classes=(1, 2)).summary(["bad", "good"])
            '3 of 4 unlabelled rows kept at a confidence of 0.9, 1 dropped; by the teacher: bad 33.3%, good 66.7%'
        """
        if len(names) != len(self.classes):
            raise ValueError(f"{len(self.classes)} names are needed, one for each label, got {list(names)}")
        shares = [f"{name} {rows / self.kept:.1%}" for name, rows in zip(names, self.classes, strict=True)]
        line = (
            f"{self.kept:,} of {self.kept + self.dropped:,} unlabelled rows kept at a confidence of "
            f"{self.threshold:g}, {self.dropped:,} dropped; by the teacher: {', '.join(shares)}"
        )
        if max(self.classes) == self.kept:
            line += "; WARNING: only one class is left, which teaches a student to answer it: lower the threshold"
        return line


def confidence(logits: np.ndarray) -> np.ndarray:
    """The largest softmax probability of each row.

    Args:
        logits: (N, C).

    Returns:
        (N,) in float64, in [1/C, 1].

    Example:
        >>> confidence(np.array([[0.0, 0.0], [1e4, 0.0]]))
        array([0.5, 1. ])
    """
    logits = np.asarray(logits, dtype=np.float64)
    return 1.0 / np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1)


def drop_unconfident(
    dataset: Any, threshold: float, label_order: Sequence[int] | None = None
) -> tuple[Any, PoolCounts]:
    """Drops the unlabelled rows on which the teacher's confidence is below a threshold.

    Labelled rows stay, and so does the order of the rows.

    Args:
        dataset: a `datasets.Dataset` with `labels`, -100 where there is none, and `teacher_logits`.
        threshold: in (0, 1]; with C labels no confidence is below 1/C.
        label_order: for each student label the index of the teacher's logit, as `labels.label_order` gives it; None
            where the order is the same.

    Raises:
        ValueError: a threshold out of its range, no row that reaches it (with the largest confidence), or rows and
            logits that have no classes to be confident of.

    Example:
        >>> train, counts = drop_unconfident(cache_teacher_logits(teacher, train, tokenizer, "teacher_cache"), 0.9)
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"the confidence threshold must be above 0 and at most 1, got {threshold}")
    unlabeled, logits = _pool(dataset, label_order)
    if _has_lists(dataset):
        raise ValueError("the rows have lists of labels: the teacher's confidence is defined for one label per row")
    certainty = confidence(logits[unlabeled])
    enough = certainty >= threshold
    if not enough.any():
        raise ValueError(
            f"the teacher is confident at {threshold} of none of {len(unlabeled):,} unlabelled rows, at most at "
            f"{certainty.max():.4f}: lower the threshold"
        )
    answers = logits[unlabeled[enough]].argmax(axis=1)
    classes = np.bincount(answers, minlength=logits.shape[1]).tolist()
    kept = np.ones(len(dataset), dtype=bool)
    kept[unlabeled[~enough]] = False
    counts = PoolCounts(threshold, int(enough.sum()), int((~enough).sum()), tuple(classes))
    return dataset.select(np.flatnonzero(kept)), counts


def add_pseudo_labels(dataset: Any, label_order: Sequence[int] | None = None) -> tuple[Any, int]:
    """Gives unlabelled rows the teacher's answer as their label; labelled rows keep theirs.

    Where rows have (C,) labels, each class applies whose probability is above 0.5.

    Args:
        dataset: a `datasets.Dataset` with `labels`, -100 where there is none, and `teacher_logits`.
        label_order: for each student label the index of the teacher's logit, as `labels.label_order` gives it; None
            where the order is the same.

    Returns:
        The data set, and the number of rows that got a label.

    Raises:
        ValueError: no unlabelled row, or logits that have no classes, or others than the labels.

    Example:
        >>> train, count = add_pseudo_labels(train, label_order(teacher.config, student.config))
    """
    import pyarrow
    from datasets import Dataset

    unlabeled, logits = _pool(dataset, label_order)
    # `add_column` would write all columns anew for a data set whose rows were selected.
    table = dataset.with_format("arrow")[:]
    place, kind = table.column_names.index("labels"), table.schema.field("labels")
    if _has_lists(dataset):
        column = _with_lists(table.column("labels"), unlabeled, logits[unlabeled] > 0)
    else:
        labels = table.column("labels").to_numpy().copy()
        labels[unlabeled] = logits[unlabeled].argmax(axis=1)
        column = pyarrow.array(labels, type=kind.type)
    table = table.set_column(place, kind, column)
    # Without a fingerprint given, the data set would be known by a hash over all of it.
    labeled = Dataset(table, info=dataset.info, split=dataset.split, fingerprint=os.urandom(8).hex())
    shape = dataset.format
    return labeled.with_format(
        shape["type"], shape["columns"], shape["output_all_columns"], **shape["format_kwargs"]
    ), len(unlabeled)


def _has_lists(dataset: Any) -> bool:
    return hasattr(dataset.features["labels"], "feature")


def _with_lists(column: Any, rows: np.ndarray, answers: np.ndarray) -> Any:
    """The column of (N, C) labels with other ones in these rows."""
    import pyarrow
    import pyarrow.compute as pc

    sizes = pc.list_value_length(column).to_numpy()
    if (wrong := sizes != answers.shape[1]).any():
        raise ValueError(
            f"the rows must have a label for each of the teacher's {answers.shape[1]} classes, got {sizes[wrong][0]}"
        )
    labels = pc.list_flatten(column).to_numpy().reshape(len(sizes), -1).copy()
    labels[rows] = answers
    return pyarrow.array(list(labels), type=column.type)


def _pool(dataset: Any, label_order: Sequence[int] | None) -> tuple[np.ndarray, np.ndarray]:
    """(M,) the unlabelled rows, and (N, C) the teacher's logits of all rows in the order of the student's labels."""
    unlabeled = np.flatnonzero(~labeled_rows(dataset))
    if not len(unlabeled):
        raise ValueError("there are no unlabelled rows (label -100) for the teacher's answers to judge")
    logits = cached_logits(dataset)
    if logits.shape[1] < 2:
        raise ValueError("the teacher gives one logit, which is no choice between classes: at least 2 are needed")
    if label_order is not None:
        if not set(label_order) <= set(range(logits.shape[1])):
            raise ValueError(
                f"label_order {list(label_order)} must name logits of the teacher, 0 to {logits.shape[1] - 1}: is it "
                "of another teacher?"
            )
        logits = logits[:, label_order]
    return unlabeled, logits


def cached_logits(dataset: Any) -> np.ndarray:
    """(N, C) the column of the teacher's logits."""
    import pyarrow.compute as pc

    if TEACHER_LOGITS not in dataset.column_names:
        raise ValueError(
            f"there is no column {TEACHER_LOGITS}, which `cache_teacher_logits` adds; there is: "
            f"{', '.join(dataset.column_names)}"
        )
    column = dataset.select_columns([TEACHER_LOGITS]).with_format("arrow")[:].column(TEACHER_LOGITS)
    sizes = pc.list_value_length(column).to_numpy()
    if not (sizes == sizes[0]).all():
        raise ValueError(f"the rows of {TEACHER_LOGITS} must be of one length, got {sizes.min()} to {sizes.max()}")
    logits = pc.list_flatten(column).to_numpy().reshape(len(sizes), -1)
    if (wrong := ~np.isfinite(logits.max(axis=1))).any():
        raise ValueError(
            f"the teacher's logits of row {wrong.argmax()} are {logits[wrong.argmax()].tolist()}: did it run in a "
            "precision that overflows? Fill its cache again"
        )
    return logits
