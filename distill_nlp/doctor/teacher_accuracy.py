"""Whether the teacher knows the task: its answers on a sample of labeled rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from distill_nlp.doctor.findings import Finding

CHECK = "teacher accuracy"

# Fewer rows do not stop a run: of 50 rows in two classes, 34 right are told from chance, of 12 it takes 11.
FEW_ROWS = 50
# Of that few rows outside the largest class a good teacher may miss all, or there may be none in the sample.
FEW_OTHERS = 10
SIGNIFICANCE = 0.01
"""One-sided level of every test here: about one false alarm in a hundred teachers that are at the bar."""
LOW = 0.3
"""A teacher whose accuracy certainly covers less than this part of the way from the majority class to 1 is low."""
SURE = 0.99
"""Mean of the largest probability above which the answers hold little more than the labels."""
SOFT_TEMPERATURE = 4.0
MAX_PERMUTED = 6
"""Classes up to which other orders of the labels are tried: 6! = 720."""


def check_teacher_accuracy(
    logits: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    order: Sequence[int] | None = None,
    seed: int = 0,
    rows: str = "validation rows",
    teacher: str = "the teacher",
) -> Finding:
    """Compares the teacher's accuracy with that of always naming the largest class.

    Near chance is: not significantly above that (one-sided exact binomial test), and no more right answers than with
    the labels shuffled. The second matters where one class is so large that a good teacher is hardly above it. Where
    next to no row is of another class, neither tells them apart, but for a teacher clearly below the largest class.

    Args:
        logits: (N, C), brought into the order of `names`.
        labels: (N,) class indices.
        names: the C class names.
        order: for each class the index of the teacher's own logit, where it has another order.
        seed: of the shuffled labels.
        rows: what the rows are, for the message.
        teacher: what to call it.

    Returns:
        A stop near chance, or where another order of the labels fits significantly better (up to 6 classes, corrected
        for their number); a warning where the accuracy is low; else ok. Each with the 95% interval (Clopper-Pearson).

    Raises:
        ValueError: no row, or logits of another shape than labels and names ask for.
    """
    from scipy.stats import binomtest

    if len(labels) == 0 or logits.shape != (len(labels), len(names)):
        raise ValueError(
            f"logits must be of shape ({len(labels)}, {len(names)}) with a row at least, got {logits.shape}"
        )
    right = logits.argmax(axis=1) == labels
    count, hits = len(labels), int(right.sum())
    bar = np.bincount(labels, minlength=len(names)).max() / count
    test = binomtest(hits, count, bar, alternative="greater")
    interval = binomtest(hits, count).proportion_ci(method="exact")
    what = (
        f"{teacher} is right on {hits / count:.3f} of {count} {rows} (95% interval {interval.low:.3f} to "
        f"{interval.high:.3f}); the largest class alone gives {bar:.3f}"
    )
    if (better := better_order(logits, labels)) is not None:
        fitted = _in_teacher_order([names[i] for i in better], order)
        share = np.mean(np.asarray(better)[logits.argmax(axis=1)] == labels)
        return Finding(
            "stop",
            CHECK,
            f"{what}; its answers fit if its labels are [{', '.join(fitted)}]: {share:.3f}",
            "the student would learn the classes in the wrong order",
            f"write these names into id2label and label2id of {teacher}'s config.json, or give data.label_names in the "
            "order that the data mean",
        )
    if test.pvalue > SIGNIFICANCE:
        others = count - round(bar * count)
        # Than one that misses all of them, and as many again.
        worse = binomtest(hits, count, max(bar - FEW_OTHERS / count, 0), alternative="less").pvalue <= SIGNIFICANCE
        if count < FEW_ROWS or (others < FEW_OTHERS and not worse):
            few = "rows" if count < FEW_ROWS else f"rows of other classes ({others})"
            return Finding(
                "warning",
                CHECK,
                f"{what}: so few {few} cannot tell it from chance",
                "a teacher that learned nothing would look the same",
                "more validation rows: --data.validation_fraction, or another --data.validation_split",
            )
        if _shuffled_p_value(logits.argmax(axis=1), labels, seed) > SIGNIFICANCE:
            return Finding(
                "stop",
                CHECK,
                f"{what}: near chance",
                "the student would learn noise from it: a head that was never trained, labels that mean something "
                "else, texts of another language or form, or the part that counts cut off",
                "--teacher.finetune always trains a head on these rows; else compare id2label with the data, the "
                "language with --data.text_column, and the cut with --data.max_length and --data.truncation_side",
            )
        return Finding(
            "warning",
            CHECK,
            f"{what}; its answers follow the labels, but are not significantly above that",
            "where one class is so large, accuracy says little about a teacher or a student",
            "--training.metric_for_best_model f1_macro, and read macro-F1 in the report",
        )
    if interval.high < bar + LOW * (1 - bar):
        return Finding(
            "warning",
            CHECK,
            f"{what}: low",
            "a student seldom becomes better than its teacher; the labels alone may teach as much",
            "a better teacher by --teacher.model, --teacher.finetune always, or a larger --data.max_length",
        )
    return Finding("ok", CHECK, what)


def better_order(logits: np.ndarray, labels: np.ndarray) -> list[int] | None:
    """Another order of the classes that fits the answers significantly better: for each logit its class, or None.

    Tested on the rows where just one of the two orders is right (exact sign test), times the number of orders.

    Args:
        logits: (N, C) with 2 <= C <= 6; others give None.
        labels: (N,) class indices.
    """
    from scipy.optimize import linear_sum_assignment
    from scipy.stats import binomtest

    classes = logits.shape[1]
    if not 2 <= classes <= MAX_PERMUTED:
        return None
    answers = logits.argmax(axis=1)
    confusion = np.zeros((classes, classes), dtype=int)
    np.add.at(confusion, (answers, labels), 1)
    best = linear_sum_assignment(confusion, maximize=True)[1]
    now, then = answers == labels, best[answers] == labels
    gained, lost = int((then & ~now).sum()), int((now & ~then).sum())
    if gained <= lost:
        return None
    p_value = binomtest(gained, gained + lost, 0.5, alternative="greater").pvalue
    above = binomtest(
        int(then.sum()), len(labels), np.bincount(labels).max() / len(labels), alternative="greater"
    ).pvalue
    return best.tolist() if max(p_value, above) * math.factorial(classes) <= SIGNIFICANCE else None


def check_softness(
    logits: np.ndarray, temperatures: Mapping[str, float], teacher: str = "the teacher"
) -> list[Finding]:
    """Whether the teacher's probabilities hold more than its answer.

    Args:
        logits: (N, C).
        temperatures: losses with a temperature -> the highest that it takes.
        teacher: what to call it.

    Returns:
        A warning where the mean of the largest probability is above 0.99 and no loss softens it; ok otherwise; nothing
        where no loss has a temperature.
    """
    if not temperatures:
        return []
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    top = float(np.mean(1 / np.exp(shifted).sum(axis=1)))
    what = f"the largest of {teacher}'s probabilities is {top:.4f} on average over {len(logits)} rows"
    given = ", ".join(f"{name} {value:g}" for name, value in temperatures.items())
    if top > SURE and max(temperatures.values()) < SOFT_TEMPERATURE:
        return [
            Finding(
                "warning",
                "teacher softness",
                f"{what}; temperatures: {given}",
                "all but one-hot answers teach hardly more than the labels do",
                " ".join(f"--losses.{name}.temperature {SOFT_TEMPERATURE:g}" for name in temperatures),
            )
        ]
    return [Finding("ok", "teacher softness", f"{what}; temperatures: {given}")]


def _shuffled_p_value(answers: np.ndarray, labels: np.ndarray, seed: int, times: int = 2000) -> float:
    """How often shuffled labels are met at least as often as these."""
    rng = np.random.default_rng(seed)
    hits = (answers == labels).sum()
    reached = sum((answers == rng.permutation(labels)).sum() >= hits for _ in range(times))
    return (int(reached) + 1) / (times + 1)


def _in_teacher_order(names: Sequence[str], order: Sequence[int] | None) -> list[str]:
    """Names per class as names per logit of the teacher's own."""
    if order is None:
        return list(names)
    return [names[i] for i in sorted(range(len(order)), key=lambda i: order[i])]
