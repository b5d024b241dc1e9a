"""Losses of the two models' logits, against loops in float64."""

import math

import numpy as np
import pytest
import torch
from helpers import numeric_gradient
from references_logits import (
    MULTI_LABEL,
    REGRESSION,
    SINGLE_LABEL,
    answers,
    bound,
    call,
    gradient_of,
    random_logits,
    reference_softened,
    reference_squared_error,
    rows_of,
)

from distill_nlp.losses import (
    CrossEntropyLoss,
    JensenShannonLoss,
    KLDivergenceLoss,
    LogitsMSELoss,
    ModelShape,
    ReverseKLLoss,
    SoftCrossEntropyLoss,
)

SOFTENED = {
    "kl": KLDivergenceLoss,
    "reverse_kl": ReverseKLLoss,
    "js": JensenShannonLoss,
    "soft_ce": SoftCrossEntropyLoss,
}
KINDS = pytest.mark.parametrize("kind", SOFTENED)
DIVERGENCES = pytest.mark.parametrize("kind", ["kl", "reverse_kl", "js"])
CLASSIFICATION = pytest.mark.parametrize("problem_type", [SINGLE_LABEL, MULTI_LABEL])

# name -> (loss class, kind of task, settings): every loss of this module in every way to compute it
WAYS = {
    **{kind: (loss, SINGLE_LABEL, {}) for kind, loss in SOFTENED.items()},
    **{f"{kind} multi-label": (loss, MULTI_LABEL, {}) for kind, loss in SOFTENED.items()},
    **{f"{kind} standardized": (loss, SINGLE_LABEL, {"standardize": True}) for kind, loss in SOFTENED.items()},
    "logits_mse": (LogitsMSELoss, SINGLE_LABEL, {}),
    "logits_mse multi-label": (LogitsMSELoss, MULTI_LABEL, {}),
    "logits_mse regression": (LogitsMSELoss, REGRESSION, {}),
}
EVERY_WAY = pytest.mark.parametrize("way", WAYS)
AT_IDENTITY_ZERO = [way for way in WAYS if not way.startswith("soft_ce")]


def softened(kind, student, teacher, temperature=2.0, problem_type=SINGLE_LABEL, **settings):
    loss = bound(SOFTENED[kind](temperature, **settings), student.shape[-1], problem_type)
    return call(loss, student, teacher)


def value_of(way, student, teacher, labels=None, mask=None):
    loss, problem_type, settings = WAYS[way]
    return call(bound(loss(**settings), student.shape[-1], problem_type), student, teacher, labels, mask)


# ---- against the cross-entropy ----


@CLASSIFICATION
@pytest.mark.parametrize("classes", [2, 28])
def test_of_a_teacher_that_is_sure_of_the_labels_the_gradient_is_that_of_the_cross_entropy(problem_type, classes):
    """So a weight means the same for `ce` and `kl`, however many classes there are."""
    student = random_logits(0, 5, classes).requires_grad_()
    several = problem_type == MULTI_LABEL
    chosen = torch.arange(5)[:, None] % classes == torch.arange(classes)
    labels = chosen.float() if several else chosen.long().argmax(dim=-1)
    teacher = chosen * 200.0 - 100.0
    ours = softened("kl", student, teacher, 1.0, problem_type)
    plain = call(bound(CrossEntropyLoss(), classes, problem_type), student, teacher, labels)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (ours, plain)]
    torch.testing.assert_close(*gradients)


# ---- against the reference ----


@KINDS
@CLASSIFICATION
@pytest.mark.parametrize("temperature", [0.5, 1, 2.0, 10.0])
def test_equals_the_reference_and_its_gradient(kind, problem_type, temperature):
    student, teacher = random_logits(0).requires_grad_(), random_logits(1)

    def reference(z):
        return reference_softened(kind, z, teacher, temperature, problem_type == MULTI_LABEL)

    value = softened(kind, student, teacher, temperature, problem_type)
    assert value.item() == pytest.approx(reference(student), rel=1e-4)
    np.testing.assert_allclose(gradient_of(value, student), numeric_gradient(reference, student), atol=2e-6)


@KINDS
@pytest.mark.parametrize("classes", [3, 6])
def test_standardized_equals_the_reference_and_its_gradient(kind, classes):
    student, teacher = random_logits(0, classes=classes).requires_grad_(), random_logits(1, classes=classes)

    def reference(z):
        return reference_softened(kind, z, teacher, 1.5, standardize=True)

    value = softened(kind, student, teacher, 1.5, standardize=True)
    assert value.item() == pytest.approx(reference(student), rel=1e-5)
    np.testing.assert_allclose(gradient_of(value, student), numeric_gradient(reference, student), atol=2e-6)


@pytest.mark.parametrize(("problem_type", "classes"), [(SINGLE_LABEL, 3), (MULTI_LABEL, 3), (REGRESSION, 1)])
def test_logits_mse_equals_the_reference_and_its_gradient(problem_type, classes):
    student, teacher = random_logits(0, classes=classes).requires_grad_(), random_logits(1, classes=classes)
    value = call(bound(LogitsMSELoss(), classes, problem_type), student, teacher)
    assert value.item() == pytest.approx(reference_squared_error(student, teacher), rel=1e-5)
    expected = numeric_gradient(lambda z: reference_squared_error(z, teacher), student)
    np.testing.assert_allclose(gradient_of(value, student), expected, atol=1e-6)


@EVERY_WAY
def test_passes_gradcheck_in_float64(way):
    student, teacher = (random_logits(seed, dtype=torch.float64) for seed in (0, 1))
    assert torch.autograd.gradcheck(lambda z: value_of(way, z, teacher), (student.requires_grad_(),))


@KINDS
@CLASSIFICATION
def test_float64_is_computed_in_float64(kind, problem_type):
    student, teacher = (random_logits(seed, dtype=torch.float64) for seed in (0, 1))
    value = softened(kind, student, teacher, 2.0, problem_type)
    assert value.dtype == torch.float64
    expected = reference_softened(kind, student, teacher, 2.0, problem_type == MULTI_LABEL)
    assert value.item() == pytest.approx(expected, rel=1e-12)


# ---- what holds of each ----


@pytest.mark.parametrize("way", AT_IDENTITY_ZERO)
def test_is_zero_with_its_gradient_at_identity_and_above_elsewhere(way):
    logits = random_logits(0).requires_grad_()
    value = value_of(way, logits, logits.detach().clone())
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert np.abs(gradient_of(value, logits)).max() < 1e-6
    assert value_of(way, random_logits(0), random_logits(1)) > 0.1


@EVERY_WAY
def test_gives_the_student_a_gradient_and_the_teacher_none(way):
    student, teacher = random_logits(0).requires_grad_(), random_logits(1).requires_grad_()
    value_of(way, student, teacher).backward()
    assert student.grad.any(dim=1).all()
    assert teacher.grad is None


@EVERY_WAY
def test_order_of_rows_and_padding_change_nothing(way):
    student, teacher, order = random_logits(0), random_logits(1), torch.tensor([3, 0, 4, 2, 1])
    value = value_of(way, student, teacher).item()
    assert value_of(way, student[order], teacher[order]).item() == pytest.approx(value, rel=1e-6)
    assert value_of(way, student, teacher, mask=torch.zeros(5, 7)).item() == value


@EVERY_WAY
def test_order_of_classes_changes_nothing(way):
    student, teacher, order = random_logits(0), random_logits(1), torch.tensor([2, 0, 1])
    value = value_of(way, student, teacher).item()
    assert value_of(way, student[:, order], teacher[:, order]).item() == pytest.approx(value, rel=1e-5)


@EVERY_WAY
def test_parts_of_a_batch_add_up_to_the_whole(way):
    student, teacher = random_logits(0), random_logits(1)
    whole = value_of(way, student, teacher).item()
    parts = [value_of(way, student[rows], teacher[rows]).item() for rows in (slice(0, 1), slice(1, 3), slice(3, 5))]
    assert (parts[0] + 2 * parts[1] + 2 * parts[2]) / 5 == pytest.approx(whole, rel=1e-5)


@EVERY_WAY
def test_counts_unlabeled_rows_and_needs_no_labels(way):
    loss = WAYS[way][0]
    assert loss.unit == "rows"
    assert loss.needs_teacher
    student, teacher = random_logits(0), random_logits(1)
    unlabeled = value_of(way, student, teacher, torch.full((5,), -100))
    assert unlabeled.item() == value_of(way, student, teacher).item()


@EVERY_WAY
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients_are_finite_and_float32(way, scale, dtype):
    student = (random_logits(0).sign() * scale).to(dtype).requires_grad_()
    teacher = (random_logits(1, scale=1.0) * scale).to(dtype)
    value = value_of(way, student, teacher)
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert torch.autograd.grad(value, student)[0].isfinite().all()


@KINDS
@CLASSIFICATION
def test_bfloat16_logits_are_compared_in_float32(kind, problem_type):
    student, teacher = random_logits(0).bfloat16(), random_logits(1).bfloat16()
    expected = reference_softened(kind, student, teacher, 2.0, problem_type == MULTI_LABEL)
    assert softened(kind, student, teacher, 2.0, problem_type).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "value"), [("kl", 2e4 * 3), ("reverse_kl", 2e4 * 3), ("soft_ce", 2e4 * 3), ("js", math.log(2) * 9)]
)
def test_sure_models_that_disagree_are_compared_exactly(kind, value):
    """At T = 3, T² · (difference of the logits / T); probabilities taken before logarithms would give infinity."""
    student, teacher = torch.tensor([[1e4, -1e4, 0]]), torch.tensor([[-1e4, 1e4, 0]])
    assert softened(kind, student, teacher, 3.0).item() == pytest.approx(value, rel=1e-5)


# ---- what sets each apart, and how they hang together ----


def test_kl_is_summed_over_classes_and_takes_the_teacher_as_the_truth():
    student = torch.tensor([[math.log(0.5), math.log(0.5)]])
    teacher = torch.tensor([[math.log(0.9), math.log(0.1)]])
    value = softened("kl", student, teacher, 1.0).item()
    assert value == pytest.approx(0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5), rel=1e-5)
    swapped = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert abs(value - swapped) > 0.1
    assert softened("kl", teacher, student, 1.0).item() == pytest.approx(swapped, rel=1e-5)
    assert softened("reverse_kl", student, teacher, 1.0).item() == pytest.approx(swapped, rel=1e-5)


def test_gradient_of_kl_is_t_times_the_difference_of_the_probabilities():
    student, teacher = random_logits(0).requires_grad_(), random_logits(1)
    gradient = gradient_of(softened("kl", student, teacher, 4.0), student)
    for row, (s, t) in enumerate(rows_of(student, teacher)):
        p_s, p_t = np.array(answers(s, 4.0)[0]), np.array(answers(t, 4.0)[0])
        np.testing.assert_allclose(gradient[row], 4 * (p_s - p_t) / 5, atol=1e-6)


@CLASSIFICATION
def test_soft_cross_entropy_is_kl_plus_the_teachers_entropy(problem_type):
    student, teacher = random_logits(0).requires_grad_(), random_logits(1)
    soft, kl = (softened(kind, student, teacher, 3.0, problem_type) for kind in ("soft_ce", "kl"))
    entropy = sum(
        -p * math.log(p)
        for (row,) in rows_of(teacher)
        for choice in answers(row, 3.0, problem_type == MULTI_LABEL)
        for p in choice
    )
    choices = student.shape[1] if problem_type == MULTI_LABEL else 1
    assert (soft - kl).item() == pytest.approx(3.0**2 * entropy / (5 * choices), rel=1e-5)
    np.testing.assert_allclose(gradient_of(soft, student), gradient_of(kl, student), atol=1e-6)


@CLASSIFICATION
def test_reverse_kl_is_kl_with_the_models_swapped(problem_type):
    student, teacher = random_logits(0), random_logits(1)
    value = softened("reverse_kl", student, teacher, 2.0, problem_type)
    assert value.item() == pytest.approx(softened("kl", teacher, student, 2.0, problem_type).item(), rel=1e-5)
    assert abs(value.item() - softened("kl", student, teacher, 2.0, problem_type).item()) > 0.02


@CLASSIFICATION
def test_jensen_shannon_is_symmetric(problem_type):
    student, teacher = random_logits(0), random_logits(1)
    value = softened("js", student, teacher, 2.0, problem_type).item()
    assert softened("js", teacher, student, 2.0, problem_type).item() == pytest.approx(value, rel=1e-5)


@CLASSIFICATION
def test_jensen_shannon_is_at_most_log_2(problem_type):
    student, teacher = random_logits(0), random_logits(1)
    assert 0 < softened("js", student, teacher, 1.0, problem_type) < math.log(2)
    apart = softened("js", torch.tensor([[90.0, -90, -90]]), torch.tensor([[-90.0, 90, 90]]), 1.0, problem_type)
    assert apart.item() == pytest.approx(math.log(2), rel=1e-6)


@KINDS
def test_a_constant_added_to_the_logits_changes_nothing(kind):
    student, teacher = random_logits(0), random_logits(1)
    value = softened(kind, student, teacher).item()
    assert softened(kind, student + 3, teacher - 2).item() == pytest.approx(value, rel=1e-5)


@KINDS
@CLASSIFICATION
def test_temperature_squared_keeps_the_size_of_the_gradient(kind, problem_type):
    """For logits near zero the gradient does not depend on T; without T² it is a 100th at T = 10."""
    student, teacher = random_logits(0, scale=0.02).requires_grad_(), random_logits(1, scale=0.02)
    cold, hot = (
        np.abs(gradient_of(softened(kind, student, teacher, temperature, problem_type), student)).sum()
        for temperature in (1.0, 10.0)
    )
    assert hot == pytest.approx(cold, rel=0.02)


def test_kl_of_a_high_temperature_is_half_the_squared_difference_of_centred_logits():
    student, teacher = (random_logits(seed, dtype=torch.float64) for seed in (0, 1))
    student, teacher = (logits - logits.mean(dim=1, keepdim=True) for logits in (student, teacher))
    mse = call(bound(LogitsMSELoss()), student, teacher).item()
    assert softened("kl", student, teacher, 1e4).item() == pytest.approx(mse / 2, rel=1e-3)


def test_two_classes_are_one_choice_between_yes_and_no():
    """A softmax over (z, 0) is a sigmoid of z."""
    student, teacher = random_logits(0, classes=1), random_logits(1, classes=1)
    zero = torch.zeros(5, 1)
    pairs = softened("kl", torch.cat([student, zero], 1), torch.cat([teacher, zero], 1))
    assert softened("kl", student, teacher, problem_type=MULTI_LABEL).item() == pytest.approx(pairs.item(), rel=1e-5)


@KINDS
def test_standardized_is_blind_to_the_scale_and_shift_of_each_row(kind):
    student, teacher = random_logits(0), random_logits(1)
    factors, shifts = torch.tensor([[0.1], [1], [7], [30], [2]]), torch.tensor([[5.0], [-3], [0], [1], [100]])
    value = softened(kind, student, teacher, standardize=True).item()
    moved = student * factors + shifts, teacher * factors.flip(0) - shifts
    assert softened(kind, *moved, standardize=True).item() == pytest.approx(value, rel=1e-4)
    assert softened(kind, *moved).item() != pytest.approx(softened(kind, student, teacher).item(), rel=0.1)


def test_standardized_equal_logits_are_a_uniform_answer():
    student, teacher = torch.full((5, 3), 0.7).requires_grad_(), random_logits(1)
    value = softened("kl", student, teacher, 1.0, standardize=True)
    assert value.item() == pytest.approx(
        softened("kl", torch.zeros(5, 3), teacher, 1.0, standardize=True).item(), rel=1e-5
    )
    assert np.isfinite(gradient_of(value, student)).all()


# ---- settings ----


@KINDS
@pytest.mark.parametrize("temperature", [0, 0.0, -1.0, float("inf"), float("nan"), "2", True, None])
def test_refuses_a_temperature_that_is_not_above_zero(kind, temperature):
    with pytest.raises(ValueError, match="temperature must be > 0, got"):
        SOFTENED[kind](temperature)


@KINDS
def test_refuses_regression_a_single_class_and_other_classes(kind):
    loss = SOFTENED[kind]
    with pytest.raises(ValueError, match=f"{loss.__name__} is not defined for regression, only for single_label"):
        bound(loss(), 1, REGRESSION)
    with pytest.raises(ValueError, match=f"{loss.__name__} needs at least 2 classes, got 1"):
        bound(loss(), 1)
    with pytest.raises(ValueError, match=r"student logits have shape \(5, 3\), teacher logits \(5, 1\)"):
        call(bound(loss()), random_logits(0), random_logits(1, classes=1))


def test_logits_mse_compares_a_single_logit_too():
    student, teacher = random_logits(0, classes=1), random_logits(1, classes=1)
    value = call(bound(LogitsMSELoss(), 1), student, teacher)
    assert value.item() == pytest.approx(reference_squared_error(student, teacher), rel=1e-5)


def test_logits_mse_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"student logits have shape \(5, 3\), teacher logits \(1, 3\); both must be"):
        call(bound(LogitsMSELoss()), random_logits(0), random_logits(1, rows=1))


@pytest.mark.parametrize("loss", [*SOFTENED.values(), LogitsMSELoss])
def test_refuses_a_teacher_of_another_kind_of_task(loss):
    """A softmax over a multi-label teacher's logits would be silently wrong."""
    with pytest.raises(ValueError, match="the student's task is single_label_classification, the teacher's multi"):
        loss().bind(ModelShape(num_labels=3), ModelShape(num_labels=3, problem_type=MULTI_LABEL))


@pytest.mark.parametrize(("classes", "problem_type"), [(2, SINGLE_LABEL), (3, MULTI_LABEL)])
def test_refuses_to_standardize_what_leaves_only_the_sign(classes, problem_type):
    with pytest.raises(ValueError, match=f"standardize needs a single-label task .* got {problem_type} of {classes}"):
        bound(KLDivergenceLoss(standardize=True), classes, problem_type)


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_refuses_a_standardize_that_is_neither_true_nor_false(value):
    with pytest.raises(ValueError, match=f"standardize must be true or false, got {value!r}"):
        KLDivergenceLoss(standardize=value)


def test_describe_themselves():
    assert KLDivergenceLoss(2).describe() == "T=2"
    assert ReverseKLLoss(0.5, standardize=True).describe() == "T=0.5, standardized"
    assert JensenShannonLoss({"schedule": "linear", "start": 8, "end": 1}).describe() == "T=[8→1 linear]"
    assert SoftCrossEntropyLoss().describe() == "T=2"
    assert LogitsMSELoss().describe() == ""
