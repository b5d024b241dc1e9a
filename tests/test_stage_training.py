"""What the result of a training stage depends on."""

import pytest
from pydantic import ValidationError

from distill_nlp.config import TrainingSection
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


def test_a_threshold_of_no_early_stopping_changes_no_result():
    assert effective(TrainingSection(early_stopping_threshold=0.1), True) == effective(TrainingSection(), True)


def test_the_settings_reach_the_trainer(tmp_path):
    arguments = training_arguments(TrainingSection(**NEW, use_cpu=True), tmp_path, seed=1)
    assert {name: getattr(arguments, name) for name in NEW} == NEW


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
