"""The settings of a training: arguments of Transformers' Trainer, each with its range and meaning."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import InitErrorDetails

from distill_nlp.config_checks import did_you_mean, mistake, no_truth_value

METRICS = ("accuracy", "f1_macro")
"""Validation metrics that are maximised."""


def task_metric(problem_type: str) -> str:
    """What a kind of task is judged by: accuracy, or macro-F1 where texts have several labels."""
    return "f1_macro" if problem_type == "multi_label_classification" else "accuracy"


class TrainingSection(BaseModel):
    """Arguments of `transformers.TrainingArguments` under their own names; others than these are taken as well."""

    model_config = ConfigDict(extra="allow", protected_namespaces=(), allow_inf_nan=False)

    learning_rate: float = Field(5e-5, gt=0, lt=10, description="peak learning rate")
    num_train_epochs: float = Field(3.0, gt=0, description="passes over the training rows")
    max_steps: int = Field(-1, description="optimizer steps, instead of epochs; -1: by epochs")
    per_device_train_batch_size: int = Field(
        16, ge=1, description="rows of one forward pass on one device; auto: as many of a step's rows as fit"
    )
    auto_batch_size: bool = Field(
        False,
        description="as per_device_train_batch_size: auto; a step has 16 x gradient_accumulation_steps rows on each "
        "device, in as few forward passes as the memory allows",
    )
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
    unlabeled_ratio: float | None = Field(
        None, gt=0, lt=1, description="part of each batch that is rows of data.unlabeled; else rows as they come"
    )
    layer_learning_rate_decay: float = Field(
        1.0, gt=0, le=1, description="factor on the learning rate from each block to the one below it"
    )
    freeze: list[str] = Field(
        [], description="parts that do not learn: embeddings, layer.1, layer.1-3, body (all but the head), or modules"
    )
    unfreeze_every: int | None = Field(
        None, ge=1, description="steps between releases of frozen parts, from the top down; else they stay frozen"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="of the arithmetic; auto: bf16 where a step is quicker in it, measured as a run begins"
    )
    bf16: bool = Field(False, description="bfloat16 autocast, as precision: bf16")
    fp16: bool = Field(False, description="float16 autocast with loss scaling (GPU), as precision: fp16")
    gradient_checkpointing: bool = Field(False, description="recompute activations in backward: less memory")
    torch_compile: bool = Field(False, description="compile the student")
    train_sampling_strategy: str = Field(
        "group_by_length", description="random, sequential, or group_by_length: batches of like lengths, less padding"
    )
    eval_strategy: Literal["epoch", "steps", "no"] = Field("epoch", description="when to evaluate and to save")
    eval_steps: int | None = Field(None, ge=1, description='steps between evaluations with eval_strategy "steps"')
    metric_for_best_model: Literal["auto", "accuracy", "f1_macro", "loss"] = Field(
        "auto",
        description="validation metric that picks the best checkpoint; auto: accuracy, or f1_macro where texts have "
        "several labels",
    )
    early_stopping_patience: int | None = Field(
        None, ge=1, description="stop after so many evaluations in a row without a better metric; else never"
    )
    early_stopping_threshold: float = Field(0.0, ge=0, description="better is by more than this")
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="a step with NaN or infinity ends the training, or is left out and counted"
    )
    max_nonfinite_steps: int = Field(10, ge=0, description="steps that skip leaves out in a training before it stops")
    logging_steps: float = Field(50, gt=0, description="steps between log entries; below 1, a part of all steps")
    dataloader_num_workers: int = Field(0, ge=0, description="processes that prepare batches")
    report_to: str | list[str] = Field("none", description="trackers: tensorboard, wandb, trackio, ...")
    use_cpu: bool = Field(False, description="stay on the CPU although there is an accelerator")

    def best_metric(self, problem_type: str) -> str:
        """`metric_for_best_model` for this kind of task."""
        return task_metric(problem_type) if self.metric_for_best_model == "auto" else self.metric_for_best_model

    _numbers = field_validator("*", mode="before")(classmethod(no_truth_value))

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
        mistakes = []
        if isinstance(values, dict):
            mistakes, values = cls._mistakes(values), _with_auto_size(_with_precision(values))
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
            "greater_is_better": "it follows metric_for_best_model",
            "label_smoothing_factor": "set `losses.ce.label_smoothing`",
            "projection_learning_rate": "set projection_learning_rate_factor, a multiple of learning_rate",
            "push_to_hub": "push the finished student, see the README",
            "remove_unused_columns": "the trainer decides it",
            "save_only_model": "an interrupted training could not go on",
            "resume_from_checkpoint": "an interrupted training goes on by itself",
        }
        mistakes = []
        if beside := [name for name in ("bf16", "fp16") if "precision" in values and name in values]:
            mistakes.append(
                mistake("precision", values["precision"], f"stands beside {beside[0]}: leave one of them out")
            )
        if values.get("eval_strategy") == "steps" and values.get("eval_steps") is None:
            mistakes.append(mistake("eval_steps", None, 'is needed with eval_strategy "steps"'))
        extra = {str(name): value for name, value in values.items() if name not in cls.model_fields}
        if not extra:
            return mistakes
        from distill_nlp.arguments import DistillationArguments

        fields = DistillationArguments.__dataclass_fields__
        for name, value in extra.items():
            if name in managed:
                mistakes.append(mistake(name, value, f"is not set here: {managed[name]}"))
            elif name not in fields:
                mistakes.append(mistake(name, value, f"unknown setting{did_you_mean(name, cls.model_fields)}"))
            elif not _same_kind(value, fields[name].default):
                kind = "true or false" if isinstance(fields[name].default, bool) else "a number"
                mistakes.append(mistake(name, value, f"must be {kind}, got {value!r}"))
        return mistakes


def _with_precision(values: dict[str, Any]) -> dict[str, Any]:
    """The precision as the Trainer's own two arguments; "auto" is what is named by neither."""
    named = values.get("precision")
    if named not in ("auto", "fp32", "bf16", "fp16"):
        return values
    rest = {name: value for name, value in values.items() if name != "precision"}
    return rest if named == "auto" else {"bf16": named == "bf16", "fp16": named == "fp16"} | rest


def _with_auto_size(values: dict[str, Any]) -> dict[str, Any]:
    """The batch size "auto" as a setting of its own, beside which the other stays a number."""
    if values.get("per_device_train_batch_size") != "auto":
        return values
    return {k: v for k, v in values.items() if k != "per_device_train_batch_size"} | {"auto_batch_size": True}


def laid_over(
    below: TrainingSection, above: TrainingSection, name: str, without: Collection[str] = (), by_epochs: bool = True
) -> TrainingSection:
    """The settings that are given in two sections; where both give one, that of the upper one.

    Args:
        name: of the upper one, for messages.
        without: settings of the lower one that do not count.
        by_epochs: whether a training may last so many epochs; a stream's has no known end.

    Raises:
        ValueError: they contradict each other.
    """
    own = above.model_dump(exclude_unset=True)
    left_out = set(without)
    if "per_device_train_batch_size" in own:
        left_out.add("auto_batch_size")
    if own.get("auto_batch_size"):
        left_out.add("per_device_train_batch_size")
    if own.get("bf16") or own.get("fp16"):
        left_out |= {"bf16", "fp16"}
    # Steps come before epochs where both are set; here the epochs are this training's own.
    if by_epochs and "num_train_epochs" in own and "max_steps" not in own:
        left_out.add("max_steps")
    # What has nothing to go by in this training is not for it.
    if own.get("eval_strategy") == "no":
        left_out |= {"early_stopping_patience", "early_stopping_threshold"}
    if own.get("freeze") == []:
        left_out.add("unfreeze_every")
    try:
        return TrainingSection(**(below.model_dump(exclude_unset=True, exclude=left_out) | own))
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{name}: over the settings of training, {first['loc'][-1]}: {message}") from None


def _same_kind(value: Any, default: Any) -> bool:
    """Whether a value can stand where a number or a truth value is the default; other defaults tell nothing."""
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, int | float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return True
