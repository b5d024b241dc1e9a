"""Settings that exclude each other, refused before training begins."""

from __future__ import annotations

from torch import nn
from transformers import TrainingArguments

from distill_nlp.arguments import setting_of
from distill_nlp.objective import DistillationObjective
from distill_nlp.parameter_groups import layer_factors
from distill_nlp.projections import projected_losses


def refuse_where_sharded(args: TrainingArguments, objective: DistillationObjective, measures: bool) -> None:
    """For FSDP and DeepSpeed: refuses what reads, groups or drops whole parameters or gradients outside of backward.

    Args:
        args, objective: of the training.
        measures: whether gradient norms of the terms are measured.

    Raises:
        ValueError: such a setting.
    """
    if measures:
        raise ValueError(
            "term_gradient_norm_steps and loss_balancing need whole gradients on each rank, which FSDP and "
            "DeepSpeed do not keep"
        )
    if fitted := projected_losses(objective):
        raise ValueError(
            f"losses.{next(iter(fitted))}: projection_init least_squares runs before FSDP or DeepSpeed take the "
            "model; use random"
        )
    asked = [
        name for name, usual in (("layer_learning_rate_decay", 1.0), ("freeze", [])) if setting_of(args, name) != usual
    ]
    if asked:
        raise ValueError(
            f"{' and '.join(asked)}: FSDP and DeepSpeed put parameters of their own in place of the student's; leave "
            "it out, or train under DDP"
        )


def refuse_layer_decay(args: TrainingArguments, student: nn.Module, has_optimizer: bool) -> None:
    """Refuses layer_learning_rate_decay where it would do nothing.

    Args:
        args, student: of the training.
        has_optimizer: whether the optimizer is given, so that its groups are not the trainer's to make.

    Raises:
        ValueError: the optimizer is given, or the student's blocks are not numbered.
    """
    decay = setting_of(args, "layer_learning_rate_decay")
    if decay == 1.0:
        return
    if has_optimizer:
        raise ValueError("layer_learning_rate_decay is not applied to an optimizer that is given; group it there")
    layer_factors(student, decay)
