"""The teacher's side from YAML: several teachers, other tokenizers, other lengths, more labels, the pool's options."""

from __future__ import annotations

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import BINARY, label_config, make_student, make_teacher, make_tokenizer, swapped_tokenizer, write_rows
from safetensors.torch import load_file

from distill_nlp.cli import main
from distill_nlp.report import REPORT_FILE

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_doctor")]

STUDENT = {
    "config": {
        "model_type": "distilbert",
        "dim": 16,
        "n_layers": 1,
        "n_heads": 2,
        "hidden_dim": 16,
        "max_position_embeddings": 40,
    }
}
KL = {"ce": {"weight": 0.3}, "kl": {"weight": 0.7}}


def report_of(folder):
    return json.loads((folder / REPORT_FILE).read_text())


def logits_of(folder):
    return dict(np.load(folder / "predictions.npz"))


def student_of(folder):
    return load_file(folder / "student" / "seed-0" / "model.safetensors")


def finished(folder, tokenizer=None, labels=BINARY, seed=1):
    """A classifier for these labels that needs no training."""
    make_teacher(seed=seed, **label_config(labels)).save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    return str(folder)


def own_student(folder, tokenizer):
    make_student(**label_config(BINARY)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"model": str(folder)}


def probabilities(logits):
    return torch.from_numpy(logits).softmax(-1).numpy()


# ---- several ----


def test_an_ensemble_of_seeds_is_trained_cached_and_compared_as_one_teacher(experiment, tmp_path, capsys):
    config = experiment(
        losses=KL, teacher__ensemble=[{"seed": 1, "weight": 3}], teacher__weight=1, data__unlabeled="pool"
    )
    assert main(["run", str(config)]) == 0
    said = capsys.readouterr().err
    run = tmp_path / "run"
    report = report_of(run)
    members = report["models"]["teacher"]["ensemble"]
    assert [member["path"] for member in members] == [str(run / "teacher"), str(run / "teacher-2")]
    assert [member["weight"] for member in members] == [1, 3]
    one, two = (load_file(run / name / "model.safetensors") for name in ("teacher", "teacher-2"))
    assert any(not torch.equal(one[name], two[name]) for name in one)
    assert report["models"]["teacher"]["parameters"] == 2 * sum(t.numel() for t in one.values())

    # The mean of what the two say alone.
    alone = []
    for name in ("teacher", "teacher-2"):
        other = experiment(losses=KL, teacher={"model": str(run / name)}, output_dir=str(tmp_path / f"alone-{name}"))
        assert main(["run", str(other)]) == 0
        alone.append(probabilities(logits_of(tmp_path / f"alone-{name}")["teacher"]))
    together = probabilities(logits_of(run)["teacher"])
    np.testing.assert_allclose(together, 0.25 * alone[0] + 0.75 * alone[1], atol=1e-6)

    # The same again does nothing; another weight trains the student anew and asks no teacher.
    capsys.readouterr()
    config = experiment(
        losses=KL, teacher__ensemble=[{"seed": 1, "weight": 3}], teacher__weight=1, data__unlabeled="pool"
    )
    assert main(["run", str(config)]) == 0
    assert capsys.readouterr().err.count("done already") == 5
    config = experiment(
        losses=KL, teacher__ensemble=[{"seed": 1, "weight": 1}], teacher__weight=1, data__unlabeled="pool"
    )
    assert main(["run", str(config), "--stages", "teacher,student"]) == 0
    again = capsys.readouterr().err
    assert "settings changed" in again
    assert again.count("100.0% there, 0 computed") == 2
    assert said.count("0.0% there") == 2


def test_an_ensemble_live_and_cached_teach_the_same(experiment, tmp_path):
    teachers = {"model": finished(tmp_path / "a"), "ensemble": [{"model": finished(tmp_path / "b", seed=5)}]}
    found = []
    for cache in (True, False):
        config = experiment(
            losses=KL,
            teacher=teachers | {"cache": cache},
            student=STUDENT,
            training__optim="sgd",
            output_dir=str(tmp_path / f"run-{cache}"),
        )
        assert main(["run", str(config), "--stages", "student"]) == 0
        found.append(student_of(tmp_path / f"run-{cache}"))
    assert max((found[0][name] - found[1][name]).abs().max().item() for name in found[0]) < 1e-6


def test_losses_of_layers_are_refused_for_an_ensemble_before_anything_is_trained(experiment, tmp_path, capsys):
    assert main(["run", str(experiment(teacher__ensemble=[{"seed": 1}]))]) == 2
    assert "losses hidden, attention read layers of the teacher, which an ensemble has not" in capsys.readouterr().err
    assert not (tmp_path / "run" / "teacher").exists()


# ---- other tokens ----


def test_teacher_and_student_of_different_vocabularies_distil_and_are_compared(experiment, tmp_path, capsys):
    """A word that the teacher knows by another number must reach it by that number."""
    config = experiment(losses=KL, student=own_student(tmp_path / "other", swapped_tokenizer()))
    assert main(["run", str(config)]) == 0
    assert "reads tokens of its own, up to 16" in capsys.readouterr().err
    run = tmp_path / "run"
    swapped = json.loads((run / "student" / "seed-0" / "tokenizer.json").read_text())["model"]["vocab"]
    plain = json.loads((run / "teacher" / "tokenizer.json").read_text())["model"]["vocab"]
    assert (swapped["w40"], plain["w40"]) == (41, 40)

    # The teacher answers as where it is alone.
    alone = experiment(losses=KL, teacher={"model": str(run / "teacher")}, output_dir=str(tmp_path / "alone"))
    assert main(["run", str(alone)]) == 0
    np.testing.assert_allclose(logits_of(run)["teacher"], logits_of(tmp_path / "alone")["teacher"], atol=1e-6)


@pytest.mark.parametrize("cache", [True, False])
def test_the_teacher_may_read_more_of_a_text_than_the_student(experiment, tmp_path, capsys, cache):
    folder = write_rows(tmp_path / "long", words=20)
    losses = {"kl": {}, "pkd": {"layers": [[1, 3]]}, "rkd_distance": {"layers": [[1, 4]], "representation": "mean"}}
    config = experiment(
        data__dataset=str(folder),
        data__max_length=8,
        teacher__max_length=24,
        teacher__cache=cache,
        losses=losses,
        student=STUDENT,
        training__optim="sgd",
        training__logging_steps=1,
        output_dir=str(tmp_path / f"run-{cache}"),
    )
    assert main(["run", str(config)]) == 0
    said = capsys.readouterr().err
    assert ("teacher cache" in said) == cache
    run = tmp_path / f"run-{cache}"
    rows = {"teacher": 24, "student/seed-0": 8}
    for name, length in rows.items():
        assert json.loads((run / name / "tokenizer_config.json").read_text())["model_max_length"] == length
    # As a teacher at its own length answers.
    alone = experiment(
        data__dataset=str(folder),
        data__max_length=24,
        losses=KL,
        teacher={"model": str(run / "teacher")},
        output_dir=str(tmp_path / "alone"),
    )
    assert main(["run", str(alone)]) == 0
    np.testing.assert_allclose(logits_of(run)["teacher"], logits_of(tmp_path / "alone")["teacher"], atol=1e-6)


def test_the_teacher_of_another_length_teaches_the_same_live_and_cached(experiment, tmp_path):
    folder = write_rows(tmp_path / "long", words=20)
    found = []
    for cache in (True, False):
        config = experiment(
            data__dataset=str(folder),
            data__max_length=8,
            teacher={"model": finished(tmp_path / "ready"), "max_length": 24, "cache": cache},
            losses={"kl": {}, "pkd": {"layers": [[1, 3]]}},
            student=STUDENT,
            training__optim="sgd",
            output_dir=str(tmp_path / f"run-{cache}"),
        )
        assert main(["run", str(config), "--stages", "student"]) == 0
        found.append(student_of(tmp_path / f"run-{cache}"))
    assert max((found[0][name] - found[1][name]).abs().max().item() for name in found[0]) < 1e-6


def test_another_length_of_the_teacher_is_refused_for_losses_that_compare_tokens(experiment, capsys):
    assert main(["run", str(experiment(teacher__max_length=20))]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "losses hidden, attention compare token by token" in error
    assert "cut at 20 and 16 tokens" in error


def test_a_length_beyond_what_a_teacher_reads_is_refused(experiment, capsys):
    assert main(["run", str(experiment(losses=KL, teacher__max_length=400))]) == 2
    assert "teacher.max_length is 400, but the teacher reads at most 40 tokens" in capsys.readouterr().err


def test_a_tokenizer_that_is_not_the_students_is_refused(experiment, tmp_path, capsys):
    swapped_tokenizer().save_pretrained(tmp_path / "swapped")
    for student in (own_student(tmp_path / "other", make_tokenizer()), {"from_teacher": {"layers": 2}}):
        config = experiment(losses=KL, student=student, data__tokenizer=str(tmp_path / "swapped"))
        assert main(["run", str(config)]) == 2
        assert "has another vocabulary than data.tokenizer" in capsys.readouterr().err


# ---- labels ----


def test_settings_of_a_finished_teachers_config_are_refused_as_it_is_used_as_it_is(experiment, tmp_path, capsys):
    teacher = {"model": finished(tmp_path / "finished"), "overrides": {"attention_probs_dropout_prob": 0.0}}
    assert main(["run", str(experiment(losses=KL, teacher=teacher, student=STUDENT))]) == 2
    assert "teacher.overrides: " in (said := capsys.readouterr().err)
    assert "is fine-tuned already and used as it is" in said


def test_a_teacher_that_knows_more_labels_is_restricted_when_asked(experiment, tmp_path, capsys):
    more = finished(tmp_path / "more", labels=["other", "good", "bad"])
    assert main(["run", str(experiment(losses=KL, teacher={"model": more}))]) == 2
    assert "restrict_labels" in capsys.readouterr().err
    config = experiment(losses=KL, teacher={"model": more, "restrict_labels": True}, student=STUDENT)
    assert main(["run", str(config)]) == 0
    assert logits_of(tmp_path / "run")["teacher"].shape == (16, 2)


# ---- the pool ----


POOL = {"losses": KL, "student": STUDENT}


@pytest.fixture
def pool(tmp_path):
    """A file of 20 texts of their own."""
    texts = [f"w{6 + i % 3} w{20 + i} w{70 - i}" for i in range(20)]
    pd.DataFrame({"text": texts}).to_parquet(tmp_path / "own_pool.parquet")
    return str(tmp_path / "own_pool.parquet")


def test_unsure_unlabeled_rows_are_dropped_and_counted_and_the_budget_stays(experiment, tmp_path, capsys, pool):
    teacher = {"model": finished(tmp_path / "ready")}
    settings = POOL | {"teacher": teacher, "training__max_steps": -1, "training__num_train_epochs": 2}
    config = experiment(**settings, data__unlabeled=pool, data__unlabeled_min_confidence=0.9)
    assert main(["run", str(config), "--stages", "baseline,student"]) == 0
    said = capsys.readouterr().err
    kept = int(re.search(r"(\d+) of 20 unlabelled rows kept at a confidence of 0.9", said)[1])
    assert 0 < kept < 20
    records = [
        json.loads((tmp_path / "run" / kind / "seed-0" / "stage.json").read_text()) for kind in ("baseline", "student")
    ]
    # 60 rows in batches of 8, twice.
    assert [record["steps"] for record in records] == [16, 16]
    assert records[1]["fingerprint"]["unlabeled_min_confidence"] == 0.9
    assert main(["run", str(config), "--stages", "student", "--data.unlabeled_min_confidence", "1"]) == 2
    assert "error: data.unlabeled: the teacher is confident at 1" in capsys.readouterr().err


def test_the_gate_serves_a_teacher_that_runs_live(experiment, tmp_path, capsys, pool):
    losses = KL | {"hidden": {"layers": [[1, 2]]}}
    teacher = {"model": finished(tmp_path / "ready")}
    settings = POOL | {"losses": losses, "teacher": teacher, "data__unlabeled": pool}
    config = experiment(**settings, data__unlabeled_min_confidence=0.9)
    assert main(["run", str(config), "--stages", "student"]) == 0
    assert "unlabelled rows kept" in capsys.readouterr().err


def test_pseudo_labels_are_the_teachers_answers_and_the_cross_entropy_counts_them(experiment, tmp_path, capsys, pool):
    """With labels of the teacher's on all rows, cross-entropy alone learns from the pool, and needs no teacher."""
    teacher = {"model": finished(tmp_path / "ready")}
    found = []
    for pseudo in (True, False):
        config = experiment(
            losses={"ce": {}},
            data__unlabeled=pool,
            data__pseudo_labels=pseudo,
            student=STUDENT,
            teacher=teacher,
            output_dir=str(tmp_path / f"run-{pseudo}"),
        )
        assert main(["run", str(config), "--stages", "student"]) == 0
        found.append(student_of(tmp_path / f"run-{pseudo}"))
    assert "20 unlabeled rows labeled by the teacher" in capsys.readouterr().err
    assert any(not torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_ratio_of_unlabeled_rows_reaches_the_student_and_not_the_baseline(experiment, tmp_path, pool):
    teacher = {"model": finished(tmp_path / "ready")}
    config = experiment(**POOL, teacher=teacher, data__unlabeled=pool, training__unlabeled_ratio=0.5)
    assert main(["run", str(config), "--stages", "baseline,student"]) == 0
    prints = [
        json.loads((tmp_path / "run" / kind / "seed-0" / "stage.json").read_text())["fingerprint"]["training"]
        for kind in ("baseline", "student")
    ]
    assert "unlabeled_ratio" not in prints[0]
    assert prints[1]["unlabeled_ratio"] == 0.5


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("data__unlabeled_min_confidence", 0.9),
        ("data__pseudo_labels", True),
        ("training__unlabeled_ratio", 0.5),
    ],
)
def test_options_of_the_pool_without_a_pool_are_refused(experiment, capsys, setting, value):
    assert main(["run", str(experiment(**{setting: value}))]) == 2
    assert f"{setting.replace('__', '.')}: there are no unlabeled rows; set data.unlabeled" in capsys.readouterr().err


# ---- half precision ----


def test_answers_in_half_precision_say_what_that_costs(experiment, tmp_path, capsys):
    teacher = {"model": finished(tmp_path / "ready"), "cache_dtype": "bfloat16"}
    assert main(["run", str(experiment(losses=KL, teacher=teacher, student=STUDENT)), "--stages", "student"]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("teacher cache")]
    assert "bfloat16" in line


def test_with_and_without_the_pool_are_one_baseline_where_the_number_of_steps_is_given(experiment, pool, capsys):
    """Else the pool sets it."""
    assert main(["run", str(experiment(losses=KL)), "--stages", "baseline"]) == 0
    capsys.readouterr()
    assert main(["run", str(experiment(losses=KL, data__unlabeled=pool)), "--stages", "baseline"]) == 0
    assert "done already" in capsys.readouterr().err
    epochs = {"training__max_steps": -1, "training__num_train_epochs": 1}
    config = experiment(losses=KL, data__unlabeled=pool, **epochs)
    assert main(["run", str(config), "--stages", "baseline"]) == 0
    assert "unlabeled_rows: 0 → 20" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "hinted"),
    [
        ({}, True),
        ({"seeds": [0, 1]}, False),
        ({"training__gradient_accumulation_steps": 2}, False),
        ({"teacher__cache": True}, False),
        ({"cache_dir": "cache"}, False),
        ({"training__max_steps": 3}, False),
        ({"training": {"num_train_epochs": 0.4, "eval_strategy": "no"}}, True),
    ],
)
def test_a_cache_of_far_more_rows_than_are_read_is_said(experiment, tmp_path, capsys, no_doctor, changes, hinted):
    if "cache_dir" in changes:
        changes = {"cache_dir": str(tmp_path / "cache")}
    config = str(experiment(**({"losses": {"kl": {}}, "training__max_steps": 2} | changes)))
    run = ["run", config, "--stages", "teacher,student", "--teacher.training.max_steps", "1"]
    assert main(run) == 0
    hint = (
        "teacher cache        answers 40 rows, of which the students read 16; --teacher.cache false asks the teacher "
        "for these alone"
    )
    assert (hint in capsys.readouterr().err) is hinted
    # The answers are there now.
    assert main([*run, "--training.learning_rate", "0.001"]) == 0
    said = capsys.readouterr().err
    assert "100.0% there" in said
    assert "of which the students read" not in said
