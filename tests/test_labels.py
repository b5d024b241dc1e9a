"""Class names of teacher, student and data, compared."""

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from helpers import LABELS, label_config, make_dataset
from transformers import BertConfig

from distill_nlp.labels import check_data_labels, label_order


def config(labels):
    return BertConfig(**label_config(labels))


@pytest.mark.parametrize(
    ("teacher", "student", "order"),
    [
        (["a", "b", "c"], ["a", "b", "c"], None),
        (["a", "b", "c"], ["c", "a", "b"], [2, 0, 1]),
        (["POSITIVE", "NEGATIVE"], ["negative", "positive"], [1, 0]),
        (["very-good", "so so"], ["So_So", "very_good"], [1, 0]),
        # A sign is a separator only where nothing else tells the labels apart.
        (["-1", "0", "1"], ["-1", "0", "1"], None),
        (["1", "0", "-1"], ["-1", "0", "1"], [2, 1, 0]),
        (["A-", "A"], ["A", "A-"], [1, 0]),
        # Digits are names too where both have the same ones in another order.
        (["1", "0"], ["0", "1"], [1, 0]),
        (["5", "4", "3"], ["3", "4", "5"], [2, 1, 0]),
        (["LABEL_1", "LABEL_0"], ["LABEL_0", "LABEL_1"], [1, 0]),
        # Anonymous ones are taken as they stand.
        (["LABEL_0", "LABEL_1"], ["negative", "positive"], None),
        (["negative", "positive"], ["LABEL_0", "LABEL_1"], None),
        (["0", "1"], ["LABEL_0", "LABEL_1"], None),
        (["same", "same"], ["same", "same"], None),
    ],
)
def test_labels_are_matched_by_name(teacher, student, order):
    assert label_order(config(teacher), config(student)) == order


@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        (["good", "bad"], ["positive", "negative"]),
        (["a", "b", "c"], ["a", "b", "d"]),
        # Alike without signs and case, so that nobody can say which is which.
        (["-1", "+1", "0"], ["- 1", "+ 1", "1"]),
        (["US", "us"], ["Us", "uS"]),
    ],
)
def test_other_names_are_refused_with_both_lists(teacher, student):
    with pytest.raises(ValueError, match="do not match by name; rename id2label") as error:
        label_order(config(teacher), config(student))
    assert str(teacher) in str(error.value)
    assert str(student) in str(error.value)


def test_another_number_of_labels_is_refused_with_both_lists():
    with pytest.raises(ValueError, match=r"the teacher has 2 labels \['a', 'b'\], the student 3 \['a', 'b', 'c'\]"):
        label_order(config(["a", "b"]), config(["a", "b", "c"]))


# ---- a teacher that knows more labels ----


@pytest.mark.parametrize(
    ("teacher", "student", "order"),
    [
        (["a", "b", "c"], ["a", "b"], [0, 1]),
        (["neutral", "NEGATIVE", "POSITIVE"], ["positive", "negative"], [2, 1]),
        (["LABEL_0", "joy", "anger"], ["anger", "joy"], [2, 1]),
        # As without it where the two have the same.
        (["a", "b"], ["a", "b"], None),
        (["b", "a"], ["a", "b"], [1, 0]),
    ],
)
def test_a_superset_is_restricted_when_asked(teacher, student, order):
    assert label_order(config(teacher), config(student), restrict=True) == order


def test_a_superset_is_refused_unasked_with_both_lists_and_what_to_ask():
    with pytest.raises(ValueError, match="restrict_labels keeps the student's and renormalizes") as error:
        label_order(config(["a", "b", "c"]), config(["b", "a"]))
    assert "['a', 'b', 'c']" in str(error.value)
    assert "['b', 'a']" in str(error.value)


@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        (["a", "b", "c"], ["a", "d"]),
        (["a", "b"], ["a", "b", "c"]),
        # Which of them is meant, nobody can say.
        (["LABEL_0", "LABEL_1", "LABEL_2"], ["LABEL_0", "LABEL_1"]),
        (["a", "b", "c"], ["LABEL_0", "LABEL_1"]),
        (["a", "A", "b"], ["A ", "b"]),
    ],
)
def test_what_is_no_superset_by_name_is_refused(teacher, student):
    with pytest.raises(ValueError, match="they must be the same, or the student's among the teacher's by name"):
        label_order(config(teacher), config(student), restrict=True)


# ---- the data ----


def rows(names, column="labels"):
    features = Features({column: ClassLabel(names=list(names))})
    return Dataset.from_dict({column: [0, 1]}, features=features)


@pytest.mark.parametrize(
    ("data", "student"),
    [
        (["negative", "positive"], ["NEGATIVE", "Positive"]),
        (["0", "1"], ["negative", "positive"]),
        (["negative", "positive"], ["LABEL_0", "LABEL_1"]),
        (["-1", "1"], ["-1", "1"]),
        (["0", "1"], ["a", "b", "c"]),
    ],
)
def test_data_of_the_students_labels_pass(data, student):
    check_data_labels(rows(data), config(student))


@pytest.mark.parametrize(
    ("data", "student", "problem"),
    [
        (["positive", "negative"], ["negative", "positive"], "are in another order than"),
        (["POSITIVE", "NEGATIVE"], ["negative", "positive"], "are in another order than"),
        (["neg", "pos"], ["negative", "positive"], "do not match by name"),
        (["a", "b", "c"], ["a", "b"], "do not match by name"),
        (["-1", "+1"], ["+1", "-1"], "are in another order than"),
    ],
)
@pytest.mark.parametrize("column", ["labels", "label"])
def test_other_class_names_of_the_data_are_refused_with_both_lists(data, student, problem, column):
    with pytest.raises(ValueError, match=problem) as error:
        check_data_labels(rows(data, column), config(student))
    assert str(data) in str(error.value)
    assert str(student) in str(error.value)


def test_more_anonymous_classes_than_the_student_has_are_refused():
    with pytest.raises(ValueError, match=r"the data have 3 classes .* the student 2 labels"):
        check_data_labels(rows(["0", "1", "2"]), config(["a", "b"]))


def test_data_without_class_names_pass():
    plain = Dataset.from_dict({"labels": [0, 1]}, features=Features({"labels": Value("int64")}))
    for data in (plain, None, [{"labels": 0}]):
        check_data_labels(data, config(["a", "b"]))


def test_the_trainer_refuses_data_whose_classes_are_in_another_order(make_trainer):
    data = make_dataset().cast_column("labels", ClassLabel(names=list(reversed(LABELS))))
    with pytest.raises(ValueError, match="are in another order than the student's labels"):
        make_trainer(data=data)
    make_trainer("right", data=make_dataset().cast_column("labels", ClassLabel(names=list(LABELS))))
