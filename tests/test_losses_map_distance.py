"""Distances of maps with gradients of our own: the values of loops, the gradients of autograd, and no (S, S) tensor."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from helpers import softmax_row
from torch.utils._python_dispatch import TorchDispatchMode

from distill_nlp.losses import chunking, map_distance
from distill_nlp.losses.map_distance import Scores
from distill_nlp.losses.map_distance import map_distance as distance

BATCH, HEADS, TOKENS = 3, 4, 5
TOKENS_OF_ROWS = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
KINDS = pytest.mark.parametrize("kind", ["kl", "mse"])
SIZES = pytest.mark.parametrize(
    "elements",
    [1, TOKENS, 2 * TOKENS, TOKENS**2, 3 * TOKENS**2, HEADS * TOKENS**2, 2 * HEADS * TOKENS**2, 10**6],
    ids=["less than a query", "a query", "two queries", "a map", "two maps", "a row", "two rows", "all"],
)


@pytest.fixture
def chunks_of(monkeypatch):
    return lambda elements: monkeypatch.setattr(chunking, "ELEMENTS_PER_CHUNK", elements)


def side(seed, size, mask=None, bias=None, dtype=torch.float64):
    """Heads are a transposed view, as models have them."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(BATCH, TOKENS, HEADS, size, generator=generator, dtype=dtype) for _ in range(2))
    return Scores(left.transpose(1, 2), right.transpose(1, 2), 0.7, mask, bias)


def keys_only(tokens):
    return tokens[:, None, None, :].bool()


def window(width):
    positions = torch.arange(TOKENS)
    return ((positions[:, None] - positions).abs() < width)[None, None]


def additive(mask):
    return torch.where(mask, 0.0, torch.finfo(torch.float32).min)


def bias_of(rows, heads=HEADS):
    return torch.randn(rows, heads, TOKENS, TOKENS, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def reference(kind, student, teacher, tokens):
    """Loops over numbers; a mask is what may be seen, (B or 1, A or 1, S or 1, S), boolean."""
    seen = np.ones((BATCH, HEADS, TOKENS, TOKENS), bool)
    seen_by_teacher = seen.copy()
    if student.mask is not None:
        seen = seen & student.mask.numpy()
    if teacher.mask is not None:
        seen_by_teacher = seen_by_teacher & teacher.mask.numpy()
    seen_by_teacher &= seen
    rows = []
    for b in range(BATCH):
        real = [i for i in range(TOKENS) if tokens is None or tokens[b, i]]
        values = []
        for a, i in product(range(HEADS), real):
            p, q = (
                one_row(scores, seen_by[b, a, i], b, a, i)
                for scores, seen_by in ((student, seen), (teacher, seen_by_teacher))
            )
            if kind == "kl":
                values.append(sum(q[k] * math.log(q[k] / p[k]) for k in range(TOKENS) if q[k] > 0))
            else:
                values.append(sum((p[k] - q[k]) ** 2 for k in range(TOKENS)) / len(real))
        rows.append(sum(values) / len(values))
    return sum(rows) / len(rows)


def one_row(scores, seen, b, a, i):
    keys = [k for k in range(TOKENS) if seen[k]]
    found = []
    for k in keys:
        value = scores.scaling * float(np.dot(scores.left[b, a, i].detach(), scores.right[b, a, k].detach()))
        if scores.bias is not None:
            value += float(scores.bias.expand(BATCH, HEADS, TOKENS, TOKENS)[b, a, i, k])
        found.append(value)
    by_key = dict(zip(keys, softmax_row(found), strict=True))
    return [by_key.get(k, 0.0) for k in range(TOKENS)]


# Each query of each head sees at least itself.
SEEN_BY_HEADS = (bias_of(BATCH) > 0) | torch.eye(TOKENS, dtype=torch.bool)
CASES = {
    "all seen": (None, None, None, None, None),
    "padding": (TOKENS_OF_ROWS, keys_only(TOKENS_OF_ROWS), keys_only(TOKENS_OF_ROWS), None, None),
    "padding, one mask for each query": (
        TOKENS_OF_ROWS,
        keys_only(TOKENS_OF_ROWS).expand(-1, 1, TOKENS, -1),
        keys_only(TOKENS_OF_ROWS).expand(-1, 1, TOKENS, -1),
        None,
        None,
    ),
    "the student has a window": (TOKENS_OF_ROWS, keys_only(TOKENS_OF_ROWS) & window(2), None, None, None),
    "the teacher has a window": (None, None, window(2), None, None),
    "a bias": (TOKENS_OF_ROWS, keys_only(TOKENS_OF_ROWS), keys_only(TOKENS_OF_ROWS), bias_of(1), bias_of(1, heads=1)),
    "a bias of each row": (None, None, None, bias_of(BATCH, heads=1), None),
    "a bias of each key": (None, None, None, bias_of(1)[:, :, :1], bias_of(BATCH)[:, :, :1]),
    "heads have masks of their own": (None, SEEN_BY_HEADS, SEEN_BY_HEADS.flip(1), None, None),
}
WHAT_IS_SEEN = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def both_sides(case, in_form=lambda mask: mask):
    tokens, mask, teacher_mask, bias, teacher_bias = case
    student, teacher = (
        side(seed, size, None if m is None else in_form(m), b)
        for seed, size, m, b in ((0, 3, mask, bias), (1, 6, teacher_mask, teacher_bias))
    )
    return tokens, student, teacher


@KINDS
@SIZES
@WHAT_IS_SEEN
def test_equals_loops_whatever_goes_together(chunks_of, kind, elements, case):
    chunks_of(elements)
    tokens, student, teacher = both_sides(case)
    expected = reference(kind, student, teacher, tokens)
    assert distance(kind, student, teacher, tokens).item() == pytest.approx(expected, rel=1e-10)


@KINDS
@SIZES
@WHAT_IS_SEEN
def test_gradients_equal_numeric_ones_whatever_goes_together(chunks_of, kind, elements, case):
    chunks_of(elements)
    tokens, student, teacher = both_sides(case)
    inputs = [student.left, student.right, *(() if student.bias is None else (student.bias,))]

    def value(left, right, bias=None):
        return -3 * distance(kind, Scores(left, right, student.scaling, student.mask, bias), teacher, tokens)

    # In a few random directions: all numbers one by one would take minutes where chunks are small.
    assert torch.autograd.gradcheck(value, [tensor.clone().requires_grad_() for tensor in inputs], fast_mode=True)


@KINDS
@WHAT_IS_SEEN
def test_masks_that_are_added_hide_the_same(kind, case):
    def value_and_gradients(in_form):
        tokens, student, teacher = both_sides(case, in_form)
        left, right = (tensor.requires_grad_() for tensor in (student.left, student.right))
        value = distance(kind, student, teacher, tokens)
        return value, *torch.autograd.grad(value, (left, right))

    torch.testing.assert_close(
        value_and_gradients(additive), value_and_gradients(lambda mask: mask), rtol=1e-12, atol=1e-14
    )


@SIZES
def test_each_number_of_the_maps_is_in_one_chunk(elements):
    seen = torch.zeros(BATCH, HEADS, TOKENS, TOKENS)
    for chunk in map_distance._chunks(BATCH, HEADS, TOKENS, elements):
        part = chunk.of(seen)
        assert part.shape == (*chunk.grid, chunk.height, TOKENS)
        assert part.numel() <= max(elements, TOKENS)
        part += 1
    assert (seen == 1).all()


class _Largest(TorchDispatchMode):
    """Notes the most numbers that one operation gives, other than a view of what there was."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        given = {tensor.untyped_storage().data_ptr() for tensor in args if isinstance(tensor, torch.Tensor)}
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.elements = max(self.elements, tensor.numel())
        return output


@KINDS
@pytest.mark.parametrize("queries", [1, 256], ids=["a mask of keys", "a mask for each query"])
def test_where_one_map_is_larger_than_a_chunk_no_map_ever_exists(chunks_of, kind, queries):
    tokens, chunk = 256, 1 << 13
    chunks_of(chunk)
    x, y = (torch.randn(2, 2, tokens, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(2))
    student, teacher = (Scores(z, z, 0.5, torch.ones(2, 1, queries, tokens, dtype=torch.bool)) for z in (x, y))
    x.requires_grad_()
    with _Largest() as seen:
        distance(kind, student, teacher, torch.ones(2, tokens)).backward()
    # The masks, too, are made numbers a few queries at a time.
    assert x.numel() < chunk == seen.elements < tokens**2


@KINDS
def test_one_tensor_on_both_sides_gets_both_gradients_in_one(kind):
    x, y = (side(seed, 3).left for seed in range(2))
    x.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        distance(kind, Scores(x, x, 0.5), Scores(y, y, 0.5), None)
    assert [tensor.shape for tensor in kept] == [x.shape]
    assert torch.autograd.gradcheck(lambda x: distance(kind, Scores(x, x, 0.5), Scores(y, y, 0.5), None), x)


@pytest.mark.parametrize(
    "cut", [(slice(2), slice(None)), (slice(None), slice(2)), (slice(None), slice(None), slice(2))]
)
@pytest.mark.parametrize("teacher_is_larger", [False, True])
def test_refuses_maps_of_different_sizes(cut, teacher_is_larger):
    larger, smaller = side(0, 3), side(1, 3)
    smaller = Scores(smaller.left[cut], smaller.right[cut], 0.7)
    sides = (smaller, larger) if teacher_is_larger else (larger, smaller)
    sizes = [str(tuple(one.left.shape[:3])) for one in sides]
    with pytest.raises(ValueError, match="cannot be compared head by head") as error:
        distance("kl", *sides, None)
    assert all(size in str(error.value) for size in sizes)


@KINDS
@pytest.mark.parametrize("wanted", ["left", "right", "bias"])
def test_only_what_needs_a_gradient_gets_one(kind, wanted):
    student, teacher = side(0, 3, bias=bias_of(1)), side(1, 6)
    getattr(student, wanted).requires_grad_()
    teacher.left.requires_grad_()
    distance(kind, student, teacher, None).backward()
    for name in ("left", "right", "bias"):
        gradient = getattr(student, name).grad
        assert gradient.any() if name == wanted else gradient is None
    assert teacher.left.grad is None


@KINDS
@pytest.mark.parametrize("how", ["no tensor needs it", "no_grad"])
def test_without_gradient_the_value_is_the_same_and_has_no_graph(kind, how):
    student, teacher = side(0, 3), side(1, 6)
    expected = reference(kind, student, teacher, None)
    if how == "no_grad":
        student.left.requires_grad_()
    with torch.set_grad_enabled(how != "no_grad"):
        value = distance(kind, student, teacher, None)
    assert not value.requires_grad
    assert value.item() == pytest.approx(expected, rel=1e-10)


@KINDS
@pytest.mark.parametrize("elements", [TOKENS, 10**6])
def test_what_it_is_given_stays_as_it_was(chunks_of, kind, elements):
    chunks_of(elements)
    mask = additive(window(2)).double()
    sides = [side(seed, 3, mask, bias_of(1)) for seed in range(2)]
    # Where scaling changes nothing, and is not of a tensor of its own.
    student, teacher = (Scores(one.left, one.right, 1.0, one.mask, one.bias) for one in sides)
    given = [getattr(one, name) for one in (student, teacher) for name in ("left", "right", "mask", "bias")]
    before = [tensor.clone() for tensor in given]
    for tensor in (student.left, student.right, student.bias):
        tensor.requires_grad_()
    distance(kind, student, teacher, TOKENS_OF_ROWS).backward()
    for tensor, kept in zip(given, before, strict=True):
        assert torch.equal(tensor.detach(), kept)


def test_backward_twice_on_a_retained_graph_adds_the_same_gradient():
    student, teacher = side(0, 3), side(1, 6)
    student.left.requires_grad_()
    value = -3 * distance("kl", student, teacher, None)
    value.backward(retain_graph=True)
    once = student.left.grad.clone()
    value.backward()
    torch.testing.assert_close(student.left.grad, 2 * once, rtol=0, atol=0)


def test_a_second_derivative_is_refused():
    student, teacher = side(0, 3), side(1, 6)
    student.left.requires_grad_()
    value = distance("kl", student, teacher, None).square()
    (gradient,) = torch.autograd.grad(value, student.left, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@KINDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_and_its_gradients_are_of_its_own(kind, dtype):
    student, teacher = side(0, 3, dtype=dtype), side(1, 6, dtype=dtype)
    exact, goal = (Scores(one.left.float(), one.right.float(), one.scaling) for one in (student, teacher))
    for one in (student, exact):
        one.left.requires_grad_()
        one.right.requires_grad_()
    value = distance(kind, student, teacher, None)
    expected = distance(kind, exact, goal, None)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=0, atol=0)
    for scaled in (value, expected):
        (1024 * scaled).backward()
    for name in ("left", "right"):
        gradient = getattr(student, name).grad
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient, getattr(exact, name).grad.to(dtype), rtol=0, atol=0)


def test_gradients_too_small_for_float16_survive_until_the_loss_scale_comes():
    """A GradScaler multiplies the loss, so that its factor comes with backward only."""
    scale = 2.0**24

    def gradient(dtype):
        student, teacher = side(0, 3, dtype=torch.float16), side(1, 6, dtype=torch.float16)
        left = student.left.to(dtype).requires_grad_()
        value = distance("kl", Scores(left, student.right.to(dtype), 1 / scale), teacher, None)
        (scale * value).backward()
        return left.grad

    expected = gradient(torch.float32)
    assert expected.abs().max() < 1
    torch.testing.assert_close(gradient(torch.float16).float(), expected, rtol=1e-3, atol=1e-6)


@KINDS
@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_very_sure_maps_are_finite(kind, scale):
    student, teacher = side(0, 3, keys_only(TOKENS_OF_ROWS), dtype=torch.float32), side(1, 6, dtype=torch.float32)
    student = Scores(student.left.mul(scale).requires_grad_(), student.right, 1.0, student.mask)
    value = distance(kind, student, Scores(-teacher.left * scale, teacher.right, 1.0), TOKENS_OF_ROWS)
    value.backward()
    assert value.isfinite()
    assert student.left.grad.isfinite().all()


@KINDS
def test_a_row_of_padding_only_counts_as_zero_and_gets_no_gradient(kind):
    """By what the tokens say: without masks the maps of that row differ."""
    nothing = torch.ones_like(TOKENS_OF_ROWS)
    nothing[1] = 0
    student, teacher = side(0, 3), side(1, 6)
    student.left.requires_grad_()
    value = distance(kind, student, teacher, nothing)
    value.backward()
    others = [Scores(one.left[::2].detach(), one.right[::2], one.scaling) for one in (student, teacher)]
    assert value.item() == pytest.approx(2 / 3 * distance(kind, *others, None).item(), rel=1e-12)
    assert not student.left.grad[1].any()
    assert student.left.grad[0].any()


@KINDS
def test_a_row_in_which_nothing_is_seen_is_finite(kind):
    hidden = TOKENS_OF_ROWS.clone()
    hidden[1] = 0
    student, teacher = (side(seed, 3, keys_only(hidden)) for seed in range(2))
    student.left.requires_grad_()
    value = distance(kind, student, teacher, None)
    value.backward()
    assert value.isfinite()
    assert student.left.grad.isfinite().all()
