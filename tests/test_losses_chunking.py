"""Losses of a few rows at a time: the same values and gradients as all at once, and nothing more."""

import pytest
import torch

from distill_nlp.losses import chunking
from distill_nlp.losses.chunking import rowwise

ROWS = 7
SIZE = 12


def inputs(dtype=torch.float64, rows=ROWS):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 3, 4, generator=generator).to(dtype).requires_grad_()
    y = torch.randn(rows, 4, generator=generator).to(dtype).requires_grad_()
    return x, y


def loss(rows, x, y):
    return (torch.einsum("bij,bj->bi", x, y).tanh() * torch.arange(1, 4)).sum(dim=1)


def chunks_of(monkeypatch, rows):
    monkeypatch.setattr(chunking, "ELEMENTS_PER_CHUNK", rows * SIZE)


def tanh_of_bias(rows, x, y, bias):
    """`bias` is `(1, 3, 4)` for all rows, or as large as `x`."""
    return loss(rows, (x + bias).tanh(), y)


@pytest.mark.parametrize("rows", [1, 2, 3, ROWS, 100])
def test_values_and_gradients_are_those_of_all_rows_at_once(monkeypatch, rows):
    chunks_of(monkeypatch, rows)
    x, y = inputs()
    expected = loss(slice(None), x, y).mean()
    expected_gradients = torch.autograd.grad(-3 * expected, (x, y))
    value = rowwise(loss, SIZE, x, y)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(-3 * value, (x, y))
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 2, ROWS])
@pytest.mark.parametrize("batch", [1, ROWS])
def test_a_tensor_shared_by_the_rows_gets_the_sum_of_their_gradients(monkeypatch, rows, batch):
    chunks_of(monkeypatch, rows)
    x, y = inputs(rows=batch)
    bias = torch.linspace(-1, 1, SIZE, dtype=torch.float64).view(1, 3, 4).requires_grad_()
    shapes = []

    def watched(part, x, y, bias):
        shapes.append(bias.shape)
        return tanh_of_bias(part, x, y, bias)

    value = rowwise(watched, SIZE, x, y, bias)
    assert set(shapes) == {(1, 3, 4)}
    found = torch.autograd.grad(-3 * value, (x, y, bias))
    # As large as the batch, it is cut into rows as the others are.
    repeated = rowwise(tanh_of_bias, SIZE, x, y, bias.expand(batch, -1, -1))
    for other in (tanh_of_bias(slice(None), x, y, bias).mean(), repeated):
        torch.testing.assert_close(value, other, rtol=1e-12, atol=1e-12)
        expected = torch.autograd.grad(-3 * other, (x, y, bias))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda *tensors: rowwise(tanh_of_bias, SIZE, *tensors), (x, y, bias))


@pytest.mark.parametrize("rows", [1, 2, ROWS])
def test_gradients_equal_numeric_ones(monkeypatch, rows):
    chunks_of(monkeypatch, rows)
    assert torch.autograd.gradcheck(lambda x, y: rowwise(loss, SIZE, x, y), inputs())


@pytest.mark.parametrize(("rows", "calls"), [(1, ROWS), (2, 4), (3, 3), (ROWS, 1), (ROWS + 1, 1)])
def test_each_row_is_computed_once_for_forward_and_backward_together(monkeypatch, rows, calls):
    chunks_of(monkeypatch, rows)
    seen = []

    def counted(part, x, y):
        seen.append(list(range(ROWS))[part])
        assert len(x) == len(y) == len(seen[-1])
        return loss(part, x, y)

    rowwise(counted, SIZE, *inputs()).backward()
    assert len(seen) == calls
    assert [row for part in seen for row in part] == list(range(ROWS))


def test_a_row_larger_than_a_chunk_goes_alone(monkeypatch):
    monkeypatch.setattr(chunking, "ELEMENTS_PER_CHUNK", SIZE - 1)
    seen = []
    rowwise(lambda part, x, y: seen.append(len(x)) or loss(part, x, y), SIZE, *inputs())
    assert seen == [1] * ROWS


def test_other_devices_get_chunks_of_their_own_size(monkeypatch):
    """On a device where a launch costs more than a small kernel: many rows together."""
    chunks_of(monkeypatch, 1)
    monkeypatch.setattr(chunking, "ELEMENTS_PER_CHUNK_ON_ACCELERATORS", 3 * SIZE)
    seen = []
    rowwise(lambda part, x: seen.append(len(x)) or x.sum(dim=1), SIZE, torch.empty(ROWS, 4, device="meta"))
    assert seen == [3, 3, 1]


@pytest.mark.parametrize("wanted", [0, 1])
def test_only_the_tensors_that_need_a_gradient_get_one(monkeypatch, wanted):
    chunks_of(monkeypatch, 2)
    tensors = list(inputs())
    tensors[1 - wanted] = tensors[1 - wanted].detach()
    needs = []

    def watched(part, *parts):
        needs.append([tensor.requires_grad for tensor in parts])
        return loss(part, *parts)

    rowwise(watched, SIZE, *tensors).backward()
    assert needs == [[wanted == 0, wanted == 1]] * 4
    assert tensors[wanted].grad.any()
    assert tensors[1 - wanted].grad is None


@pytest.mark.parametrize("how", ["no tensor needs it", "no_grad"])
def test_without_gradient_no_graph_is_built(monkeypatch, how):
    chunks_of(monkeypatch, 2)
    x, y = inputs()
    expected = loss(slice(None), x, y).detach().mean()
    tensors = (x.detach(), y.detach()) if how == "no tensor needs it" else (x, y)
    graphs = []

    def watched(part, *parts):
        value = loss(part, *parts)
        graphs.append(value.requires_grad or torch.is_grad_enabled())
        return value

    with torch.set_grad_enabled(how != "no_grad"):
        value = rowwise(watched, SIZE, *tensors)
    assert graphs == [False] * 4
    assert not value.requires_grad
    torch.testing.assert_close(value, expected)


def test_what_the_loss_reads_besides_gets_no_gradient():
    x, y = inputs()
    rowwise(lambda rows, part: loss(rows, part, y[rows]), SIZE, x).backward()
    assert x.grad.any()
    assert y.grad is None


def test_backward_twice_on_a_retained_graph_adds_the_same_gradient():
    x, y = inputs()
    value = rowwise(loss, SIZE, x, y)
    (-3 * value).backward(retain_graph=True)
    once = x.grad.clone()
    (-3 * value).backward()
    torch.testing.assert_close(x.grad, 2 * once, rtol=0, atol=0)


def test_a_second_derivative_is_refused():
    x, y = inputs()
    (gradient,) = torch.autograd.grad(rowwise(loss, SIZE, x, y).square(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_bfloat16_is_computed_in_float32_and_its_gradients_are_bfloat16():
    x, y = inputs(torch.bfloat16)
    dtypes = []
    value = rowwise(lambda rows, *parts: dtypes.append(parts[0].dtype) or loss(rows, *parts), SIZE, x, y)
    value.backward()
    assert set(dtypes) == {torch.float32}
    assert value.dtype == torch.float32
    assert x.grad.dtype == y.grad.dtype == torch.bfloat16
    exact = [tensor.detach().float().requires_grad_() for tensor in (x, y)]
    loss(slice(None), *exact).mean().backward()
    for tensor, expected in zip((x, y), exact, strict=True):
        torch.testing.assert_close(tensor.grad, expected.grad.bfloat16(), rtol=0, atol=0)


def test_gradients_too_small_for_float16_survive_until_the_loss_scale_comes():
    """A GradScaler multiplies the loss, so that its factor comes with backward only."""
    x, y = inputs(torch.float16)
    scale = 2.0**30
    (rowwise(lambda rows, *parts: loss(rows, *parts) / scale, SIZE, x, y) * scale).backward()
    plain, _ = inputs(torch.float16)
    loss(slice(None), plain.float(), y.detach().float()).mean().backward()
    torch.testing.assert_close(x.grad, plain.grad, rtol=1e-3, atol=1e-4)


def test_views_and_expanded_tensors_get_their_gradients(monkeypatch):
    """What a model hands over is rarely contiguous: heads are a transposed view, shared keys an expanded one."""
    chunks_of(monkeypatch, 2)
    x, y = inputs()
    strided, shared = x.transpose(1, 2).contiguous().transpose(1, 2), y[:1].expand(ROWS, -1)
    expected = torch.autograd.grad(loss(slice(None), strided, shared).mean(), (x, y))
    found = torch.autograd.grad(rowwise(loss, SIZE, strided, shared), (x, y))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
