"""The memory of an experiment's steps: whether they fit, and how many rows of a batch do."""

from __future__ import annotations

import os
from typing import Any

from accelerate.utils import parse_flag_from_env

from distill_nlp.config_training import TrainingSection
from distill_nlp.doctor.findings import Finding
from distill_nlp.doctor.measure import Collate, Step, activation_bytes, features_bytes
from distill_nlp.doctor.memory import (
    MemoryEstimate,
    check_memory,
    estimate_memory,
    forward_peak,
    free_memory,
    size_in_words,
    tensor_bytes,
)
from distill_nlp.doctor.subject import AUTOCAST, Subject
from distill_nlp.doctor.trace import no_trace
from distill_nlp.teacher_parts import TeacherPart

# Of the free memory: the rest is for evaluation, fragments, and what the estimate does not see.
_SHARE_TO_FILL = 0.7


def check_student_memory(subject: Subject) -> Finding:
    """Measures a step of the distilled student, and compares it with the free memory."""
    training = subject.experiment.training
    # Before anything is built: what is free now is what the run will find.
    free, where = free_memory(subject.device)
    rows = training.per_device_train_batch_size
    return check_memory(
        _student_memory(subject, rows),
        free,
        where,
        rows,
        len(subject.longest_row["input_ids"]),
        training.gradient_accumulation_steps,
        training.gradient_checkpointing,
        subject.materials.mixed_precision in AUTOCAST,
        _copies(subject),
    )


def fitting_batch_size(
    subject: Subject, rows: int, free: tuple[int | None, str], teacher: TeacherPart | None = None
) -> tuple[int, str]:
    """How many rows of a step go through the models at a time: the most that divide it and fit into the memory.

    Estimated as the doctor does, of the longest rows; all of them where nothing says how much memory is free. Leaves no
    trace, as `examine`.

    Args:
        rows: of a step on one device.
        free: memory, as `free_memory` tells it of the device that has least.
        teacher: in its own training; None: the distilled student's, with the teacher that runs in it.

    Returns:
        The rows, and a line on them.
    """
    left, where = free
    if left is None:
        return rows, f"{rows} rows at a time: the free memory is not known"
    with no_trace():

        def needed(count: int) -> int:
            estimate = _student_memory(subject, count) if teacher is None else _teacher_memory(subject, teacher, count)
            return estimate.total * _copies(subject)

        one, whole = needed(1), needed(rows)
        # All parts of an estimate grow evenly with the rows, or not at all.
        each = (whole - one) / max(rows - 1, 1)
        fits = [n for n in range(rows, 0, -1) if rows % n == 0 and one + (n - 1) * each <= _SHARE_TO_FILL * left]
        chosen = fits[0] if fits else 1
        size = size_in_words(one + (chosen - 1) * each)
        return (
            chosen,
            f"{chosen} of {rows} rows of a step at a time: about {size} of {size_in_words(left)} free ({where})",
        )


def _copies(subject: Subject) -> int:
    """Ranks that share the memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if subject.device.type == "cpu" else 1


def _student_memory(subject: Subject, rows: int) -> MemoryEstimate:
    row = subject.longest_row
    step, teacher = subject.student_step()
    config = subject.student.config
    activations = _activations(step, row, subject.collate, rows, subject.experiment.training, config)
    peak = 0
    if teacher:
        element = 2 if subject.materials.mixed_precision in AUTOCAST else 4
        peak = forward_peak(subject.lead_model.config, rows, len(row["input_ids"]), element)
        peak += features_bytes(step, row, subject.collate, rows)
    return _estimate(subject, step, activations, tensor_bytes(teacher), peak)


def _teacher_memory(subject: Subject, part: TeacherPart, rows: int) -> MemoryEstimate:
    step = subject.teacher_step(part)
    longest = subject.longest_row_of(part)
    section, config = subject.experiment.teacher_training(), step.model.student.config
    collate = subject.collate_for(part)
    return _estimate(subject, step, _activations(step, longest, collate, rows, section, config))


def _activations(
    step: Step, row: dict[str, Any], collate: Collate, rows: int, section: TrainingSection, config: Any
) -> int:
    whole = activation_bytes(step, row, collate, rows)
    if not section.gradient_checkpointing:
        return whole
    step.model.activation_checkpointing_enable()
    # In backward, one block at a time is computed again.
    return activation_bytes(step, row, collate, rows) + whole // (getattr(config, "num_hidden_layers", None) or 1)


def _estimate(
    subject: Subject, step: Step, activations: int, teacher_weights: int = 0, teacher_peak: int = 0
) -> MemoryEstimate:
    sharded = any(parse_flag_from_env(f"ACCELERATE_USE_{name}") for name in ("FSDP", "DEEPSPEED"))
    return estimate_memory(step.model, activations, teacher_weights, teacher_peak, subject.ranks, sharded)
