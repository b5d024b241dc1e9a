"""Paired statistics over the same test rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.stats import binomtest


def mcnemar(a_right: np.ndarray, b_right: np.ndarray) -> dict[str, Any]:
    """McNemar's exact two-sided test of two classifiers on the same rows.

    Only rows where exactly one is right speak; under "no difference" each falls to either side like a fair coin.
    Source: McNemar 1947, in the exact binomial form.

    Args:
        a_right, b_right: `(N,)` booleans.

    Returns:
        `a_only`, `b_only` (rows that only one got right) and `p_value`; 1 where they never differ.
    """
    a_only = int(np.sum(a_right & ~b_right))
    b_only = int(np.sum(b_right & ~a_right))
    p_value = float(binomtest(a_only, a_only + b_only).pvalue) if a_only + b_only else 1.0
    return {"a_only": a_only, "b_only": b_only, "p_value": p_value}


def bootstrap_means(columns: np.ndarray, samples: int, seed: int = 0) -> np.ndarray:
    """Means of each column over rows drawn with replacement, the same rows for all columns.

    Args:
        columns: `(N, K)`.
        samples: number of resamples.
        seed: of the draw.

    Returns:
        `(samples, K)`.
    """
    rng = np.random.default_rng(seed)
    rows = len(columns)
    means = np.empty((samples, columns.shape[1]))
    # In chunks: the counts of all resamples at once would be samples x rows.
    for start in range(0, samples, 100):
        size = min(100, samples - start)
        counts = rng.multinomial(rows, np.full(rows, 1 / rows), size=size)
        means[start : start + size] = counts @ columns / rows
    return means


def interval(values: np.ndarray, level: float = 0.95) -> list[float] | None:
    """The percentile interval of resampled values; None where more than its tails are undefined.

    Leaving undefined resamples out would give an interval of the lucky ones.
    """
    defined = np.isfinite(values)
    if defined.mean() < 1 - (1 - level) / 2:
        return None
    values = values[defined]
    tail = 100 * (1 - level) / 2
    return [float(v) for v in np.percentile(values, [tail, 100 - tail])]


def gap_closed(teacher: Any, baseline: Any, student: Any) -> Any:
    """(student - baseline) / (teacher - baseline); not a number where the teacher is not above the baseline."""
    gap = np.asarray(teacher, dtype=float) - baseline
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(gap > 0, (np.asarray(student, dtype=float) - baseline) / gap, np.nan)
