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


def decisions(logits: np.ndarray) -> np.ndarray:
    """(N, C) logits of a multi-label model -> (N, C), whether each class applies: its probability is above 0.5."""
    return np.asarray(logits) > 0


def multi_label_metrics(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """Scores of multi-label predictions.

    Args:
        predictions, references: (N, C) of truth values, or of 0 and 1.

    Returns:
        `accuracy`, the share of rows whose set of labels is exactly right; `f1_macro`, the mean of F1 over the C
        classes, 0 for one that is neither there nor predicted; `f1_micro`, over all rows and classes together.

    Example:
        >>> multi_label_metrics([[1, 0], [1, 1]], [[1, 0], [0, 1]])
        {'accuracy': 0.5, 'f1_macro': 0.8333333333333333, 'f1_micro': 0.8}
    """
    found, wanted = np.asarray(predictions).astype(bool), np.asarray(references).astype(bool)
    hits, sizes = (found & wanted).sum(axis=0), found.sum(axis=0) + wanted.sum(axis=0)
    return {
        "accuracy": float((found == wanted).all(axis=1).mean()),
        "f1_macro": float(f1(hits, sizes).mean()),
        "f1_micro": float(f1(hits.sum(), sizes.sum())),
    }


def f1(hits: Any, sizes: Any) -> Any:
    """F1 of counts, `2 · hits / sizes`; 0 where nothing is predicted and nothing is there.

    Args:
        hits: rows of a class that were found (tp).
        sizes: rows predicted plus rows that are there (2 · tp + fp + fn).
    """
    return 2 * np.asarray(hits) / np.maximum(sizes, 1)


def compute_metrics(prediction: Any) -> dict[str, float]:
    """For `Trainer(compute_metrics=...)`: logits `(N, C)`, and labels `(N,)`, or `(N, C)` of a multi-label task."""
    logits, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    if labels.ndim == 2:
        return multi_label_metrics(decisions(logits), labels)
    return ClassificationMetrics().compute(
        predictions=np.argmax(logits, axis=-1), references=labels, labels=list(range(logits.shape[-1]))
    )
