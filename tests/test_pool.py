"""Gate and pseudo-labels by the teacher's cached answers, against loops over rows."""

import math

import numpy as np
import pyarrow
import pytest
from datasets import Dataset, Features, List, Value
from helpers import make_dataset, make_teacher, make_tokenizer, softmax_row

from distill_nlp import cache_teacher_logits
from distill_nlp.labels import label_order
from distill_nlp.pool import PoolCounts, add_pseudo_labels, confidence, drop_unconfident

ROWS = 40
UNLABELED = (*range(0, ROWS, 3), 10, 11)


def some_logits(rows: int = ROWS, classes: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2, (rows, classes)).astype(np.float32)


def make_pool(logits=None, unlabeled=UNLABELED) -> Dataset:
    logits = some_logits() if logits is None else logits
    column = pyarrow.array([list(row) for row in logits], type=pyarrow.list_(pyarrow.float32()))
    return make_dataset(len(logits), unlabeled=unlabeled).add_column("teacher_logits", column)


def views(data):
    """The rows as they lie, and the same picked from others in another order."""
    place = np.random.default_rng(2).permutation(len(data))
    return {"as they lie": data, "selected": data.select(place).select(np.argsort(place))}


VIEWS = pytest.mark.parametrize("view", ["as they lie", "selected"])


# ---- confidence ----


def test_confidence_is_the_largest_softmax_probability():
    logits = some_logits()
    expected = [max(softmax_row([float(z) for z in row])) for row in logits]
    result = confidence(logits)
    assert result.dtype == np.float64
    assert result.shape == (ROWS,)
    assert result == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4])
def test_confidence_is_finite_for_large_logits(shift):
    logits = np.array([[0.0, 1.0], [0.0, 0.0]]) + shift
    assert confidence(logits) == pytest.approx([1 / (1 + math.exp(-1)), 0.5], rel=1e-12)
    assert confidence(np.array([[1e4, -1e4, 0.0]])).tolist() == [1.0]


def test_confidence_reads_float16_without_rounding_to_it():
    logits = some_logits().astype(np.float16)
    assert confidence(logits) == pytest.approx(confidence(logits.astype(np.float64)), rel=1e-12)


def test_a_class_that_is_ruled_out_leaves_the_others():
    assert confidence(np.array([[-np.inf, 0.0, 0.0]])) == pytest.approx([0.5])


# ---- the gate ----


@VIEWS
@pytest.mark.parametrize("threshold", [0.34, 0.5, 0.8, 0.95])
def test_the_gate_drops_unlabelled_rows_below_the_threshold_and_no_others(threshold, view):
    data, logits = views(make_pool())[view], some_logits()
    keep, classes = [], [0, 0, 0]
    for row in range(ROWS):
        p = softmax_row([float(z) for z in logits[row]])
        if row in UNLABELED and max(p) < threshold:
            continue
        keep.append(row)
        if row in UNLABELED:
            classes[p.index(max(p))] += 1
    kept, counts = drop_unconfident(data, threshold)
    assert kept.to_dict() == data.select(keep).to_dict()
    assert counts == PoolCounts(threshold, sum(classes), len(UNLABELED) - sum(classes), tuple(classes))


def test_a_confidence_equal_to_the_threshold_is_enough():
    data = make_pool(np.array([[0.0, 0.0], [5.0, 0.0], [0.0, 0.0]]), unlabeled=(0, 1))
    kept, counts = drop_unconfident(data, 0.5)
    assert (len(kept), counts.kept, counts.dropped) == (3, 2, 0)
    assert drop_unconfident(make_pool(np.array([[1e4, 0.0], [0.0, 0.0]]), unlabeled=(0, 1)), 1.0)[1].kept == 1


def test_the_gate_counts_classes_in_the_students_order():
    data = make_pool()
    _, counts = drop_unconfident(data, 0.5)
    _, turned = drop_unconfident(data, 0.5, label_order=[2, 0, 1])
    assert turned.classes == tuple(counts.classes[i] for i in (2, 0, 1)) != counts.classes
    assert (turned.kept, turned.dropped) == (counts.kept, counts.dropped)


def test_the_gate_asks_for_confidence_among_the_students_labels():
    """Of three labels the student has the last two."""
    data = make_pool(np.array([[9.0, 3.0, 0.0], [9.0, 0.0, 0.0]]), unlabeled=(0, 1))
    kept, counts = drop_unconfident(data, 0.9, label_order=[1, 2])
    assert len(kept) == 1
    assert counts.classes == (1, 0)


def test_a_gate_that_no_row_passes_says_how_confident_the_teacher_is():
    logits = np.array([[0.0, 1.0], [9.0, 0.0], [0.0, 2.0]])
    message = "confident at 0.95 of none of 2 unlabelled rows, at most at 0.8808: lower the threshold"
    with pytest.raises(ValueError, match=message):
        drop_unconfident(make_pool(logits, unlabeled=(0, 2)), 0.95)


@pytest.mark.parametrize("threshold", [0.0, -0.1, 1.01, 90, float("nan")])
def test_a_threshold_that_is_no_probability_is_refused(threshold):
    with pytest.raises(ValueError, match=f"threshold must be above 0 and at most 1, got {threshold}"):
        drop_unconfident(make_pool(), threshold)


def test_the_summary_names_counts_and_the_balance_of_what_is_kept():
    counts = PoolCounts(0.9, kept=1500, dropped=500, classes=(300, 1200))
    assert counts.summary(["bad", "good"]) == (
        "1,500 of 2,000 unlabelled rows kept at a confidence of 0.9, 500 dropped; by the teacher: bad 20.0%, good 80.0%"
    )


def test_the_summary_warns_of_a_gate_that_keeps_one_class():
    line = PoolCounts(0.95, kept=7, dropped=3, classes=(0, 7, 0)).summary(["bad", "good", "other"])
    assert "bad 0.0%, good 100.0%, other 0.0%; WARNING: only one class is left" in line
    assert "\n" not in line
    assert "WARNING" not in PoolCounts(0.95, kept=7, dropped=0, classes=(1, 6, 0)).summary(["bad", "good", "other"])


def test_a_summary_with_too_few_names_is_refused():
    with pytest.raises(ValueError, match=r"2 names are needed, one for each label, got \[.bad.\]"):
        PoolCounts(0.9, 2, 0, (1, 1)).summary(["bad"])


# ---- pseudo-labels ----


@VIEWS
@pytest.mark.parametrize("order", [None, [2, 0, 1], [2, 1]])
def test_unlabelled_rows_get_the_teachers_answer_and_the_others_keep_theirs(order, view):
    data, logits = views(make_pool())[view], some_logits()
    expected = data.to_dict()
    for row in UNLABELED:
        of_student = [logits[row][i] for i in (order or range(3))]
        expected["labels"][row] = of_student.index(max(of_student))
    labelled, count = add_pseudo_labels(data, order)
    assert labelled.to_dict() == expected
    assert count == len(UNLABELED)
    assert -100 in data["labels"]


@pytest.mark.parametrize("kind", ["int8", "int64"])
def test_columns_their_types_and_the_format_stay(kind):
    data = make_pool().cast_column("labels", Value(kind)).with_format("numpy", columns=["labels"])
    labelled, _ = add_pseudo_labels(data)
    assert labelled.features == data.features
    assert labelled.column_names == data.column_names
    assert labelled.format == data.format
    assert labelled[0].keys() == {"labels"}
    assert add_pseudo_labels(data, [2, 1, 0])[0]._fingerprint != labelled._fingerprint


def test_the_answers_of_a_real_cache_are_in_the_students_order(tmp_path):
    teacher = make_teacher()
    data = cache_teacher_logits(teacher, make_dataset(12, unlabeled=(1, 5, 7)), make_tokenizer(), tmp_path)
    student = make_teacher(
        id2label={0: "positive", 1: "negative", 2: "neutral"}, label2id={"positive": 0, "negative": 1, "neutral": 2}
    )
    order = label_order(teacher.config, student.config)
    labelled, _ = add_pseudo_labels(data, order)
    for row in (1, 5, 7):
        answer = teacher.config.id2label[int(np.argmax(data[row]["teacher_logits"]))]
        assert student.config.id2label[labelled[row]["labels"]] == answer


def test_gate_then_pseudo_labels_leave_no_row_unlabelled():
    kept, counts = drop_unconfident(make_pool(), 0.6)
    labelled, count = add_pseudo_labels(kept)
    assert count == counts.kept > 0
    assert counts.dropped > 0
    assert -100 not in labelled["labels"]


# ---- what is refused, by both ----

BOTH = pytest.mark.parametrize("judge", [lambda data: drop_unconfident(data, 0.4), add_pseudo_labels])


@BOTH
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), None])
@pytest.mark.parametrize("row", [4, 6])
def test_logits_that_are_no_numbers_are_refused_with_the_row(judge, wrong, row):
    """Row 6 is unlabelled, row 4 is not."""
    logits = some_logits().tolist()
    logits[row][1] = wrong
    with pytest.raises(ValueError, match=rf"the teacher's logits of row {row} are \[.*(nan|inf).*\]: did it run in"):
        judge(make_pool(logits))


def pool_of_lists(kind="float32", classes=3) -> Dataset:
    data = make_pool().remove_columns("labels")
    labels = [[-100] * classes if row in UNLABELED else [0, 1, 0][:classes] for row in range(ROWS)]
    return data.add_column("labels", labels).cast_column("labels", List(Value(kind)))


@VIEWS
@pytest.mark.parametrize("kind", ["float32", "float64", "int64"])
@pytest.mark.parametrize("order", [None, [2, 0, 1]])
def test_pseudo_labels_of_lists_are_all_classes_above_one_half(view, kind, order):
    data = views(pool_of_lists(kind))[view]
    labelled, count = add_pseudo_labels(data, order)
    assert count == len(UNLABELED)
    assert labelled.features == data.features
    for row, (labels, logits) in enumerate(zip(labelled["labels"], some_logits(), strict=True)):
        of_student = [logits[i] for i in order or range(3)]
        expected = [float(1 / (1 + math.exp(-z)) > 0.5) for z in of_student] if row in UNLABELED else [0, 1, 0]
        assert list(labels) == expected
    others = [name for name in data.column_names if name != "labels"]
    assert labelled.select_columns(others).to_dict() == data.select_columns(others).to_dict()


def test_lists_of_another_number_of_classes_are_refused():
    with pytest.raises(ValueError, match="must have a label for each of the teacher's 3 classes, got 2"):
        add_pseudo_labels(pool_of_lists(classes=2))


def test_a_gate_for_rows_with_lists_of_labels_is_refused():
    with pytest.raises(ValueError, match="the rows have lists of labels: .* one label per row"):
        drop_unconfident(pool_of_lists(), 0.5)


@BOTH
def test_a_single_logit_is_refused(judge):
    with pytest.raises(ValueError, match="the teacher gives one logit, .*: at least 2 are needed"):
        judge(make_pool(some_logits(classes=1)))


@BOTH
def test_data_without_unlabelled_rows_or_logits_are_refused(judge):
    with pytest.raises(ValueError, match=r"there are no unlabelled rows \(label -100\)"):
        judge(make_pool(unlabeled=()))
    with pytest.raises(ValueError, match="no column teacher_logits, which `cache_teacher_logits` adds; there is: in"):
        judge(make_dataset(unlabeled=(1,)))
    with pytest.raises(ValueError, match="no column labels"):
        judge(make_pool().remove_columns("labels"))


@BOTH
def test_logits_of_several_lengths_are_refused(judge):
    kind = Features({"labels": Value("int64"), "teacher_logits": List(Value("float32"))})
    data = Dataset.from_dict({"labels": [-100, 0], "teacher_logits": [[1.0, 2.0], [1.0, 2.0, 3.0]]}, features=kind)
    with pytest.raises(ValueError, match="the rows of teacher_logits must be of one length, got 2 to 3"):
        judge(data)


@pytest.mark.parametrize("order", [[0, 3], [-1, 0]])
def test_an_order_of_another_teacher_is_refused(order):
    with pytest.raises(ValueError, match=r"label_order \[.*\] must name logits of the teacher, 0 to 2"):
        add_pseudo_labels(make_pool(), order)
    with pytest.raises(ValueError, match=r"label_order \[.*\] must name logits of the teacher, 0 to 2"):
        drop_unconfident(make_pool(), 0.5, order)
