"""The defaults that distillation changes."""

import pytest
from transformers import TrainingArguments

from distill_nlp import DistillationArguments
from distill_nlp.arguments import setting_of


def test_defaults_that_differ_from_the_trainers():
    args = DistillationArguments(output_dir="x", use_cpu=True)
    assert args.logging_nan_inf_filter is False
    assert args.ddp_find_unused_parameters is False
    assert args.report_to == []
    assert args.projection_learning_rate_factor == 1.0
    assert args.loss_balancing == "none"
    assert args.term_gradient_norm_steps == 0
    assert args.unlabeled_ratio is None
    assert (args.layer_learning_rate_decay, args.freeze, args.unfreeze_every) == (1.0, [], None)
    assert (args.early_stopping_patience, args.early_stopping_threshold) == (None, 0.0)
    assert args.metric_for_best_model is None
    assert args.restore_callback_states_from_checkpoint is False


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
        ({"layer_learning_rate_decay": 0.0}, r"layer_learning_rate_decay must be in \(0, 1\], got 0.0"),
        ({"layer_learning_rate_decay": 1.1}, r"layer_learning_rate_decay must be in \(0, 1\], got 1.1"),
        ({"layer_learning_rate_decay": float("nan")}, "layer_learning_rate_decay must be in"),
        ({"freeze": "body"}, "freeze must be a list of names, got 'body'"),
        ({"freeze": ["body", ""]}, "freeze must be a list of names"),
        ({"freeze": [1]}, r"freeze must be a list of names, got \[1\]"),
        ({"freeze": ["body"], "unfreeze_every": 0}, "unfreeze_every must be at least 1, got 0"),
        ({"unfreeze_every": 5}, "unfreeze_every needs freeze, the parts to release"),
        ({"early_stopping_patience": 0, "eval_strategy": "epoch"}, "early_stopping_patience must be at least 1, got 0"),
        ({"early_stopping_patience": 2}, "early_stopping_patience needs evaluations: set eval_strategy to epoch or"),
        ({"early_stopping_threshold": -0.1}, "early_stopping_threshold must be >= 0, got -0.1"),
        ({"early_stopping_threshold": float("nan")}, "early_stopping_threshold must be >= 0, got nan"),
    ],
)
def test_refuses_arguments_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        DistillationArguments(output_dir="x", use_cpu=True, **settings)


def test_early_stopping_watches_a_metric_and_keeps_its_counter_over_an_interruption():
    settings = {"output_dir": "x", "use_cpu": True, "eval_strategy": "epoch", "early_stopping_patience": 2}
    args = DistillationArguments(**settings)
    assert (args.metric_for_best_model, args.greater_is_better) == ("loss", False)
    assert args.restore_callback_states_from_checkpoint
    assert DistillationArguments(**settings, metric_for_best_model="f1").greater_is_better


def test_plain_arguments_have_the_defaults_of_ours():
    args = TrainingArguments("x", use_cpu=True)
    assert setting_of(args, "freeze") == []
    assert setting_of(args, "layer_learning_rate_decay") == 1.0
    setting_of(args, "freeze").append("body")
    assert setting_of(args, "freeze") == []


def test_a_cpu_has_no_number(tmp_path, monkeypatch):
    """As of a rank on a CPU: PyTorch cannot load a file to `cpu:0`."""
    import torch
    from transformers import TrainingArguments

    monkeypatch.setattr(TrainingArguments, "device", property(lambda args: torch.device("cpu:0")))
    assert DistillationArguments(output_dir=str(tmp_path)).device == torch.device("cpu")
    monkeypatch.setattr(TrainingArguments, "device", property(lambda args: torch.device("cuda:1")))
    assert DistillationArguments(output_dir=str(tmp_path)).device == torch.device("cuda:1")
