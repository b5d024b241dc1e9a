"""The time of the stages that are left, from real steps of each."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from distill_nlp.config import TrainingSection
from distill_nlp.doctor.findings import Finding
from distill_nlp.doctor.measure import Batch, Step, StepTime, batches_by_length, time_answers, time_step
from distill_nlp.doctor.plan import StageTime, check_time, evaluations
from distill_nlp.doctor.subject import AUTOCAST, Subject
from distill_nlp.modeling import accepted_arguments
from distill_nlp.stages import Fingerprint, phase_folders
from distill_nlp.training_settings import same_budget, training_arguments

FORWARD_SHARE = 1 / 3
"""A forward pass of a training step: backward takes two."""


@dataclass(frozen=True)
class _Kind:
    """Stages that share a step: a teacher's, the baselines', or the students' in one phase.

    Args:
        steps: of one whole training.
        scored: whether the report evaluates what comes of it.
        caches: whether it reads the teachers' cached answers.
    """

    name: str
    paths: dict[Path, Fingerprint]
    section: TrainingSection
    rows: int
    steps: int
    step: Callable[[], Step]
    batch_of: Callable[[], Callable[[float, int], Batch]]
    scored: bool = True
    caches: bool = False


def check_run_time(subject: Subject, stages: Sequence[str], seconds: float) -> Finding:
    """Times a few steps of each kind of stage that is left, and adds up.

    Args:
        stages: that are to run.
        seconds: for the timing, roughly.
    """
    left = [kind for kind in _kinds(subject, stages) if any(_left(subject, kind).values())]
    if not left:
        return check_time([], "")
    start = time.perf_counter()
    materials = subject.materials
    # A student that has begun found its answers there.
    cached = any(kind.caches and min(_left(subject, kind).values()) == kind.steps for kind in left)
    share = seconds / (len(left) + cached)
    found: list[StageTime] = []
    timed: list[StepTime] = []
    forward: dict[str, float] = {}
    for kind in left:
        taken = time_step(kind.step(), kind.batch_of(), kind.section.per_device_train_batch_size, share)
        timed.append(taken)
        forward[kind.name] = taken.gradient / kind.section.per_device_train_batch_size * FORWARD_SHARE
        evaluation = forward[kind.name] * len(materials.splits.validation) / subject.ranks
        for steps in filter(None, _left(subject, kind).values()):
            times = evaluations(
                kind.section.eval_strategy, steps, kind.section.eval_steps, _epochs(subject, kind, steps)
            )
            whole = steps * taken.of_step(kind.section.gradient_accumulation_steps) + times * evaluation
            found.append(StageTime(kind.name, steps, whole))
    if cached:
        count = sum(len(part) for part in (materials.splits.train, materials.splits.unlabeled) if part is not None)
        found.append(StageTime("teacher cache", 0, count / subject.ranks * _teacher_row(subject, share)))
    if "report" in stages:
        of_row = sum(forward[kind.name] * len(kind.paths) for kind in left if kind.scored)
        scored = of_row * len(materials.splits.test)
        found.append(StageTime("report", 0, scored))
    return check_time(found, _basis(subject, timed, time.perf_counter() - start))


def _basis(subject: Subject, timed: Sequence[StepTime], seconds: float) -> str:
    sizes = sorted({taken.rows for taken in timed})
    shown = str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    steps = sum(taken.batches for taken in timed)
    return f"{steps} steps of {shown} rows on {subject.device.type}, timed in {seconds:.0f} s"


def _kinds(subject: Subject, stages: Sequence[str]) -> list[_Kind]:
    materials, experiment, root = subject.materials, subject.experiment, subject.root
    splits, seeds = materials.splits, experiment.seeds
    kinds = []
    if "teacher" in stages:
        for part in materials.teachers:
            if part.finished is not None:
                continue
            section = subject.prints.experiment.teacher_training()

            def batches(part: Any = part, section: TrainingSection = section) -> Callable[[float, int], Batch]:
                rows = subject.encoded(splits.teacher_train, len(subject.step_rows), part)
                return batches_by_length(rows, subject.collate_for(part), _grouped(section))

            prints = {root / part.name: subject.prints.teachers[part.index]}
            step = lambda part=part: subject.teacher_step(part)  # noqa: E731
            count = len(splits.teacher_train)
            steps = _steps(subject, section, count)
            kinds.append(_Kind(part.name, prints, section, count, steps, step, batches))
    # A pool sets the number of steps of the baseline too.
    count = len(splits.train) + (0 if splits.unlabeled is None else len(splits.unlabeled))
    phases = subject.phases
    steps_of = [_steps(subject, phase.experiment.training, count) for phase in phases]

    def batches_of(phase: Subject, section: TrainingSection) -> Callable[[float, int], Batch]:
        return batches_by_length(phase.step_rows, phase.collate, _grouped(section))

    if "baseline" in stages:
        section = subject.prints.experiment.training
        prints = {root / "baseline" / f"seed-{seed}": subject.prints.baseline(seed) for seed in seeds}
        batch_of = partial(batches_of, subject, section)
        kinds.append(_Kind("baseline", prints, section, count, sum(steps_of), subject.baseline_step, batch_of))
    if "student" in stages:
        prints_of = {root / "student" / f"seed-{seed}": subject.prints.phases(seed) for seed in seeds}
        for i, phase in enumerate(phases):
            last, section = i == len(phases) - 1, phase.experiment.training
            prints = {
                phase_folders(final, len(phases))[i]: made[i]
                for final, made in prints_of.items()
                # The last phase is made of all the others, of which nothing is made any more.
                if last or subject.steps_left(final, made[-1], 1)
            }
            name = "student" if len(phases) == 1 else f"student, phase {i + 1},"
            step = lambda phase=phase: phase.student_step()[0]  # noqa: E731
            batch_of, caches = partial(batches_of, phase, section), phase.materials.live_because is None
            kinds.append(_Kind(name, prints, section, count, steps_of[i], step, batch_of, last, caches))
    return kinds


def _grouped(section: TrainingSection) -> bool:
    return section.train_sampling_strategy == "group_by_length"


def _steps(subject: Subject, section: TrainingSection, rows: int) -> int:
    """Of one whole training."""
    section = section.model_copy(update={"unlabeled_ratio": None})
    arguments = training_arguments(section, subject.root, seed=0)
    return same_budget(section, arguments, rows).max_steps


def _left(subject: Subject, kind: _Kind) -> dict[Path, int]:
    return {path: subject.steps_left(path, fingerprint, kind.steps) for path, fingerprint in kind.paths.items()}


def _epochs(subject: Subject, kind: _Kind, steps: int) -> float:
    """Passes over the rows in so many steps."""
    section = kind.section
    per_step = section.per_device_train_batch_size * section.gradient_accumulation_steps * subject.ranks
    return steps / max(math.ceil(kind.rows / per_step), 1)


def _teacher_row(subject: Subject, seconds: float) -> float:
    """Seconds that the teachers take for one row."""
    taken = 0.0
    for part in subject.materials.teachers:
        rows = subject.encoded(subject.materials.splits.train, 64, part)
        # Those of the usual length: the cache is filled in batches of like lengths.
        rows = sorted(rows, key=lambda row: len(row["input_ids"]))[len(rows) * 3 // 8 :][:16]
        collate, model = subject.collate_for(part), subject.teacher_model(part).eval()
        autocast, names = AUTOCAST.get(subject.materials.mixed_precision), accepted_arguments(model)

        def own(batch: Batch, model: Any = model, autocast: Any = autocast, names: Any = names) -> Any:
            taken = {k: x for k, x in batch.items() if k != "labels" and (names is None or k in names)}
            with torch.autocast(subject.device.type, autocast, enabled=autocast is not None):
                return model(**taken)

        one = time_answers(own, collate(rows[:1]), 1, subject.device)
        count = len(rows) if one * len(rows) * 2 < seconds else max(int(seconds / one / 2), 1)
        taken += time_answers(own, collate(rows[:count]), count, subject.device)
    return taken
