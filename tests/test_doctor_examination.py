"""All checks on whole experiments: what they find, what they cost, and that they leave no trace."""

from __future__ import annotations

import random
import re
import weakref
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import PartialState
from helpers import label_config, make_student, make_teacher, make_tokenizer
from safetensors.torch import load_file, save_file

import distill_nlp.doctor.examination as examination
from distill_nlp.config import STAGES, Experiment
from distill_nlp.doctor import examine, examine_teachers, exit_code, timing
from distill_nlp.doctor.measure import StepTime
from distill_nlp.doctor.subject import Subject, stretched
from distill_nlp.doctor.timing import check_run_time
from distill_nlp.durable_files import write_json
from distill_nlp.fingerprints import Fingerprints
from distill_nlp.inference import predict_logits
from distill_nlp.manifests import write_manifest
from distill_nlp.materials import Materials
from distill_nlp.pipeline import Pipeline
from distill_nlp.stages import STAGE_FILE, StageFolder

LABELS = ("bad", "good")
NARROW = {"config": {"model_type": "distilbert", "dim": 24, "n_heads": 3}}
ROWS = {"train": 160, "validation": 120, "test": 110, "pool": 40}


def write_rows(folder, **changes):
    """Rows of 4 to 14 words; the label is that of the first one. No text stands in two splits."""
    folder.mkdir()
    for number, (split, count) in enumerate(ROWS.items()):
        rng = np.random.default_rng(number)
        texts = []
        for i in range(count):
            words = rng.integers(10 + 20 * number, 30 + 20 * number, rng.integers(3, 14))
            texts.append(" ".join([f"w{4 + i % 2}", *(f"w{word}" for word in words)]))
        table = pd.DataFrame({"text": texts, "label": [i % 2 for i in range(count)]})
        changes.get(split, lambda table: table)(table).to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.fixture
def parts(tmp_path):
    """`parts(change of a split=function, dotted__setting=value)`: materials and fingerprints of a tiny experiment."""

    def make(rows=None, **changes):
        if not (tmp_path / "data").exists():
            write_rows(tmp_path / "data", **(rows or {}))
        settings = {
            "output_dir": str(tmp_path / "run"),
            "seeds": [0, 1],
            "data": {
                "dataset": str(tmp_path / "data"),
                "validation_split": "validation",
                "label_names": list(LABELS),
                "max_length": 16,
            },
            "teacher": {"model": str(backbone(tmp_path))},
            "student": {"from_teacher": {"layers": 2}, "overrides": {"attention_dropout": 0.0}},
            "losses": {"ce": {"weight": 0.3}, "kl": {"weight": 0.7}, "hidden": {}, "attention": {"layers": "last"}},
            "training": {"per_device_train_batch_size": 8, "num_train_epochs": 2, "use_cpu": True},
        }
        if "teacher__model" not in changes:
            # A finished one is used as it is.
            settings["teacher"]["overrides"] = {"attention_probs_dropout_prob": 0.0}
        for dotted, value in changes.items():
            *parents, last = dotted.split("__")
            inner = settings
            for name in parents:
                inner = inner.setdefault(name, {})
            inner[last] = value
        materials = Materials(Experiment.model_validate(settings))
        return materials, Fingerprints(materials.experiment, materials)

    return make


def backbone(folder) -> Path:
    if not (folder / "backbone").exists():
        model = make_teacher(**label_config(("LABEL_0", "LABEL_1")))
        model.bert.save_pretrained(folder / "backbone")
        make_tokenizer().save_pretrained(folder / "backbone")
    return folder / "backbone"


def classifier(folder, labels=LABELS, name="classifier", **changes) -> str:
    """A teacher that is a classifier already, and knows nothing."""
    make_teacher(**label_config(labels), **changes).save_pretrained(folder / name)
    make_tokenizer().save_pretrained(folder / name)
    return str(folder / name)


def quick(parts, **settings):
    """The findings by their checks, without timing."""
    return by_check(examine(*parts, **{"seconds": 0, **settings}))


def by_check(findings):
    return {finding.check: finding for finding in findings}


def test_a_sound_experiment_has_ok_findings_with_figures(parts):
    findings = examine(*parts(), seconds=1.0)
    assert [f for f in findings if f.level != "ok"] == []
    found = by_check(findings)
    assert found["rows"].what == "160 train, 120 validation, 110 test"
    assert "bad, good; teacher gets a new head" in found["labels"].what
    assert "0.500 on test" in found["classes"].what
    assert "0 of 120 validation rows" in found["duplicates"].what
    assert "rows cut at 16 tokens: train 0.0%" in found["truncation"].what
    assert "hidden(mse, 1→2, 2→4)" in found["layers"].what
    assert "captured for attention" in found["attention"].what
    assert "checked after that" in found["teacher accuracy"].what
    assert "the same 100 tokens" in found["vocabularies"].what
    assert "compare token by token" in found["teacher cache"].what
    assert "scaled to 8 of 16 tokens" in found["memory"].what
    # 160 rows in batches of 8, twice; two seeds.
    assert "teacher 40 steps" in found["time"].what
    assert "baseline 40 steps × 2" in found["time"].what
    assert "student 40 steps × 2" in found["time"].what
    assert "report" in found["time"].what


def test_a_cached_teacher_is_said_and_takes_its_time_once(parts):
    findings = examine(*parts(losses={"kl": {}, "pkd": {}}), seconds=1.0)
    found = by_check(findings)
    assert exit_code(findings) == 0
    assert "runs once per row" in found["teacher cache"].what
    assert "teacher weights" not in found["memory"].what
    assert "teacher cache" in found["time"].what


def test_what_is_finished_takes_no_time(parts):
    materials, prints = parts()
    root = Path(materials.experiment.output_dir)
    for seed in (0, 1):
        for name, make in (("baseline", prints.baseline), ("student", prints.student)):
            write_json(root / name / f"seed-{seed}" / STAGE_FILE, {"fingerprint": make(seed)})
    said = by_check(examine(materials, prints, stages=("teacher", "baseline", "student"), seconds=1.0))["time"].what
    assert "teacher 40 steps" in said
    assert "baseline" not in said
    assert "student" not in said
    write_json(root / "teacher" / STAGE_FILE, {"fingerprint": prints.teachers[0]})
    subject = Subject(materials, prints)
    assert subject.source(materials.lead) == (str(root / "teacher"), None)


def test_a_seed_that_is_finished_takes_no_time(parts):
    materials, prints = parts()
    root = Path(materials.experiment.output_dir)
    write_json(root / "baseline" / "seed-0" / STAGE_FILE, {"fingerprint": prints.baseline(0)})
    said = by_check(examine(materials, prints, seconds=1.0))["time"].what
    assert "baseline 40 steps," in said
    assert "student 40 steps × 2," in said


def test_answers_that_a_finished_student_found_in_the_cache_are_not_counted_again(parts, monkeypatch):
    monkeypatch.setattr(timing, "time_step", lambda *_: StepTime(1.0, 2.0, 0.5, batches=3, rows=8))
    materials, prints = parts(losses={"kl": {}})
    assert "teacher cache" in check_run_time(Subject(materials, prints), STAGES, 1.0).what
    student = Path(materials.experiment.output_dir) / "student"
    write_json(student / "seed-0" / STAGE_FILE, {"fingerprint": prints.student(0)})
    said = check_run_time(Subject(materials, prints), STAGES, 1.0).what
    assert "student 40 steps," in said
    assert "teacher cache" not in said


def test_times_are_those_of_the_steps_the_evaluations_and_the_report(parts, monkeypatch):
    monkeypatch.setattr(timing, "time_step", lambda *_: StepTime(1.0, 2.0, 0.5, batches=3, rows=8))
    made = parts(training__gradient_accumulation_steps=2)
    # Of each stage: 20 steps of 2 (1 + 2) + 0.5 s, and 3 evaluations of 120 rows at a third of 2 s for 8 rows.
    assert 20 * 6.5 + 3 * 120 * 2 / 8 / 3 == 160
    said = check_run_time(Subject(*made), STAGES, 1.0).what
    # The report: 110 rows of one teacher, two baselines and two students.
    assert round(5 * 110 * 2 / 8 / 3) == 46
    assert said.startswith(
        "about 14 min (11 min to 21 min): teacher 20 steps, 3 min; baseline 20 steps × 2, 5 min; student 20 steps × 2, "
        "5 min; report 46 s; an estimate from 9 steps of 8 rows on cpu"
    )
    assert "report" not in check_run_time(Subject(*made), STAGES[:3], 1.0).what


def test_evaluations_are_counted_over_all_steps_that_are_asked_for(parts, monkeypatch):
    monkeypatch.setattr(timing, "time_step", lambda *_: StepTime(1.0, 2.0, 0.5, batches=3, rows=8))
    counted = []
    monkeypatch.setattr(timing, "evaluations", lambda strategy, steps, every, epochs: counted.append(epochs) or 1)
    # 160 rows in batches of 8; `num_train_epochs` stays at 2 and means nothing.
    check_run_time(Subject(*parts(training__max_steps=200)), ("student",), 1.0)
    assert counted == [10.0, 10.0]
    counted.clear()
    check_run_time(Subject(*parts()), ("student",), 1.0)
    assert counted == [2.0, 2.0]


def test_a_teacher_is_timed_by_the_settings_of_the_whole_and_not_of_a_phase(parts, monkeypatch):
    monkeypatch.setattr(timing, "time_step", lambda *_: StepTime(1.0, 2.0, 0.5, batches=3, rows=8))
    phases = [{"losses": {"kl": {}}, "training": {"num_train_epochs": 5, "learning_rate": 0.5}}]
    materials, prints = parts(phases=phases)
    view = materials.seen_by(materials.experiment.student_trainings()[0])
    assert "teacher 40 steps, " in check_run_time(Subject(view, prints), STAGES, 1.0).what
    rates = [f.what for f in examine(view, prints, seconds=0) if f.check == "learning rate"]
    assert any("training.learning_rate is 0.5" in what for what in rates)
    assert not any("teacher.training.learning_rate is 0.5" in what for what in rates)


def test_checkpointing_is_in_the_memory(parts):
    def activations(**changes):
        said = quick(parts(student__from_teacher={"layers": 4}, **changes))["memory"].what
        number, unit = re.search(r"activations (\d+) (kB|MB)", said).groups()
        return int(number) * {"kB": 1, "MB": 1000}[unit]

    assert activations(training__gradient_checkpointing=True) < 0.8 * activations()


def test_a_pool_sets_the_steps_of_students_and_baselines(parts):
    findings = examine(*parts(data__unlabeled="pool"), seconds=1.0)
    said = by_check(findings)["time"].what
    assert "teacher 40 steps" in said
    assert "baseline 50 steps" in said
    assert "student 50 steps" in said
    assert "unlabeled 0.0%" in by_check(findings)["truncation"].what


def test_steps_after_a_checkpoint_of_the_same_settings_are_left(parts, tmp_path):
    subject = Subject(*parts())
    folder = StageFolder(tmp_path / "stage")
    assert subject.steps_left(folder.path, {"a": 1}, 100) == 100
    folder.begin({"a": 1})
    assert subject.steps_left(folder.path, {"a": 1}, 100) == 100
    write_json(folder.checkpoints / "checkpoint-30" / "trainer_state.json", {})
    # Without a manifest it may be half-written, by a run that is at work; it is left alone.
    assert subject.steps_left(folder.path, {"a": 1}, 100) == 100
    write_manifest(folder.checkpoints / "checkpoint-30")
    assert subject.steps_left(folder.path, {"a": 1}, 100) == 70
    assert subject.steps_left(folder.path, {"a": 2}, 100) == 100
    write_json(folder.path / STAGE_FILE, {"fingerprint": {"a": 1}})
    assert subject.steps_left(folder.path, {"a": 1}, 100) == 0
    assert subject.steps_left(folder.path, {"a": 2}, 100) == 100


def test_a_wrong_column_is_a_stop_and_the_rest_is_left(parts):
    findings = examine(*parts(data__text_column="review"))
    assert exit_code(findings) == 2
    (stop,) = [f for f in findings if f.level == "stop"]
    assert "has no column 'review'" in stop.what
    assert stop.check == "data"
    assert {"output folder", "learning rate", "precision"} <= by_check(findings).keys()
    assert "labels" not in by_check(findings)


@pytest.mark.parametrize(
    ("changes", "check", "said"),
    [
        ({"student__from_teacher": {"layers": 9}}, "layers", "must be in 1..4"),
        ({"losses": {"hidden": {"layers": [[1, 9]]}}}, "layers", "losses.hidden"),
        ({"losses": {"hidden": {"projection": "none"}}, "student": NARROW}, "layers", "equal widths"),
        ({"data__max_length": 64}, "layers", "reads at most 40 tokens"),
    ],
)
def test_models_and_losses_that_do_not_fit_are_one_stop(parts, changes, check, said):
    stops = [f for f in examine(*parts(**changes)) if f.level == "stop"]
    assert len(stops) == 1
    assert stops[0].check == check
    assert said in stops[0].what


def test_labels_that_do_not_match_are_one_stop(parts, tmp_path):
    findings = examine(*parts(teacher__model=classifier(tmp_path, ("spam", "ham"))))
    stops = [f for f in findings if f.level == "stop"]
    assert "time" not in by_check(findings)
    assert [stop.check for stop in stops] == ["labels"]
    assert "['spam', 'ham']" in stops[0].what
    assert "['bad', 'good']" in stops[0].what


def test_the_rows_of_all_splits_are_looked_at(parts):
    def leak(table):
        return pd.concat([table, pd.DataFrame({"text": TRAIN.text[:40], "label": TRAIN.label[:40]})])

    def noisy(table):
        TRAIN.text, TRAIN.label = list(table.text), list(table.label)
        table.loc[2, "text"] = table.text[3]
        return table

    class TRAIN:
        text, label = [], []

    found = quick(parts(rows={"train": noisy, "test": leak}, data__max_length=8))
    assert found["duplicates"].level == "stop"
    assert "memory" not in found
    assert found["label noise"].level == "warning"
    assert found["truncation"].level == "warning"
    assert "--data.max_length" in found["truncation"].fix
    assert found["splits"].level == "ok"


def test_the_length_proposed_is_one_that_the_models_read(parts):
    def long(table):
        return table.assign(text=[text + " w9" * 100 for text in table.text])

    fix = quick(parts(rows={"train": long}, data__max_length=20))["truncation"].fix
    assert "the models read 40: --data.max_length 40" in fix
    own = parts(data__max_length=20, teacher__max_length=30, losses={"kl": {}})
    fixes = [f.fix for f in examine(*own, seconds=0) if f.check == "truncation"]
    assert "the models read 40: --data.max_length 40" in fixes[0]
    assert "the models read 40: --teacher.max_length 40" in fixes[1]


def test_unknown_words_and_rare_classes_are_found(parts):
    def foreign(table):
        return table.assign(text="hund katze maus", label=[int(i < 5) for i in range(len(table))])

    found = quick(parts(rows={"train": foreign}))
    assert found["unknown tokens"].level == "stop"
    assert "'hund'" in found["unknown tokens"].what
    assert found["classes"].level == "warning"


def test_settings_are_looked_at(parts):
    changes = {"training__learning_rate": 1.0, "teacher__training": {"learning_rate": 2.0}}
    changes |= {"student__overrides": {}, "student__attention_dropout": 0.1}
    findings = examine(*parts(**changes, teacher__overrides={}), seconds=0)
    rates = [f for f in findings if f.check == "learning rate"]
    assert [f.level for f in rates] == ["warning", "warning"]
    assert "teacher.training.learning_rate is 2" in rates[1].what
    found = by_check(findings)
    assert found["student dropout"].fix == "--student.attention_dropout 0"
    assert found["teacher dropout"].fix == "--teacher.overrides.attention_probs_dropout_prob 0.0"


def test_only_the_stages_that_are_to_run_are_looked_at(parts):
    found = quick(parts(student__from_teacher={"layers": 9}), stages=("teacher",))
    assert all(finding.level != "stop" for finding in found.values())
    assert "labels" in found
    assert "memory" not in found


# ---- finished teachers ----


@pytest.fixture
def answering(monkeypatch):
    """`answering(function of the labels)`: what every teacher says."""

    def put(say):
        def logits(model, tokenizer, rows, *_, **__):
            labels = np.array([row["labels"] for row in rows])
            return np.eye(model.config.num_labels)[say(labels)] * 2.0

        monkeypatch.setattr(examination, "predict_logits", logits)

    return put


def test_a_head_that_was_never_trained_is_a_stop(parts, tmp_path):
    found = by_check(examine(*parts(teacher__model=classifier(tmp_path, dropout=0.0)), seconds=1.0))
    assert "time" not in found
    assert found["teacher accuracy"].level == "stop"
    assert "of 120 validation rows" in found["teacher accuracy"].what


def test_a_teacher_that_knows_the_task_is_ok_with_its_softness(parts, tmp_path, answering):
    answering(lambda labels: labels)
    found = by_check(examine(*parts(teacher__model=classifier(tmp_path)), seconds=1.0))
    assert "teacher" not in found["time"].what
    assert found["teacher accuracy"].level == "ok"
    assert "teacher is right on 1.000 of 120" in found["teacher accuracy"].what
    assert found["teacher softness"].level == "ok"
    assert "temperatures: kl 2" in found["teacher softness"].what
    assert "teacher dropout" not in found


@pytest.mark.parametrize(("bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_teacher_answers_in_the_precision_of_the_run(parts, tmp_path, bf16, dtype, monkeypatch):
    computed = set()

    def looked_at(model, *arguments, **settings):
        linear = next(module for module in model.modules() if isinstance(module, torch.nn.Linear))
        linear.register_forward_hook(lambda module, given, out: computed.add(out.dtype))
        return predict_logits(model, *arguments, **settings)

    monkeypatch.setattr(examination, "predict_logits", looked_at)
    quick(parts(teacher__model=classifier(tmp_path), training__bf16=bf16))
    assert computed == {dtype}


@pytest.mark.parametrize(
    ("changes", "said", "fix"),
    [
        ({}, "for 120 of 120 validation rows", "another teacher"),
        ({"training__bf16": True}, "for 120 of 120 validation rows in bf16", "--training.precision fp32; else"),
    ],
)
def test_a_teacher_whose_answers_are_not_finite_is_no_untrained_head(parts, tmp_path, changes, said, fix):
    path = classifier(tmp_path)
    weights = load_file(f"{path}/model.safetensors")
    # Each is a number; their sum over the width is none any more.
    weights["classifier.weight"] = torch.full_like(weights["classifier.weight"], 3e38)
    save_file(weights, f"{path}/model.safetensors", {"format": "pt"})
    found = quick(parts(teacher__model=path, **changes))["teacher accuracy"]
    assert found.level == "stop"
    assert found.what == f"teacher's logits are not finite {said}"
    assert found.fix.startswith(fix)


def test_the_sample_has_the_size_that_is_asked_for(parts, tmp_path, answering):
    answering(lambda labels: labels)
    found = quick(parts(teacher__model=classifier(tmp_path)), accuracy_rows=50)
    assert "of 50 validation rows" in found["teacher accuracy"].what


def test_a_teacher_in_another_order_is_brought_into_the_datas(parts, tmp_path, answering):
    answering(lambda labels: 1 - labels)
    found = quick(parts(teacher__model=classifier(tmp_path, ("good", "bad"))))
    assert found["labels"].level == "ok"
    assert "another order" in found["labels"].what
    assert found["teacher accuracy"].level == "ok"


def test_labels_that_lie_are_named(parts, tmp_path, answering):
    answering(lambda labels: labels)
    found = quick(parts(teacher__model=classifier(tmp_path, ("good", "bad"))))
    assert found["teacher accuracy"].level == "stop"
    assert "fit if its labels are [bad, good]" in found["teacher accuracy"].what


def test_teachers_can_be_looked_at_again_after_their_training(parts, tmp_path):
    materials, prints = parts()
    assert [f.check for f in examine_teachers(materials, prints)] == ["teacher accuracy", "teacher dropout"]
    trained = Path(materials.experiment.output_dir) / "teacher"
    make_teacher(**label_config(LABELS)).save_pretrained(trained)
    write_json(trained / STAGE_FILE, {"fingerprint": prints.teachers[0]})
    found = by_check(examine_teachers(materials, prints))
    assert found["teacher accuracy"].level == "stop"
    assert "teacher dropout" not in found


def test_each_teacher_of_an_ensemble_is_looked_at(parts, tmp_path, answering):
    answering(lambda labels: labels)
    changes = {"teacher__model": classifier(tmp_path), "teacher__ensemble": [{"seed": 1}], "losses": {"kl": {}}}
    findings = examine(*parts(**changes), seconds=1.0)
    said = [f.what for f in findings if f.check == "teacher accuracy"]
    assert [what.split(" is ")[0] for what in said] == ["teacher", "teacher-2"]
    assert exit_code(findings) == 0


@pytest.mark.parametrize("cache", [True, False])
def test_a_teacher_that_reads_tokens_of_its_own_is_measured_with_them(parts, tmp_path, cache):
    student = tmp_path / "student"
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["extra"])
    make_student(vocab_size=101).save_pretrained(student)
    tokenizer.save_pretrained(student)
    changes = {"student": {"model": str(student)}, "losses": {"kl": {}}, "teacher__max_length": 12}
    findings = examine(*parts(**changes, teacher__cache=cache), seconds=1.0)
    assert exit_code(findings) == 0
    assert not [f for f in findings if "could not be checked" in f.what]
    assert len([f for f in findings if f.check == "truncation"]) == 2
    found = by_check(findings)
    assert "gets tokens of its own" in found["vocabularies"].what
    assert "rows cut at 12 tokens" in found["truncation"].what
    assert ("teacher weights" in found["memory"].what) is not cache
    assert bool(Subject(*parts(**changes, teacher__cache=cache)).readers) is not cache


def test_memory_is_that_of_rows_cut_at_the_length(parts):
    assert "scaled to 8 of 11 tokens" in quick(parts(data__max_length=11))["memory"].what


@pytest.mark.parametrize("broken", ["columns", "source", "longest_row", "samples", "student", "lead_model"])
def test_a_check_that_fails_is_a_warning_and_the_others_go_on(parts, monkeypatch, broken):
    def fail(self, *_):
        raise RuntimeError("broken")

    monkeypatch.setattr(Subject, broken, fail if broken in ("columns", "source") else property(fail))
    findings = examine(*parts(), seconds=1.0)
    failed = [f for f in findings if "could not be checked: RuntimeError: broken" in f.what]
    assert failed
    assert {f.level for f in failed} == {"warning"}
    assert exit_code(findings) == 0
    assert {"output folder", "rows", "labels"} <= by_check(findings).keys()


def test_models_and_memory_are_given_back(parts):
    materials, prints = parts()
    alive = weakref.WeakSet()

    class Watched(Subject):
        def __init__(self, *args):
            super().__init__(*args)
            alive.add(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(examination, "Subject", Watched)
        examine(materials, prints, seconds=1.0)
    assert len(alive) == 0


# ---- no trace ----


def state_of(materials):
    """Generators, files, tokenizer."""
    root = Path(materials.experiment.output_dir).parent
    cached = {Path(file["filename"]).parent for file in materials.splits.validation.cache_files}
    return (
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
        sorted((path, path.stat().st_mtime_ns) for path in root.rglob("*")),
        sorted(path for folder in cached for path in folder.iterdir() if path.suffix != ".lock"),
        materials.tokenizer.backend_tokenizer.to_str(),
        materials.tokenizer.truncation_side,
    )


def test_nothing_is_written_drawn_or_changed(parts, tmp_path):
    materials, prints = parts(teacher__model=classifier(tmp_path))
    materials.tokenizer(["w4"], truncation=True, max_length=9)
    objective = materials.objective
    weights = [p.detach().clone() for p in objective.parameters()]
    before = state_of(materials)
    examine(materials, prints, seconds=1.0)
    assert state_of(materials) == before
    assert materials.objective is objective
    assert all(torch.equal(a, b) for a, b in zip(weights, objective.parameters(), strict=True))
    assert all(p.grad is None for p in objective.parameters())


def test_no_other_rank_is_waited_for(parts, monkeypatch):
    materials, prints = parts()
    assert len(materials.splits.train) == ROWS["train"]

    def wait(self):
        raise AssertionError("a barrier")

    monkeypatch.setattr(PartialState, "wait_for_everyone", wait)
    findings = examine(materials, prints, seconds=1.0)
    assert [f for f in findings if f.level != "ok"] == []


@pytest.mark.slow
def test_a_run_gives_the_same_weights_with_and_without(parts, tmp_path):
    weights = []
    for name, look in (("with", True), ("without", False)):
        materials, _ = parts(output_dir=str(tmp_path / name), training__max_steps=2, teacher__training={"max_steps": 2})
        pipeline = Pipeline(materials.experiment)
        if look:
            examine(pipeline.materials, pipeline.prints, seconds=1.0)
        pipeline.run(("teacher", "baseline", "student"), doctor=False)
        weights.append([path.read_bytes() for path in sorted((tmp_path / name).rglob("*.safetensors"))])
    assert len(weights[0]) == 5
    assert weights[0] == weights[1]


def test_a_row_is_repeated_to_a_length_in_all_its_columns():
    row = {"input_ids": [1, 2, 3, 4], "teacher_input_ids": [5, 6], "labels": 1}
    assert stretched(row, 6) == {"input_ids": [1, 2, 3, 4, 1, 2], "teacher_input_ids": [5, 6, 5], "labels": 1}
    assert stretched(row, 6, {"teacher_": 2})["teacher_input_ids"] == [5, 6]
    assert stretched(row, 6, {"teacher_": 2, "teacher_input": 9})["teacher_input_ids"] == [5, 6, 5]
    assert stretched(row, 4) == row
    assert stretched(row, 3) == row
