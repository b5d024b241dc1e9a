"""Inner products of hidden states: NST and FSP, against loops in float64."""

import numpy as np
import pytest
import torch
from helpers import features, numeric_gradient
from references_features import (
    MASK,
    SAME_WIDTH,
    STUDENT,
    TEACHER,
    padded_mask,
    padded_with_garbage,
    reference_fsp,
    reference_nst,
    states,
    with_gradient,
)

from distill_nlp.losses import FSPLoss, ModelShape, NSTLoss, chunking

LOSSES = pytest.mark.parametrize("loss_class", [NSTLoss, FSPLoss])
ONES = torch.ones_like(MASK)


def bound(loss_class, student=STUDENT, teacher=TEACHER, **settings):
    loss = loss_class(**settings)
    torch.manual_seed(0)
    loss.bind(student, teacher)
    return loss


def call(loss, student, teacher, mask=MASK):
    return loss(features(hidden_states=student), features(hidden_states=teacher), None, mask)


def reference(loss, student, teacher, mask=MASK):
    """The mean over pairs of layers (NST), or over neighbours among them (FSP)."""
    pairs = loss.hidden_state_pairs
    if isinstance(loss, NSTLoss):
        return sum(reference_nst(student[s], teacher[t], mask) for s, t in pairs) / len(pairs)
    projections = [(p.weight, p.bias) for p in loss.projections] or [(None, None)] * len(pairs)
    values = []
    for i in range(len(pairs) - 1):
        (s, t), (next_s, next_t) = pairs[i : i + 2]
        neighbours = (student[s], student[next_s]), (teacher[t], teacher[next_t])
        values.append(reference_fsp(*neighbours, mask, projections[i : i + 2]))
    return sum(values) / len(values)


@LOSSES
@pytest.mark.parametrize("teacher_shape", [TEACHER, SAME_WIDTH], ids=["other width", "same width"])
@pytest.mark.parametrize("mask", [MASK, MASK.flip(1), None], ids=["padding", "left padding", "no mask"])
@pytest.mark.parametrize("layers", ["uniform", [[0, 0], [1, 3], [2, 4]]])
def test_equals_the_reference(loss_class, teacher_shape, mask, layers):
    loss = bound(loss_class, teacher=teacher_shape, layers=layers)
    student, teacher = states(0, 4), states(1, teacher_shape.hidden_size)
    expected = reference(loss, student, teacher, ONES if mask is None else mask)
    assert call(loss, student, teacher, mask).item() == pytest.approx(expected, rel=1e-5)


@LOSSES
def test_gradients_equal_the_reference(loss_class):
    loss = bound(loss_class)
    student, teacher = with_gradient(states(0, 4)), states(1, 6)
    call(loss, student, teacher).backward()
    for layer in (1, 2):

        def changed(x, layer=layer):
            return reference(loss, student | {layer: x}, teacher)

        expected = numeric_gradient(changed, student[layer])
        np.testing.assert_allclose(student[layer].grad.double().numpy(), expected, atol=2e-6)
        assert student[layer].grad[MASK == 1].any(dim=-1).all()


@LOSSES
@pytest.mark.parametrize("projection", ["linear", "shared", "low_rank", "orthogonal"])
def test_gradients_pass_gradcheck(loss_class, projection):
    settings = {} if loss_class is NSTLoss else {"projection": projection, "rank": 2}
    loss = bound(loss_class, **settings).double()
    student = with_gradient(states(0, 4, layers=(1, 2), shape=(2, 3), dtype=torch.float64))
    teacher = states(1, 6, shape=(2, 3), dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    inputs = (*student.values(), *loss.parameters())
    assert torch.autograd.gradcheck(lambda *_: call(loss, student, teacher, mask), inputs)


@LOSSES
def test_float64_stays(loss_class):
    student, teacher = states(0, 4, dtype=torch.float64), states(1, 6, dtype=torch.float64)
    loss = bound(loss_class).double()
    value = call(loss, student, teacher)
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(reference(loss, student, teacher), rel=1e-10)


@LOSSES
def test_the_teacher_gets_no_gradient(loss_class):
    loss = bound(loss_class)
    student, teacher = with_gradient(states(0, 4)), with_gradient(states(1, 6))
    call(loss, student, teacher).backward()
    assert all(tensor.grad is None for tensor in teacher.values())
    assert all(student[layer].grad.any() for layer in (1, 2))
    assert all(parameter.grad.any() for parameter in loss.parameters())
    assert len(list(loss.parameters())) == (0 if loss_class is NSTLoss else 4)


@LOSSES
def test_is_zero_at_identity(loss_class):
    loss = bound(loss_class, student=SAME_WIDTH, teacher=SAME_WIDTH)
    student = with_gradient(states(0, 4))
    value = call(loss, student, states(0, 4))
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert all(student[layer].grad.abs().max() < 1e-6 for layer in (1, 2, 3, 4))


def test_nst_knows_neurons_neither_by_name_nor_by_sign_or_size():
    loss = bound(NSTLoss, student=SAME_WIDTH, teacher=SAME_WIDTH, layers="last")
    student = states(0, 4)
    factors = torch.tensor([2.0, -0.5, 1e-3, -30.0])
    assert call(loss, student, {4: student[4][..., [2, 0, 3, 1]] * factors}).item() == pytest.approx(0, abs=1e-6)


def test_fsp_keeps_the_order_of_the_two_layers_and_does_not_grow_with_the_text():
    loss = bound(FSPLoss, student=SAME_WIDTH, teacher=SAME_WIDTH, layers=[[1, 1], [2, 2]])
    student, teacher = states(0, 4), states(1, 4)
    value = call(loss, student, teacher, None).item()
    assert call(loss, student, {1: student[2], 2: student[1]}, None).item() > 0.1
    twice = [{layer: torch.cat([tensor, tensor], dim=1) for layer, tensor in s.items()} for s in (student, teacher)]
    assert call(loss, *twice, None).item() == pytest.approx(value, rel=1e-5)


@LOSSES
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_extra_padding_changes_nothing(loss_class, left):
    loss = bound(loss_class)
    student, teacher = with_gradient(states(0, 4)), states(1, 6)
    value = call(loss, student, teacher)
    value.backward()
    wide = with_gradient(padded_with_garbage(states(0, 4), 2, left=left))
    wide_value = call(loss, wide, padded_with_garbage(teacher, 3, left=left), padded_mask(MASK, left=left))
    wide_value.backward()
    assert wide_value.item() == pytest.approx(value.item(), rel=1e-5)
    for layer in (1, 2):
        padding, real = wide[layer].grad.split([4, 5] if left else [5, 4], dim=1)[:: 1 if left else -1]
        torch.testing.assert_close(real, student[layer].grad, rtol=1e-4, atol=1e-6)
        assert not padding.any()


@LOSSES
@pytest.mark.parametrize("elements", [1, 1 << 20], ids=["row by row", "all at once"])
def test_parts_of_a_batch_add_up_to_the_whole_in_any_order(loss_class, elements, monkeypatch):
    monkeypatch.setattr(chunking, "ELEMENTS_PER_CHUNK", elements)
    loss = bound(loss_class)
    student, teacher = states(0, 4), states(1, 6)

    def part(rows, mask=MASK):
        mask = None if mask is None else mask[rows]
        return call(loss, *({k: v[rows] for k, v in s.items()} for s in (student, teacher)), mask).item()

    for mask in (MASK, None):
        whole = part([0, 1, 2], mask)
        assert whole == pytest.approx(reference(loss, student, teacher, ONES if mask is None else mask), rel=1e-5)
        assert part([2, 0, 1], mask) == pytest.approx(whole, rel=1e-5)
        assert (part([1], mask) + 2 * part([2, 0], mask)) / 3 == pytest.approx(whole, rel=1e-5)


@LOSSES
@pytest.mark.parametrize("projection", ["auto", "low_rank"])
def test_a_row_of_padding_only_adds_nothing(loss_class, projection):
    loss = bound(loss_class, **({} if loss_class is NSTLoss else {"projection": projection, "rank": 2}))
    student, teacher = with_gradient(states(0, 4)), states(1, 6)
    mask = torch.stack([MASK[0], torch.zeros(5, dtype=torch.long), MASK[2]])
    value = call(loss, student, teacher, mask)
    value.backward()
    others = call(loss, *({k: v[[0, 2]] for k, v in s.items()} for s in (student, teacher)), mask[[0, 2]])
    assert value.item() == pytest.approx(others.item() * 2 / 3, rel=1e-5)
    assert student[2].grad.isfinite().all()
    assert not student[2].grad[1].any()


@LOSSES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1.0, 1e4])
def test_is_finite_and_float32(loss_class, dtype, scale):
    loss = bound(loss_class)
    student = {layer: (tensor * scale).to(dtype).requires_grad_() for layer, tensor in states(0, 4).items()}
    value = call(loss, student, {layer: (tensor * scale).to(dtype) for layer, tensor in states(1, 6).items()})
    value.backward()
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert all(student[layer].grad.isfinite().all() for layer in (1, 2))
    assert all(parameter.grad.isfinite().all() for parameter in loss.parameters())


@LOSSES
def test_bfloat16_inputs_lose_nothing_on_the_way(loss_class):
    student, teacher = ({k: v.bfloat16() for k, v in states(seed, 4).items()} for seed in (0, 1))
    loss = bound(loss_class, teacher=SAME_WIDTH)
    assert call(loss, student, teacher).item() == pytest.approx(reference(loss, student, teacher), rel=1e-5)


def test_a_neuron_that_is_silent_in_a_text_is_similar_to_none():
    loss = bound(NSTLoss, layers="last")
    student, teacher = states(0, 4), states(1, 6)
    student[2][:, :, 1] = 0
    student = with_gradient(student)
    value = call(loss, student, teacher)
    value.backward()
    assert value.item() == pytest.approx(reference(loss, student, teacher), rel=1e-5)
    assert student[2].grad.isfinite().all()


@LOSSES
@pytest.mark.parametrize("problem_type", ["multi_label_classification", "regression"])
def test_the_task_does_not_matter(loss_class, problem_type):
    shapes = [ModelShape(num_labels=1, num_layers=2, hidden_size=4, problem_type=problem_type) for _ in range(2)]
    loss, student, teacher = bound(loss_class, *shapes), states(0, 4), states(1, 4)
    assert call(loss, student, teacher).item() == pytest.approx(reference(loss, student, teacher), rel=1e-5)


@LOSSES
def test_refuses_what_it_cannot_compare(loss_class):
    name = loss_class.__name__
    with pytest.raises(ValueError, match="layers must be one of uniform, last, first, every_<k> .* got 'middle'"):
        loss_class(layers="middle")
    with pytest.raises(ValueError, match="teacher layer 5 of pair .* is not within 0..4; the student has 2 layers and"):
        bound(loss_class, layers=[[0, 0], [1, 5]])
    with pytest.raises(ValueError, match=f"{name} reads layers, but the student's config has no num_hidden_layers"):
        bound(loss_class, student=ModelShape(num_labels=3))
    with pytest.raises(ValueError, match=rf"{name} compares token by token, but the student saw 3 x 5 .* 3 x 4"):
        call(bound(loss_class), states(0, 4), states(1, 6, shape=(3, 4)))


def test_fsp_needs_two_pairs_of_layers_and_a_projection_where_widths_differ():
    with pytest.raises(ValueError, match="FSPLoss relates neighbouring layers and needs two pairs, got 2→4"):
        bound(FSPLoss, layers="last")
    with pytest.raises(ValueError, match="the student has 4, the teacher 6"):
        bound(FSPLoss, projection="none")


def test_describe_their_layers():
    assert bound(NSTLoss, layers="last").describe() == "2→4"
    assert bound(FSPLoss, layers="uniform").describe() == "1→2, 2→4"
    assert bound(FSPLoss, projection="low_rank", rank=2).describe() == "low_rank projection, 1→2, 2→4"
