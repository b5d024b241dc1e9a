"""The command on texts with several labels, on tiny data and models: all stages, and what each makes of lists."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import TOPICS, label_config, make_student, make_teacher, make_tokenizer, write_rows_of_several_labels
from test_sweep_plan import write_sweep

from distill_nlp.cli import main
from distill_nlp.config_file import load_experiment
from distill_nlp.errors import UsageError
from distill_nlp.inference import predict_logits
from distill_nlp.loading import load_classifier
from distill_nlp.materials import Materials
from distill_nlp.metrics import decisions, multi_label_metrics
from distill_nlp.pipeline import Pipeline
from distill_nlp.stages import StageFolder

ROOT = Path(__file__).parent.parent
MULTI_LABEL = "multi_label_classification"
SINGLE_LABEL = "single_label_classification"
LOGITS_ONLY = {"losses": {"ce": {"weight": 0.3}, "kl": {"weight": 0.7}}}
# Enough to learn which word stands for which label.
LONGER = {
    "training__max_steps": 60,
    "training__eval_steps": 60,
    "training__learning_rate": 0.003,
    "teacher__training__max_steps": 60,
    "teacher__overrides": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "student__overrides": {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0},
}

slow = pytest.mark.slow
no_doctor = pytest.mark.usefixtures("no_doctor")


@pytest.fixture
def several(experiment, tmp_path):
    """`several(dotted changes)`: the path of a config of a tiny multi-label experiment."""
    write_rows_of_several_labels(tmp_path / "topics")
    data = {"data__dataset": str(tmp_path / "topics"), "data__label_column": "labels", "data__label_names": None}
    return lambda **changes: experiment(**(data | changes))


@pytest.fixture
def finished(tmp_path):
    """`finished(labels, **config changes)`: the folder of a finished classifier."""

    def make(labels=TOPICS, **changes) -> str:
        make_teacher(**(label_config(labels) | {"problem_type": MULTI_LABEL} | changes)).save_pretrained(tmp_path / "t")
        make_tokenizer().save_pretrained(tmp_path / "t")
        return str(tmp_path / "t")

    return make


def record_of(folder) -> dict:
    return json.loads((folder / "stage.json").read_text())


def validation_rows(materials):
    return materials.tokens_alone(materials.splits.validation)


# ---- all stages ----


@slow
@no_doctor
def test_texts_with_several_labels_go_through_all_stages(several, tmp_path, capsys):
    config = several(data__unlabeled="pool", training__logging_steps=1)
    assert main(["run", str(config)]) == 0
    said, run = capsys.readouterr(), tmp_path / "run"
    for name in ("teacher", "baseline/seed-0", "student/seed-0"):
        config_of = json.loads((run / name / "config.json").read_text())
        assert config_of["problem_type"] == MULTI_LABEL
        assert list(config_of["id2label"].values()) == list(TOPICS)
        record = record_of(run / name)
        assert {"accuracy", "f1_macro", "f1_micro"} <= record["validation"].keys()
        assert record["fingerprint"]["training"]["metric_for_best_model"] == "f1_macro"
    report = json.loads((run / "report.json").read_text())
    assert (report["problem_type"], report["metric"], report["test_rows"]) == (MULTI_LABEL, "f1_macro", 24)
    score = record_of(run / "student" / "seed-0")["validation"]["f1_macro"]
    assert f"s, validation f1_macro {score:.4f} → {run / 'student' / 'seed-0'}" in said.err
    assert "step 2/3: validation f1_macro" in said.err
    assert "validation accuracy" not in said.err
    for word in ("macro-F1", "micro-F1", "exact match", "McNemar on rows whose labels are all right, seed 0"):
        assert word in said.out
    assert main(["run", str(config)]) == 0
    assert capsys.readouterr().err.count("done already") == 4
    assert main(["run", str(config), "--stages", "student", "--training.metric_for_best_model", "accuracy"]) == 2
    assert "training.metric_for_best_model: f1_macro → accuracy" in capsys.readouterr().err


@slow
@no_doctor
def test_teacher_and_student_learn_which_labels_apply(several, tmp_path, capsys):
    config = several(**LONGER, **LOGITS_ONLY, data__unlabeled="pool")
    assert main(["run", str(config), "--stages", "teacher,student"]) == 0
    materials = Materials(load_experiment(config))
    rows = validation_rows(materials)
    for name in ("teacher", "student/seed-0"):
        folder = tmp_path / "run" / name
        logits = predict_logits(load_classifier(str(folder)), materials.tokenizer, rows)
        scores = multi_label_metrics(decisions(logits), np.array(rows["labels"]))
        assert scores["f1_macro"] > 0.9
        assert record_of(folder)["validation"]["f1_macro"] == pytest.approx(scores["f1_macro"])

    capsys.readouterr()
    student = str(tmp_path / "run" / "student" / "seed-0")
    assert main(["predict", student, "w4 w6 w20", "w30  w40", "w5"]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert {*lines[0][0].split(",")} == {"food", "sport"}
    scores = [float(score) for score in lines[0][1].split(",")]
    assert len(scores) == 2
    assert scores[0] >= scores[1] > 0.5
    assert lines[1] == ["-", "-", "w30 w40"]
    assert (lines[2][0], lines[2][2]) == ("money", "w5")
    assert main(["predict", student, "w4 w6 w20", "w30 w40", "--format", "jsonl"]) == 0
    both, none = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert none["labels"] == []
    assert sorted(both["labels"]) == ["food", "sport"]
    assert both.keys() == {"text", "labels", "scores"}
    assert list(both["scores"]) == list(TOPICS)
    assert both["scores"][both["labels"][0]] == max(both["scores"].values())
    assert sum(both["scores"].values()) > 1.2


@slow
@no_doctor
@pytest.mark.parametrize("ranks", [1, 2])
def test_it_runs_on_one_rank_and_on_two(several, tmp_path, ranks):
    """Also where a batch of one rank has no label at all, and validation rows do not fill the last batches."""
    config = several(**LOGITS_ONLY, data__unlabeled="pool", training__per_device_eval_batch_size=5)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    stages = ["--stages", "teacher,baseline,student"]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "distill_nlp", "run", str(config), "--no-doctor", *stages],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    materials = Materials(load_experiment(config))
    rows = validation_rows(materials)
    for name in ("teacher", "baseline/seed-0", "student/seed-0"):
        folder = tmp_path / "run" / name
        assert record_of(folder)["fingerprint"]["launch"]["processes"] == ranks
        logits = predict_logits(load_classifier(str(folder)), materials.tokenizer, rows)
        expected = multi_label_metrics(decisions(logits), np.array(rows["labels"]))
        found = record_of(folder)["validation"]
        assert {key: found[key] for key in expected} == pytest.approx(expected)


@slow
@no_doctor
def test_phases_ensembles_copied_heads_and_pseudo_labels_take_lists(several, tmp_path, capsys):
    config = several(
        data__unlabeled="pool",
        data__pseudo_labels=True,
        teacher__ensemble=[{"seed": 1}],
        student__from_teacher={"layers": 2, "weights": "finetuned"},
        losses={"kl": {}},
        phases=[{"losses": {"ce": {}}}, {}],
    )
    assert main(["run", str(config)]) == 0
    said = capsys.readouterr().err
    assert "20 unlabeled rows labeled by the teacher" in said
    assert "head copied" in said
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert len(report["models"]["teacher"]["ensemble"]) == 2
    for phase in ("student/seed-0-phase-1", "student/seed-0"):
        assert record_of(tmp_path / "run" / phase)["fingerprint"]["training"]["metric_for_best_model"] == "f1_macro"


@slow
@no_doctor
def test_a_finished_teacher_of_other_label_order_is_used_as_it_is(several, finished, tmp_path, capsys):
    teacher = finished(("sport", "food", "money"))
    config = several(teacher={"model": teacher}, **LOGITS_ONLY)
    assert main(["run", str(config)]) == 0
    assert "is a classifier for these labels already: not trained" in capsys.readouterr().err
    materials = Materials(load_experiment(config))
    rows = materials.tokens_alone(materials.splits.test)
    logits = predict_logits(load_classifier(teacher), make_tokenizer(), rows)[:, [1, 2, 0]]
    expected = multi_label_metrics(decisions(logits), np.array(rows["labels"]))
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert {key: report["models"]["teacher"][key] for key in expected} == pytest.approx(expected)


@slow
@no_doctor
def test_the_cache_is_filled_ahead_and_a_dry_run_takes_two_steps(several, capsys):
    config = str(several(**LOGITS_ONLY, data__unlabeled="pool"))
    assert main(["run", config, "--dry-run"]) == 0
    assert capsys.readouterr().err.count("dry run: 2 steps") == 3
    for stage, tried in (("student", 1), ("teacher,baseline", 2)):
        assert main(["run", config, "--dry-run", "--stages", stage]) == 0
        assert capsys.readouterr().err.count("dry run: 2 steps") == tried
    assert main(["run", config, "--stages", "teacher"]) == 0
    assert main(["cache", config]) == 0
    assert "68 rows, 0.0% there, 68 computed" in capsys.readouterr().err
    assert main(["run", config, "--stages", "student", "--training.unlabeled_ratio", "0.5"]) == 0
    assert "100.0% there" in capsys.readouterr().err


@slow
def test_a_sweep_is_judged_by_macro_f1(several, tmp_path):
    pytest.importorskip("optuna")
    from distill_nlp.sweep import run_sweep

    config = several(**LOGITS_ONLY)
    (tmp_path / "topics" / "test.jsonl").unlink()
    path = write_sweep(config, space={"losses.kl.temperature": [1, 4]}, trials=2, sampler="grid", pruner="none")
    result = run_sweep(path)
    assert result["metric"] == "f1_macro"
    for trial in result["trials"]:
        student = tmp_path / "sweep" / "trials" / f"{trial['number']:04d}" / "student" / "seed-0"
        assert trial["value"] == record_of(student)["validation"]["f1_macro"]
    teacher = record_of(tmp_path / "sweep" / "base" / "teacher")
    assert result["teacher"]["value"] == pytest.approx(teacher["validation"]["f1_macro"])


# ---- the doctor ----


@slow
def test_the_doctor_looks_at_rates_and_at_the_teachers_answers(several, finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("distill_nlp.doctor.multi_label.FEW_ROWS", 16)
    assert main(["doctor", str(several(teacher={"model": finished()}))]) == 2
    said = " ".join(capsys.readouterr().out.split())
    assert "3 classes, 1.50 labels per row and none on 12.5%" in said
    assert "near chance" in said
    assert "could not be checked" not in said
    config = several(**LONGER, **LOGITS_ONLY)
    assert main(["run", str(config), "--stages", "teacher,student"]) == 0
    monkeypatch.setattr("distill_nlp.doctor.multi_label.IMBALANCE", 0.5)
    assert main(["doctor", str(config)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "teacher has macro-F1" in said
    assert "in 1.000 of all pairs" in said
    assert "could not be checked" not in said
    assert "exact matches hardly changes" not in said
    assert main(["doctor", str(config), "--training.metric_for_best_model", "accuracy"]) == 0
    assert "exact matches hardly changes" in " ".join(capsys.readouterr().out.split())


# ---- what is refused ----


@pytest.mark.parametrize("problem_type", [None, SINGLE_LABEL])
def test_a_finished_teacher_of_single_labels_is_refused(several, finished, capsys, problem_type):
    assert main(["run", str(several(teacher={"model": finished(problem_type=problem_type)}))]) == 2
    said = capsys.readouterr().err
    assert f"is a model for {SINGLE_LABEL} (problem_type in its config: {problem_type})" in said
    assert f"ask for {MULTI_LABEL}" in said
    assert "write problem_type into its config.json; or set teacher.finetune: always" in said
    assert said.count("\n") == 1


def test_a_finished_teacher_of_several_labels_is_refused_for_single_ones(experiment, finished, capsys):
    teacher = finished(("bad", "good"))
    assert main(["run", str(experiment(teacher={"model": teacher}))]) == 2
    assert f"it is a model for {MULTI_LABEL}" in capsys.readouterr().err


@slow
@no_doctor
def test_a_classifier_of_another_kind_is_fine_tuned_where_that_is_asked_for(experiment, finished, tmp_path):
    config = experiment(teacher={"model": finished(("bad", "good")), "finetune": "always"}, losses={"kl": {}})
    assert main(["run", str(config), "--stages", "teacher,student"]) == 0
    for name in ("teacher", "student/seed-0"):
        assert json.loads((tmp_path / "run" / name / "config.json").read_text())["problem_type"] == SINGLE_LABEL


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"losses": {"dkd": {}}}, "DecoupledKDLoss is not defined for multi_label_classification"),
        ({"losses": {"dist": {}}}, "is not defined for multi_label_classification"),
        ({"losses": {"ce": {"class_weights": "balanced"}}}, r"losses\.ce\.class_weights: balanced is defined for one"),
        ({"losses": {"ce": {"label_smoothing": 0.1}}}, "label_smoothing is for single-label tasks"),
        ({"student__overrides": {"problem_type": SINGLE_LABEL}}, r"student\.overrides\.problem_type is single_label"),
        (
            {"data__unlabeled": "pool", "data__unlabeled_min_confidence": 0.5},
            r"data\.unlabeled_min_confidence is defined for one label per text",
        ),
    ],
)
def test_settings_for_single_labels_are_refused_in_one_line(several, capsys, changes, expected):
    config = several(**changes)
    with pytest.raises(UsageError, match=expected):
        Pipeline(load_experiment(config)).run(doctor=False)
    assert main(["run", str(config), "--no-doctor"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_overrides_of_the_teachers_task_are_refused(several):
    materials = Materials(load_experiment(several(teacher__overrides={"problem_type": SINGLE_LABEL})))
    with pytest.raises(UsageError, match=r"^teacher\.overrides\.problem_type is single_label_classification, but"):
        materials.new_teacher(materials.lead)
    agreed = several(teacher__overrides={"problem_type": MULTI_LABEL}, student__overrides={"problem_type": MULTI_LABEL})
    materials = Materials(load_experiment(agreed))
    assert materials.new_teacher(materials.lead).config.problem_type == MULTI_LABEL
    assert materials.new_student().config.problem_type == MULTI_LABEL


# ---- other ways to say it ----


def test_factors_for_each_class_are_taken(several):
    materials = Materials(load_experiment(several(losses={"ce": {"class_weights": [1, 2, 3]}})))
    assert materials.objective.losses["ce"].class_weights.tolist() == [1, 2, 3]


def metrics_of_jobs(pipeline, tmp_path) -> set[str]:
    """What picks the checkpoint in each training of an experiment."""
    folder = StageFolder(tmp_path / "job")
    phases = range(len(pipeline.students.views))
    jobs = [
        pipeline.teachers._job(pipeline.materials.lead),
        pipeline.students._baseline_job(0, "baseline", folder, dry=True),
        *(pipeline.students._phase_job(i, 0, "student", folder, {}, dry=True) for i in phases),
    ]
    return {job.arguments.metric_for_best_model for job in jobs}


@pytest.mark.parametrize("changes", [{}, {"phases": [{}, {}]}, {"data__unlabeled": "pool"}])
def test_macro_f1_picks_the_checkpoint_in_every_training(several, tmp_path, changes):
    pipeline = Pipeline(load_experiment(several(**changes)))
    assert metrics_of_jobs(pipeline, tmp_path) == {"f1_macro"}


@pytest.mark.parametrize("metric", ["accuracy", "f1_macro", "loss"])
def test_a_metric_that_is_given_stays(several, metric):
    pipeline = Pipeline(load_experiment(several(training__metric_for_best_model=metric)))
    assert pipeline.prints.student(0)["training"]["metric_for_best_model"] == metric
    arguments = pipeline.teachers._job(pipeline.materials.lead).arguments
    assert (arguments.metric_for_best_model, arguments.greater_is_better) == (metric, metric != "loss")


def test_the_metric_of_single_labels_stays_accuracy(experiment, tmp_path):
    pipeline = Pipeline(load_experiment(experiment()))
    for found in (pipeline.prints.teachers[0], pipeline.prints.baseline(0), pipeline.prints.student(0)):
        assert found["training"]["metric_for_best_model"] == "accuracy"
    assert metrics_of_jobs(pipeline, tmp_path) == {"accuracy"}


def test_a_single_label_model_answers_as_before(tmp_path, capsys):
    make_student(**label_config(TOPICS)).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    assert main(["predict", str(tmp_path / "model"), "w4", "--format", "jsonl"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["text", "label", "score", "scores"]
    assert found["score"] == max(found["scores"].values()) == found["scores"][found["label"]]
    assert sum(found["scores"].values()) == pytest.approx(1, abs=1e-5)
