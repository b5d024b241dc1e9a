"""How the models' answers are scored: one class per row by accuracy, several labels per row by macro-F1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from distill_nlp.metrics import ClassificationMetrics, decisions, multi_label_metrics
from distill_nlp.report.statistics import bootstrap_f1, bootstrap_means

Logits = Mapping[str, np.ndarray]
"""Name of a model -> (N, C)."""


def answers(logits: np.ndarray, several: bool) -> np.ndarray:
    """(N, C) logits -> the class of each row (N,), or with several labels whether each applies (N, C)."""
    return decisions(logits) if several else logits.argmax(axis=1)


def scores(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy and macro-F1 against labels (N,); against (N, C) also micro-F1, and accuracy is that of whole rows."""
    if labels.ndim == 2:
        return multi_label_metrics(decisions(logits), labels)
    return ClassificationMetrics().compute(
        predictions=logits.argmax(axis=1), references=labels, labels=list(range(logits.shape[1]))
    )


def agreement(logits: np.ndarray, others: np.ndarray, several: bool) -> float:
    """The share of rows with the same class; with several labels, of rows and classes with the same decision."""
    return float(np.mean(answers(logits, several) == answers(others, several)))


def right_rows(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(N,) whether the class, or the whole set of labels, is right."""
    same = answers(logits, labels.ndim == 2) == labels
    return same.all(axis=1) if labels.ndim == 2 else same


def compared(
    logits: Logits, labels: np.ndarray, groups: Sequence[Sequence[str]], samples: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """The score that models are compared by, and resampled over test rows, the same ones for all models.

    Args:
        logits: of each model.
        labels: (N,) classes: accuracy; or (N, C) of 0 and 1: macro-F1.
        groups: names of models, such as those of all seeds.
        samples: number of resamples.

    Returns:
        The scores of each group, and (samples, models) scores in the order of the groups.
    """
    names = [name for group in groups for name in group]
    if labels.ndim == 2:
        own = {name: multi_label_metrics(decisions(logits[name]), labels)["f1_macro"] for name in names}
        found = [decisions(logits[name]) for name in names]
        of_groups = [np.array([own[name] for name in group]) for group in groups]
        return of_groups, bootstrap_f1(found, labels.astype(bool), samples)
    right = {name: right_rows(logits[name], labels) for name in names}
    columns = np.stack([right[name] for name in names], axis=1).astype(float)
    of_groups = [np.array([right[name].mean() for name in group]) for group in groups]
    return of_groups, bootstrap_means(columns, samples)
