"""Whether the students' steps read the teacher's answers from the cache, or have it run."""

from __future__ import annotations

from pathlib import Path

from distill_nlp.config import Experiment
from distill_nlp.objective import DistillationObjective
from distill_nlp.teacher_cache import PRECISIONS
from distill_nlp.training_settings import rows_read

CACHE_FOLDER = "teacher_cache"
"""In the run's folder."""
LEAST_READ = 0.5
"""Share of the rows: with less, filling the cache takes more than twice the passes that it saves."""


def cache_folder(experiment: Experiment) -> Path:
    """Where the teacher's answers are kept."""
    return Path(experiment.cache_dir or Path(experiment.output_dir) / CACHE_FOLDER).expanduser()


def why_live(
    experiment: Experiment, objective: DistillationObjective, mixed_precision: str, few_rows: str | None
) -> str | None:
    """Why the teacher has to run in every step; None where its cached answers do.

    Args:
        experiment: of the training, or of one of its phases.
        objective: bound to student and teacher.
        mixed_precision: of the training.
        few_rows: see `few_rows_read`.
    """
    if not experiment.teacher.cache:
        return "teacher.cache is false"
    if not objective.needs_teacher:
        return "no loss needs the teacher"
    if experiment.data.streaming:
        return "rows of a stream are not cached (data.streaming)"
    if reading := objective.token_level():
        return f"losses {', '.join(reading)} compare token by token, and tokens' states are not cached"
    if mixed_precision not in PRECISIONS:
        return f"logits are not cached under {mixed_precision}"
    return few_rows


def few_rows_read(experiment: Experiment, rows: int, ranks: int) -> str | None:
    """That the students of all seeds read less than half of the rows, so that to answer all of them would cost more.

    Not where the cache is asked for by a setting, may serve other runs, is filled to choose rows by, or is there.

    Args:
        experiment: with its phases.
        rows: that the students may read.
        ranks: of the launch.
    """
    teacher, data = experiment.teacher, experiment.data
    asked_for = "cache" in teacher.model_fields_set or experiment.cache_dir is not None
    if asked_for or data.unlabeled_min_confidence is not None or data.pseudo_labels:
        return None
    # Of several ranks, not all may see the folder, and they must decide alike.
    if ranks == 1 and cache_folder(experiment).exists():
        return None
    trainings = [own.training for own in experiment.student_trainings()]
    read = len(experiment.seeds) * sum(rows_read(training, rows, ranks) for training in trainings)
    if read >= LEAST_READ * rows:
        return None
    return f"the students read {read:,} of {rows:,} rows; teacher.cache true answers all of them ahead"
