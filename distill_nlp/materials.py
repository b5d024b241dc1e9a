"""What all stages of an experiment share: data, labels, tokenizer, and the models before training."""

from __future__ import annotations

import copy
import hashlib
import json
from functools import cached_property
from typing import Any

from accelerate import PartialState
from datasets import concatenate_datasets
from transformers import PreTrainedModel

from distill_nlp.config import TRAIN_TOKENIZER, Experiment
from distill_nlp.data import Splits, content_hash, load_splits, tokenize
from distill_nlp.errors import UsageError
from distill_nlp.loading import is_classifier, load_backbone, load_classifier, load_config, load_tokenizer
from distill_nlp.losses import LOSSES, ModelShape
from distill_nlp.objective import DistillationObjective
from distill_nlp.stage_training import mixed_precision
from distill_nlp.stages import Fingerprint
from distill_nlp.student import build_student, label_arguments, model_from_config
from distill_nlp.teacher import label_order, reads_layers
from distill_nlp.teacher_cache import PRECISIONS


class Materials:
    """Loads each thing once, when it is first needed, and checks that they fit each other.

    Raises:
        UsageError: data, models and settings do not fit.
    """

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.state = PartialState()

    @cached_property
    def splits(self) -> Splits:
        with self.state.local_main_process_first():
            return load_splits(self.experiment.data, self.experiment.teacher.train_split)

    @cached_property
    def label_names(self) -> list[str]:
        """Names of the classes; where the data have none, those of a finished teacher."""
        names = self.splits.label_names
        if names == [f"LABEL_{i}" for i in range(len(names))] and self.finished_teacher is not None:
            return [self.finished_teacher.id2label[i] for i in range(len(names))]
        return names

    @cached_property
    def finished_teacher(self) -> Any | None:
        """The config of the named teacher if it is a classifier for these labels already, else None."""
        settings = self.experiment.teacher
        if settings.model is None or settings.finetune == "always":
            return None
        config = load_config(settings.model, settings.revision)
        if not is_classifier(config):
            if settings.finetune == "never":
                raise UsageError(f"teacher.finetune is never, but {settings.model} has no classification head")
            return None
        wanted = type(config)(**label_arguments(self.splits.label_names))
        try:
            label_order(config, wanted)
        except ValueError as error:
            hint = "set teacher.finetune: always to train a new head on it"
            raise UsageError(f"teacher.model {settings.model} does not fit the data: {error}; or {hint}") from None
        return config

    @cached_property
    def tokenizer(self) -> Any:
        settings = self.experiment
        name = settings.data.tokenizer
        if name == TRAIN_TOKENIZER:
            tokenizer = self._trained_tokenizer()
        elif name is not None:
            tokenizer = load_tokenizer(name)
        else:
            tokenizer = load_tokenizer(settings.teacher.model, settings.teacher.revision)
        if tokenizer.pad_token_id is None:
            raise UsageError(f"the tokenizer {name or settings.teacher.model} has no padding token")
        tokenizer.truncation_side = settings.data.truncation_side
        tokenizer.model_max_length = settings.data.max_length
        return tokenizer

    def _trained_tokenizer(self) -> Any:
        from distill_nlp.synthetic import train_tokenizer

        parts = [self.splits.teacher_train, self.splits.train, self.splits.unlabeled]
        columns = [part[c] for part in parts if part is not None for c in ("text", "text_pair") if c in part.features]
        return train_tokenizer([text for column in columns for text in column], self.experiment.data.vocab_size)

    def check_tokenizers(self) -> None:
        """Both models must read the same tokens: whole vocabularies are compared, not their sizes."""
        settings = self.experiment
        sources = {"student.model": (settings.student.model, settings.student.revision)}
        if settings.data.tokenizer is not None:
            sources["teacher.model"] = (settings.teacher.model, settings.teacher.revision)
        for where, (name, revision) in sources.items():
            if name is not None and load_tokenizer(name, revision).get_vocab() != self.tokenizer.get_vocab():
                used = settings.data.tokenizer or settings.teacher.model
                raise UsageError(
                    f"{where} {name} has another vocabulary than the tokenizer {used}; teacher and student must share "
                    "one: choose another student, or make one by student.from_teacher"
                )

    @cached_property
    def data_print(self) -> Fingerprint:
        """What of the data every stage depends on."""
        data = self.experiment.data
        return {
            "tokenizer": _tokenizer_hash(self.tokenizer),
            "max_length": data.max_length,
            "truncation_side": data.truncation_side,
            "label_names": self.label_names,
            "validation": content_hash(self.splits.validation),
        }

    @cached_property
    def _needs_token_type_ids(self) -> bool:
        return "text_pair" in self.splits.train.features

    def tokens(self, dataset: Any) -> Any:
        """Token ids of a split; every rank must call it, the main one of each machine does the work."""
        with self.state.local_main_process_first():
            return self.tokens_alone(dataset)

    def tokens_alone(self, dataset: Any) -> Any:
        """The same where the other ranks are not there."""
        return tokenize(dataset, self.tokenizer, self.experiment.data.max_length, self._needs_token_type_ids)

    @cached_property
    def student_rows(self) -> Any:
        """Token ids of all that the distilled students learn from: the labeled rows and the pool."""
        train = self.tokens(self.splits.train)
        if self.splits.unlabeled is None:
            return train
        return concatenate_datasets([train, self.tokens(self.splits.unlabeled)])

    @cached_property
    def validation(self) -> Any:
        return self.tokens(self.splits.validation)

    # ---- the models before training ----

    def new_teacher(self) -> PreTrainedModel:
        """The teacher to be fine-tuned."""
        settings = self.experiment.teacher
        overrides = {**label_arguments(self.label_names), **settings.overrides}
        if settings.model is not None:
            return load_classifier(settings.model, settings.revision, **overrides)
        try:
            return model_from_config(self._sized(settings.config or {}), overrides)
        except (ValueError, TypeError) as error:
            raise UsageError(f"teacher.{error}") from error

    def new_student(self) -> PreTrainedModel:
        """The student as both the baseline and the distilled one start; what is random follows the seed."""
        settings = self.experiment.student
        teacher, recipe = None, None
        if settings.from_teacher is not None:
            recipe = settings.from_teacher.model_dump()
            teacher = load_backbone(self.experiment.teacher.model or "", self.experiment.teacher.revision)
        try:
            return build_student(
                self.label_names,
                model=settings.model,
                config=settings.config and self._sized(settings.config),
                from_teacher=recipe,
                teacher=teacher,
                overrides=settings.overrides,
                revision=settings.revision,
            )
        except (ValueError, TypeError) as error:
            raise UsageError(f"student.{error}") from error

    @cached_property
    def objective(self) -> DistillationObjective:
        """The losses, bound to the two models before any training, which would be lost on a mistake there.

        Raises:
            UsageError: the student cannot be built, or the losses do not fit the two models.
        """
        settings = self.experiment.teacher
        if settings.model is not None:
            teacher = load_config(settings.model, settings.revision)
        else:
            teacher = self.new_teacher().config
        student = self.new_student()
        length = self.experiment.data.max_length
        for role, config in (("teacher", teacher), ("student", student.config)):
            longest = getattr(config, "max_position_embeddings", None)
            if longest is not None and longest < length:
                raise UsageError(f"data.max_length is {length}, but the {role} reads at most {longest} tokens")
        teacher = copy.copy(teacher)
        teacher.id2label = student.config.id2label
        sections = self.experiment.losses
        objective = DistillationObjective(
            {name: LOSSES[name](**section.arguments()) for name, section in sections.items()},
            {name: section.weight for name, section in sections.items()},
        )
        try:
            objective.bind(ModelShape.from_config(student.config), ModelShape.from_config(teacher))
        except ValueError as error:
            raise UsageError(str(error)) from None
        return objective

    def check_student(self) -> None:
        """Builds the student and sizes the losses once; raises as `objective` does."""
        _ = self.objective

    @cached_property
    def mixed_precision(self) -> str:
        """Autocast of the students' training, and so of the teacher in it."""
        return mixed_precision(self.experiment.training)

    @cached_property
    def live_because(self) -> str | None:
        """Why the teacher has to run in every step of the students; None where its cached logits do."""
        if not self.experiment.teacher.cache:
            return "teacher.cache is false"
        if not self.objective.needs_teacher:
            return "no loss needs the teacher"
        if reading := reads_layers(self.objective):
            return f"losses {', '.join(reading)} read the teacher's layers, and only its logits are cached"
        if self.mixed_precision not in PRECISIONS:
            return f"logits are not cached under {self.mixed_precision}"
        return None

    def _sized(self, config: dict[str, Any]) -> dict[str, Any]:
        """A config from scratch, over this tokenizer's vocabulary."""
        return {"vocab_size": len(self.tokenizer), "pad_token_id": self.tokenizer.pad_token_id, **config}


def _tokenizer_hash(tokenizer: Any) -> str:
    """A hash of vocabulary and rules, without the truncation and padding that the last call left set."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    rules = {key: value for key, value in parts.items() if key not in ("truncation", "padding")}
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()[:16]
