"""The task's own loss, against loops in float64."""

import math

import numpy as np
import pytest
import torch
from helpers import features, numeric_gradient, reference_binary_cross_entropy, reference_cross_entropy
from references_logits import (
    MULTI_LABEL,
    REGRESSION,
    SINGLE_LABEL,
    bound,
    gradient_of,
    random_logits,
    reference_squared_error,
)

from distill_nlp.losses import CrossEntropyLoss
from distill_nlp.losses.cross_entropy import balanced_class_weights

WEIGHTS = [0.5, 1.0, 3.0]
LABELS = {
    SINGLE_LABEL: torch.tensor([0, 2, -100, 1, 1]),
    MULTI_LABEL: torch.tensor([[1.0, 0, 1], [0, 0, 0], [-100] * 3, [1, 1, 1], [0, 1, 0]]),
    REGRESSION: torch.tensor([[0.5, -1, 2], [3, 0, 1], [-100] * 3, [0, 0, 0], [-2, 1, 1]]),
}
TASKS = pytest.mark.parametrize("problem_type", LABELS)


def cross_entropy(logits, labels, problem_type=SINGLE_LABEL, mask=None, **settings):
    loss = bound(CrossEntropyLoss(**settings), logits.shape[-1], problem_type)
    return loss(features(logits), None, labels, mask)


@pytest.mark.parametrize("labels", [[0, 2, 1, 1, 0], [0, -100, 1, -100, 2]], ids=["all labeled", "some labeled"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("class_weights", [None, WEIGHTS])
def test_equals_the_reference_and_its_gradient(labels, smoothing, class_weights):
    logits = random_logits(0).requires_grad_()
    value = cross_entropy(logits, torch.tensor(labels), label_smoothing=smoothing, class_weights=class_weights)
    assert value.item() == pytest.approx(reference_cross_entropy(logits, labels, smoothing, class_weights), rel=1e-5)
    expected = numeric_gradient(lambda z: reference_cross_entropy(z, labels, smoothing, class_weights), logits)
    np.testing.assert_allclose(gradient_of(value, logits), expected, atol=1e-6)


@pytest.mark.parametrize("class_weights", [None, WEIGHTS])
def test_multi_label_equals_the_reference_and_its_gradient(class_weights):
    logits, labels = random_logits(2).requires_grad_(), LABELS[MULTI_LABEL]

    def reference(z):
        return reference_binary_cross_entropy(z, labels, class_weights)

    value = cross_entropy(logits, labels, MULTI_LABEL, class_weights=class_weights)
    assert value.item() == pytest.approx(reference(logits), rel=1e-5)
    np.testing.assert_allclose(gradient_of(value, logits), numeric_gradient(reference, logits), atol=1e-6)


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 2)])
def test_regression_is_the_squared_error_over_labeled_rows(shape):
    outputs = shape[1] if len(shape) == 2 else 1
    logits = random_logits(3, 4, outputs).requires_grad_()
    labels = torch.arange(math.prod(shape), dtype=torch.float32).view(shape) - 1.5
    labels[1] = -100
    labeled = [0, 2, 3]

    def reference(z):
        return reference_squared_error(z[labeled], labels.view(4, outputs)[labeled])

    value = cross_entropy(logits, labels, REGRESSION)
    assert value.item() == pytest.approx(reference(logits), rel=1e-5)
    np.testing.assert_allclose(gradient_of(value, logits), numeric_gradient(reference, logits), atol=1e-6)


@TASKS
def test_passes_gradcheck_and_stays_in_float64(problem_type):
    logits = random_logits(0, dtype=torch.float64).requires_grad_()
    settings = {} if problem_type == REGRESSION else {"class_weights": WEIGHTS}
    assert cross_entropy(logits, LABELS[problem_type], problem_type, **settings).dtype == torch.float64
    assert torch.autograd.gradcheck(
        lambda z: cross_entropy(z, LABELS[problem_type], problem_type, **settings), (logits,)
    )


def test_float64_is_computed_in_float64():
    logits, labels = random_logits(0, dtype=torch.float64), [0, 2, -100, 1, 1]
    value = cross_entropy(logits, torch.tensor(labels), label_smoothing=0.1, class_weights=WEIGHTS)
    assert value.item() == pytest.approx(reference_cross_entropy(logits, labels, 0.1, WEIGHTS), rel=1e-13)


def test_regression_is_zero_with_its_gradient_where_the_targets_are_met():
    logits = random_logits(0).requires_grad_()
    value = cross_entropy(logits, logits.detach().clone(), REGRESSION)
    assert value.item() == 0
    assert not gradient_of(value, logits).any()


@TASKS
def test_without_any_label_is_zero_and_reaches_the_graph(problem_type):
    logits = random_logits(0).requires_grad_()
    settings = {} if problem_type == REGRESSION else {"class_weights": WEIGHTS}
    value = cross_entropy(logits, torch.full_like(LABELS[problem_type], -100), problem_type, **settings)
    assert value.item() == 0
    assert not gradient_of(value, logits).any()


def test_without_any_label_smoothing_adds_nothing():
    assert cross_entropy(random_logits(0), torch.full((5,), -100), label_smoothing=0.1).item() == 0


@TASKS
def test_rows_without_a_label_get_no_gradient_and_do_not_dilute(problem_type):
    logits, labels = random_logits(1).requires_grad_(), LABELS[problem_type]
    labeled = [0, 1, 3, 4]
    value = cross_entropy(logits, labels, problem_type)
    assert value.item() == pytest.approx(cross_entropy(logits[labeled], labels[labeled], problem_type).item())
    gradient = gradient_of(value, logits)
    assert not gradient[2].any()
    assert gradient[labeled].any(axis=1).all()


@pytest.mark.parametrize("problem_type", [MULTI_LABEL, REGRESSION])
def test_a_row_that_is_labeled_in_part_has_no_label(problem_type):
    labels = LABELS[problem_type].clone()
    labels[1, 2] = -100
    logits, labeled = random_logits(1), [0, 3, 4]
    expected = cross_entropy(logits[labeled], labels[labeled], problem_type)
    assert cross_entropy(logits, labels, problem_type).item() == pytest.approx(expected.item())


def test_softmax_is_taken_once():
    value = cross_entropy(torch.tensor([[math.log(0.7), math.log(0.2), math.log(0.1)]]), torch.tensor([0]))
    assert value.item() == pytest.approx(-math.log(0.7), rel=1e-6)


def test_smoothing_leaves_the_entropy_of_the_smoothed_label():
    """Its least value, where the probabilities are the smoothed labels."""
    smoothed = [0.2 / 3 + 0.8, 0.2 / 3, 0.2 / 3]
    logits = torch.tensor([[math.log(p) for p in smoothed]]).requires_grad_()
    value = cross_entropy(logits, torch.tensor([0]), label_smoothing=0.2)
    assert value.item() == pytest.approx(-sum(p * math.log(p) for p in smoothed), rel=1e-6)
    assert np.abs(gradient_of(value, logits)).max() < 1e-6


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_parts_of_a_batch_add_up_to_the_whole(smoothing):
    logits, labels = random_logits(4, 8), torch.tensor([0, -100, 2, 1, -100, -100, 2, 0])
    settings = {"label_smoothing": smoothing, "class_weights": WEIGHTS}
    whole = cross_entropy(logits, labels, **settings)
    parts = 0.0
    for start, stop in ((0, 3), (3, 6), (6, 8)):
        labeled = (labels[start:stop] != -100).sum()
        parts += cross_entropy(logits[start:stop], labels[start:stop], **settings) * labeled / 5
    assert parts.item() == pytest.approx(whole.item(), rel=1e-6)


@pytest.mark.parametrize("problem_type", [MULTI_LABEL, REGRESSION])
def test_parts_add_up_in_the_other_tasks(problem_type):
    logits, labels = random_logits(4), LABELS[problem_type]
    whole = cross_entropy(logits, labels, problem_type).item()
    part = [cross_entropy(logits[rows], labels[rows], problem_type).item() for rows in ([0, 1, 2], [3, 4])]
    assert (2 * part[0] + 2 * part[1]) / 4 == pytest.approx(whole, rel=1e-6)


@TASKS
def test_order_and_padding_change_nothing(problem_type):
    logits, labels, order = random_logits(0), LABELS[problem_type], torch.tensor([3, 0, 4, 2, 1])
    value = cross_entropy(logits, labels, problem_type).item()
    assert cross_entropy(logits[order], labels[order], problem_type).item() == pytest.approx(value, rel=1e-6)
    assert cross_entropy(logits, labels, problem_type, mask=torch.zeros(5, 7)).item() == value


@TASKS
def test_one_row_is_its_own_mean(problem_type):
    logits, labels = random_logits(0, 2), LABELS[problem_type][:2]
    one, other, both = (cross_entropy(logits[r], labels[r], problem_type).item() for r in ([0], [1], [0, 1]))
    assert (one + other) / 2 == pytest.approx(both, rel=1e-6)


@TASKS
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients_are_finite_and_float32(problem_type, scale, dtype):
    logits = (random_logits(0).sign() * scale).to(dtype).requires_grad_()
    smoothing = 0.1 if problem_type == SINGLE_LABEL else 0.0
    value = cross_entropy(logits, LABELS[problem_type], problem_type, label_smoothing=smoothing)
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert torch.autograd.grad(value, logits)[0].isfinite().all()


def test_bfloat16_logits_are_taken_in_float32():
    logits, labels = random_logits(0).bfloat16(), [0, 2, -100, 1, 1]
    expected = reference_cross_entropy(logits, labels)
    assert cross_entropy(logits, torch.tensor(labels)).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int64])
def test_takes_labels_of_any_integer_type(dtype):
    logits, labels = random_logits(0), LABELS[SINGLE_LABEL]
    assert cross_entropy(logits, labels.to(dtype)).item() == cross_entropy(logits, labels).item()


def test_multi_label_takes_integers():
    logits, labels = random_logits(0), LABELS[MULTI_LABEL]
    assert cross_entropy(logits, labels.long(), MULTI_LABEL).item() == cross_entropy(logits, labels, MULTI_LABEL).item()


def test_class_weights_follow_the_module_but_are_not_saved():
    loss = CrossEntropyLoss(class_weights=[1.0, 2.0])
    assert not loss.state_dict()
    assert loss.to("meta").class_weights.device.type == "meta"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\), got 1.0"),
        ({"label_smoothing": -0.1}, "label_smoothing must be"),
        ({"label_smoothing": float("nan")}, "label_smoothing must be"),
        ({"label_smoothing": "0.1"}, r"label_smoothing must be in \[0, 1\), got '0.1'"),
        ({"label_smoothing": False}, r"label_smoothing must be in \[0, 1\), got False"),
        ({"label_smoothing": None}, "label_smoothing must be"),
        ({"class_weights": [1.0, 0.0]}, "class_weights must be > 0, got 0.0"),
        ({"class_weights": [1.0, float("nan")]}, "class_weights must be > 0, got nan"),
        ({"class_weights": [1.0, "2"]}, "class_weights must be > 0, got '2'"),
        ({"class_weights": 2.0}, 'class_weights must be a list of one number per class, or "balanced", got 2.0'),
        ({"class_weights": "even"}, "got 'even'"),
        ({"class_weights": {"a": 1.0}}, "class_weights must be a list of one number per class"),
    ],
)
def test_refuses_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        CrossEntropyLoss(**settings)


@pytest.mark.parametrize(
    ("settings", "problem_type", "message"),
    [
        ({"label_smoothing": 0.1}, MULTI_LABEL, "label_smoothing is for single-label tasks; this one is multi_label"),
        ({"label_smoothing": 0.1}, REGRESSION, "label_smoothing is for single-label tasks; this one is regression"),
        ({"class_weights": [1.0, 2.0]}, SINGLE_LABEL, "class_weights has 2 values for 3 classes"),
        ({"class_weights": [1.0, 2.0]}, MULTI_LABEL, "class_weights has 2 values for 3 classes"),
        ({"class_weights": []}, SINGLE_LABEL, "class_weights has 0 values for 3 classes"),
        ({"class_weights": WEIGHTS}, REGRESSION, "class_weights are for classification; this task is regression"),
    ],
)
def test_refuses_settings_of_another_task(settings, problem_type, message):
    with pytest.raises(ValueError, match=message):
        bound(CrossEntropyLoss(**settings), 3, problem_type)


def test_refuses_labels_that_do_not_fit():
    with pytest.raises(ValueError, match="needs labels; mark rows without one by -100"):
        cross_entropy(random_logits(0), None)
    with pytest.raises(ValueError, match=r"needs \(B,\) integer labels, got torch.float32 of shape \(5,\)"):
        cross_entropy(random_logits(0), torch.zeros(5))
    with pytest.raises(ValueError, match=r"got torch.int64 of shape \(5, 3\)"):
        cross_entropy(random_logits(0), torch.zeros(5, 3, dtype=torch.long))


@pytest.mark.parametrize("problem_type", [MULTI_LABEL, REGRESSION])
@pytest.mark.parametrize("shape", [(5,), (3, 5), (15,), (5, 1), (5, 2)])
def test_refuses_labels_of_another_shape_than_the_logits(problem_type, shape):
    """Labels of (C, B) have the right number of elements."""
    with pytest.raises(ValueError, match=rf"{problem_type} needs labels of shape \(5, 3\) as the logits, got"):
        cross_entropy(random_logits(0), torch.zeros(shape), problem_type)


def test_needs_no_teacher_and_counts_labeled_rows():
    assert not CrossEntropyLoss.needs_teacher
    assert CrossEntropyLoss.unit == "labeled_rows"


def test_describes_its_settings():
    assert CrossEntropyLoss().describe() == ""
    assert CrossEntropyLoss(label_smoothing=0.1).describe() == "smoothing=0.1"
    assert CrossEntropyLoss(class_weights=WEIGHTS).describe() == "weights=0.5/1/3"
    assert CrossEntropyLoss(0.1, [1, 2]).describe() == "smoothing=0.1, weights=1/2"


# ---- balanced class weights ----


@pytest.mark.parametrize("as_tensor", [False, True])
def test_balanced_weights_are_the_number_of_rows_over_classes_times_those_of_the_class(as_tensor):
    labels = [0, 0, 0, -100, 1, 2, 2, 0, 0, -100, 2, 0]
    expected = [10 / (3 * 6), 10 / (3 * 1), 10 / (3 * 3)]
    assert balanced_class_weights(torch.tensor(labels) if as_tensor else labels, 3) == pytest.approx(expected)
    assert balanced_class_weights(np.array(labels), 3) == pytest.approx(expected)


def test_balanced_weights_have_the_mean_one_over_the_rows():
    labels = torch.tensor([0] * 7 + [1] * 2 + [2])
    weights = torch.tensor(balanced_class_weights(labels, 3))
    assert weights[labels].mean().item() == pytest.approx(1.0)
    assert [weights[labels][labels == c].sum().item() for c in range(3)] == pytest.approx([10 / 3] * 3)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 0, 2], "balanced needs a training row of each class; there is none of 1$"),
        ([0, -100], "there is none of 1, 2$"),
        ([-100, -100], "there is none of 0, 1, 2$"),
        ([0, 1, 3], r"balanced class weights need labels from 0 to 2, got \[0, 1, 3\]"),
        ([0, -1], r"need labels from 0 to 2, got \[-1, 0\]"),
        ([0.5, 1.0], r"balanced class weights need \(N,\) integer labels, got torch.float32 of shape \(2,\)"),
        ([[0.0, 1.0], [1.0, 0.0]], "balanced is defined for one label per row, .* give a list of one factor per class"),
        ([[0, 1], [1, 0]], r"need \(N,\) integer labels, got torch.int64 of shape \(2, 2\)"),
    ],
)
def test_balanced_weights_need_a_row_of_each_class(labels, message):
    with pytest.raises(ValueError, match=message):
        balanced_class_weights(labels, 3)


def test_balanced_weights_that_nobody_put_in_numbers_are_refused():
    loss = CrossEntropyLoss(class_weights="balanced")
    assert loss.describe() == "weights=balanced"
    with pytest.raises(ValueError, match='class_weights "balanced" must be put in numbers first: CrossEntropyLoss'):
        bound(CrossEntropyLoss(0.1, class_weights="balanced"), 3, SINGLE_LABEL)
    with pytest.raises(ValueError, match='class_weights "balanced" must be put in numbers first'):
        loss(features(random_logits(0)), None, torch.tensor([0, 1, 2, 0, 1]), None)
