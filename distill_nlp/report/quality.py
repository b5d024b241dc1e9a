"""How good a model's probabilities and classes are: MCC, log-loss, calibration, KL, classes one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import expit, log_expit, log_softmax, softmax
from sklearn.metrics import confusion_matrix, matthews_corrcoef

from distill_nlp.metrics import decisions

CALIBRATION_BINS = 15
"""Of equal width, as in Guo et al. 2017 (arXiv:1706.04599)."""


def probabilities(logits: np.ndarray, several: bool) -> np.ndarray:
    """(N, C) logits -> (N, C) in float64: a softmax, or with several labels per row a sigmoid for each class."""
    logits = np.asarray(logits, dtype=np.float64)
    return expit(logits) if several else softmax(logits, axis=1)


def quality(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Scores beside accuracy and F1.

    Args:
        logits: (N, C).
        labels: (N,) classes, or (N, C) of 0 and 1.

    Returns:
        `mcc`, Matthews' correlation, for several labels its mean over the classes, 0 for one that is never or always
        there or named; `log_loss` in nats, a mean over rows, for several labels over rows and classes; `ece`, the
        expected calibration error of `reliability`.

    Example:
        >>> quality(np.array([[2.0, 0.0], [0.0, 2.0]]), np.array([0, 1]))["mcc"]
        1.0
    """
    return {"mcc": _mcc(logits, labels), "log_loss": _log_loss(logits, labels), "ece": ece(reliability(logits, labels))}


def _mcc(logits: np.ndarray, labels: np.ndarray) -> float:
    if labels.ndim == 1:
        return float(matthews_corrcoef(labels, logits.argmax(axis=1)))
    found, wanted = decisions(logits), labels.astype(bool)
    both, neither = (found & wanted).sum(axis=0), (~found & ~wanted).sum(axis=0)
    false, missed = (found & ~wanted).sum(axis=0), (~found & wanted).sum(axis=0)
    # In float64: the product of four counts outgrows whole numbers.
    sides = np.prod([both + false, both + missed, neither + false, neither + missed], axis=0, dtype=np.float64)
    return float(((both * neither - false * missed) / np.sqrt(np.maximum(sides, 1))).mean())


def _log_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    # From the logits: a probability that has become 0 would give infinity, or the bound it is clipped to.
    logits = np.asarray(logits, dtype=np.float64)
    if labels.ndim == 1:
        return float(-log_softmax(logits, axis=1)[np.arange(len(labels)), labels].mean())
    return float(-np.where(labels > 0, log_expit(logits), log_expit(-logits)).mean())


def kl_to_teacher(logits: np.ndarray, teacher: np.ndarray, several: bool) -> float:
    """KL(teacher ‖ model) in nats at temperature 1, both (N, C); a mean over rows, with several labels of the sums
    over classes.
    """
    own, theirs = np.asarray(logits, dtype=np.float64), np.asarray(teacher, dtype=np.float64)
    p = probabilities(theirs, several)
    if several:
        there = p * (log_expit(theirs) - log_expit(own))
        absent = expit(-theirs) * (log_expit(-theirs) - log_expit(-own))
        return float((there + absent).sum(axis=1).mean())
    return float((p * (log_softmax(theirs, axis=1) - log_softmax(own, axis=1))).sum(axis=1).mean())


def reliability(logits: np.ndarray, labels: np.ndarray) -> list[dict[str, Any]]:
    """Confidence against what comes true, in bins of equal width of the confidence.

    For one label per row the confidence is the probability of the class named, and it comes true where that class is
    right. For several it is the probability of each row and class, and it comes true where the class applies.

    Returns:
        For each of the bins `low` and `high`, the `count` in it, its mean `confidence` and the share `right`; both None
        in an empty bin. A confidence on a bound belongs to the bin below it.
    """
    p = probabilities(logits, labels.ndim == 2)
    if labels.ndim == 2:
        confidence, right = p.ravel(), labels.astype(bool).ravel()
    else:
        confidence, right = p.max(axis=1), p.argmax(axis=1) == labels
    places = np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(int) - 1, 0, CALIBRATION_BINS - 1)
    bins = []
    for i in range(CALIBRATION_BINS):
        inside = places == i
        some = bool(inside.any())
        bins.append(
            {
                "low": i / CALIBRATION_BINS,
                "high": (i + 1) / CALIBRATION_BINS,
                "count": int(inside.sum()),
                "confidence": float(confidence[inside].mean()) if some else None,
                "right": float(right[inside].mean()) if some else None,
            }
        )
    return bins


def ece(bins: list[dict[str, Any]]) -> float:
    """Expected calibration error: |confidence - right| of the bins of `reliability`, weighted by their counts."""
    total = sum(b["count"] for b in bins)
    return sum(b["count"] * abs(b["confidence"] - b["right"]) for b in bins if b["count"]) / total


def per_class(logits: np.ndarray, labels: np.ndarray) -> list[dict[str, Any]]:
    """For each class: `support` (rows that have it), `predicted`, `hits` (rows right in both), and from these
    `precision`, `recall` and `f1`, 0 where they are not defined.
    """
    if labels.ndim == 2:
        found, wanted = decisions(logits), labels.astype(bool)
    else:
        classes = np.arange(logits.shape[1])
        found, wanted = logits.argmax(axis=1)[:, None] == classes, labels[:, None] == classes
    rows = []
    for c in range(logits.shape[1]):
        support, predicted = int(wanted[:, c].sum()), int(found[:, c].sum())
        hits = int((wanted[:, c] & found[:, c]).sum())
        rows.append(
            {
                "support": support,
                "predicted": predicted,
                "hits": hits,
                "precision": hits / max(predicted, 1),
                "recall": hits / max(support, 1),
                "f1": 2 * hits / max(support + predicted, 1),
            }
        )
    return rows


def confusion(logits: np.ndarray, labels: np.ndarray) -> list[list[int]] | None:
    """(C, C) rows by their class (first index) and the class named; None for several labels, which `per_class`
    counts.
    """
    if labels.ndim == 2:
        return None
    return confusion_matrix(labels, logits.argmax(axis=1), labels=range(logits.shape[1])).tolist()


def detail(logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """What is no single number: `per_class`, `confusion` and `reliability`."""
    return {
        "per_class": per_class(logits, labels),
        "confusion": confusion(logits, labels),
        "reliability": reliability(logits, labels),
    }
