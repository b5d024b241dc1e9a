"""Paired statistics over the same test rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from scipy.stats import binomtest, ttest_1samp

from distill_nlp.metrics import f1

_MOST_COUNTS = 2**24
"""Of rows in resamples, that are in memory at once."""

_ROWS_A_PATTERN = 10
"""From this many on, how often each pattern is drawn costs less than to draw each row."""


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


def paired_over_seeds(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """Two-sided p-value of a paired t-test over rows, of the difference averaged over seeds.

    A row counts once, however many seeds saw it.

    Args:
        pairs: of each seed, which rows the one model has right and which the other: two `(N,)` booleans.

    Returns:
        1 where the two never differ.

    Example:
        >>> right, wrong = np.array([True, True, False]), np.array([True, False, False])
        >>> round(paired_over_seeds([(right, wrong), (right, wrong)]), 3)
        0.423
    """
    difference = np.mean([one.astype(float) - other for one, other in pairs], axis=0)
    return float(ttest_1samp(difference, 0.0).pvalue) if difference.any() else 1.0


def bootstrap_means(columns: np.ndarray, samples: int, seed: int = 0) -> np.ndarray:
    """Means of each column over rows drawn with replacement, the same rows for all columns.

    Args:
        columns: `(N, K)`.
        samples: number of resamples.
        seed: of the draw.

    Returns:
        `(samples, K)`.
    """
    means = np.empty((samples, columns.shape[1]))
    first, sizes = _patterns(columns)
    for part, counts in _draws(sizes, samples, seed):
        means[part] = counts @ columns[first] / len(columns)
    return means


def bootstrap_f1(found: Sequence[np.ndarray], wanted: np.ndarray, samples: int, seed: int = 0) -> np.ndarray:
    """Macro-F1 of each model over rows drawn with replacement, the same rows for all models.

    Args:
        found: of each of K models, (N, C) whether it names a class.
        wanted: (N, C) whether the class applies.
        samples: number of resamples.
        seed: of the draw.

    Returns:
        `(samples, K)`. A class that a resample has not, and the model does not name in it, counts 0.

    Example:
        >>> wanted = np.array([[True, False], [False, True]])
        >>> float(bootstrap_f1([wanted, ~wanted], wanted, samples=100)[:, 1].max())
        0.0
    """
    values = np.empty((samples, len(found)))
    first, sizes = _patterns(np.packbits(np.concatenate([wanted, *found], axis=1), axis=1))
    found, wanted = [named[first] for named in found], wanted[first]
    for part, drawn in _draws(sizes, samples, seed):
        # Whole numbers, exact in float32 up to 2^24 rows.
        counts = drawn.astype(np.float32)
        there = counts @ wanted
        for k, named in enumerate(found):
            values[part, k] = f1(counts @ (named & wanted), there + counts @ named).mean(axis=1)
    return values


def _patterns(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(P,) the first row of each kind, and (P,) how many there are of it; each row by itself where few are alike.

    Which of some equal rows is drawn changes no figure. Of K models' right and wrong answers there are at most 2^K
    kinds, however many rows there are.
    """
    _, first, sizes = np.unique(rows, axis=0, return_index=True, return_counts=True)
    if len(first) * _ROWS_A_PATTERN <= len(rows):
        return first, sizes
    return np.arange(len(rows)), np.ones(len(rows), dtype=int)


def _draws(sizes: np.ndarray, samples: int, seed: int) -> Iterator[tuple[slice, np.ndarray]]:
    """How often rows of each kind are drawn: (chunk, P) counts, chunk by chunk, and the place of the chunk.

    As many rows are drawn as there are, with replacement.
    """
    rng, rows, kinds = np.random.default_rng(seed), int(sizes.sum()), len(sizes)
    # In chunks: the counts of all resamples at once would be samples x kinds.
    step = max(min(100, _MOST_COUNTS // kinds), 1)
    for start in range(0, samples, step):
        part = slice(start, min(start + step, samples))
        if kinds < rows:
            yield part, rng.multinomial(rows, sizes / rows, size=part.stop - start)
        else:
            drawn = [np.bincount(rng.integers(rows, size=rows), minlength=rows) for _ in range(start, part.stop)]
            yield part, np.stack(drawn)


def seed_shifts(seeds: int, samples: int, seed: int = 0) -> np.ndarray:
    """(samples, seeds) factors `f` by which `Σ f (x - mean(x))` moves a mean over seeds to where that of others may be.

    The sum is Student's t with `seeds - 1` degrees of freedom, times the standard error of the mean. Two figures that
    are moved by the same factors keep what they have in common in a seed. Seeds drawn with replacement, as rows are,
    would never leave the range of those at hand: of three, one draw in nine has the same throughout. Of one seed the
    factors are 0: it says nothing of others.

    Source: Student 1908, "The probable error of a mean", Biometrika 6(1).

    Args:
        seeds: number of trainings.
        samples: number of resamples.
        seed: of the draw.
    """
    if seeds < 2:
        return np.zeros((samples, seeds))
    rng = np.random.default_rng(seed)
    return rng.standard_normal((samples, seeds)) / np.sqrt(seeds * rng.chisquare(seeds - 1, size=(samples, 1)))


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
