"""Losses of attention maps, against loops in float64."""

import numpy as np
import pytest
import torch
from helpers import attention_inputs, features, numeric_gradient, reference_attention, reference_map
from references_attention import reference_attention_heads
from torch.utils._python_dispatch import TorchDispatchMode

from distill_nlp.losses import AttentionLoss, ModelShape, chunking
from distill_nlp.losses.maps import log_attention_map

MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
KINDS = pytest.mark.parametrize("kind", ["kl", "mse"])
HEADS = pytest.mark.parametrize(("student_heads", "teacher_heads"), [(2, 2), (2, 3)], ids=["same heads", "other heads"])


def shape(heads, layers):
    return ModelShape(num_labels=3, num_layers=layers, hidden_size=12, num_attention_heads=heads)


def query_and_key(seed, heads, size, tokens=4, rows=2):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rows, heads, tokens, size, generator=generator) * 1.5 for _ in range(2))


BY_HEADS = pytest.mark.parametrize(
    ("kind", "heads", "student_heads", "teacher_heads"),
    [
        ("kl", "each", 3, 3),
        ("kl", "mean", 3, 3),
        ("kl", "mean", 2, 3),
        ("mse", "each", 3, 3),
        ("mse", "mean", 3, 2),
        ("mse", "sum", 3, 3),
    ],
)


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


def saved_tensors(loss, student, teacher) -> int:
    count = 0

    def pack(tensor):
        nonlocal count
        count += 1
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call(loss, student, teacher)
    return count


@BY_HEADS
def test_no_graph_of_the_teacher_is_built(kind, heads, student_heads, teacher_heads):
    loss = bound(student_heads, teacher_heads, kind=kind, heads=heads)
    student = tuple(tensor.requires_grad_() for tensor in query_and_key(0, student_heads, 3))
    teacher = query_and_key(1, teacher_heads, 5)
    expected = saved_tensors(loss, student, teacher)
    assert saved_tensors(loss, student, tuple(tensor.requires_grad_() for tensor in teacher)) == expected > 0


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


@pytest.mark.parametrize("form", [boolean, additive])
def test_masked_keys_get_nothing_however_low_the_others_score(form):
    query, key = torch.full((1, 1, 4, 1), 100.0), torch.full((1, 1, 4, 1), -100.0)
    maps = log_attention_map(attention_inputs(query, key, form(MASK[1:]))).exp()
    torch.testing.assert_close(maps, torch.tensor([0.5, 0.5, 0.0, 0.0]).expand(1, 1, 4, 4))


@KINDS
def test_one_mask_may_serve_the_whole_batch(monkeypatch, kind):
    monkeypatch.setattr(chunking, "ELEMENTS_PER_CHUNK", 1)
    student, teacher = query_and_key(0, 2, 3), query_and_key(1, 2, 5)
    causal = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()

    def value(mask):
        sides = (features(attentions={n: attention_inputs(*pair, mask)}) for n, pair in ((2, student), (4, teacher)))
        return bound(kind=kind)(*sides, None, None).item()

    assert value(causal) == pytest.approx(value(causal.expand(2, -1, -1, -1)), rel=1e-6)


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


@BY_HEADS
@pytest.mark.parametrize("rows_per_chunk", [1, 2, 3])
def test_every_way_to_take_the_heads_equals_the_reference_in_chunks(
    monkeypatch, kind, heads, student_heads, teacher_heads, rows_per_chunk
):
    monkeypatch.setattr(chunking, "ELEMENTS_PER_CHUNK", rows_per_chunk * max(student_heads, teacher_heads) * 4**2)
    mask = torch.cat([MASK, torch.tensor([[0, 1, 1, 1]])])
    student = tuple(t.double().requires_grad_() for t in query_and_key(0, student_heads, 3, rows=3))
    teacher = tuple(t.double() for t in query_and_key(1, teacher_heads, 5, rows=3))
    value = call(bound(student_heads, teacher_heads, kind=kind, heads=heads), student, teacher, mask)
    value.backward()
    assert value.dtype == torch.float64
    expected = reference_attention_heads(student, teacher, mask, kind, heads)
    assert value.item() == pytest.approx(expected, rel=1e-9)
    for i, tensor in enumerate(student):

        def changed(array, i=i):
            pair = [array if i == j else other for j, other in enumerate(student)]
            return reference_attention_heads(pair, teacher, mask, kind, heads)

        np.testing.assert_allclose(tensor.grad.numpy(), numeric_gradient(changed, tensor), rtol=1e-6, atol=1e-9)


@BY_HEADS
@pytest.mark.parametrize("form", [boolean, additive])
def test_gradients_pass_gradcheck(kind, heads, student_heads, teacher_heads, form):
    student = tuple(t.double().requires_grad_() for t in query_and_key(0, student_heads, 3))
    teacher = tuple(t.double() for t in query_and_key(1, teacher_heads, 5))
    loss = bound(student_heads, teacher_heads, kind=kind, heads=heads)
    assert torch.autograd.gradcheck(lambda *pair: call(loss, pair, teacher, form=form), student)


def with_bias(seed, heads, size, tokens=4, rows=3):
    """Queries, keys and a bias of the scores that is the same for all rows, `(A, S, S)`."""
    generator = torch.Generator().manual_seed(seed + 100)
    query, key = (tensor.double() for tensor in query_and_key(seed, heads, size, tokens, rows))
    return query, key, torch.randn(heads, tokens, tokens, generator=generator, dtype=torch.float64) * 2


def biased(query, key, bias, mask=None):
    inputs = attention_inputs(query, key, mask)
    inputs.bias = bias
    return inputs


BIASED_MASK = torch.cat([MASK, torch.tensor([[0, 1, 1, 1]])])


def call_with_bias(loss, student, teacher, form=boolean, mask=BIASED_MASK):
    s, t = (biased(query, key, bias, form(mask)) for query, key, bias in (student, teacher))
    return loss(features(attentions={2: s}), features(attentions={4: t}), None, mask)


@BY_HEADS
@pytest.mark.parametrize("rows_per_chunk", [1, 2, 3])
@pytest.mark.parametrize("form", [boolean, additive])
def test_a_bias_of_the_scores_is_part_of_both_maps_and_learns(
    monkeypatch, kind, heads, student_heads, teacher_heads, rows_per_chunk, form
):
    monkeypatch.setattr(chunking, "ELEMENTS_PER_CHUNK", rows_per_chunk * max(student_heads, teacher_heads) * 4**2)
    student = tuple(tensor.requires_grad_() for tensor in with_bias(0, student_heads, 3))
    teacher = tuple(tensor.requires_grad_() for tensor in with_bias(1, teacher_heads, 5))
    loss = bound(student_heads, teacher_heads, kind=kind, heads=heads)
    value = call_with_bias(loss, (*student[:2], student[2][None]), (*teacher[:2], teacher[2][None]), form)
    value.backward()
    expected = reference_attention_heads(student, teacher, BIASED_MASK, kind, heads)
    assert value.item() == pytest.approx(expected, rel=1e-9)
    without = reference_attention_heads(student[:2], teacher[:2], BIASED_MASK, kind, heads)
    assert abs(without - expected) > 0.02 * expected
    numeric = numeric_gradient(
        lambda bias: reference_attention_heads((*student[:2], bias), teacher, BIASED_MASK, kind, heads), student[2]
    )
    np.testing.assert_allclose(student[2].grad.numpy(), numeric, rtol=1e-6, atol=1e-9)
    assert all(tensor.grad.any() for tensor in student)
    assert all(tensor.grad is None for tensor in teacher)


@BY_HEADS
@pytest.mark.parametrize("rows_per_chunk", [1, 2])
def test_a_bias_may_differ_from_row_to_row(monkeypatch, kind, heads, student_heads, teacher_heads, rows_per_chunk):
    monkeypatch.setattr(chunking, "ELEMENTS_PER_CHUNK", rows_per_chunk * max(student_heads, teacher_heads) * 4**2)
    factors = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64).view(3, 1, 1, 1)
    student, teacher = (
        (query, key, bias * factors)
        for query, key, bias in (with_bias(0, student_heads, 3), with_bias(1, teacher_heads, 5))
    )
    loss = bound(student_heads, teacher_heads, kind=kind, heads=heads)
    expected = 0.0
    for row in range(3):
        one, other = ((q[row : row + 1], k[row : row + 1], bias[row]) for q, k, bias in (student, teacher))
        expected += reference_attention_heads(one, other, BIASED_MASK[row : row + 1], kind, heads) / 3
    assert call_with_bias(loss, student, teacher).item() == pytest.approx(expected, rel=1e-9)


@BY_HEADS
@pytest.mark.parametrize("rows", [1, 3])
def test_gradients_of_a_bias_pass_gradcheck(kind, heads, student_heads, teacher_heads, rows):
    """Shared by the rows, or one for each."""
    student, teacher = with_bias(0, student_heads, 3), with_bias(1, teacher_heads, 5)
    loss = bound(student_heads, teacher_heads, kind=kind, heads=heads)
    inputs = (*student[:2], student[2].repeat(rows, 1, 1, 1))
    inputs = tuple(tensor.requires_grad_() for tensor in inputs)
    target = (*teacher[:2], teacher[2][None])
    assert torch.autograd.gradcheck(lambda *tensors: call_with_bias(loss, tensors, target), inputs)


@KINDS
def test_a_bias_in_float32_stays_so_beside_queries_and_keys_of_autocast(kind):
    student, teacher = (
        (query.bfloat16(), key.bfloat16(), bias.float())
        for query, key, bias in (with_bias(0, 2, 3), with_bias(1, 2, 5))
    )
    value = call_with_bias(bound(kind=kind), *((query, key, bias[None]) for query, key, bias in (student, teacher)))
    expected = reference_attention_heads(student, teacher, BIASED_MASK, kind, "each")
    assert value.item() == pytest.approx(expected, rel=1e-5)


@KINDS
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_a_bias_in_bfloat16_is_finite_and_added_in_float32(kind, scale):
    student = [(tensor * scale).bfloat16() for tensor in with_bias(0, 2, 3)]
    teacher = [(tensor * scale).bfloat16() for tensor in with_bias(1, 2, 5)]
    sides = [(query, key, bias[None].requires_grad_()) for query, key, bias in (student, teacher)]
    value = call_with_bias(bound(kind=kind), *sides)
    value.backward()
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert sides[0][2].grad.isfinite().all()
    assert sides[0][2].grad.dtype == torch.bfloat16
    if scale == 1:
        expected = reference_attention_heads(student, teacher, BIASED_MASK, kind, "each")
        assert value.item() == pytest.approx(expected, rel=1e-5)


def test_one_model_may_have_a_bias_and_the_other_none():
    student, teacher = with_bias(0, 2, 3), with_bias(1, 2, 5)
    nothing = torch.zeros(2, 4, 4)
    for one, other in (((*student[:2], None), teacher), (student, (*teacher[:2], None))):
        sides = [(q, k, None if bias is None else bias[None]) for q, k, bias in (one, other)]
        expected = reference_attention_heads(
            *((q, k, nothing if bias is None else bias) for q, k, bias in (one, other)), BIASED_MASK, "kl", "each"
        )
        assert call_with_bias(bound(), *sides).item() == pytest.approx(expected, rel=1e-9)


def test_one_chunk_is_the_size_of_the_larger_of_the_two_models_maps(monkeypatch):
    largest = largest_tensor(monkeypatch, rows=4, student_heads=1, teacher_heads=6, tokens=32, elements=6 * 32**2)
    assert largest == 6 * 32**2


class LargestTensor(TorchDispatchMode):
    """Notes the most numbers that one operation gives."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return output


def largest_tensor(monkeypatch, rows, student_heads, teacher_heads, tokens, elements):
    monkeypatch.setattr(chunking, "ELEMENTS_PER_CHUNK", elements)
    student = tuple(t.requires_grad_() for t in query_and_key(0, student_heads, 8, tokens, rows))
    teacher = query_and_key(1, teacher_heads, 8, tokens, rows)
    mask = torch.ones(rows, tokens, dtype=torch.long)
    loss = bound(student_heads, teacher_heads)
    with LargestTensor() as seen:
        call(loss, student, teacher, mask).backward()
    return seen.elements


def test_no_map_of_the_whole_batch_ever_exists(monkeypatch):
    rows, heads, tokens = 8, 12, 128
    whole = rows * heads * tokens**2
    per_chunk = 2 * heads * tokens**2
    default = chunking.ELEMENTS_PER_CHUNK
    assert largest_tensor(monkeypatch, rows, heads, heads, tokens, default) <= per_chunk < whole
    assert largest_tensor(monkeypatch, rows, heads, heads, tokens, whole) == whole


@BY_HEADS
def test_one_row_alone_and_the_labels_which_it_does_not_read(kind, heads, student_heads, teacher_heads):
    student, teacher = query_and_key(0, student_heads, 3, rows=1), query_and_key(1, teacher_heads, 5, rows=1)
    mask = torch.tensor([[0, 1, 1, 1]])
    loss = AttentionLoss(layers="last", kind=kind, heads=heads)
    for task, labels in (("regression", torch.tensor([0.5])), ("multi_label_classification", torch.full((1, 3), -100))):
        shapes = (ModelShape(3, task, 2, 12, student_heads), ModelShape(3, task, 4, 12, teacher_heads))
        loss.bind(*shapes)
        value = loss(
            features(attentions={2: attention_inputs(*student, boolean(mask))}),
            features(attentions={4: attention_inputs(*teacher, boolean(mask))}),
            labels,
            mask,
        )
        expected = reference_attention_heads(student, teacher, mask, kind, heads)
        assert value.item() == pytest.approx(expected, rel=1e-5)
    assert loss.unit == "rows"


def window(mask, width):
    positions = torch.arange(mask.shape[1])
    return boolean(mask) & ((positions[:, None] - positions).abs() <= width)


def reference_window(student, teacher, mask, width) -> float:
    """KL of the maps over the real tokens at most `width` away: the teacher's is cut and scaled to a sum of 1."""
    total = 0.0
    student, teacher = reference_map(*student, mask), reference_map(*teacher, mask)
    for b, real_row in enumerate(mask.tolist()):
        real = [i for i, seen in enumerate(real_row) if seen]
        values = []
        for p, q in zip(student[b], teacher[b], strict=True):
            for i in real:
                near = [j for j in real if abs(i - j) <= width]
                p_sum, q_sum = sum(p[i][j] for j in near), sum(q[i][j] for j in near)
                values.append(sum(q[i][j] / q_sum * np.log(q[i][j] / q_sum / (p[i][j] / p_sum)) for j in near))
        total += sum(values) / len(values)
    return total / len(mask)


@pytest.mark.parametrize("form", [boolean, additive, lambda mask: None])
def test_where_the_student_sees_a_window_only_the_teacher_is_cut_to_it(form):
    student, teacher = query_and_key(0, 2, 3), query_and_key(1, 2, 5)
    student = tuple(tensor.requires_grad_() for tensor in student)
    value = bound()(
        features(attentions={2: attention_inputs(*student, window(MASK, 1))}),
        features(attentions={4: attention_inputs(*teacher, form(MASK))}),
        None,
        MASK,
    )
    value.backward()
    assert value.item() == pytest.approx(reference_window(student, teacher, MASK, 1), rel=1e-5)
    assert all(tensor.grad.isfinite().all() for tensor in student)
    whole = reference_attention(student, teacher, MASK, "kl")
    assert abs(value.item() - whole) > 0.05


def test_where_the_teacher_sees_a_window_only_the_student_learns_it():
    student, teacher = query_and_key(0, 2, 3), query_and_key(1, 2, 5)
    with_window = attention_inputs(*teacher, window(MASK, 1))
    maps = log_attention_map(with_window).exp()
    value = bound()(
        features(attentions={2: attention_inputs(*student)}), features(attentions={4: with_window}), None, MASK
    )
    p = log_attention_map(attention_inputs(*student)).exp()
    terms = torch.where(maps > 0, maps * (maps / p).log(), torch.zeros(())).sum(dim=-1).mean(dim=1)
    expected = ((terms * MASK).sum(dim=1) / MASK.sum(dim=1)).mean()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)


@KINDS
def test_padding_on_the_left_of_a_causal_teacher_does_not_poison_the_row(kind):
    """Its padded queries see nothing at all, while those of the student see the real tokens."""
    mask = torch.tensor([[0, 0, 1, 1]]).expand(2, -1)
    causal = boolean(mask) & torch.ones(4, 4, dtype=torch.bool).tril()
    student = tuple(tensor.requires_grad_() for tensor in query_and_key(0, 12, 3))
    for one, other in ((boolean(mask), causal), (causal, boolean(mask)), (None, causal)):
        value = bound(12, 12, kind=kind)(
            features(attentions={2: attention_inputs(*student, one)}),
            features(attentions={4: attention_inputs(*query_and_key(1, 12, 5), other)}),
            None,
            mask,
        )
        gradients = torch.autograd.grad(value, student)
        assert value.item() < 100
        assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize(
    ("settings", "heads", "message"),
    [
        ({"heads": "max"}, (2, 2), "heads must be one of auto, each, mean, sum, got 'max'"),
        ({"heads": "sum"}, (2, 2), 'heads "sum" is for kind "mse".* use "mean"'),
        (
            {"heads": "each"},
            (2, 3),
            'heads "each" needs equal head counts; the student has 2, the teacher 3: use',
        ),
        ({"heads": "sum", "kind": "mse"}, (3, 2), 'heads "sum" needs equal .* has 3, the teacher 2: use heads "mean"'),
    ],
)
def test_refuses_heads_that_cannot_be_compared(settings, heads, message):
    with pytest.raises(ValueError, match=message):
        bound(*heads, **settings)


def test_a_loss_bound_again_to_another_pair_starts_from_what_the_user_gave():
    loss = bound(2, 2)
    loss.bind(shape(2, 2), shape(3, 4))
    assert loss.heads == "auto"
    assert loss.describe() == "kl, 2→4, mean of heads"
    loss.bind(shape(3, 2), shape(3, 4))
    assert loss.describe() == "kl, 2→4"
    student, teacher = query_and_key(0, 3, 3), query_and_key(1, 3, 5)
    expected = reference_attention_heads(student, teacher, MASK, "kl", "each")
    assert call(loss, student, teacher).item() == pytest.approx(expected, rel=1e-5)


def test_describes_its_layers_and_whether_heads_are_averaged():
    assert bound(kind="mse", heads="sum").describe() == "mse, 2→4, sum of heads"
    assert bound(heads="mean").describe() == "kl, 2→4, mean of heads"
    assert bound(layers="uniform").describe() == "kl, 1→2, 2→4"
    assert bound(2, 3, kind="mse").describe() == "mse, 2→4, mean of heads"
