"""The settings of an experiment: names, types, ranges and what each means.

This module imports neither PyTorch nor Transformers until settings are validated, so that `--help` is quick.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator, model_validator

from distill_nlp.config_batch_size import check_auto_batch_size
from distill_nlp.config_checks import Section, did_you_mean, folder_name, mistake
from distill_nlp.config_streaming import check_streaming, streamed_training
from distill_nlp.config_student import StudentSection
from distill_nlp.config_training import TrainingSection, laid_over
from distill_nlp.hub.private import secret_in

STAGES = ("teacher", "baseline", "student", "report")
CONFIG_FILE = "config.json"
"""In `output_dir`: the settings of the run."""
SYNTHETIC = "synthetic"
TRAIN_TOKENIZER = "train"


class DataSection(Section):
    """Where the examples come from, and how they become tokens."""

    dataset: str = Field(
        min_length=1,
        description="Hub id, or a local folder with one file or sub-folder per split (csv, tsv, json, jsonl, parquet, "
        f"txt in one folder per label), or a `save_to_disk` folder, or `{SYNTHETIC}`",
    )
    config_name: str | None = Field(None, description="configuration of a Hub data set")
    revision: str | None = Field(None, description="commit, tag or branch of a Hub data set")
    train_split: str = Field("train", description="split that the students learn from")
    validation_split: str | None = Field(None, description="split that picks the best checkpoint; else it is carved")
    validation_fraction: float = Field(0.1, gt=0, lt=1, description="part of train to carve where there is no split")
    test_split: str = Field("test", description="split that the report reads, once")
    unlabeled: str | None = Field(None, description="split, or a file, whose texts are distilled without labels")
    text_column: str = Field("text", description="column of the text")
    text_pair_column: str | None = Field(None, description="column of a second text, for pairs")
    label_column: str = Field("label", description="column of the label: integers from 0, or strings; or lists of them")
    label_names: list[str] | None = Field(None, min_length=2, description="names of the classes, by index")
    tokenizer: str | None = Field(
        None,
        min_length=1,
        description="the student's: Hub id or folder; where not given, that of student.model, else the teacher's; "
        f"`{TRAIN_TOKENIZER}` trains a WordPiece vocabulary on the texts",
    )
    vocab_size: int = Field(2000, ge=100, le=200_000, description=f"size of a `{TRAIN_TOKENIZER}` vocabulary")
    max_length: int = Field(256, ge=8, le=100_000, description="longest input in tokens; the rest is cut off")
    unlabeled_min_confidence: float | None = Field(
        None,
        gt=0,
        le=1,
        description="drop unlabeled rows on which the teacher's highest probability is lower; one label per text only",
    )
    pseudo_labels: bool = Field(False, description="give unlabeled rows the teacher's answer as a label, for ce")
    truncation_side: Literal["right", "left"] = Field("right", description="the end of a long text that is cut off")
    max_train_samples: int | None = Field(None, ge=2, description="use only so many training rows")
    max_unlabeled_samples: int | None = Field(None, ge=1, description="use only so many unlabeled rows")
    max_test_samples: int | None = Field(None, ge=2, description="use only so many test rows")
    seed: int = Field(0, ge=0, description="of generated data and of carved and sampled rows")
    streaming: bool = Field(
        False,
        description="read training and unlabeled rows as they are needed, from files larger than memory; needs "
        "training.max_steps and data.validation_split, and the teacher runs in every step",
    )
    shuffle_buffer: int = Field(
        10_000, ge=1, le=10_000_000, description="rows of a stream among which the next one is drawn"
    )


class TeacherMember(Section):
    """One teacher: a checkpoint, or a config for one from scratch."""

    model: str | None = Field(
        None, min_length=1, description="Hub id or folder: a finished classifier, or what one is made from"
    )
    revision: str | None = Field(None, description="commit, tag or branch of the model on the Hub")
    config: dict[str, Any] | None = Field(None, description="instead of model: {model_type: bert, ...}, from scratch")
    overrides: dict[str, Any] = Field({}, description="settings of the model's config to change")
    seed: int = Field(0, ge=0, lt=2**32, description="of its training; the students have `seeds`")
    finetune: Literal["auto", "always", "never"] = Field(
        "auto", description="auto: unless it is a classifier for these labels already"
    )
    max_length: int | None = Field(
        None, ge=8, le=100_000, description="its longest input in tokens, where not data.max_length"
    )
    restrict_labels: bool = Field(
        False, description="of a finished teacher that knows more labels, keep those of the data, by name"
    )
    weight: float = Field(1.0, gt=0, description="in the mean over an ensemble")

    @model_validator(mode="after")
    def _not_two_sources(self) -> TeacherMember:
        if self.model is not None and self.config is not None:
            raise ValueError("needs exactly one of model and config")
        return self


class TeacherSection(TeacherMember):
    """The teacher, or the first of several."""

    train_split: str | None = Field(None, description="split that it is fine-tuned on, where not data.train_split")
    ensemble: list[TeacherMember] = Field(
        [],
        description="more teachers, as [{seed: 1}, {model: DIR, weight: 2}]; one without model and config is the first "
        "one again, with what is given changed",
    )
    mean: Literal["probabilities", "logits"] = Field("probabilities", description="what an ensemble takes the mean of")
    cache: bool = Field(
        True, description="keep its answers on disk, where no loss compares tokens; false: it runs in every step"
    )
    cache_dtype: Literal["float32", "float16", "bfloat16"] = Field(
        "float32", description="of the answers on disk; half precision rounds by up to 2^-11 or 2^-8 of each value"
    )
    training: TrainingSection = Field(
        default_factory=TrainingSection, description="on top of `training`, for the teacher only"
    )

    @model_validator(mode="after")
    def _one_source(self) -> TeacherSection:
        if (self.model is None) == (self.config is None):
            raise ValueError("needs exactly one of model and config")
        return self

    def members(self) -> list[TeacherMember]:
        """All teachers, this one first, each with all of its settings."""
        first = self.model_dump(include=set(TeacherMember.model_fields), exclude_unset=True)
        found = [TeacherMember(**first)]
        for member in self.ensemble:
            own = member.model_dump(exclude_unset=True)
            shared = {} if member.model or member.config else {k: v for k, v in first.items() if k != "weight"}
            found.append(TeacherMember(**(shared | own)))
        return found


class LossSection(BaseModel):
    """One term: its weight and the arguments of its class."""

    model_config = ConfigDict(extra="allow")

    weight: Any = Field(
        1.0, description="factor of this term, 0 leaves it out; or {schedule: linear, start: 1, end: 0} and the like"
    )

    @field_validator("weight")
    @classmethod
    def _weight_is_a_schedule(cls, weight: Any) -> Any:
        from distill_nlp.schedules import build_schedule

        try:
            lowest = build_schedule(weight, "weight").lowest
        except ValueError as error:
            # The path stands before the message already.
            raise ValueError(str(error).removeprefix("weight").lstrip(":. ")) from None
        if lowest < 0:
            raise ValueError(f"must be >= 0 all the time, got {lowest:g}")
        return weight

    def arguments(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class ReportSection(Section):
    """What the report measures."""

    latency_samples: int = Field(100, ge=1, description="texts timed one by one")
    throughput_batch_size: int = Field(32, ge=1, description="rows of a batch in the throughput measurement")
    throughput_batches: int = Field(10, ge=1, description="batches timed per model")
    bootstrap_samples: int = Field(2000, ge=100, description="resamples behind the intervals")


def _built(losses: dict[str, LossSection]) -> dict[str, LossSection]:
    """The same, each of them and their sum once built; raises with all mistakes."""
    from distill_nlp.losses import LOSSES
    from distill_nlp.objective import DistillationObjective

    built, mistakes = {}, []
    for name, section in losses.items():
        if name not in LOSSES:
            known = f"unknown loss; there are {', '.join(LOSSES)}{did_you_mean(name, LOSSES)}"
            mistakes.append(mistake(name, name, known))
            continue
        try:
            built[name] = LOSSES[name](**section.arguments())
        except (ValueError, TypeError) as error:
            message = re.sub(r"^\w+\.__init__\(\) got an unexpected", "unknown", str(error))
            mistakes.append(mistake(name, section, message))
    if mistakes:
        raise ValidationError.from_exception_data("losses", mistakes)
    DistillationObjective(built, {name: section.weight for name, section in losses.items()})
    return losses


class PhaseSection(Section):
    """One of several trainings of the student, one after the other."""

    losses: dict[str, LossSection] | None = Field(None, description="of this phase, where not the experiment's")
    training: TrainingSection = Field(default_factory=TrainingSection, description="on top of `training`")

    @field_validator("losses", mode="after")
    @classmethod
    def _losses_can_be_built(cls, losses: dict[str, LossSection] | None) -> dict[str, LossSection] | None:
        return None if losses is None else _built(losses)


class Experiment(Section):
    """One experiment: teacher, plain baseline and distilled student on one data set."""

    output_dir: str = Field(description="folder of the run: models, report, and what it takes to continue")
    cache_dir: str | None = Field(
        None,
        description="folder of teachers' logits, may serve several runs; teacher_cache in output_dir where not given",
    )
    seeds: list[int] = Field([42], min_length=1, description="one baseline and one student each")
    trust_remote_code: bool = Field(False, description="run code that comes with a model or tokenizer")
    data: DataSection
    teacher: TeacherSection
    student: StudentSection
    losses: dict[str, LossSection] = Field({}, description="name -> weight and settings of the loss")
    training: TrainingSection = Field(default_factory=TrainingSection)
    phases: list[PhaseSection] = Field(
        [],
        description="trainings of the student one after the other, as [{losses: {hidden: {}}, training: "
        "{num_train_epochs: 2}}, {losses: {kl: {}}}]; what a phase does not give is the experiment's",
    )
    report: ReportSection = Field(default_factory=ReportSection)

    _added: set[str] = PrivateAttr(set())  # names in `training` that follow from data.streaming

    @model_validator(mode="before")
    @classmethod
    def _no_secrets(cls, settings: Any) -> Any:
        # The settings are kept beside the results, in logs and in cards.
        if (name := secret_in(settings)) is not None:
            raise ValueError(
                f"{name}: a token or password does not belong into a config, which is kept with its results; set "
                "HF_TOKEN, or run `hf auth login`"
            )
        return settings

    _can_be_folders = field_validator("output_dir", "cache_dir")(folder_name)

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds) or any(not 0 <= seed < 2**32 for seed in seeds):
            raise ValueError("must be distinct whole numbers from 0 to 2^32 - 1")
        return seeds

    @field_validator("losses", mode="after")
    @classmethod
    def _losses_can_be_built(cls, losses: dict[str, LossSection]) -> dict[str, LossSection]:
        return _built(losses) if losses else losses

    @model_validator(mode="after")
    def _parts_fit(self) -> Experiment:
        if not self.losses and (not self.phases or any(phase.losses is None for phase in self.phases)):
            raise ValueError('losses is empty; give at least one, e.g. {"kl": {"temperature": 2.0}}')
        if self.data.tokenizer is None and self.teacher.model is None:
            raise ValueError(
                f"data.tokenizer is needed where the teacher has no checkpoint; `{TRAIN_TOKENIZER}` trains one"
            )
        self.teacher_training()  # Right by itself, its own settings may contradict the shared ones.
        check_auto_batch_size(self)
        sections = {"training": self.training} | {f"phases.{i}.training": p.training for i, p in enumerate(self.phases)}
        ratios = [f"{name}.unlabeled_ratio" for name, own in sections.items() if own.unlabeled_ratio is not None]
        pool = {
            "data.unlabeled_min_confidence": self.data.unlabeled_min_confidence is not None,
            "data.pseudo_labels": self.data.pseudo_labels,
        }
        given = [name for name, is_set in pool.items() if is_set] + ratios
        if self.data.unlabeled is None and given:
            raise ValueError(f"{', '.join(given)}: there are no unlabeled rows; set data.unlabeled")
        if self.data.pseudo_labels and ratios:
            raise ValueError(f"data.pseudo_labels leave no row unlabeled for {', '.join(ratios)}; set one of them")
        recipe = self.student.from_teacher
        if recipe is not None and recipe.weights == "pretrained" and self.teacher.model is None:
            raise ValueError(
                "student.from_teacher needs teacher.model: a teacher from scratch has no layers worth copying"
            )
        if self.data.streaming:
            check_streaming(self, SYNTHETIC, TRAIN_TOKENIZER)
            # Of the baseline: after phases, as long as all of them.
            steps = sum(own.training.max_steps for own in self.student_trainings())
            given, self.training = self.training, streamed_training(self.training, steps)
            self._added = self.training.model_fields_set - given.model_fields_set
        return self

    def teacher_training(self) -> TrainingSection:
        """`training` with the teacher's own settings over it, but for what is the students' alone."""
        without = {"freeze", "unfreeze_every", "unlabeled_ratio"}
        training = self._with_own(self.teacher.training, "teacher.training", without)
        return training.model_copy(update={"unlabeled_ratio": None})

    @property
    def given_training(self) -> TrainingSection:
        """What several trainings share: `training` without what follows from the steps of one of them."""
        return TrainingSection(**self.training.model_dump(exclude_unset=True, exclude=self._added))

    def _with_own(self, own: TrainingSection, name: str, without: set[str] | None = None) -> TrainingSection:
        section = laid_over(self.given_training, own, name, without or (), by_epochs=not self.data.streaming)
        return streamed_training(section) if self.data.streaming else section

    def student_trainings(self) -> list[Experiment]:
        """The experiment as each phase of the student sees it; itself where there are none."""
        found = []
        for i, phase in enumerate(self.phases):
            training = self._with_own(phase.training, f"phases.{i}.training")
            losses = self.losses if phase.losses is None else phase.losses
            found.append(self.model_copy(update={"losses": losses, "training": training, "phases": []}))
        return found or [self]

    def label_loss(self) -> LossSection | None:
        """The baseline's loss: the student's cross-entropy, as its last phase that has one sets it."""
        return next((e.losses["ce"] for e in reversed(self.student_trainings()) if "ce" in e.losses), None)
