"""The task's own loss, against the labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from distill_nlp.losses.base import (
    IGNORE_INDEX,
    DistillationLoss,
    ModelShape,
    ProblemType,
    check_positive,
    upcast,
)

BALANCED = "balanced"
_UNRESOLVED = (
    'class_weights "balanced" must be put in numbers first: '
    "CrossEntropyLoss(class_weights=balanced_class_weights(labels, num_classes))"
)


def balanced_class_weights(labels: Sequence[int] | torch.Tensor, num_classes: int) -> list[float]:
    """Weights by which each class counts alike: `n / (C · n_c)`, whose mean over the labeled rows is 1.

    Args:
        labels: `(N,)` integers of the training rows; -100 is no label.
        num_classes: C.

    Returns:
        one weight per class, for `CrossEntropyLoss(class_weights=...)`.

    Raises:
        ValueError: labels that are no class indices, or a class without a row.

    Example:
        >>> balanced_class_weights([0, 0, 0, 1], num_classes=2)
        [0.6666666666666666, 2.0]
    """
    labels = labels if isinstance(labels, torch.Tensor) else torch.tensor(list(labels))
    if labels.dim() == 2 and labels.is_floating_point():
        raise ValueError(
            "class_weights: balanced is defined for one label per row, and these have several: give a list of one "
            "factor per class"
        )
    if labels.dim() != 1 or labels.is_floating_point():
        raise ValueError(
            f"balanced class weights need (N,) integer labels, got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    labels = labels[labels != IGNORE_INDEX]
    if ((labels < 0) | (labels >= num_classes)).any():
        raise ValueError(
            f"balanced class weights need labels from 0 to {num_classes - 1}, got {labels.unique().tolist()}"
        )
    counts = torch.bincount(labels.long(), minlength=num_classes).tolist()
    if empty := [number for number, count in enumerate(counts) if not count]:
        raise ValueError(
            f"class_weights: balanced needs a training row of each class; there is none of {', '.join(map(str, empty))}"
        )
    return [sum(counts) / (num_classes * count) for count in counts]


class CrossEntropyLoss(DistillationLoss):
    """The task's own loss against the labels; rows without a label count nowhere.

    Single-label: `-Σ_c y_c log softmax(z)_c` with `y` smoothed to `(1 - ε) y + ε / C`. Multi-label: binary
    cross-entropy of `sigmoid(z)`, a mean over classes. Regression: squared error, a mean over outputs.

    Args:
        label_smoothing: ε, in [0, 1). Single-label only.
        class_weights: one factor per class, multiplied into each row's loss (single-label) or into each
            class's (multi-label). The mean is then over rows, not over weights, so that micro-batches add up.
            "balanced" stands for `balanced_class_weights` of the training labels, which whoever has the data must put
            in its place.

    Shapes:
        logits `(B, C)`; labels `(B,)` with -100 for "no label"; multi-label and regression `(B, C)`, or `(B,)` of one
        output; a row with -100 in it has no label. Gives the mean over labeled rows, 0 where there is none.

    Raises:
        ValueError: a setting out of range, labels that do not fit the task, label smoothing in another task, or
            "balanced" where nothing was put in its place.

    Example:
        >>> loss = CrossEntropyLoss(label_smoothing=0.1)
    """

    unit = "labeled_rows"
    needs_teacher = False

    def __init__(self, label_smoothing: float = 0.0, class_weights: list[float] | str | None = None) -> None:
        super().__init__()
        is_number = isinstance(label_smoothing, int | float) and not isinstance(label_smoothing, bool)
        if not is_number or not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing!r}")
        self.label_smoothing = float(label_smoothing)
        self._unresolved = class_weights == BALANCED
        if self._unresolved:
            class_weights = None
        if class_weights is not None and not isinstance(class_weights, list | tuple):
            raise ValueError(
                f'class_weights must be a list of one number per class, or "{BALANCED}", got {class_weights!r}'
            )
        for weight in class_weights or []:
            check_positive("class_weights", weight)
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", weights, persistent=False)
        self.problem_type: ProblemType = "single_label_classification"

    def bind(self, student: ModelShape, teacher: ModelShape | None) -> None:
        super().bind(student, teacher)
        self.problem_type = student.problem_type
        if self.problem_type != "single_label_classification" and self.label_smoothing:
            raise ValueError(f"label_smoothing is for single-label tasks; this one is {self.problem_type}")
        if self._unresolved:
            raise ValueError(_UNRESOLVED)
        if self.class_weights is not None:
            if self.problem_type == "regression":
                raise ValueError("class_weights are for classification; this task is regression")
            if len(self.class_weights) != student.num_labels:
                raise ValueError(f"class_weights has {len(self.class_weights)} values for {student.num_labels} classes")

    def forward(self, student, teacher, labels, attention_mask):
        if self._unresolved:
            raise ValueError(_UNRESOLVED)
        logits = upcast(student.logits)  # (B, C)
        if labels is None:
            raise ValueError("CrossEntropyLoss needs labels; mark rows without one by -100")
        if self.problem_type == "single_label_classification":
            if labels.is_floating_point() or labels.dim() != 1:
                raise ValueError(
                    f"single-label classification needs (B,) integer labels, got {labels.dtype} of shape "
                    f"{tuple(labels.shape)}; set the student's config.problem_type for another task"
                )
            labels = labels.long()
            labeled = labels != IGNORE_INDEX
            rows = F.cross_entropy(
                logits, labels, reduction="none", ignore_index=IGNORE_INDEX, label_smoothing=self.label_smoothing
            )
            if self.class_weights is not None:
                rows = rows * self.class_weights[labels.clamp(min=0)]
        else:
            if labels.shape != logits.shape and (*labels.shape, 1) != tuple(logits.shape):
                # A view would take labels of (C, B) for those of other rows.
                raise ValueError(
                    f"{self.problem_type} needs labels of shape {tuple(logits.shape)} as the logits, got "
                    f"{tuple(labels.shape)}"
                )
            targets = labels.to(logits.dtype).reshape(logits.shape)
            labeled = (targets != IGNORE_INDEX).all(dim=1)
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
        settings = [f"smoothing={self.label_smoothing:g}"] if self.label_smoothing else []
        if self._unresolved:
            settings.append(f"weights={BALANCED}")
        if self.class_weights is not None:
            settings.append("weights=" + "/".join(f"{weight:g}" for weight in self.class_weights.tolist()))
        return ", ".join(settings)
