"""What the checks look at, taken from an experiment's materials: texts, rows, models, steps, and what is left to do."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from distill_nlp.capture import enable_quick_attention
from distill_nlp.collation import DistillationCollator
from distill_nlp.config import TrainingSection
from distill_nlp.doctor.measure import Batch, Step
from distill_nlp.doctor.texts import SAMPLE_ROWS, TextSample, sample_indices, sample_texts
from distill_nlp.durable_files import read_json
from distill_nlp.ensemble import TeacherEnsemble
from distill_nlp.errors import DistillError
from distill_nlp.fingerprints import Fingerprints
from distill_nlp.lengths import most_positions
from distill_nlp.loading import load_classifier
from distill_nlp.losses import CrossEntropyLoss
from distill_nlp.losses.base import MULTI_LABEL
from distill_nlp.manifests import newest_intact
from distill_nlp.materials import Materials
from distill_nlp.modeling import DistillationModel
from distill_nlp.objective import DistillationObjective
from distill_nlp.outputs import Features
from distill_nlp.stages import STAGE_FILE, Fingerprint, StageFolder, differences
from distill_nlp.teacher import Teacher
from distill_nlp.teacher_parts import TeacherPart
from distill_nlp.tokenization import TEXT_COLUMNS, tokenize
from distill_nlp.training_settings import mixed_precision

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
SPLITS = ("train", "validation", "test")
STEP_ROWS = 256


class Subject:
    """An experiment before its first step. Models are built for the checks, and none of the materials' is changed.

    Args:
        materials: of the experiment; their splits are loaded by all ranks, the rest by whoever calls.
        prints: of its stages.
    """

    def __init__(self, materials: Materials, prints: Fingerprints) -> None:
        self.materials = materials
        self.prints = prints
        self.experiment = materials.experiment
        self.root = Path(self.experiment.output_dir).expanduser()
        self._longest: dict[str, dict[str, Any]] = {}
        on_cpu = self.experiment.training.use_cpu
        self.device = torch.device("cpu") if on_cpu else torch.device(materials.state.device)
        self.ranks = materials.state.num_processes

    @cached_property
    def phases(self) -> list[Subject]:
        """One for each phase of the students' training, the first of which it is itself."""
        later = self.prints.experiment.student_trainings()[1:]
        return [self, *(Subject(self.materials.seen_by(one), self.prints) for one in later)]

    # ---- texts and rows ----

    def columns(self, split: str) -> list[Sequence[str]]:
        """The texts of a split, and the second texts of pairs."""
        dataset = getattr(self.materials.splits, split)
        return [list(dataset[name]) for name in TEXT_COLUMNS if name in dataset.column_names]

    def labels(self, split: str) -> list[Any]:
        """The class of each row, or its labels as a tuple of 0 and 1."""
        labels = getattr(self.materials.splits, split)["labels"]
        several = self.materials.splits.problem_type == MULTI_LABEL
        return [tuple(row) for row in labels] if several else list(labels)

    @cached_property
    def samples(self) -> dict[str, TextSample]:
        """Split -> how the student's tokenizer reads a sample of it."""
        names = [*SPLITS, *(["unlabeled"] if self.materials.splits.unlabeled is not None else [])]
        return {name: sample_texts(self.columns(name), self.materials.tokenizer) for name in names}

    def sample_for(self, part: TeacherPart) -> dict[str, TextSample]:
        """The same of train for a teacher that reads tokens of its own."""
        return {"train": sample_texts(self.columns("train"), part.tokenizer, SAMPLE_ROWS)}

    def encoded(self, dataset: Any, rows: int, part: TeacherPart | None = None, seed: int = 0) -> list[dict[str, Any]]:
        """A random sample of a split as token ids.

        Args:
            rows: of the sample.
            part: a teacher, for its own tokens; None: the student's, with those of the teachers that run live.
        """
        data, types = self.experiment.data, "text_pair" in self.materials.splits.train.features
        chosen = dataset.select(sample_indices(len(dataset), rows, seed))
        # In memory: on the data set's own files, `map` would leave another file beside them.
        made = Dataset.from_dict({name: list(chosen[name]) for name in chosen.column_names})
        if part is not None:
            return list(tokenize(made, part.tokenizer, part.max_length, types))
        for prefix, reader in self.readers.items():
            made = tokenize(made, reader.tokenizer, reader.max_length, types, prefix=prefix, keep_texts=True)
        return list(tokenize(made, self.materials.tokenizer, data.max_length, types))

    @cached_property
    def readers(self) -> dict[str, TeacherPart]:
        """Those teachers that read tokens of their own in the students' steps."""
        return self.materials.readers if self.materials.live_because is not None else {}

    @cached_property
    def step_rows(self) -> list[dict[str, Any]]:
        """Rows of the distilled students' training."""
        return self.encoded(self.materials.splits.train, STEP_ROWS)

    @cached_property
    def longest_row(self) -> dict[str, Any]:
        """One as long as training meets: the longest of the sample, repeated to the longest length."""
        longest = max(self.step_rows, key=lambda row: len(row["input_ids"]))
        lengths = [int(s.lengths.max()) for name, s in self.samples.items() if name in ("train", "unlabeled")]
        limits = {prefix: part.max_length for prefix, part in self.readers.items()}
        return stretched(longest, min(max(lengths), self.experiment.data.max_length), limits)

    def longest_row_of(self, part: TeacherPart) -> dict[str, Any]:
        """The longest of a sample of a teacher's own training, which is read once."""
        if part.name not in self._longest:
            rows = self.encoded(self.materials.splits.teacher_train, SAMPLE_ROWS, part)
            self._longest[part.name] = max(rows, key=lambda row: len(row["input_ids"]))
        return self._longest[part.name]

    def collate(self, rows: Sequence[dict[str, Any]]) -> Batch:
        """Encoded rows as a batch on the device."""
        tokenizers = {prefix: part.tokenizer for prefix, part in self.readers.items()}
        batch = DistillationCollator(self.materials.tokenizer, tokenizers)(rows)
        return {name: x.to(self.device) for name, x in batch.items()}

    def collate_for(self, part: TeacherPart) -> Callable[[Sequence[dict[str, Any]]], Batch]:
        """The same for a teacher's own training."""
        collator = DistillationCollator(part.tokenizer)
        return lambda rows: {name: x.to(self.device) for name, x in collator(rows).items()}

    # ---- models and steps ----

    def source(self, part: TeacherPart) -> tuple[str, str | None] | None:
        """Folder or Hub id of a teacher that is finished, and its revision; None for one to be trained."""
        if part.finished is not None:
            return part.settings.model or "", part.settings.revision
        folder = StageFolder(self.root / part.name)
        return (str(folder.path), None) if folder.changes(self.prints.teachers[part.index]) == [] else None

    def teacher_model(self, part: TeacherPart) -> PreTrainedModel:
        """The finished teacher, or the one that its training starts from."""
        source = self.source(part)
        model = self.materials.new_teacher(part) if source is None else load_classifier(*source)
        return model.to(self.device)

    @cached_property
    def student(self) -> PreTrainedModel:
        """A student to look at."""
        return self.materials.new_student()

    @cached_property
    def lead_model(self) -> nn.Module:
        """The first teacher to look at: its layers without weights."""
        config = self.materials.lead.finished or self.materials.new_teacher(self.materials.lead).config
        with torch.device("meta"):
            return AutoModelForSequenceClassification.from_config(copy.deepcopy(config))

    def readable(self, part: TeacherPart | None = None) -> int | None:
        """Tokens that the readers of one tokenizer can read at most; None where they have no limit.

        Args:
            part: a teacher that reads its own; None: the student, and the first teacher where it reads the same.
        """
        try:
            if part is not None:
                configs = [part.finished or self.materials.new_teacher(part).config]
            else:
                both = [self.student] if self.materials.lead.prefix else [self.student, self.lead_model]
                configs = [model.config for model in both]
        except DistillError:
            # A model that cannot be built is a finding of its own.
            return None
        limits = [most_positions(config) for config in configs]
        return min((limit for limit in limits if limit is not None), default=None)

    def live_teacher(self) -> Teacher | TeacherEnsemble:
        """The teacher as it runs in the students' steps."""
        members = [
            Teacher(
                self.teacher_model(part),
                part.tokenizer if part.prefix else None,
                prefix=part.prefix,
                restrict_labels=part.settings.restrict_labels,
            )
            for part in self.materials.teachers
        ]
        weights = [part.settings.weight for part in self.materials.teachers]
        return members[0] if len(members) == 1 else TeacherEnsemble(members, weights, self.experiment.teacher.mean)

    def new_objective(self) -> DistillationObjective:
        """The students' losses, not bound yet."""
        sections = self.experiment.losses
        return DistillationObjective(
            self.materials.new_losses(),
            {name: section.weight for name, section in sections.items()},
        )

    def student_step(self) -> tuple[Step, list[torch.Tensor]]:
        """A step of the distilled student, and the weights of the teacher that runs in it."""
        objective = self.new_objective()
        # A loss whose weight rises from 0 needs its memory later.
        objective.weights = {name: schedule.highest for name, schedule in objective.schedules.items()}
        student = self._as_trained(self.materials.new_student())
        config = self.lead_model.config
        model = DistillationModel(student, objective, config if objective.needs_teacher else None)
        autocast = AUTOCAST.get(self.materials.mixed_precision)
        if not objective.needs_teacher:
            return Step(model, None, autocast), []
        if self.materials.live_because is None:
            states = objective.pooled_states()
            return Step(model, cached_answers(student.config.num_labels, states, config), autocast), []
        teacher = self.live_teacher().bind(student.config, objective)
        teacher.prepare(self.device, None)
        return Step(model, teacher, autocast), list(teacher.parameters())

    def baseline_step(self) -> Step:
        """A step of the student on labels alone."""
        return self._plain_step(self.materials.new_student(), self.prints.experiment.training)

    def teacher_step(self, part: TeacherPart) -> Step:
        """A step of a teacher's own training."""
        return self._plain_step(self.teacher_model(part), self.experiment.teacher_training())

    def _plain_step(self, model: PreTrainedModel, section: TrainingSection) -> Step:
        objective = DistillationObjective({"ce": CrossEntropyLoss()})
        wrapped = DistillationModel(self._as_trained(model), objective)
        return Step(wrapped, None, AUTOCAST.get(mixed_precision(section)))

    def _as_trained(self, model: PreTrainedModel) -> PreTrainedModel:
        """Where and how the trainer has it."""
        if self.device.type == "cpu":
            enable_quick_attention(model)
        return model.to(self.device)

    # ---- what is left to do ----

    def steps_left(self, path: Path, fingerprint: Fingerprint, steps: int) -> int:
        """Of so many steps of a stage: none where it is finished, fewer after a checkpoint of the same settings."""
        folder = StageFolder(path)
        if folder.changes(fingerprint) == []:
            return 0
        attempt = read_json(folder.work / STAGE_FILE)
        if attempt is None or differences(attempt.get("fingerprint", {}), fingerprint):
            return steps
        # Nothing is removed here: another process may be writing its next one.
        checkpoint = newest_intact(folder.checkpoints, lambda line: None)
        return steps if checkpoint is None else max(steps - int(checkpoint.name.rpartition("-")[2]), 1)


def cached_answers(classes: int, states: set[tuple[int, str]], config: Any) -> Callable[[Batch], Features]:
    """Stands in for a teacher whose answers are cached: numbers of the right shapes.

    Args:
        classes: C of the logits (B, C).
        states: (layer, pooling) that some loss reads.
        config: of the teacher, for the width of its states.
    """

    def answer(batch: Batch) -> Features:
        like = batch["input_ids"]
        pooled = {state: torch.ones(len(like), config.hidden_size, device=like.device) for state in states}
        return Features(torch.zeros(len(like), classes, device=like.device), pooled=pooled)

    return answer


def stretched(row: dict[str, Any], tokens: int, limits: Mapping[str, int] | None = None) -> dict[str, Any]:
    """An encoded row repeated to so many tokens; what other readers have of it grows alike, its labels stay.

    Args:
        limits: prefix of another reader's columns -> the most tokens that it reads.
    """
    factor = tokens / len(row["input_ids"])
    if factor <= 1:
        return row

    def grown(name: str, values: list) -> list:
        own = max((prefix for prefix in limits or {} if name.startswith(prefix)), key=len, default=None)
        length = round(len(values) * factor)
        length = length if own is None else min(length, limits[own])
        return (values * (length // len(values) + 1))[:length]

    return {name: grown(name, x) if isinstance(x, list) and name != "labels" else x for name, x in row.items()}
