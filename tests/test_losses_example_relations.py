"""Relations between the examples of a batch, against loops over pairs and triplets in float64."""

import math

import numpy as np
import pytest
import references_features
import torch
from helpers import features, numeric_gradient
from references_features import (
    MASK,
    STUDENT,
    TEACHER,
    padded_mask,
    padded_with_garbage,
    reference_representation,
    reference_rkd_angle,
    reference_rkd_distance,
    reference_similarity,
    states,
    with_gradient,
)

from distill_nlp.losses import ModelShape, RKDAngleLoss, RKDDistanceLoss, SimilarityPreservingLoss

REFERENCES = {
    RKDDistanceLoss: reference_rkd_distance,
    RKDAngleLoss: reference_rkd_angle,
    SimilarityPreservingLoss: reference_similarity,
}
LOSSES = pytest.mark.parametrize("loss_class", REFERENCES)
# 5 rows, padded right, left and on both sides.
ROWS_MASK = torch.cat([MASK, torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 0]])])


def bound(loss_class, student=STUDENT, teacher=TEACHER, **settings):
    loss = loss_class(**settings)
    loss.bind(student, teacher)
    return loss


def of_logits(loss_class, student, teacher):
    return bound(loss_class, representation="logits")(features(student), features(teacher), None, None)


def call(loss, student, teacher, mask=ROWS_MASK):
    return loss(features(hidden_states=student), features(hidden_states=teacher), None, mask)


def vectors(seed, width, rows=5, dtype=torch.float32):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def reference(loss, student, teacher, mask=ROWS_MASK):
    total = 0.0
    for s, t in loss.hidden_state_pairs:
        examples = (reference_representation(x, mask, loss.representation) for x in (student[s], teacher[t]))
        total += REFERENCES[type(loss)](*examples)
    return total / len(loss.hidden_state_pairs)


@LOSSES
@pytest.mark.parametrize("representation", ["first", "mean"])
@pytest.mark.parametrize("layers", ["last", "uniform", [[0, 0], [1, 4]]])
@pytest.mark.parametrize("mask", [ROWS_MASK, None], ids=["padding", "no mask"])
def test_equals_the_reference_of_hidden_states(loss_class, representation, layers, mask):
    loss = bound(loss_class, representation=representation, layers=layers)
    student, teacher = states(0, 4, shape=(5, 5)), states(1, 6, shape=(5, 5))
    expected = reference(loss, student, teacher, torch.ones(5, 5) if mask is None else mask)
    assert call(loss, student, teacher, mask).item() == pytest.approx(expected, rel=1e-5)


@LOSSES
@pytest.mark.parametrize("rows", [3, 6])
@pytest.mark.parametrize("widths", [(3, 3), (2, 5), (5, 2), (1, 1)])
def test_equals_the_reference_of_logits(loss_class, rows, widths):
    student, teacher = vectors(0, widths[0], rows), vectors(1, widths[1], rows)
    expected = REFERENCES[loss_class](student, teacher)
    assert of_logits(loss_class, student, teacher).item() == pytest.approx(expected, rel=1e-5)


@LOSSES
@pytest.mark.parametrize("representation", ["first", "mean"])
def test_gradients_equal_the_reference(loss_class, representation):
    loss = bound(loss_class, representation=representation)
    student = with_gradient(states(0, 4, layers=(2,), shape=(4, 3)))
    teacher, mask = states(1, 6, shape=(4, 3)), ROWS_MASK[1:, :3]
    call(loss, student, teacher, mask).backward()
    expected = numeric_gradient(lambda x: reference(loss, {2: x}, teacher, mask), student[2])
    np.testing.assert_allclose(student[2].grad.double().numpy(), expected, atol=2e-6)
    assert student[2].grad.any(dim=-1).sum() == (4 if representation == "first" else mask.sum())


@LOSSES
@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_gradients_pass_gradcheck(loss_class, scale):
    student = (vectors(0, 3, dtype=torch.float64) * scale).requires_grad_()
    teacher = vectors(1, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: of_logits(loss_class, x, teacher), student)


@LOSSES
def test_float64_stays(loss_class):
    student, teacher = vectors(0, 3, dtype=torch.float64), vectors(1, 4, dtype=torch.float64)
    value = of_logits(loss_class, student, teacher)
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(REFERENCES[loss_class](student, teacher), rel=1e-12)


@LOSSES
@pytest.mark.parametrize("representation", ["first", "mean", "logits"])
def test_the_teacher_gets_no_gradient(loss_class, representation):
    sides = []
    for seed in (0, 1):
        hidden_states = with_gradient(states(seed, 4, shape=(5, 5)))
        sides.append(features(vectors(seed, 3).requires_grad_(), hidden_states))
    student, teacher = sides
    bound(loss_class, representation=representation)(student, teacher, None, ROWS_MASK).backward()
    assert teacher.logits.grad is None
    assert all(tensor.grad is None for tensor in teacher.hidden_states.values())
    read = student.logits if representation == "logits" else student.hidden_states[2]
    assert read.grad.any(dim=-1).sum() == (ROWS_MASK.sum() if representation == "mean" else 5)
    unread = student.hidden_states[2] if representation == "logits" else student.logits
    assert unread.grad is None


@LOSSES
def test_is_zero_at_identity(loss_class):
    student = vectors(0, 4).requires_grad_()
    value = of_logits(loss_class, student, vectors(0, 4))
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-9)
    assert student.grad.abs().max() < 1e-6


@LOSSES
def test_sees_relations_only(loss_class):
    """A rotation and a scale leave all three as they are; an offset, those of distances and angles."""
    student, teacher = vectors(0, 4, dtype=torch.float64), vectors(1, 4, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(vectors(2, 4, 4, dtype=torch.float64))
    value = of_logits(loss_class, student, teacher).item()
    assert of_logits(loss_class, 3 * student @ rotation, 0.2 * teacher).item() == pytest.approx(value, rel=1e-9)
    moved = of_logits(loss_class, student + 5, teacher - 2).item()
    assert (moved == pytest.approx(value, rel=1e-9)) == (loss_class is not SimilarityPreservingLoss)


@pytest.mark.parametrize("loss_class", [RKDDistanceLoss, RKDAngleLoss])
def test_huber_is_linear_beyond_one(loss_class, monkeypatch):
    """One text far from the others, and angles turned round: the differences exceed 1."""
    student = torch.tensor([[0.0, 0], [1, 0], [2, 0], [3, 0], [4, 0.1], [5, 0]])
    teacher = torch.tensor([[0.0, 0], [0.1, 0], [0.2, 0.1], [50, 0], [0.1, 0.2], [0, 0.3]])
    expected = REFERENCES[loss_class](student, teacher)
    assert of_logits(loss_class, student, teacher).item() == pytest.approx(expected, rel=1e-5)
    monkeypatch.setattr(references_features, "huber", lambda x, y: (x - y) ** 2 / 2)
    assert REFERENCES[loss_class](student, teacher) > expected * 1.01


@LOSSES
def test_the_order_of_the_rows_changes_nothing(loss_class):
    student, teacher, order = vectors(0, 3), vectors(1, 4), [3, 0, 4, 2, 1]
    value = of_logits(loss_class, student, teacher).item()
    assert of_logits(loss_class, student[order], teacher[order]).item() == pytest.approx(value, rel=1e-5)
    assert of_logits(loss_class, student[order], teacher).item() != pytest.approx(value, rel=1e-2)


@LOSSES
@pytest.mark.parametrize("representation", ["first", "mean"])
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_extra_padding_changes_nothing(loss_class, representation, left):
    loss = bound(loss_class, representation=representation)
    student, teacher = states(0, 4, shape=(5, 5)), states(1, 6, shape=(5, 5))
    wide = [padded_with_garbage(s, seed, left=left) for seed, s in ((2, student), (3, teacher))]
    value = call(loss, student, teacher).item()
    assert call(loss, *wide, padded_mask(ROWS_MASK, left=left)).item() == pytest.approx(value, rel=1e-5)


@LOSSES
@pytest.mark.parametrize("representation", ["first", "mean", "logits"])
@pytest.mark.parametrize("rows", [1, 2])
def test_batches_too_small_to_relate_give_zero_within_the_graph(loss_class, representation, rows):
    hidden_states = with_gradient(states(0, 4, shape=(rows, 5)))
    student = features(vectors(0, 3, rows).requires_grad_(), hidden_states)
    teacher = features(vectors(1, 4, rows), states(1, 6, shape=(rows, 5)))
    value = bound(loss_class, representation=representation)(student, teacher, None, ROWS_MASK[:rows])
    value.backward()
    read = student.logits if representation == "logits" else hidden_states[2]
    assert read.grad.isfinite().all()
    # Two texts are always as far apart as the mean, but they may be more or less alike.
    if rows == 2 and loss_class is SimilarityPreservingLoss:
        assert value.item() > 0
        assert read.grad.any()
    else:
        assert value.item() == pytest.approx(0, abs=1e-9)
        assert read.grad.abs().max() < 1e-6


@LOSSES
@pytest.mark.parametrize(
    ("student_rows", "teacher_rows"),
    [
        ([0, 1, 0, 2], [0, 1, 0, 2]),
        ([0, 1, 0, 2], [0, 1, 2, 3]),
        ([0, 1, 2, 3], [0, 1, 0, 2]),
        ([0, 0, 0, 0], [0, 1, 2, 3]),
    ],
    ids=["both", "student", "teacher", "all the same"],
)
def test_the_same_text_twice_equals_the_reference_with_finite_gradients(loss_class, student_rows, teacher_rows):
    student, teacher = vectors(0, 3)[student_rows].requires_grad_(), vectors(1, 4)[teacher_rows]
    value = of_logits(loss_class, student, teacher)
    value.backward()
    assert value.item() == pytest.approx(REFERENCES[loss_class](student, teacher), rel=1e-5)
    assert student.grad.isfinite().all()
    assert student.grad.abs().max() < 10


@LOSSES
def test_nearly_the_same_text_is_told_apart(loss_class):
    """Small distances between long vectors, as in the states of a trained model."""
    student = 10 + 1e-2 * vectors(0, 8)
    teacher = 10 + 1e-2 * vectors(1, 8)
    expected = REFERENCES[loss_class](student, teacher)
    assert of_logits(loss_class, student, teacher).item() == pytest.approx(expected, rel=1e-3, abs=1e-9)


@LOSSES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1.0, 1e4])
@pytest.mark.parametrize("representation", ["first", "mean", "logits"])
def test_is_finite_and_float32(loss_class, dtype, scale, representation):
    sides = []
    for seed, width in ((0, 4), (1, 6)):
        hidden_states = {k: (v * scale).to(dtype) for k, v in states(seed, width, shape=(5, 5)).items()}
        sides.append(features((vectors(seed, width) * scale).to(dtype), hidden_states))
    student, teacher = sides
    read = student.logits if representation == "logits" else student.hidden_states[2]
    read.requires_grad_()
    value = bound(loss_class, representation=representation)(student, teacher, None, ROWS_MASK)
    value.backward()
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert read.grad.isfinite().all()


@LOSSES
@pytest.mark.parametrize("representation", ["first", "mean", "logits"])
def test_bfloat16_inputs_lose_nothing_on_the_way(loss_class, representation):
    student, teacher = ({k: v.bfloat16() for k, v in states(s, 4, shape=(5, 5)).items()} for s in (0, 1))
    loss = bound(loss_class, representation=representation)
    if representation == "logits":
        value = of_logits(loss_class, student[2][:, 0], teacher[4][:, 0]).item()
        expected = REFERENCES[loss_class](student[2][:, 0].float(), teacher[4][:, 0].float())
    else:
        value, expected = call(loss, student, teacher).item(), reference(loss, student, teacher)
    assert value == pytest.approx(expected, rel=1e-4)


@LOSSES
@pytest.mark.parametrize("representation", ["first", "mean"])
def test_a_row_of_padding_only_is_finite(loss_class, representation):
    student = with_gradient(states(0, 4, shape=(5, 5)))
    mask = ROWS_MASK.clone()
    mask[1] = 0
    value = call(bound(loss_class, representation=representation), student, states(1, 6, shape=(5, 5)), mask)
    value.backward()
    assert value.isfinite()
    assert student[2].grad.isfinite().all()
    assert not student[2].grad[1, 1:].any()


@LOSSES
@pytest.mark.parametrize("problem_type", ["multi_label_classification", "regression"])
def test_the_task_does_not_matter(loss_class, problem_type):
    shape = ModelShape(num_labels=1, problem_type=problem_type)
    student, teacher = vectors(0, 1), vectors(1, 1)
    value = bound(loss_class, shape, shape, representation="logits")(features(student), features(teacher), None, None)
    assert value.item() == pytest.approx(REFERENCES[loss_class](student, teacher), rel=1e-5)


@LOSSES
def test_logits_need_no_layers_and_hidden_states_do(loss_class):
    nothing = ModelShape(num_labels=3)
    assert bound(loss_class, nothing, nothing, representation="logits").hidden_state_pairs == []
    with pytest.raises(ValueError, match=f"{loss_class.__name__} reads layers, but the student's config has no"):
        bound(loss_class, student=nothing)


@LOSSES
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"representation": "cls"}, "representation must be one of first, mean, logits, got 'cls'"),
        ({"layers": "middle"}, "layers must be one of uniform, last, first, every_<k> .* got 'middle'"),
        ({"layers": [[1, 5]]}, r"teacher layer 5 of pair \[1, 5\] is not within 0..4; the student has 2 layers and"),
    ],
)
def test_refuses_unknown_settings(loss_class, settings, message):
    with pytest.raises(ValueError, match=message):
        bound(loss_class, **settings)


@LOSSES
def test_refuses_unknown_layers_before_the_models_are_known(loss_class):
    with pytest.raises(ValueError, match="layers must be one of"):
        loss_class(layers="middle")


@LOSSES
def test_refuses_models_that_saw_other_rows_or_tokens(loss_class):
    with pytest.raises(ValueError, match="the student answered 5 rows, the teacher 4"):
        of_logits(loss_class, vectors(0, 3), vectors(1, 3, 4))
    with pytest.raises(ValueError, match="the student saw 5 x 5 tokens and the teacher 5 x 4"):
        call(bound(loss_class), states(0, 4, shape=(5, 5)), states(1, 6, shape=(5, 4)))


@LOSSES
def test_describes_its_representation_and_layers(loss_class):
    assert bound(loss_class).describe() == "first, 2→4"
    assert bound(loss_class, representation="mean", layers="uniform").describe() == "mean, 1→2, 2→4"
    assert bound(loss_class, representation="logits").describe() == "logits"


def test_the_angle_at_a_text_is_that_of_the_triangle():
    """A right angle against an equilateral triangle: cosines 0, √½, √½ against ½."""
    right = torch.tensor([[0.0, 0], [1, 0], [0, 1]])
    equilateral = torch.tensor([[0.0, 0], [1, 0], [0.5, math.sqrt(0.75)]])
    expected = (0.5**2 + 2 * (math.sqrt(0.5) - 0.5) ** 2) / 2 / 3
    assert of_logits(RKDAngleLoss, right, equilateral).item() == pytest.approx(expected, rel=1e-5)


@LOSSES
def test_without_padding_two_models_may_have_positions_of_their_own(loss_class):
    loss = bound(loss_class, layers=[[1, 2]], representation="mean")
    student, teacher = {1: states(0, STUDENT.hidden_size)[1]}, {2: states(1, TEACHER.hidden_size)[2]}
    shorter = {2: teacher[2][:, :3]}
    found = call(loss, student, shorter, mask=None).item()
    examples = [x.double().mean(dim=1) for x in (student[1], shorter[2])]
    assert found == pytest.approx(REFERENCES[loss_class](*examples), rel=1e-4)
    with pytest.raises(ValueError, match="token by token"):
        call(loss, student, shorter, mask=torch.ones(student[1].shape[:2], dtype=torch.long))
