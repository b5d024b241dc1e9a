"""What each stage trains on: tokenized rows in Arrow files, or streamed ones that are tokenized batch by batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers.trainer_utils import SaveStrategy

from distill_nlp.arguments import DistillationArguments, setting_of
from distill_nlp.arrow_columns import row_lengths
from distill_nlp.errors import UsageError
from distill_nlp.materials import Materials
from distill_nlp.row_stream import Row, RowStream
from distill_nlp.teacher_parts import TeacherPart
from distill_nlp.tokenization import TEXT_COLUMNS, encode_texts

Reader = tuple[str, Any, int]
"""Prefix of columns, tokenizer, longest row in tokens."""


@dataclass(frozen=True)
class StreamedRows:
    """Streamed rows of a training whose arguments are not known yet.

    Args:
        kinds: labeled ones, and those without labels where there are any.
        readers: whose tokens the rows get.
        token_type_ids: makes them even where a tokenizer does not by itself.
        shuffle_buffer: rows among which the next one is drawn.
    """

    kinds: Sequence[Iterable[Row]]
    readers: Sequence[Reader]
    token_type_ids: bool
    shuffle_buffer: int

    def for_training(self, arguments: DistillationArguments) -> tuple[RowStream, DistillationArguments]:
        """The stream for these arguments, and the arguments for the stream, which mixes and orders rows by itself.

        Raises:
            UsageError: they ask for what a stream cannot do.
        """
        if arguments.accelerator_config.split_batches:
            raise UsageError("training.accelerator_config.split_batches does not go with data.streaming; leave it out")
        changed = copy.copy(arguments)
        changed.accelerator_config = copy.copy(arguments.accelerator_config)
        # The first rank would read for all, and could not join batches of other lengths.
        changed.accelerator_config.dispatch_batches = False
        changed.unlabeled_ratio = None
        if changed.save_strategy == SaveStrategy.EPOCH:
            # The one epoch of a stream ends with the training: a killed one would have no checkpoint.
            changed.save_strategy, changed.save_steps = SaveStrategy.STEPS, max(arguments.max_steps // 10, 1)
        try:
            stream = RowStream(
                self.kinds,
                self.encode,
                list(self.encode([{"text": "", "text_pair": "", "labels": 0}])[0]),
                arguments.per_device_train_batch_size,
                setting_of(arguments, "unlabeled_ratio") if len(self.kinds) > 1 else None,
                arguments.seed if arguments.data_seed is None else arguments.data_seed,
                self.shuffle_buffer,
                arguments.train_sampling_strategy,
                arguments.process_index,
                arguments.world_size,
            )
        except ValueError as error:
            raise UsageError(f"training: {error}") from error
        return stream, changed

    def encode(self, rows: list[Row]) -> list[Row]:
        """Rows of texts as token ids of all readers, labels as they are."""
        texts = {name: [row[name] for row in rows] for name in TEXT_COLUMNS if name in rows[0]}
        columns: dict[str, list[Any]] = {"labels": [row["labels"] for row in rows]}
        for prefix, tokenizer, longest in self.readers:
            columns |= encode_texts(texts, tokenizer, longest, self.token_type_ids, prefix)
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def baseline_rows(materials: Materials) -> Any:
    """Labeled rows, as the student reads them."""
    splits = materials.splits
    if splits.streams is None:
        return materials.tokens(splits.train)
    return _streamed(materials, [splits.streams.train], [_student(materials)])


def student_rows(materials: Materials, otherwise: Callable[[], Any]) -> Any:
    """Labeled rows and the pool, as the student and each teacher read them.

    Args:
        otherwise: gives them where they are not streamed.
    """
    streams = materials.splits.streams
    if streams is None:
        return otherwise()
    teachers = [(prefix, part.tokenizer, part.max_length) for prefix, part in materials.readers.items()]
    kinds = [part for part in (streams.train, streams.unlabeled) if part is not None]
    return _streamed(materials, kinds, [*teachers, _student(materials)])


def teacher_rows(materials: Materials, part: TeacherPart) -> Any:
    """Labeled rows, as this teacher reads them."""
    splits = materials.splits
    if splits.streams is None:
        return materials.tokens(splits.teacher_train, part)
    _ = materials.readers
    return _streamed(materials, [splits.streams.teacher_train], [("", part.tokenizer, part.max_length)])


def validation_rows(materials: Materials, part: TeacherPart | None = None) -> Any:
    """Those that pick the checkpoint, as this teacher reads them, else as the student does; the longest come first.

    In the order of a file, much of a batch of short texts is padding.
    """
    rows = materials.tokens(materials.splits.validation, part)
    return rows.select(np.argsort(-row_lengths(rows, "input_ids"), kind="stable"))


def _student(materials: Materials) -> Reader:
    return "", materials.tokenizer, materials.experiment.data.max_length


def _streamed(materials: Materials, kinds: Sequence[Iterable[Row]], readers: Sequence[Reader]) -> StreamedRows:
    types = "text_pair" in materials.splits.train.features
    return StreamedRows(kinds, readers, types, materials.experiment.data.shuffle_buffer)
