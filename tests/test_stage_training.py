"""What the result of a training stage depends on."""

from distill_nlp.config import TrainingSection
from distill_nlp.stage_training import effective


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


def test_measuring_alone_changes_no_result():
    assert effective(TrainingSection(term_gradient_norm_steps=5), True) == effective(TrainingSection(), True)


def test_what_changes_a_result_counts():
    assert effective(TrainingSection(learning_rate=1e-3), True) != effective(TrainingSection(), True)
    assert effective(TrainingSection(logging_steps=7), True) == effective(TrainingSection(), True)
