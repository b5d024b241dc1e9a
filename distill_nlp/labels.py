"""Class names compared: of teacher, student and data."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any


def label_names(config: Any) -> list[str]:
    """The class names of a config, by index."""
    return [str(config.id2label[i]) for i in range(config.num_labels)]


def anonymous(names: list[str]) -> bool:
    """Whether the names say nothing: `LABEL_0` and the like."""
    return all(re.fullmatch(r"LABEL_\d+|\d+", name) for name in names)


def folded(name: str) -> str:
    """A label name without case and separators: `Very-Good` and `very_good` are one."""
    return re.sub(r"[\s_\-]+", "", name).casefold()


# The names as they are before folded ones, which are one for `-1` and `1`.
_KEYS: tuple[Callable[[str], str], ...] = (str, folded)


def label_order(teacher_config: Any, student_config: Any, restrict: bool = False) -> list[int] | None:
    """For each student label the index of the teacher's logit of that name; None when the order is the same.

    Names that say nothing (`LABEL_0`) on either side are taken to be in the same order.

    Args:
        restrict: a teacher with more labels than the student keeps the student's. The softmax over them is its own,
            given that the answer is one of them.

    Raises:
        ValueError: another number of labels, or other names, with both lists.
    """
    teacher, student = label_names(teacher_config), label_names(student_config)
    if teacher == student:
        return None
    for key in _KEYS:
        position = {key(name): i for i, name in enumerate(teacher)}
        wanted = [key(name) for name in student]
        if len(position) < len(teacher) or len(set(wanted)) < len(wanted) or not position.keys() >= set(wanted):
            continue
        if len(teacher) > len(student):
            if anonymous(student):
                break
            if not restrict:
                raise ValueError(
                    f"the teacher's labels {teacher} hold more than the student's {student}; restrict_labels keeps the "
                    "student's and renormalizes over them"
                )
        order = [position[name] for name in wanted]
        return None if order == list(range(len(teacher))) else order
    if len(teacher) != len(student):
        raise ValueError(
            f"the teacher has {len(teacher)} labels {teacher}, the student {len(student)} {student}; they must be the "
            "same" + (", or the student's among the teacher's by name" if restrict else "")
        )
    if anonymous(teacher) or anonymous(student):
        return None
    raise ValueError(
        f"the teacher's labels {teacher} and the student's {student} do not match by name; "
        "rename id2label in the config of one of them"
    )


def in_order(values: set[str]) -> list[str]:
    """Labels that are words, as classes are numbered where nothing names them.

    "10" comes after "9": a model's LABEL_10 is the eleventh.
    """
    return sorted(values, key=int) if all(v.isdecimal() for v in values) else sorted(values)


def spellings(written: set[str], names: list[str]) -> dict[str, str]:
    """For each label that is written in another way than the model's classes, the class that it means."""
    foreign = written - set(names)
    if foreign and anonymous(names) and len(written) == len(names):
        return dict(zip(in_order(written), names, strict=True))
    by_name = {folded(name): name for name in names}
    # `-1` and `1` are one when they are folded.
    if len(by_name) < len(names) or len(set(map(folded, written))) < len(written):
        return {}
    return {value: by_name[folded(value)] for value in foreign if folded(value) in by_name}


def moved(names: list[str], others: list[str]) -> list[str]:
    """Those of the first names that the others have at another index; none of names that say nothing.

    Example:
        >>> moved(["neg", "pos"], ["Pos", "Neg"])
        ['neg', 'pos']
    """
    for key in _KEYS if not anonymous(names) else ():
        place = {key(name): i for i, name in enumerate(others)}
        if len(place) == len(others) and len({key(name) for name in names}) == len(names):
            found = [name for i, name in enumerate(names) if place.get(key(name), i) != i]
            if found:
                return found
    return []


def check_data_labels(data: Any, student_config: Any) -> None:
    """Compares the class names that a `datasets.Dataset` knows, by index, with those of the student's logits.

    Raises:
        ValueError: they are not the same, with both lists.
    """
    features = getattr(data, "features", None) or {}
    for column in ("labels", "label"):
        if getattr(features.get(column), "names", None):
            _check_same_names(list(features[column].names), label_names(student_config))


def _check_same_names(data: list[str], student: list[str]) -> None:
    if anonymous(data) or anonymous(student):
        if len(data) > len(student):
            raise ValueError(f"the data have {len(data)} classes {data}, the student {len(student)} labels {student}")
        return
    if any([key(name) for name in data] == [key(name) for name in student] for key in _KEYS):
        return
    if {folded(name) for name in data} == {folded(name) for name in student}:
        problem = "are in another order than"
    else:
        problem = "do not match by name"
    raise ValueError(
        f"the class names of the data {data} {problem} the student's labels {student}; load the student with id2label= "
        'and label2id= of the data, or, if label 0 means the same in both, cast the column "labels" to Value("int64")'
    )
