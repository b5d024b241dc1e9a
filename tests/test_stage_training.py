"""What the result of a training stage depends on, and the rows that it is evaluated on."""

import json
import shutil
from collections import Counter
from datetime import timedelta
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from accelerate import PartialState
from pydantic import ValidationError

from distill_nlp import pipeline
from distill_nlp.arguments import DistillationArguments
from distill_nlp.cli import main
from distill_nlp.config import TrainingSection
from distill_nlp.config_file import load_experiment
from distill_nlp.inference import predict_logits
from distill_nlp.loading import load_classifier
from distill_nlp.materials import Materials
from distill_nlp.pipeline import Pipeline
from distill_nlp.stage_training import TrainingJob
from distill_nlp.trainer import DistillationTrainer
from distill_nlp.training_rows import validation_rows
from distill_nlp.training_settings import effective, training_arguments


def test_settings_of_projections_and_balance_count_where_they_are_not_at_their_default():
    """A setting that is new must not make the results of an older version stale."""
    new = {
        "loss_balancing": "gradient_norm",
        "projection_init_batches": 4,
        "projection_learning_rate_factor": 10.0,
        "projection_weight_decay": 0.1,
        "term_gradient_norm_steps": 5,
    }
    plain, changed = TrainingSection(), TrainingSection(**new)
    assert not new.keys() & effective(plain, of_student=True).keys()
    assert new.items() <= effective(changed, of_student=True).items()
    assert effective(changed, of_student=False) == effective(plain, of_student=False)


NEW = {
    "early_stopping_patience": 3,
    "early_stopping_threshold": 0.01,
    "freeze": ["embeddings"],
    "layer_learning_rate_decay": 0.8,
    "unfreeze_every": 10,
}


@pytest.mark.parametrize("of_student", [True, False])
def test_what_freezes_slows_or_stops_counts_in_every_training_where_it_is_not_at_its_default(of_student):
    assert not NEW.keys() & effective(TrainingSection(), of_student).keys()
    assert NEW.items() <= effective(TrainingSection(**NEW), of_student).items()
    assert "freeze" not in effective(TrainingSection(freeze=[]), of_student)


LOGGING = ("log_level", "log_on", "logging_", "project", "report_to", "run_name", "trackio_")


def test_how_a_training_is_logged_changes_no_result():
    known = DistillationArguments.__dataclass_fields__
    names = {name for name in known if name.startswith(LOGGING) and not name.startswith("projection")}
    assert len(names) >= 12
    section = TrainingSection(**{name: known[name].default for name in names - set(TrainingSection.model_fields)})
    assert effective(section, True) == effective(TrainingSection(), True)


def test_a_threshold_of_no_early_stopping_changes_no_result():
    assert effective(TrainingSection(early_stopping_threshold=0.1), True) == effective(TrainingSection(), True)


def test_the_settings_reach_the_trainer(tmp_path):
    arguments = training_arguments(TrainingSection(**NEW, use_cpu=True), tmp_path, seed=1)
    assert {name: getattr(arguments, name) for name in NEW} == NEW


@pytest.mark.parametrize(("settings", "pins"), [({}, True), ({"use_cpu": True}, False)])
def test_on_a_gpu_batches_are_pinned(tmp_path, monkeypatch, settings, pins):
    for place in ("cuda", "accelerator"):
        monkeypatch.setattr(f"distill_nlp.training_settings.torch.{place}.is_available", lambda: True)
    monkeypatch.setattr("distill_nlp.training_settings.DistillationArguments", lambda **values: values)
    assert training_arguments(TrainingSection(**settings), tmp_path, seed=1)["dataloader_pin_memory"] == pins


@pytest.mark.parametrize(
    ("device", "settings", "expected"),
    [
        ("cuda", {}, True),
        ("cuda", {"dataloader_pin_memory": False}, False),
        ("cuda", {"accelerator_config": {"split_batches": True}}, True),
        ("cuda", {"accelerator_config": {"non_blocking": False}}, False),
        ("cpu", {}, False),
    ],
)
def test_a_gpu_gets_its_batches_while_it_computes(tmp_path, monkeypatch, device, settings, expected):
    monkeypatch.setattr(DistillationArguments, "device", torch.device(device))
    arguments = DistillationArguments(output_dir=str(tmp_path), **settings)
    assert arguments.accelerator_config.non_blocking is expected
    assert arguments.accelerator_config.split_batches is bool(
        settings.get("accelerator_config", {}).get("split_batches")
    )


@pytest.mark.parametrize(("settings", "seconds"), [({}, 7200), ({"training__ddp_timeout": 60}, 60)])
def test_ranks_wait_long_for_one_another(experiment, monkeypatch, settings, seconds):
    asked = []
    monkeypatch.setattr(pipeline, "PartialState", lambda **given: asked.append(given["timeout"]) or PartialState())
    Pipeline(load_experiment(experiment(**settings)))
    assert asked == [timedelta(seconds=seconds)]


def test_several_gpus_in_one_process_are_refused_before_anything_is_read(experiment, tmp_path, monkeypatch, capsys):
    path = experiment()
    shutil.rmtree(tmp_path / "data")
    monkeypatch.setattr(DistillationArguments, "n_gpu", 2)
    for words in ([], ["--dry-run"], ["--stages", "student"]):
        assert main(["run", str(path), *words]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: training: 2 GPUs in one process would be DataParallel")
        assert err.count("\n") == 1
    # A report trains nothing.
    assert main(["run", str(path), "--stages", "report"]) == 2
    assert "GPUs" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "place"),
    [
        ({"layer_learning_rate_decay": 0}, "layer_learning_rate_decay"),
        ({"layer_learning_rate_decay": 1.5}, "layer_learning_rate_decay"),
        ({"freeze": "body"}, "freeze"),
        ({"unfreeze_every": 0}, "unfreeze_every"),
        ({"early_stopping_patience": 0}, "early_stopping_patience"),
        ({"early_stopping_threshold": -1}, "early_stopping_threshold"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(settings, place):
    with pytest.raises(ValidationError) as error:
        TrainingSection(**settings)
    assert [mistake["loc"] for mistake in error.value.errors()] == [(place,)]


def test_measuring_alone_changes_no_result():
    assert effective(TrainingSection(term_gradient_norm_steps=5), True) == effective(TrainingSection(), True)


def test_what_changes_a_result_counts():
    assert effective(TrainingSection(learning_rate=1e-3), True) != effective(TrainingSection(), True)
    for settings in ({"logging_steps": 7}, {"ddp_timeout": 60}):
        assert effective(TrainingSection(**settings), True) == effective(TrainingSection(), True)


# ---- evaluations ----


@pytest.mark.parametrize(
    ("training", "times"),
    [
        ({"max_steps": 6, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 0.02}, 3),
        ({"max_steps": 5, "eval_strategy": "steps", "eval_steps": 2}, 3),
        ({"max_steps": 2, "eval_strategy": "no"}, 1),
    ],
)
@pytest.mark.usefixtures("no_doctor")
def test_the_model_that_is_kept_is_evaluated_once(experiment, tmp_path, monkeypatch, training, times):
    calls, evaluate = [], DistillationTrainer.evaluate

    def counted(self, *arguments, **settings):
        calls.append(self)
        return evaluate(self, *arguments, **settings)

    monkeypatch.setattr(DistillationTrainer, "evaluate", counted)
    path = experiment(teacher__training=training)
    assert main(["run", str(path), "--stages", "teacher"]) == 0
    assert len(calls) == times
    found = json.loads((tmp_path / "run" / "teacher" / "stage.json").read_text())["validation"]
    materials = Materials(load_experiment(path))
    rows = materials.tokens(materials.splits.validation)
    model = load_classifier(str(tmp_path / "run" / "teacher"))
    logits, labels = torch.tensor(predict_logits(model, materials.tokenizer, rows)), torch.tensor(rows["labels"][:])
    assert found["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)
    assert found["accuracy"] == pytest.approx((logits.argmax(-1) == labels).float().mean().item())


def test_of_a_best_model_whose_checkpoint_is_gone_the_metrics_are_new(tmp_path):
    """The Trainer then keeps the last weights, with a warning."""
    training = object.__new__(TrainingJob)
    training.arguments = SimpleNamespace(load_best_model_at_end=True)
    history = [{"step": 2, "eval_loss": 1.0}, {"step": 4, "eval_loss": 2.0}, {"step": 4, "train_loss": 2.0}]
    state = SimpleNamespace(log_history=history, global_step=4, best_global_step=2, best_model_checkpoint=None)
    trainer = SimpleNamespace(state=state, evaluate=lambda: {"eval_loss": 3.0})
    assert training._validation(trainer) == {"eval_loss": 3.0}
    state.best_model_checkpoint = str(tmp_path / "checkpoint-2")
    assert training._validation(trainer) == {"eval_loss": 3.0}
    (tmp_path / "checkpoint-2").mkdir()
    assert training._validation(trainer) == history[0]
    training.arguments.load_best_model_at_end = False
    assert training._validation(trainer) == history[1]


# ---- rows of evaluations ----


def test_validation_rows_come_by_length_with_their_labels(experiment, tmp_path):
    rows = [(" ".join(["w4", "w9"][i % 2 : i % 2 + 1] + ["w20"] * (i * 5 % 11)), i % 2) for i in range(12)]
    pd.DataFrame(rows, columns=["text", "label"]).to_parquet(tmp_path / "data" / "validation.parquet")
    materials = Materials(load_experiment(experiment(data__max_length=10)))
    found = validation_rows(materials)
    lengths = [len(row["input_ids"]) for row in found]
    assert lengths == sorted(lengths, reverse=True)
    assert len(set(lengths)) > 5
    in_the_file = materials.tokens(materials.splits.validation)
    assert lengths != [len(row["input_ids"]) for row in in_the_file]

    def counted(data):
        return Counter((tuple(row["input_ids"]), row["labels"]) for row in data)

    assert counted(found) == counted(in_the_file)


@pytest.mark.slow
@pytest.mark.usefixtures("no_doctor")
def test_every_stage_evaluates_on_batches_of_like_lengths(experiment, monkeypatch):
    seen = []
    make = DistillationTrainer.__init__

    def noting(self, *arguments, **settings):
        seen.append([len(row["input_ids"]) for row in settings["eval_dataset"]])
        make(self, *arguments, **settings)

    monkeypatch.setattr(DistillationTrainer, "__init__", noting)
    config = experiment()
    data = config.parent / "data" / "validation.parquet"
    rows = pd.read_parquet(data)
    rows["text"] = [text + " w30" * (i % 4) for i, text in enumerate(rows["text"])]
    rows.to_parquet(data)
    assert main(["run", str(config), "--stages", "teacher,baseline,student"]) == 0
    assert len(seen) == 3
    assert all(lengths == sorted(lengths, reverse=True) and len(set(lengths)) > 1 for lengths in seen)
