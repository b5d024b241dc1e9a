"""Correlations of the two models' answers instead of their distance."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from distill_nlp.losses.base import ModelShape
from distill_nlp.losses.logits import ResponseLoss
from distill_nlp.losses.temperature import Temperature
from distill_nlp.outputs import Features
from distill_nlp.schedules import Setting


class DISTLoss(ResponseLoss):
    """Lets the student keep the teacher's order of preferences, without its exact probabilities.

    `T² · (β · (1 - mean_i ρ(p_s[i, :], p_t[i, :])) + γ · (1 - mean_c ρ(p_s[:, c], p_t[:, c])))` with
    `p = softmax(z / T)` and ρ Pearson's correlation: between the classes of each row, and between the rows of each
    class; 0, without gradient, where one of the two is constant. The second relates the rows of one batch to each
    other, so that it depends on how they are batched; it is computed within a micro-batch of one rank, says nothing
    for a batch of two rows (ρ is ±1), and is left out for a batch of one.
    Source: Huang et al. 2022, "Knowledge Distillation from A Stronger Teacher" (arXiv:2205.10536).

    Args:
        temperature: T > 0: a number or a schedule.
        inter_weight: β >= 0, between classes; must be 0 for 2 classes, where ρ is ±1 whatever the answers are.
        intra_weight: γ >= 0, between rows.

    Shapes:
        both logits `(B, C)`. All rows count, labeled or not.

    Raises:
        ValueError: a setting out of range, β > 0 with 2 classes, a task that is not single-label.

    Example:
        >>> loss = DISTLoss(temperature=1.0, inter_weight=1.0, intra_weight=1.0)
    """

    tasks = ("single_label_classification",)

    def __init__(self, temperature: Setting = 1.0, inter_weight: float = 1.0, intra_weight: float = 1.0) -> None:
        super().__init__()
        self.temperature = Temperature(temperature)
        if self.temperature.per_row is not None:
            raise ValueError(f"temperature: {self.temperature.per_row} would mix temperatures within a correlation")
        for name, value in (("inter_weight", inter_weight), ("intra_weight", intra_weight)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be >= 0, got {value!r}")
        if not inter_weight and not intra_weight:
            raise ValueError("inter_weight and intra_weight are both 0; at least one must be above")
        self.inter_weight, self.intra_weight = float(inter_weight), float(intra_weight)
        self.compares_rows = self.intra_weight > 0

    def bind(self, student: ModelShape, teacher: ModelShape | None) -> None:
        super().bind(student, teacher)
        if student.num_labels == 2 and self.inter_weight:
            raise ValueError(
                "inter_weight must be 0 with 2 classes: two probabilities that add up to 1 correlate by ±1, whatever "
                "they are"
            )

    def set_progress(self, progress: float) -> None:
        self.temperature.set_progress(progress)

    def forward(self, student: Features, teacher: Features, labels, attention_mask):
        student_logits, teacher_logits = self._logits(student, teacher)  # (B, C)
        temperature = self.temperature(student_logits, teacher_logits)
        p_student = (student_logits / temperature).softmax(dim=-1)
        p_teacher = (teacher_logits / temperature).softmax(dim=-1)
        total = student_logits.sum() * 0.0
        if self.inter_weight:
            total = total + self.inter_weight * (1 - _pearson(p_student, p_teacher).mean())
        if self.intra_weight and len(p_student) > 1:
            total = total + self.intra_weight * (1 - _pearson(p_student.T, p_teacher.T).mean())
        return total * temperature**2

    def describe(self) -> str:
        return f"T={self.temperature}, β={self.inter_weight:g}, γ={self.intra_weight:g}"


def _pearson(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Pearson's correlation over the last dimension: (N, K), (N, K) -> (N,); 0 where one of them is constant."""
    return F.cosine_similarity(_centred(x), _centred(y), dim=-1)


def _centred(values: torch.Tensor) -> torch.Tensor:
    """Mean 0 over the last dimension; zeros, without gradient, where all are equal."""
    centred = values - values.mean(dim=-1, keepdim=True)
    # Of equal numbers a rounding error is left, which normalized has a gradient of 10^7.
    rounding = 8 * torch.finfo(values.dtype).eps * values.abs().amax(dim=-1, keepdim=True)
    return torch.where(centred.abs().amax(dim=-1, keepdim=True) > rounding, centred, 0.0)
