"""Losses of the logits: what the student answers against what the teacher answers."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from distill_nlp.losses.base import DistillationLoss, ModelShape, ProblemType, kl, upcast
from distill_nlp.losses.temperature import Temperature
from distill_nlp.outputs import Features
from distill_nlp.schedules import Setting


class ResponseLoss(DistillationLoss):
    """Base of the losses that compare the two models' logits class by class.

    Attributes:
        least_classes: fewest classes of a single-label task for which it is not constant.
    """

    least_classes = 2

    def bind(self, student: ModelShape, teacher: ModelShape | None) -> None:
        super().bind(student, teacher)
        self.problem_type: ProblemType = student.problem_type
        if teacher is not None and teacher.problem_type != student.problem_type:
            raise ValueError(
                f"the student's task is {student.problem_type}, the teacher's {teacher.problem_type}; set problem_type "
                "in the config of one of them"
            )
        if student.problem_type == "single_label_classification" and student.num_labels < self.least_classes:
            raise ValueError(
                f"{type(self).__name__} needs at least {self.least_classes} classes, got {student.num_labels}"
            )

    def _logits(self, student: Features, teacher: Features) -> tuple[torch.Tensor, torch.Tensor]:
        """Both logits, `(B, C)` in at least float32, the teacher's without gradient."""
        if student.logits.shape != teacher.logits.shape:
            # Broadcasting would compare different classes.
            raise ValueError(
                f"student logits have shape {tuple(student.logits.shape)}, teacher logits "
                f"{tuple(teacher.logits.shape)}; both must be (B, C) with the same classes"
            )
        return upcast(student.logits), upcast(teacher.logits.detach())


class SoftenedLoss(ResponseLoss):
    """Base of the losses that compare probabilities softened by a temperature.

    A subclass gives `_divergence(log_p_s, log_p_t)` over the last dimension. The result is times T², which keeps the
    gradient's size independent of T, and a mean over rows. Multi-label: the same for each class's pair (σ, 1 - σ), a
    mean over classes, as the binary cross-entropy of `CrossEntropyLoss` is: a weight means the same for both.

    Args:
        temperature: T > 0: a number, a schedule, or per row (see `Temperature`). At 1 the teacher's own
            probabilities; higher shows more of the unlikely classes.
        standardize: logits are brought to mean 0 and standard deviation 1 over the classes of each row first, so that
            the student need not match the teacher's logit scale (single-label, at least 3 classes: of two, only the
            sign would be left). Source: Sun et al. 2024, "Logit Standardization in Knowledge Distillation"
            (arXiv:2403.01427).
    """

    tasks = ("single_label_classification", "multi_label_classification")

    def __init__(self, temperature: Setting = 2.0, standardize: bool = False) -> None:
        super().__init__()
        self.temperature = Temperature(temperature)
        self.compares_rows = self.temperature.per_row is not None
        if not isinstance(standardize, bool):
            raise ValueError(f"standardize must be true or false, got {standardize!r}")
        self.standardize = standardize
        self.problem_type: ProblemType = "single_label_classification"

    def bind(self, student: ModelShape, teacher: ModelShape | None) -> None:
        super().bind(student, teacher)
        if self.problem_type == "single_label_classification":
            self.temperature.check_classes(student.num_labels)
        elif self.temperature.per_row is not None:
            raise ValueError(f"temperature: {self.temperature.per_row} is defined for single-label tasks only")
        if self.standardize and (self.problem_type != "single_label_classification" or student.num_labels < 3):
            raise ValueError(
                f"standardize needs a single-label task of at least 3 classes, got {self.problem_type} of "
                f"{student.num_labels}: of two standardized logits only the sign is left"
            )

    def set_progress(self, progress: float) -> None:
        self.temperature.set_progress(progress)

    def forward(self, student: Features, teacher: Features, labels, attention_mask):
        student_logits, teacher_logits = self._logits(student, teacher)  # (B, C)
        temperature = self.temperature(student_logits, teacher_logits)
        if self.standardize:
            student_logits, teacher_logits = _standardize(student_logits), _standardize(teacher_logits)
        log_p_student = self._log_probabilities(student_logits / temperature)
        log_p_teacher = self._log_probabilities(teacher_logits / temperature)
        divergence = self._divergence(log_p_student, log_p_teacher)  # (B, 1) or (B, C)
        return (divergence * temperature**2).mean()

    def _log_probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """`(B, 1, C)` for one choice among C classes, `(B, C, 2)` for C choices between yes and no."""
        if self.problem_type == "multi_label_classification":
            return torch.stack([F.logsigmoid(logits), F.logsigmoid(-logits)], dim=-1)
        return F.log_softmax(logits, dim=-1)[:, None]

    def _divergence(self, log_p_student: torch.Tensor, log_p_teacher: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError(f"{type(self).__name__} must implement _divergence")

    def describe(self) -> str:
        return f"T={self.temperature}" + (", standardized" if self.standardize else "")


class KLDivergenceLoss(SoftenedLoss):
    """Divergence of the student's answer from the teacher's, both softened by a temperature.

    `T² · Σ_c p_t log(p_t / p_s)` with `p = softmax(z / T)`, summed over classes, a mean over rows.
    Source: Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network" (arXiv:1503.02531).

    Args:
        temperature, standardize: see `SoftenedLoss`.

    Shapes:
        both logits `(B, C)`. All rows count, labeled or not.

    Raises:
        ValueError: a temperature not above zero, logits of different shapes, a regression task, models of different
            tasks.

    Example:
        >>> loss = KLDivergenceLoss(temperature=2.0)
    """

    def _divergence(self, log_p_student, log_p_teacher):
        return kl(log_p_teacher, log_p_student)


class ReverseKLLoss(SoftenedLoss):
    """The KL divergence the other way round: the student avoids what the teacher rules out.

    `T² · Σ_c p_s log(p_s / p_t)` with `p = softmax(z / T)`, summed over classes, a mean over rows.
    Source: Gu et al. 2023, "MiniLLM" (arXiv:2306.08543).

    Args:
        temperature, standardize: see `SoftenedLoss`.

    Shapes:
        both logits `(B, C)`. All rows count, labeled or not.

    Raises:
        ValueError: as `KLDivergenceLoss`.

    Example:
        >>> loss = ReverseKLLoss(temperature=1.0)
    """

    def _divergence(self, log_p_student, log_p_teacher):
        return kl(log_p_student, log_p_teacher)


class JensenShannonLoss(SoftenedLoss):
    """The symmetric divergence, which is at most log 2 (before T²) however far apart the two are.

    `T² · ½ (KL(p_t ‖ m) + KL(p_s ‖ m))` with `m = ½ (p_s + p_t)` and `p = softmax(z / T)`, summed over classes, a mean
    over rows.
    Source: Lin 1991, "Divergence measures based on the Shannon entropy"; in distillation Agarwal et al. 2024
    (arXiv:2306.13649).

    Args:
        temperature, standardize: see `SoftenedLoss`.

    Shapes:
        both logits `(B, C)`. All rows count, labeled or not.

    Raises:
        ValueError: as `KLDivergenceLoss`.

    Example:
        >>> loss = JensenShannonLoss(temperature=1.0)
    """

    def _divergence(self, log_p_student, log_p_teacher):
        log_m = torch.logaddexp(log_p_student, log_p_teacher) - math.log(2)
        return (kl(log_p_teacher, log_m) + kl(log_p_student, log_m)) / 2


class SoftCrossEntropyLoss(SoftenedLoss):
    """Cross-entropy against the teacher's probabilities: the KL divergence plus the teacher's own entropy.

    `-T² · Σ_c p_t log p_s` with `p = softmax(z / T)`, summed over classes, a mean over rows. Its gradient is that of
    `KLDivergenceLoss`; it is not zero where the two agree.
    Source: Hinton et al. 2015 (arXiv:1503.02531); TinyBERT (arXiv:1909.10351) uses it at T = 1.

    Args:
        temperature, standardize: see `SoftenedLoss`.

    Shapes:
        both logits `(B, C)`. All rows count, labeled or not.

    Raises:
        ValueError: as `KLDivergenceLoss`.

    Example:
        >>> loss = SoftCrossEntropyLoss(temperature=1.0)
    """

    def _divergence(self, log_p_student, log_p_teacher):
        return -(log_p_teacher.exp() * log_p_student).sum(dim=-1)


class LogitsMSELoss(ResponseLoss):
    """Squared difference of the logits themselves; for regression, of the two predictions.

    `mean_c (z_s - z_t)²`, a mean over rows.
    Source: Ba and Caruana 2014, "Do Deep Nets Really Need to be Deep?" (arXiv:1312.6184); against KL: Kim et al. 2021
    (arXiv:2105.08919).

    Shapes:
        both logits `(B, C)`. All rows count, labeled or not.

    Raises:
        ValueError: logits of different shapes, models of different tasks.

    Example:
        >>> loss = LogitsMSELoss()
    """

    least_classes = 1

    def forward(self, student: Features, teacher: Features, labels, attention_mask):
        student_logits, teacher_logits = self._logits(student, teacher)
        return (student_logits - teacher_logits).square().mean()


def _standardize(logits: torch.Tensor) -> torch.Tensor:
    """Mean 0 and (population) standard deviation 1 over the classes of each row; equal logits become zeros."""
    centred = logits - logits.mean(dim=-1, keepdim=True)
    # Inside the root: the gradient of the root at 0 is infinite.
    return centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-12).sqrt()
