"""The statistics against loops, and a report that says what the numbers allow."""

from __future__ import annotations

import json
import math
import time

import numpy as np
import pytest
import torch
from helpers import make_dataset, make_student, make_teacher, make_tokenizer

from distill_nlp.config import ReportSection
from distill_nlp.metrics import ClassificationMetrics, compute_metrics
from distill_nlp.report import ReportTeacher, build_report, machine, render_markdown, terminal_table, write_report
from distill_nlp.report.render import verdict
from distill_nlp.report.statistics import bootstrap_means, gap_closed, interval, mcnemar, seed_shifts


def test_mcnemar_is_the_exact_binomial_test():
    a = np.array([1] * 9 + [0] * 2 + [1] * 50 + [0] * 5, dtype=bool)
    b = np.array([0] * 9 + [1] * 2 + [1] * 50 + [0] * 5, dtype=bool)
    result = mcnemar(a, b)
    assert (result["a_only"], result["b_only"]) == (9, 2)
    # Two-sided: all outcomes no likelier than 9 of 11.
    expected = sum(math.comb(11, k) for k in range(12) if math.comb(11, k) <= math.comb(11, 9)) / 2**11
    assert result["p_value"] == pytest.approx(expected)
    assert mcnemar(a, a)["p_value"] == 1.0


def test_the_bootstrap_is_paired_and_has_the_right_spread():
    rng = np.random.default_rng(0)
    a = (rng.random(400) < 0.8).astype(float)
    means = bootstrap_means(np.stack([a, a], axis=1), samples=2000)
    assert np.array_equal(means[:, 0], means[:, 1])
    assert means[:, 0].mean() == pytest.approx(a.mean(), abs=0.003)
    assert means[:, 0].std() == pytest.approx(a.std() / math.sqrt(400), rel=0.1)
    low, high = interval(means[:, 0])
    assert low < a.mean() < high


def test_resamples_of_equal_rows_are_distributed_as_those_of_single_ones():
    """Means, spread and correlation of two models' accuracies against rows drawn one by one."""
    rng = np.random.default_rng(0)
    a = rng.random(300) < 0.8
    columns = np.stack([a, np.where(rng.random(300) < 0.7, a, ~a)], axis=1).astype(float)
    rows = rng.integers(300, size=(4000, 300))
    drawn, means = columns[rows].mean(axis=1), bootstrap_means(columns, samples=4000)
    assert means.mean(axis=0) == pytest.approx(drawn.mean(axis=0), abs=0.002)
    assert means.std(axis=0) == pytest.approx(drawn.std(axis=0), rel=0.05)
    assert np.corrcoef(means.T)[0, 1] == pytest.approx(np.corrcoef(drawn.T)[0, 1], abs=0.05)


def test_the_time_of_the_bootstrap_does_not_grow_with_the_rows():
    right = np.random.default_rng(0).random((100_000, 3)) < 0.8
    start = time.process_time()
    bootstrap_means(right.astype(float), samples=2000)
    took = time.process_time() - start
    start = time.process_time()
    np.random.default_rng(0).multinomial(100_000, np.full(100_000, 1e-5), size=100)
    assert took < time.process_time() - start


def test_gap_closed_is_not_defined_without_a_gap():
    assert float(gap_closed(0.9, 0.8, 0.85)) == pytest.approx(0.5)
    assert math.isnan(float(gap_closed(0.8, 0.8, 0.85)))
    assert math.isnan(float(gap_closed(0.7, 0.8, 0.75)))
    assert interval(np.array([np.nan, np.nan])) is None
    # A fifth undefined: the rest would be the lucky ones.
    assert interval(np.array([np.nan] * 20 + [0.5] * 80)) is None
    assert interval(np.array([np.nan] * 2 + [0.5] * 98)) == [0.5, 0.5]


def test_the_interval_of_the_difference_knows_that_seeds_differ():
    """Two seeds with opposite results: rows alone would give a narrow interval around their mean."""
    from distill_nlp.report.build import compare_seeds

    rng = np.random.default_rng(0)
    labels = np.zeros(2000, dtype=int)

    def logits(accuracy):
        wrong = rng.random(2000) > accuracy
        return np.stack([~wrong, wrong], axis=1).astype(float)

    models = {"teacher": logits(0.95), "baseline/0": logits(0.80), "baseline/1": logits(0.80)}
    models |= {"student/0": logits(0.90), "student/1": logits(0.72)}
    difference = compare_seeds(models, labels, [0, 1], 1000)["difference"]
    assert difference["value"] == pytest.approx(0.01, abs=0.02)
    assert difference["interval"][0] < -0.06
    assert difference["interval"][1] > 0.08
    low, high = difference["rows_interval"]
    assert -0.02 < low < high < 0.04


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_the_interval_over_rows_and_seeds_covers_what_it_says(seeds):
    """Models of the same mean accuracy, which differ by seed much more than by rows: 5% of the intervals miss 0."""
    from distill_nlp.report.build import compare_seeds

    rng, labels, missed = np.random.default_rng(seeds), np.zeros(4000, dtype=int), 0

    def logits():
        wrong = rng.random(len(labels)) > rng.normal(0.80, 0.03)
        return np.stack([~wrong, wrong], axis=1).astype(float)

    runs = 150
    for _ in range(runs):
        kinds = {f"{kind}/{seed}": logits() for kind in ("baseline", "student") for seed in range(seeds)}
        found = compare_seeds({"teacher": logits(), **kinds}, labels, list(range(seeds)), 400)["difference"]
        low, high = found["interval"]
        missed += not low < 0 < high
    # More than 17 of 150 at 5% are one chance in a thousand. Seeds drawn with replacement miss up to half of them.
    assert missed <= 17


def test_the_shifts_of_seeds_are_students_t():
    own = np.array([0.81, 0.84, 0.80, 0.86])
    moved = seed_shifts(4, 200_000) @ (own - own.mean())
    error = own.std(ddof=1) / 2
    assert np.quantile(moved / error, [0.025, 0.5, 0.975]) == pytest.approx([-3.182, 0.0, 3.182], abs=0.05)
    assert not seed_shifts(1, 5).any()


def test_macro_f1_counts_a_class_that_is_never_predicted():
    result = ClassificationMetrics().compute(predictions=[0, 0, 1, 1], references=[0, 0, 1, 2], labels=[0, 1, 2])
    assert result["accuracy"] == 0.75
    assert result["f1_macro"] == pytest.approx((1 + 2 / 3 + 0) / 3)


def test_compute_metrics_takes_what_the_trainer_gives():
    from transformers import EvalPrediction

    logits = np.array([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0]])
    assert compute_metrics(EvalPrediction(logits, np.array([0, 1, 1])))["accuracy"] == pytest.approx(2 / 3)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    models = {"teacher": make_teacher()}
    for seed in (0, 1):
        models[f"baseline{seed}"] = make_student(seed=10 + seed)
        models[f"student{seed}"] = make_student(seed=20 + seed)
    for name, model in models.items():
        model.save_pretrained(root / name)
    return build_report(
        teachers=[ReportTeacher(str(root / "teacher"), make_dataset(rows=40), make_tokenizer())],
        baselines={s: root / f"baseline{s}" for s in (0, 1)},
        students={s: root / f"student{s}" for s in (0, 1)},
        tokenizer=make_tokenizer(),
        test=make_dataset(rows=40),
        label_names=["negative", "neutral", "positive"],
        settings=ReportSection(latency_samples=3, throughput_batch_size=4, throughput_batches=2, bootstrap_samples=200),
    )


def test_the_report_agrees_with_a_count_by_hand(report):
    logits, labels = report["logits"], report["logits"]["labels"]
    for seed in (0, 1):
        right = [int(np.argmax(row)) == label for row, label in zip(logits[f"student/{seed}"], labels, strict=True)]
        assert report["models"]["student"]["seeds"][str(seed)]["accuracy"] == pytest.approx(sum(right) / len(right))
        same = [
            int(np.argmax(a)) == int(np.argmax(b))
            for a, b in zip(logits[f"student/{seed}"], logits["teacher"], strict=True)
        ]
        assert report["models"]["student"]["seeds"][str(seed)]["agreement"] == pytest.approx(sum(same) / len(same))
    by_seed = [s["accuracy"] for s in report["models"]["student"]["seeds"].values()]
    summary = report["models"]["student"]["accuracy"]
    assert summary["mean"] == pytest.approx(sum(by_seed) / 2)
    assert summary["sd"] == pytest.approx(abs(by_seed[0] - by_seed[1]) / math.sqrt(2))
    baseline = report["models"]["baseline"]["accuracy"]["mean"]
    assert report["comparison"]["difference"]["value"] == pytest.approx(summary["mean"] - baseline)
    retention = report["comparison"]["retention"]["value"]
    assert retention == pytest.approx(summary["mean"] / report["models"]["teacher"]["accuracy"])


def test_the_logits_are_the_models_own_in_the_order_of_the_rows(report):
    import torch
    from helpers import make_batch

    row = make_batch(make_dataset(rows=40), rows=[7])
    with torch.no_grad():
        expected = make_teacher()(**{k: v for k, v in row.items() if k != "labels"}).logits[0]
    assert np.allclose(report["logits"]["teacher"][7], expected.numpy(), atol=1e-5)


def test_the_report_is_written_and_read_back(report, tmp_path):
    write_report(report, tmp_path)
    saved = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert saved["models"]["teacher"]["latency_ms"]["p50"] > 0
    assert saved["models"]["student"]["parameters"] < saved["models"]["teacher"]["parameters"]
    assert saved["models"]["student"]["size_mb"] > 0
    assert "logits" not in saved
    assert set(np.load(tmp_path / "predictions.npz")) == set(report["logits"])
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert markdown == render_markdown(report)
    for word in ("accuracy", "macro-F1", "agreement", "latency", "throughput", "McNemar", "gap closed", "retention"):
        assert word in markdown
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_the_table_can_be_shown(report):
    from rich.console import Console

    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(terminal_table(report))
    assert "distilled student" in console.export_text()


OF_THESE = "; 3 seeds say nothing sure of others."


@pytest.mark.parametrize(
    ("seeds", "value", "bounds", "of_rows", "expected"),
    [
        (3, 0.02, [0.01, 0.03], [0.015, 0.025], "The distilled student beats the plain baseline by 2.00 points."),
        (3, -0.02, [-0.03, -0.01], [-0.03, -0.01], "The distilled student is WORSE than the plain baseline by 2.00 "),
        (3, 0.02, [-0.01, 0.05], [0.01, 0.03], "These 3 distilled students beat their plain baselines by 2.00 points"),
        (3, 0.02, [-0.01, 0.05], [0.01, 0.03], OF_THESE),
        (3, -0.02, [-0.05, 0.01], [-0.03, -0.01], "These 3 distilled students are WORSE than their plain baselines"),
        (3, 0.02, [-0.01, 0.05], [-0.01, 0.05], "No difference"),
        (3, 0.02, [-0.01, 0.05], None, "No difference"),
        (1, 0.02, [0.01, 0.03], [0.01, 0.03], "This distilled student beats its plain baseline by 2.00 points; one "),
        (1, -0.02, [-0.03, -0.01], [-0.03, -0.01], "This distilled student is WORSE than its plain baseline by"),
        (1, 0.02, [-0.01, 0.05], [-0.01, 0.05], "No difference"),
    ],
)
def test_the_verdict_claims_no_more_than_the_intervals(seeds, value, bounds, of_rows, expected):
    difference = {"value": value, "interval": bounds} | ({} if of_rows is None else {"rows_interval": of_rows})
    tests = {"seeds": dict.fromkeys(map(str, range(seeds)))}
    assert expected in verdict({"comparison": {"difference": difference, "mcnemar": tests}})


def test_a_teacher_with_permuted_labels_is_read_by_name(tmp_path):
    teacher = make_teacher(id2label={0: "positive", 1: "negative", 2: "neutral"})
    for name, model in (("teacher", teacher), ("baseline", make_student(seed=10)), ("student", make_student(seed=20))):
        model.save_pretrained(tmp_path / name)
    result = build_report(
        teachers=[ReportTeacher(str(tmp_path / "teacher"), make_dataset(rows=12), make_tokenizer())],
        baselines={0: tmp_path / "baseline"},
        students={0: tmp_path / "student"},
        tokenizer=make_tokenizer(),
        test=make_dataset(rows=12),
        label_names=["negative", "neutral", "positive"],
        settings=ReportSection(latency_samples=1, throughput_batch_size=2, throughput_batches=1, bootstrap_samples=100),
    )
    plain = make_teacher()
    from distill_nlp.inference import predict_logits

    own_order = predict_logits(plain, make_tokenizer(), make_dataset(rows=12))
    assert np.allclose(result["logits"]["teacher"], own_order[:, [1, 2, 0]], atol=1e-5)


def test_a_device_is_the_same_machine_with_and_without_its_number():
    """A launcher numbers it."""
    assert machine(torch.device("cpu", 0)) == machine("cpu") == machine(torch.device("cpu"))
