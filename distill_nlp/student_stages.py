"""The students' part of an experiment: the plain baseline, and the distilled student in one phase or several."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedModel, set_seed

from distill_nlp.config import STAGES, Experiment
from distill_nlp.errors import UsageError
from distill_nlp.fingerprints import Fingerprints
from distill_nlp.loading import load_classifier
from distill_nlp.losses import CrossEntropyLoss
from distill_nlp.materials import Materials
from distill_nlp.stage_runner import StageRunner
from distill_nlp.stage_training import TrainingJob
from distill_nlp.stages import Fingerprint, StageFolder, phase_folders
from distill_nlp.teacher_stages import TeacherStages
from distill_nlp.training_rows import baseline_rows, student_rows
from distill_nlp.training_settings import same_budget, training_arguments


class StudentStages:
    """Trains baselines and students.

    Args:
        runner: of the experiment.
        prints: its fingerprints.
    """

    def __init__(self, runner: StageRunner, prints: Fingerprints) -> None:
        self.runner = runner
        self.prints = prints
        self.experiment = runner.experiment
        self.materials = runner.materials

    @cached_property
    def _phases(self) -> list[tuple[Experiment, Materials, TeacherStages]]:
        """Each phase with the materials and the teachers as it sees them."""
        found = []
        for experiment in self.experiment.student_trainings():
            materials = self.materials
            if self.experiment.phases:
                materials = self.materials.seen_by(experiment)
            runner = StageRunner(experiment, materials, self.runner.tell)
            found.append((experiment, materials, TeacherStages(runner, self.prints)))
        return found

    @property
    def views(self) -> list[Materials]:
        """The materials as each phase sees them."""
        return [materials for _, materials, _ in self._phases]

    @property
    def view_of_answers(self) -> Materials:
        """The materials as the first phase whose losses read the teacher's answers sees them; else the first."""
        return next((view for view in self.views if view.objective.reads_answers), self.views[0])

    def check(self) -> None:
        """Builds the student and sizes the losses of all phases once; raises as `Materials.objective` does."""
        for materials in self.views:
            materials.check_student()

    def fill_cache(self) -> None:
        """Computes the teacher's answers for all rows that the students will learn from, ahead of their stage.

        Raises:
            UsageError: there is no finished teacher yet, or the students would not use the cache in any phase.
        """
        live = [materials.live_because for materials in self.views]
        if None not in live:
            raise UsageError(f"nothing to cache: {live[0]}")
        for reason, (_, _, teachers) in zip(live, self._phases, strict=True):
            if reason is None:
                teachers.fill_cache()

    # ---- the baseline ----

    @property
    def _ce_arguments(self) -> dict[str, Any]:
        """Settings of the cross-entropy, which the baseline shares with the student; its weight means nothing there."""
        loss = self.experiment.label_loss()
        return {} if loss is None else self.materials.loss_arguments(loss)

    def baseline(self, seed: int) -> None:
        """The student's twin: the same initial weights, as many steps, the labels alone."""
        name, folder = f"baseline, seed {seed}", StageFolder(self.runner.root / "baseline" / f"seed-{seed}")
        if not self.runner.is_done(folder, self.prints.baseline(seed), name):
            self._baseline_job(seed, name, folder).run(self.runner.tell)

    def _new_student(self, name: str, dry: bool = False) -> PreTrainedModel:
        """As baseline and student start; from a teacher that is to be fine-tuned first, a dry run takes another."""
        recipe = self.experiment.student.from_teacher
        finetuned = None
        if recipe is not None and recipe.weights == "finetuned" and not dry:
            finetuned = self._phases[0][2].source(self.materials.lead)
        return self.materials.new_student(finetuned, lambda line: self.runner.say(name, line))

    def _baseline_job(self, seed: int, name: str, folder: StageFolder, dry: bool = False) -> TrainingJob:
        set_seed(seed)
        return self.runner.job(
            name,
            folder,
            self.prints.baseline(seed),
            model=self._new_student(name, dry),
            losses={"ce": CrossEntropyLoss(**self._ce_arguments)},
            train=baseline_rows(self.materials),
            arguments=self._baseline_arguments(folder, seed),
        )

    @property
    def _task(self) -> str:
        return self.materials.splits.problem_type

    @property
    def _rows(self) -> int:
        """That a student sees in an epoch, before any gate."""
        splits = self.materials.splits
        return len(splits.train) + (0 if splits.unlabeled is None else len(splits.unlabeled))

    def _baseline_arguments(self, folder: StageFolder, seed: int) -> Any:
        """The Trainer's arguments for as many steps as the student makes in all phases."""
        section = self.experiment.training.model_copy(update={"unlabeled_ratio": None})
        arguments = training_arguments(section, folder.checkpoints, seed)
        if self.experiment.phases:
            steps = 0
            for experiment, _, _ in self._phases:
                own = training_arguments(experiment.training, folder.checkpoints, seed)
                steps += same_budget(experiment.training, own, self._rows).max_steps
            section = same_budget(section, arguments, self._rows).model_copy(update={"max_steps": steps})
        elif self.materials.splits.unlabeled is not None:
            section = same_budget(section, arguments, self._rows)
        return training_arguments(section, folder.checkpoints, seed, self._task)

    # ---- the student ----

    def student(self, seed: int) -> None:
        """The distilled student, phase by phase; each phase starts from what the one before it left."""
        fingerprints = self.prints.phases(seed)
        folders = [StageFolder(path) for path in self._folders(seed)]
        names = [f"student, seed {seed}"]
        if len(folders) > 1:
            names = [f"student {seed}, phase {i + 1}" for i in range(len(folders))]
        for folder in folders[:-1]:
            # Refused where it is damaged, although nothing may be made of it any more.
            folder.record()
        # The last one is made of all the others.
        if self.runner.is_done(folders[-1], fingerprints[-1], names[-1]):
            return
        for i, (folder, fingerprint, name) in enumerate(zip(folders, fingerprints, names, strict=True)):
            last = i == len(folders) - 1
            if last or not self.runner.is_done(folder, fingerprint, name):
                model = load_classifier(str(folders[i - 1].path)) if i else None
                self._phase_job(i, seed, name, folder, fingerprint, model).run(self.runner.tell)

    def rehearse(self, seed: int, stages: Sequence[str] = STAGES) -> None:
        """Two steps of the baseline and of each phase of the student, the teacher live; nothing is kept of them."""
        if "baseline" in stages:
            folder = StageFolder(self.runner.root / "baseline" / f"seed-{seed}")
            self._baseline_job(seed, f"baseline, seed {seed}", folder, dry=True).rehearse(self.runner.tell)
        for i, path in enumerate(self._folders(seed) if "student" in stages else ()):
            name = f"student {seed}, phase {i + 1}" if self.experiment.phases else f"student, seed {seed}"
            self._phase_job(i, seed, name, StageFolder(path), {}, dry=True).rehearse(self.runner.tell)

    def _folders(self, seed: int) -> list[Any]:
        return phase_folders(self.runner.root / "student" / f"seed-{seed}", len(self._phases))

    def _phase_job(
        self,
        index: int,
        seed: int,
        name: str,
        folder: StageFolder,
        fingerprint: Fingerprint,
        model: PreTrainedModel | None = None,
        dry: bool = False,
    ) -> TrainingJob:
        """The training of a phase, from `model`, or from a student as the baseline starts."""
        experiment, materials, teachers = self._phases[index]
        # The head learns later, so that validation scores are noise until then.
        keeps_last = index < len(self._phases) - 1 and not materials.objective.reads_answers
        # The same seed at the same point as in the baseline's stage: both start from the same weights.
        set_seed(seed)
        model = self._new_student(name, dry) if model is None else model
        arguments = training_arguments(experiment.training, folder.checkpoints, seed, self._task, keeps_last)
        if experiment.data.unlabeled is not None and experiment.data.unlabeled_min_confidence is not None:
            # A gate leaves fewer rows, and the baseline does not know how many.
            section = same_budget(experiment.training, arguments, self._rows)
            arguments = training_arguments(section, folder.checkpoints, seed, self._task, keeps_last)
        return self.runner.job(
            name,
            folder,
            fingerprint,
            model=model,
            losses=materials.new_losses(),
            weights={key: section.weight for key, section in experiment.losses.items()},
            teacher=teachers.for_rehearsal() if dry else teachers.for_students(),
            train=student_rows(materials, lambda: materials.student_rows if dry else teachers.student_rows),
            arguments=arguments,
            settings=self._settings_of(index),
            run_settings=self._kept_settings,
        )

    @property
    def _kept_settings(self) -> dict[str, Any]:
        """Of the run, without where its results lie: that says nothing of the student, and they may be moved."""
        return {k: v for k, v in self.runner.run_settings.items() if k not in ("output_dir", "cache_dir")}

    def _settings_of(self, index: int) -> str:
        """The block that sets a phase's batches."""
        phases = self.experiment.phases
        own = bool(phases) and "per_device_train_batch_size" in phases[index].training.model_fields_set
        return f"phases.{index}.training" if own else "training"
