"""The test rows that say most: where teacher and student part, and labels that both contradict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from distill_nlp.report.quality import probabilities
from distill_nlp.report.rows import TestRows, bucket_of, length_buckets
from distill_nlp.report.scores import Logits, right_rows

MOST_ROWS = 200
"""Shown of each list."""
SURE = 0.9
"""Probability from which both models contradict a label."""


@dataclass
class Example:
    """One row as the page shows it.

    Args:
        index: of the row in the test split, from 0.
        text: whole.
        label, teacher, student: names of the classes; of several labels joined by commas, "none" where there are none.
        classes: names that the list can be filtered by: of the label and of what the models name.
        teacher_probability, student_probability: of what each named, for several labels of the row's least certain
            class.
        bucket: index of the length's.
        length: tokens of the whole text; None of a row that is no text.
        truncated: whether it does not read all of the text.
        students_right: seeds of the student that are right here.
    """

    index: int
    text: str
    label: str
    teacher: str
    student: str
    classes: list[str]
    teacher_probability: float
    student_probability: float
    bucket: int
    length: int | None
    truncated: bool
    students_right: int


@dataclass
class Listed:
    """A list of the page.

    Args:
        name: as a key.
        title: as a heading.
        rule: which rows, and their order.
        examples: the first ones.
        total: of rows that the rule holds for.
    """

    name: str
    title: str
    rule: str
    examples: list[Example]
    total: int

    @property
    def left_out(self) -> int:
        """Rows that are not shown."""
        return self.total - len(self.examples)


def listed(
    rows: TestRows, logits: Logits, labels: np.ndarray, label_names: list[str], seeds: list[int]
) -> list[Listed]:
    """The three lists: only the teacher right, only the student right, likely label errors.

    The student is that of the first seed.

    Args:
        rows: the test rows.
        logits: of each model by name, (N, C).
        labels: (N,), or (N, C) of 0 and 1, where a row is right if all its labels are.
        label_names: by index.
        seeds: of the student.
    """
    several = labels.ndim == 2
    truth = labels.astype(bool) if several else labels[:, None] == np.arange(len(label_names))
    teacher, student = (probabilities(logits[name], several) for name in ("teacher", f"student/{seeds[0]}"))
    right = {name: right_rows(logits[name], labels) for name in ("teacher", *(f"student/{seed}" for seed in seeds))}
    own, theirs = right[f"student/{seeds[0]}"], right["teacher"]
    students_right = np.sum([right[f"student/{seed}"] for seed in seeds], axis=0)
    # The probability that a model gives to what the label says, of its least certain class.
    t, s = (_of_label(p, truth, several) for p in (teacher, student))
    lead = f"Student of seed {seeds[0]}. " if len(seeds) > 1 else ""
    what = "all its labels" if several else "its label"
    parts = [
        (
            "teacher",
            "Only the teacher right",
            f"{lead}First the rows where the teacher's probability of {what} is furthest above the student's.",
            theirs & ~own,
            t - s,
        ),
        (
            "student",
            "Only the student right",
            f"{lead}First the rows where the student's probability of {what} is furthest above the teacher's.",
            own & ~theirs,
            s - t,
        ),
        (
            "labels",
            "Likely label errors",
            lead + _rule(several),
            _contradicted(teacher, student, truth, several),
            -(t + s),
        ),
    ]
    bucket = np.zeros(len(labels), dtype=int)
    if rows.lengths is not None:
        bucket = bucket_of(rows.lengths, length_buckets(rows.lengths))
    found = []
    for name, title, rule, inside, order in parts:
        places = np.flatnonzero(inside)
        places = places[np.argsort(-order[places], kind="stable")]
        examples = [
            _example(int(i), rows, (truth, teacher, student), bucket, label_names, several, students_right)
            for i in places[:MOST_ROWS]
        ]
        found.append(Listed(name, title, rule, examples, len(places)))
    return found


def _rule(several: bool) -> str:
    if several:
        return (
            f"Rows with a class that both models give a probability of at least {SURE} though the label lacks it, or "
            f"of at most {1 - SURE:.1f} though the label has it. First those that both give least to the label."
        )
    return (
        f"Rows where both models name the same class, not that of the label, each with a probability of at least "
        f"{SURE}. First those that both give least to the label."
    )


def _of_label(p: np.ndarray, truth: np.ndarray, several: bool) -> np.ndarray:
    return np.where(truth, p, 1 - p).min(axis=1) if several else p[truth]


def _contradicted(teacher: np.ndarray, student: np.ndarray, truth: np.ndarray, several: bool) -> np.ndarray:
    if several:
        lacking = ~truth & (teacher >= SURE) & (student >= SURE)
        false = truth & (teacher <= 1 - SURE) & (student <= 1 - SURE)
        return (lacking | false).any(axis=1)
    named = teacher.argmax(axis=1)
    sure = (teacher.max(axis=1) >= SURE) & (student.max(axis=1) >= SURE)
    return sure & (named == student.argmax(axis=1)) & ~truth[np.arange(len(truth)), named]


def _example(
    i: int,
    rows: TestRows,
    values: tuple[np.ndarray, np.ndarray, np.ndarray],
    bucket: np.ndarray,
    names: list[str],
    several: bool,
    students_right: np.ndarray,
) -> Example:
    truth, teacher, student = (value[i] for value in values)
    label, *named = (_named(value, several) for value in (truth, teacher, student))
    shown: list[Any] = [", ".join(names[c] for c in found) or "none" for found in (label, *named)]
    sure = [float(np.maximum(p, 1 - p).min() if several else p.max()) for p in (teacher, student)]
    classes = [names[c] for c in sorted({*label, *named[0], *named[1]})]
    return Example(
        i,
        rows.texts[i],
        *shown,
        classes,
        *sure,
        int(bucket[i]),
        None if rows.lengths is None else int(rows.lengths[i]),
        rows.truncated is not None and bool(rows.truncated[i]),
        int(students_right[i]),
    )


def _named(value: np.ndarray, several: bool) -> list[int]:
    # As `decisions`: above one half; the truth is 0 or 1.
    return np.flatnonzero(value > 0.5).tolist() if several else [int(value.argmax())]
