"""Numbers of classes that mean the same in all splits: each split may number the classes that it has by itself."""

from __future__ import annotations

from typing import Any

from distill_nlp.config import DataSection
from distill_nlp.data_labels import problem_type_of
from distill_nlp.errors import UsageError, shown
from distill_nlp.labels import anonymous, folded
from distill_nlp.losses.base import MULTI_LABEL


def as_in_train(rows: Any, features: Any, config: DataSection, split: str, names: list[str]) -> Any:
    """The rows with numbers that mean what they do in train.

    Args:
        rows: of another split, with `labels` of the same kind.
        features: of train: of its column `labels`; None where it has no record of them.
        config: names the columns.
        split: for messages.
        names: of the classes, by train's numbers.

    Raises:
        UsageError: train has names for its labels, and these rows numbers that nothing names; or a row has a class
            that train lacks.
    """
    own, known = declared_names(rows.features["labels"]), declared_names(features)
    if own is None:
        if config.label_names is None:
            refuse_numbers(rows["labels"], features, split, names)
        return rows
    places = None if own == known else _places(own, names if known is None else known)
    # Numbers of train that nothing names are taken to be in the order that this split says, if no name contradicts it.
    unnamed = known is None and not has_words(features)
    if places is None or (unnamed and places.count(None) == len(places)):
        return rows

    def place(row: int, label: Any) -> Any:
        # What is no class of its own is refused later.
        if not isinstance(label, int) or not 0 <= label < len(own):
            return label
        if places[label] is None:
            raise UsageError(
                f"data: row {row} of the split {split!r} has the label {own[label]!r}, which is not among {names}"
            )
        return places[label]

    numbered = enumerate(rows["labels"])
    if problem_type_of(rows) == MULTI_LABEL:
        labels = [found and [place(row, label) for label in found] for row, found in numbered]
    else:
        labels = [place(row, label) for row, label in numbered]
    return rows.remove_columns("labels").add_column("labels", labels)


def refuse_numbers(labels: Any, features: Any, split: str, names: list[str]) -> None:
    """Numbers beside names that another split has: their order is anybody's guess.

    Args:
        labels: of a split, or of its first rows.
        features: of the column of labels of the split that has the names.
        split, names: as of `as_in_train`.

    Raises:
        UsageError: with the row.
    """
    for row, value in enumerate(labels if has_words(features) else ()):
        for label in value if isinstance(value, list) else [value]:
            if isinstance(label, int):
                raise UsageError(
                    f"data: row {row} of the split {split!r} has the label {label}, and other splits have names: "
                    f"{shown(names)}; write labels alike in all splits, or say by data.label_names which number is "
                    "which class"
                )


def refuse_other_order(own: Any, train: Any, split: str, names: list[str]) -> None:
    """A stream's numbers that mean something else than train's.

    Args:
        own: features of its column of labels, or None.
        train: those of train's.
        split, names: as of `as_in_train`.

    Raises:
        UsageError: with both lists.
    """
    found, wanted = declared_names(own), declared_names(train) or names
    if found and found != wanted and _places(found, wanted) is not None:
        raise UsageError(
            f"data: the split {split!r} numbers its classes as {shown(found)}, and train as {shown(wanted)}; number "
            "them alike"
        )


def declared_names(feature: Any) -> list[str] | None:
    """Names of classes by their numbers."""
    return getattr(getattr(feature, "feature", feature), "names", None) or None


def has_words(feature: Any) -> bool:
    """Whether its labels are names in the rows themselves."""
    return getattr(getattr(feature, "feature", feature), "dtype", None) in ("string", "large_string", "string_view")


def _places(own: list[str], names: list[str]) -> list[int | None] | None:
    """For each class the number of its name among the others, None for a name that is not there.

    None for all of them where nothing moves: all are in their places, or names say nothing on either side.
    """
    found: list[list[int | None]] = []
    for key in (str, folded):
        number = {key(name): i for i, name in enumerate(names)}
        if len(number) == len(names) and len({key(name) for name in own}) == len(own):
            found.append([number.get(key(name)) for name in own])
    best = max(found, key=lambda places: -places.count(None))
    # `class_encode_column` makes names of numbers too, "1" to "5": these say something where the other side has them.
    none_known = best.count(None) == len(best)
    # Names that are just the numbers say nothing where the others begin at "1".
    just_numbers = own == [str(i) for i in range(len(own))] and "0" not in names
    says_nothing = just_numbers or (none_known and (anonymous(own) or anonymous(names)))
    return None if says_nothing or best == list(range(len(own))) else best
