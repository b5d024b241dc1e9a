"""Decoupled knowledge distillation, against loops in float64."""

import numpy as np
import pytest
import torch
from helpers import numeric_gradient
from references_logits import (
    MULTI_LABEL,
    REGRESSION,
    answers,
    bound,
    call,
    gradient_of,
    random_logits,
    reference_decoupled,
    rows_of,
)

from distill_nlp.losses import DecoupledKDLoss, KLDivergenceLoss, ModelShape

LABELS = torch.tensor([0, 3, -100, 1, 1])
SURE = torch.tensor([[40.0, 1, 0, -1], [-40, 2, 3, 40]])
UNSURE = torch.tensor([[1.0, 0.5, 0, 2], [0, 1, -1, 0.5]])
TARGETS = pytest.mark.parametrize("target", ["label", "teacher"])


def logits(seed, dtype=torch.float32, **shape):
    return random_logits(seed, classes=4, dtype=dtype, **shape)


def decoupled(student, teacher, labels=LABELS, mask=None, **settings):
    return call(bound(DecoupledKDLoss(**settings), student.shape[-1]), student, teacher, labels, mask)


def targets_of(target, teacher, labels=LABELS):
    return labels.tolist() if target == "label" else [max(range(4), key=row.__getitem__) for (row,) in rows_of(teacher)]


@TARGETS
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 8.0), (0.0, 1.0), (2.0, 0.0), (0.3, 0.7)])
def test_equals_the_reference_and_its_gradient(target, temperature, alpha, beta):
    student, teacher = logits(0).requires_grad_(), logits(1)
    targets = targets_of(target, teacher)

    def reference(z):
        return reference_decoupled(z, teacher, targets, temperature, alpha, beta)

    value = decoupled(student, teacher, temperature=temperature, alpha=alpha, beta=beta, target=target)
    assert value.item() == pytest.approx(reference(student), rel=1e-5)
    np.testing.assert_allclose(gradient_of(value, student), numeric_gradient(reference, student), atol=5e-6)


@TARGETS
def test_passes_gradcheck_and_stays_in_float64(target):
    student, teacher = logits(0, torch.float64).requires_grad_(), logits(1, torch.float64)
    value = decoupled(student, teacher, target=target)
    assert value.dtype == torch.float64
    expected = reference_decoupled(student, teacher, targets_of(target, teacher), 4.0, 1.0, 8.0)
    assert value.item() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(lambda z: decoupled(z, teacher, target=target), (student,))


def test_the_two_parts_make_up_the_kl_divergence():
    """KL = target part + (1 - p_t) · others' part, with p_t the teacher's probability of the target, row by row."""
    student, teacher, label = logits(0), logits(1), torch.tensor([2])
    for row in range(5):
        s, t = student[row : row + 1], teacher[row : row + 1]
        rest = 1 - answers(t[0].tolist(), 3.0)[0][2]
        parts = decoupled(s, t, label, temperature=3.0, alpha=1.0, beta=rest)
        assert parts.item() == pytest.approx(call(bound(KLDivergenceLoss(3.0), 4), s, t).item(), rel=1e-5)


def test_takes_the_teacher_as_the_truth():
    student, teacher, labels = logits(0), logits(1), torch.tensor([0, 3, 2, 1, 1])
    value, swapped = decoupled(student, teacher, labels), decoupled(teacher, student, labels)
    assert abs(value.item() - swapped.item()) > 0.1
    assert swapped.item() == pytest.approx(reference_decoupled(teacher, student, labels.tolist(), 4, 1, 8), rel=1e-5)


@TARGETS
def test_is_zero_with_its_gradient_at_identity_and_above_elsewhere(target):
    student = logits(0).requires_grad_()
    value = decoupled(student, student.detach().clone(), target=target)
    assert value.item() == pytest.approx(0, abs=1e-5)
    assert np.abs(gradient_of(value, student)).max() < 1e-5
    assert decoupled(student, logits(1), target=target) > 0.1


@TARGETS
def test_gives_the_teacher_no_gradient(target):
    student, teacher = logits(0).requires_grad_(), logits(1).requires_grad_()
    decoupled(student, teacher, target=target).backward()
    assert student.grad[[0, 1, 3, 4]].any(dim=1).all()
    assert teacher.grad is None


def test_the_targets_logit_does_not_reach_the_others_part():
    student = logits(0).requires_grad_()
    gradient = gradient_of(decoupled(student, logits(1), torch.tensor([0, 3, 2, 1, 1]), alpha=0.0), student)
    for row, label in enumerate([0, 3, 2, 1, 1]):
        assert gradient[row, label] == 0
        assert np.delete(gradient[row], label).all()


def test_rows_without_a_label_get_no_gradient_and_do_not_dilute():
    student, teacher = logits(0).requires_grad_(), logits(1)
    labeled = [0, 1, 3, 4]
    value = decoupled(student, teacher)
    assert value.item() == pytest.approx(decoupled(student[labeled], teacher[labeled], LABELS[labeled]).item())
    assert not gradient_of(value, student)[2].any()


def test_without_any_label_is_zero_and_reaches_the_graph():
    student = logits(0).requires_grad_()
    value = decoupled(student, logits(1), torch.full((5,), -100))
    assert value.item() == 0
    assert not gradient_of(value, student).any()


def test_the_teachers_own_answer_needs_no_labels_and_counts_every_row():
    student, teacher = logits(0), logits(1)
    value = decoupled(student, teacher, None, target="teacher")
    assert value.item() == decoupled(student, teacher, LABELS, target="teacher").item()
    assert value.item() == pytest.approx(decoupled(student, teacher, teacher.argmax(dim=1)).item())
    assert DecoupledKDLoss(target="teacher").unit == "rows"
    assert DecoupledKDLoss().unit == "labeled_rows"
    assert DecoupledKDLoss.needs_teacher


@TARGETS
def test_order_of_rows_and_padding_change_nothing(target):
    student, teacher, order = logits(0), logits(1), torch.tensor([3, 0, 4, 2, 1])
    value = decoupled(student, teacher, target=target).item()
    shuffled = decoupled(student[order], teacher[order], LABELS[order], target=target)
    assert shuffled.item() == pytest.approx(value, rel=1e-6)
    assert decoupled(student, teacher, mask=torch.zeros(5, 7), target=target).item() == value


@TARGETS
def test_parts_of_a_batch_add_up_to_the_whole(target):
    student, teacher = logits(0), logits(1)
    counts, parts = [], []
    for rows in (slice(0, 1), slice(1, 3), slice(3, 5)):
        counts.append(int((LABELS[rows] != -100).sum()) if target == "label" else len(LABELS[rows]))
        parts.append(decoupled(student[rows], teacher[rows], LABELS[rows], target=target).item())
    mean = sum(count * part for count, part in zip(counts, parts, strict=True)) / sum(counts)
    assert mean == pytest.approx(decoupled(student, teacher, target=target).item(), rel=1e-6)


@pytest.mark.parametrize(("student", "teacher"), [(SURE, UNSURE), (UNSURE, SURE)], ids=["student", "teacher"])
@pytest.mark.parametrize("labels", [[0, 3], [1, 2]], ids=["of what is right", "of what is wrong"])
def test_a_sure_model_is_compared_exactly(student, teacher, labels):
    """1 - p in float32 would be 0 and its logarithm infinite."""
    value = decoupled(student, teacher, torch.tensor(labels), temperature=1.0)
    assert value.item() == pytest.approx(reference_decoupled(student, teacher, labels, 1.0, 1.0, 8.0), rel=1e-5)


@TARGETS
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients_are_finite_and_float32(target, scale, dtype):
    student = (logits(0).sign() * scale).to(dtype).requires_grad_()
    value = decoupled(student, (logits(1, scale=1.0) * scale).to(dtype), target=target)
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert torch.autograd.grad(value, student)[0].isfinite().all()


def test_others_far_below_the_target_are_compared_among_themselves():
    student = torch.tensor([[5000.0, -5000, -5001, -5002]])
    teacher = torch.tensor([[5000.0, -5002, -5000, -5001]])
    expected = reference_decoupled(student, teacher, [0], 1.0, 1.0, 8.0)
    assert expected > 1
    value = decoupled(student, teacher, torch.tensor([0]), temperature=1.0)
    assert value.item() == pytest.approx(expected, rel=1e-5)


def test_bfloat16_logits_are_compared_in_float32():
    student, teacher = logits(0).bfloat16(), logits(1).bfloat16()
    expected = reference_decoupled(student, teacher, LABELS.tolist(), 4.0, 1.0, 8.0)
    assert decoupled(student, teacher).item() == pytest.approx(expected, rel=1e-5)


def test_temperature_squared_keeps_the_size_of_the_gradient():
    student, teacher = logits(0, scale=0.02).requires_grad_(), logits(1, scale=0.02)
    cold, hot = (np.abs(gradient_of(decoupled(student, teacher, temperature=t), student)).sum() for t in (1.0, 10.0))
    assert hot == pytest.approx(cold, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16])
def test_takes_labels_of_any_integer_type(dtype):
    student, teacher = logits(0), logits(1)
    assert decoupled(student, teacher, LABELS.to(dtype)).item() == decoupled(student, teacher).item()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature must be > 0, got 0.0"),
        ({"alpha": -1.0}, "alpha must be >= 0, got -1.0"),
        ({"beta": float("nan")}, "beta must be >= 0, got nan"),
        ({"beta": float("inf")}, "beta must be >= 0, got inf"),
        ({"beta": "8"}, "beta must be >= 0, got '8'"),
        ({"alpha": True}, "alpha must be >= 0, got True"),
        ({"alpha": 0, "beta": 0.0}, "alpha and beta are both 0; at least one must be above"),
        ({"target": "labels"}, "target must be one of label, teacher, got 'labels'"),
    ],
)
def test_refuses_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        DecoupledKDLoss(**settings)


def test_refuses_what_it_is_not_defined_for():
    with pytest.raises(ValueError, match="DecoupledKDLoss needs at least 3 classes, got 2"):
        bound(DecoupledKDLoss(), 2)
    for problem_type in (MULTI_LABEL, REGRESSION):
        with pytest.raises(ValueError, match=f"DecoupledKDLoss is not defined for {problem_type}, only for single_lab"):
            bound(DecoupledKDLoss(), 4, problem_type)
    with pytest.raises(ValueError, match="the student's task is single_label_classification, the teacher's multi"):
        DecoupledKDLoss().bind(ModelShape(num_labels=4), ModelShape(num_labels=4, problem_type=MULTI_LABEL))
    with pytest.raises(ValueError, match=r"student logits have shape \(5, 4\), teacher logits \(5, 3\)"):
        decoupled(logits(0), random_logits(1))


def test_refuses_labels_that_do_not_fit():
    with pytest.raises(ValueError, match='needs labels; mark rows without one by -100, or set target to "teacher"'):
        decoupled(logits(0), logits(1), None)
    with pytest.raises(ValueError, match=r"needs \(B,\) integer labels, got torch.float32 of shape \(5,\)"):
        decoupled(logits(0), logits(1), torch.zeros(5))
    with pytest.raises(ValueError, match=r"needs \(B,\) integer labels, got torch.int64 of shape \(5, 1\)"):
        decoupled(logits(0), logits(1), torch.zeros(5, 1, dtype=torch.long))


def test_describes_its_settings():
    assert DecoupledKDLoss().describe() == "T=4, α=1, β=8"
    assert DecoupledKDLoss(2, 0.5, 2, "teacher").describe() == "T=2, α=0.5, β=2, target=teacher"
