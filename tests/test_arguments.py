"""The defaults that distillation changes."""

import pytest

from distill_nlp import DistillationArguments


def test_defaults_that_differ_from_the_trainers():
    args = DistillationArguments(output_dir="x", use_cpu=True)
    assert args.logging_nan_inf_filter is False
    assert args.ddp_find_unused_parameters is False
    assert args.report_to == []
    assert args.projection_learning_rate_factor == 1.0
    assert args.loss_balancing == "none"
    assert args.term_gradient_norm_steps == 0
    assert args.unlabeled_ratio is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"projection_learning_rate_factor": 0.0}, "projection_learning_rate_factor must be > 0, got 0.0"),
        ({"projection_learning_rate_factor": float("nan")}, "projection_learning_rate_factor must be > 0, got nan"),
        ({"projection_weight_decay": -0.1}, "projection_weight_decay must be >= 0, got -0.1"),
        ({"projection_init_batches": 0}, "projection_init_batches must be at least 1, got 0"),
        ({"loss_balancing": "yes"}, "loss_balancing must be none or gradient_norm, got 'yes'"),
        ({"term_gradient_norm_steps": -1}, "term_gradient_norm_steps must be >= 0, got -1"),
        ({"unlabeled_ratio": 0.0}, "unlabeled_ratio must lie between 0 and 1, got 0.0; leave it out"),
        ({"unlabeled_ratio": 1.0}, "unlabeled_ratio must lie between 0 and 1, got 1.0"),
        ({"unlabeled_ratio": float("nan")}, "unlabeled_ratio must lie between 0 and 1, got nan"),
    ],
)
def test_refuses_arguments_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        DistillationArguments(output_dir="x", use_cpu=True, **settings)
