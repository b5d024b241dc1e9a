"""Whether data, teacher and student mean the same by their labels."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from distill_nlp.doctor.findings import Finding
from distill_nlp.labels import anonymous, folded, label_names, label_order

CHECK = "labels"


def check_labels(
    data: Sequence[str],
    teacher_config: Any | None,
    student_config: Any | None = None,
    restrict: bool = False,
    teacher: str = "the teacher",
) -> Finding:
    """Compares the class names by name, case and separators folded.

    Args:
        data: names of the classes in the data, by index.
        teacher_config: of a finished classifier; None for a teacher that gets a new head for these classes.
        student_config: None where the student is made for the classes of the data.
        restrict: a teacher with more labels is cut to the student's.
        teacher: what to call it.

    Returns:
        A stop where names or their number differ, with both lists; a warning where names that say nothing (`LABEL_0`)
        leave the order to trust; ok otherwise, also for a permuted teacher.
    """
    data = list(data)
    if student_config is not None:
        student = label_names(student_config)
        unnamed = anonymous(student) or anonymous(data)
        agree = len(student) == len(data) if unnamed else list(map(folded, student)) == list(map(folded, data))
        if not agree:
            return Finding(
                "stop",
                CHECK,
                f"the data have the labels {data}, the student {student}",
                "index i would mean one class in the rows and another in the logits",
                "leave id2label out of student.overrides: the student gets the labels of the data",
            )
    if teacher_config is None:
        return Finding("ok", CHECK, f"{_shown(data)}; {teacher} gets a new head for them")
    theirs = label_names(teacher_config)
    wanted = SimpleNamespace(id2label=dict(enumerate(data)), num_labels=len(data))
    try:
        order = label_order(teacher_config, wanted, restrict)
    except ValueError as error:
        return Finding(
            "stop",
            CHECK,
            f"{teacher}: {error}",
            "its logits cannot be brought into the order of the data's classes",
            f"name the data's classes as {teacher} does, in the order of their numbers in the data: --data.label_names "
            f'"[{", ".join(theirs)}]" if that is theirs; or train a new head on it by --teacher.finetune always',
        )
    if anonymous(data) or anonymous(theirs):
        nameless = " and ".join(who for who, names in (("the data", data), (teacher, theirs)) if anonymous(names))
        fix = (
            '--data.label_names "[name of class 0, name of class 1, ...]" by the data\'s own documentation'
            if anonymous(data)
            else f"write id2label into {teacher}'s config.json, by its documentation"
        )
        return Finding(
            "warning",
            CHECK,
            f"{nameless} name no classes: the data have {data}, {teacher} {theirs}; taken to be in the same order",
            "another order would teach the student the wrong classes; only the accuracy of the teacher shows it",
            fix,
        )
    if order is not None:
        kind = "more labels" if len(theirs) > len(data) else "them in another order"
        return Finding("ok", CHECK, f"{_shown(data)}; {teacher} has {kind}, {_shown(theirs)}, and is matched by name")
    return Finding("ok", CHECK, f"{_shown(data)}; the same in {teacher}")


def _shown(names: Sequence[str]) -> str:
    """All of few names, the first and the last of many."""
    if len(names) <= 8:
        return ", ".join(names)
    return f"{', '.join(names[:4])}, ... {names[-1]} ({len(names)} labels)"
