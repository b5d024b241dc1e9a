"""Losses of attention maps, against loops in float64."""

import numpy as np
import pytest
import torch
from helpers import attention_inputs, features, numeric_gradient, reference_attention

from distill_nlp.losses import AttentionLoss, ModelShape
from distill_nlp.losses.maps import log_attention_map

MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
KINDS = pytest.mark.parametrize("kind", ["kl", "mse"])
HEADS = pytest.mark.parametrize(("student_heads", "teacher_heads"), [(2, 2), (2, 3)], ids=["same heads", "other heads"])


def shape(heads, layers):
    return ModelShape(num_labels=3, num_layers=layers, hidden_size=12, num_attention_heads=heads)


def query_and_key(seed, heads, size, tokens=4, rows=2):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rows, heads, tokens, size, generator=generator) * 1.5 for _ in range(2))


def bound(student_heads=2, teacher_heads=2, **settings):
    loss = AttentionLoss(**({"layers": "last"} | settings))
    loss.bind(shape(student_heads, 2), shape(teacher_heads, 4))
    return loss


def boolean(mask):
    return None if mask is None else mask[:, None, None, :].bool().expand(-1, 1, mask.shape[1], -1)


def additive(mask):
    return (1.0 - mask[:, None, None, :].float()) * torch.finfo(torch.float32).min


def call(loss, student, teacher, mask=MASK, form=boolean):
    s = attention_inputs(*student, form(mask))
    t = attention_inputs(*teacher, form(mask))
    return loss(features(attentions={2: s}), features(attentions={4: t}), None, mask)


@KINDS
@HEADS
@pytest.mark.parametrize("form", [boolean, additive])
def test_equals_the_reference(kind, student_heads, teacher_heads, form):
    student, teacher = query_and_key(0, student_heads, 3), query_and_key(1, teacher_heads, 5)
    value = call(bound(student_heads, teacher_heads, kind=kind), student, teacher, form=form)
    assert value.item() == pytest.approx(reference_attention(student, teacher, MASK, kind), rel=1e-5)


@KINDS
@HEADS
def test_equals_the_reference_without_a_mask(kind, student_heads, teacher_heads):
    student, teacher = query_and_key(0, student_heads, 3), query_and_key(1, teacher_heads, 5)
    value = call(bound(student_heads, teacher_heads, kind=kind), student, teacher, None)
    assert value.item() == pytest.approx(reference_attention(student, teacher, torch.ones(2, 4), kind), rel=1e-5)


@KINDS
@HEADS
def test_gradients_equal_the_reference(kind, student_heads, teacher_heads):
    query, key = (tensor.requires_grad_() for tensor in query_and_key(0, student_heads, 3))
    teacher = query_and_key(1, teacher_heads, 5)
    call(bound(student_heads, teacher_heads, kind=kind), (query, key), teacher).backward()
    expected = numeric_gradient(lambda q: reference_attention((q, key), teacher, MASK, kind), query)
    np.testing.assert_allclose(query.grad.double().numpy(), expected, atol=1e-6)
    expected = numeric_gradient(lambda k: reference_attention((query, k), teacher, MASK, kind), key)
    np.testing.assert_allclose(key.grad.double().numpy(), expected, atol=1e-6)


@KINDS
@HEADS
def test_the_teacher_gets_no_gradient(kind, student_heads, teacher_heads):
    student = tuple(tensor.requires_grad_() for tensor in query_and_key(0, student_heads, 3))
    teacher = tuple(tensor.requires_grad_() for tensor in query_and_key(1, teacher_heads, 5))
    call(bound(student_heads, teacher_heads, kind=kind), student, teacher).backward()
    assert all(tensor.grad.any() for tensor in student)
    assert all(tensor.grad is None for tensor in teacher)


@KINDS
def test_is_zero_at_identity(kind):
    student = tuple(tensor.requires_grad_() for tensor in query_and_key(0, 2, 3))
    value = call(bound(kind=kind), student, tuple(tensor.detach().clone() for tensor in student))
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-7)
    assert all(tensor.grad.abs().max() < 1e-6 for tensor in student)


def test_kl_takes_the_teacher_as_the_truth():
    one, other = query_and_key(0, 2, 3), query_and_key(1, 2, 3)
    forth, back = call(bound(), one, other).item(), call(bound(), other, one).item()
    assert abs(forth - back) > 0.05
    assert forth == pytest.approx(reference_attention(one, other, MASK, "kl"), rel=1e-5)


@KINDS
@HEADS
def test_extra_padding_changes_nothing(kind, student_heads, teacher_heads):
    student, teacher = query_and_key(0, student_heads, 3), query_and_key(1, teacher_heads, 5)
    loss = bound(student_heads, teacher_heads, kind=kind)
    wide_mask = torch.cat([MASK, torch.zeros(2, 3, dtype=torch.long)], dim=1)

    def widened(tensors, seed):
        garbage = query_and_key(seed, tensors[0].shape[1], tensors[0].shape[3], tokens=3)
        return tuple(torch.cat([tensor, more * 20], dim=2) for tensor, more in zip(tensors, garbage, strict=True))

    value = call(loss, student, teacher).item()
    for form in (boolean, additive):
        wide = call(loss, widened(student, 2), widened(teacher, 3), wide_mask, form)
        assert wide.item() == pytest.approx(value, rel=1e-5)


@KINDS
def test_padded_tokens_get_no_gradient(kind):
    student = tuple(tensor.requires_grad_() for tensor in query_and_key(0, 2, 3))
    call(bound(kind=kind), student, query_and_key(1, 2, 5)).backward()
    for tensor in student:
        assert not tensor.grad[1, :, 2:].any()
        assert tensor.grad[1, :, :2].any()


@KINDS
def test_parts_of_a_batch_add_up_to_the_whole_in_any_order(kind):
    loss = bound(kind=kind)
    mask = torch.cat([MASK, MASK[1:]])
    student, teacher = query_and_key(0, 2, 3, rows=3), query_and_key(1, 2, 5, rows=3)

    def part(rows):
        return call(loss, [t[rows] for t in student], [t[rows] for t in teacher], mask[rows]).item()

    whole = part([0, 1, 2])
    assert part([2, 0, 1]) == pytest.approx(whole, rel=1e-6)
    assert (part([1]) + 2 * part([2, 0])) / 3 == pytest.approx(whole, rel=1e-6)


@KINDS
@HEADS
@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", [boolean, additive])
def test_is_finite_and_float32(kind, student_heads, teacher_heads, scale, dtype, form):
    """Also for scores of ±10⁴, where a softmax is exactly 0 and 1."""
    student = tuple((t * scale).to(dtype).requires_grad_() for t in query_and_key(0, student_heads, 3))
    teacher = tuple((t * scale).to(dtype) for t in query_and_key(1, teacher_heads, 5))
    value = call(bound(student_heads, teacher_heads, kind=kind), student, teacher, form=form)
    value.backward()
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert all(tensor.grad.isfinite().all() for tensor in student)


@KINDS
def test_models_may_mask_in_different_forms(kind):
    """One boolean, one additive in bfloat16, whose lowest number is another: a masked key must not count."""
    student, teacher = query_and_key(0, 2, 3), query_and_key(1, 2, 5)
    low = (1 - MASK[:, None, None, :]).bfloat16() * torch.finfo(torch.bfloat16).min
    value = bound(kind=kind)(
        features(attentions={2: attention_inputs(*student, boolean(MASK))}),
        features(attentions={4: attention_inputs(*teacher, low)}),
        None,
        MASK,
    )
    assert value.item() == pytest.approx(reference_attention(student, teacher, MASK, kind), rel=1e-5)


@KINDS
def test_a_row_of_padding_only_is_finite(kind):
    student = tuple(tensor.requires_grad_() for tensor in query_and_key(0, 2, 3))
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])
    value = call(bound(kind=kind), student, query_and_key(1, 2, 5), mask)
    value.backward()
    assert value.isfinite()
    assert all(tensor.grad.isfinite().all() and not tensor.grad[1].any() for tensor in student)


def test_the_map_is_the_softmax_of_scaled_scores_and_masked_keys_get_nothing():
    query, key = query_and_key(0, 2, 3)
    log_map = log_attention_map(attention_inputs(query, key, boolean(MASK), scaling=0.25))
    scores = np.array([[sum(q * k for q, k in zip(query[1, 0, 0], key[1, 0, j], strict=True)) for j in range(2)]])
    expected = np.exp(scores * 0.25) / np.exp(scores * 0.25).sum()
    np.testing.assert_allclose(log_map.exp()[1, 0, 0, :2].numpy(), expected[0], rtol=1e-5)
    assert not log_map.exp()[1, :, :, 2:].any()
    torch.testing.assert_close(log_map.exp().sum(dim=-1), torch.ones(2, 2, 4))


def test_the_mean_is_over_layer_pairs():
    pairs = [(1, 1), (2, 3)]
    student = {s: query_and_key(s, 2, 3) for s, _ in pairs}
    teacher = {t: query_and_key(10 + t, 2, 5) for _, t in pairs}
    value = bound(layers=[list(pair) for pair in pairs])(
        features(attentions={k: attention_inputs(*v, boolean(MASK)) for k, v in student.items()}),
        features(attentions={k: attention_inputs(*v, boolean(MASK)) for k, v in teacher.items()}),
        None,
        MASK,
    )
    expected = sum(reference_attention(student[s], teacher[t], MASK, "kl") for s, t in pairs) / 2
    assert value.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "cosine"}, "kind must be one of kl, mse, got 'cosine'"),
        ({"layers": "middle"}, "layers must be one of"),
        ({"layers": [[0, 0]]}, "student layer 0 .* is not within 1..2"),
    ],
)
def test_refuses_unknown_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        bound(**settings)


def test_refuses_models_without_layers_and_sequences_of_different_lengths():
    with pytest.raises(ValueError, match="AttentionLoss reads layers, but the teacher's config has no num_hidden"):
        AttentionLoss().bind(shape(2, 2), ModelShape(num_labels=3))
    with pytest.raises(ValueError, match="the student saw 2 x 4 tokens and the teacher 2 x 3"):
        bound()(
            features(attentions={2: attention_inputs(*query_and_key(0, 2, 3))}),
            features(attentions={4: attention_inputs(*query_and_key(0, 2, 3, tokens=3))}),
            None,
            None,
        )


def test_describes_its_layers_and_whether_heads_are_averaged():
    assert bound(layers="uniform").describe() == "kl, 1→2, 2→4"
    assert bound(2, 3, kind="mse").describe() == "mse, 2→4, mean of heads"
