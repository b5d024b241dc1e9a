"""The weighted sum of the losses, each term kept for the log."""

from __future__ import annotations

import math

import torch
from torch import nn

from distill_nlp.losses.base import DistillationLoss, ModelShape
from distill_nlp.outputs import Features

Shares = dict[str, torch.Tensor | float]
"""Unit of a loss ("rows", "labeled_rows") -> how much of the global batch's mean this micro-batch's mean is."""


class DistillationObjective(nn.Module):
    """`Σ weight · loss`, with the losses' learned projections as its parameters.

    A loss of weight 0 is left out altogether: not computed, and its projections are neither trained nor saved.

    Args:
        losses: name -> loss. The name is the one in the log (`loss_<name>`).
        weights: name -> factor >= 0; 1 where not given.

    Raises:
        ValueError: no loss, a weight without its loss, a negative weight, all weights zero, an unusable name.

    Example:
        >>> objective = DistillationObjective({"ce": CrossEntropyLoss(), "kl": KLDivergenceLoss()}, {"ce": 0.3})
    """

    def __init__(self, losses: dict[str, DistillationLoss], weights: dict[str, float] | None = None) -> None:
        super().__init__()
        weights = dict(weights or {})
        if not losses:
            raise ValueError('losses is empty; give at least one, e.g. {"kl": KLDivergenceLoss()}')
        for name in weights:
            if name not in losses:
                raise ValueError(f"loss_weights names {name!r}, which is not among the losses: {', '.join(losses)}")
        for name, loss in losses.items():
            if not name.isidentifier() or hasattr(nn.ModuleDict(), name):
                raise ValueError(
                    f"a loss's name must be letters, digits and underscores, and no attribute of a module, got {name!r}"
                )
            if not isinstance(loss, DistillationLoss):
                raise ValueError(f"losses[{name!r}] must be a DistillationLoss, got {type(loss).__name__}")
            weight = weights.setdefault(name, 1.0)
            if not (isinstance(weight, int | float) and math.isfinite(weight) and weight >= 0):
                raise ValueError(f"loss_weights[{name!r}] must be a finite number >= 0, got {weight!r}")
        self.weights = {name: float(weights[name]) for name in losses if weights[name] > 0}
        if not self.weights:
            raise ValueError("all loss weights are 0; at least one must be above")
        self.losses = nn.ModuleDict({name: losses[name] for name in self.weights})

    @property
    def needs_teacher(self) -> bool:
        return any(loss.needs_teacher for loss in self.losses.values())

    def bind(self, student: ModelShape, teacher: ModelShape | None) -> None:
        """Lets each loss size its projections and resolve its layers for these two models.

        Raises:
            ValueError: what a loss refused, with its name in front.
        """
        for name, loss in self.losses.items():
            try:
                loss.bind(student, teacher)
            except ValueError as error:
                raise ValueError(f"losses.{name}: {error}") from None

    def layers(self, side: int, kind: str) -> set[int]:
        """Layers that the losses read: side 0 is the student, 1 the teacher; kind "hidden_state" or "attention"."""
        return {pair[side] for loss in self.losses.values() for pair in getattr(loss, f"{kind}_pairs")}

    def forward(
        self,
        student: Features,
        teacher: Features | None,
        labels: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        shares: Shares | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Gives the total to call backward on, and each term, detached and unweighted.

        Args:
            student, teacher: features with the mapped layers.
            labels, attention_mask: of the batch, as the losses take them.
            shares: factors that make the sum over micro-batches and ranks the mean over the global batch; without
                them each term is the batch's own mean.
        """
        total: torch.Tensor | float = 0.0
        terms = {}
        # Losses are float32 also under autocast: a bfloat16 softmax or square has 3 significant digits.
        with torch.autocast(student.logits.device.type, enabled=False):
            for name, loss in self.losses.items():
                value = loss(student, teacher, labels, attention_mask)
                if shares is not None:
                    value = value * shares[loss.unit]
                total = total + self.weights[name] * value
                terms[name] = value.detach()
        return total, terms

    def formula(self) -> str:
        """The objective on one line: `0.3·ce + 0.7·kl(T=2) + 1·hidden(mse, 1→2, 2→4)`."""
        parts = []
        for name, loss in self.losses.items():
            settings = loss.describe()
            parts.append(f"{self.weights[name]:g}·{name}" + (f"({settings})" if settings else ""))
        return " + ".join(parts)
