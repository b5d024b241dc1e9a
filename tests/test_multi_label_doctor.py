"""What the doctor says of rows with several labels, and of teachers that name them."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import f1_score, roc_auc_score

from distill_nlp.doctor.multi_label import check_class_rates, check_multi_label_teacher, constant_f1, pairs_in_order
from distill_nlp.doctor.rows import check_contradictions
from distill_nlp.doctor.subject import stretched

NAMES = ["food", "money", "sport"]


def some_labels(rows=200, rates=(0.4, 0.2, 0.05), seed=0):
    """Just so many rows of each class."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(np.arange(rows) < round(rate * rows)) for rate in rates], axis=1)


def some_logits(labels, strength, shift=0.0, seed=1):
    """Noise, and the labels that much above it."""
    return np.random.default_rng(seed).normal(size=labels.shape) + strength * (labels - 0.5) + shift


# ---- rows ----


def test_class_rates_are_ok_with_the_rarest_the_largest_and_the_constant_answer():
    labels = some_labels()
    found = check_class_rates({"train": labels.tolist(), "test": labels[:100].tolist()}, NAMES)
    assert found.level == "ok"
    empty = np.mean(~labels.any(axis=1))
    assert f"3 classes, 0.65 labels per row and none on {empty:.1%}" in found.what
    assert "rarest in train sport 5.00%, largest food 40.00%" in found.what
    assert f"the best constant answer gives macro-F1 {constant_f1(labels[:100]):.3f} on test" in found.what


def test_a_class_without_a_row_is_a_warning_with_its_split():
    labels, other = some_labels(), some_labels()
    other[:, 1] = False
    found = check_class_rates({"train": labels, "validation": labels, "test": other}, NAMES)
    assert found.level == "warning"
    assert "no rows of money in test" in found.what


@pytest.mark.parametrize(
    ("rate", "metric", "level"),
    [(0.04, "accuracy", "ok"), (0.03, "accuracy", "warning"), (0.03, "f1_macro", "ok"), (0.03, "loss", "ok")],
)
def test_rare_classes_are_a_warning_where_exact_matches_pick_the_checkpoint(rate, metric, level):
    labels = some_labels(rates=(0.4, 0.2, rate))
    found = check_class_rates({"train": labels, "test": labels}, NAMES, metric)
    assert found.level == level
    if level == "warning":
        assert "; 13 to 1" in found.what
        assert "--training.metric_for_best_model f1_macro" in found.fix


def test_the_constant_answer_is_the_best_of_all_constant_ones():
    labels = some_labels(rates=(0.4, 0.9, 0.0))
    always = [
        f1_score(labels, np.tile(answer, (len(labels), 1)), average="macro", zero_division=0)
        for answer in np.ndindex(2, 2, 2)
    ]
    assert constant_f1(labels) == pytest.approx(max(always))


def test_one_text_with_two_sets_of_labels_is_label_noise():
    columns = [["a b", "A  b", "c", "c"]]
    same, other = (1.0, 0.0), (1.0, 1.0)
    assert check_contradictions(columns, [same, same, other, other]).level == "ok"
    found = check_contradictions(columns, [same, other, same, same])
    assert found.level == "warning"
    assert "2 have one text and different labels" in found.what


def test_a_row_that_is_stretched_keeps_its_labels():
    row = {"input_ids": [2, 5, 3], "teacher_input_ids": [2, 5, 3], "labels": [0.0, 1.0]}
    found = stretched(row, 6)
    assert (len(found["input_ids"]), len(found["teacher_input_ids"])) == (6, 6)
    assert found["labels"] == [0.0, 1.0]


# ---- teachers ----


def test_pairs_in_order_are_counted_as_a_loop_counts_them():
    labels = some_labels(40)
    logits = some_logits(labels, 0.5).round(1)
    right = total = 0.0
    for c in range(3):
        for one in logits[labels[:, c], c]:
            for other in logits[~labels[:, c], c]:
                right += (one > other) + 0.5 * (one == other)
                total += 1
    share, p_value = pairs_in_order(logits, labels)
    assert share == pytest.approx(right / total)
    assert pairs_in_order(logits[:, :1], labels[:, :1])[0] == pytest.approx(roc_auc_score(labels[:, 0], logits[:, 0]))
    assert 0 < p_value < 0.5
    assert pairs_in_order(-logits, labels)[0] == pytest.approx(1 - share)


def test_without_a_pair_nothing_is_told_from_chance():
    labels = np.tile([True, False], (10, 1))
    assert pairs_in_order(np.random.default_rng(0).normal(size=(10, 2)), labels) == (0.5, 1.0)


def test_a_good_teacher_is_ok_with_its_scores():
    labels = some_labels()
    logits = some_logits(labels, 4.0)
    found = check_multi_label_teacher(logits, labels.astype(float), teacher="teacher-2")
    assert found.level == "ok"
    score = f1_score(labels, logits > 0, average="macro")
    assert f"teacher-2 has macro-F1 {score:.3f} on 200 validation rows" in found.what
    assert f"the best constant answer {constant_f1(labels):.3f}" in found.what
    assert f"the higher logit in {pairs_in_order(logits, labels)[0]:.3f} of all pairs" in found.what


@pytest.mark.parametrize("strength", [0.0, -3.0])
def test_a_teacher_of_random_or_contrary_answers_is_a_stop(strength):
    labels = some_labels()
    found = check_multi_label_teacher(some_logits(labels, strength), labels)
    assert found.level == "stop"
    assert "near chance" in found.what
    assert "--teacher.finetune always" in found.fix


def test_random_answers_that_all_say_yes_are_a_stop_too():
    labels = some_labels()
    logits = some_logits(labels, 0.0, shift=9.0)
    assert check_multi_label_teacher(logits, labels).level == "stop"


def test_a_constant_teacher_is_a_stop():
    labels = some_labels()
    assert check_multi_label_teacher(np.ones(labels.shape), labels).level == "stop"


def test_on_few_rows_chance_is_a_warning():
    labels = some_labels(49)
    assert check_multi_label_teacher(some_logits(labels, 0.0), labels).level == "warning"
    assert "so few rows" in check_multi_label_teacher(some_logits(labels, 0.0), labels).what
    labels = some_labels(50)
    assert check_multi_label_teacher(some_logits(labels, 0.0), labels).level == "stop"


@pytest.mark.parametrize("shift", [-9.0, 9.0])
def test_a_teacher_that_ranks_but_names_none_or_all_is_a_warning(shift):
    labels = some_labels()
    found = check_multi_label_teacher(some_logits(labels, 2.0, shift), labels)
    assert found.level == "warning"
    assert "ranks the rows, but names too few classes, or too many" in found.what
    assert "--teacher.training.num_train_epochs" in found.fix


@pytest.mark.parametrize("shape", [(0, 3), (200, 2), (200,)])
def test_logits_of_another_shape_are_refused(shape):
    labels = some_labels() if shape[0] else np.zeros((0, 3))
    with pytest.raises(ValueError, match="logits must be of the shape of the labels with a row at least, got"):
        check_multi_label_teacher(np.zeros(shape), labels)
