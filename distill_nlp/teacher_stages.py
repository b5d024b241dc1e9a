"""The teachers' part of an experiment: their fine-tuning, and their answers for the rows of the students."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, set_seed

from distill_nlp.cache_filling import cached_answers
from distill_nlp.ensemble import TeacherEnsemble
from distill_nlp.errors import UsageError
from distill_nlp.fingerprints import Fingerprints
from distill_nlp.labels import label_order
from distill_nlp.loading import load_classifier, load_config
from distill_nlp.losses import CrossEntropyLoss
from distill_nlp.losses.base import MULTI_LABEL
from distill_nlp.out_of_memory import memory_errors
from distill_nlp.pool import add_pseudo_labels, drop_unconfident
from distill_nlp.soft_targets import soft_targets
from distill_nlp.stage_runner import StageRunner
from distill_nlp.stage_training import TrainingJob
from distill_nlp.stages import StageFolder
from distill_nlp.student import label_arguments
from distill_nlp.teacher import TEACHER_LOGITS, CachedTeacher, Teacher
from distill_nlp.teacher_cache import PRECISIONS
from distill_nlp.teacher_parts import TeacherPart
from distill_nlp.teacher_source import TeacherSource
from distill_nlp.training_rows import teacher_rows
from distill_nlp.training_settings import rows_read, training_arguments

LEAST_READ = 0.5
"""Share of the rows; with less, filling the cache takes more than twice the passes that it saves."""


class TeacherStages:
    """Trains the teachers that are not finished, and hands them, or their cached answers, to the students.

    Args:
        runner: of the experiment.
        prints: its fingerprints.
    """

    def __init__(self, runner: StageRunner, prints: Fingerprints) -> None:
        self.runner = runner
        self.prints = prints
        self.experiment = runner.experiment
        self.materials = runner.materials

    def train(self) -> bool:
        """Fine-tunes each teacher that is no classifier for these labels yet; whether there was one."""
        return any([self._train(part) for part in self.materials.teachers])

    def _train(self, part: TeacherPart) -> bool:
        if part.finished is not None:
            self.runner.say(part.name, f"{part.settings.model} is a classifier for these labels already: not trained")
            return False
        folder = StageFolder(self.runner.root / part.name)
        if self.runner.is_done(folder, self.prints.teachers[part.index], part.name):
            return False
        self._job(part).run(self.runner.tell)
        return True

    def rehearse(self) -> None:
        """Two steps of each teacher that is to be fine-tuned; nothing is kept of them."""
        for part in self.materials.teachers:
            if not self._is_there(part):
                self._job(part).rehearse(self.runner.tell)

    def _is_there(self, part: TeacherPart) -> bool:
        """Whether the teacher is finished: given so, or by its stage."""
        folder = StageFolder(self.runner.root / part.name)
        return part.finished is not None or folder.changes(self.prints.teachers[part.index]) == []

    def _job(self, part: TeacherPart) -> TrainingJob:
        folder, seed = StageFolder(self.runner.root / part.name), part.settings.seed
        set_seed(seed)
        return self.runner.job(
            part.name,
            folder,
            self.prints.teachers[part.index],
            part,
            model=self.materials.new_teacher(part),
            losses={"ce": CrossEntropyLoss()},
            train=teacher_rows(self.materials, part),
            arguments=training_arguments(
                self.experiment.teacher_training(), folder.checkpoints, seed, self.materials.splits.problem_type
            ),
            settings="teacher.training",
        )

    def source(self, part: TeacherPart) -> tuple[str, str | None]:
        """Where the fine-tuned teacher lies: folder or Hub id, and revision.

        Raises:
            UsageError: it is not trained yet.
        """
        if part.finished is not None:
            return part.settings.model or "", part.settings.revision
        fingerprint = self.prints.teachers[part.index]
        return str(self.runner.finished(self.runner.root / part.name, fingerprint, "teacher")), None

    # ---- for the students ----

    def for_students(self) -> Teacher | TeacherEnsemble | CachedTeacher:
        """The teacher as the students' trainer takes it."""
        parts = self.materials.teachers
        if self.materials.live_because is None:
            return CachedTeacher(self._answers_config, parts[0].settings.restrict_labels)
        return self._live([load_classifier(*self.source(part)) for part in parts])

    def for_rehearsal(self) -> Teacher | TeacherEnsemble:
        """The same running live, as it will be made where it is not trained yet."""
        parts, new = self.materials.teachers, self.materials.new_teacher
        return self._live([load_classifier(*self.source(p)) if self._is_there(p) else new(p) for p in parts])

    def _live(self, models: list[PreTrainedModel]) -> Teacher | TeacherEnsemble:
        parts = self.materials.teachers
        _ = self.materials.readers
        members = [
            Teacher(
                model,
                part.tokenizer if part.prefix else None,
                prefix=part.prefix,
                restrict_labels=part.settings.restrict_labels,
            )
            for part, model in zip(parts, models, strict=True)
        ]
        if len(members) == 1:
            return members[0]
        return TeacherEnsemble(members, [part.settings.weight for part in parts], self.experiment.teacher.mean)

    @property
    def _cache_folder(self) -> Path:
        return Path(self.experiment.cache_dir or self.runner.root / "teacher_cache")

    @cached_property
    def _answers_config(self) -> Any:
        """A config whose labels are those of the cached logits: the teacher's own, or the data's for an ensemble."""
        config = load_config(*self.source(self.materials.lead))
        return config if len(self.materials.teachers) == 1 else self._with_data_labels(config)

    def _with_data_labels(self, config: Any) -> Any:
        return type(config)(**label_arguments(self.materials.label_names, self.materials.splits.problem_type))

    @cached_property
    def student_rows(self) -> Any:
        """The rows that the students of all seeds learn from, with the teacher's answers where it does not run live."""
        data = self.experiment.data
        cached = self.materials.live_because is None
        if not cached and data.unlabeled_min_confidence is None and not data.pseudo_labels:
            return self.materials.student_rows
        if cached:
            self._tell_of_few_rows()
        rows = self._answered(self.materials.objective.pooled_states() if cached else set())
        config, restrict = self._answers_config, self.materials.lead.settings.restrict_labels
        order = label_order(config, self._with_data_labels(config), restrict)
        if data.unlabeled is None:
            self._tell_of_soft_targets(rows, order)
        try:
            if data.unlabeled_min_confidence is not None:
                rows, counts = drop_unconfident(rows, data.unlabeled_min_confidence, order)
                self.runner.say("data", counts.summary(self.materials.label_names))
            if data.pseudo_labels:
                rows, count = add_pseudo_labels(rows, order)
                self.runner.say("data", f"{count:,} unlabeled rows labeled by the teacher")
        except ValueError as error:
            raise UsageError(f"data.unlabeled: {error}") from error
        return rows if cached else rows.remove_columns(TEACHER_LOGITS)

    def _tell_of_few_rows(self) -> None:
        """A hint, no change: what a run computes follows from its settings alone, wherever it goes on."""
        experiment, data = self.experiment, self.experiment.data
        asked_for = "cache" in experiment.teacher.model_fields_set or experiment.cache_dir is not None
        read_by_more = bool(self.prints.experiment.phases) or data.unlabeled_min_confidence is not None
        if asked_for or read_by_more or data.pseudo_labels or self._cache_folder.exists():
            return
        rows = len(self.materials.student_rows)
        read = len(experiment.seeds) * rows_read(experiment.training, rows, self.runner.state.num_processes)
        if read < LEAST_READ * rows:
            self.runner.say(
                "teacher cache",
                f"answers {rows:,} rows, of which the students read {read:,}; --teacher.cache false asks the teacher "
                "for these alone",
            )

    def _tell_of_soft_targets(self, rows: Any, order: list[int] | None) -> None:
        try:
            found = soft_targets(rows, order)
        except ValueError as error:
            # Numbers that are not finite: `training.on_nonfinite` says what is to be done about them.
            self.runner.say("soft targets", f"WARNING: {error}")
            return
        if found is None:
            return
        line = found.summary()
        several = self.materials.splits.problem_type == MULTI_LABEL
        # A phase of its own before or after may take what the answers lack.
        alone = not self.prints.experiment.phases and not self.materials.objective.pooled_states()
        if alone and found.say_little and not several:
            line += (
                "; WARNING: that is little more than the labels say. More is in texts that the teacher has not learned "
                "from (--data.unlabeled), and in its states and relations (configs/recipes/all_in_one.yaml)"
            )
        self.runner.say("soft targets", line)

    def _answered(self, states: set[tuple[int, str]]) -> Any:
        """The students' rows with the teachers' answers beside them."""
        experiment, materials = self.experiment, self.materials
        size = experiment.training.per_device_eval_batch_size
        rows = materials.student_rows
        sources = []
        for part in materials.teachers:
            name, revision = self.source(part)
            sources.append(
                TeacherSource(
                    name,
                    revision,
                    prefix=part.prefix,
                    tokenizer=part.tokenizer,
                    restrict_labels=part.settings.restrict_labels,
                )
            )
        hint = f"lower training.per_device_eval_batch_size (now {size}) or data.max_length"
        with memory_errors("teacher cache", hint):
            return cached_answers(
                sources,
                rows,
                materials.tokenizer,
                self._cache_folder,
                weights=[part.settings.weight for part in materials.teachers],
                mean=experiment.teacher.mean,
                states=sorted(states),
                storage=experiment.teacher.cache_dtype,
                mixed_precision=materials.mixed_precision if materials.mixed_precision in PRECISIONS else "no",
                batch_size=size,
                say=lambda line: self.runner.say("teacher cache", line),
                student_config=self._with_data_labels(self._answers_config),
            )

    def fill_cache(self) -> None:
        """Computes the teacher's answers for all rows that the students will learn from, ahead of their stage."""
        self._answered(self.materials.objective.pooled_states())
