"""NaN and infinity in training are named by term, step and rows, and nothing of them is saved."""

from __future__ import annotations

import itertools
import types

import pytest
import torch
from helpers import ALL_WEIGHTS, all_losses, make_dataset, make_student, make_teacher, parameters_of, step_logs

from distill_nlp import CrossEntropyLoss, KLDivergenceLoss, nonfinite
from distill_nlp.arguments import DistillationArguments
from distill_nlp.losses.base import DistillationLoss
from distill_nlp.manifests import checkpoints, damage
from distill_nlp.nonfinite import FiniteCheck, NonFiniteError


class Spoilt(CrossEntropyLoss):
    """Cross-entropy with another value in some of its calls, counted from 1."""

    def __init__(self, calls, value=float("nan"), gradient_alone=False):
        super().__init__()
        self.calls, self.value, self.gradient_alone, self.count = calls, value, gradient_alone, 0

    def forward(self, student, *arguments):
        self.count += 1
        loss = super().forward(student, *arguments)
        if self.count not in self.calls:
            return loss
        if self.gradient_alone:
            loss.register_hook(lambda gradient: gradient * self.value)
            return loss
        return loss * self.value


def spoilt_trainer(make_trainer, spoilt, name="run", **changes):
    losses = {"ce": spoilt, "kl": KLDivergenceLoss()}
    settings = {"max_steps": 6, "logging_steps": 2, "save_strategy": "steps", "save_steps": 2}
    return make_trainer(name, losses=losses, **(settings | changes))


# Rows come in order, four a step: the third step has the rows 8 to 11.
@pytest.mark.parametrize(
    ("spoilt", "words"),
    [
        (Spoilt([3]), "step 3: the loss ce is NaN, in a batch of rows 8, 9, 10, 11 of the training data"),
        (Spoilt([3], float("inf")), "step 3: the loss ce is infinite, in a batch of rows 8, 9, 10, 11"),
        (
            Spoilt([3], gradient_alone=True),
            "step 3: the norm of the gradient is NaN, although no loss is, in a batch of",
        ),
    ],
)
def test_the_error_names_step_term_and_rows_and_the_last_good_checkpoint_stays(make_trainer, tmp_path, spoilt, words):
    with pytest.raises(NonFiniteError) as error:
        spoilt_trainer(make_trainer, spoilt).train()
    assert str(error.value).startswith(words)
    assert "set on_nonfinite to skip" in str(error.value)
    (whole,) = checkpoints(tmp_path / "run")
    assert (whole.name, damage(whole)) == ("checkpoint-2", None)


@pytest.mark.parametrize("strategy", ["group_by_length", "random"])
@pytest.mark.parametrize("call", [4, 7, 16])
def test_rows_are_those_of_an_order_that_was_drawn(make_trainer, strategy, call):
    """In two micro-batches a step, of the first epoch and the second, and at its end."""
    seen = []

    class Marked(Spoilt):
        def forward(self, student, teacher, labels, attention_mask):
            seen.append((attention_mask.sum().item(), sorted(labels.tolist())))
            return super().forward(student, teacher, labels, attention_mask)

    data = make_dataset(16)
    trainer = spoilt_trainer(
        make_trainer, Marked([call]), data=data, train_sampling_strategy=strategy, logging_steps=1,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, save_strategy="no", max_steps=8,
    )  # fmt: skip
    torch.manual_seed(3)
    with pytest.raises(NonFiniteError) as error:
        trainer.train()
    text = str(error.value)
    assert text.startswith(f"step {(call + 1) // 2}: the loss ce is NaN, in a batch of rows ")
    rows = [int(row) for row in text.partition("rows ")[2].partition(" of")[0].split(", ")]
    assert len(rows) == 2
    lengths, labels = ([data[row][name] for row in rows] for name in ("input_ids", "labels"))
    assert (sum(map(len, lengths)), sorted(labels)) == seen[call - 1]


def test_a_student_that_answers_nan_is_named_with_those_rows(make_trainer):
    student = make_student(dropout=0.0)
    with torch.no_grad():
        student.distilbert.embeddings.word_embeddings.weight[50] = float("nan")
    data = make_dataset(16)
    expected = [row for row in range(4) if 50 in data[row]["input_ids"]] or None
    word = data[2]["input_ids"][1]
    if expected is None:
        with torch.no_grad():
            student.distilbert.embeddings.word_embeddings.weight[word] = float("nan")
        expected = [row for row in range(4) if {50, word} & set(data[row]["input_ids"])]
    with pytest.raises(NonFiniteError) as error:
        spoilt_trainer(make_trainer, Spoilt([]), student=student, data=data, logging_steps=1).train()
    shown = ", ".join(map(str, expected))
    assert f"as the student's logits are, for row{'s' * (len(expected) > 1)} {shown} of the training" in str(
        error.value
    )


def test_teacher_logits_that_are_not_finite_are_refused_with_the_rows(make_trainer):
    teacher, data = make_teacher(), make_dataset(16)
    word = data[5]["input_ids"][1]
    with torch.no_grad():
        teacher.bert.embeddings.word_embeddings.weight[word] = float("inf")
    first = next(row for row in range(16) if word in data[row]["input_ids"])
    with pytest.raises(NonFiniteError) as error:
        spoilt_trainer(make_trainer, Spoilt([]), teacher=teacher, data=data, logging_steps=1).train()
    assert f"step {first // 4 + 1}: the teacher's logits are NaN or infinite, for row" in str(error.value)
    assert f" {first}" in str(error.value).partition("for row")[2]


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused", "sgd"])
@pytest.mark.parametrize("gradient_alone", [False, True])
def test_a_skipped_step_changes_neither_weights_nor_optimizer(make_trainer, optimizer, gradient_alone, caplog):
    """A training without the spoilt batch is the same, but for the count of its steps."""

    class States(Spoilt):
        def forward(self, student, *arguments):
            states.append((parameters_of(trainer.student), optimizer_state(trainer)))
            return super().forward(student, *arguments)

    def optimizer_state(of):
        return [s.clone() for state in of.optimizer.state_dict()["state"].values() for s in state.values()
                if isinstance(s, torch.Tensor)]  # fmt: skip

    states: list = []
    trainer = spoilt_trainer(
        make_trainer, States([3], gradient_alone=gradient_alone), on_nonfinite="skip", optim=optimizer,
        weight_decay=0.1, max_steps=4, save_strategy="no", logging_steps=4,
    )  # fmt: skip
    trainer.train()
    (weights, before), (weights_after, after) = states[2], states[3]
    assert all(torch.equal(weights[name], weights_after[name]) for name in weights)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert not all(torch.equal(weights[name], states[1][0][name]) for name in weights)
    (entry,) = step_logs(trainer)
    assert entry["nonfinite_steps"] == 1
    assert all(torch.isfinite(torch.tensor(entry[name])) for name in ("loss", "loss_ce", "loss_kl"))
    assert ["skipped (1 of at most 10)" in r.message for r in caplog.records if "step 3" in r.message] == [True]


def test_too_many_skipped_steps_end_the_training(make_trainer):
    settings = {"on_nonfinite": "skip", "max_nonfinite_steps": 2}
    spoilt_trainer(make_trainer, Spoilt([1, 3]), **settings).train()
    with pytest.raises(
        NonFiniteError, match=r"step 5: .*the 3th step that is not finite, and max_nonfinite_steps is 2"
    ):
        spoilt_trainer(make_trainer, Spoilt([1, 3, 5]), "other", **settings).train()


def test_the_count_of_skipped_steps_goes_on_with_the_training(make_trainer):
    settings = {"on_nonfinite": "skip", "max_nonfinite_steps": 1}
    spoilt_trainer(make_trainer, Spoilt([1]), max_steps=2, **settings).train()
    with pytest.raises(NonFiniteError, match="the 2th step"):
        spoilt_trainer(make_trainer, Spoilt([1]), **settings).train(resume_from_checkpoint=True)


def test_a_last_step_that_is_not_finite_is_found_where_nothing_is_logged(make_trainer):
    with pytest.raises(NonFiniteError, match="step 6"):
        spoilt_trainer(make_trainer, Spoilt([6]), logging_strategy="no", save_strategy="no").train()


def test_a_sound_training_is_what_it_was(make_trainer):
    """With either policy the weights are the same, bit for bit."""
    weights = []
    for policy in ("stop", "skip"):
        trainer = make_trainer(policy, losses=all_losses(), loss_weights=ALL_WEIGHTS, on_nonfinite=policy)
        trainer.train()
        weights.append(parameters_of(trainer.model))
        assert not any("nonfinite_steps" in entry for entry in step_logs(trainer))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


# ---- the loss scale of float16 ----


@pytest.fixture
def scaled(make_trainer):
    """`scaled(scale, **changes)`: a trainer whose steps go through a real loss scaler, which begins with that scale."""

    def make(scale, **changes):
        trainer = make_trainer("run", logging_steps=10, **changes)
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        return trainer

    return make


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch"])
@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_overflows_under_a_loss_scale_are_counted_and_no_error(scaled, optim, policy):
    trainer = scaled(1024.0, max_steps=10, optim=optim, on_nonfinite=policy)
    scaler, parameter = trainer.accelerator.scaler, next(p for p in trainer.student.parameters() if p.requires_grad)
    parameter.register_hook(lambda grad: grad * (float("inf") if scaler.get_scale() > 64 else 1.0))
    before = parameters_of(trainer.model)
    trainer.train()
    (entry,) = step_logs(trainer)
    assert (entry["fp16_overflows"], scaler.get_scale()) == (4, 64)
    assert "nonfinite_steps" not in entry
    after = parameters_of(trainer.model)
    assert all(torch.isfinite(value).all() for value in after.values())
    assert not all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch"])
def test_overflows_without_end_are_an_error(scaled, optim):
    trainer = scaled(1024.0, max_steps=40, optim=optim)
    next(p for p in trainer.student.parameters() if p.requires_grad).register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(NonFiniteError, match=r"not finite in 25 steps in a row, at a loss scale of "):
        trainer.train()
    # Seen as the epoch ends, of four steps each.
    assert trainer.state.global_step == 28


def test_overflows_in_a_row_are_counted_over_looks_at_nothing(monkeypatch):
    """Among several ranks one looks although it has taken in nothing, as after a step that was looked at already."""
    accelerator = types.SimpleNamespace(
        scaler=torch.amp.GradScaler("cpu"), num_processes=2, device=torch.device("cpu"), reduce=lambda x, reduction: x
    )
    monkeypatch.setattr(nonfinite, "gather_object", lambda found: found)
    check = FiniteCheck("stop", 0, accelerator, lambda step, micro: None)

    def step(number, norm):
        check.add_norm(number, torch.tensor(norm), None)
        check.look()
        check.look()

    for number in range(24):
        step(number, float("inf"))
    step(24, 1.0)
    for number in range(24):
        step(number, float("inf"))
    with pytest.raises(NonFiniteError, match="not finite in 25 steps in a row"):
        step(24, float("inf"))


def test_an_overflow_now_and_then_is_not_in_a_row(scaled):
    trainer = scaled(1024.0, max_steps=60)
    seen = itertools.count()
    parameter = next(p for p in trainer.student.parameters() if p.requires_grad)
    parameter.register_hook(lambda grad: grad * (float("nan") if next(seen) % 20 else 1.0))
    trainer.train()
    assert step_logs(trainer)[-1]["fp16_overflows"] == 57


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"on_nonfinite": "ignore"}, "on_nonfinite must be stop or skip, got 'ignore'"),
        ({"max_nonfinite_steps": -1}, "max_nonfinite_steps must be >= 0, got -1"),
    ],
)
def test_unknown_policies_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        DistillationArguments(output_dir=str(tmp_path), use_cpu=True, **changes)


def test_the_spoilt_loss_is_a_loss():
    assert isinstance(Spoilt([]), DistillationLoss)


@pytest.mark.parametrize("first", [0, 1])
def test_of_several_ranks_the_one_with_the_cause_is_heard(monkeypatch, first):
    """The norm is that of all ranks: the others know nothing but it, and name rows of their own."""
    accelerator = types.SimpleNamespace(
        scaler=None, num_processes=2, device=torch.device("cpu"), reduce=lambda x, reduction: x
    )
    said = []
    for rank in range(2):
        check = FiniteCheck("stop", 0, accelerator, lambda step, micro, rank=rank: [10 * rank])
        value = torch.tensor(float("nan") if rank == 1 else 1.0)
        check.add(3, {"kl": value}, torch.zeros(1, 2), None)
        check.add_norm(3, torch.tensor(float("nan")), None)
        monkeypatch.setattr(nonfinite, "gather_object", lambda found: said.extend(found) or found)
        with pytest.raises(NonFiniteError):
            check.look()
    ranks = said if first == 0 else said[::-1]
    monkeypatch.setattr(nonfinite, "gather_object", lambda found: ranks)
    check.add(3, {"kl": torch.tensor(float("nan"))}, torch.zeros(1, 2), None)
    with pytest.raises(NonFiniteError, match="step 4: the loss kl is NaN, in a batch of row 10 of the training data"):
        check.look()
