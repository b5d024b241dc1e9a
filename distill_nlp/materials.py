"""What all stages of an experiment share: data, labels, tokenizer, and the models before training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cached_property
from typing import Any

from accelerate import PartialState
from datasets import concatenate_datasets
from transformers import PreTrainedModel

from distill_nlp.checkpoint_checks import check_embeddings
from distill_nlp.config import TRAIN_TOKENIZER, Experiment, LossSection
from distill_nlp.data import Splits, content_hash, load_splits
from distill_nlp.data_streams import load_streamed_splits
from distill_nlp.errors import UsageError
from distill_nlp.labels import anonymous
from distill_nlp.lengths import refuse_too_long
from distill_nlp.loading import load_backbone, load_classifier, load_tokenizer
from distill_nlp.losses import LOSSES, DistillationLoss, ModelShape
from distill_nlp.losses.cross_entropy import BALANCED, balanced_class_weights
from distill_nlp.objective import DistillationObjective
from distill_nlp.parameter_groups import check_parts
from distill_nlp.stages import Fingerprint
from distill_nlp.student import build_student
from distill_nlp.teacher_cache import PRECISIONS
from distill_nlp.teacher_parts import TeacherPart, assign_tokenizers, prepared
from distill_nlp.tokenization import tokenize
from distill_nlp.tokenizers_compared import token_difference, tokenizer_hash
from distill_nlp.training_settings import mixed_precision


class Materials:
    """Loads each thing once, when it is first needed, and checks that they fit each other.

    Raises:
        UsageError: data, models and settings do not fit.
    """

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.state = PartialState()

    def seen_by(self, experiment: Experiment) -> Materials:
        """The same data, teachers and tokenizers for another phase of the student's training."""
        _ = self.student_rows
        other = copy.copy(self)
        other.experiment = experiment
        for own in ("objective", "mixed_precision", "live_because"):
            vars(other).pop(own, None)
        return other

    @cached_property
    def splits(self) -> Splits:
        with self.state.local_main_process_first():
            load = load_streamed_splits if self.experiment.data.streaming else load_splits
            return load(self.experiment.data, self.experiment.teacher.train_split)

    @cached_property
    def teachers(self) -> list[TeacherPart]:
        """The teacher, or all of an ensemble, the first one first."""
        settings, data = self.experiment.teacher, self.experiment.data
        labels, task = self.splits.label_names, self.splits.problem_type
        return [TeacherPart(member, i, data, labels, task) for i, member in enumerate(settings.members())]

    @property
    def lead(self) -> TeacherPart:
        """The first teacher."""
        return self.teachers[0]

    @cached_property
    def label_names(self) -> list[str]:
        """Names of the classes; where the data have none, those of a finished teacher."""
        names, finished = self.splits.label_names, self.lead.finished
        if anonymous(names) and names[0].startswith("LABEL_") and finished is not None:
            return [finished.id2label[i] for i in range(len(names))]
        return names

    @cached_property
    def tokenizer(self) -> Any:
        """The student's."""
        settings = self.experiment
        name, student, data = settings.data.tokenizer, settings.student, settings.data
        own = None
        if name == TRAIN_TOKENIZER:
            own = self._trained_tokenizer()
        elif name is not None:
            own = load_tokenizer(name)
        elif student.model is not None:
            own = load_tokenizer(student.model, student.revision)
        # Where it reads as the teacher's does, the teacher's file goes on with the student.
        if own is None or (name is None and token_difference(own, self.lead.own_tokenizer) is None):
            own = self.lead.own_tokenizer
        return prepared(own, data, data.max_length)

    def _trained_tokenizer(self) -> Any:
        from distill_nlp.synthetic import train_tokenizer

        parts = [self.splits.teacher_train, self.splits.train, self.splits.unlabeled]
        columns = [part[c] for part in parts if part is not None for c in ("text", "text_pair") if c in part.features]
        return train_tokenizer([text for column in columns for text in column], self.experiment.data.vocab_size)

    @cached_property
    def readers(self) -> dict[str, TeacherPart]:
        """prefix of columns -> a teacher that reads these; none where all read the student's tokens."""
        return assign_tokenizers(self.teachers, self.tokenizer, self.experiment.data.max_length)

    def check_tokenizers(self) -> None:
        """The student's embeddings must be those of its tokens.

        Raises:
            UsageError: they are of another vocabulary.
        """
        data, student = self.experiment.data, self.experiment.student
        _ = self.readers
        copied = student.from_teacher is not None and self.lead.own_tokenizer is not None  # None: it is from scratch
        if data.tokenizer is None or (student.model is None and not copied):
            return
        if student.model is not None:
            where, own = f"student.model {student.model}", load_tokenizer(student.model, student.revision)
        else:
            where, own = "student.from_teacher", self.lead.own_tokenizer
        if difference := token_difference(own, self.tokenizer):
            raise UsageError(
                f"{where} has another vocabulary than data.tokenizer {data.tokenizer} ({difference}); leave "
                "data.tokenizer out, or start the student from a config"
            )

    @cached_property
    def data_print(self) -> Fingerprint:
        """What of the data every student depends on."""
        return self._print_of(self.tokenizer, self.experiment.data.max_length)

    def data_print_of(self, teacher: TeacherPart) -> Fingerprint:
        """The same of a teacher, by its own tokens."""
        _ = self.readers
        return self._print_of(teacher.tokenizer, teacher.max_length)

    def _print_of(self, tokenizer: Any, max_length: int) -> Fingerprint:
        return {
            "tokenizer": tokenizer_hash(tokenizer),
            "max_length": max_length,
            "truncation_side": self.experiment.data.truncation_side,
            "label_names": self.label_names,
            "validation": content_hash(self.splits.validation),
        }

    @cached_property
    def _needs_token_type_ids(self) -> bool:
        return "text_pair" in self.splits.train.features

    def tokens(self, dataset: Any, teacher: TeacherPart | None = None) -> Any:
        """Token ids of a split, the student's or a teacher's own.

        Every rank must call it; the main one of each machine does the work.
        """
        with self.state.local_main_process_first():
            return self.tokens_alone(dataset, teacher)

    def tokens_alone(self, dataset: Any, teacher: TeacherPart | None = None) -> Any:
        """The same where the other ranks are not there."""
        _ = self.readers
        reader = self if teacher is None else teacher
        length = self.experiment.data.max_length if teacher is None else teacher.max_length
        return tokenize(dataset, reader.tokenizer, length, self._needs_token_type_ids)

    @cached_property
    def student_rows(self) -> Any:
        """Token ids of all that the students learn from, labeled rows and the pool, also as the teachers read it."""
        parts = [part for part in (self.splits.train, self.splits.unlabeled) if part is not None]
        with self.state.local_main_process_first():
            return concatenate_datasets([self._for_all_readers(part) for part in parts])

    def _for_all_readers(self, dataset: Any) -> Any:
        types = self._needs_token_type_ids
        for prefix, part in self.readers.items():
            dataset = tokenize(dataset, part.tokenizer, part.max_length, types, prefix=prefix, keep_texts=True)
        return tokenize(dataset, self.tokenizer, self.experiment.data.max_length, types)

    # ---- the models before training ----

    def new_teacher(self, teacher: TeacherPart) -> PreTrainedModel:
        """A teacher to be fine-tuned."""
        return teacher.new_model(self.label_names, self._sizes)

    def new_student(
        self, finetuned: tuple[str, str | None] | None = None, say: Callable[[str], None] | None = None
    ) -> PreTrainedModel:
        """The student as both the baseline and the distilled one start; what is random follows the seed.

        Args:
            finetuned: where the first teacher lies after its training, folder or Hub id and revision, for
                `student.from_teacher.weights: finetuned`. Without it the student is one of the same shapes to look at.
            say: gets one line of what was made.

        Raises:
            UsageError: the settings do not fit each other or the teacher.
        """
        settings = self.experiment.student
        teacher, recipe = None, None
        if settings.from_teacher is not None:
            recipe = settings.from_teacher.chosen()
            weights = recipe.pop("weights", "pretrained")
            teacher = self._layers_source(finetuned if weights == "finetuned" else None)
        try:
            return build_student(
                self.label_names,
                model=settings.model,
                config=settings.config and {**self._sizes, **settings.config},
                from_teacher=recipe,
                teacher=teacher,
                overrides=settings.overrides,
                attention_dropout=settings.attention_dropout,
                revision=settings.revision,
                problem_type=self.splits.problem_type,
                **({} if say is None else {"say": say}),
            )
        except (ValueError, TypeError) as error:
            raise UsageError(f"student.{error}") from error

    def _layers_source(self, finetuned: tuple[str, str | None] | None) -> PreTrainedModel:
        """The model whose layers the student takes: after its training, or before it and without a head.

        One that is a classifier for these labels already, and is not to be trained, has its head in both cases.
        """
        if finetuned is not None:
            return load_classifier(*finetuned)
        if self.lead.settings.model is None:
            return self.new_teacher(self.lead)
        load = load_backbone if self.lead.finished is None else load_classifier
        return load(self.lead.settings.model, self.lead.settings.revision)

    @cached_property
    def objective(self) -> DistillationObjective:
        """The losses, bound to the two models before any training, which would be lost on a mistake there.

        Raises:
            UsageError: the student cannot be built, or the losses do not fit the two models.
        """
        configs = [part.config(self.label_names, self._sizes) for part in self.teachers]
        student = self.new_student()
        lengths = [(part.name, config, part.max_length) for part, config in zip(self.teachers, configs, strict=True)]
        refuse_too_long(lengths, student.config, self.experiment.data.max_length)
        teacher = copy.copy(configs[0])
        teacher.id2label = student.config.id2label
        weights = {name: section.weight for name, section in self.experiment.losses.items()}
        objective = DistillationObjective(self.new_losses(), weights)
        try:
            check_embeddings(self.tokenizer, student.config, "the student")
            objective.bind(ModelShape.from_config(student.config), ModelShape.from_config(teacher))
            check_parts(student, self.experiment.training, objective.reads_answers)
        except ValueError as error:
            raise UsageError(str(error)) from None
        self._check_layers_can_be_read(objective)
        return objective

    def _check_layers_can_be_read(self, objective: DistillationObjective) -> None:
        if len(self.teachers) > 1 and (reading := objective.reads_layers()):
            raise UsageError(
                f"losses {', '.join(reading)} read layers of the teacher, which an ensemble has not; use losses of the "
                "logits, or leave teacher.ensemble out"
            )
        _ = self.readers
        if self.lead.prefix and (reading := objective.token_level()):
            length, other = self.experiment.data.max_length, self.lead.max_length
            difference = token_difference(self.lead.tokenizer, self.tokenizer)
            why = f"cut at {other} and {length} tokens" if difference is None else difference
            raise UsageError(
                f"losses {', '.join(reading)} compare token by token, but teacher and student read different tokens "
                f"({why}); use losses of the logits, pkd, or relations between examples"
            )

    def new_losses(self) -> dict[str, DistillationLoss]:
        """The losses of the experiment, unbound."""
        return {name: LOSSES[name](**self.loss_arguments(s)) for name, s in self.experiment.losses.items()}

    def loss_arguments(self, section: LossSection) -> dict[str, Any]:
        """A loss's settings, what is to be taken from the data put in."""
        arguments = section.arguments()
        if arguments.get("class_weights") == BALANCED:
            try:
                weights = balanced_class_weights(self.splits.train["labels"], len(self.splits.label_names))
            except ValueError as error:
                raise UsageError(f"losses.ce.{error}") from None
            arguments["class_weights"] = weights
        return arguments

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
        if self.experiment.data.streaming:
            return "rows of a stream are not cached (data.streaming)"
        if reading := self.objective.token_level():
            return f"losses {', '.join(reading)} compare token by token, and tokens' states are not cached"
        if self.mixed_precision not in PRECISIONS:
            return f"logits are not cached under {self.mixed_precision}"
        return None

    @property
    def _sizes(self) -> dict[str, Any]:
        """Of a model from scratch, over this tokenizer's vocabulary."""
        return {"vocab_size": len(self.tokenizer), "pad_token_id": self.tokenizer.pad_token_id}
