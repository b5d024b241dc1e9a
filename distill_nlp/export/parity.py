"""An export's answers beside its original's: how far apart, and whether that is too far."""

from __future__ import annotations

from typing import Any

import numpy as np

from distill_nlp.export.settings import Tolerances
from distill_nlp.metrics import compute_metrics, decisions


def compare(original: np.ndarray, exported: np.ndarray, labels: np.ndarray | None, several: bool) -> dict[str, Any]:
    """The figures of the comparison.

    Args:
        original, exported: (N, C) logits of the same rows.
        labels: (N,) classes, or (N, C) 0 and 1 of several labels; None where there are none.
        several: whether a row has several labels; then one of them that differs makes the row a flip.

    Returns:
        `rows`, `max_difference` and `mean_difference` of logits, `flips` in rows, and with labels `metric` and
        its value of both, `original` and `exported`. A logit that is no number makes both differences inf.

    Raises:
        ValueError: another shape.
    """
    if original.shape != exported.shape:
        raise ValueError(f"the original gives logits of shape {original.shape}, the export {exported.shape}")
    distance = np.abs(original.astype(np.float64) - exported)
    distance = np.where(np.isfinite(distance), distance, np.inf)
    if several:
        flipped = (decisions(original) != decisions(exported)).any(axis=1)
    else:
        flipped = original.argmax(axis=1) != exported.argmax(axis=1)
    found: dict[str, Any] = {
        "rows": len(original),
        "max_difference": float(distance.max()),
        "mean_difference": float(distance.mean()),
        "flips": int(flipped.sum()),
    }
    if labels is not None:
        found |= {"metric": metric_of(several)}
        found |= {name: score(z, labels, several) for name, z in (("original", original), ("exported", exported))}
    return found


def metric_of(several: bool) -> str:
    """What models are scored by."""
    return "f1_macro" if several else "accuracy"


def score(logits: np.ndarray, labels: np.ndarray, several: bool) -> float:
    """Accuracy of single labels, macro-F1 of several."""
    from transformers import EvalPrediction

    return compute_metrics(EvalPrediction(predictions=logits, label_ids=labels))[metric_of(several)]


def problems(found: dict[str, Any], allowed: Tolerances) -> list[str]:
    """What of a comparison lies beyond the tolerances, each as a part of a sentence; empty: nothing."""
    said, rows = [], found["rows"]
    if not np.isfinite(found["max_difference"]):
        said.append("some logits are no numbers")
    elif allowed.difference is not None and found["max_difference"] > allowed.difference:
        said.append(f"logits differ by {found['max_difference']:.2g} (--max_difference {allowed.difference:g})")
    # A hair above the product: 0.02 times 50 must be 1.
    most = max(int(allowed.flips * rows + 1e-9), int(allowed.row))
    if found["flips"] > most:
        said.append(f"{found['flips']} of {rows} rows get another label ({most} may: --max_flips {allowed.flips:g})")
    # One row may move a macro-F1 by far more than its share of the rows: by a whole class where that has no other.
    if "metric" in found and not (allowed.row and found["flips"] <= 1):
        lost = found["original"] - found["exported"]
        if lost > max(allowed.score_loss, allowed.row / rows) + 1e-9:
            name = {"accuracy": "accuracy", "f1_macro": "macro-F1"}[found["metric"]]
            said.append(
                f"{name} falls from {found['original']:.4f} to {found['exported']:.4f} "
                f"(--max_score_loss {allowed.score_loss:g})"
            )
    return said
