"""The training rows of an experiment as streams: checked as they come, never in memory as a whole."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from distill_nlp.config import DataSection
from distill_nlp.data import Splits, check_texts, load_rows, sample, texts_of, wanted_columns
from distill_nlp.data_labels import (
    check_classes,
    check_same_kind,
    label_names,
    mapped_labels,
    with_labels,
    with_vectors,
)
from distill_nlp.errors import UsageError
from distill_nlp.label_numbers import as_in_train, declared_names, has_words, refuse_numbers, refuse_other_order
from distill_nlp.losses.base import IGNORE_INDEX, MULTI_LABEL, SINGLE_LABEL, ProblemType
from distill_nlp.stream_files import Source, open_source

HEAD_ROWS = 2000
"""Rows of a stream that are looked at before training."""

Row = dict[str, Any]
"""`text`, maybe `text_pair`, and `labels`: a class index, or C numbers."""


@dataclass(frozen=True)
class StreamedSplit:
    """One pass over the rows of a split each time that it is iterated over, each row checked.

    Args:
        source: where they come from.
        config: names the columns.
        split: for messages.
        names: of the classes, by index.
        problem_type: of the labels.
        labeled: False gives each row the label -100, C times where there are lists.
        limit: rows that are read at most.
        held_out: digests of texts (see `digest`) whose rows are left out.

    Raises:
        UsageError: while iterating: a text is no string, a label is missing, unknown or out of range, with split and
            row; or there is no row.
    """

    source: Source
    config: DataSection
    split: str
    names: list[str]
    problem_type: ProblemType
    labeled: bool = True
    limit: int | None = None
    held_out: frozenset[bytes] = field(default=frozenset(), repr=False)

    def __iter__(self) -> Iterator[Row]:
        empty = True
        for row in islice(self._read(), self.limit):
            if not self.held_out or digest(row) not in self.held_out:
                empty = False
                yield row
        if empty and self.held_out:
            raise UsageError(f"data: all rows of the split {self.split!r} stand in validation or test; none is left")
        if empty:
            raise UsageError(f"data: the split {self.split!r} of {self.config.dataset} has no rows")

    def _read(self) -> Iterator[Row]:
        wanted = wanted_columns(self.source.columns, self.config, self.split, self.labeled)
        first = 0
        for block in self.source.blocks(list(wanted)):
            columns = {wanted[name]: values for name, values in block.items()}
            texts = {name: values for name, values in columns.items() if name != "labels"}
            check_texts(texts, self.split, first)
            columns["labels"] = self._labels(columns, first)
            first += len(columns["text"])
            for values in zip(*columns.values(), strict=True):
                yield dict(zip(columns, values, strict=True))

    def _labels(self, columns: dict[str, list[Any]], first: int) -> list[Any]:
        several = self.problem_type == MULTI_LABEL
        if not self.labeled:
            none = [float(IGNORE_INDEX)] * len(self.names) if several else IGNORE_INDEX
            return [none] * len(columns["text"])
        values = columns["labels"]
        odd = (row for row, value in enumerate(values, first) if several and not isinstance(value, list | None))
        if (row := next(odd, None)) is not None:
            raise UsageError(
                f"data: row {row} of the split {self.split!r} has {values[row - first]!r} in {self.config.label_column}"
                ", and no list of labels as the rows before it"
            )
        return mapped_labels(values, self.problem_type, self.config, self.split, self.names, first)

    def head(self, rows: int = HEAD_ROWS) -> Any:
        """Its first rows as a `datasets.Dataset` in memory."""
        from datasets import ClassLabel, Dataset

        found = list(islice(self, rows))
        texts = Dataset.from_dict({name: [row[name] for row in found] for name in found[0] if name != "labels"})
        labels = [row["labels"] for row in found]
        if self.problem_type == MULTI_LABEL:
            return with_vectors(texts, labels)
        rows_of_head = texts.add_column("labels", labels)
        return rows_of_head.cast_column("labels", ClassLabel(names=self.names)) if self.labeled else rows_of_head

    @property
    def identity(self) -> dict[str, Any]:
        """What a result depends on of it, found without reading it."""
        names = {"text_column", "text_pair_column", "label_column"} if self.labeled else {"text_column"}
        columns = self.config.model_dump(include=names)
        held_out = hashlib.sha256(b"".join(sorted(self.held_out))).hexdigest()[:16] if self.held_out else None
        return {"streamed": self.source.identity, **columns, "rows_at_most": self.limit, "without": held_out}


@dataclass(frozen=True)
class Streams:
    """What an experiment trains on.

    Args:
        train: of the students.
        teacher_train: of the teacher; train itself unless the config says otherwise.
        unlabeled: rows without labels, or None.
    """

    train: StreamedSplit
    teacher_train: StreamedSplit
    unlabeled: StreamedSplit | None = None


def digest(row: Row) -> bytes:
    """The texts of a row in 16 bytes."""
    texts = tuple(row[name] for name in ("text", "text_pair") if name in row)
    return hashlib.blake2b(repr(texts).encode(), digest_size=16).digest()


def load_streamed_splits(config: DataSection, teacher_train_split: str | None = None) -> Splits:
    """As `data.load_splits` with `data.streaming`: validation and test are loaded, the first rows of the others read.

    Class names are `data.label_names`, else those that the training split declares, else those of the labels in
    validation and test.

    Raises:
        UsageError: as `data.load_splits`, of the rows that are read.
    """
    source = _open(config, config.train_split)
    feature = _label_feature(source, config)
    problem_type = _problem_type(source, config)
    held_out = {split: load_rows(config, split) for split in (config.validation_split, config.test_split) if split}
    for split, (rows, has_labels) in held_out.items():
        if not has_labels:
            wanted_columns(rows.column_names, config, split)
        check_same_kind(rows, config, split, problem_type)
    names = _names(feature, {split: rows for split, (rows, _) in held_out.items()}, config)
    _refuse_numbers(source, config.train_split, held_out, config, names)
    alike = {split: as_in_train(rows, feature, config, split, names) for split, (rows, _) in held_out.items()}
    labeled = {split: with_labels(rows, config, split, names) for split, rows in alike.items()}
    # One and the same in a sweep, which reads no test rows.
    validation, test = labeled[config.validation_split], labeled[config.test_split]
    kept = frozenset(digest({"text": row[0], **_pair(row)}) for part in (validation, test) for row in texts_of(part))

    train = StreamedSplit(source, config, config.train_split, names, problem_type, limit=config.max_train_samples)
    teacher_train, unlabeled = train, None
    if teacher_train_split is not None and teacher_train_split != config.train_split:
        own = _open(config, teacher_train_split)
        _refuse_numbers(own, teacher_train_split, held_out, config, names)
        refuse_other_order(_label_feature(own, config), feature, teacher_train_split, names)
        teacher_train = StreamedSplit(own, config, teacher_train_split, names, problem_type, held_out=kept)
    if config.unlabeled is not None:
        is_file = Path(config.unlabeled).expanduser().is_file()
        pool = open_source(config.unlabeled, "train") if is_file else _open(config, config.unlabeled)
        limit = config.max_unlabeled_samples
        unlabeled = StreamedSplit(pool, config, config.unlabeled, names, problem_type, False, limit, kept)
    heads = [train.head(), None if teacher_train is train else teacher_train.head()]
    notes = [
        f"{config.train_split} is streamed: rows are checked as they come, and mixed within {config.shuffle_buffer:,}; "
        f"its first {len(heads[0]):,} are looked at before training"
    ]
    if unlabeled is not None or teacher_train is not train:
        notes.append("rows for the teacher and without labels whose texts stand in validation or test are left out")
    _note_classes(train, heads[0], notes)
    if teacher_train is not train:
        _note_classes(teacher_train, heads[1], notes)
    return Splits(
        train=heads[0],
        validation=validation,
        test=sample(test, config.max_test_samples, config.seed),
        label_names=names,
        teacher_train=heads[0] if heads[1] is None else heads[1],
        unlabeled=None if unlabeled is None else unlabeled.head(),
        notes=notes,
        problem_type=problem_type,
        streams=Streams(train, teacher_train, unlabeled),
    )


def streamed_problem_type(config: DataSection) -> ProblemType:
    """The kind of task by the first labels of the training split."""
    return _problem_type(_open(config, config.train_split), config)


def _open(config: DataSection, split: str) -> Source:
    return open_source(config.dataset, split, config.config_name, config.revision, config.label_column)


def _pair(row: Sequence[str]) -> dict[str, str]:
    return {"text_pair": row[1]} if len(row) > 1 else {}


def _label_feature(source: Source, config: DataSection) -> Any:
    return None if source.features is None else source.features.get(config.label_column)


def _problem_type(source: Source, config: DataSection) -> ProblemType:
    """By the first block: whether its labels are lists."""
    wanted_columns(source.columns, config, config.train_split)
    block = next(source.blocks([config.label_column]), {config.label_column: []})
    lists = any(isinstance(value, list) for value in block[config.label_column])
    return MULTI_LABEL if lists else SINGLE_LABEL


def _refuse_numbers(
    source: Source, split: str, held_out: dict[str, Any], config: DataSection, names: list[str]
) -> None:
    """Numbers that nothing names, in the first block, beside words in validation or test."""
    wanted_columns(source.columns, config, split)
    words = [rows for rows, _ in held_out.values() if has_words(rows.features["labels"])]
    # From the Hub a block is asked for over the network.
    if not words or config.label_names is not None or declared_names(_label_feature(source, config)):
        return
    first = next(source.blocks([config.label_column]), {config.label_column: []})[config.label_column]
    for rows in words:
        refuse_numbers(first, rows.features["labels"], split, names)


def _names(feature: Any, held_out: dict[str, Any], config: DataSection) -> list[str]:
    if config.label_names is not None or declared_names(feature):
        return label_names(SimpleNamespace(features={"labels": feature}), config)
    from datasets import concatenate_datasets

    splits = " and ".join(held_out)
    try:
        labels = concatenate_datasets([rows.select_columns(["labels"]) for rows in held_out.values()])
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"data: the labels of {splits} are of different kinds; write them alike, or set data.label_names"
        ) from error
    return label_names(labels, config.model_copy(update={"train_split": splits}))


def _note_classes(part: StreamedSplit, head: Any, notes: list[str]) -> None:
    """All rows alike are refused where the head is the whole; else they may be a file sorted by label."""
    if len(head) < HEAD_ROWS:
        check_classes(head, part.split, part.names, notes)
    elif len(set(map(str, head["labels"]))) == 1:
        notes.append(
            f"the first {len(head):,} rows of {part.split} have the same label: rows are mixed within "
            f"data.shuffle_buffer ({part.config.shuffle_buffer:,}) alone, so mix the file if it is sorted, e.g. by shuf"
        )
