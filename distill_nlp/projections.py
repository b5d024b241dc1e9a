"""Learned projections in training: their start by least squares, and their own rules in the optimizer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch

from distill_nlp.losses.hidden_states import ProjectedLoss
from distill_nlp.modeling import DistillationModel
from distill_nlp.objective import DistillationObjective
from distill_nlp.teacher import Teacher

logger = logging.getLogger(__name__)


def projected_losses(objective: DistillationObjective) -> dict[str, ProjectedLoss]:
    """The losses whose projections start by least squares."""
    return {
        name: loss
        for name, loss in objective.losses.items()
        if isinstance(loss, ProjectedLoss) and loss.least_squares() is not None
    }


def spread_rows(data: Any, wanted: int) -> list[int]:
    """So many row numbers, or all, evenly over the data.

    Raises:
        ValueError: the data cannot be read by number.
    """
    if not hasattr(data, "__len__"):
        raise ValueError("projection_init least_squares needs training data with a length; use random")
    wanted = min(len(data), wanted)
    return [i * len(data) // wanted for i in range(wanted)]


@torch.no_grad()
def fit_projections(
    model: DistillationModel,
    teacher: Teacher,
    batches: Iterable[dict[str, Any]],
    add_over_ranks: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Sets the projections of the losses that ask for it to the least-squares map between the two models' states.

    Args:
        model, teacher: the pair, on the device of the batches; the student runs without dropout and is left as it was.
        batches: of inputs.
        add_over_ranks: sum of a tensor over ranks, so that each rank sets the same.
    """
    losses = projected_losses(model.objective)
    fits = {name: loss.least_squares() for name, loss in losses.items()}
    was_training = model.training
    model.eval()
    try:
        for inputs in batches:
            student_features, teacher_features = model.features(inputs), teacher(inputs)
            for name, fit in fits.items():
                losses[name].fit(fit, student_features, teacher_features, inputs.get("attention_mask"))
    finally:
        model.train(was_training)
    for name, fit in fits.items():
        fit.squares = add_over_ranks(fit.squares)
        fit.products = add_over_ranks(fit.products)
        fit.solve()
        logger.info("projections of %s start by least squares from %d tokens", name, int(fit.squares[0, -1, -1]))


def separate_projections(
    optimizer: torch.optim.Optimizer,
    projections: set[torch.nn.Parameter],
    factor: float,
    decay: float | None,
    usual_decay: float,
) -> None:
    """Moves projections into groups with a learning rate and a weight decay of their own.

    Args:
        factor: on the learning rate of the group that they were in.
        decay: weight decay of those that are not biases; None leaves it.
        usual_decay: of the other parameters; a group without it, where there is one, is that of biases and norms.
    """
    for group in list(optimizer.param_groups):
        own = [parameter for parameter in group["params"] if parameter in projections]
        if not own:
            continue
        group["params"] = [parameter for parameter in group["params"] if parameter not in projections]
        if not group["params"]:
            optimizer.param_groups.remove(group)
        rules = {key: value for key, value in group.items() if key != "params"} | {"lr": group["lr"] * factor}
        if decay is None or (usual_decay and not group["weight_decay"]):
            optimizer.add_param_group(rules | {"params": own})
            continue
        for some, own_decay in (([p for p in own if p.dim() > 1], decay), ([p for p in own if p.dim() <= 1], 0.0)):
            if some:
                optimizer.add_param_group(rules | {"params": some, "weight_decay": own_decay})
