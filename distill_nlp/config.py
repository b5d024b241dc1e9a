"""The settings of an experiment: names, types, ranges and what each means.

This module imports neither PyTorch nor Transformers until settings are validated, so that `--help` is quick.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

STAGES = ("teacher", "baseline", "student", "report")
SYNTHETIC = "synthetic"
TRAIN_TOKENIZER = "train"


def did_you_mean(name: str, known: Any) -> str:
    from difflib import get_close_matches

    close = get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


class Section(BaseModel):
    """A block of settings; a name that it does not know is refused."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class DataSection(Section):
    """Where the examples come from, and how they become tokens."""

    dataset: str = Field(
        description="Hub id, or a local folder with one file or sub-folder per split (csv, tsv, json, jsonl, parquet, "
        f"txt in one folder per label), or a `save_to_disk` folder, or `{SYNTHETIC}`"
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
    label_column: str = Field("label", description="column of the label: integers from 0, or strings")
    label_names: list[str] | None = Field(None, min_length=2, description="names of the classes, by index")
    tokenizer: str | None = Field(
        None,
        description=f"Hub id or folder; the teacher's where not given; `{TRAIN_TOKENIZER}` trains a WordPiece "
        "vocabulary on the texts",
    )
    vocab_size: int = Field(2000, ge=100, le=200_000, description=f"size of a `{TRAIN_TOKENIZER}` vocabulary")
    max_length: int = Field(256, ge=8, le=100_000, description="longest input in tokens; the rest is cut off")
    truncation_side: Literal["right", "left"] = Field("right", description="the end of a long text that is cut off")
    max_train_samples: int | None = Field(None, ge=2, description="use only so many training rows")
    max_unlabeled_samples: int | None = Field(None, ge=1, description="use only so many unlabeled rows")
    max_test_samples: int | None = Field(None, ge=2, description="use only so many test rows")
    seed: int = Field(0, ge=0, description="of generated data and of carved and sampled rows")


class TrainingSection(BaseModel):
    """Arguments of `transformers.TrainingArguments` under their own names; others than these are taken as well."""

    model_config = ConfigDict(extra="allow", protected_namespaces=(), allow_inf_nan=False)

    learning_rate: float = Field(5e-5, gt=0, lt=10, description="peak learning rate")
    num_train_epochs: float = Field(3.0, gt=0, description="passes over the training rows")
    max_steps: int = Field(-1, description="optimizer steps, instead of epochs; -1: by epochs")
    per_device_train_batch_size: int = Field(16, ge=1, description="rows of one forward pass on one device")
    per_device_eval_batch_size: int = Field(64, ge=1, description="rows of one forward pass in evaluation")
    gradient_accumulation_steps: int = Field(1, ge=1, description="forward passes per optimizer step")
    weight_decay: float = Field(0.01, ge=0, le=1, description="AdamW's weight decay")
    warmup_steps: float = Field(0.1, ge=0, description="steps of warm-up; below 1, a part of all steps")
    lr_scheduler_type: str = Field("linear", description="schedule of the learning rate")
    max_grad_norm: float = Field(1.0, ge=0, description="gradients are clipped to this norm; 0: never")
    projection_learning_rate_factor: float = Field(1.0, gt=0, description="of learned projections: times learning_rate")
    projection_weight_decay: float | None = Field(None, ge=0, description="of learned projections; else weight_decay")
    projection_init_batches: int = Field(8, ge=1, description="batches behind a least-squares start of projections")
    loss_balancing: Literal["none", "gradient_norm"] = Field(
        "none", description="gradient_norm: the terms' gradients are kept in the ratio of their weights"
    )
    term_gradient_norm_steps: int = Field(
        0, ge=0, description="log each term's gradient norm every so many steps; 0: never"
    )
    bf16: bool = Field(False, description="bfloat16 autocast")
    fp16: bool = Field(False, description="float16 autocast with loss scaling (GPU)")
    gradient_checkpointing: bool = Field(False, description="recompute activations in backward: less memory")
    torch_compile: bool = Field(False, description="compile the student")
    train_sampling_strategy: str = Field(
        "group_by_length", description="random, sequential, or group_by_length: batches of like lengths, less padding"
    )
    eval_strategy: Literal["epoch", "steps", "no"] = Field("epoch", description="when to evaluate and to save")
    eval_steps: int | None = Field(None, ge=1, description='steps between evaluations with eval_strategy "steps"')
    metric_for_best_model: Literal["accuracy", "f1_macro", "loss"] = Field(
        "accuracy", description="validation metric that picks the best checkpoint"
    )
    logging_steps: float = Field(50, gt=0, description="steps between log entries; below 1, a part of all steps")
    dataloader_num_workers: int = Field(0, ge=0, description="processes that prepare batches")
    report_to: str | list[str] = Field("none", description="trackers: tensorboard, wandb, trackio, ...")
    use_cpu: bool = Field(False, description="stay on the CPU although there is an accelerator")

    @field_validator("max_steps")
    @classmethod
    def _no_zero_steps(cls, steps: int) -> int:
        if steps != -1 and steps < 1:
            raise ValueError(f"must be at least 1, or -1 to go by epochs, got {steps}")
        return steps

    @model_validator(mode="wrap")
    @classmethod
    def _all_mistakes(cls, values: Any, handler: Any) -> Any:
        """Names and types of the arguments that are not listed here, together with what is wrong with the others."""
        mistakes = cls._mistakes(values) if isinstance(values, dict) else []
        try:
            section = handler(values)
        except ValidationError as error:
            known = [
                InitErrorDetails(**{k: e[k] for k in ("type", "loc", "input", "ctx") if k in e}) for e in error.errors()
            ]
            raise ValidationError.from_exception_data(cls.__name__, [*known, *mistakes]) from None
        if mistakes:
            raise ValidationError.from_exception_data(cls.__name__, mistakes)
        return section

    @classmethod
    def _mistakes(cls, values: dict[str, Any]) -> list[InitErrorDetails]:
        managed = {
            "output_dir": "set `output_dir` at the top",
            "seed": "set `seeds` at the top",
            "save_strategy": "it follows eval_strategy",
            "save_steps": "it follows eval_steps",
            "load_best_model_at_end": "it follows eval_strategy",
            "label_smoothing_factor": "set `losses.ce.label_smoothing`",
            "push_to_hub": "push the finished student, see the README",
            "remove_unused_columns": "the trainer decides it",
        }
        mistakes = []
        if values.get("eval_strategy") == "steps" and values.get("eval_steps") is None:
            mistakes.append(_mistake("eval_steps", None, 'is needed with eval_strategy "steps"'))
        extra = {str(name): value for name, value in values.items() if name not in cls.model_fields}
        if not extra:
            return mistakes
        from distill_nlp.arguments import DistillationArguments

        fields = DistillationArguments.__dataclass_fields__
        for name, value in extra.items():
            if name in managed:
                mistakes.append(_mistake(name, value, f"is not set here: {managed[name]}"))
            elif name not in fields:
                mistakes.append(_mistake(name, value, f"unknown setting{did_you_mean(name, cls.model_fields)}"))
            elif not _same_kind(value, fields[name].default):
                kind = "true or false" if isinstance(fields[name].default, bool) else "a number"
                mistakes.append(_mistake(name, value, f"must be {kind}, got {value!r}"))
        return mistakes


def _mistake(name: str, value: Any, message: str) -> InitErrorDetails:
    # A template in braces would be filled in; the message is final.
    escaped = message.replace("{", "{{").replace("}", "}}")
    return InitErrorDetails(type=PydanticCustomError("value_error", escaped), loc=(name,), input=value)


def _same_kind(value: Any, default: Any) -> bool:
    """Whether a value can stand where a number or a truth value is the default; other defaults tell nothing."""
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, int | float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return True


class TeacherSection(Section):
    """The teacher: a checkpoint, or a config for one from scratch."""

    model: str | None = Field(None, description="Hub id or folder: a finished classifier, or what one is made from")
    revision: str | None = Field(None, description="commit, tag or branch of the model on the Hub")
    config: dict[str, Any] | None = Field(None, description="instead of model: {model_type: bert, ...}, from scratch")
    overrides: dict[str, Any] = Field({}, description="settings of the model's config to change")
    seed: int = Field(0, ge=0, lt=2**32, description="of its training; the students have `seeds`")
    finetune: Literal["auto", "always", "never"] = Field(
        "auto", description="auto: unless it is a classifier for these labels already"
    )
    train_split: str | None = Field(None, description="split that it is fine-tuned on, where not data.train_split")
    cache: bool = Field(
        True, description="keep its logits on disk, where no loss reads its layers; false: it runs in every step"
    )
    training: TrainingSection = Field(
        default_factory=TrainingSection, description="on top of `training`, for the teacher only"
    )

    @model_validator(mode="after")
    def _one_source(self) -> TeacherSection:
        if (self.model is None) == (self.config is None):
            raise ValueError("needs exactly one of model and config")
        return self


class FromTeacher(Section):
    """A student made of the teacher's own layers."""

    layers: int = Field(ge=1, description="number of blocks")
    select: Literal["uniform", "first", "last"] | list[int] = Field(
        "uniform", description="which of the teacher's blocks; a list counts from 1"
    )
    architecture: Literal["distilbert", "same"] = Field("distilbert", description="distilbert (of a BERT) or same")


class StudentSection(Section):
    """The student: a checkpoint, a config for one from scratch, or layers of the teacher as it was before training."""

    model: str | None = Field(None, description="Hub id or folder of a checkpoint")
    revision: str | None = Field(None, description="commit, tag or branch of the model on the Hub")
    config: dict[str, Any] | None = Field(None, description="{model_type: distilbert, dim: 64, ...}, from scratch")
    from_teacher: FromTeacher | None = Field(None, description="copies of the layers of `teacher.model`")
    overrides: dict[str, Any] = Field({}, description="settings of the student's config to change")

    @model_validator(mode="after")
    def _one_source(self) -> StudentSection:
        if sum(way is not None for way in (self.model, self.config, self.from_teacher)) != 1:
            raise ValueError("needs exactly one of model, config and from_teacher")
        return self


class LossSection(BaseModel):
    """One term: its weight and the arguments of its class."""

    model_config = ConfigDict(extra="allow")

    weight: float | dict[str, Any] = Field(
        1.0, description="factor of this term, 0 leaves it out; or {schedule: linear, start: 1, end: 0} and the like"
    )

    @field_validator("weight")
    @classmethod
    def _weight_is_a_schedule(cls, weight: float | dict[str, Any]) -> float | dict[str, Any]:
        from distill_nlp.schedules import build_schedule

        if build_schedule(weight, "weight").lowest < 0:
            raise ValueError("must be >= 0 all the time")
        return weight

    def arguments(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class ReportSection(Section):
    """What the report measures."""

    latency_samples: int = Field(100, ge=1, description="texts timed one by one")
    throughput_batch_size: int = Field(32, ge=1, description="rows of a batch in the throughput measurement")
    throughput_batches: int = Field(10, ge=1, description="batches timed per model")
    bootstrap_samples: int = Field(2000, ge=100, description="resamples behind the intervals")


class Experiment(Section):
    """One experiment: teacher, plain baseline and distilled student on one data set."""

    output_dir: str = Field(description="folder of the run: models, report, and what it takes to continue")
    cache_dir: str | None = Field(
        None,
        description="folder of teachers' logits, may serve several runs; teacher_cache in output_dir where not given",
    )
    seeds: list[int] = Field([42], min_length=1, description="one baseline and one student each")
    data: DataSection
    teacher: TeacherSection
    student: StudentSection
    losses: dict[str, LossSection] = Field(description="name -> weight and settings of the loss")
    training: TrainingSection = Field(default_factory=TrainingSection)
    report: ReportSection = Field(default_factory=ReportSection)

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds) or any(not 0 <= seed < 2**32 for seed in seeds):
            raise ValueError("must be distinct whole numbers from 0 to 2^32 - 1")
        return seeds

    @field_validator("losses", mode="after")
    @classmethod
    def _losses_can_be_built(cls, losses: dict[str, LossSection]) -> dict[str, LossSection]:
        from distill_nlp.losses import LOSSES
        from distill_nlp.objective import DistillationObjective

        built, mistakes = {}, []
        for name, section in losses.items():
            if name not in LOSSES:
                known = f"unknown loss; there are {', '.join(LOSSES)}{did_you_mean(name, LOSSES)}"
                mistakes.append(_mistake(name, name, known))
                continue
            try:
                built[name] = LOSSES[name](**section.arguments())
            except (ValueError, TypeError) as error:
                message = re.sub(r"^\w+\.__init__\(\) got an unexpected", "unknown", str(error))
                mistakes.append(_mistake(name, section, message))
        if mistakes:
            raise ValidationError.from_exception_data(cls.__name__, mistakes)
        DistillationObjective(built, {name: section.weight for name, section in losses.items()})
        return losses

    @model_validator(mode="after")
    def _parts_fit(self) -> Experiment:
        if self.data.tokenizer is None and self.teacher.model is None:
            raise ValueError(
                f"data.tokenizer is needed where the teacher has no checkpoint; `{TRAIN_TOKENIZER}` trains one"
            )
        if self.student.from_teacher is not None and self.teacher.model is None:
            raise ValueError(
                "student.from_teacher needs teacher.model: a teacher from scratch has no layers worth copying"
            )
        return self

    def teacher_training(self) -> TrainingSection:
        """`training` with the teacher's own settings over it."""
        own = self.teacher.training.model_dump(exclude_unset=True)
        return TrainingSection(**(self.training.model_dump(exclude_unset=True) | own))
