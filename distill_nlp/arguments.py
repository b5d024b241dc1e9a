"""Training arguments with the defaults that distillation wants."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments


@dataclass
class DistillationArguments(TrainingArguments):
    """`TrainingArguments` with a few arguments more and four defaults changed.

    Changed: on a GPU, pinned batches are copied without waiting (`non_blocking` of `accelerator_config`);
    `logging_nan_inf_filter` is False (the filter hides a loss that went NaN, and waits for the device at each
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
        layer_learning_rate_decay: factor on the learning rate from each block to the one below it, in (0, 1]: with n
            blocks, the head has `learning_rate`, the last block `decay` times that, the first `decay^n`, the embeddings
            `decay^(n + 1)`. See `parameter_groups.layer_factors`.
        freeze: parts of the student that do not learn: "embeddings", "layer.1" (the first block), "layer.1-3", "body"
            (all but the head), or the name of a module or parameter.
        unfreeze_every: release the frozen parts one by one, from the highest block down to the embeddings, one after
            every so many optimizer steps; None: they stay frozen.
        early_stopping_patience: stop after so many evaluations in a row without an improvement of
            `metric_for_best_model` (the loss unless given); None: never. With the counter restored, a training that
            goes on from a checkpoint stops where it would have stopped.
        early_stopping_threshold: what counts as an improvement: more than this over the best so far.
        on_nonfinite: what follows a step whose loss or gradient is NaN or infinite: "stop" ends the training by a
            `NonFiniteError`; "skip" leaves weights and optimizer as they were, logs `nonfinite_steps`, and goes on.
            Either way it is seen when the training logs, evaluates or saves, before anything is saved.
        max_nonfinite_steps: steps that "skip" leaves out in one training before it ends all the same.

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
    layer_learning_rate_decay: float = field(
        default=1.0, metadata={"help": "Factor on the learning rate from each block to the one below it."}
    )
    freeze: list[str] = field(
        default_factory=list,
        metadata={"help": "Parts that do not learn: embeddings, layer.1, layer.1-3, body, or names of modules."},
    )
    unfreeze_every: int | None = field(
        default=None, metadata={"help": "Steps between releases of frozen parts, from the top down; else for good."}
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Evaluations in a row without improvement after which training stops."}
    )
    early_stopping_threshold: float = field(
        default=0.0, metadata={"help": "An improvement is more than this over the best so far."}
    )
    on_nonfinite: str = field(
        default="stop", metadata={"help": "stop, or skip: what follows a step whose loss or gradient is not finite."}
    )
    max_nonfinite_steps: int = field(default=10, metadata={"help": "Steps that skip leaves out before it stops."})
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
        if self.early_stopping_patience is not None:
            self.metric_for_best_model = self.metric_for_best_model or "loss"
            self.restore_callback_states_from_checkpoint = True
        copies = self.accelerator_config
        super().__post_init__()
        if copies is None or (isinstance(copies, dict) and "non_blocking" not in copies):
            # From pinned memory a GPU gets its batches while it computes.
            self.accelerator_config.non_blocking = self.dataloader_pin_memory and self.device.type == "cuda"
        if not 0 < self.projection_learning_rate_factor < float("inf"):
            raise ValueError(f"projection_learning_rate_factor must be > 0, got {self.projection_learning_rate_factor}")
        if self.projection_weight_decay is not None and not 0 <= self.projection_weight_decay < float("inf"):
            raise ValueError(f"projection_weight_decay must be >= 0, got {self.projection_weight_decay}")
        if self.projection_init_batches < 1:
            raise ValueError(f"projection_init_batches must be at least 1, got {self.projection_init_batches}")
        if self.loss_balancing not in ("none", "gradient_norm"):
            raise ValueError(f"loss_balancing must be none or gradient_norm, got {self.loss_balancing!r}")
        if self.on_nonfinite not in ("stop", "skip"):
            raise ValueError(f"on_nonfinite must be stop or skip, got {self.on_nonfinite!r}")
        if self.max_nonfinite_steps < 0:
            raise ValueError(f"max_nonfinite_steps must be >= 0, got {self.max_nonfinite_steps}")
        if self.term_gradient_norm_steps < 0:
            raise ValueError(f"term_gradient_norm_steps must be >= 0, got {self.term_gradient_norm_steps}")
        if self.unlabeled_ratio is not None and not 0 < self.unlabeled_ratio < 1:
            raise ValueError(
                f"unlabeled_ratio must lie between 0 and 1, got {self.unlabeled_ratio}; leave it out to mix the rows "
                "as they come"
            )
        self._check_parts()
        self._check_early_stopping()

    @property
    def device(self) -> torch.device:
        """That of the training; a CPU without a number, to which Transformers 5.6 cannot load an optimizer."""
        found = super().device
        return torch.device("cpu") if found.type == "cpu" else found

    def _check_parts(self) -> None:
        if not 0 < self.layer_learning_rate_decay <= 1:
            raise ValueError(f"layer_learning_rate_decay must be in (0, 1], got {self.layer_learning_rate_decay}")
        if not isinstance(self.freeze, list) or not all(isinstance(part, str) and part for part in self.freeze):
            raise ValueError(f"freeze must be a list of names, got {self.freeze!r}")
        if self.unfreeze_every is not None and self.unfreeze_every < 1:
            raise ValueError(f"unfreeze_every must be at least 1, got {self.unfreeze_every}")
        if self.unfreeze_every is not None and not self.freeze:
            raise ValueError("unfreeze_every needs freeze, the parts to release")

    def _check_early_stopping(self) -> None:
        if not 0 <= self.early_stopping_threshold < float("inf"):
            raise ValueError(f"early_stopping_threshold must be >= 0, got {self.early_stopping_threshold}")
        if self.early_stopping_patience is None:
            return
        if self.early_stopping_patience < 1:
            raise ValueError(f"early_stopping_patience must be at least 1, got {self.early_stopping_patience}")
        if self.eval_strategy == "no":
            raise ValueError("early_stopping_patience needs evaluations: set eval_strategy to epoch or steps")


def refuse_data_parallel(args: TrainingArguments) -> None:
    """Refuses several GPUs in one process.

    Raises:
        ValueError: there are, and what to do.
    """
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process would be DataParallel, which cannot split the teacher's features; "
            "start with `accelerate launch`, or show one GPU by CUDA_VISIBLE_DEVICES=0"
        )


def setting_of(args: TrainingArguments, name: str) -> Any:
    """A setting of `DistillationArguments`, its default where plain `TrainingArguments` have none."""
    ours = DistillationArguments.__dataclass_fields__[name]
    return getattr(args, name, ours.default_factory() if ours.default is MISSING else ours.default)
