"""The examples of an experiment: splits with checked labels."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_nlp.config import SYNTHETIC, DataSection
from distill_nlp.data_files import load_split
from distill_nlp.errors import UsageError
from distill_nlp.losses.base import IGNORE_INDEX

Loader = Callable[[str], Any]


@dataclass
class Splits:
    """The raw splits, each a `datasets.Dataset` of `text`, maybe `text_pair`, and integer `labels`.

    Args:
        train: what the students learn from.
        validation: what picks the best checkpoint.
        test: what the report reads.
        label_names: names of the classes by index; `LABEL_0` and so on where the data do not name them.
        teacher_train: what the teacher is fine-tuned on; train itself unless the config says otherwise.
        unlabeled: rows of label -100, or None.
        notes: what was done to the data that the user should know.
    """

    train: Any
    validation: Any
    test: Any
    label_names: list[str]
    teacher_train: Any
    unlabeled: Any | None
    notes: list[str]


def load_splits(config: DataSection, teacher_train_split: str | None = None) -> Splits:
    """Loads and checks all splits of an experiment.

    Raises:
        UsageError: a split or column is missing or empty, a text is no string, a label is missing, unknown or out of
            range, or all labels are the same; with the split and the row.
    """
    load = _loader(config)
    notes: list[str] = []
    raw_train = _columns(load(config.train_split), config, config.train_split)
    names = _label_names(raw_train, config)
    train = _with_labels(raw_train, config, config.train_split, names)
    test = _with_labels(_columns(load(config.test_split), config, config.test_split), config, config.test_split, names)
    teacher_train = None
    if teacher_train_split is not None and teacher_train_split != config.train_split:
        raw = _columns(load(teacher_train_split), config, teacher_train_split)
        teacher_train = _with_labels(raw, config, teacher_train_split, names)
    if config.validation_split is not None:
        raw = _columns(load(config.validation_split), config, config.validation_split)
        validation = _with_labels(raw, config, config.validation_split, names)
    else:
        train, validation = _carve(train, len(names), config.validation_fraction, config.seed)
        notes.append(f"{len(validation)} validation rows carved from {config.train_split}, {len(train)} left")
    train = _sample(train, config.max_train_samples, config.seed)
    if shared := len(_rows(train) & _rows(test)):
        notes.append(f"{shared} texts of {config.train_split} stand in {config.test_split} too")
    if teacher_train is not None:
        teacher_train = _without_held_out(teacher_train, [validation, test], notes, teacher_train_split or "")
        _check_classes(teacher_train, teacher_train_split or "", names)
    test = _sample(test, config.max_test_samples, config.seed)
    unlabeled = None
    if config.unlabeled is not None:
        # A file of its own: unlabelled texts seldom lie with the labelled ones.
        is_file = Path(config.unlabeled).expanduser().is_file()
        pool = load_split(config.unlabeled, "train") if is_file else load(config.unlabeled)
        raw = _columns(pool, config, config.unlabeled, labeled=False)
        raw = _sample(raw, config.max_unlabeled_samples, config.seed)
        unlabeled = _without_held_out(raw, [validation, test], notes, "unlabeled")
        unlabeled = unlabeled.add_column("labels", [IGNORE_INDEX] * len(unlabeled))
    _check_classes(train, config.train_split, names)
    return Splits(train, validation, test, names, teacher_train or train, unlabeled, notes)


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


def _columns(dataset: Any, config: DataSection, split: str, labeled: bool = True) -> Any:
    """Renames the columns that count to `text`, `text_pair` and `labels`, and drops the others."""
    if len(dataset) == 0:
        raise UsageError(f"data: the split {split!r} of {config.dataset} has no rows")
    wanted = {config.text_column: "text"}
    if config.text_pair_column is not None:
        wanted[config.text_pair_column] = "text_pair"
    if labeled:
        wanted[config.label_column] = "labels"
    for column in wanted:
        if column not in dataset.column_names:
            setting = {"text": "text_column", "text_pair": "text_pair_column", "labels": "label_column"}[wanted[column]]
            raise UsageError(
                f"data: the split {split!r} of {config.dataset} has no column {column!r} (data.{setting}); "
                f"there is: {', '.join(dataset.column_names)}"
            )
    dataset = dataset.select_columns(list(wanted))
    dataset = dataset.rename_columns({old: new for old, new in wanted.items() if old != new})
    for column in ("text", "text_pair"):
        if column in dataset.column_names:
            for row, text in enumerate(dataset[column]):
                if not isinstance(text, str):
                    raise UsageError(f"data: row {row} of the split {split!r} has no text in {column}: {text!r}")
    return dataset


def _label_names(train: Any, config: DataSection) -> list[str]:
    """Names of the classes: as the config says, as the data set says, or from the labels of train."""
    feature = train.features["labels"]
    known = list(getattr(feature, "names", None) or [])
    if config.label_names is not None:
        if known and len(known) != len(config.label_names):
            raise UsageError(
                f"data.label_names has {len(config.label_names)} names, the data set has {len(known)} classes: {known}"
            )
        if len(set(config.label_names)) < len(config.label_names):
            raise UsageError(f"data.label_names: a name stands twice in {config.label_names}")
        return list(config.label_names)
    if known:
        return known
    values = set(train["labels"])
    if all(isinstance(v, str) for v in values):
        return sorted(values)
    if all(isinstance(v, int) and not isinstance(v, bool) for v in values) and min(values) >= 0:
        missing = sorted(set(range(max(values) + 1)) - values)
        if missing and len(values) > 1:
            raise UsageError(
                f"data: the labels of {config.train_split} are {sorted(values)[:20]}, and no row has {missing[0]}; "
                "number them from 0 without gaps, or set data.label_names"
            )
        return [f"LABEL_{i}" for i in range(max(values) + 1)]
    if all(isinstance(v, bool) for v in values):
        return ["false", "true"]
    # What is wrong, and in which row, is said where the labels are mapped.
    return ["LABEL_0", "LABEL_1"]


def _with_labels(dataset: Any, config: DataSection, split: str, names: list[str]) -> Any:
    """Maps labels to class indices, each checked."""
    from datasets import ClassLabel

    index = {name: i for i, name in enumerate(names)}
    values = list(dataset["labels"])
    # First of all: in a csv, one missing label turns the others into floats.
    for row, value in enumerate(values):
        if value is None or (isinstance(value, float) and math.isnan(value)):
            raise UsageError(f"data: row {row} of the split {split!r} has no label in {config.label_column}")
    labels = []
    for row, value in enumerate(values):
        where = f"data: row {row} of the split {split!r}"
        if isinstance(value, bool):
            value = int(value)
        if isinstance(value, str):
            if value not in index:
                raise UsageError(f"{where} has the label {value!r}, which is not among {names} (data.label_names)")
            labels.append(index[value])
        elif isinstance(value, int):
            if not 0 <= value < len(names):
                hint = "; rows without a label go into data.unlabeled" if value < 0 else ""
                raise UsageError(f"{where} has the label {value}, outside 0..{len(names) - 1} ({names}){hint}")
            labels.append(value)
        else:
            raise UsageError(
                f"{where} has the label {value!r} ({type(value).__name__}); a class is a whole number or a string"
            )
    plain = dataset.remove_columns("labels").add_column("labels", labels)
    return plain.cast_column("labels", ClassLabel(names=names))


def _check_classes(train: Any, split: str, names: list[str]) -> None:
    present = set(train["labels"])
    if len(present) < 2:
        only = names[next(iter(present))]
        raise UsageError(
            f"data: all {len(train)} rows of the split {split!r} have the label {only!r}; a classifier needs two"
        )


def _carve(train: Any, num_classes: int, fraction: float, seed: int) -> tuple[Any, Any]:
    size = max(num_classes, round(fraction * len(train)))
    if size + num_classes > len(train):
        raise UsageError(f"data: {len(train)} training rows are too few to carve {size} for validation")
    try:
        parts = train.train_test_split(test_size=size, seed=seed, stratify_by_column="labels")
    except ValueError:
        # A class of a single row cannot be stratified.
        parts = train.train_test_split(test_size=size, seed=seed)
    return parts["train"], parts["test"]


def _sample(dataset: Any, size: int | None, seed: int) -> Any:
    if size is None or size >= len(dataset):
        return dataset
    return dataset.shuffle(seed=seed).select(range(size))


def _rows(dataset: Any) -> set[tuple[str, ...]]:
    """The texts of a split, pairs as pairs."""
    return set(zip(*(dataset[c] for c in ("text", "text_pair") if c in dataset.column_names), strict=True))


def _without_held_out(raw: Any, held_out: Sequence[Any], notes: list[str], name: str) -> Any:
    """Rows without those that validation or test hold: neither teacher nor student may have seen them."""
    held = set().union(*(_rows(part) for part in held_out))
    columns = [c for c in ("text", "text_pair") if c in raw.column_names]
    keep = [i for i, row in enumerate(zip(*(raw[c] for c in columns), strict=True)) if row not in held]
    if dropped := len(raw) - len(keep):
        notes.append(f"{dropped} {name} rows dropped: their texts stand in validation or test")
    if not keep:
        raise UsageError(f"data: all {name} rows stand in validation or test; none is left")
    return raw.select(keep)


def content_hash(dataset: Any) -> str:
    """A hash of the rows themselves: the same whatever file they came from."""
    digest = hashlib.sha256()
    for batch in dataset.iter(batch_size=1000):
        digest.update(json.dumps(batch, ensure_ascii=False, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]
