"""What the result of a training stage depends on, and the rows that it is evaluated on."""

from collections import Counter

import pandas as pd
import pytest
from pydantic import ValidationError

from distill_nlp.arguments import DistillationArguments
from distill_nlp.cli import main
from distill_nlp.config import TrainingSection
from distill_nlp.config_file import load_experiment
from distill_nlp.materials import Materials
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


@pytest.mark.parametrize(
    ("settings", "expected"), [({}, True), ({"dataloader_pin_memory": False}, False), ({"use_cpu": True}, False)]
)
def test_a_gpu_gets_its_batches_while_it_computes(tmp_path, monkeypatch, settings, expected):
    for place in ("cuda", "accelerator"):
        monkeypatch.setattr(f"distill_nlp.training_settings.torch.{place}.is_available", lambda: True)
    monkeypatch.setattr("distill_nlp.training_settings.DistillationArguments", lambda **values: values)
    found = training_arguments(TrainingSection(**settings), tmp_path, seed=1)
    assert (found["dataloader_pin_memory"], found["accelerator_config"]) == (expected, {"non_blocking": expected})


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
    assert effective(TrainingSection(logging_steps=7), True) == effective(TrainingSection(), True)


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
