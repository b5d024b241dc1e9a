"""Fills the teacher's cache for a data set, and puts the answers beside its rows."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from distill_nlp.cache_rows import with_column
from distill_nlp.ensemble import MEANS, TeacherEnsemble, mean_logits
from distill_nlp.labels import label_order
from distill_nlp.losses.base import POOLINGS, ModelShape, check_choice, check_positive
from distill_nlp.teacher import TEACHER_LOGITS, Teacher, pooled_column
from distill_nlp.teacher_filling import FillSettings, State, TeacherFilling
from distill_nlp.teacher_source import TeacherSource

logger = logging.getLogger(__name__)


def cache_teacher_logits(
    teacher: nn.Module | Teacher | TeacherEnsemble | str | Path,
    dataset: Any,
    tokenizer: Any,
    folder: str | Path,
    mixed_precision: str = "no",
    batch_size: int = 64,
    revision: str | None = None,
    say: Callable[[str], None] = logger.info,
    states: Iterable[State] = (),
    storage: str = "float32",
    student_config: Any = None,
) -> Any:
    """Gives the data set with a column `teacher_logits`, for a `CachedTeacher`; computes only what is not on disk yet.

    Rows are known by their token ids, not by their place: a cache serves any order, batch size, padding and student,
    and several data sets. The ranks of a launch share the work; each must call this, with the same rows. Of an
    ensemble each member is cached by itself; the column is their mean, see `TeacherEnsemble`.

    Args:
        teacher: the fine-tuned teacher, run where it is; or its folder or Hub id, loaded only if a row is missing; a
            `Teacher` where it reads tokens of its own; a `TeacherEnsemble`.
        dataset: a tokenized `datasets.Dataset`.
        tokenizer: pads; a teacher that reads tokens of its own has its own.
        folder: of caches; each output of each teacher has a sub-folder.
        mixed_precision: autocast of the teacher, as in training: "no", "bf16" or "fp16".
        batch_size: rows of one forward pass.
        revision: of a teacher on the Hub.
        say: gets a line per teacher at the end, on the main rank: rows, hit rate, seconds, size, largest rounding.
        states: (teacher layer, "first" or "mean") that PKD and the relations between examples read; 0 is the
            embeddings' output. Each becomes a column, named by `pooled_column`, which takes 4 bytes of memory for each
            row and each number of the teacher's width.
        storage: "float32"; or "float16" or "bfloat16" for half the disk, at a rounding to the nearest of at most 2^-11
            or 2^-8 of each number (see `STORAGES`). The columns are float32.
        student_config: of an ensemble: whose labels, in their order, the mean is of; the first teacher's where not
            given. To be given where the first teacher has more labels than the student.

    Raises:
        ValueError: no `datasets.Dataset`, or no token ids in it; an unknown setting or layer; states of an ensemble,
            or labels of its members that do not match.
        UsageError: the folder cannot be written, or there is no such teacher.
        DistillError: an answer is not finite, or too large for the storage; the others computed before it are kept.

    Example:
        >>> train = cache_teacher_logits(teacher, train, tokenizer, "teacher_cache", states=[(6, "first")])
        >>> teacher = CachedTeacher(teacher.config)
    """
    members = teacher.members if isinstance(teacher, TeacherEnsemble) else [teacher]
    tokenizers = teacher.tokenizers if isinstance(teacher, Teacher | TeacherEnsemble) else {}
    sources = [
        TeacherSource(
            member.model,
            prefix=member.prefix,
            tokenizer=tokenizers.get(member.prefix),
            restrict_labels=member.restrict_labels,
        )
        if isinstance(member, Teacher)
        else TeacherSource(member, revision)
        for member in members
    ]
    mean = None
    if isinstance(teacher, TeacherEnsemble):
        mean = _Mean(sources, teacher.weights, teacher.mean, student_config)
    settings = FillSettings(folder, tokenizer, _checked_states(states), storage, mixed_precision, batch_size, say)
    return _answered(sources, dataset, settings, mean)


def cached_answers(
    sources: Sequence[TeacherSource],
    dataset: Any,
    tokenizer: Any,
    folder: str | Path,
    weights: Sequence[float] | None = None,
    mean: str = "probabilities",
    mixed_precision: str = "no",
    batch_size: int = 64,
    say: Callable[[str], None] = logger.info,
    states: Iterable[State] = (),
    storage: str = "float32",
    student_config: Any = None,
) -> Any:
    """The same for teachers that are described, and loaded one after the other, each only if it lacks a row.

    Args:
        sources: one, whose logits stand in the column as they are, or several, which answer as a `TeacherEnsemble`.
        weights, mean: as in `TeacherEnsemble`.
        tokenizer: pads for the sources without one.
        dataset, folder, mixed_precision, batch_size, say, states, storage, student_config: see `cache_teacher_logits`.

    Raises:
        ValueError, UsageError, DistillError: as there; and no source, or weights that are not one per source and > 0.

    Example:
        >>> sources = [TeacherSource("teacher-1"), TeacherSource("teacher-2", prefix="teacher_", tokenizer=other)]
        >>> train = cached_answers(sources, train, tokenizer, "teacher_cache", weights=[2, 1])
    """
    sources = list(sources)
    if not sources:
        raise ValueError("at least one teacher is needed, got none")
    combined = None
    if len(sources) > 1:
        combined = _Mean(sources, [1.0] * len(sources) if weights is None else weights, mean, student_config)
    settings = FillSettings(folder, tokenizer, _checked_states(states), storage, mixed_precision, batch_size, say)
    return _answered(sources, dataset, settings, combined)


class _Mean:
    """The members' logits as one's, in the order of the labels that are agreed on."""

    def __init__(self, sources: Sequence[TeacherSource], weights: Sequence[float], mean: str, config: Any) -> None:
        if len(weights) != len(sources):
            raise ValueError(f"an ensemble of {len(sources)} teachers needs as many weights, got {len(weights)}")
        total = math.fsum(check_positive("weights of an ensemble", weight) for weight in weights)
        self._weights = [weight / total for weight in weights]
        self._mean = check_choice("mean", mean, MEANS)
        if config is None and sources[0].restrict_labels:
            raise ValueError(
                "the first teacher of the ensemble keeps only the student's labels, and the mean is over these: pass "
                "student_config="
            )
        target = sources[0].config if config is None else config
        self._orders = [label_order(source.config, target, source.restrict_labels) for source in sources]
        self._problem_type = ModelShape.from_config(target).problem_type

    def __call__(self, logits: Sequence[np.ndarray]) -> np.ndarray:
        """(N, C) of each member in its own order of labels -> (N, C)."""
        if not len(logits[0]):
            return logits[0]
        pairs = zip(logits, self._orders, strict=True)
        ordered = [torch.from_numpy(x if order is None else x[:, order]) for x, order in pairs]
        return mean_logits(ordered, self._weights, self._mean, self._problem_type).numpy()


def _checked_states(states: Iterable[State]) -> list[State]:
    wanted = list(dict.fromkeys((layer, how) for layer, how in states))
    for layer, how in wanted:
        if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
            raise ValueError(f"states are pairs of a layer, a whole number >= 0, and a pooling; got layer {layer!r}")
        check_choice("the pooling of states", how, tuple(POOLINGS))
    return wanted


def _answered(sources: Sequence[TeacherSource], dataset: Any, settings: FillSettings, mean: _Mean | None) -> Any:
    """The data set with the columns of one teacher, or of the mean of several."""
    if mean is not None and settings.states:
        raise ValueError("states are those of one teacher's layers, which an ensemble has not; leave them out")
    titles = [f" ({i + 1} of {len(sources)})" if len(sources) > 1 else "" for i in range(len(sources))]
    # All are looked at before the first one computes.
    fillings = [TeacherFilling(*each, dataset, settings) for each in zip(sources, titles, strict=True)]
    for filling in fillings:
        filling.run()
    logits = [filling.take(None) for filling in fillings]
    answered = with_column(dataset, TEACHER_LOGITS, logits[0] if mean is None else mean(logits))
    for state in settings.states:
        answered = with_column(answered, pooled_column(*state), fillings[0].take(state))
    return answered
