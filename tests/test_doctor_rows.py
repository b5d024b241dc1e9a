"""Leakage, contradictory labels, classes, sizes of splits."""

from __future__ import annotations

import pytest

from distill_nlp.doctor.rows import (
    check_classes,
    check_contradictions,
    check_leakage,
    check_row_counts,
    check_splits_differ,
    folded_rows,
)


def numbered(name, count):
    return [[f"{name} text {i}" for i in range(count)]]


def test_rows_are_folded_by_case_white_space_and_line_breaks():
    same = [["A  fine<br />film\n", "a fine<BR/> film", " A FINE<br>film"]]
    assert set(folded_rows(same)) == {("a fine film",)}
    assert folded_rows([["a <b> c", "ab"]]) == [("a <b> c",), ("ab",)]


def test_the_columns_of_a_pair_stay_apart():
    assert folded_rows([["a b", "a"], ["c", "b c"]]) == [("a b", "c"), ("a", "b c")]


def test_clean_splits_are_ok_with_their_counts():
    found = check_leakage(numbered("train", 20), {"validation": numbered("v", 5), "test": numbered("t", 1000)})
    assert found.level == "ok"
    assert "0 of 5 validation rows (0.0%; 0 letter by letter), 0 of 1,000 test rows" in found.what


def test_a_text_of_train_in_test_is_a_warning_with_an_example():
    test = [["Train  TEXT 3<br />", *numbered("t", 9)[0]]]
    found = check_leakage(numbered("train", 20), {"validation": numbered("v", 5), "test": test})
    assert found.level == "warning"
    assert "1 of 10 test rows (10.0%; 0 letter by letter)" in found.what
    assert 'such as "Train TEXT 3<br />"' in found.what


def test_a_long_example_is_cut():
    text = "x" * 80
    found = check_leakage([[text]], {"test": [[text, *"abcdefghi"]]})
    assert f'"{"x" * 59}…"' in found.what
    assert "1 letter by letter" in found.what


@pytest.mark.parametrize(
    ("split", "shared", "level"),
    [("test", 20, "warning"), ("test", 21, "stop"), ("validation", 90, "warning"), ("validation", 0, "ok")],
)
def test_more_than_a_fifth_of_the_test_split_is_a_stop(split, shared, level):
    train = numbered("train", 100)
    rows = [train[0][:shared] + numbered("own", 100 - shared)[0]]
    others = {"validation": numbered("v", 5), "test": numbered("t", 5)}
    assert check_leakage(train, others | {split: rows}).level == level


def test_a_stop_stays_one_whatever_comes_after():
    train = numbered("train", 10)
    assert check_leakage(train, {"test": train, "validation": [train[0][:1]]}).level == "stop"


def test_a_pair_leaks_only_as_a_pair():
    train = [["a", "b"], ["x", "y"]]
    assert check_leakage(train, {"test": [["a"], ["y"]]}).level == "ok"
    assert check_leakage(train, {"test": [["a"], ["x"]]}).level == "stop"


# ---- labels of repeated texts ----


def test_one_text_with_two_labels_is_a_warning():
    found = check_contradictions([["same", "Same", "other", "third"]], [0, 1, 0, 1])
    assert found.level == "warning"
    assert "1 of 4 train rows repeat" in found.what
    assert "2 have one text and different labels" in found.what
    assert '"same"' in found.what
    assert "--losses.ce.weight 0.1" in found.fix
    # Without cross-entropy there is no weight to lower; typed, it would bring one in.
    found = check_contradictions([["same", "Same", "other", "third"]], [0, 1, 0, 1], reads_labels=False)
    assert found.fix == "settle these labels in the data"


def test_repeated_texts_of_one_label_are_ok():
    found = check_contradictions([["same", "same", "other"]], [0, 0, 1])
    assert found.level == "ok"
    assert "1 of 3 train rows repeat" in found.what


@pytest.mark.parametrize(("rows", "level"), [(1999, "warning"), (2001, "ok")])
def test_fewer_than_one_in_a_thousand_is_ok(rows, level):
    texts = [["same", "same", *(f"text {i}" for i in range(rows - 2))]]
    assert check_contradictions(texts, [0, 1] + [0] * (rows - 2)).level == level


# ---- classes and sizes ----


def test_balanced_classes_are_ok_with_the_bar_of_the_test_split():
    found = check_classes({"train": [0, 1] * 30, "test": [0, 0, 0, 1]}, ["no", "yes"])
    assert found.level == "ok"
    assert "always naming the largest gives 0.750 on test" in found.what


def test_a_class_without_rows_is_a_warning_with_its_name_and_split():
    found = check_classes({"train": [0, 1, 0, 1], "test": [0, 1, 2, 2]}, ["a", "b", "c"])
    assert found.level == "warning"
    assert "no rows of c in train" in found.what
    assert "in test" not in found.what.split("no rows of")[1]
    assert "--data.label_names" in found.fix


def test_many_absent_classes_are_listed_in_short():
    found = check_classes({"train": [0, 1]}, [f"c{i}" for i in range(12)])
    assert "c2, c3, c4, c5, c6 and 5 more in train" in found.what


@pytest.mark.parametrize(
    ("large", "metric", "level"),
    [(110, "accuracy", "warning"), (100, "accuracy", "ok"), (110, "f1_macro", "ok"), (110, "loss", "warning")],
)
def test_more_than_ten_to_one_asks_for_macro_f1(large, metric, level):
    found = check_classes({"train": [0] * large + [1] * 10}, ["no", "yes"], metric)
    assert found.level == level
    if level == "warning":
        assert "11 to 1" in found.what
        assert "--training.metric_for_best_model f1_macro" in found.fix
        assert "rarest in train yes 8.3%, largest no 91.7%" in found.what


@pytest.mark.parametrize(("train", "level"), [(99, "warning"), (100, "ok")])
def test_few_rows_are_a_warning(train, level):
    found = check_row_counts({"train": train, "test": 1000})
    assert found.level == level
    assert f"{train} train, 1,000 test" in found.what
    assert ("fewer than 100 in train" in found.what) is (level == "warning")


@pytest.mark.parametrize(("shared", "level"), [(94, "ok"), (95, "warning"), (100, "warning")])
def test_validation_that_is_the_test_split_is_a_warning(shared, level):
    test = numbered("t", 200)
    validation = [test[0][:shared] + numbered("v", 100 - shared)[0]]
    found = check_splits_differ(validation, test)
    assert found.level == level
    assert found.what.startswith(f"{shared}.0% of the 100 validation rows")
    if level == "warning":
        assert found.fix.startswith("--data.validation_split null")
