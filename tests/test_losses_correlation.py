"""DIST, against loops in float64."""

import numpy as np
import pytest
import torch
from helpers import numeric_gradient
from references_logits import (
    MULTI_LABEL,
    REGRESSION,
    bound,
    call,
    gradient_of,
    random_logits,
    reference_dist,
)

from distill_nlp.losses import DISTLoss, KLDivergenceLoss, ModelShape

PARTS = {"both": (1.0, 1.0), "between classes": (2.0, 0.0), "between rows": (0.0, 3.0)}
EACH_PART = pytest.mark.parametrize("weights", PARTS.values(), ids=PARTS)


def logits(seed, dtype=torch.float32, rows=5, **shape):
    return random_logits(seed, rows, classes=4, dtype=dtype, **shape)


def dist(student, teacher, temperature=1.0, weights=(1.0, 1.0), labels=None, mask=None):
    return call(bound(DISTLoss(temperature, *weights), student.shape[-1]), student, teacher, labels, mask)


@EACH_PART
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_equals_the_reference_and_its_gradient(weights, temperature):
    student, teacher = logits(0).requires_grad_(), logits(1)

    def reference(z):
        return reference_dist(z, teacher, temperature, *weights)

    value = dist(student, teacher, temperature, weights)
    assert value.item() == pytest.approx(reference(student), rel=1e-5)
    np.testing.assert_allclose(gradient_of(value, student), numeric_gradient(reference, student), atol=1e-5)


@EACH_PART
def test_passes_gradcheck_and_stays_in_float64(weights):
    student, teacher = logits(0, torch.float64).requires_grad_(), logits(1, torch.float64)
    value = dist(student, teacher, 2.0, weights)
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(reference_dist(student, teacher, 2.0, *weights), rel=1e-12)
    assert torch.autograd.gradcheck(lambda z: dist(z, teacher, 2.0, weights), (student,))


def test_two_classes_are_compared_between_rows():
    student, teacher = random_logits(0, classes=2), random_logits(1, classes=2)
    value = dist(student, teacher, weights=(0.0, 1.0))
    assert value.item() == pytest.approx(reference_dist(student, teacher, 1.0, 0.0, 1.0), rel=1e-5)


@EACH_PART
def test_is_zero_with_its_gradient_at_identity_and_above_elsewhere(weights):
    student = logits(0).requires_grad_()
    value = dist(student, student.detach().clone(), weights=weights)
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert np.abs(gradient_of(value, student)).max() < 1e-6
    assert dist(student, logits(1), weights=weights) > 0.1


@EACH_PART
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_probabilities_that_rise_in_line_with_the_teachers_are_as_good(weights, share):
    teacher = logits(1)
    student = (share * teacher.softmax(dim=1) + (1 - share) / 4).log()
    assert dist(student, teacher, weights=weights).item() == pytest.approx(0, abs=1e-5)
    assert call(bound(KLDivergenceLoss(1.0), 4), student, teacher) > 1e-3


@EACH_PART
def test_the_opposite_of_the_teacher_is_the_greatest_value(weights):
    teacher = logits(1, scale=0.2)
    student = (0.5 - teacher.softmax(dim=1)).log()
    assert dist(student, teacher, 1.0, weights).item() == pytest.approx(2 * sum(weights), rel=1e-5)


@EACH_PART
def test_a_constant_added_to_a_row_changes_nothing(weights):
    student, teacher, shifts = logits(0), logits(1), torch.tensor([[5.0], [-3], [0], [1], [10]])
    value = dist(student, teacher, 1.0, weights).item()
    assert dist(student + shifts, teacher - shifts, 1.0, weights).item() == pytest.approx(value, rel=1e-5)


@EACH_PART
def test_gives_the_teacher_no_gradient(weights):
    student, teacher = logits(0).requires_grad_(), logits(1).requires_grad_()
    dist(student, teacher, weights=weights).backward()
    assert student.grad.any(dim=1).all()
    assert teacher.grad is None


@EACH_PART
def test_order_of_rows_and_classes_padding_and_labels_change_nothing(weights):
    student, teacher, order = logits(0), logits(1), torch.tensor([3, 0, 4, 2, 1])
    value = dist(student, teacher, 1.0, weights).item()
    assert dist(student[order], teacher[order], 1.0, weights).item() == pytest.approx(value, rel=1e-6)
    assert dist(student.flip(1), teacher.flip(1), 1.0, weights).item() == pytest.approx(value, rel=1e-6)
    unlabeled = torch.full((5,), -100)
    assert dist(student, teacher, 1.0, weights, unlabeled, torch.zeros(5, 7)).item() == value
    assert DISTLoss.unit == "rows"
    assert DISTLoss.needs_teacher


def test_between_classes_parts_of_a_batch_add_up_to_the_whole():
    student, teacher = logits(0), logits(1)
    whole = dist(student, teacher, 2.0, (1.0, 0.0)).item()
    one, other = (dist(student[rows], teacher[rows], 2.0, (1.0, 0.0)).item() for rows in ([0], [1, 2, 3, 4]))
    assert (one + 4 * other) / 5 == pytest.approx(whole, rel=1e-5)


def test_a_batch_of_one_row_is_compared_between_classes_only():
    student, teacher = logits(0, rows=1).requires_grad_(), logits(1, rows=1)
    value = dist(student, teacher, 2.0)
    assert value.item() == pytest.approx(dist(student, teacher, 2.0, (1.0, 0.0)).item())
    alone = dist(student, teacher, 2.0, (0.0, 1.0))
    assert alone.item() == 0
    assert not gradient_of(alone, student).any()


@pytest.mark.parametrize("level", [0.0, 0.3, 7.7])
@pytest.mark.parametrize("rows", [3, 6, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_that_are_all_the_same_correlate_with_nothing_and_get_no_gradient(level, rows, dtype):
    """Rounding errors, normalized, would be a direction with a gradient of millions."""
    student = (logits(2, dtype, rows=1) + level).repeat(rows, 1).requires_grad_()
    value = dist(student, logits(1, dtype, rows=rows), 1.0, (0.0, 1.0))
    assert value.item() == pytest.approx(1)
    assert not gradient_of(value, student).any()


@pytest.mark.parametrize("level", [0.0, 0.3, 7.7])
@pytest.mark.parametrize("classes", [3, 5, 6, 7])
def test_equal_logits_correlate_with_nothing_and_get_no_gradient(level, classes):
    student = torch.full((5, classes), level).requires_grad_()
    value = dist(student, random_logits(1, classes=classes), 1.0, (1.0, 0.0))
    assert value.item() == pytest.approx(1)
    assert not gradient_of(value, student).any()


def test_a_teacher_that_says_the_same_of_every_row_gives_no_gradient():
    student = logits(0).requires_grad_()
    value = dist(student, logits(1, rows=1).repeat(5, 1), 1.0, (0.0, 1.0))
    assert value.item() == pytest.approx(1)
    assert not gradient_of(value, student).any()


def test_small_differences_count_as_large_ones():
    """A class that nobody believes in still has an order of rows."""
    student, teacher = logits(0), logits(1)
    student[:, 3], teacher[:, 3] = student[:, 3] - 18, teacher[:, 3] - 18
    value = dist(student, teacher, 1.0, (0.0, 1.0))
    assert value.item() == pytest.approx(reference_dist(student, teacher, 1.0, 0.0, 1.0), rel=1e-4)


@EACH_PART
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients_are_finite_and_float32(weights, scale, dtype):
    student = (logits(0).sign() * scale).to(dtype).requires_grad_()
    value = dist(student, (logits(1, scale=1.0) * scale).to(dtype), 2.0, weights)
    assert value.dtype == torch.float32
    assert value.isfinite()
    gradient = torch.autograd.grad(value, student)[0]
    assert gradient.isfinite().all()
    assert gradient.abs().max() < 100


def test_bfloat16_logits_are_compared_in_float32():
    student, teacher = logits(0).bfloat16(), logits(1).bfloat16()
    assert dist(student, teacher).item() == pytest.approx(reference_dist(student, teacher, 1.0), rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, "temperature must be > 0, got -1"),
        ({"inter_weight": -0.5}, "inter_weight must be >= 0, got -0.5"),
        ({"intra_weight": float("inf")}, "intra_weight must be >= 0, got inf"),
        ({"intra_weight": "1"}, "intra_weight must be >= 0, got '1'"),
        ({"inter_weight": True}, "inter_weight must be >= 0, got True"),
        ({"inter_weight": 0, "intra_weight": 0.0}, "inter_weight and intra_weight are both 0; at least one must be"),
        (
            {"temperature": {"schedule": "flsw", "value": 4}},
            "temperature: flsw would mix temperatures within a correlation",
        ),
    ],
)
def test_refuses_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        DISTLoss(**settings)


def test_refuses_what_it_is_not_defined_for():
    with pytest.raises(ValueError, match="inter_weight must be 0 with 2 classes: two probabilities that add up to 1"):
        bound(DISTLoss(), 2)
    with pytest.raises(ValueError, match="DISTLoss needs at least 2 classes, got 1"):
        bound(DISTLoss(inter_weight=0.0), 1)
    for problem_type in (MULTI_LABEL, REGRESSION):
        with pytest.raises(ValueError, match=f"DISTLoss is not defined for {problem_type}, only for single_label"):
            bound(DISTLoss(), 4, problem_type)
    with pytest.raises(ValueError, match="the student's task is single_label_classification, the teacher's multi"):
        DISTLoss().bind(ModelShape(num_labels=4), ModelShape(num_labels=4, problem_type=MULTI_LABEL))
    with pytest.raises(ValueError, match=r"student logits have shape \(5, 4\), teacher logits \(5, 3\)"):
        dist(logits(0), random_logits(1))


def test_describes_its_settings():
    assert DISTLoss().describe() == "T=1, β=1, γ=1"
    assert DISTLoss(4, 0, 2.5).describe() == "T=4, β=0, γ=2.5"
