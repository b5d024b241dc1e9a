"""Labels compared by name, and the teacher's answers compared with chance."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from distill_nlp.doctor.labels import check_labels
from distill_nlp.doctor.teacher_accuracy import better_order, check_softness, check_teacher_accuracy

NAMES = ["negative", "neutral", "positive"]


def config(*names):
    return SimpleNamespace(id2label=dict(enumerate(names)), num_labels=len(names))


def answers(predicted, classes, sureness=2.0):
    """Logits of these answers."""
    logits = np.random.default_rng(0).normal(scale=0.1, size=(len(predicted), classes))
    logits[np.arange(len(predicted)), predicted] += sureness
    return logits


def labels_of(count, classes, seed=1):
    return np.random.default_rng(seed).permutation(np.arange(count) % classes)


def wrong_on(labels, share, classes, seed=2):
    """The labels, but another class on a share of the rows."""
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(labels), size=round(share * len(labels)), replace=False)
    found = labels.copy()
    found[chosen] = (found[chosen] + rng.integers(1, classes, len(chosen))) % classes
    return found


# ---- labels ----


def test_equal_names_are_ok_also_in_other_case():
    found = check_labels(NAMES, config("Negative", "NEUTRAL", "positive"))
    assert found.level == "ok"
    assert "negative, neutral, positive; the same in the teacher" in found.what


def test_a_permuted_teacher_is_ok_and_said():
    found = check_labels(NAMES, config("positive", "negative", "neutral"))
    assert found.level == "ok"
    assert "in another order, positive, negative, neutral, and is matched by name" in found.what


def test_other_names_are_a_stop_with_both_lists():
    found = check_labels(NAMES, config("spam", "ham", "eggs"), teacher="teacher-2")
    assert found.level == "stop"
    assert found.what.startswith("teacher-2")
    assert "['negative', 'neutral', 'positive']" in found.what
    assert "['spam', 'ham', 'eggs']" in found.what
    assert "--teacher.finetune always" in found.fix
    assert "--data.label_names" in found.fix


def test_another_number_of_labels_is_a_stop():
    assert check_labels(NAMES, config("LABEL_0", "LABEL_1")).level == "stop"


def test_a_superset_is_a_stop_unless_it_is_restricted():
    wider = config("positive", "mixed", "negative", "neutral")
    assert check_labels(NAMES, wider).level == "stop"
    found = check_labels(NAMES, wider, restrict=True)
    assert found.level == "ok"
    assert "more labels" in found.what


@pytest.mark.parametrize(
    ("data", "teacher", "who", "fix"),
    [
        (["LABEL_0", "LABEL_1"], ("negative", "positive"), "the data name", "--data.label_names"),
        (["negative", "positive"], ("LABEL_0", "LABEL_1"), "the teacher name", "config.json"),
        (["LABEL_0", "LABEL_1"], ("LABEL_0", "LABEL_1"), "the data and the teacher name", "--data.label_names"),
    ],
)
def test_anonymous_names_are_a_warning(data, teacher, who, fix):
    found = check_labels(data, config(*teacher))
    assert found.level == "warning"
    assert who in found.what
    assert fix in found.fix


def test_a_teacher_to_be_trained_gets_the_names():
    found = check_labels(NAMES, None)
    assert found.level == "ok"
    assert "new head" in found.what


@pytest.mark.parametrize(
    "student", [("negative", "positive", "neutral"), ("negative", "positive"), ("a", "b", "c"), ("LABEL_0",)]
)
def test_a_student_of_other_labels_is_a_stop(student):
    found = check_labels(NAMES, None, config(*student))
    assert found.level == "stop"
    assert str(list(student)) in found.what
    assert "student.overrides" in found.fix


@pytest.mark.parametrize("student", [("Negative", "neutral", "positive"), ("LABEL_0", "LABEL_1", "LABEL_2")])
def test_a_student_of_the_same_labels_is_ok(student):
    assert check_labels(NAMES, None, config(*student)).level == "ok"


def test_many_labels_are_shown_in_short():
    found = check_labels([f"class {i}" for i in range(30)], None)
    assert "class 29 (30 labels)" in found.what
    assert "class 17" not in found.what


# ---- accuracy ----


def test_a_good_teacher_is_ok_with_its_interval():
    labels = labels_of(200, 3)
    found = check_teacher_accuracy(answers(wrong_on(labels, 0.1, 3), 3), labels, NAMES)
    assert found.level == "ok"
    # Clopper and Pearson's interval of 180 of 200.
    assert "right on 0.900 of 200 validation rows (95% interval 0.850 to 0.938)" in found.what
    assert "largest class alone gives 0.335" in found.what


@pytest.mark.parametrize("classes", [2, 3, 8])
def test_a_teacher_of_random_answers_is_a_stop(classes):
    labels = labels_of(200, classes)
    for seed in range(5):
        guesses = np.random.default_rng(seed).integers(0, classes, 200)
        found = check_teacher_accuracy(answers(guesses, classes), labels, [str(i) for i in range(classes)])
        assert found.level == "stop", seed
        assert "near chance" in found.what
        assert "--teacher.finetune always" in found.fix


def test_a_teacher_that_names_one_class_is_a_stop():
    labels = labels_of(200, 2)
    assert "near chance" in check_teacher_accuracy(answers(np.zeros(200, int), 2), labels, ["a", "b"]).what


def test_labels_in_the_wrong_order_are_named():
    labels = labels_of(200, 3)
    order = np.array([2, 0, 1])
    found = check_teacher_accuracy(answers(order[wrong_on(labels, 0.1, 3)], 3), labels, NAMES)
    assert found.level == "stop"
    # Answer 2 means class 0, answer 0 class 1, answer 1 class 2.
    assert "fit if its labels are [neutral, positive, negative]: 0.900" in found.what


def test_the_labels_named_are_in_the_teachers_own_order():
    labels = labels_of(200, 2)
    swapped = answers(1 - labels, 2)
    # Column 0 is the teacher's logit 1, which means class 1.
    found = check_teacher_accuracy(swapped, labels, ["bad", "good"], order=[1, 0])
    assert "labels are [bad, good]" in found.what


def test_two_swapped_classes_of_five_are_found_far_above_chance():
    labels = labels_of(400, 5)
    swap = np.array([0, 1, 2, 4, 3])
    logits = answers(swap[wrong_on(labels, 0.2, 5)], 5)
    found = check_teacher_accuracy(logits, labels, list("abcde"))
    assert found.level == "stop"
    assert "[a, b, c, e, d]" in found.what


def test_other_orders_are_not_tried_beyond_six_classes():
    labels = labels_of(700, 7)
    logits = answers((labels + 1) % 7, 7)
    assert better_order(logits, labels) is None
    assert "near chance" in check_teacher_accuracy(logits, labels, list("abcdefg")).what


def test_another_order_is_not_named_on_few_rows():
    labels = np.array([0, 1, 0, 1])
    assert better_order(answers(1 - labels, 2), labels) is None
    assert better_order(answers(labels_of(200, 2), 2), labels_of(200, 2)) is None


def test_the_best_of_many_orders_is_no_proof():
    labels = labels_of(200, 6)
    guesses = [np.random.default_rng(seed).integers(0, 6, 200) for seed in range(100)]
    assert sum(better_order(answers(guess, 6), labels) is not None for guess in guesses) <= 2


def test_an_order_that_is_not_above_the_largest_class_is_not_named():
    labels = (np.arange(200) < 20).astype(int)
    assert better_order(answers(np.ones(200, int), 2), labels) is None


def test_a_good_teacher_of_a_rare_class_is_a_warning_and_no_stop():
    labels = np.zeros(200, int)
    labels[:10] = 1
    predicted = labels.copy()
    predicted[[0, 1, 2, 3, 50, 60, 70]] ^= 1
    found = check_teacher_accuracy(answers(predicted, 2), labels, ["no", "yes"])
    assert found.level == "warning"
    assert "f1_macro" in found.fix


@pytest.mark.parametrize(("others", "found_of_them", "false_alarms"), [(0, 0, 1), (1, 0, 0), (2, 1, 0), (2, 0, 1)])
def test_next_to_no_row_of_another_class_stops_no_teacher(others, found_of_them, false_alarms):
    """Of 200 rows with one positive in a hundred: no test tells a good teacher from one that names one class."""
    labels = np.zeros(200, int)
    labels[:others] = 1
    predicted = np.zeros(200, int)
    predicted[:found_of_them] = 1
    predicted[100 : 100 + false_alarms] = 1
    found = check_teacher_accuracy(answers(predicted, 2), labels, ["no", "yes"])
    assert found.level == "warning"
    assert f"so few rows of other classes ({others}) cannot tell" in found.what


def test_a_teacher_far_below_the_largest_class_is_a_stop_also_where_there_is_hardly_another():
    labels = np.zeros(200, int)
    labels[0] = 1
    predicted = np.arange(200) % 2
    assert check_teacher_accuracy(answers(predicted, 2), labels, ["no", "yes"]).level == "stop"


def test_a_low_teacher_above_chance_is_a_warning():
    labels = labels_of(2000, 2)
    found = check_teacher_accuracy(answers(wrong_on(labels, 0.42, 2), 2), labels, ["a", "b"])
    assert found.level == "warning"
    assert found.what.endswith("low")


def test_what_may_be_fair_on_few_rows_is_no_warning():
    labels = labels_of(200, 2)
    assert check_teacher_accuracy(answers(wrong_on(labels, 0.35, 2), 2), labels, ["a", "b"]).level == "ok"


@pytest.mark.parametrize("shape", [(0, 2), (3, 2), (4, 3)])
def test_logits_of_another_shape_are_refused(shape):
    labels = np.zeros(min(shape[0], 4) if shape[0] != 3 else 4, int)
    with pytest.raises(ValueError, match="logits must be of shape"):
        check_teacher_accuracy(np.zeros(shape), labels, ["a", "b"])


# ---- softness ----


def test_one_hot_answers_ask_for_a_temperature():
    (found,) = check_softness(answers(labels_of(50, 2), 2, sureness=12.0), {"kl": 1.0, "dkd": 2.0})
    assert found.level == "warning"
    assert found.fix == "--losses.kl.temperature 4 --losses.dkd.temperature 4"


def test_one_hot_answers_at_a_high_temperature_are_ok():
    (found,) = check_softness(answers(labels_of(50, 2), 2, sureness=12.0), {"kl": 4.0})
    assert found.level == "ok"


def test_soft_answers_are_ok_with_their_mean_probability():
    logits = np.array([[0.0, np.log(3.0)], [np.log(4.0), 0.0]])
    (found,) = check_softness(logits, {"kl": 2.0})
    assert found.level == "ok"
    assert "0.7750" in found.what


def test_without_a_temperature_nothing_is_said():
    assert check_softness(np.zeros((2, 2)), {}) == []


@pytest.mark.parametrize(("count", "level"), [(12, "warning"), (48, "warning"), (50, "stop"), (200, "stop")])
def test_few_rows_at_chance_are_a_warning_and_no_stop(count, level):
    labels = np.arange(count) % 2
    answers = (np.arange(count) // 2) % 2
    logits = np.stack([1.0 - answers, answers], axis=1)
    finding = check_teacher_accuracy(logits, labels, ["bad", "good"])
    assert finding.level == level
    assert ("cannot tell it from chance" in finding.what) == (level == "warning")
