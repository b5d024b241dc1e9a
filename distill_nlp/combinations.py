"""Settings that exclude each other, refused before training begins."""

from __future__ import annotations

from typing import Any

from accelerate import DistributedType
from torch import nn
from transformers import TrainingArguments

from distill_nlp.arguments import setting_of
from distill_nlp.objective import DistillationObjective
from distill_nlp.parameter_groups import layer_factors
from distill_nlp.projections import projected_losses


def refuse_where_sharded(
    args: TrainingArguments, objective: DistillationObjective, accelerator: Any, measures: bool
) -> None:
    """For FSDP and DeepSpeed: refuses what reads, groups or drops whole parameters or gradients outside of backward.

    And steps that would not be skipped, without a word.

    Args:
        args, objective, accelerator: of the training.
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
    if accelerator.distributed_type == DistributedType.DEEPSPEED and setting_of(args, "on_nonfinite") == "skip":
        raise ValueError("on_nonfinite: DeepSpeed's optimizer takes the step whatever the gradient; leave skip out")
    asked = [
        name for name, usual in (("layer_learning_rate_decay", 1.0), ("freeze", [])) if setting_of(args, name) != usual
    ]
    if asked:
        raise ValueError(
            f"{' and '.join(asked)}: FSDP and DeepSpeed put parameters of their own in place of the student's; leave "
            "it out, or train under DDP"
        )


def refuse_unsaved(accelerator: Any) -> None:
    """Refuses an FSDP that leaves no model behind: the Trainer then writes sharded checkpoints, and nothing at the end.

    Raises:
        ValueError: its state dict is no full one.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and "FULL_STATE_DICT" not in str(plugin.state_dict_type):
        raise ValueError(
            "at the end of training a sharded state dict leaves no model behind: set fsdp_state_dict_type to "
            "FULL_STATE_DICT in the config of accelerate (state_dict_type in training.fsdp_config)"
        )


def refuse_untrained_projections(optimizer: Any, objective: nn.Module) -> None:
    """Refuses an optimizer that was made before the projections were: the student would be drawn to a random map.

    Args:
        optimizer: that is given, or None.
        objective: bound, with its projections.

    Raises:
        ValueError: one of them is in none of its groups.
    """
    groups = getattr(optimizer, "param_groups", None)
    if groups is None:
        return
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    if any(parameter.requires_grad and id(parameter) not in trained for parameter in objective.parameters()):
        raise ValueError(
            "the losses have projections, which the optimizer that is given does not train: the trainer makes them; "
            "override create_optimizer, pass optimizer_cls_and_kwargs, or take losses without projections"
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
