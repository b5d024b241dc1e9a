"""What each result of an experiment depends on; a finished stage is known by it."""

from __future__ import annotations

import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any

from accelerate import PartialState

from distill_nlp.config import Experiment, TrainingSection
from distill_nlp.data import content_hash
from distill_nlp.loading import checkpoint_print
from distill_nlp.materials import Materials
from distill_nlp.stages import Fingerprint, StageFolder
from distill_nlp.teacher_parts import TeacherPart
from distill_nlp.tokenizers_compared import tokenizer_hash
from distill_nlp.training_settings import effective


class Fingerprints:
    """Settings, rows, checkpoints and launch, as nested plain values, for each trained model."""

    def __init__(self, experiment: Experiment, materials: Materials) -> None:
        self.experiment = experiment
        self.materials = materials

    @cached_property
    def launch(self) -> Fingerprint:
        """What a launcher decides: it changes the results as a setting does."""
        precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        # Not before training arguments were made, which set up the processes.
        return {"processes": PartialState().num_processes, "mixed_precision": precision}

    def trust_launch_of(self, finished: Path) -> None:
        """Takes the launch that a finished stage was made under for one's own, to look at its results."""
        record = StageFolder(finished).record() or {}
        self.launch = record.get("fingerprint", {}).get("launch", self.launch)

    @cached_property
    def teachers(self) -> list[Fingerprint]:
        """One for each teacher."""
        return [self._teacher(part) for part in self.materials.teachers]

    @property
    def given(self) -> Fingerprint:
        """What all students learn from and are measured by, whatever their settings: rows and teachers."""
        pool = self.materials.splits.unlabeled
        rows = {"train": self._rows_print("train")}
        if pool is not None:
            rows["unlabeled"] = self._rows_print("unlabeled")
        teachers = {part.name: found for part, found in zip(self.materials.teachers, self.teachers, strict=True)}
        return plain({"data": self.materials.data_print | rows} | teachers)

    def _teacher(self, part: TeacherPart) -> Fingerprint:
        settings = part.settings
        if part.finished is not None:
            return plain({"model": checkpoint_print(settings.model, settings.revision)})
        train = self._rows_print("teacher_train")
        return plain(
            {
                "data": self.materials.data_print_of(part) | {"train": train},
                "teacher": settings.model_dump(include={"config", "overrides", "seed"}),
                "model": checkpoint_print(settings.model, settings.revision),
                "training": self._effective(self.experiment.teacher_training(), of_student=False),
                "launch": self.launch,
            }
        )

    def _rows_print(self, split: str) -> Any:
        """Of what a stage trains on: all rows, but of a stream its files, and the buffer that orders it."""
        splits = self.materials.splits
        if splits.streams is None:
            return content_hash(getattr(splits, split))
        return getattr(splits.streams, split).identity | {"shuffle_buffer": self.experiment.data.shuffle_buffer}

    def _effective(self, section: TrainingSection, of_student: bool) -> Fingerprint:
        return effective(section, of_student, self.materials.splits.problem_type)

    def _common(self, seed: int, of_student: bool) -> Fingerprint:
        experiment = self.experiment
        student, teacher = experiment.student, experiment.teacher
        source, layers_of = student.from_teacher, None
        if source is not None:
            finetuned = source.weights == "finetuned"
            layers_of = self.teachers[0] if finetuned else checkpoint_print(teacher.model, teacher.revision)
        settings = student.model_dump(exclude={"model", "revision", "from_teacher"})
        return {
            "data": self.materials.data_print | {"train": self._rows_print("train")},
            "student": settings | {"from_teacher": None if source is None else source.chosen()},
            "model": layers_of or checkpoint_print(student.model, student.revision),
            "training": self._effective(experiment.training, of_student),
            "seed": seed,
            "launch": self.launch,
        }

    def baseline(self, seed: int) -> Fingerprint:
        pool = self.materials.splits.unlabeled
        loss = self.experiment.label_loss()
        ce = {} if loss is None else loss.arguments()
        # The pool sets the number of steps, unless that is given: with and without it there is then one baseline.
        training = self.experiment.training
        given = training.max_steps > 0 and training.eval_strategy != "epoch"
        rest = {"ce": ce, "unlabeled_rows": 0 if pool is None or given else len(pool)}
        if self.experiment.phases:
            # Their steps together are its own.
            phases = [self._effective(e.training, of_student=False) for e in self.experiment.student_trainings()]
            given = self.experiment.data.streaming
            rest |= {"unlabeled_rows": 0 if pool is None or given else len(pool), "phases": phases}
        return plain(self._common(seed, of_student=False) | rest)

    def student(self, seed: int) -> Fingerprint:
        """Of the distilled student, after its last phase."""
        return self.phases(seed)[-1]

    def phases(self, seed: int) -> list[Fingerprint]:
        """Of the student after each phase of its training."""
        found: list[Fingerprint] = []
        for prints in self._of_phases:
            one = prints._student(seed)
            found.append({**one, "after": found[-1]} if found else one)
        return found

    @cached_property
    def _of_phases(self) -> list[Fingerprints]:
        # Kept: each hashes the teachers' weights and rows once.
        trainings = self.experiment.student_trainings()
        found = [self if e is self.experiment else Fingerprints(e, self.materials) for e in trainings]
        for prints in found:
            prints.launch = self.launch
            # They are trained once, by the settings of the whole: what a phase sets for itself is not theirs.
            prints.teachers = self.teachers
        return found

    def _student(self, seed: int) -> Fingerprint:
        pool = self.materials.splits.unlabeled
        rest = {
            "losses": {key: section.model_dump() for key, section in self.experiment.losses.items()},
            "unlabeled": None if pool is None else self._rows_print("unlabeled"),
            "teacher": self.teachers[0],
        }
        return plain(self._common(seed, of_student=True) | rest | self._settings_of_teachers)

    @property
    def _settings_of_teachers(self) -> Fingerprint:
        """The rest of what the teachers' answers depend on; nothing where all of it is at its default."""
        experiment, parts = self.experiment, self.materials.teachers
        found: Fingerprint = {}
        if len(parts) > 1:
            weights = [part.settings.weight for part in parts]
            found |= {"ensemble": self.teachers[1:], "weights": weights, "mean": experiment.teacher.mean}
        if self.materials.readers:
            found["teachers_read"] = [
                {"tokenizer": tokenizer_hash(part.tokenizer), "max_length": part.max_length} for part in parts
            ]
        if any(part.settings.restrict_labels for part in parts):
            found["restrict_labels"] = [part.settings.restrict_labels for part in parts]
        if experiment.teacher.cache and experiment.teacher.cache_dtype != "float32":
            found["cache_dtype"] = experiment.teacher.cache_dtype
        data = experiment.data
        if data.unlabeled_min_confidence is not None or data.pseudo_labels:
            found |= data.model_dump(include={"unlabeled_min_confidence", "pseudo_labels"})
        return found


def plain(fingerprint: Fingerprint) -> Fingerprint:
    """As it will be read back: tuples are lists, keys are strings."""
    return json.loads(json.dumps(fingerprint))
