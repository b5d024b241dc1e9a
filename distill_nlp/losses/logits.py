"""Losses of the logits: what the student answers against the labels and against the teacher's answers."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from distill_nlp.losses.base import (
    IGNORE_INDEX,
    DistillationLoss,
    ModelShape,
    ProblemType,
    check_positive,
    check_same_classes,
)
from distill_nlp.outputs import Features


class CrossEntropyLoss(DistillationLoss):
    """The task's own loss against the labels; rows without a label count nowhere.

    Single-label: `-Σ_c y_c log softmax(z)_c` with `y` smoothed to `(1 - ε) y + ε / C`. Multi-label: binary
    cross-entropy of `sigmoid(z)`, a mean over classes. Regression: squared error, a mean over outputs.

    Args:
        label_smoothing: ε, in [0, 1). Single-label only.
        class_weights: one factor per class, multiplied into each row's loss (single-label) or into each
            class's (multi-label). The mean is then over rows, not over weights, so that micro-batches add up.

    Shapes:
        logits `(B, C)`; labels `(B,)` with -100 for "no label"; multi-label `(B, C)` and regression `(B,)` or
        `(B, C)`, a row of -100 for "no label". Gives the mean over labeled rows, 0 where there is none.

    Raises:
        ValueError: a setting out of range, labels that do not fit the task, label smoothing in another task.

    Example:
        >>> loss = CrossEntropyLoss(label_smoothing=0.1)
    """

    unit = "labeled_rows"
    needs_teacher = False

    def __init__(self, label_smoothing: float = 0.0, class_weights: list[float] | None = None) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing!r}")
        self.label_smoothing = float(label_smoothing)
        for weight in class_weights or []:
            check_positive("class_weights", weight)
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", weights, persistent=False)
        self.problem_type: ProblemType = "single_label_classification"

    def bind(self, student: ModelShape, teacher: ModelShape | None) -> None:
        self.problem_type = student.problem_type
        if self.problem_type != "single_label_classification" and self.label_smoothing:
            raise ValueError(f"label_smoothing is for single-label tasks; this one is {self.problem_type}")
        if self.class_weights is not None:
            if self.problem_type == "regression":
                raise ValueError("class_weights are for classification; this task is regression")
            if len(self.class_weights) != student.num_labels:
                raise ValueError(f"class_weights has {len(self.class_weights)} values for {student.num_labels} classes")

    def forward(self, student, teacher, labels, attention_mask):
        logits = student.logits.float()  # (B, C)
        if labels is None:
            raise ValueError("CrossEntropyLoss needs labels; mark rows without one by -100")
        if self.problem_type == "single_label_classification":
            if labels.is_floating_point() or labels.dim() != 1:
                raise ValueError(
                    f"single-label classification needs (B,) integer labels, got {labels.dtype} of shape "
                    f"{tuple(labels.shape)}; set the student's config.problem_type for another task"
                )
            labeled = labels != IGNORE_INDEX
            rows = F.cross_entropy(
                logits, labels, reduction="none", ignore_index=IGNORE_INDEX, label_smoothing=self.label_smoothing
            )
            if self.class_weights is not None:
                rows = rows * self.class_weights[labels.clamp(min=0)]
        else:
            targets = labels.float().view(logits.shape)
            labeled = (targets != IGNORE_INDEX).all(dim=1)
            targets = torch.where(labeled[:, None], targets, 0.0)
            if self.problem_type == "regression":
                rows = (logits - targets).square().mean(dim=1)
            else:
                per_class = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
                if self.class_weights is not None:
                    per_class = per_class * self.class_weights
                rows = per_class.mean(dim=1)
        # A multiplication, not an index: no host sync, and a batch without labels still reaches the graph.
        return (rows * labeled).sum() / labeled.sum().clamp(min=1)

    def describe(self) -> str:
        return f"smoothing={self.label_smoothing:g}" if self.label_smoothing else ""


class KLDivergenceLoss(DistillationLoss):
    """Divergence of the student's answer from the teacher's, both softened by a temperature.

    `T² · Σ_c p_t log(p_t / p_s)` with `p = softmax(z / T)`, summed over classes, a mean over rows. T² keeps the
    gradient's size independent of T. Multi-label: the same for each class's pair (σ, 1 - σ), summed over classes.
    Source: Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network" (arXiv:1503.02531).

    Args:
        temperature: T > 0. At 1 the teacher's own probabilities; higher shows more of the unlikely classes.

    Shapes:
        both logits `(B, C)`. All rows count, labeled or not.

    Raises:
        ValueError: temperature not above zero, logits of different shapes, a regression task, models of different
            tasks.

    Example:
        >>> loss = KLDivergenceLoss(temperature=2.0)
    """

    def __init__(self, temperature: float = 2.0) -> None:
        super().__init__()
        self.temperature = float(check_positive("temperature", temperature))
        self.problem_type: ProblemType = "single_label_classification"

    def bind(self, student: ModelShape, teacher: ModelShape | None) -> None:
        self.problem_type = student.problem_type
        if self.problem_type == "regression":
            raise ValueError("KLDivergenceLoss is not defined for regression: there are no classes")
        if self.problem_type == "single_label_classification" and student.num_labels < 2:
            raise ValueError("KLDivergenceLoss needs at least 2 classes")
        if teacher is not None and teacher.problem_type != self.problem_type:
            raise ValueError(
                f"the student's task is {self.problem_type}, the teacher's {teacher.problem_type}; set problem_type in "
                "the config of one of them"
            )

    def forward(self, student: Features, teacher: Features, labels, attention_mask):
        check_same_classes(student.logits, teacher.logits)
        student_logits = student.logits.float() / self.temperature  # (B, C)
        teacher_logits = teacher.logits.detach().float() / self.temperature  # (B, C)
        if self.problem_type == "multi_label_classification":
            divergence = _binary_kl(student_logits, teacher_logits)
        else:
            divergence = F.kl_div(
                F.log_softmax(student_logits, dim=-1),
                F.log_softmax(teacher_logits, dim=-1),
                reduction="none",
                log_target=True,
            )
        return divergence.sum(dim=-1).mean() * self.temperature**2

    def describe(self) -> str:
        return f"T={self.temperature:g}"


def _binary_kl(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """KL of Bernoulli(sigmoid(teacher)) from Bernoulli(sigmoid(student)), per class: (B, C)."""
    p = torch.sigmoid(teacher_logits)
    positive = F.logsigmoid(teacher_logits) - F.logsigmoid(student_logits)
    negative = F.logsigmoid(-teacher_logits) - F.logsigmoid(-student_logits)
    return p * positive + (1 - p) * negative
