"""Losses of the logits, against loops in float64."""

import math

import numpy as np
import pytest
import torch
from helpers import (
    features,
    numeric_gradient,
    reference_binary_cross_entropy,
    reference_binary_kl,
    reference_cross_entropy,
    reference_kl,
)

from distill_nlp.losses import CrossEntropyLoss, KLDivergenceLoss, ModelShape

MULTI_LABEL = "multi_label_classification"


def random_logits(seed, rows=5, classes=3, scale=2.0):
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed)) * scale


def bound(loss, classes=3, problem_type="single_label_classification"):
    shape = ModelShape(num_labels=classes, problem_type=problem_type)
    loss.bind(shape, shape)
    return loss


def cross_entropy(logits, labels, classes=3, problem_type="single_label_classification", **settings):
    return bound(CrossEntropyLoss(**settings), classes, problem_type)(features(logits), None, labels, None)


def kl(student, teacher, temperature=2.0, problem_type="single_label_classification"):
    loss = bound(KLDivergenceLoss(temperature), student.shape[-1], problem_type)
    return loss(features(student), features(teacher), None, None)


def gradient_of(value, tensor):
    return torch.autograd.grad(value, tensor)[0].double().numpy()


# ---- cross-entropy ----


@pytest.mark.parametrize("labels", [[0, 2, 1, 1, 0], [0, -100, 1, -100, 2]], ids=["all labeled", "some labeled"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("class_weights", [None, [0.5, 1.0, 3.0]])
def test_cross_entropy_equals_the_reference_and_its_gradient(labels, smoothing, class_weights):
    logits = random_logits(0).requires_grad_()
    value = cross_entropy(logits, torch.tensor(labels), label_smoothing=smoothing, class_weights=class_weights)
    assert value.item() == pytest.approx(reference_cross_entropy(logits, labels, smoothing, class_weights), rel=1e-5)
    expected = numeric_gradient(lambda z: reference_cross_entropy(z, labels, smoothing, class_weights), logits)
    np.testing.assert_allclose(gradient_of(value, logits), expected, atol=1e-6)


def test_cross_entropy_without_any_label_is_zero_and_reaches_the_graph():
    logits = random_logits(0).requires_grad_()
    labels = torch.full((5,), -100)
    value = cross_entropy(logits, labels, label_smoothing=0.1, class_weights=[1.0, 2.0, 3.0])
    assert value.item() == 0
    assert not gradient_of(value, logits).any()


def test_rows_without_a_label_get_no_gradient_and_do_not_dilute():
    logits = random_logits(1).requires_grad_()
    labels = torch.tensor([1, -100, 0, -100, -100])
    value = cross_entropy(logits, labels)
    assert value.item() == pytest.approx(cross_entropy(logits[[0, 2]], labels[[0, 2]]).item())
    gradient = gradient_of(value, logits)
    assert not gradient[[1, 3, 4]].any()
    assert gradient[[0, 2]].any(axis=1).all()


def test_softmax_is_taken_once():
    value = cross_entropy(torch.tensor([[math.log(0.7), math.log(0.2), math.log(0.1)]]), torch.tensor([0]))
    assert value.item() == pytest.approx(-math.log(0.7), rel=1e-6)


@pytest.mark.parametrize("class_weights", [None, [0.5, 1.0, 3.0]])
def test_multi_label_equals_the_reference_and_its_gradient(class_weights):
    logits = random_logits(2).requires_grad_()
    labels = torch.tensor([[1.0, 0, 1], [-100] * 3, [0, 0, 0], [1, 1, 1], [0, 1, 0]])

    def reference(z):
        return reference_binary_cross_entropy(z, labels, class_weights)

    value = cross_entropy(logits, labels, problem_type=MULTI_LABEL, class_weights=class_weights)
    assert value.item() == pytest.approx(reference(logits), rel=1e-5)
    np.testing.assert_allclose(gradient_of(value, logits), numeric_gradient(reference, logits), atol=1e-6)


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 2)])
def test_regression_is_the_squared_error_over_labeled_rows(shape):
    outputs = shape[1] if len(shape) == 2 else 1
    logits = random_logits(3, 4, outputs)
    labels = torch.arange(math.prod(shape), dtype=torch.float32).view(shape) - 1.5
    labels[1] = -100
    value = cross_entropy(logits, labels, classes=outputs, problem_type="regression")
    rows = []
    for row in (0, 2, 3):
        targets = labels.view(4, outputs)[row].tolist()
        rows.append(sum((z - y) ** 2 for z, y in zip(logits[row].tolist(), targets, strict=True)) / outputs)
    assert value.item() == pytest.approx(sum(rows) / 3, rel=1e-5)


def test_parts_of_a_batch_add_up_to_the_whole():
    logits, labels = random_logits(4, 8), torch.tensor([0, -100, 2, 1, -100, -100, 2, 0])
    settings = {"label_smoothing": 0.1, "class_weights": [0.5, 1.0, 3.0]}
    whole = cross_entropy(logits, labels, **settings)
    parts = 0.0
    for start, stop in ((0, 3), (3, 6), (6, 8)):
        labeled = (labels[start:stop] != -100).sum()
        parts += cross_entropy(logits[start:stop], labels[start:stop], **settings) * labeled / 5
    assert parts.item() == pytest.approx(whole.item(), rel=1e-6)


def test_class_weights_follow_the_module_but_are_not_saved():
    loss = CrossEntropyLoss(class_weights=[1.0, 2.0])
    assert not loss.state_dict()
    assert loss.to("meta").class_weights.device.type == "meta"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\), got 1.0"),
        ({"label_smoothing": -0.1}, "label_smoothing must be"),
        ({"class_weights": [1.0, 0.0]}, "class_weights must be > 0, got 0.0"),
        ({"class_weights": [1.0, float("nan")]}, "class_weights must be > 0, got nan"),
    ],
)
def test_cross_entropy_refuses_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        CrossEntropyLoss(**settings)


@pytest.mark.parametrize(
    ("settings", "problem_type", "message"),
    [
        ({"label_smoothing": 0.1}, MULTI_LABEL, "label_smoothing is for single-label tasks; this one is multi_label"),
        ({"class_weights": [1.0, 2.0]}, "single_label_classification", "class_weights has 2 values for 3 classes"),
        ({"class_weights": []}, "single_label_classification", "class_weights has 0 values for 3 classes"),
        ({"class_weights": [1.0, 2.0, 3.0]}, "regression", "class_weights are for classification"),
    ],
)
def test_cross_entropy_refuses_settings_of_another_task(settings, problem_type, message):
    with pytest.raises(ValueError, match=message):
        bound(CrossEntropyLoss(**settings), 3, problem_type)


def test_cross_entropy_refuses_labels_that_do_not_fit():
    with pytest.raises(ValueError, match="needs labels; mark rows without one by -100"):
        cross_entropy(random_logits(0), None)
    with pytest.raises(ValueError, match=r"needs \(B,\) integer labels, got torch.float32 of shape \(5,\)"):
        cross_entropy(random_logits(0), torch.zeros(5))
    with pytest.raises(ValueError, match=r"got torch.int64 of shape \(5, 3\)"):
        cross_entropy(random_logits(0), torch.zeros(5, 3, dtype=torch.long))


def test_cross_entropy_needs_no_teacher_and_counts_labeled_rows():
    assert not CrossEntropyLoss.needs_teacher
    assert CrossEntropyLoss.unit == "labeled_rows"
    assert CrossEntropyLoss(label_smoothing=0.1).describe() == "smoothing=0.1"
    assert CrossEntropyLoss().describe() == ""


# ---- KL divergence ----


@pytest.mark.parametrize("temperature", [0.5, 1, 2.0, 10.0])
def test_kl_equals_the_reference_and_its_gradient(temperature):
    student, teacher = random_logits(0).requires_grad_(), random_logits(1)
    value = kl(student, teacher, temperature)
    assert value.item() == pytest.approx(reference_kl(student, teacher, temperature), rel=1e-4)
    expected = numeric_gradient(lambda z: reference_kl(z, teacher, temperature), student)
    np.testing.assert_allclose(gradient_of(value, student), expected, atol=2e-6)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_multi_label_kl_equals_the_reference_and_its_gradient(temperature):
    student, teacher = random_logits(0).requires_grad_(), random_logits(1)
    value = kl(student, teacher, temperature, MULTI_LABEL)
    assert value.item() == pytest.approx(reference_binary_kl(student, teacher, temperature), rel=1e-4)
    expected = numeric_gradient(lambda z: reference_binary_kl(z, teacher, temperature), student)
    np.testing.assert_allclose(gradient_of(value, student), expected, atol=2e-6)


@pytest.mark.parametrize("problem_type", ["single_label_classification", MULTI_LABEL])
def test_kl_is_zero_at_identity_and_above_elsewhere(problem_type):
    logits = random_logits(0).requires_grad_()
    value = kl(logits, logits.detach().clone(), problem_type=problem_type)
    assert value.item() == pytest.approx(0, abs=1e-7)
    assert np.abs(gradient_of(value, logits)).max() < 1e-6
    assert kl(random_logits(0), random_logits(1), problem_type=problem_type) > 0.1


def test_kl_is_summed_over_classes_and_takes_the_teacher_as_the_truth():
    student = torch.tensor([[math.log(0.5), math.log(0.5)]])
    teacher = torch.tensor([[math.log(0.9), math.log(0.1)]])
    value = kl(student, teacher, 1.0).item()
    assert value == pytest.approx(0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5), rel=1e-5)
    swapped = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert abs(value - swapped) > 0.1
    assert kl(teacher, student, 1.0).item() == pytest.approx(swapped, rel=1e-5)


def test_kl_does_not_change_with_a_constant_added_to_the_logits():
    student, teacher = random_logits(0), random_logits(1)
    assert kl(student + 3, teacher - 2).item() == pytest.approx(kl(student, teacher).item(), rel=1e-5)


@pytest.mark.parametrize("problem_type", ["single_label_classification", MULTI_LABEL])
def test_temperature_squared_keeps_the_size_of_the_gradient(problem_type):
    """For logits near zero the gradient is (z_s - z_t) / C whatever the temperature; without T² a 100th at T = 10."""
    student, teacher = random_logits(0, scale=0.02).requires_grad_(), random_logits(1, scale=0.02)
    cold = np.abs(gradient_of(kl(student, teacher, 1.0, problem_type), student)).sum()
    hot = np.abs(gradient_of(kl(student, teacher, 10.0, problem_type), student)).sum()
    assert hot == pytest.approx(cold, rel=0.02)


def test_gradient_of_kl_is_t_times_the_difference_of_the_probabilities():
    student, teacher = random_logits(0).requires_grad_(), random_logits(1)
    gradient = gradient_of(kl(student, teacher, 4.0), student)
    for row in range(5):
        p_s = np.exp(student[row].detach().double().numpy() / 4)
        p_t = np.exp(teacher[row].double().numpy() / 4)
        np.testing.assert_allclose(gradient[row], 4 * (p_s / p_s.sum() - p_t / p_t.sum()) / 5, atol=1e-6)


def test_kl_gives_the_teacher_no_gradient():
    student, teacher = random_logits(0).requires_grad_(), random_logits(1).requires_grad_()
    kl(student, teacher).backward()
    assert student.grad.any()
    assert teacher.grad is None


def test_kl_counts_unlabeled_rows_and_needs_no_labels():
    assert KLDivergenceLoss.unit == "rows"
    assert KLDivergenceLoss.needs_teacher
    student, teacher = random_logits(0), random_logits(1)
    loss = bound(KLDivergenceLoss())
    unlabeled = loss(features(student), features(teacher), torch.full((5,), -100), None)
    assert unlabeled.item() == kl(student, teacher).item()


@pytest.mark.parametrize("temperature", [0, 0.0, -1.0, float("inf"), float("nan"), "2", True, None])
def test_kl_refuses_a_temperature_that_is_not_above_zero(temperature):
    with pytest.raises(ValueError, match="temperature must be > 0, got"):
        KLDivergenceLoss(temperature)


def test_kl_refuses_what_it_is_not_defined_for():
    with pytest.raises(ValueError, match="not defined for regression"):
        bound(KLDivergenceLoss(), 1, "regression")
    with pytest.raises(ValueError, match="at least 2 classes"):
        bound(KLDivergenceLoss(), 1)
    with pytest.raises(ValueError, match=r"student logits have shape \(5, 3\), teacher logits \(5, 1\)"):
        bound(KLDivergenceLoss())(features(random_logits(0)), features(random_logits(1, classes=1)), None, None)


def test_kl_refuses_a_teacher_of_another_kind_of_task():
    """A softmax over a multi-label teacher's logits would be silently wrong."""
    loss = KLDivergenceLoss()
    with pytest.raises(ValueError, match="multi_label_classification"):
        loss.bind(ModelShape(num_labels=3), ModelShape(num_labels=3, problem_type=MULTI_LABEL))


def test_kl_describes_its_temperature():
    assert KLDivergenceLoss(2).describe() == "T=2"


# ---- both ----


def cases(student, teacher, labels):
    multi_labels = torch.nn.functional.one_hot(labels.clamp(min=0), student.shape[-1]).float()
    yield "ce", cross_entropy(student, labels)
    yield "smoothed ce", cross_entropy(student, labels, label_smoothing=0.1)
    yield "multi-label ce", cross_entropy(student, multi_labels, problem_type=MULTI_LABEL)
    yield "kl", kl(student, teacher)
    yield "multi-label kl", kl(student, teacher, problem_type=MULTI_LABEL)


def test_the_order_of_the_batch_changes_nothing():
    student, teacher, labels = random_logits(0), random_logits(1), torch.tensor([0, 2, -100, 1, 1])
    order = torch.tensor([3, 0, 4, 2, 1])
    shuffled = cases(student[order], teacher[order], labels[order])
    for (name, value), (_, other) in zip(cases(student, teacher, labels), shuffled, strict=True):
        assert other.item() == pytest.approx(value.item(), rel=1e-6), name


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_finite_and_float32(scale, dtype):
    student = (random_logits(0).sign() * scale).to(dtype).requires_grad_()
    teacher = (random_logits(1).sign() * scale).to(dtype)
    for name, value in cases(student, teacher, torch.tensor([0, 2, -100, 1, 1])):
        assert value.dtype == torch.float32, name
        assert value.isfinite(), name
        assert torch.autograd.grad(value, student)[0].isfinite().all(), name


def test_bfloat16_logits_are_compared_in_float32():
    student, teacher = random_logits(0).bfloat16(), random_logits(1).bfloat16()
    assert kl(student, teacher).item() == pytest.approx(reference_kl(student, teacher, 2.0), rel=1e-4)
