"""An export's figures, tolerances and texts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from helpers import BINARY, TOPICS, bert_config, label_config, write_rows, write_rows_of_several_labels

pytest.importorskip("onnxruntime")
from distill_nlp.config import DataSection
from distill_nlp.data import load_labeled
from distill_nlp.errors import UsageError
from distill_nlp.export import ExportSettings
from distill_nlp.export.parity import compare, problems
from distill_nlp.export.settings import Tolerances
from distill_nlp.export.texts import built_in_texts, load_texts

ANY = Tolerances(difference=None, flips=1.0, score_loss=1.0, row=False)


def test_figures_of_single_labels():
    original = np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.0, 0.1]], dtype=np.float32)
    exported = np.array([[1.0, 0.0], [0.0, 1.0], [1.5, 0.0], [0.2, 0.1]], dtype=np.float32)
    found = compare(original, exported, np.array([0, 1, 1, 1]), several=False)
    assert found["rows"] == 4
    assert found["max_difference"] == pytest.approx(0.5)
    assert found["mean_difference"] == pytest.approx(0.7 / 8)
    assert found["flips"] == 1
    assert (found["metric"], found["original"], found["exported"]) == ("accuracy", 0.75, 0.5)
    assert "metric" not in compare(original, exported, None, several=False)


def test_a_row_of_several_labels_flips_with_one_of_them():
    original = np.array([[1.0, -1.0], [-1.0, 2.0], [3.0, 4.0]])
    exported = np.array([[1.0, 0.1], [-1.0, 2.0], [4.0, 3.0]])
    labels = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    found = compare(original, exported, labels, several=True)
    assert found["flips"] == 1
    assert (found["metric"], found["original"]) == ("f1_macro", 1.0)
    assert found["exported"] == pytest.approx((1 + 4 / 5) / 2)


def test_logits_that_are_no_numbers_are_never_passed():
    found = compare(np.zeros((2, 2)), np.array([[np.nan, 0.0], [0.0, 0.0]]), None, several=False)
    assert found["max_difference"] == np.inf
    assert problems(found, ANY) == ["some logits are no numbers"]


def test_another_number_of_labels_is_an_error():
    with pytest.raises(ValueError, match="shape"):
        compare(np.zeros((2, 2)), np.zeros((2, 3)), None, several=False)


def figures(**changes) -> dict:
    return {"rows": 100, "max_difference": 0.1, "mean_difference": 0.01, "flips": 2} | changes


@pytest.mark.parametrize(
    ("found", "allowed", "wrong"),
    [
        (figures(), Tolerances(0.1, 0.02, 0.0, False), []),
        (figures(), Tolerances(0.09, 0.02, 0.0, False), ["logits differ by 0.1 (--max_difference 0.09)"]),
        (figures(flips=3), Tolerances(None, 0.02, 0.0, False), ["3 of 100 rows get another label (2 may:"]),
        (figures(rows=50, flips=1), Tolerances(None, 0.02, 0.0, False), []),
        # 0.29 · 100 is 28.999999999999996.
        (figures(flips=29), Tolerances(None, 0.29, 0.0, False), []),
        (figures(rows=20, flips=1), Tolerances(None, 0.02, 0.0, False), ["1 of 20 rows get another label (0 may:"]),
        (figures(rows=20, flips=1), Tolerances(None, 0.02, 0.0, True), []),
        (figures(rows=20, flips=2), Tolerances(None, 0.02, 0.0, True), ["2 of 20 rows get another label (1 may:"]),
        (figures(metric="accuracy", original=0.9, exported=0.895), Tolerances(None, 1, 0.005, False), []),
        (
            figures(metric="accuracy", original=0.9, exported=0.89),
            Tolerances(None, 1, 0.005, False),
            ["accuracy falls from 0.9000 to 0.8900 (--max_score_loss 0.005)"],
        ),
        (figures(metric="accuracy", original=0.9, exported=0.89), Tolerances(None, 1, 0.005, True), []),
        (
            figures(metric="f1_macro", original=0.9, exported=0.88),
            Tolerances(None, 1, 0.005, True),
            ["macro-F1 falls from"],
        ),
        (figures(metric="accuracy", original=0.8, exported=0.9), Tolerances(None, 1, 0.0, False), []),
    ],
)
def test_what_lies_beyond_the_tolerances_is_said(found, allowed, wrong):
    said = problems(found, allowed)
    assert len(said) == len(wrong)
    assert all(text.startswith(start) for text, start in zip(said, wrong, strict=True))


def test_tolerances_follow_the_numbers_and_what_is_given():
    assert ExportSettings("m").tolerances == Tolerances(1e-3, 0.0, 0.0, False)
    assert ExportSettings("m", quantize="int8").tolerances == Tolerances(None, 0.02, 0.005, True)
    assert ExportSettings("m", fp16=True, max_difference=0).tolerances == Tolerances(0, 0.005, 0.002, True)
    assert ExportSettings("m", quantize="int8", max_flips=0.0).tolerances == Tolerances(None, 0.0, 0.005, False)
    assert ExportSettings("m", fp16=True, max_score_loss=0.1).tolerances == Tolerances(None, 0.005, 0.1, False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantize": "int4"}, "--quantize takes int8"),
        ({"quantize": "int8", "fp16": True}, "exclude each other"),
        ({"calibrate": "data"}, "are for --quantize int8"),
        ({"fp16": True, "reduce_range": True}, "are for --quantize int8"),
        ({"max_flips": -0.1}, "--max_flips must be >= 0"),
        ({"max_difference": float("nan")}, "--max_difference must be >= 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        ExportSettings("m", **settings)


def test_the_folder_is_named_after_model_and_numbers(tmp_path, monkeypatch):
    (tmp_path / "seed-0").mkdir()
    monkeypatch.chdir(tmp_path / "seed-0")
    assert ExportSettings(".").folder == tmp_path.resolve() / "seed-0-onnx"
    assert ExportSettings(str(tmp_path / "seed-0")).folder == tmp_path / "seed-0-onnx"
    assert ExportSettings(f"{tmp_path}/seed-0/", quantize="int8").folder == tmp_path / "seed-0-onnx-int8"
    assert ExportSettings("nobody/their-model", fp16=True).folder == Path("their-model-onnx-fp16")
    assert ExportSettings("m", output="here").folder == Path("here")


# ---- texts ----


def config(labels=BINARY, **changes):
    return bert_config(**label_config(labels), **changes)


def rows_of(data, labels=BINARY, split="test", column="label", rows=100, **changes):
    return load_texts(str(data), split, "text", column, rows, config(labels, **changes))


def test_built_in_texts_are_of_several_lengths():
    texts = built_in_texts()
    assert texts.labels is None
    assert min(map(len, texts.texts)) < 10
    assert max(map(len, texts.texts)) > 1000
    assert len(set(texts.texts)) == len(texts.texts) >= 20


def test_rows_are_those_of_the_split(tmp_path):
    write_rows(tmp_path / "data")
    table = pd.read_parquet(tmp_path / "data" / "test.parquet")
    found = load_texts(str(tmp_path / "data"), None, "text", "label", 100, config())
    assert (found.texts, found.source) == (list(table.text), "data, test")
    np.testing.assert_array_equal(found.labels, table.label)
    alone = load_texts(str(tmp_path / "data" / "test.parquet"), None, "text", "label", 100, config())
    assert (alone.texts, alone.source) == (found.texts, "test.parquet, train")


def test_rows_beyond_the_number_wanted_are_drawn_the_same_each_time(tmp_path):
    write_rows(tmp_path / "data")
    every = rows_of(tmp_path / "data")
    some, again = rows_of(tmp_path / "data", rows=5), rows_of(tmp_path / "data", rows=5)
    assert some.texts == again.texts != every.texts[:5]
    pairs = set(zip(every.texts, every.labels.tolist(), strict=True))
    assert set(zip(some.texts, some.labels.tolist(), strict=True)) <= pairs
    assert len(some.texts) == len(some.labels) == 5


def test_a_column_that_is_not_there_leaves_the_labels_out(tmp_path):
    write_rows(tmp_path / "data")
    assert rows_of(tmp_path / "data", column="nothing").labels is None
    with pytest.raises(UsageError, match="no column 'nothing'"):
        load_texts(str(tmp_path / "data"), "test", "nothing", "label", 9, config())


@pytest.mark.parametrize(
    ("labels", "wanted"),
    [(["good", "bad", "bad"], [1, 0, 0]), (["bad", "bad", "bad"], [0, 0, 0]), ([1, 1, 1], [1, 1, 1])],
)
def test_names_and_numbers_become_the_classes_of_the_model(tmp_path, labels, wanted):
    pd.DataFrame({"text": ["w4", "w5", "w6"], "label": labels}).to_parquet(tmp_path / "test.parquet")
    assert rows_of(tmp_path).labels.tolist() == wanted


def test_names_of_the_data_in_another_order_are_turned(tmp_path):
    names = ["positive", "negative", "neutral"]
    rows = Dataset.from_dict({"text": ["w4", "w5", "w6"], "label": [0, 1, 2]})
    DatasetDict({"test": rows.cast_column("label", ClassLabel(names=names))}).save_to_disk(tmp_path / "saved")
    model_names = ("Negative", "Neutral", "Positive")
    assert rows_of(tmp_path / "saved", model_names).labels.tolist() == [2, 0, 1]
    assert rows_of(tmp_path / "saved", ("LABEL_0", "LABEL_1", "LABEL_2")).labels.tolist() == [0, 1, 2]
    with pytest.raises(UsageError, match="are not the model's"):
        rows_of(tmp_path / "saved", ("x", "y", "z"))


THREE = ("negative", "neutral", "positive")


def classes_of(tmp_path, labels, model_names, names=None, several=False):
    """What `compare` and `export` take the labels of a file, or of a saved data set with names, for."""
    rows = Dataset.from_dict({"text": [f"w{4 + i}" for i in range(len(labels))], "label": labels})
    if names is not None:
        feature = ClassLabel(names=names)
        rows = rows.cast_column("label", List(feature) if several else feature)
    DatasetDict({"test": rows}).save_to_disk(tmp_path / "rows")
    task = "multi_label_classification" if several else "single_label_classification"
    of_export = rows_of(tmp_path / "rows", model_names, problem_type=task).labels.tolist()
    of_compare = load_labeled(DataSection(dataset=str(tmp_path / "rows")), "test", list(model_names), task)["labels"]
    assert of_export == list(of_compare)
    return of_export


@pytest.mark.parametrize(
    ("labels", "model", "names", "wanted"),
    [
        ([0, 1, 0], THREE, ["positive", "neutral"], [2, 1, 2]),
        ([0, 1], THREE, ["Positive", "NEU-tral"], [2, 1]),
        (["Positive", "neutral"], THREE, None, [2, 1]),
        (["Positive", "Neutral", "Negative"], THREE, None, [2, 1, 0]),
        (["neutral", "neutral"], THREE, None, [1, 1]),
        (["Neutral", "Neutral"], THREE, None, [1, 1]),
        (["pos", "neg", "pos"], ("LABEL_0", "LABEL_1"), None, [1, 0, 1]),
        ([1, 0, 0], ("LABEL_0", "LABEL_1"), ["neg", "pos"], [1, 0, 0]),
        ([True, False], THREE[:2], None, [1, 0]),
    ],
)
def test_labels_are_found_among_the_classes_of_the_model(tmp_path, labels, model, names, wanted):
    assert classes_of(tmp_path, labels, model, names) == wanted


def test_lists_of_labels_are_found_among_the_classes_too(tmp_path):
    found = classes_of(tmp_path, [["Sport"], [], ["food", "Sport"]], TOPICS, several=True)
    assert found == [[0, 0, 1], [0, 0, 0], [1, 0, 1]]
    found = classes_of(tmp_path / "names", [[1], [0, 1]], TOPICS, ["sport", "Food"], several=True)
    assert found == [[1, 0, 0], [1, 0, 1]]


@pytest.mark.parametrize(
    ("labels", "model", "names", "said"),
    [
        (["great", "neutral"], THREE, None, "row 0 of the split 'test' has the label 'great', which is not among"),
        (["Neutral", "neutral"], THREE, None, "has the label 'Neutral'"),
        (["a", "b", "c"], ("LABEL_0", "LABEL_1"), None, "has the label 'a'"),
        (["a", "a"], ("LABEL_0", "LABEL_1"), None, "has the label 'a'"),
        (["-1", "x"], ("1", "-1"), None, "has the label 'x'"),
        ([0, 1], THREE, ["neutral", "other"], "its classes ['neutral', 'other'] are not the model's"),
        ([1, -1, 0], THREE[::-1], list(THREE), "row 1 of the split 'test' has the label -1, outside 0..2"),
        ([0, None], THREE, None, "row 1 of the split 'test' has no label in label"),
        ([{"a": 1}], THREE, None, "row 0 of the split 'test' has {'a': 1} (dict) for a label"),
        ([0.5, 1.0], THREE, None, "row 0 of the split 'test' has the label 0.5 (float)"),
    ],
)
def test_labels_that_are_not_the_models_are_refused(tmp_path, labels, model, names, said):
    with pytest.raises(UsageError) as refused:
        classes_of(tmp_path, labels, model, names)
    assert said in str(refused.value)
    assert str(refused.value).endswith("; a --label_column that is not there compares without labels")
    with pytest.raises(UsageError) as refused:
        load_labeled(DataSection(dataset=str(tmp_path / "rows")), "test", list(model), "single_label_classification")
    assert said in str(refused.value)


def test_a_sample_may_lack_a_class(tmp_path):
    pd.DataFrame({"text": ["w4"] * 40, "label": ["Neutral"] * 39 + ["Positive"]}).to_parquet(tmp_path / "test.parquet")
    assert set(rows_of(tmp_path, THREE, rows=5).labels.tolist()) == {1}


def test_built_in_pairs_are_of_two_texts_each():
    found = built_in_texts(pairs=True)
    assert found.texts == built_in_texts().texts
    assert sorted(found.pairs) == sorted(found.texts)
    assert found.source == "built-in pairs"


def test_second_texts_stay_with_the_first(tmp_path):
    write_rows(tmp_path / "data")
    table = pd.read_parquet(tmp_path / "data" / "test.parquet")
    found = load_texts(str(tmp_path / "data"), None, "text", "label", 5, config(), text_pair_column="other")
    together = set(zip(table.text, table.other, table.label, strict=True))
    assert set(zip(found.texts, found.pairs, found.labels.tolist(), strict=True)) <= together
    assert len(found.texts) == len(found.pairs) == 5
    assert rows_of(tmp_path / "data").pairs is None


def test_several_labels_become_vectors(tmp_path):
    write_rows_of_several_labels(tmp_path / "data")
    several = {"column": "labels", "problem_type": "multi_label_classification"}
    found = rows_of(tmp_path / "data", TOPICS, **several)
    lines = [json.loads(line) for line in (tmp_path / "data" / "test.jsonl").read_text().splitlines()]
    wanted = [[float(name in line["labels"]) for name in TOPICS] for line in lines]
    np.testing.assert_array_equal(found.labels, wanted)
    turned = rows_of(tmp_path / "data", TOPICS[::-1], **several)
    np.testing.assert_array_equal(turned.labels, np.array(wanted)[:, ::-1])


def test_names_of_several_labels_in_another_order_are_turned(tmp_path):
    features = Features({"text": Value("string"), "label": List(ClassLabel(names=["sport", "food", "money"]))})
    rows = Dataset.from_dict({"text": ["w4", "w5", "w6"], "label": [[0], [1, 2], []]}, features=features)
    DatasetDict({"test": rows}).save_to_disk(tmp_path / "saved")
    found = rows_of(tmp_path / "saved", TOPICS, problem_type="multi_label_classification")
    assert TOPICS == ("food", "money", "sport")
    assert found.labels.tolist() == [[0, 0, 1], [1, 1, 0], [0, 0, 0]]


@pytest.mark.parametrize("several", [True, False])
def test_labels_of_another_kind_are_refused(tmp_path, several):
    if several:
        write_rows(tmp_path / "data")
    else:
        write_rows_of_several_labels(tmp_path / "data")
    changes = {"problem_type": "multi_label_classification"} if several else {"column": "labels"}
    with pytest.raises(UsageError, match=r"holds (one label per row|lists of labels), and the model was trained on"):
        rows_of(tmp_path / "data", TOPICS, **changes)
