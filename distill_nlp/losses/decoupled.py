"""Decoupled knowledge distillation: the target class and the others, weighted apart."""

from __future__ import annotations

import torch

from distill_nlp.losses.base import IGNORE_INDEX, ModelShape, check_choice, kl
from distill_nlp.losses.logits import ResponseLoss
from distill_nlp.losses.temperature import Temperature
from distill_nlp.outputs import Features
from distill_nlp.schedules import Setting


class DecoupledKDLoss(ResponseLoss):
    """The KL divergence taken apart, so that a sure teacher no longer silences what it knows of the other classes.

    `T² · (α · KL(b_t ‖ b_s) + β · KL(q_t ‖ q_s))` with `p = softmax(z / T)`, `b = (p_y, 1 - p_y)` for the target class
    y and `q` the softmax over the other classes alone; a mean over the rows that have a target. The plain KL is the
    same with α = 1 and β = 1 - p_y of the teacher.
    Source: Zhao et al. 2022, "Decoupled Knowledge Distillation" (arXiv:2203.08679).

    Args:
        temperature: T > 0: a number, a schedule, or per row (see `Temperature`).
        alpha: weight of the target class, >= 0.
        beta: weight of the others, >= 0; the paper takes 1 to 8.
        target: "label": rows without one count nowhere; "teacher": the teacher's own answer, so that unlabeled text
            counts too.

    Shapes:
        both logits `(B, C)`, C >= 3 (of two classes nothing is left to compare among the others); labels `(B,)`.

    Raises:
        ValueError: a setting out of range, fewer than 3 classes, a task that is not single-label, labels missing or of
            another kind.

    Example:
        >>> loss = DecoupledKDLoss(temperature=4.0, alpha=1.0, beta=8.0)
    """

    tasks = ("single_label_classification",)
    least_classes = 3

    def __init__(
        self, temperature: Setting = 4.0, alpha: float = 1.0, beta: float = 8.0, target: str = "label"
    ) -> None:
        super().__init__()
        self.temperature = Temperature(temperature)
        self.compares_rows = self.temperature.per_row is not None
        for name, value in (("alpha", alpha), ("beta", beta)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be >= 0, got {value!r}")
        if not alpha and not beta:
            raise ValueError("alpha and beta are both 0; at least one must be above")
        self.alpha, self.beta = float(alpha), float(beta)
        self.target = check_choice("target", target, ("label", "teacher"))
        self.unit = "labeled_rows" if target == "label" else "rows"

    def bind(self, student: ModelShape, teacher: ModelShape | None) -> None:
        super().bind(student, teacher)
        self.temperature.check_classes(student.num_labels)

    def set_progress(self, progress: float) -> None:
        self.temperature.set_progress(progress)

    def forward(self, student: Features, teacher: Features, labels, attention_mask):
        student_logits, teacher_logits = self._logits(student, teacher)  # (B, C)
        if self.target == "teacher":
            labels = teacher_logits.argmax(dim=-1)
        elif labels is None:
            raise ValueError('DecoupledKDLoss needs labels; mark rows without one by -100, or set target to "teacher"')
        elif labels.is_floating_point() or labels.dim() != 1:
            raise ValueError(
                f"DecoupledKDLoss needs (B,) integer labels, got {labels.dtype} of shape {tuple(labels.shape)}"
            )
        has_target = labels != IGNORE_INDEX  # (B,)
        target = labels.long().clamp(min=0)[:, None]  # (B, 1)
        temperature = self.temperature(student_logits, teacher_logits)
        target_s, others_s = _decouple(student_logits / temperature, target)
        target_t, others_t = _decouple(teacher_logits / temperature, target)
        rows = self.alpha * kl(target_t, target_s) + self.beta * kl(others_t, others_s)  # (B,)
        if isinstance(temperature, torch.Tensor):
            temperature = temperature.squeeze(1)
        return (rows * temperature**2 * has_target).sum() / has_target.sum().clamp(min=1)

    def describe(self) -> str:
        target = "" if self.target == "label" else f", target={self.target}"
        return f"T={self.temperature}, α={self.alpha:g}, β={self.beta:g}{target}"


def _decouple(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of (target, not target), `(B, 2)`, and among the other classes, `(B, C)`; there the target's
    own is the lowest finite number, which adds 0 to a KL.
    """
    log_p = logits.log_softmax(dim=-1)
    low = torch.finfo(logits.dtype).min
    # In logarithms: 1 - p would be exactly 0 for a sure model.
    log_rest = log_p.scatter(1, target, low).logsumexp(dim=-1, keepdim=True)  # (B, 1)
    pair = torch.cat([log_p.gather(1, target), log_rest], dim=1)
    return pair, logits.scatter(1, target, low).log_softmax(dim=-1)
