"""The weighted sum of the losses, each term kept for the log."""

from __future__ import annotations

import torch
from torch import nn

from distill_nlp.balancing import GradientBalance
from distill_nlp.losses.base import DistillationLoss, ModelShape
from distill_nlp.outputs import Features
from distill_nlp.schedules import Setting, build_schedule

Shares = dict[str, torch.Tensor | float]
"""Unit of a loss ("rows", "labeled_rows") -> how much of the global batch's mean this micro-batch's mean is."""


class DistillationObjective(nn.Module):
    """`Σ weight · loss`, with the losses' learned projections as its parameters.

    A loss whose weight is always 0 is left out altogether: not computed, and its projections are neither trained nor
    saved. One whose weight follows a schedule is not computed while it is 0.

    Args:
        losses: name -> loss. The name is the one in the log (`loss_<name>`).
        weights: name -> factor >= 0 or a schedule, e.g. `{"schedule": "linear", "start": 1.0, "end": 0.0}`, see
            `build_schedule`; 1 where not given.
        balance: multiply the weights by factors that bring the terms' gradients into the weights' ratio; see
            `GradientBalance`.

    Raises:
        ValueError: no loss, a weight without its loss, a weight below zero, all weights zero, an unusable name.

    Example:
        >>> objective = DistillationObjective({"ce": CrossEntropyLoss(), "kl": KLDivergenceLoss()}, {"ce": 0.3})
    """

    def __init__(
        self, losses: dict[str, DistillationLoss], weights: dict[str, Setting] | None = None, balance: bool = False
    ) -> None:
        super().__init__()
        weights = dict(weights or {})
        if not losses:
            raise ValueError('losses is empty; give at least one, e.g. {"kl": KLDivergenceLoss()}')
        for name in weights:
            if name not in losses:
                raise ValueError(f"loss_weights names {name!r}, which is not among the losses: {', '.join(losses)}")
        schedules = {}
        for name, loss in losses.items():
            if not name.isidentifier() or hasattr(nn.ModuleDict(), name):
                raise ValueError(
                    f"a loss's name must be letters, digits and underscores, and no attribute of a module, got {name!r}"
                )
            if not isinstance(loss, DistillationLoss):
                raise ValueError(f"losses[{name!r}] must be a DistillationLoss, got {type(loss).__name__}")
            schedules[name] = build_schedule(weights.get(name, 1.0), f"loss_weights[{name!r}]")
            if schedules[name].lowest < 0:
                raise ValueError(f"loss_weights[{name!r}] must be >= 0, got {schedules[name].lowest:g}")
        self.schedules = {name: schedule for name, schedule in schedules.items() if schedule.highest > 0}
        if not self.schedules:
            raise ValueError("all loss weights are 0; at least one must be above")
        self.losses = nn.ModuleDict({name: losses[name] for name in self.schedules})
        # A single term has nothing to be balanced against.
        self.balance = GradientBalance(list(self.schedules)) if balance and len(self.schedules) > 1 else None
        self.set_progress(0.0)

    @property
    def needs_teacher(self) -> bool:
        return any(loss.needs_teacher for loss in self.losses.values())

    @property
    def needs_teacher_now(self) -> bool:
        """Whether a loss whose weight is above zero now needs it."""
        return any(self.losses[name].needs_teacher for name in self.active)

    @property
    def active(self) -> list[str]:
        """The losses whose weight is above zero now."""
        return [name for name, weight in self.weights.items() if weight > 0]

    def active_at(self, progress: float) -> list[str]:
        """Those whose weight is above zero at another point of training."""
        return [name for name, schedule in self.schedules.items() if schedule(progress) > 0]

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

    def reads_layers(self) -> list[str]:
        """Names of the losses that read layers of the two models."""
        return [name for name, loss in self.losses.items() if loss.hidden_state_pairs or loss.attention_pairs]

    @property
    def reads_answers(self) -> bool:
        """Whether a loss reads the logits, without which the student's head does not learn."""
        return len(self.reads_layers()) < len(self.losses)

    def token_level(self) -> list[str]:
        """Names of the losses that compare the two models token by token."""
        return [
            name
            for name, loss in self.losses.items()
            if loss.attention_pairs or (loss.hidden_state_pairs and loss.pooling is None)
        ]

    def pooled_states(self) -> set[tuple[int, str]]:
        """(teacher layer, "first" or "mean"): what the losses read of a teacher's texts as a whole."""
        return {
            (pair[1], loss.pooling) for loss in self.losses.values() if loss.pooling for pair in loss.hidden_state_pairs
        }

    def set_progress(self, progress: float) -> None:
        """Brings weights and temperatures to where training is, from 0 to 1. Called before each step."""
        self.weights = {name: schedule(progress) for name, schedule in self.schedules.items()}
        for loss in self.losses.values():
            loss.set_progress(progress)

    def current_weights(self) -> dict[str, torch.Tensor]:
        """The weights that are not constant, balancing included, as scalars."""
        if self.balance is not None:
            return {name: weight * self.balance.factor(name).cpu() for name, weight in self.weights.items()}
        return {n: torch.tensor(weight) for n, weight in self.weights.items() if not self.schedules[n].constant}

    def forward(
        self,
        student: Features,
        teacher: Features | None,
        labels: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        shares: Shares | None = None,
        keep_graph: bool = False,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Gives the total to call backward on, and each term, unweighted.

        Args:
            student, teacher: features with the mapped layers.
            labels, attention_mask: of the batch, as the losses take them.
            shares: factors that make the sum over micro-batches and ranks the mean over the global batch; without
                them each term is the batch's own mean.
            keep_graph: leave the terms their graph, for the gradient of each; else they are detached.
        """
        total: torch.Tensor | float = 0.0
        terms = {}
        reads_logits = False
        # Losses are float32 also under autocast: a bfloat16 softmax or square has 3 significant digits.
        with torch.autocast(student.logits.device.type, enabled=False):
            for name, loss in self.losses.items():
                if not self.weights[name] > 0:
                    # Every rank must see a gradient of every parameter, or DDP waits for it.
                    total = total + sum(p.sum() for p in loss.parameters() if p.numel()) * 0.0
                    continue
                reads_logits |= not (loss.hidden_state_pairs or loss.attention_pairs)
                value = loss(student, teacher, labels, attention_mask)
                if shares is not None:
                    value = value * shares[loss.unit]
                factor = self.weights[name]
                if self.balance is not None:
                    factor = factor * self.balance.factor(name)
                total = total + factor * value
                terms[name] = value if keep_graph else value.detach()
            if not reads_logits:
                # The same for the classifier's head, which losses of inner layers do not reach.
                total = total + student.logits.float().sum() * 0.0
        return total, terms

    def formula(self) -> str:
        """The objective on one line: `0.3·ce + 0.7·kl(T=2) + 1·hidden(mse, 1→2, 2→4)`."""
        parts = []
        for name, loss in self.losses.items():
            settings = loss.describe()
            parts.append(f"{self.schedules[name]}·{name}" + (f"({settings})" if settings else ""))
        return " + ".join(parts) + (", gradients balanced" if self.balance is not None else "")
