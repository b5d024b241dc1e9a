"""Layers, sizes, attention, losses, and settings that fail late."""

from __future__ import annotations

import copy
import os
from types import SimpleNamespace

import pytest
import torch
from helpers import all_losses, make_student, make_teacher
from torch import nn
from transformers import AutoModelForSequenceClassification, DebertaV2Config

from distill_nlp.doctor.models import (
    check_attention,
    check_attention_dropout,
    check_layers,
    check_losses,
    check_sizes,
)
from distill_nlp.doctor.settings import (
    check_learning_rate,
    check_output_folder,
    check_precision,
)
from distill_nlp.losses import DISTLoss, LogitsMSELoss, ModelShape, PKDLoss
from distill_nlp.objective import DistillationObjective


def bound(losses=None):
    objective = DistillationObjective(all_losses() if losses is None else losses)
    objective.bind(*(ModelShape.from_config(make().config) for make in (make_student, make_teacher)))
    return objective


# ---- layers and sizes ----


def test_pairs_and_projections_are_said_with_their_parameters():
    found = check_layers(bound())
    assert found.level == "ok"
    assert "hidden(mse, 1→2, 2→4)" in found.what
    assert f"projections hidden: 2 linear 24 → 32, {2 * (24 * 32 + 32):,} parameters" in found.what


def test_no_projections_are_said_too():
    assert check_layers(bound({"mse": LogitsMSELoss()})).what.endswith("no projections")


@pytest.mark.parametrize(
    ("student", "size", "said"),
    [
        ({}, 40, None),
        ({"num_layers": 5}, 40, "the student is deeper"),
        ({"hidden_size": 64}, 40, "the student is wider"),
        ({}, 100, "the student is not smaller"),
        ({"num_layers": 5, "hidden_size": 64}, 120, "deeper and wider and not smaller"),
        ({"num_layers": None, "hidden_size": None}, 40, None),
    ],
)
def test_a_larger_student_is_a_warning(student, size, said):
    shape = ModelShape(**({"num_labels": 2, "num_layers": 4, "hidden_size": 32} | student))
    found = check_sizes(shape, ModelShape(num_labels=2, num_layers=4, hidden_size=32), size, 100)
    assert found.level == ("ok" if said is None else "warning")
    assert (said or "40% of its parameters") in found.what


def test_a_teacher_without_layers_is_compared_by_its_parameters():
    shape = ModelShape(num_labels=2, num_layers=4, hidden_size=32)
    assert check_sizes(shape, ModelShape(num_labels=2), 40, 100).level == "ok"


# ---- attention ----


def test_attention_that_no_loss_reads_is_left_alone():
    student = make_student()
    before = student.config._attn_implementation
    found = check_attention({"student": student}, [])
    assert found.level == "ok"
    assert f"student {before}; no loss reads it" in found.what
    assert student.config._attn_implementation == before


def test_attention_that_can_be_captured_is_ok_also_without_weights():
    with torch.device("meta"):
        teacher = AutoModelForSequenceClassification.from_config(copy.deepcopy(make_teacher().config))
    found = check_attention({"student": make_student(), "teacher": teacher}, ["attention"])
    assert found.level == "ok"
    assert "captured for attention" in found.what


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_model_whose_attention_cannot_be_captured_is_a_stop(role):
    config = DebertaV2Config(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    models = {"student": make_student(), "teacher": make_teacher()}
    models[role] = AutoModelForSequenceClassification.from_config(config)
    found = check_attention(models, ["attention", "token_relation"])
    assert found.level == "stop"
    assert f"the {role} does not give it: DebertaV2ForSequenceClassification" in found.what
    assert found.fix.startswith("--losses.attention.weight 0 --losses.token_relation.weight 0")


@pytest.mark.parametrize("make", [make_student, make_teacher])
@pytest.mark.parametrize(
    ("dropout", "device", "level"), [(0.1, "cpu", "warning"), (0.0, "cpu", "ok"), (0.1, "cuda", "ok")]
)
def test_attention_dropout_is_slow_on_the_cpu(make, dropout, device, level):
    name = "attention_dropout" if make is make_student else "attention_probs_dropout_prob"
    for role, place, fix in (
        ("student", None, "--student.attention_dropout 0"),
        ("student", "overrides", f"--student.overrides.{name} 0"),
        ("student", "config", f"--student.config.{name} 0"),
        ("teacher", None, f"--teacher.overrides.{name} 0.0"),
    ):
        settings = SimpleNamespace(**{"overrides": {}, "config": None} | ({place: {name: dropout}} if place else {}))
        found = check_attention_dropout(make(dropout=dropout).config, role, device, settings)
        assert found.level == level
        assert found.fix == (fix if level == "warning" else "")


def test_a_model_without_attention_dropout_is_ok():
    assert check_attention_dropout(SimpleNamespace(to_dict=dict), "student", "cpu").level == "ok"


# ---- losses ----


def test_what_each_loss_reads_is_said():
    losses, cache = check_losses(bound(all_losses() | {"pkd": PKDLoss()}), "single_label_classification", None)
    assert losses.level == cache.level == "ok"
    for part in ("ce reads labels", "kl reads logits", "hidden reads hidden states 1→2", "attention reads queries"):
        assert part in losses.what
    assert "pkd reads first-token states" in losses.what
    assert "runs once per row" in cache.what


def test_why_the_teacher_is_not_cached_is_said():
    _, cache = check_losses(bound(), "single_label_classification", "teacher.cache is false")
    assert cache.what == "it runs in every step: teacher.cache is false"


def test_a_loss_that_is_not_for_the_task_is_a_stop():
    (found,) = check_losses(bound({"mse": LogitsMSELoss(), "dist": DISTLoss()}), "regression", None)
    assert found.level == "stop"
    assert found.what == "dist is not defined for regression"
    assert found.fix == "--losses.dist.weight 0"


@pytest.mark.parametrize("has_pool", [True, False])
def test_no_loss_of_the_teacher_is_a_warning(has_pool):
    (found,) = check_losses(bound({"ce": all_losses()["ce"]}), "single_label_classification", "no loss", has_pool)
    assert found.level == "warning"
    assert ("rows without labels" in found.why) is has_pool
    assert "--losses.kl.weight" in found.fix


# ---- settings ----


@pytest.mark.parametrize(
    ("rate", "level"), [(1e-6, "ok"), (9e-7, "warning"), (1e-2, "ok"), (0.011, "warning"), (5e-5, "ok")]
)
def test_learning_rates_far_from_the_usual_are_a_warning(rate, level):
    found = check_learning_rate(rate, "teacher.training.learning_rate")
    assert found.level == level
    if level == "warning":
        assert found.fix.startswith("--teacher.training.learning_rate 5e-5")


def test_a_high_rate_diverges_and_a_low_one_stands_still():
    assert check_learning_rate(1.0).why == "the model diverges"
    assert "hardly moves" in check_learning_rate(1e-8).why


@pytest.mark.parametrize(
    ("precision", "device", "supported", "level"),
    [
        ("no", "cpu", False, "ok"),
        ("bf16", "cpu", True, "ok"),
        ("bf16", "cpu", False, "warning"),
        ("bf16", "cuda", False, "warning"),
        ("fp16", "cuda", False, "ok"),
        ("fp16", "cpu", True, "warning"),
    ],
)
def test_a_precision_that_the_device_lacks_is_a_warning(precision, device, supported, level):
    found = check_precision(precision, device, supported)
    assert found.level == level
    if level == "ok":
        assert ("float32" if precision == "no" else precision) in found.what
    else:
        assert "--training.precision fp32" in found.fix
    assert ("--training.precision fp16" in found.fix) is (device == "cuda" and level == "warning")


def test_a_folder_that_is_not_there_yet_can_be_written(tmp_path):
    found = check_output_folder(tmp_path / "a" / "b")
    assert found.level == "ok"
    assert "GB free" in found.what
    assert not (tmp_path / "a").exists()


def test_a_file_in_the_way_is_a_stop(tmp_path):
    (tmp_path / "a").write_text("")
    found = check_output_folder(tmp_path / "a" / "b")
    assert found.level == "stop"
    assert "is a file" in found.what


def test_a_folder_that_cannot_be_written_is_a_stop(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK | os.X_OK)
    found = check_output_folder(tmp_path / "run")
    assert found.level == "stop"
    assert "cannot be written" in found.what
    assert "--output_dir" in found.fix


def test_a_plain_module_has_an_attention_of_its_own():
    assert "student of its own" in check_attention({"student": nn.Linear(2, 2)}, []).what
