"""Hidden-state losses, against loops in float64."""

import numpy as np
import pytest
import torch
from helpers import features, numeric_gradient, reference_hidden_states

from distill_nlp.losses import HiddenStateLoss, ModelShape

STUDENT = ModelShape(num_labels=3, num_layers=2, hidden_size=4, num_attention_heads=2)
TEACHER = ModelShape(num_labels=3, num_layers=4, hidden_size=6, num_attention_heads=3)
SAME_WIDTH = ModelShape(num_labels=3, num_layers=4, hidden_size=4, num_attention_heads=2)
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])
KINDS = pytest.mark.parametrize("kind", ["mse", "cosine"])


def states(seed, width, layers=(0, 1, 2, 3, 4), shape=(3, 5)):
    generator = torch.Generator().manual_seed(seed)
    return {layer: torch.randn(*shape, width, generator=generator) for layer in layers}


def bound(student=STUDENT, teacher=TEACHER, **settings):
    loss = HiddenStateLoss(**settings)
    torch.manual_seed(0)
    loss.bind(student, teacher)
    return loss


def call(loss, student, teacher, mask=MASK):
    return loss(features(hidden_states=student), features(hidden_states=teacher), None, mask)


def with_gradient(hidden_states):
    return {layer: tensor.clone().requires_grad_() for layer, tensor in hidden_states.items()}


@KINDS
@pytest.mark.parametrize("mask", [MASK, None], ids=["padding", "no mask"])
def test_equals_the_reference_over_all_pairs(kind, mask):
    loss = bound(kind=kind)
    student, teacher = states(0, 4), states(1, 6)
    expected = 0.0
    for projection, (s, t) in zip(loss.projections, [(1, 2), (2, 4)], strict=True):
        ones = torch.ones(3, 5) if mask is None else mask
        expected += reference_hidden_states(student[s], teacher[t], ones, kind, projection.weight, projection.bias) / 2
    assert call(loss, student, teacher, mask).item() == pytest.approx(expected, rel=1e-5)


@KINDS
def test_equals_the_reference_without_projection(kind):
    loss = bound(teacher=SAME_WIDTH, kind=kind, layers=[[0, 0]])
    student, teacher = states(0, 4), states(1, 4)
    assert len(loss.projections) == 0
    expected = reference_hidden_states(student[0], teacher[0], MASK, kind)
    assert call(loss, student, teacher).item() == pytest.approx(expected, rel=1e-5)


@KINDS
def test_gradients_equal_the_reference_for_student_and_projection(kind):
    loss = bound(kind=kind, layers="last")
    student, teacher = with_gradient(states(0, 4)), states(1, 6)
    call(loss, student, teacher).backward()
    weight, bias = loss.projections[0].weight, loss.projections[0].bias

    def reference(x=student[2], w=weight, b=bias):
        return reference_hidden_states(x, teacher[4], MASK, kind, w, b)

    for tensor, argument in ((student[2], "x"), (weight, "w"), (bias, "b")):
        expected = numeric_gradient(lambda value, name=argument: reference(**{name: value}), tensor)
        np.testing.assert_allclose(tensor.grad.double().numpy(), expected, atol=1e-6, err_msg=argument)


@KINDS
def test_the_teacher_gets_no_gradient(kind):
    loss = bound(kind=kind)
    student, teacher = with_gradient(states(0, 4)), with_gradient(states(1, 6))
    call(loss, student, teacher).backward()
    assert all(tensor.grad is None for tensor in teacher.values())
    assert all(student[layer].grad.any() for layer in (1, 2))
    assert all(student[layer].grad is None for layer in (0, 3, 4))
    assert all(parameter.grad.any() for parameter in loss.parameters())


@KINDS
def test_is_zero_at_identity(kind):
    loss = bound(student=SAME_WIDTH, teacher=SAME_WIDTH, kind=kind, projection="none")
    assert call(loss, states(0, 4), states(0, 4)).item() == pytest.approx(0, abs=1e-6)


def test_cosine_looks_at_the_direction_only():
    loss = bound(student=SAME_WIDTH, teacher=SAME_WIDTH, kind="cosine", layers="last")
    student = states(0, 4)
    assert call(loss, student, {4: student[4] * 7}).item() == pytest.approx(0, abs=1e-6)
    assert call(loss, student, {4: -student[4]}).item() == pytest.approx(2, abs=1e-6)


@KINDS
def test_padded_tokens_count_nowhere(kind):
    loss = bound(kind=kind)
    student, teacher = with_gradient(states(0, 4)), states(1, 6)
    value = call(loss, student, teacher)
    value.backward()
    for layer in (1, 2):
        assert not student[layer].grad[MASK == 0].any()
        assert student[layer].grad[MASK == 1].any(dim=-1).all()
    changed = {layer: tensor.detach().masked_fill(MASK[..., None] == 0, 1e3) for layer, tensor in student.items()}
    assert call(loss, changed, teacher).item() == pytest.approx(value.item(), rel=1e-6)


@KINDS
def test_extra_padding_changes_nothing(kind):
    loss = bound(kind=kind)
    student, teacher = states(0, 4), states(1, 6)
    wide_mask = torch.cat([MASK, torch.zeros(3, 4, dtype=torch.long)], dim=1)

    def widened(hidden_states, seed):
        width = hidden_states[0].shape[-1]
        garbage = states(seed, width, shape=(3, 4))
        return {layer: torch.cat([tensor, garbage[layer] * 50], dim=1) for layer, tensor in hidden_states.items()}

    value = call(loss, student, teacher).item()
    assert call(loss, widened(student, 2), widened(teacher, 3), wide_mask).item() == pytest.approx(value, rel=1e-6)


@KINDS
def test_parts_of_a_batch_add_up_to_the_whole_in_any_order(kind):
    loss = bound(kind=kind)
    student, teacher = states(0, 4), states(1, 6)

    def part(rows):
        return call(
            loss, {k: v[rows] for k, v in student.items()}, {k: v[rows] for k, v in teacher.items()}, MASK[rows]
        ).item()

    whole = call(loss, student, teacher).item()
    assert part([2, 0, 1]) == pytest.approx(whole, rel=1e-6)
    assert (part([1]) + 2 * part([2, 0])) / 3 == pytest.approx(whole, rel=1e-6)


@KINDS
def test_a_row_of_padding_only_is_zero_and_finite(kind):
    loss = bound(kind=kind)
    student = with_gradient(states(0, 4))
    mask = torch.stack([MASK[0], torch.zeros(5, dtype=torch.long), MASK[2]])
    value = call(loss, student, states(1, 6), mask)
    value.backward()
    assert value.isfinite()
    assert student[2].grad.isfinite().all()
    assert not student[2].grad[1].any()


@KINDS
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_is_finite_and_float32_for_bfloat16_inputs(kind, scale):
    loss = bound(kind=kind)
    student = {layer: (tensor * scale).bfloat16().requires_grad_() for layer, tensor in states(0, 4).items()}
    teacher = {layer: (tensor * scale).bfloat16() for layer, tensor in states(1, 6).items()}
    value = call(loss, student, teacher)
    value.backward()
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert student[1].grad.isfinite().all()


def test_cosine_of_zero_vectors_has_a_finite_gradient():
    loss = bound(student=SAME_WIDTH, teacher=SAME_WIDTH, kind="cosine", layers="last")
    student = {4: torch.zeros(3, 5, 4, requires_grad=True)}
    call(loss, student, states(1, 4)).backward()
    assert student[4].grad.isfinite().all()


def test_each_pair_has_a_projection_of_its_own_where_widths_differ():
    loss = bound()
    assert loss.hidden_state_pairs == [(1, 2), (2, 4)]
    assert [(p.in_features, p.out_features) for p in loss.projections] == [(4, 6), (4, 6)]
    assert not torch.equal(loss.projections[0].weight, loss.projections[1].weight)
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in loss.parameters())


def test_projection_setting():
    assert len(bound(teacher=SAME_WIDTH).projections) == 0
    assert len(bound(teacher=SAME_WIDTH, projection="linear").projections) == 2
    assert len(bound(teacher=SAME_WIDTH, projection="none").projections) == 0
    with pytest.raises(ValueError, match='needs equal widths; the student has 4, the teacher 6: use projection "auto"'):
        bound(projection="none")


def test_one_student_layer_may_learn_from_two():
    loss = bound(layers=[[1, 2], [1, 4]])
    student, teacher = states(0, 4), states(1, 6)
    expected = 0.0
    for projection, layer in zip(loss.projections, (2, 4), strict=True):
        expected += reference_hidden_states(student[1], teacher[layer], MASK, "mse", projection.weight, projection.bias)
    assert call(loss, student, teacher).item() == pytest.approx(expected / 2, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "mae"}, "kind must be one of mse, cosine, normalized, got 'mae'"),
        ({"projection": "mlp"}, "projection must be one of auto, none, linear, shared, low_rank, orthogonal, got 'mlp'"),
        ({"layers": "middle"}, "layers must be one of"),
        ({"layers": [[3, 1]]}, "student layer 3 .* is not within 0..2"),
    ],
)
def test_refuses_unknown_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        bound(**settings)


def test_refuses_models_without_layers():
    with pytest.raises(ValueError, match="HiddenStateLoss reads layers, but the teacher's config has no num_hidden"):
        bound(teacher=ModelShape(num_labels=3))
    with pytest.raises(ValueError, match="the student's config has no num_hidden_layers"):
        bound(student=ModelShape(num_labels=3))


def test_refuses_sequences_of_different_lengths():
    with pytest.raises(ValueError, match=r"the student saw 3 x 5 tokens and the teacher 3 x 1"):
        call(bound(), states(0, 4), states(1, 6, shape=(3, 1)))


def test_describes_its_kind_and_layers():
    assert bound(kind="cosine").describe() == "cosine, 1→2, 2→4"
