"""Metrics as `evaluate.Metric` over scikit-learn: no code is downloaded, online or not."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np
from sklearn.metrics import accuracy_score, f1_score


class ClassificationMetrics(evaluate.Metric):
    """Accuracy and macro-F1 of single-label predictions.

    Macro-F1 is the mean of F1 over `labels` (or over the classes that occur). A class that is neither there nor
    predicted counts 0.

    Example:
        >>> ClassificationMetrics().compute(predictions=[0, 1, 1], references=[0, 1, 0])
        {'accuracy': 0.6666666666666666, 'f1_macro': 0.6666666666666666}
    """

    def __init__(self, **kwargs: Any) -> None:
        # In memory: on disk, the ranks of one machine would share a cache file.
        super().__init__(keep_in_memory=True, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation="",
            inputs_description="predictions and references: lists of class indices",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions: Any, references: Any, labels: list[int] | None = None) -> dict[str, float]:
        return {
            "accuracy": float(accuracy_score(references, predictions)),
            "f1_macro": float(f1_score(references, predictions, labels=labels, average="macro", zero_division=0)),
        }


def compute_metrics(prediction: Any) -> dict[str, float]:
    """For `Trainer(compute_metrics=...)`: logits `(N, C)` and labels `(N,)` of a single-label task."""
    logits = prediction.predictions
    return ClassificationMetrics().compute(
        predictions=np.argmax(logits, axis=-1), references=prediction.label_ids, labels=list(range(logits.shape[-1]))
    )
