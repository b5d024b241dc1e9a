"""`distill-nlp compare` on models whose answers are known, and what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict
from helpers import LABELS, label_config, make_student, make_teacher, make_tokenizer

from distill_nlp.candidates import common_device
from distill_nlp.cli import main
from distill_nlp.comparison import compare, short_names
from distill_nlp.config import ReportSection
from distill_nlp.report.statistics import mcnemar

QUICK = ReportSection(latency_samples=2, throughput_batches=1, bootstrap_samples=200)
MULTI = "multi_label_classification"


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr("distill_nlp.comparison.ReportSection", lambda: QUICK)


@pytest.fixture
def rows(tmp_path):
    """40 rows labeled by name, in a file."""
    rng = np.random.default_rng(0)
    lines = [
        {"text": " ".join(f"w{4 + v}" for v in rng.integers(0, 90, 6)), "label": LABELS[rng.integers(3)]}
        for _ in range(40)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def save(model, folder):
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def models(tmp_path):
    return [save(make_teacher(), tmp_path / "teacher"), save(make_student(), tmp_path / "student")]


def answers(model, texts):
    tokenizer = make_tokenizer()
    with torch.no_grad():
        return np.stack([model.eval()(**tokenizer(text, return_tensors="pt")).logits[0].numpy() for text in texts])


def test_scores_and_pairs_are_those_counted_by_hand(models, rows):
    found = compare(models, str(rows))
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    labels = np.array([LABELS.index(line["label"]) for line in lines])
    own = [answers(model, [line["text"] for line in lines]).argmax(1) for model in (make_teacher(), make_student())]
    for name, named in zip(models, own, strict=True):
        accuracy = found["models"][name]["accuracy"]
        assert accuracy == pytest.approx((named == labels).mean())
        low, high = found["models"][name]["interval"]
        assert low < accuracy < high
    (pair,) = found["pairs"]
    assert (pair["a"], pair["b"]) == tuple(models)
    assert pair["agreement"] == pytest.approx((own[0] == own[1]).mean())
    assert pair["mcnemar"] == mcnemar(own[0] == labels, own[1] == labels)
    assert pair["difference"]["value"] == pytest.approx((own[0] == labels).mean() - (own[1] == labels).mean())
    low, high = pair["difference"]["interval"]
    assert low < pair["difference"]["value"] < high
    assert (found["rows"], found["metric"], found["label_names"]) == (40, "accuracy", list(LABELS))


def test_classes_in_another_order_are_matched_by_name(models, rows, tmp_path):
    permuted = make_teacher(**label_config(("positive", "negative", "neutral")))
    with torch.no_grad():
        for name in ("weight", "bias"):
            values = getattr(permuted.classifier, name)
            values.copy_(values[[2, 0, 1]].clone())
    found = compare([models[0], save(permuted, tmp_path / "permuted")], str(rows))
    assert found["pairs"][0]["agreement"] == 1.0
    assert found["pairs"][0]["difference"]["value"] == 0.0
    # The first model's order is that of the labels.
    other = compare([str(tmp_path / "permuted"), models[0]], str(rows))
    assert other["label_names"] == ["positive", "negative", "neutral"]
    assert other["models"][models[0]]["accuracy"] == found["models"][models[0]]["accuracy"]


@pytest.mark.parametrize("names", [["positive", "negative", "neutral"], ["Positive", "neutral"]])
def test_named_classes_of_the_data_are_found_among_the_models(models, rows, tmp_path, names):
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    folded = {name.lower(): i for i, name in enumerate(names)}
    kept = [line for line in lines if line["label"] in folded]
    data = Dataset.from_dict({"text": [k["text"] for k in kept], "label": [folded[k["label"]] for k in kept]})
    DatasetDict(test=data.cast_column("label", ClassLabel(names=names))).save_to_disk(tmp_path / "saved")
    found = compare(models, str(tmp_path / "saved"))
    labels = np.array([LABELS.index(line["label"]) for line in kept])
    named = answers(make_student(), [line["text"] for line in kept]).argmax(1)
    assert found["models"][models[1]]["accuracy"] == pytest.approx((named == labels).mean())
    assert found["rows"] == len(kept)


def test_texts_of_several_labels_are_compared_by_macro_f1(tmp_path, capsys):
    paths = [
        save(make_teacher(problem_type=MULTI), tmp_path / "teacher"),
        save(make_student(problem_type=MULTI), tmp_path / "student"),
    ]
    data = tmp_path / "rows.jsonl"
    rng = np.random.default_rng(1)
    wanted = rng.random((30, 3)) < 0.5
    wanted[0] = True
    lines = [
        {"text": f"w{4 + i} w{9 + i}", "tags": [LABELS[c] for c in np.flatnonzero(row)]} for i, row in enumerate(wanted)
    ]
    data.write_text("\n".join(map(json.dumps, lines)))
    found = compare(paths, str(data), label_column="tags")
    assert found["metric"] == "f1_macro"
    named = answers(make_student(problem_type=MULTI), [line["text"] for line in lines]) > 0
    assert found["models"][paths[1]]["accuracy"] == pytest.approx((named == wanted).all(axis=1).mean())
    assert main(["compare", *paths, "--data", str(data), "--label_column", "tags"]) == 0
    out = capsys.readouterr().out
    assert out.index("macro-F1") < out.index("exact match")
    assert "points of macro-F1" in out


def test_the_command_prints_a_table_or_json(models, rows, capsys):
    assert main(["compare", *models, "--data", str(rows), "--max_rows", "12"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "12 rows of" in out
    assert "teacher - student: " in out
    assert "(McNemar); they agree on" in out
    assert main(["compare", *models, "--data", str(rows), "--max_rows", "12", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == 12
    assert set(found["models"]) == set(models)


def test_each_two_of_several_models_are_compared(models, rows, tmp_path):
    third = save(make_student(seed=7), tmp_path / "third")
    pairs = [(pair["a"], pair["b"]) for pair in compare([*models, third], str(rows))["pairs"]]
    assert pairs == [(models[0], models[1]), (models[0], third), (models[1], third)]


def test_a_length_that_is_given_cuts_the_texts(models, rows):
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    whole, cut = (compare(models, str(rows), max_length=length)["models"] for length in (None, 4))
    short = answers(make_teacher(), [" ".join(line["text"].split()[:2]) for line in lines]).argmax(1)
    labels = np.array([LABELS.index(line["label"]) for line in lines])
    assert cut[models[0]]["accuracy"] == pytest.approx((short == labels).mean())
    assert cut[models[0]]["log_loss"] != whole[models[0]]["log_loss"]


def test_all_run_on_the_cpu_where_one_is_an_export(tmp_path, monkeypatch):
    """It can run nowhere else, and the times of two devices do not compare."""
    names = [str(tmp_path / "student"), str(tmp_path / "student-onnx")]
    (tmp_path / "student-onnx").mkdir()
    (tmp_path / "student-onnx" / "model.onnx").write_bytes(b"graph")
    (tmp_path / "student-onnx" / "export.json").write_text("{}")
    assert [common_device(some) for some in (names[:1], names)] == ["cpu", "cpu"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert [common_device(some) for some in (names[:1], names)] == ["cuda", "cpu"]


def test_names_are_shown_without_common_folders():
    assert short_names(["/a/b/c", "/a/b/d/e"]) == {"/a/b/c": "c", "/a/b/d/e": "d/e"}
    assert short_names(["a/x", "b/x"]) == {"a/x": "a/x", "b/x": "b/x"}
    assert short_names(["x", "x/y"]) == {"x": "x", "x/y": "x/y"}


@pytest.fixture
def refused(models, rows, tmp_path):
    """Name -> arguments of the command."""
    other = save(make_student(**label_config(("a", "b", "c"))), tmp_path / "other")
    several = save(make_student(problem_type=MULTI), tmp_path / "several")
    make_teacher().bert.save_pretrained(tmp_path / "backbone")
    number, other_number = (save(make_student(seed=s, num_labels=1), tmp_path / f"number-{s}") for s in (5, 6))
    saved = Dataset.from_dict({"text": ["w5"] * 2, "label": [0, 1]}).cast_column("label", ClassLabel(names=["x", "y"]))
    DatasetDict(test=saved).save_to_disk(tmp_path / "foreign")
    lists = tmp_path / "lists.jsonl"
    lists.write_text('{"text": "w5", "label": ["neutral"]}\n{"text": "w6", "label": []}')
    data = ["--data", str(rows)]
    return {
        "one model": [models[0], *data],
        "twice": [models[0], models[0], *data],
        "no such model": [models[0], "/nowhere/model", *data],
        "no classifier": [models[0], str(tmp_path / "backbone"), *data],
        "other classes": [models[0], other, *data],
        "regressions": [number, other_number, *data],
        "other task": [models[0], several, *data],
        "no such file": [*models, "--data", "/nowhere.csv"],
        "no such column": [*models, *data, "--text_column", "review"],
        "no such label": [*models, *data, "--label_column", "stars"],
        "a split of a file": [*models, *data, "--split", "test"],
        "foreign classes": [*models, "--data", str(tmp_path / "foreign")],
        "lists": [*models, "--data", str(lists)],
    }


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("one model", "two or more models are compared, got 1"),
        ("twice", "is given twice"),
        ("no such model", "no model folder /nowhere/model"),
        ("no classifier", "is no classifier"),
        ("regressions", "number-5 is a regression (num_labels 1); give a classifier"),
        ("other classes", "only models of the same classes can be compared"),
        ("other task", "is a multi_label_classification model"),
        ("no such file", "no file or folder /nowhere.csv"),
        ("no such column", "no column 'review'"),
        ("no such label", "no column 'stars'"),
        ("a split of a file", "there is no split 'test'"),
        ("foreign classes", "its classes ['x', 'y'] are not the model's"),
        ("lists", "holds lists of labels, and the model was trained on one label per row"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(what, said, refused, capsys):
    assert main(["compare", *refused[what]]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert len([line for line in err.splitlines() if line.startswith("error:")]) == 1
