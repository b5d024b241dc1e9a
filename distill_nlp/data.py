"""The examples of an experiment: splits with checked labels."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

from distill_nlp.config import SYNTHETIC, DataSection
from distill_nlp.data_files import load_split, unlabeled_folder
from distill_nlp.data_labels import check_classes, check_same_kind, label_names, problem_type_of, unlabeled, with_labels
from distill_nlp.errors import UsageError
from distill_nlp.label_numbers import as_in_train
from distill_nlp.labels import label_order, spellings
from distill_nlp.losses.base import MULTI_LABEL, SINGLE_LABEL, ProblemType

Loader = Callable[[str], Any]


@dataclass
class Splits:
    """The raw splits, each a `datasets.Dataset` of `text`, maybe `text_pair`, and `labels`.

    Labels are class indices; where texts have several labels, a list of C numbers, 1 for each class that applies.

    Args:
        train: what the students learn from.
        validation: what picks the best checkpoint.
        test: what the report reads.
        label_names: names of the classes by index; `LABEL_0` and so on where the data do not name them.
        teacher_train: what the teacher is fine-tuned on; train itself unless the config says otherwise.
        unlabeled: rows of label -100 (C times where there are lists), or None.
        notes: what was done to the data that the user should know.
        problem_type: as in Transformers' configs.
        streams: with `data.streaming`, the rows to train on (`data_streams.Streams`); train, teacher_train and
            unlabeled are then their first rows, to look at.
    """

    train: Any
    validation: Any
    test: Any
    label_names: list[str]
    teacher_train: Any
    unlabeled: Any | None
    notes: list[str]
    problem_type: ProblemType = SINGLE_LABEL
    streams: Any | None = None


def load_splits(config: DataSection, teacher_train_split: str | None = None) -> Splits:
    """Loads and checks all splits of an experiment. A label column of lists makes it a multi-label one.

    Raises:
        UsageError: a split or column is missing or empty, a text is no string, a label is missing, unknown or out of
            range, splits differ in the kind of their labels, or all labels are the same; with the split and the row.
    """
    load = _loader(config)
    notes: list[str] = []
    raw_train = columns_of(load(config.train_split), config, config.train_split)
    problem_type = problem_type_of(raw_train)
    if problem_type == MULTI_LABEL and config.unlabeled_min_confidence is not None:
        raise UsageError(
            "data.unlabeled_min_confidence is defined for one label per text, and these have several: leave it out"
        )
    names = label_names(raw_train, config)
    train = with_labels(raw_train, config, config.train_split, names)

    def labeled(split: str) -> Any:
        raw = columns_of(load(split), config, split)
        check_same_kind(raw, config, split, problem_type)
        return with_labels(as_in_train(raw, raw_train.features["labels"], config, split, names), config, split, names)

    aside = unlabeled_folder(config.dataset, config.train_split) if config.unlabeled is None else None
    if aside is not None:
        pool = f"{config.train_split}/{aside.name}"
        notes.append(f"{aside} has no labels and is left out; --data.unlabeled {pool} takes it as unlabeled rows")
    test = labeled(config.test_split)
    teacher_train = None
    if teacher_train_split is not None and teacher_train_split != config.train_split:
        teacher_train = labeled(teacher_train_split)
    if config.validation_split is not None:
        validation = labeled(config.validation_split)
    else:
        train, validation = _carve(train, len(names), config.validation_fraction, config.seed)
        notes.append(f"{len(validation)} validation rows carved from {config.train_split}, {len(train)} left")
    train = sample(train, config.max_train_samples, config.seed)
    # A sweep without a validation split has train in the place of test: what it holds is not held out.
    held_out = [validation] if config.test_split == config.train_split else [validation, test]
    if shared := len(texts_of(train) & texts_of(test)):
        notes.append(f"{shared} texts of {config.train_split} stand in {config.test_split} too")
    if teacher_train is not None:
        teacher_train = _without_held_out(teacher_train, held_out, notes, teacher_train_split or "")
        check_classes(teacher_train, teacher_train_split or "", names, notes)
    test = sample(test, config.max_test_samples, config.seed)
    pool = None
    if config.unlabeled is not None:
        # A file of its own: unlabelled texts seldom lie with the labelled ones.
        is_file = Path(config.unlabeled).expanduser().is_file()
        raw = load_split(config.unlabeled, "train") if is_file else load(config.unlabeled)
        raw = columns_of(raw, config, config.unlabeled, labeled=False)
        raw = sample(raw, config.max_unlabeled_samples, config.seed)
        pool = unlabeled(_without_held_out(raw, held_out, notes, "unlabeled"), problem_type, len(names))
    check_classes(train, config.train_split, names, notes)
    return Splits(train, validation, test, names, teacher_train or train, pool, notes, problem_type)


def read_problem_type(config: DataSection) -> ProblemType:
    """The kind of task by the labels of the training split alone.

    Raises:
        UsageError: there is no such split or column.
    """
    return problem_type_of(columns_of(_loader(config)(config.train_split), config, config.train_split))


def load_labeled(config: DataSection, split: str, names: list[str], problem_type: ProblemType) -> Any:
    """One split alone, labeled by the classes of a finished model.

    Args:
        config: where the rows are; its `label_names` are not read.
        split: to load.
        names: of the model's classes, by index. Class names that the data have are found among them by name (see
            `as_classes`); numbers without names are taken for their indices.
        problem_type: of the model.

    Returns:
        `text`, maybe `text_pair`, and `labels` as in `Splits`.

    Raises:
        UsageError: there is no such split or column, or the labels are not the model's.
    """
    return as_classes(columns_of(_loader(config)(split), config, split), config, split, names, problem_type)


def as_classes(rows: Any, config: DataSection, split: str, names: list[str], problem_type: ProblemType) -> Any:
    """Rows of `load_rows` with their labels as the classes of a finished model; all else as in `load_labeled`.

    Class names are compared exactly, then without case and separators. The data may have a part of the model's
    classes, be it in the rows or in the names that a data set declares. Names of a model that say nothing (`LABEL_0`)
    are taken to be in the order of the data's, for strings that of `in_order`, if there are as many.
    """
    feature, several = rows.features["labels"], problem_type == MULTI_LABEL
    # A column without any label has no kind; that is said with its row.
    if problem_type_of(rows) != problem_type and getattr(feature, "dtype", None) != "null":
        kinds = {SINGLE_LABEL: "one label per row", MULTI_LABEL: "lists of labels"}
        raise UsageError(
            f"data: {config.label_column} holds {kinds[problem_type_of(rows)]}, and the model was trained on "
            f"{kinds[problem_type]}"
        )
    values = list(rows["labels"])
    known = getattr(getattr(feature, "feature", feature), "names", None)
    if known is not None:
        meaning = _places(list(known), names)
    else:
        labels = (value for row in values for value in ((row or ()) if several else (row,)))
        meaning = spellings({value for value in labels if isinstance(value, str)}, names)
    if meaning:
        # A row without a label is refused later, with its number.
        if several:
            values = [row and [meaning.get(value, value) for value in row] for row in values]
        else:
            values = [meaning.get(value, value) for value in values]
        rows = rows.remove_columns("labels").add_column("labels", values)
    return with_labels(rows, config, split, names)


def _places(known: list[str], names: list[str]) -> dict[Any, Any]:
    """For each class index of the data the model's; empty where they are the same."""

    def described(of: list[str]) -> Any:
        return SimpleNamespace(id2label=dict(enumerate(of)), num_labels=len(of))

    try:
        order = label_order(described(names), described(known), restrict=True)
    except ValueError:
        raise UsageError(f"data: its classes {known} are not the model's {names}") from None
    return {} if order is None else dict(enumerate(order))


def load_rows(config: DataSection, split: str, labeled: bool = True) -> tuple[Any, bool]:
    """One split as it stands: `text`, maybe `text_pair`, and `labels` as they were written; and whether it has these.

    Args:
        labeled: whether labels are wanted; a split without that column has none.

    Raises:
        UsageError: there is no such split or text column, or a text is no string.
    """
    raw = _loader(config)(split)
    labeled = labeled and config.label_column in raw.column_names
    return columns_of(raw, config, split, labeled=labeled), labeled


def _loader(config: DataSection) -> Loader:
    if config.dataset == SYNTHETIC:
        from datasets import ClassLabel, Dataset

        from distill_nlp.synthetic import LABEL_NAMES, generate

        rows = generate(config.seed)

        def load(split: str) -> Any:
            if split not in rows:
                raise UsageError(f"data: the synthetic set has no split {split!r}; there is: {', '.join(rows)}")
            made = Dataset.from_list(rows[split])
            if split == config.unlabeled:
                return made
            return made.cast_column("label", ClassLabel(names=LABEL_NAMES))

        return load
    return lambda split: load_split(config.dataset, split, config.config_name, config.revision)


def columns_of(dataset: Any, config: DataSection, split: str, labeled: bool = True) -> Any:
    """Renames the columns that count to `text`, `text_pair` and `labels`, and drops the others."""
    if len(dataset) == 0:
        raise UsageError(f"data: the split {split!r} of {config.dataset} has no rows")
    wanted = wanted_columns(dataset.column_names, config, split, labeled)
    dataset = dataset.select_columns(list(wanted))
    dataset = dataset.rename_columns({old: new for old, new in wanted.items() if old != new})
    check_texts({c: dataset[c] for c in ("text", "text_pair") if c in dataset.column_names}, split)
    return dataset


def wanted_columns(there: Sequence[str], config: DataSection, split: str, labeled: bool = True) -> dict[str, str]:
    """Column of the data -> `text`, `text_pair` or `labels`.

    Raises:
        UsageError: one is not there, or is named for two purposes.
    """
    named = {"data.text_column": config.text_column, "data.text_pair_column": config.text_pair_column}
    named |= {"data.label_column": config.label_column} if labeled else {}
    for setting, column in named.items():
        if column is not None and (same := [other for other in named if named[other] == column and other != setting]):
            raise UsageError(f"{setting} and {same[0]} are both {column!r}; they must be different columns")
    wanted = {config.text_column: "text"}
    if config.text_pair_column is not None:
        wanted[config.text_pair_column] = "text_pair"
    if labeled:
        wanted[config.label_column] = "labels"
    for column in wanted:
        if column not in there:
            setting = {"text": "text_column", "text_pair": "text_pair_column", "labels": "label_column"}[wanted[column]]
            raise UsageError(
                f"data: the split {split!r} of {config.dataset} has no column {column!r} (data.{setting}); "
                f"there is: {', '.join(there)}"
            )
    return wanted


def check_texts(columns: Mapping[str, Iterable[Any]], split: str, first_row: int = 0) -> None:
    """Refuses what is no string.

    Args:
        columns: `text` and maybe `text_pair`, of a part of the rows.
        split: that they are of.
        first_row: number of the first of them in the split.

    Raises:
        UsageError: with the row.
    """
    for column, values in columns.items():
        for row, text in enumerate(values, first_row):
            if not isinstance(text, str):
                raise UsageError(f"data: row {row} of the split {split!r} has no text in {column}: {text!r}")


def _carve(train: Any, num_classes: int, fraction: float, seed: int) -> tuple[Any, Any]:
    several = problem_type_of(train) == MULTI_LABEL
    size = max(1 if several else num_classes, round(fraction * len(train)))
    if size + (2 if several else num_classes) > len(train):
        raise UsageError(f"data: {len(train)} training rows are too few to carve {size} for validation")
    try:
        # Sets of labels are too many to be stratified, and so is a class of a single row.
        parts = train.train_test_split(test_size=size, seed=seed, stratify_by_column=None if several else "labels")
    except ValueError:
        parts = train.train_test_split(test_size=size, seed=seed)
    return parts["train"], parts["test"]


def sample(dataset: Any, size: int | None, seed: int) -> Any:
    if size is None or size >= len(dataset):
        return dataset
    return dataset.shuffle(seed=seed).select(range(size))


def texts_of(dataset: Any) -> set[tuple[str, ...]]:
    """The texts of a split, pairs as pairs."""
    return set(zip(*(dataset[c] for c in ("text", "text_pair") if c in dataset.column_names), strict=True))


def _without_held_out(raw: Any, held_out: Sequence[Any], notes: list[str], name: str) -> Any:
    """Rows without those that validation or test hold: neither teacher nor student may have seen them."""
    held = set().union(*(texts_of(part) for part in held_out))
    columns = [c for c in ("text", "text_pair") if c in raw.column_names]
    keep = [i for i, row in enumerate(zip(*(raw[c] for c in columns), strict=True)) if row not in held]
    if dropped := len(raw) - len(keep):
        notes.append(f"{dropped} {name} rows dropped: their texts stand in validation or test")
    if not keep:
        raise UsageError(f"data: all {name} rows stand in validation or test; none is left")
    return raw.select(keep)


# Data sets do not change; a run asks for the same one a dozen times.
_HASHES: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def content_hash(dataset: Any) -> str:
    """A hash of the rows themselves: the same whatever file they came from."""
    if dataset not in _HASHES:
        digest = hashlib.sha256()
        for batch in dataset.iter(batch_size=1000):
            digest.update(json.dumps(batch, ensure_ascii=False, sort_keys=True, default=str).encode())
        _HASHES[dataset] = digest.hexdigest()[:16]
    return _HASHES[dataset]
