"""The test rows as a person sees them: texts, lengths, what was cut; and scores by these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distill_nlp.metrics import multi_label_metrics
from distill_nlp.report.scores import answers, right_rows

BUCKETS = 4
"""Of lengths, with about as many rows in each."""


@dataclass
class TestRows:
    """The test rows, in order.

    Args:
        texts: as they stand in the data; of a pair, both with " ⇥ " between. Of rows that are no texts, their names.
        lengths: tokens of the whole text in the student's vocabulary; None of rows that are no texts.
        truncated: whether the student does not read all of the text; None likewise.
    """

    # pytest would take the name for a class of tests.
    __test__ = False

    texts: list[str]
    lengths: np.ndarray | None = None
    truncated: np.ndarray | None = None


def read_rows(raw: Any, tokenized: Any, tokenizer: Any) -> TestRows:
    """The rows of a split.

    Args:
        raw: a `datasets.Dataset` with `text`, maybe `text_pair`.
        tokenized: the same rows with the student's `input_ids`, cut.
        tokenizer: the student's. Rows of the longest length may be cut: they are read again, whole.
    """
    columns = [raw[c] for c in ("text", "text_pair") if c in raw.column_names]
    parts = list(zip(*columns, strict=True))
    lengths = np.array([len(ids) for ids in tokenized["input_ids"]], dtype=int)
    truncated = np.zeros(len(parts), dtype=bool)
    full = np.flatnonzero(lengths == lengths.max()) if len(lengths) else []
    for start in range(0, len(full), 1000):
        some = full[start : start + 1000]
        # `verbose`: that a text is longer than the model reads is what is being asked.
        found = tokenizer(*zip(*(parts[i] for i in some), strict=True), truncation=False, verbose=False)["input_ids"]
        whole = np.array([len(ids) for ids in found])
        truncated[some], lengths[some] = whole > lengths[some], whole
    return TestRows([" ⇥ ".join(part) for part in parts], lengths, truncated)


def length_buckets(lengths: Sequence[int] | np.ndarray) -> list[tuple[int, int]]:
    """Lowest and highest length of each bucket, by quartiles of the rows; fewer where many rows are of one length."""
    values = np.asarray(lengths)
    uppers = sorted({int(np.quantile(values, (i + 1) / BUCKETS, method="lower")) for i in range(BUCKETS)})
    lowers = [int(values.min()), *(upper + 1 for upper in uppers[:-1])]
    return list(zip(lowers, uppers, strict=True))


def bucket_of(lengths: np.ndarray, buckets: list[tuple[int, int]]) -> np.ndarray:
    """(N,) index of each row's bucket."""
    return np.searchsorted([high for _, high in buckets], lengths)


def slices(rows: TestRows, logits: dict[str, np.ndarray], labels: np.ndarray, seeds: list[int]) -> list[dict[str, Any]]:
    """Scores by length and by whether the student reads the whole text.

    Args:
        rows: the test rows.
        logits: of each model by name, (N, C).
        labels: (N,), scored by accuracy; or (N, C), by macro-F1 over the classes that occur in the slice.
        seeds: over which baseline and student are averaged.

    Returns:
        For each slice `by` ("length", "truncated"), its `name`, the number of `rows`, and a score of each model; none
        of rows without lengths.
    """
    if rows.lengths is None:
        return []
    buckets = length_buckets(rows.lengths)
    places = bucket_of(rows.lengths, buckets)
    parts = [("length", _span(*bucket), places == i) for i, bucket in enumerate(buckets)]
    if rows.truncated.any() and not rows.truncated.all():
        parts += [("truncated", "read whole", ~rows.truncated), ("truncated", "cut", rows.truncated)]
    found = []
    for by, name, inside in parts:
        scores = {"teacher": _score(logits["teacher"], labels, inside)}
        for kind in ("baseline", "student"):
            scores[kind] = float(np.mean([_score(logits[f"{kind}/{seed}"], labels, inside) for seed in seeds]))
        found.append({"by": by, "name": name, "rows": int(inside.sum()), **scores})
    return found


def _span(low: int, high: int) -> str:
    return f"{low} tokens" if low == high else f"{low} to {high} tokens"


def _score(logits: np.ndarray, labels: np.ndarray, inside: np.ndarray) -> float:
    if labels.ndim == 1:
        return float(right_rows(logits[inside], labels[inside]).mean())
    occur = labels[inside].any(axis=0)
    if not occur.any():
        return 0.0
    return multi_label_metrics(answers(logits[inside], True)[:, occur], labels[inside][:, occur])["f1_macro"]
