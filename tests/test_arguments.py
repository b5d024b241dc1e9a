"""The defaults that distillation changes."""

import pytest

from distill_nlp import DistillationArguments


def test_defaults_that_differ_from_the_trainers():
    args = DistillationArguments(output_dir="x", use_cpu=True)
    assert args.logging_nan_inf_filter is False
    assert args.ddp_find_unused_parameters is False
    assert args.report_to == []
    assert args.projection_learning_rate is None


@pytest.mark.parametrize("rate", [0.0, -1e-3, float("nan")])
def test_projection_learning_rate_must_be_above_zero(rate):
    with pytest.raises(ValueError, match="projection_learning_rate must be > 0, got"):
        DistillationArguments(output_dir="x", use_cpu=True, projection_learning_rate=rate)
