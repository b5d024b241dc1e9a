"""Training arguments with the defaults that distillation wants."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class DistillationArguments(TrainingArguments):
    """`TrainingArguments` with one argument more and three defaults changed.

    Changed: `logging_nan_inf_filter` is False (the filter hides a loss that went NaN, and waits for the device at each
    step); `ddp_find_unused_parameters` is False (a loss of weight 0 has no parameters here, so none is unused);
    `report_to` is "none" unless given.

    Args:
        projection_learning_rate: learning rate of the learned projections, which start at random while the student
            often does not; None takes `learning_rate`. They follow the same schedule.

    Raises:
        ValueError: projection_learning_rate not above zero, or anything that `TrainingArguments` refuses.
    """

    projection_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the learned projections; the student's own where not given."}
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
        if self.projection_learning_rate is not None and not self.projection_learning_rate > 0:
            raise ValueError(f"projection_learning_rate must be > 0, got {self.projection_learning_rate}")
