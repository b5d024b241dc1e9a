"""Too little memory: one line that says what to lower, or smaller batches where nothing depends on them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import make_dataset, make_student, make_tokenizer

from distill_nlp.cli import main
from distill_nlp.errors import DistillError
from distill_nlp.inference import predict_logits
from distill_nlp.out_of_memory import is_out_of_memory, memory_errors
from distill_nlp.trainer import DistillationTrainer


def on_a_cpu() -> RuntimeError:
    """What PyTorch itself raises."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**58, dtype=torch.uint8)
    return caught.value


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (torch.AcceleratorError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation'"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory."), False),
    ],
)
def test_out_of_memory_is_told_apart(error, expected):
    assert is_out_of_memory(error) is expected
    told = DistillError if expected else type(error)
    with pytest.raises(told), memory_errors("student", "lower this"):
        raise error


def test_that_of_a_cpu_is_known_too():
    with (
        pytest.raises(DistillError, match="^student: out of memory; lower this$"),
        memory_errors("student", "lower this"),
    ):
        raise on_a_cpu()


class _Small(torch.nn.Module):
    """A student on a device that holds so many rows."""

    def __init__(self, most: int, error: Exception) -> None:
        super().__init__()
        self.student, self.most, self.error = make_student(), most, error
        self.config = self.student.config
        self.seen: list[int] = []

    def forward(self, input_ids, attention_mask):
        self.seen.append(len(input_ids))
        if len(input_ids) > self.most:
            raise self.error
        return SimpleNamespace(logits=self.student(input_ids, attention_mask).logits)


@pytest.mark.parametrize(("most", "tried"), [(16, [16]), (5, [16, 8, 4]), (1, [16, 8, 4, 2, 1])])
def test_prediction_goes_on_with_smaller_batches(most, tried, caplog):
    data, tokenizer = make_dataset(), make_tokenizer()
    model = _Small(most, torch.OutOfMemoryError("CUDA out of memory."))
    found = predict_logits(model, tokenizer, data, batch_size=16)
    np.testing.assert_allclose(found, predict_logits(model.student, tokenizer, data, batch_size=16), atol=1e-5)
    assert list(dict.fromkeys(model.seen)) == tried
    halved = [record.getMessage() for record in caplog.records if "going on with batches of" in record.getMessage()]
    assert len(halved) == len(tried) - 1


def test_one_row_that_does_not_fit_is_one_line_and_other_errors_are_themselves():
    model = _Small(0, torch.OutOfMemoryError("CUDA out of memory."))
    with pytest.raises(DistillError, match="Evaluating: out of memory; one text of this length is too much"):
        predict_logits(model, make_tokenizer(), make_dataset(), 4, description="Evaluating")
    assert list(dict.fromkeys(model.seen)) == [4, 2, 1]
    broken = _Small(0, RuntimeError("another thing"))
    with pytest.raises(RuntimeError, match="another thing"):
        predict_logits(broken, make_tokenizer(), make_dataset(), 4)
    assert broken.seen == [4]


@pytest.mark.usefixtures("no_doctor")
def test_a_students_training_says_which_phase_and_what_would_be_different(experiment, monkeypatch, capsys):
    phases = [
        {"losses": {"rkd_angle": {}}},
        {"losses": {"kl": {}}, "training": {"max_steps": 2, "per_device_train_batch_size": 4}},
    ]
    config = str(experiment(phases=phases))
    assert main(["run", config, "--stages", "teacher"]) == 0
    plain = DistillationTrainer.train
    for name, said in (
        ("rkd_angle", "training.per_device_train_batch_size (now 8; to 4, with gradient_accumulation_steps 2, a step "
         "stays what it is, but for losses.rkd_angle, which compares the rows of a forward pass)"),
        ("kl", "phases.1.training.per_device_train_batch_size (now 4; to 2, with gradient_accumulation_steps 2, a "
         "step stays what it is)"),
    ):  # fmt: skip

        def full(self, *arguments, name=name, **settings):
            if name in self.objective.losses:
                raise on_a_cpu()
            return plain(self, *arguments, **settings)

        monkeypatch.setattr(DistillationTrainer, "train", full)
        assert main(["run", config, "--stages", "student"]) == 1
        assert f"out of memory; lower {said}, data.max_length" in capsys.readouterr().err


def test_a_step_that_does_not_fit_with_three_rows_says_what_to_lower(experiment, monkeypatch, capsys, no_doctor):
    def full(*arguments, **settings):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("distill_nlp.settling.fitting_batch_size", full)
    training = {"per_device_train_batch_size": "auto", "max_steps": 2, "eval_strategy": "no"}
    losses = {"ce": {}, "kl": {}}
    assert main(["run", str(experiment(training=training, losses=losses)), "--stages", "teacher"]) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(
        "error: batch size: out of memory; a step of teacher on three of the longest rows does not fit"
    )


# The models come to the device as the trainer is made.
@pytest.mark.parametrize("method", ["train", "evaluate", "__init__"])
def test_a_training_says_what_to_lower(experiment, monkeypatch, capsys, method, no_doctor):
    error = on_a_cpu()

    def full(*arguments, **settings):
        raise error

    monkeypatch.setattr(DistillationTrainer, method, full)
    path = experiment(training__eval_strategy="no") if method == "evaluate" else experiment()
    assert main(["run", str(path), "--stages", "teacher"]) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line == (
        "error: teacher: out of memory; lower teacher.training.per_device_train_batch_size (now 8; to 4, with "
        "gradient_accumulation_steps 2, a step stays what it is), data.max_length, or per_device_eval_batch_size (now "
        "64); or set teacher.training.gradient_checkpointing"
    )
