"""What is wrong with the rows themselves: leakage, contradictions, classes, sizes."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from distill_nlp.doctor.findings import Finding

LEAK_STOP = 0.20
CONTRADICTION_WARNING = 0.001
IMBALANCE = 10
FEW_ROWS = 100
SAME_SPLIT = 0.95

Columns = Sequence[Sequence[str]]
"""The texts of a split, and the second texts of pairs."""

_BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)


def folded_rows(columns: Columns) -> list[tuple[str, ...]]:
    """Each row without case, white space and `<br />`."""
    return list(zip(*([_folded(text) for text in column] for column in columns), strict=True))


def _folded(text: str) -> str:
    if "<" in text:
        text = _BREAK.sub(" ", text)
    return " ".join(text.casefold().split())


def check_leakage(train: Columns, held_out: Mapping[str, Columns]) -> Finding:
    """Texts of train that stand in the splits that the result is measured on.

    Args:
        train: its columns of texts.
        held_out: split -> likewise; "test" is the one that the report reads.

    Returns:
        A stop where more than 20% of the test rows stand in train, a warning where any row does, with one example;
        else ok. Rows are compared exactly, and without case, white space and `<br />`.
    """
    seen, seen_folded = set(zip(*train, strict=True)), set(folded_rows(train))
    said, example, level = [], None, "ok"
    for name, columns in held_out.items():
        rows = list(zip(*columns, strict=True))
        exact = sum(row in seen for row in rows)
        found = [i for i, row in enumerate(folded_rows(columns)) if row in seen_folded]
        share = len(found) / max(len(rows), 1)
        said.append(f"{len(found):,} of {len(rows):,} {name} rows ({share:.1%}; {exact:,} letter by letter)")
        if found:
            example = example or " | ".join(rows[found[0]])
            level = "stop" if level == "stop" or (name == "test" and share > LEAK_STOP) else "warning"
    what = f"texts of train that stand in other splits: {', '.join(said)}"
    if level == "ok":
        return Finding("ok", "duplicates", what)
    return Finding(
        level,  # type: ignore[arg-type]
        "duplicates",
        f'{what}; such as "{_short(example or "")}"',
        "what was learned by heart counts as known: the scores are too high, for the student and the baseline alike",
        "drop these rows from the file of the training split, or name clean splits by --data.train_split and "
        "--data.test_split",
    )


def check_contradictions(train: Columns, labels: Sequence[Hashable], reads_labels: bool = True) -> Finding:
    """Rows of train with one text and different labels.

    Args:
        train: its columns of texts.
        labels: of each row, its class, or all of its labels as a tuple.
        reads_labels: whether the student has a cross-entropy, whose weight can be lowered.

    Returns:
        A warning where at least one row in a thousand is one, else ok; with the share of rows that are repeated.
    """
    by_text: dict[tuple[str, ...], list[Hashable]] = {}
    for row, label in zip(folded_rows(train), labels, strict=True):
        by_text.setdefault(row, []).append(label)
    repeated = sum(len(found) - 1 for found in by_text.values())
    torn = {text: found for text, found in by_text.items() if len(set(found)) > 1}
    count = sum(map(len, torn.values()))
    what = (
        f"{repeated:,} of {len(labels):,} train rows repeat another's text ({repeated / max(len(labels), 1):.1%}); "
        f"{count:,} have one text and different labels"
    )
    if count < max(CONTRADICTION_WARNING * len(labels), 1):
        return Finding("ok", "label noise", what)
    return Finding(
        "warning",
        "label noise",
        f'{what}, such as "{_short(" | ".join(next(iter(torn))))}"',
        "cross-entropy pulls both ways on them; the teacher's answer is the same for both",
        "settle these labels in the data"
        + (", or trust the teacher more: --losses.ce.weight 0.1" if reads_labels else ""),
    )


def check_classes(splits: Mapping[str, Sequence[int]], names: Sequence[str], metric: str = "accuracy") -> Finding:
    """Which classes are rare or absent.

    Args:
        splits: split -> class indices of its rows; "train" is among them.
        names: of the classes, by index.
        metric: that picks the best checkpoint.

    Returns:
        A warning where a class has no row in a split (the student may still learn it from the teacher, but nothing
        measures it), or is more than 10 times rarer in train than the largest and the metric is accuracy; else ok.
        It says what always naming the largest class gives on the last split.
    """
    counts = {name: np.bincount(np.asarray(labels), minlength=len(names)) for name, labels in splits.items()}
    train = counts["train"]
    rarest, largest = int(train.argmin()), int(train.argmax())
    measured, last = list(counts.items())[-1]
    bar = last.max() / max(last.sum(), 1)
    what = (
        f"{len(names)} classes; rarest in train {names[rarest]} {train[rarest] / train.sum():.1%}, largest "
        f"{names[largest]} {train[largest] / train.sum():.1%}; always naming the largest gives {bar:.3f} on {measured}"
    )
    if absent := absent_classes(counts, names, what):
        return absent
    if train[largest] > IMBALANCE * train[rarest] and metric != "f1_macro":
        return Finding(
            "warning",
            "classes",
            f"{what}; {train[largest] / train[rarest]:.0f} to 1",
            "accuracy hardly changes if the rare classes are never named",
            "--training.metric_for_best_model f1_macro, and read macro-F1 in the report",
        )
    return Finding("ok", "classes", what)


def absent_classes(counts: Mapping[str, np.ndarray], names: Sequence[str], what: str) -> Finding | None:
    """A warning where a split has no row of a class.

    Args:
        counts: split -> (C,) rows of each class.
        names: of the classes.
        what: was found of them besides.
    """
    absent = {
        split: [names[i] for i in np.flatnonzero(found == 0)] for split, found in counts.items() if (found == 0).any()
    }
    if not absent:
        return None
    missing = "; ".join(f"{_listed(classes)} in {split}" for split, classes in absent.items())
    return Finding(
        "warning",
        "classes",
        f"{what}; no rows of {missing}",
        "labels teach nothing about a class without training rows, and macro-F1 counts 0 for one that is not there",
        "rows of it, --data.label_names without it, or larger --data.max_train_samples and --data.max_test_samples",
    )


def check_row_counts(counts: Mapping[str, int]) -> Finding:
    """Whether there are enough rows to learn from and to measure on.

    Args:
        counts: split -> rows.

    Returns:
        A warning where a split has fewer than 100, else ok.
    """
    said = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    few = [name for name, count in counts.items() if count < FEW_ROWS]
    if not few:
        return Finding("ok", "rows", said)
    return Finding(
        "warning",
        "rows",
        f"{said}: fewer than {FEW_ROWS} in {' and '.join(few)}",
        "few rows to learn from give another student with each seed; on few to measure, no difference can be told",
        "more rows: --data.max_train_samples and --data.max_test_samples where they are set, unlabeled texts by "
        "--data.unlabeled, or another --data.validation_split",
    )


def check_splits_differ(validation: Columns, test: Columns) -> Finding:
    """Whether validation is the test split under another name.

    Returns:
        A warning where at least 95% of the validation rows stand in test, else ok.
    """
    held = set(zip(*test, strict=True))
    rows = list(zip(*validation, strict=True))
    share = sum(row in held for row in rows) / max(len(rows), 1)
    what = f"{share:.1%} of the {len(rows):,} validation rows stand in test"
    if share < SAME_SPLIT:
        return Finding("ok", "splits", what)
    return Finding(
        "warning",
        "splits",
        what,
        "the best checkpoint is picked on the rows that the report reads: its scores are too high",
        "--data.validation_split null carves validation rows from train",
    )


def _short(text: str, length: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def _listed(names: Sequence[str], most: int = 5) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
