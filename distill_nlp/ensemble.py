"""Several teachers that answer as one: a weighted mean of their probabilities or logits."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from distill_nlp.losses.base import ModelShape, check_choice, check_positive, upcast
from distill_nlp.objective import DistillationObjective
from distill_nlp.outputs import Features
from distill_nlp.teacher import Teacher

MEANS = ("probabilities", "logits")


class TeacherEnsemble:
    """Several teachers as one: `Σ w p` or `Σ w z` with the weights brought to the sum 1.

    It has logits and no layers. The mean of probabilities is handed on as logits, `log Σ w softmax(z)` (multi-label:
    the logits of `Σ w sigmoid(z)`), which a loss may divide by its temperature as any logits. For regression both are
    the mean of the answers.

    Args:
        members: models, or `Teacher`s, each of which may read tokens of its own; their labels may be in different
            orders. `cache_teacher_logits` takes the ensemble as a whole.
        weights: one per member, > 0; equal where not given.
        mean: "probabilities", in which a sure member outvotes unsure ones by no more than its weight, or "logits".

    Raises:
        ValueError: no member, other numbers of weights, a weight not above 0, two members of one prefix that have
            different tokenizers.

    Example:
        >>> teacher = TeacherEnsemble([first, second], weights=[2, 1])
        >>> trainer = DistillationTrainer(model=student, teacher=teacher, losses={"kl": KLDivergenceLoss()}, ...)
    """

    def __init__(
        self,
        members: Sequence[nn.Module | Teacher],
        weights: Sequence[float] | None = None,
        mean: str = "probabilities",
    ) -> None:
        if not members:
            raise ValueError("an ensemble needs at least one teacher")
        for member in members:
            if not isinstance(member, nn.Module | Teacher):
                raise ValueError(f"members of an ensemble are models or Teachers, got {type(member).__name__}")
        weights = [1.0] * len(members) if weights is None else list(weights)
        if len(weights) != len(members):
            raise ValueError(f"an ensemble of {len(members)} teachers needs as many weights, got {len(weights)}")
        for weight in weights:
            check_positive("weights of an ensemble", weight)
        self.members = [Teacher(m) if isinstance(m, nn.Module) else m for m in members]
        self.weights = [weight / math.fsum(weights) for weight in weights]
        self.mean = check_choice("mean", mean, MEANS)
        self.tokenizers: dict[str, Any] = {}
        for member in self.members:
            for prefix, tokenizer in member.tokenizers.items():
                if self.tokenizers.setdefault(prefix, tokenizer) is not tokenizer:
                    raise ValueError(
                        f'two teachers of the ensemble have different tokenizers and one prefix, "{prefix}"; give one '
                        'of them another, such as prefix="teacher_2_"'
                    )
        self._problem_type = ModelShape.from_config(self.config).problem_type

    @property
    def config(self) -> Any:
        """That of the first member: its labels in their order are the ensemble's."""
        return self.members[0].config

    @property
    def accepted(self) -> set[str] | None:
        """Columns that the members read; None if one of them takes any."""
        if any(member.accepted is None for member in self.members):
            return None
        return set().union(*(member.accepted for member in self.members))

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those of all members."""
        for member in self.members:
            yield from member.parameters()

    def bind(self, student_config: Any, objective: DistillationObjective) -> TeacherEnsemble:
        """One that answers for this student, its models frozen.

        Raises:
            ValueError: labels that do not match, or a loss that reads layers.
        """
        if reading := objective.reads_layers():
            raise ValueError(
                f"losses {', '.join(reading)} read layers of the teacher, which an ensemble has not; use losses of the "
                "logits, or one teacher"
            )
        bound = copy.copy(self)
        # Without a config of the student's, the first member's labels are the ones to agree on.
        target = self.config if student_config is None else student_config
        bound.members = [member.bind(target, objective) for member in self.members]
        bound._problem_type = ModelShape.from_config(target).problem_type
        return bound

    def prepare(self, device: torch.device, data: Any) -> None:
        """See the members'."""
        for member in self.members:
            member.prepare(device, data)

    def __call__(self, inputs: dict[str, Any]) -> Features:
        """The mean of what the members answer for a batch, without gradient."""
        logits = [member(inputs).logits for member in self.members]
        return Features(mean_logits(logits, self.weights, self.mean, self._problem_type))


def mean_logits(logits: Sequence[torch.Tensor], weights: Sequence[float], mean: str, problem_type: str) -> torch.Tensor:
    """Several teachers' logits (B, C), of the same labels in the same order, as one's: (B, C), at least float32.

    Args:
        weights: one each, of the sum 1.
        mean: "probabilities" or "logits".
        problem_type: says which probabilities: softmax, sigmoid, or none (regression).
    """
    members = [upcast(x) for x in logits]
    if mean == "logits" or problem_type == "regression":
        return sum(weight * x for weight, x in zip(weights, members, strict=True))
    if problem_type == "multi_label_classification":
        return _log_mean([F.logsigmoid(x) for x in members], weights) - _log_mean(
            [F.logsigmoid(-x) for x in members], weights
        )
    return _log_mean([x.log_softmax(dim=-1) for x in members], weights)


def _log_mean(logs: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """The logarithm of the weighted mean; weights stay numbers, which no device has to be waited for."""
    weighted = [x + math.log(weight) for x, weight in zip(logs, weights, strict=True)]
    return torch.logsumexp(torch.stack(weighted), dim=0)
