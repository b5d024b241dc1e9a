"""Gradient norms of the terms: when they are measured, how, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from distill_nlp.objective import DistillationObjective, Shares
from distill_nlp.terms import TermLog

STEPS_BETWEEN_BALANCING = 20


class GradientMeter:
    """Brings the objective to each step, and measures the gradient norms of its terms every so many steps.

    A measurement is taken on the first micro-batch of a step, as if it were the whole batch, and is a mean over ranks.
    With balancing it moves the weights from the next step on, so that the micro-batches of one step have the same; a
    term that a schedule switches on is measured in its first step.

    Args:
        objective: bound.
        student: whose parameters the gradients are taken on.
        every: steps between measurements; 0: never, or with balancing every 20.
        log: gets the norms.
        accelerator: reduces over ranks, and knows the loss scale of float16.
    """

    def __init__(
        self, objective: DistillationObjective, student: nn.Module, every: int, log: TermLog, accelerator: Any
    ) -> None:
        self.objective, self.student, self.log, self.accelerator = objective, student, log, accelerator
        self.every = every or (STEPS_BETWEEN_BALANCING if objective.balance is not None else 0)
        self.due = False

    def begin_step(self, step: int, max_steps: int) -> None:
        """Brings weights and temperatures to this step, counted from 0."""
        objective, progress = self.objective, step / max(1, max_steps)
        objective.set_progress(progress)
        self.log.begin_step(objective.active)
        self.due = self.every > 0 and step % self.every == 0
        if objective.balance is not None:
            objective.balance.apply(objective.weights)
            before = objective.active_at(max(0, step - 1) / max(1, max_steps))
            self.due = self.due or not set(objective.active) <= set(before)

    def take(self, terms: dict[str, torch.Tensor], shares: Shares | None, held: Sequence[nn.Parameter] = ()) -> None:
        """Measures these terms, which must have their graph.

        Args:
            shares: factors by unit that the terms have been multiplied with.
            held: parameters that do not learn in this step, although they have a gradient.
        """
        self.due = False
        if not terms:
            return
        # Without the loss scale float16 gradients vanish on the way.
        scaler = getattr(self.accelerator, "scaler", None)
        scale = scaler.get_scale() if scaler is not None else 1.0
        factors = {
            name: scale * (1.0 if shares is None else shares[self.objective.losses[name].unit]) for name in terms
        }
        left_out = set(held)
        parameters = [p for p in self.student.parameters() if p.requires_grad and p not in left_out]
        norms = gradient_norms({name: value * scale for name, value in terms.items()}, parameters, factors)
        if self.accelerator.num_processes > 1:
            # Over the ranks that have a row with this term: of the others the gradient is 0, and says nothing.
            here = torch.stack(list(norms.values()))
            sums, counts = self.accelerator.reduce(torch.stack([here, (here != 0).to(here)]), reduction="sum")
            norms = dict(zip(norms, sums / counts.clamp(min=1), strict=True))
        for name, norm in norms.items():
            self.log.add_norm(name, norm)
        if self.objective.balance is not None:
            self.objective.balance.observe(norms)


def gradient_norms(
    terms: dict[str, torch.Tensor],
    parameters: Sequence[torch.nn.Parameter],
    factors: Mapping[str, torch.Tensor | float] | None = None,
) -> dict[str, torch.Tensor]:
    """L2 norm of each term's gradient on the parameters; leaves their graph and `.grad` as they are.

    Args:
        terms: name -> scalar with its graph.
        parameters: of the student.
        factors: name -> factor that is in the term already, and is divided out again.
    """
    norms = {}
    for name, value in terms.items():
        gradients = ()
        if value.requires_grad:
            gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        lengths = [torch.linalg.vector_norm(gradient.float()) for gradient in gradients if gradient is not None]
        norm = torch.linalg.vector_norm(torch.stack(lengths)) if lengths else torch.zeros((), device=value.device)
        factor = torch.as_tensor((factors or {}).get(name, 1.0))
        # A micro-batch without labeled rows has the share 0 and the gradient 0.
        norms[name] = norm / factor.clamp(min=torch.finfo(torch.float32).tiny)
    return norms
