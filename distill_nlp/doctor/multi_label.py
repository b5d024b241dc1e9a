"""Rows and teachers of texts with several labels: how often each class applies, and whether a teacher knows which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from distill_nlp.doctor.findings import Finding
from distill_nlp.doctor.rows import IMBALANCE, absent_classes
from distill_nlp.doctor.teacher_accuracy import CHECK, FEW_ROWS, SIGNIFICANCE
from distill_nlp.metrics import decisions, f1, multi_label_metrics

Labels = Sequence[Sequence[float]]
"""(N, C) of 0 and 1."""


def check_class_rates(splits: Mapping[str, Labels], names: Sequence[str], metric: str = "f1_macro") -> Finding:
    """Which classes are rare or absent.

    Args:
        splits: split -> labels of its rows; "train" is among them.
        names: of the classes, by index.
        metric: that picks the best checkpoint.

    Returns:
        A warning where no row of a split has a class, or where one is more than 10 times rarer in train than the
        largest and exact matches pick the checkpoint; else ok. It says what the best constant answer gives on the last
        split.
    """
    found = {name: np.asarray(labels, dtype=bool) for name, labels in splits.items()}
    train = found["train"]
    rates = train.mean(axis=0)
    rarest, largest = int(rates.argmin()), int(rates.argmax())
    measured, last = list(found.items())[-1]
    what = (
        f"{len(names)} classes, {train.sum(axis=1).mean():.2f} labels per row and none on "
        f"{np.mean(~train.any(axis=1)):.1%}; rarest in train {names[rarest]} {rates[rarest]:.2%}, largest "
        f"{names[largest]} {rates[largest]:.2%}; the best constant answer gives macro-F1 {constant_f1(last):.3f} on "
        f"{measured}"
    )
    if absent := absent_classes({split: labels.sum(axis=0) for split, labels in found.items()}, names, what):
        return absent
    if rates[largest] > IMBALANCE * rates[rarest] and metric == "accuracy":
        return Finding(
            "warning",
            "classes",
            f"{what}; {rates[largest] / rates[rarest]:.0f} to 1",
            "the share of exact matches hardly changes if the rare classes are never named",
            "--training.metric_for_best_model f1_macro",
        )
    return Finding("ok", "classes", what)


def constant_f1(labels: np.ndarray) -> float:
    """Macro-F1 of the best answer that is the same for all rows: always naming a class beats never naming it.

    Args:
        labels: (N, C) of truth values.
    """
    there = labels.sum(axis=0)
    return float(f1(there, there + len(labels)).mean())


def check_multi_label_teacher(
    logits: np.ndarray, labels: np.ndarray, seed: int = 0, rows: str = "validation rows", teacher: str = "the teacher"
) -> Finding:
    """Whether a teacher's logits tell rows that have a class from rows that have not.

    Of all pairs of a row with a class and a row without it, over all classes, the share is taken in which the first has
    the higher logit: 0.5 by chance, and whatever the threshold is. Near chance is: not above what the labels of
    shuffled rows give (one-sided permutation test). Macro-F1 alone would not do: a good teacher of rare classes may
    name none of them at a probability of 0.5, and its probabilities still teach.

    Args:
        logits: (N, C), in the order of the data's classes.
        labels: (N, C) of 0 and 1.
        seed: of the shuffling.
        rows: what the rows are.
        teacher: what to call it.

    Returns:
        A stop near chance (a warning on fewer than 50 rows); a warning where macro-F1 is not above that of the best
        constant answer; else ok.

    Raises:
        ValueError: no row, or logits of another shape than the labels.
    """
    wanted = np.asarray(labels, dtype=bool)
    if wanted.ndim != 2 or not len(wanted) or logits.shape != wanted.shape:
        raise ValueError(f"logits must be of the shape of the labels with a row at least, got {logits.shape}")
    share, p_value = pairs_in_order(logits, wanted, seed)
    score, bar = multi_label_metrics(decisions(logits), wanted)["f1_macro"], constant_f1(wanted)
    what = (
        f"{teacher} has macro-F1 {score:.3f} on {len(wanted)} {rows}, the best constant answer {bar:.3f}; of a row "
        f"with a class and one without it, it gives the first the higher logit in {share:.3f} of all pairs"
    )
    if p_value > SIGNIFICANCE:
        if len(wanted) < FEW_ROWS:
            return Finding(
                "warning",
                CHECK,
                f"{what}: so few rows cannot tell it from chance",
                "a teacher that learned nothing would look the same",
                "more validation rows: --data.validation_fraction, or another --data.validation_split",
            )
        return Finding(
            "stop",
            CHECK,
            f"{what}: near chance",
            "the student would learn noise from it: a head that was never trained, classes in another order, texts of "
            "another language or form, or the part that counts cut off",
            "--teacher.finetune always trains a head on these rows; else compare id2label with the data, the language "
            "with --data.text_column, and the cut with --data.max_length and --data.truncation_side",
        )
    if score <= bar:
        return Finding(
            "warning",
            CHECK,
            f"{what}: it ranks the rows, but names too few classes, or too many, at a probability of 0.5",
            "a student seldom becomes better than its teacher",
            "a longer training by --teacher.training.num_train_epochs, or a better teacher by --teacher.model",
        )
    return Finding("ok", CHECK, what)


def pairs_in_order(logits: np.ndarray, labels: np.ndarray, seed: int = 0, times: int = 2000) -> tuple[float, float]:
    """Pairs of a row with a class and a row without it whose logits are in this order, ties half.

    Args:
        logits: (N, C).
        labels: (N, C) of truth values.
        seed: of the shuffling.
        times: labels of whole rows are shuffled.

    Returns:
        The share over all classes (0.5 where there is no pair), and how often shuffled rows reach it.
    """
    from scipy.stats import rankdata

    ranks, there = rankdata(logits, axis=0), labels.sum(axis=0)
    pairs = int((there * (len(labels) - there)).sum())
    if not pairs:
        return 0.5, 1.0
    # The ranks of a class's rows sum up to its pairs in order, and n (n + 1) / 2 for those among themselves.
    total = ranks[labels].sum()
    share = (total - (there * (there + 1) / 2).sum()) / pairs
    rng = np.random.default_rng(seed)
    reached = sum(ranks[rng.permutation(labels)].sum() >= total for _ in range(times))
    return float(share), (int(reached) + 1) / (times + 1)
