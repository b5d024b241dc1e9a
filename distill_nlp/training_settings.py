"""From the settings of an experiment to a Trainer's arguments, and which of them a result depends on."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import patch_environment

import distill_nlp
from distill_nlp.arguments import DistillationArguments
from distill_nlp.config import TrainingSection
from distill_nlp.losses.base import SINGLE_LABEL

# Settings that change how a run looks or where it runs, not what comes out.
_COSMETIC = {
    # What comes of it stands in per_device_train_batch_size and gradient_accumulation_steps.
    "auto_batch_size",
    "dataloader_num_workers",
    "dataloader_persistent_workers",
    "dataloader_pin_memory",
    "dataloader_prefetch_factor",
    "ddp_timeout",
    "disable_tqdm",
    "log_level",
    "log_level_replica",
    "log_on_each_node",
    "logging_dir",
    "logging_first_step",
    "logging_nan_inf_filter",
    "logging_steps",
    "logging_strategy",
    # What they change is named in the result; and a training that met NaN must go on with the other policy.
    "max_nonfinite_steps",
    "on_nonfinite",
    "per_device_eval_batch_size",
    # What comes of it stands in bf16 and fp16.
    "precision",
    # Of a tracker.
    "project",
    "report_to",
    "run_name",
    "save_total_limit",
    "trackio_bucket_id",
    "trackio_space_id",
    "trackio_static_space_id",
}

# Settings that mean something only where there are projections, or terms to weigh: in the distilled student.
_OF_SEVERAL_TERMS = {
    "loss_balancing",
    "projection_init_batches",
    "projection_learning_rate_factor",
    "projection_weight_decay",
    "term_gradient_norm_steps",
}

# Settings that count only where they are not at their default: what is new must not make old results stale.
_NEW = {
    "early_stopping_patience",
    "early_stopping_threshold",
    "freeze",
    "layer_learning_rate_decay",
    "unfreeze_every",
    "unlabeled_ratio",
} | _OF_SEVERAL_TERMS


def training_arguments(
    section: TrainingSection,
    output_dir: Path,
    seed: int,
    problem_type: str = SINGLE_LABEL,
    keeps_last: bool = False,
) -> DistillationArguments:
    """The Trainer's arguments for these settings and this kind of task.

    Args:
        section: the settings.
        output_dir: for checkpoints.
        seed: of the training.
        problem_type: of the data, which decides the metric.
        keeps_last: the result is what the last step leaves, whatever validation says, and nothing stops it early.

    Raises:
        ValueError: settings that contradict each other, or that this machine cannot serve.
    """
    values = section.model_dump() | {"metric_for_best_model": section.best_metric(problem_type)}
    del values["precision"], values["auto_batch_size"]
    if values.pop("gradient_checkpointing"):
        # The argument is being renamed; a deprecation warning per stage helps nobody.
        known = DistillationArguments.__dataclass_fields__
        new = "activation_checkpointing"
        values[new if new in known else "gradient_checkpointing"] = True
    # bf16 without an accelerator is refused by TrainingArguments unless the CPU is asked for by name.
    values["use_cpu"] = values["use_cpu"] or not torch.accelerator.is_available()
    strategy = values["eval_strategy"]
    if keeps_last:
        values["early_stopping_patience"] = None
    # The arguments know no fp32 that is asked for: they would take the launcher's precision.
    with patch_environment(ACCELERATE_MIXED_PRECISION=mixed_precision(section)):
        return DistillationArguments(
            **{
                # One more than is needed: where the newest is found damaged, not all is lost.
                "save_total_limit": 2,
                "disable_tqdm": not sys.stderr.isatty(),
                "dataloader_pin_memory": torch.cuda.is_available() and not values["use_cpu"],
                **values,
                "output_dir": str(output_dir),
                "seed": seed,
                # Without evaluations too: a killed training goes on from its last checkpoint.
                "save_strategy": "epoch" if strategy == "no" else strategy,
                "save_steps": values["eval_steps"] or 500,
                "load_best_model_at_end": strategy != "no" and not keeps_last,
                "greater_is_better": values["metric_for_best_model"] != "loss",
            }
        )


def mixed_precision(section: TrainingSection) -> str:
    """The autocast of a training, as accelerate names it: by its settings, fp32 among them, else by the launcher."""
    if section.bf16 or section.fp16:
        return "bf16" if section.bf16 else "fp16"
    if {"bf16", "fp16"} & section.model_fields_set:
        return "no"
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def same_budget(section: TrainingSection, arguments: DistillationArguments, rows: int) -> TrainingSection:
    """The settings for a baseline on fewer rows: as many steps, and evaluations, as `rows` rows give the student."""
    whole = math.floor if arguments.dataloader_drop_last else math.ceil
    per_epoch = whole(rows / arguments.per_device_train_batch_size / arguments.world_size)
    per_epoch = math.ceil(per_epoch / arguments.gradient_accumulation_steps)
    steps = arguments.max_steps if arguments.max_steps > 0 else math.ceil(per_epoch * arguments.num_train_epochs)
    changes: dict[str, Any] = {"max_steps": steps}
    if section.eval_strategy == "epoch":
        changes |= {"eval_strategy": "steps", "eval_steps": per_epoch}
    return section.model_copy(update=changes)


def rows_read(section: TrainingSection, rows: int, ranks: int) -> int:
    """How many of so many rows a training takes at most, each as often as it is read."""
    if section.max_steps < 1:
        return math.ceil(rows * section.num_train_epochs)
    return section.max_steps * section.per_device_train_batch_size * section.gradient_accumulation_steps * ranks


def effective(section: TrainingSection, of_student: bool, problem_type: str = SINGLE_LABEL) -> dict[str, Any]:
    """The settings of a section that change what comes out in this kind of task; some are the distilled student's."""
    left_out = _COSMETIC if of_student else _COSMETIC | _OF_SEVERAL_TERMS | {"unlabeled_ratio"}
    if section.loss_balancing == "none":
        left_out = left_out | {"term_gradient_norm_steps"}
    if section.early_stopping_patience is None:
        left_out = left_out | {"early_stopping_threshold"}
    fields = TrainingSection.model_fields
    left_out = left_out | {k for k in _NEW if getattr(section, k) == fields[k].default}
    values = section.model_dump(mode="json") | {"metric_for_best_model": section.best_metric(problem_type)}
    return {k: v for k, v in values.items() if k not in left_out}


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    import accelerate
    import transformers

    return {
        "distill_nlp": distill_nlp.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "python": sys.version.split()[0],
    }
