"""Training arguments with the defaults that distillation wants."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments


@dataclass
class DistillationArguments(TrainingArguments):
    """`TrainingArguments` with a few arguments more and three defaults changed.

    Changed: `logging_nan_inf_filter` is False (the filter hides a loss that went NaN, and waits for the device at each
    step); `ddp_find_unused_parameters` is False (a loss of weight 0 has no parameters here, so none is unused);
    `report_to` is "none" unless given.

    Args:
        projection_learning_rate_factor: learning rate of the learned projections, as a multiple of `learning_rate`:
            they start at random while the student often does not. They follow the same schedule.
        projection_weight_decay: weight decay of the projections' weights (never of their biases); None takes
            `weight_decay`.
        projection_init_batches: batches that a projection with `projection_init="least_squares"` is fitted to, on each
            rank.
        loss_balancing: "none", or "gradient_norm": the weights are multiplied by factors such that the gradients of the
            weighted terms are in the ratio of the weights.
        term_gradient_norm_steps: measure the gradient norm of each term on the student every so many steps, on the
            first micro-batch of the step, and log it as `gradient_norm_<name>`; 0: never (with balancing: every 20
            steps). Each measurement is a backward pass per term.
        unlabeled_ratio: part of each batch that is rows without a label (-100), in (0, 1); None mixes the rows as they
            come. The rows of an epoch are as many as those of the data: the kind that runs out begins again, in a new
            order.

    Raises:
        ValueError: an argument out of its range, or anything that `TrainingArguments` refuses.
    """

    projection_learning_rate_factor: float = field(
        default=1.0, metadata={"help": "Learning rate of the learned projections, as a multiple of learning_rate."}
    )
    projection_weight_decay: float | None = field(
        default=None, metadata={"help": "Weight decay of the projections' weights; weight_decay where not given."}
    )
    projection_init_batches: int = field(
        default=8, metadata={"help": "Batches per rank behind projections that start by least squares."}
    )
    loss_balancing: str = field(
        default="none", metadata={"help": "none, or gradient_norm: gradients of the terms in the ratio of the weights."}
    )
    term_gradient_norm_steps: int = field(
        default=0, metadata={"help": "Steps between measurements of each term's gradient norm; 0: never."}
    )
    unlabeled_ratio: float | None = field(
        default=None,
        metadata={"help": "Part of each batch that is rows without a label; else as they come."},
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Hide NaN and infinite losses from the log. Off here: they should be seen."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False,
        metadata={"help": "Passed to DistributedDataParallel; set it if the student has unused parameters."},
    )
    report_to: str | list[str] | None = field(
        default="none", metadata={"help": "Trackers to log to, e.g. tensorboard, wandb, trackio, all."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.projection_learning_rate_factor < float("inf"):
            raise ValueError(f"projection_learning_rate_factor must be > 0, got {self.projection_learning_rate_factor}")
        if self.projection_weight_decay is not None and not 0 <= self.projection_weight_decay < float("inf"):
            raise ValueError(f"projection_weight_decay must be >= 0, got {self.projection_weight_decay}")
        if self.projection_init_batches < 1:
            raise ValueError(f"projection_init_batches must be at least 1, got {self.projection_init_batches}")
        if self.loss_balancing not in ("none", "gradient_norm"):
            raise ValueError(f"loss_balancing must be none or gradient_norm, got {self.loss_balancing!r}")
        if self.term_gradient_norm_steps < 0:
            raise ValueError(f"term_gradient_norm_steps must be >= 0, got {self.term_gradient_norm_steps}")
        if self.unlabeled_ratio is not None and not 0 < self.unlabeled_ratio < 1:
            raise ValueError(
                f"unlabeled_ratio must lie between 0 and 1, got {self.unlabeled_ratio}; leave it out to mix the rows "
                "as they come"
            )


def setting_of(args: TrainingArguments, name: str) -> Any:
    """A setting of `DistillationArguments`, its default where plain `TrainingArguments` have none."""
    return getattr(args, name, DistillationArguments.__dataclass_fields__[name].default)
