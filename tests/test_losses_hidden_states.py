"""Losses of hidden states through projections, token by token and of first tokens, against loops in float64."""

import numpy as np
import pytest
import torch
from helpers import features, numeric_gradient, reference_hidden_states
from references_features import (
    MASK,
    SAME_WIDTH,
    STUDENT,
    TEACHER,
    padded_mask,
    padded_with_garbage,
    reference_normalized,
    reference_pkd,
    states,
    with_gradient,
)
from transformers import BertConfig, ResNetConfig

from distill_nlp.losses import HiddenStateLoss, ModelShape, PKDLoss

KINDS = pytest.mark.parametrize("kind", ["mse", "cosine", "normalized", "pkd"])
STAGES = [
    ModelShape(num_labels=3, num_layers=2, stage_widths=(6, 8)),
    ModelShape(num_labels=3, num_layers=4, stage_widths=(10, 12, 12, 16)),
]


@pytest.mark.parametrize(
    ("layers", "widths"),
    [("last", (8, 16)), ([[1, 2]], (6, 12)), ([[1, 2], [1, 3]], (6, 12)), ([[2, 1]], (8, 10))],
)
def test_stages_of_one_width_each_are_projected_from_the_one_to_the_other(layers, widths):
    loss = HiddenStateLoss(layers=layers)
    loss.bind(*STAGES)
    assert loss.projections.widths == widths
    assert {(p.in_features, p.out_features) for p in loss.projections} == {widths}


@pytest.mark.parametrize("layers", ["uniform", [[1, 1], [2, 4]], [[0, 1]]])
def test_stages_of_several_widths_at_once_are_refused(layers):
    with pytest.raises(ValueError, match='projects between two widths, .* have several: map one pair .* "last"'):
        HiddenStateLoss(layers=layers).bind(*STAGES)


def test_the_widths_of_stages_are_read_from_the_config():
    config = ResNetConfig(embedding_size=5, hidden_sizes=[6, 8], depths=[1, 2], num_labels=3)
    shape = ModelShape.from_config(config)
    assert (shape.num_layers, shape.hidden_size, shape.stage_widths) == (2, None, (6, 8))
    assert [shape.width(layer) for layer in range(3)] == [None, 6, 8]
    bert = ModelShape.from_config(BertConfig(hidden_size=32, num_attention_heads=4))
    assert bert.stage_widths is None
    assert bert.width(0) == bert.width(5) == 32


TOKEN_KINDS = pytest.mark.parametrize("kind", ["mse", "cosine", "normalized"])
ONES = torch.ones_like(MASK)
# The first token of the second row is padding on the left, the third has padding on both sides.
LEFT_MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1], [0, 1, 1, 1, 0]])


def bound(kind="mse", student=STUDENT, teacher=TEACHER, **settings):
    loss = PKDLoss(**settings) if kind == "pkd" else HiddenStateLoss(kind=kind, **settings)
    torch.manual_seed(0)
    loss.bind(student, teacher)
    return loss


def call(loss, student, teacher, mask=MASK):
    return loss(features(hidden_states=student), features(hidden_states=teacher), None, mask)


def reference(kind, student, teacher, mask=MASK, weight=None, bias=None):
    if kind == "pkd":
        return reference_pkd(student, teacher, mask, weight, bias)
    if kind == "normalized":
        return reference_normalized(student, teacher, mask, weight, bias)
    return reference_hidden_states(student, teacher, mask, kind, weight, bias)


@KINDS
@pytest.mark.parametrize("mask", [MASK, LEFT_MASK, None], ids=["padding", "left padding", "no mask"])
def test_equals_the_reference_over_all_pairs(kind, mask):
    loss = bound(kind)
    student, teacher = states(0, 4), states(1, 6)
    expected = 0.0
    for projection, (s, t) in zip(loss.projections, [(1, 2), (2, 4)], strict=True):
        ones = ONES if mask is None else mask
        expected += reference(kind, student[s], teacher[t], ones, projection.weight, projection.bias) / 2
    assert call(loss, student, teacher, mask).item() == pytest.approx(expected, rel=1e-5)


@KINDS
def test_equals_the_reference_without_projection(kind):
    loss = bound(kind, teacher=SAME_WIDTH, layers=[[0, 0]])
    student, teacher = states(0, 4), states(1, 4)
    assert len(loss.projections) == 0
    expected = reference(kind, student[0], teacher[0])
    assert call(loss, student, teacher).item() == pytest.approx(expected, rel=1e-5)


@KINDS
def test_gradients_equal_the_reference_for_student_and_projection(kind):
    loss = bound(kind, layers="last")
    student, teacher = with_gradient(states(0, 4)), states(1, 6)
    call(loss, student, teacher).backward()
    weight, bias = loss.projections[0].weight, loss.projections[0].bias
    known = {"x": student[2], "w": weight, "b": bias}

    def changed(name, value):
        x, w, b = (known | {name: value}).values()
        return reference(kind, x, teacher[4], MASK, w, b)

    for name, tensor in known.items():
        expected = numeric_gradient(lambda value, name=name: changed(name, value), tensor)
        np.testing.assert_allclose(tensor.grad.double().numpy(), expected, atol=2e-6, err_msg=name)


@KINDS
@pytest.mark.parametrize("projection", ["linear", "shared", "low_rank", "orthogonal"])
def test_gradients_pass_gradcheck_through_each_projection(kind, projection):
    loss = bound(kind, projection=projection, rank=2, layers=[[1, 2], [2, 4]]).double()
    student = with_gradient(states(0, 4, layers=(1, 2), shape=(2, 3), dtype=torch.float64))
    teacher = states(1, 6, shape=(2, 3), dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1], [0, 1, 0]])
    inputs = (*student.values(), *loss.parameters())
    assert torch.autograd.gradcheck(lambda *_: call(loss, student, teacher, mask), inputs)


@KINDS
def test_float64_stays(kind):
    student, teacher = states(0, 4, dtype=torch.float64), states(1, 6, dtype=torch.float64)
    loss = bound(kind, layers="last").double()
    weight, bias = loss.projections[0].weight, loss.projections[0].bias
    value = call(loss, student, teacher)
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(reference(kind, student[2], teacher[4], MASK, weight, bias), rel=1e-9)


@KINDS
def test_the_teacher_gets_no_gradient(kind):
    loss = bound(kind)
    student, teacher = with_gradient(states(0, 4)), with_gradient(states(1, 6))
    call(loss, student, teacher).backward()
    assert all(tensor.grad is None for tensor in teacher.values())
    assert all(student[layer].grad.any() for layer in (1, 2))
    assert all(student[layer].grad is None for layer in (0, 3, 4))
    assert all(parameter.grad.any() for parameter in loss.parameters())


@KINDS
def test_is_zero_at_identity(kind):
    loss = bound(kind, student=SAME_WIDTH, teacher=SAME_WIDTH, projection="none")
    student = with_gradient(states(0, 4))
    value = call(loss, student, states(0, 4))
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert all(student[layer].grad.abs().max() < 1e-6 for layer in (1, 2, 3, 4))


@pytest.mark.parametrize("kind", ["cosine", "pkd"])
@pytest.mark.parametrize("scale", [1e-3, 7.0])
def test_cosine_and_pkd_look_at_the_direction_only(kind, scale):
    loss = bound(kind, student=SAME_WIDTH, teacher=SAME_WIDTH, layers="last")
    student = states(0, 4)
    assert call(loss, student, {4: student[4] * scale}).item() == pytest.approx(0, abs=1e-6)
    farthest = {"cosine": 2, "pkd": 4}[kind]
    assert call(loss, student, {4: -student[4]}).item() == pytest.approx(farthest, abs=1e-6)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_normalized_looks_neither_at_scale_nor_at_offset(scale):
    loss = bound("normalized", student=SAME_WIDTH, teacher=SAME_WIDTH, layers="last")
    student, teacher = states(0, 4), states(1, 4)
    value = call(loss, {4: student[4] * scale - 2 * scale}, {4: teacher[4] * 0.5 * scale + scale}).item()
    assert value == pytest.approx(call(loss, student, teacher).item(), rel=1e-4)


@TOKEN_KINDS
def test_padded_tokens_count_nowhere(kind):
    loss = bound(kind)
    student, teacher = with_gradient(states(0, 4)), states(1, 6)
    value = call(loss, student, teacher)
    value.backward()
    for layer in (1, 2):
        assert not student[layer].grad[MASK == 0].any()
        assert student[layer].grad[MASK == 1].any(dim=-1).all()
    changed = {layer: tensor.detach().masked_fill(MASK[..., None] == 0, 1e3) for layer, tensor in student.items()}
    assert call(loss, changed, teacher).item() == pytest.approx(value.item(), rel=1e-6)


@pytest.mark.parametrize("mask", [MASK, LEFT_MASK, None], ids=["padding", "left padding", "no mask"])
def test_pkd_reads_the_first_real_token_alone(mask):
    loss = bound("pkd")
    student = with_gradient(states(0, 4))
    seen = []
    loss.projections[0].register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape))
    call(loss, student, states(1, 6), mask).backward()
    first = [0, 3, 1] if mask is LEFT_MASK else [0, 0, 0]
    for layer in (1, 2):
        read = student[layer].grad.any(dim=-1)
        assert read.sum() == 3
        assert read[range(3), first].all()
    # Projecting the tokens that nobody reads would cost S times as much.
    assert seen == [(3, 4)]


@KINDS
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_extra_padding_changes_nothing(kind, left):
    loss = bound(kind)
    student, teacher = with_gradient(states(0, 4)), states(1, 6)
    value = call(loss, student, teacher)
    value.backward()
    wide = with_gradient(padded_with_garbage(states(0, 4), 2, left=left))
    wide_value = call(loss, wide, padded_with_garbage(teacher, 3, left=left), padded_mask(MASK, left=left))
    wide_value.backward()
    assert wide_value.item() == pytest.approx(value.item(), rel=1e-6)
    for layer in (1, 2):
        real = wide[layer].grad[:, 4:] if left else wide[layer].grad[:, :5]
        torch.testing.assert_close(real, student[layer].grad)


@KINDS
def test_parts_of_a_batch_add_up_to_the_whole_in_any_order(kind):
    loss = bound(kind)
    student, teacher = states(0, 4), states(1, 6)

    def part(rows):
        return call(
            loss, {k: v[rows] for k, v in student.items()}, {k: v[rows] for k, v in teacher.items()}, MASK[rows]
        ).item()

    whole = call(loss, student, teacher).item()
    assert part([2, 0, 1]) == pytest.approx(whole, rel=1e-6)
    assert (part([1]) + 2 * part([2, 0])) / 3 == pytest.approx(whole, rel=1e-6)


@TOKEN_KINDS
def test_a_row_of_padding_only_is_zero_and_finite(kind):
    loss = bound(kind)
    student, teacher = with_gradient(states(0, 4)), states(1, 6)
    mask = torch.stack([MASK[0], torch.zeros(5, dtype=torch.long), MASK[2]])
    value = call(loss, student, teacher, mask)
    value.backward()
    others = call(loss, *({k: v[[0, 2]] for k, v in s.items()} for s in (student, teacher)), mask[[0, 2]])
    assert value.item() == pytest.approx(others.item() * 2 / 3, rel=1e-6)
    assert student[2].grad.isfinite().all()
    assert not student[2].grad[1].any()


def test_pkd_reads_the_first_token_of_a_row_of_padding_only():
    student, teacher = states(0, 4), states(1, 6)
    mask = torch.stack([MASK[0], torch.zeros(5, dtype=torch.long), MASK[2]])
    assert call(bound("pkd"), student, teacher, mask) == call(bound("pkd"), student, teacher, ONES)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_is_finite_and_float32_for_bfloat16_inputs(kind, scale, dtype):
    loss = bound(kind)
    student = {layer: (tensor * scale).to(dtype).requires_grad_() for layer, tensor in states(0, 4).items()}
    teacher = {layer: (tensor * scale).to(dtype) for layer, tensor in states(1, 6).items()}
    value = call(loss, student, teacher)
    value.backward()
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert all(student[layer].grad.isfinite().all() for layer in (1, 2))
    assert all(parameter.grad.isfinite().all() for parameter in loss.parameters())


@KINDS
def test_bfloat16_inputs_lose_nothing_on_the_way(kind):
    student, teacher = ({k: v.bfloat16() for k, v in states(seed, 4).items()} for seed in (0, 1))
    loss = bound(kind, student=SAME_WIDTH, teacher=SAME_WIDTH, layers="last")
    expected = reference(kind, student[4].float(), teacher[4].float())
    assert call(loss, student, teacher).item() == pytest.approx(expected, rel=1e-5)


@KINDS
def test_zero_vectors_have_a_finite_gradient(kind):
    loss = bound(kind, student=SAME_WIDTH, teacher=SAME_WIDTH, layers="last")
    student = {4: torch.zeros(3, 5, 4, requires_grad=True)}
    call(loss, student, states(1, 4)).backward()
    assert student[4].grad.isfinite().all()


@KINDS
@pytest.mark.parametrize("problem_type", ["multi_label_classification", "regression"])
def test_the_task_does_not_matter(kind, problem_type):
    shapes = [ModelShape(num_labels=1, num_layers=2, hidden_size=4, problem_type=problem_type) for _ in range(2)]
    value = call(bound(kind, *shapes), states(0, 4), states(1, 4))
    assert value.item() == pytest.approx(call(bound(kind, teacher=shapes[1]), states(0, 4), states(1, 4)).item())


def test_each_pair_has_a_projection_of_its_own_where_widths_differ():
    loss = bound()
    assert loss.hidden_state_pairs == [(1, 2), (2, 4)]
    assert [(p.in_features, p.out_features) for p in loss.projections] == [(4, 6), (4, 6)]
    assert not torch.equal(loss.projections[0].weight, loss.projections[1].weight)
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in loss.parameters())


@KINDS
def test_projection_setting(kind):
    assert len(bound(kind, teacher=SAME_WIDTH).projections) == 0
    assert len(bound(kind, teacher=SAME_WIDTH, projection="linear").projections) == 2
    assert len(bound(kind, teacher=SAME_WIDTH, projection="none").projections) == 0
    with pytest.raises(ValueError, match='needs equal widths; the student has 4, the teacher 6: use projection "auto"'):
        bound(kind, projection="none")


@KINDS
def test_one_student_layer_may_learn_from_two(kind):
    loss = bound(kind, layers=[[1, 2], [1, 4]])
    student, teacher = states(0, 4), states(1, 6)
    expected = 0.0
    for projection, layer in zip(loss.projections, (2, 4), strict=True):
        expected += reference(kind, student[1], teacher[layer], MASK, projection.weight, projection.bias)
    assert call(loss, student, teacher).item() == pytest.approx(expected / 2, rel=1e-5)


@KINDS
def test_least_squares_takes_the_real_tokens_and_lowers_the_loss(kind):
    """The teacher is an affine map of the student: the fit is exact, whatever the kind."""
    student = states(0, 4)
    weight, bias = torch.randn(6, 4, generator=torch.Generator().manual_seed(2)), torch.linspace(-1, 1, 6)
    teacher = {2: student[1] @ weight.T - bias, 4: student[2] @ weight.T + bias}
    loss = bound(kind, projection_init="least_squares")
    before = call(loss, student, teacher).item()
    fit = loss.least_squares()
    garbage = {layer: tensor.masked_fill(MASK[..., None] == 0, 100.0) for layer, tensor in teacher.items()}
    loss.fit(fit, features(hidden_states=student), features(hidden_states=garbage), MASK)
    fit.solve()
    assert before > 0.1
    assert call(loss, student, garbage).item() == pytest.approx(0, abs=1e-6)
    assert fit.squares[0, -1, -1] == MASK.sum()
    loss.fit(fit, features(hidden_states=student), features(hidden_states=teacher), None)
    assert fit.squares[0, -1, -1] == MASK.sum() + MASK.numel()


def test_least_squares_is_asked_for_by_name_and_needs_a_projection():
    assert bound().least_squares() is None
    assert bound(teacher=SAME_WIDTH, projection_init="least_squares").least_squares() is None
    loss = bound(projection_init="least_squares")
    assert loss.least_squares().projections is loss.projections


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "mae"}, "kind must be one of mse, cosine, normalized, got 'mae'"),
        (
            {"projection": "mlp"},
            "auto, none, linear, shared, low_rank, orthogonal, got 'mlp'",
        ),
        ({"projection_init": "zeros"}, "projection_init must be one of random, least_squares, got 'zeros'"),
        ({"rank": 0}, "rank must be a whole number > 0, got 0"),
        ({"rank": True}, "rank must be a whole number > 0, got True"),
        ({"rank": 2.5}, "rank must be a whole number > 0, got 2.5"),
        ({"layers": "middle"}, "layers must be one of"),
        ({"layers": [[3, 1]]}, "student layer 3 .* is not within 0..2"),
    ],
)
def test_refuses_unknown_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        bound(**settings)


@pytest.mark.parametrize(("kind", "name"), [("mse", "HiddenStateLoss"), ("pkd", "PKDLoss")])
def test_refuses_models_without_layers_or_width(kind, name):
    with pytest.raises(ValueError, match=f"{name} reads layers, but the teacher's config has no num_hidden"):
        bound(kind, teacher=ModelShape(num_labels=3))
    with pytest.raises(ValueError, match="the student's config has no num_hidden_layers"):
        bound(kind, student=ModelShape(num_labels=3))
    with pytest.raises(ValueError, match=f"{name} projects hidden states, but the student's config has no hidden_size"):
        bound(kind, student=ModelShape(num_labels=3, num_layers=2))


@KINDS
@pytest.mark.parametrize("shape", [(3, 1), (2, 5)])
def test_refuses_sequences_of_different_lengths(kind, shape):
    with pytest.raises(ValueError, match=rf"the student saw 3 x 5 tokens and the teacher {shape[0]} x {shape[1]}"):
        call(bound(kind), states(0, 4), states(1, 6, shape=shape))


def test_describes_its_kind_projection_and_layers():
    assert bound("cosine").describe() == "cosine, 1→2, 2→4"
    assert bound("mse", projection="shared").describe() == "mse, shared projection, 1→2, 2→4"
    assert bound("pkd").describe() == "1→2, 2→4"
    assert bound("pkd", teacher=SAME_WIDTH, layers="last").describe() == "2→4"
    assert bound("pkd", projection="orthogonal", layers="last").describe() == "orthogonal projection, 2→4"
