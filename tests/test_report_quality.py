"""Scores of probabilities and classes against scikit-learn and loops; memory, rows by length, curves of a log."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import make_tokenizer
from sklearn.metrics import log_loss, matthews_corrcoef, precision_recall_fscore_support

from distill_nlp.config import ReportSection
from distill_nlp.report import speed
from distill_nlp.report.curves import MOST_POINTS, read_panels
from distill_nlp.report.memory import RESIDENT, pass_memory
from distill_nlp.report.quality import (
    CALIBRATION_BINS,
    confusion,
    ece,
    kl_to_teacher,
    per_class,
    probabilities,
    quality,
    reliability,
)
from distill_nlp.report.rows import bucket_of, length_buckets, read_rows, slices


@pytest.fixture
def single():
    rng = np.random.default_rng(0)
    return rng.normal(size=(200, 4)) * 2, rng.integers(0, 3, size=200)


@pytest.fixture
def several():
    """Class 3 is never there and never named."""
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(150, 4)) * 2
    logits[:, 3] = -5.0
    labels = (rng.random((150, 4)) < 0.4).astype(np.float32)
    labels[:, 3] = 0
    return logits, labels


# ---- scores ----


def test_scores_of_one_label_are_those_of_scikit_learn(single):
    logits, labels = single
    p = np.array([[math.exp(z) / sum(math.exp(v) for v in row) for z in row] for row in logits])
    assert np.allclose(probabilities(logits, several=False), p)
    found = quality(logits, labels)
    assert found["mcc"] == pytest.approx(matthews_corrcoef(labels, logits.argmax(1)))
    assert found["log_loss"] == pytest.approx(log_loss(labels, p, labels=range(4)))
    precision, recall, f1, support = precision_recall_fscore_support(
        labels, logits.argmax(1), labels=range(4), zero_division=0
    )
    for c, one in enumerate(per_class(logits, labels)):
        assert (one["precision"], one["recall"], one["f1"]) == pytest.approx((precision[c], recall[c], f1[c]))
        assert one["support"] == support[c]
        assert one["predicted"] == (logits.argmax(1) == c).sum()
        assert one["hits"] == ((logits.argmax(1) == c) & (labels == c)).sum()


def test_scores_of_several_labels_are_those_of_scikit_learn(several):
    logits, labels = several
    p = 1 / (1 + np.exp(-logits))
    assert np.allclose(probabilities(logits, several=True), p)
    found = quality(logits, labels)
    assert found["mcc"] == pytest.approx(np.mean([matthews_corrcoef(labels[:, c], logits[:, c] > 0) for c in range(4)]))
    assert found["log_loss"] == pytest.approx(-np.mean(labels * np.log(p) + (1 - labels) * np.log(1 - p)))
    precision, recall, f1, support = precision_recall_fscore_support(labels, logits > 0, zero_division=0)
    for c, one in enumerate(per_class(logits, labels)):
        assert (one["precision"], one["recall"], one["f1"]) == pytest.approx((precision[c], recall[c], f1[c]))
        assert one["support"] == support[c]


def test_log_loss_and_kl_stay_finite_where_a_probability_becomes_0():
    logits, other = np.array([[2000.0, 0.0]]), np.array([[0.0, 2000.0]])
    assert quality(logits, np.array([1]))["log_loss"] == pytest.approx(2000)
    assert quality(logits, np.array([[0.0, 1.0]]))["log_loss"] == pytest.approx((2000 + math.log(2)) / 2)
    assert kl_to_teacher(logits, other, several=False) == pytest.approx(2000)
    assert kl_to_teacher(-other, other, several=True) == pytest.approx(2000)


@pytest.mark.parametrize("many", [False, True])
def test_kl_is_that_of_the_loss_at_temperature_1(many, single):
    from distill_nlp import KLDivergenceLoss
    from distill_nlp.losses.base import ModelShape
    from distill_nlp.outputs import Features

    own, teacher = single[0], single[0][::-1].copy()
    task = "multi_label_classification" if many else "single_label_classification"
    loss = KLDivergenceLoss(temperature=1.0)
    shape = ModelShape(num_labels=4, problem_type=task)
    loss.bind(shape, shape)
    given = [Features(torch.tensor(z), {}, {}) for z in (own, teacher)]
    # With several labels the report adds the classes up, and the loss takes their mean.
    assert kl_to_teacher(own, teacher, many) == pytest.approx(float(loss(*given, None, None)) * (4 if many else 1))
    assert kl_to_teacher(own, own, many) == 0


# ---- calibration ----


def test_a_confidence_falls_into_its_bin_and_a_bound_into_the_one_below():
    # Confidences 2/3 (a bound of 15 bins), 0.67, 0.9999 and 1.
    p = np.array([2 / 3, 0.67, 0.9999])
    logits = np.stack([np.log(p / (1 - p)), np.zeros(3)], axis=1)
    logits = np.concatenate([logits, [[1000.0, 0.0]]])
    bins = reliability(logits, np.array([0, 1, 0, 0]))
    assert len(bins) == CALIBRATION_BINS == 15
    assert {i: b["count"] for i, b in enumerate(bins) if b["count"]} in ({9: 1, 10: 1, 14: 2}, {10: 2, 14: 2})
    assert bins[14]["right"] == 1
    assert bins[14]["confidence"] == pytest.approx((0.9999 + 1) / 2)
    assert bins[0] == {"low": 0.0, "high": pytest.approx(1 / 15), "count": 0, "confidence": None, "right": None}
    # One third is the bound between the fifth bin and the sixth.
    assert [b["count"] for b in reliability(np.zeros((1, 3)), np.array([0]))][4:6] == [1, 0]
    exact = reliability(np.array([[0.0, 0.0]]), np.array([[1.0, 0.0]]))
    assert exact[7]["count"] == 2
    assert exact[7]["right"] == 0.5


@pytest.mark.parametrize("kind", ["single", "several"])
def test_the_calibration_error_is_that_of_a_loop(kind, request):
    logits, labels = request.getfixturevalue(kind)
    p = probabilities(logits, kind == "several")
    if kind == "several":
        pairs = [(p[i, c], labels[i, c]) for i in range(len(p)) for c in range(p.shape[1])]
    else:
        pairs = [(row.max(), row.argmax() == label) for row, label in zip(p, labels, strict=True)]
    expected = 0.0
    for b in range(15):
        inside = [(c, r) for c, r in pairs if b / 15 < c <= (b + 1) / 15]
        if inside:
            gap = abs(np.mean([c for c, _ in inside]) - np.mean([r for _, r in inside]))
            expected += len(inside) / len(pairs) * gap
    assert ece(reliability(logits, labels)) == pytest.approx(expected)
    assert expected > 0.02


def test_confusion_counts_rows_by_their_class_first(several):
    logits = np.eye(3)[[0, 0, 1, 2]]
    assert confusion(logits, np.array([0, 1, 1, 1])) == [[1, 0, 0], [1, 1, 1], [0, 0, 0]]
    assert confusion(*several) is None


# ---- memory ----


def test_the_memory_of_a_pass_is_what_it_takes_at_its_peak():
    def run():
        block = np.ones(60_000_000, dtype=np.uint8)
        return int(block[0])

    found = pass_memory(run, "cpu")
    if found["how"] is None:
        pytest.skip("the resident memory of a process cannot be read here")
    assert found["how"] == RESIDENT
    assert 55 < found["mb"] < 90
    assert pass_memory(lambda: None, "cpu")["mb"] < 20


def test_memory_that_cannot_be_read_is_said_to_be_so(monkeypatch):
    def refuse(*arguments, **settings):
        raise PermissionError

    monkeypatch.setattr("builtins.open", refuse)
    assert pass_memory(lambda: None, "cpu") == {"mb": None, "how": None}


def test_the_memory_of_another_device_is_not_that_of_the_process():
    ran = []
    assert pass_memory(lambda: ran.append(1), "mps") == {"mb": None, "how": None}
    assert ran == [1]


class Fake:
    """A model that takes a second per row and as much memory as it is told."""

    def __init__(self, lengths):
        self.rows = [{"input_ids": [0] * n} for n in lengths]
        self.parts = []

    def prepare(self, device):
        self.parts.clear()

    def seconds(self, part, device):
        self.parts.append(list(part))
        return float(len(part))


def test_memory_is_that_of_the_longest_rows_and_of_the_greatest_model_of_an_ensemble(monkeypatch):
    small, large = Fake([3, 9, 5, 7, 1]), Fake([3, 9, 5, 7, 1])
    taken = iter([{"mb": 1.0, "how": RESIDENT}, {"mb": 2.0, "how": RESIDENT}])
    monkeypatch.setattr(speed, "pass_memory", lambda run, device: [run(), next(taken)][1])
    settings = ReportSection(latency_samples=3, throughput_batch_size=2, throughput_batches=1)
    found = speed.measure_speed({"teacher": [small, large]}, settings, "cpu")["teacher"]
    assert small.parts[-1] == large.parts[-1] == [1, 3]
    assert found["pass_memory"] == {"rows": 2, "mb": 2.0, "how": RESIDENT}
    # Times of an ensemble add up.
    assert found["latency_ms"] == {"p50": 2000.0, "p95": 2000.0, "p99": 2000.0}
    assert found["throughput"] == 0.5


@pytest.mark.parametrize(("device", "warming"), [("cpu", 1), ("cuda", 3)])
def test_the_first_passes_are_not_counted(monkeypatch, device, warming):
    """Of each length on a GPU, which loads its kernels when it meets it."""

    class Warming(Fake):
        def seconds(self, part, device):
            super().seconds(part, device)
            return 1.0 if len(self.parts) > (warming if len(part) == 1 else warming + 3 + 1) else 100.0

    monkeypatch.setattr(speed, "pass_memory", lambda run, device: {"mb": 1.0, "how": RESIDENT})
    model = Warming([3, 9, 5])
    settings = ReportSection(latency_samples=3, throughput_batch_size=2, throughput_batches=1)
    found = speed.measure_speed({"student": [model]}, settings, device)["student"]
    assert found["latency_ms"] == {"p50": 1000.0, "p95": 1000.0, "p99": 1000.0}
    assert found["throughput"] == 2.0
    assert len(model.parts) == warming + 3 + 1 + 1


# ---- rows ----


def texts_of(lengths):
    return Dataset.from_dict({"text": [" ".join(["w5"] * n) for n in lengths], "labels": [0] * len(lengths)})


@pytest.mark.parametrize("pair", [False, True])
def test_a_row_is_cut_where_it_is_longer_than_what_is_read(pair):
    raw = texts_of([2, 8, 9, 20])
    if pair:
        raw = raw.add_column("text_pair", ["w6"] * 4)
    tokenizer = make_tokenizer()
    columns = [list(raw[c]) for c in ("text", "text_pair") if c in raw.column_names]
    tokens = tokenizer(*columns, truncation=True, max_length=12 if pair else 10)
    rows = read_rows(raw, tokens, tokenizer)
    assert rows.truncated.tolist() == [False, False, True, True]
    assert rows.lengths.tolist() == [n + 2 + 2 * pair for n in (2, 8, 9, 20)]
    assert rows.texts[0] == "w5 w5 ⇥ w6" if pair else "w5 w5"


def test_buckets_hold_all_lengths_once():
    lengths = np.array([3, 3, 3, 3, 3, 4, 5, 9])
    buckets = length_buckets(lengths)
    assert buckets == [(3, 3), (4, 4), (5, 9)]
    assert bucket_of(lengths, buckets).tolist() == [0, 0, 0, 0, 0, 1, 2, 2]
    assert length_buckets(np.array([7, 7])) == [(7, 7)]


def test_slices_score_each_part_by_hand():
    raw = texts_of([2, 2, 8, 20])
    rows = read_rows(raw, make_tokenizer()(list(raw["text"]), truncation=True, max_length=10), make_tokenizer())
    labels = np.array([0, 1, 0, 1])
    right, wrong = np.eye(2)[labels] * 3, np.eye(2)[1 - labels] * 3
    half = right.copy()
    half[:2] = wrong[:2]
    logits = {"teacher": right, "baseline/0": wrong, "baseline/1": right, "student/0": half, "student/1": half}
    found = {(s["by"], s["name"]): s for s in slices(rows, logits, labels, [0, 1])}
    assert [s["rows"] for s in found.values()] == [2, 1, 1, 3, 1]
    assert found["length", "4 tokens"] == {
        "by": "length",
        "name": "4 tokens",
        "rows": 2,
        "teacher": 1.0,
        "baseline": 0.5,
        "student": 0.0,
    }
    assert found["truncated", "cut"]["student"] == 1.0
    assert found["truncated", "read whole"]["student"] == pytest.approx(1 / 3)


def test_slices_of_several_labels_leave_out_classes_that_do_not_occur_in_them():
    raw = texts_of([2, 2, 8])
    rows = read_rows(raw, make_tokenizer()(list(raw["text"])), make_tokenizer())
    labels = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    good = np.where(labels > 0, 2.0, -2.0)
    found = slices(rows, {"teacher": good, "baseline/0": -good, "student/0": good}, labels, [0])
    assert [(s["teacher"], s["baseline"]) for s in found] == [(1.0, 0.0), (1.0, 0.0)]


# ---- curves ----


def write_log(folder, entries):
    folder.mkdir(parents=True)
    (folder / "training_log.json").write_text(json.dumps({"log": entries}))


def test_each_term_is_a_panel_and_each_seed_a_curve_in_it(tmp_path):
    for seed in (0, 1):
        entries = [{"step": s, "loss": 2.0, "loss_ce": 1.0 * s, "loss_kl": 0.5} for s in (1, 2, 3)]
        entries += [
            {"step": 3, "eval_accuracy": 0.7},
            {"step": 3, "eval_accuracy": 0.9},
            {"train_runtime": 1, "step": 3},
        ]
        write_log(tmp_path / f"student/seed-{seed}", entries)
    write_log(tmp_path / "teacher", [{"step": 1, "loss": 1.0, "loss_ce": 1.0}])
    write_log(tmp_path / "student/seed-0-phase-1", [{"step": 1, "loss": 1.0, "loss_hidden": 1.0}])
    stages = dict.fromkeys(["teacher", "student/seed-0-phase-1", "student/seed-0", "student/seed-1", "gone"])
    panels = {(p.kind, p.term): p.curves for p in read_panels(tmp_path, stages, "accuracy")}
    assert list(panels) == [
        ("teacher", "loss_ce"),
        ("student, phase 1", "loss_hidden"),
        *(("student", term) for term in ("loss", "loss_ce", "loss_kl", "eval_accuracy")),
    ]
    assert panels["student", "loss_ce"] == {f"student/seed-{s}": ([1, 2, 3], [1.0, 2.0, 3.0]) for s in (0, 1)}
    assert panels["student", "eval_accuracy"]["student/seed-0"] == ([3], [0.7])


def test_a_long_log_is_thinned_to_its_last_step(tmp_path):
    write_log(tmp_path / "teacher", [{"step": s, "loss": 1.0, "loss_ce": float(s)} for s in range(1, 1203)])
    (panel,) = read_panels(tmp_path, {"teacher": {}}, "accuracy")
    steps, values = panel.curves["teacher"]
    assert len(steps) <= MOST_POINTS + 1
    assert (steps[0], steps[-1], values[-1]) == (1, 1202, 1202.0)
