"""Whether a teacher's cached answers on labeled rows say more than the labels do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distill_nlp.arrow_columns import labeled_rows
from distill_nlp.pool import cached_logits

LITTLE = 0.1
"""Part of the largest entropy below which a distribution says little but its largest class.

`vanilla_kd` gained nothing on SST-2, whose teacher is at 0.10 on the students' rows, and clearly on IMDB and on
GoEmotions with one label, at 0.41 and 0.40 (benchmarks/RESULTS.md).
"""


@dataclass(frozen=True)
class SoftTargets:
    """A teacher's answers on the rows that students have labels for.

    Args:
        rows: that are labeled.
        right: part of them whose class, or whole set of labels, the teacher gives.
        entropy: mean of its distributions', in nats; of several labels per text, of each class's.
        largest: that an entropy can be, in nats.

    Example:
        >>> SoftTargets(10000, right=0.979, entropy=0.066, largest=0.693).summary()
        'right on 97.9% of the 10,000 labeled rows, entropy 0.066 of at most 0.693 nats'
    """

    rows: int
    right: float
    entropy: float
    largest: float

    @property
    def say_little(self) -> bool:
        """Whether the labels say about as much."""
        return self.entropy < LITTLE * self.largest

    def summary(self) -> str:
        """One line for the terminal."""
        return (
            f"right on {self.right:.1%} of the {self.rows:,} labeled rows, entropy {self.entropy:.3f} of at most "
            f"{self.largest:.3f} nats"
        )


def soft_targets(dataset: Any, label_order: Sequence[int] | None = None) -> SoftTargets | None:
    """Looks at the answers on labeled rows.

    Args:
        dataset: a `datasets.Dataset` with `labels`, -100 where there is none, and `teacher_logits`.
        label_order: for each student label the index of the teacher's logit, as `labels.label_order` gives it; None
            where the order is the same.

    Returns:
        None where no row has a label.

    Raises:
        ValueError: there are no logits, or some that are not finite.
    """
    known = np.flatnonzero(labeled_rows(dataset))
    if not len(known):
        return None
    logits = cached_logits(dataset)[known]
    logits = logits if label_order is None else logits[:, list(label_order)]
    labels = np.asarray(dataset.select_columns(["labels"]).with_format("numpy")[:]["labels"])[known]
    several = labels.ndim == 2
    right = ((logits > 0) == labels.astype(bool)).all(axis=1) if several else logits.argmax(axis=1) == labels
    largest = math.log(2 if several else logits.shape[1])
    return SoftTargets(len(known), float(right.mean()), float(entropies(logits, several).mean()), largest)


def entropies(logits: np.ndarray, several: bool) -> np.ndarray:
    """In nats, in float64.

    Args:
        logits: (N, C).
        several: labels per text: each class is a distribution of its own.

    Returns:
        (N,) of the softmax of each row, or (N, C) of each sigmoid.
    """
    logits = np.asarray(logits, dtype=np.float64)
    if several:
        # Of the logit's size alone, as the entropy of p is that of 1 - p.
        size = np.abs(logits)
        small = np.exp(-size)
        return np.log1p(small) + size * small / (1 + small)
    shifted = logits - logits.max(axis=1, keepdims=True)
    weights = np.exp(shifted)
    total = weights.sum(axis=1)
    return np.log(total) - (weights * shifted).sum(axis=1) / total
