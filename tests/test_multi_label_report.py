"""Scores of several labels per row, against scikit-learn and loops, and a report that compares macro-F1."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers import LABELS, make_dataset, make_student, make_teacher, make_tokenizer
from sklearn.metrics import accuracy_score, f1_score
from transformers import EvalPrediction

from distill_nlp.config import ReportSection
from distill_nlp.metrics import compute_metrics, decisions, f1, multi_label_metrics
from distill_nlp.report import ReportTeacher, build_report, render_markdown, statistics, write_report
from distill_nlp.report.build import compare_seeds
from distill_nlp.report.render import summary_lines, table_rows, verdict
from distill_nlp.report.scores import agreement, right_rows
from distill_nlp.report.statistics import bootstrap_f1, bootstrap_means, mcnemar

MULTI_LABEL = "multi_label_classification"


def some_labels(rows=60, classes=5, seed=0):
    """Class 3 has no row, class 4 is in all."""
    wanted = np.random.default_rng(seed).random((rows, classes)) < 0.3
    wanted[:, 3], wanted[:, 4] = False, True
    return wanted


def some_logits(wanted, flips=0.2, seed=1):
    """Logits whose decisions are these labels, but for a part of them; class 3 is never named."""
    rng = np.random.default_rng(seed)
    named = wanted ^ (rng.random(wanted.shape) < flips)
    named[:, 3] = False
    return np.where(named, 1.0, -1.0) * rng.uniform(0.1, 3.0, wanted.shape)


# ---- metrics ----


@pytest.mark.parametrize("flips", [0.0, 0.2, 0.7])
def test_scores_are_those_of_scikit_learn(flips):
    wanted = some_labels()
    logits = some_logits(wanted, flips)
    found = multi_label_metrics(decisions(logits), wanted.astype(float))
    assert found == compute_metrics(EvalPrediction(logits, wanted.astype(np.float32)))
    assert found["accuracy"] == pytest.approx(accuracy_score(wanted, logits > 0))
    for average in ("macro", "micro"):
        expected = f1_score(wanted, logits > 0, average=average, zero_division=0)
        assert found[f"f1_{average}"] == pytest.approx(expected)


def test_a_class_applies_above_a_probability_of_one_half():
    assert decisions(np.array([[-1e-6, 0.0, 1e-6]])).tolist() == [[False, False, True]]


def test_f1_without_anything_there_or_named_is_0():
    assert f1(np.array([0, 3]), np.array([0, 6])).tolist() == [0.0, 1.0]


# ---- resamples ----


@pytest.mark.parametrize("copies", [1, 12])
def test_the_bootstrap_of_macro_f1_is_that_of_scikit_learn_on_each_resample(copies):
    """Rows of their own, and rows of which there are twelve each."""
    wanted = some_labels(rows=30)
    found = [np.tile(some_logits(wanted, flips, seed) > 0, (copies, 1)) for flips, seed in ((0.1, 1), (0.5, 2))]
    wanted = np.tile(wanted, (copies, 1))
    first, sizes = statistics._patterns(np.concatenate([wanted, *found], axis=1))
    assert (len(first) == len(wanted)) == (copies == 1)
    values = bootstrap_f1(found, wanted, samples=120, seed=7)
    counts = np.concatenate([counts for _, counts in statistics._draws(sizes, 120, seed=7)])
    assert values.shape == (120, 2)
    # Over the edge between two chunks.
    for sample in (0, 1, 99, 100, 119):
        drawn = np.repeat(first, counts[sample])
        assert len(drawn) == len(wanted)
        for k, named in enumerate(found):
            expected = f1_score(wanted[drawn], named[drawn], average="macro", zero_division=0)
            assert values[sample, k] == pytest.approx(expected)


@pytest.mark.parametrize("copies", [1, 12])
@pytest.mark.parametrize(("most", "sizes"), [(90, [3, 3, 1]), (5, [1] * 7)])
def test_many_rows_are_drawn_in_smaller_chunks_and_alike(monkeypatch, most, sizes, copies):
    columns = np.tile(np.random.default_rng(0).random((30, 2)), (copies, 1))
    wanted = np.tile(some_labels(rows=30), (copies, 1))
    means, values = bootstrap_means(columns, 7), bootstrap_f1([wanted], wanted, 7)
    monkeypatch.setattr(statistics, "_MOST_COUNTS", most)
    assert [len(counts) for _, counts in statistics._draws(statistics._patterns(columns)[1], 7, seed=0)] == sizes
    assert np.allclose(bootstrap_means(columns, 7), means, rtol=1e-14)
    assert np.allclose(bootstrap_f1([wanted], wanted, 7), values, rtol=1e-14)


# ---- the comparison ----


def models_of(wanted, seeds=(0, 1)):
    models = {"teacher": some_logits(wanted, 0.05, 3)}
    models |= {f"baseline/{seed}": some_logits(wanted, 0.3, 10 + seed) for seed in seeds}
    return models | {f"student/{seed}": some_logits(wanted, 0.1, 20 + seed) for seed in seeds}


def macro(wanted, logits):
    return f1_score(wanted, logits > 0, average="macro", zero_division=0)


def test_models_are_compared_by_macro_f1_and_rows_by_exact_matches():
    wanted = some_labels(300)
    models = models_of(wanted)
    found = compare_seeds(models, wanted.astype(float), [0, 1], 500)
    scores = {name: macro(wanted, logits) for name, logits in models.items()}
    teacher = scores["teacher"]
    baseline, student = (np.mean([scores[f"{kind}/{seed}"] for seed in (0, 1)]) for kind in ("baseline", "student"))
    assert found["difference"]["value"] == pytest.approx(student - baseline)
    assert found["retention"]["value"] == pytest.approx(student / teacher)
    assert found["gap_closed"]["value"] == pytest.approx((student - baseline) / (teacher - baseline))
    assert "accuracy_intervals" not in found
    for name, value in (("teacher", teacher), ("baseline", baseline), ("student", student)):
        low, high = found["f1_macro_intervals"][name]
        assert low < value < high
        assert name != "teacher" or high - low < 0.2
    low, high = found["difference"]["rows_interval"]
    assert 0 < low < student - baseline < high
    assert high - low < 0.2
    wide = found["difference"]["interval"]
    assert wide[0] < low < high < wide[1]
    for seed in (0, 1):
        right = [((models[f"{kind}/{seed}"] > 0) == wanted).all(axis=1) for kind in ("student", "baseline")]
        expected = mcnemar(*right)
        assert found["mcnemar"]["seeds"][str(seed)] == {
            "student_only": expected["a_only"],
            "baseline_only": expected["b_only"],
            "p_value": expected["p_value"],
        }


def test_the_interval_of_macro_f1_knows_that_seeds_differ():
    wanted = some_labels(2000)
    models = models_of(wanted)
    models["student/0"], models["student/1"] = some_logits(wanted, 0.15, 4), some_logits(wanted, 0.45, 5)
    difference = compare_seeds(models, wanted.astype(float), [0, 1], 500)["difference"]
    assert difference["interval"][0] < difference["value"] - 0.05
    assert difference["interval"][1] > difference["value"] + 0.05


def test_rows_are_right_where_all_their_labels_are():
    labels = np.array([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    logits = np.array([[1.0, -1.0], [-1.0, 2.0], [3.0, 1.0]])
    assert right_rows(logits, labels).tolist() == [True, False, True]
    assert right_rows(logits, np.array([0, 0, 0])).tolist() == [True, False, True]


def test_models_agree_by_rows_and_classes():
    one, other = np.array([[1.0, -1.0], [-1.0, 2.0]]), np.array([[3.0, 1.0], [-2.0, 1.0]])
    assert agreement(one, other, several=True) == 0.75
    assert agreement(one, other, several=False) == 1.0


# ---- the report ----


def rows_of_several(rows=40):
    labels = (np.random.default_rng(5).random((rows, 3)) < 0.4).astype(float).tolist()
    return make_dataset(rows=rows).remove_columns("labels").add_column("labels", labels)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    root, task = tmp_path_factory.mktemp("models"), {"problem_type": MULTI_LABEL}
    models = {"teacher": make_teacher(**task), "other": make_teacher(seed=5, **task)}
    for seed in (0, 1):
        models[f"baseline{seed}"] = make_student(seed=10 + seed, **task)
        models[f"student{seed}"] = make_student(seed=20 + seed, **task)
    for name, model in models.items():
        model.save_pretrained(root / name)
    rows = rows_of_several()
    return build_report(
        teachers=[ReportTeacher(str(root / name), rows, make_tokenizer()) for name in ("teacher", "other")],
        baselines={s: root / f"baseline{s}" for s in (0, 1)},
        students={s: root / f"student{s}" for s in (0, 1)},
        tokenizer=make_tokenizer(),
        test=rows,
        label_names=list(LABELS),
        settings=ReportSection(latency_samples=3, throughput_batch_size=4, throughput_batches=2, bootstrap_samples=200),
    )


def test_the_report_says_its_task_and_metric_and_agrees_with_scikit_learn(report):
    wanted = np.array(rows_of_several()["labels"]).astype(bool)
    assert (report["problem_type"], report["metric"]) == (MULTI_LABEL, "f1_macro")
    for seed in (0, 1):
        logits, found = report["logits"][f"student/{seed}"], report["models"]["student"]["seeds"][str(seed)]
        assert found["f1_macro"] == pytest.approx(macro(wanted, logits))
        assert found["f1_micro"] == pytest.approx(f1_score(wanted, logits > 0, average="micro"))
        assert found["accuracy"] == pytest.approx(((logits > 0) == wanted).all(axis=1).mean())
        assert found["agreement"] == pytest.approx(((logits > 0) == (report["logits"]["teacher"] > 0)).mean())
    by_seed = [s["f1_macro"] for s in report["models"]["student"]["seeds"].values()]
    summary = report["models"]["student"]["f1_macro"]
    assert summary == {"mean": pytest.approx(np.mean(by_seed)), "sd": pytest.approx(np.std(by_seed, ddof=1))}
    assert {"f1_micro", "accuracy", "agreement"} <= report["models"]["baseline"].keys()


def test_teachers_of_several_labels_are_averaged_by_sigmoids(report):
    ensemble = report["models"]["teacher"]["ensemble"]
    assert [member.keys() >= {"f1_macro", "f1_micro", "accuracy"} for member in ensemble] == [True, True]
    rows, means = rows_of_several(), []
    from distill_nlp.inference import predict_logits

    for seed in (1, 5):
        logits = predict_logits(make_teacher(seed=seed, problem_type=MULTI_LABEL), make_tokenizer(), rows)
        means.append(1 / (1 + np.exp(-logits.astype(float))))
    found = 1 / (1 + np.exp(-report["logits"]["teacher"].astype(float)))
    assert np.allclose(found, np.mean(means, axis=0), atol=1e-5)


def test_the_tables_show_macro_f1_first_then_micro_f1_and_exact_matches(report, tmp_path):
    rows = table_rows(report)
    titles = ["macro-F1", "  95% interval", "micro-F1", "exact match", "agreement with the teacher, per row and class"]
    assert [row[0] for row in rows][:5] == titles
    student = report["models"]["student"]
    for row, key in ((0, "f1_macro"), (2, "f1_micro"), (3, "accuracy"), (4, "agreement")):
        assert rows[row][3] == f"{student[key]['mean']:.4f} ± {student[key]['sd']:.4f}"
    assert rows[4][1] == ""
    low, high = report["comparison"]["f1_macro_intervals"]["baseline"]
    assert rows[1][2] == f"{low:.4f} … {high:.4f}"
    lines = summary_lines(report)
    assert lines[0].startswith("retention (student / teacher macro-F1): ")
    assert "points of macro-F1" in lines[2]
    assert lines[3].startswith("McNemar on rows whose labels are all right, seed 0: only the student right on ")
    write_report(report, tmp_path)
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == render_markdown(report)
    assert "| micro-F1 |" in render_markdown(report)
    assert json.loads((tmp_path / "report.json").read_text())["metric"] == "f1_macro"


@pytest.mark.parametrize(("bounds", "expected"), [([0.01, 0.03], "beats"), ([-0.03, -0.01], "is WORSE than")])
def test_the_verdict_names_macro_f1(bounds, expected):
    value = bounds[0] + 0.01
    comparison = {"difference": {"value": value, "interval": bounds}, "mcnemar": {"seeds": {"0": {}, "1": {}}}}
    found = verdict({"metric": "f1_macro", "comparison": comparison})
    assert f"{expected} the plain baseline by 2.00 points of macro-F1." in found
