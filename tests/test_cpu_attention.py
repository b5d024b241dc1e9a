"""Attention of short rows in bfloat16 on a CPU, against a float64 reference and against PyTorch's own."""

import math

import pytest
import torch
from helpers import make_batch, make_student, seeded
from torch import nn

from distill_nlp import CrossEntropyLoss, DistillationModel, DistillationObjective
from distill_nlp.capture import ATTENTION_NAME, enable_quick_attention
from distill_nlp.cpu_attention import _SHORT, attend


def inputs(tokens, dtype=torch.bfloat16, grad=True):
    """Queries, keys and values (2, 3, S, 8), and a mask that hides some of the second row's."""
    torch.manual_seed(0)
    found = [torch.randn(2, 3, tokens, 8).to(dtype).requires_grad_(grad) for _ in range(3)]
    mask = torch.ones(2, 1, tokens, tokens, dtype=torch.bool)
    mask[1, :, :, tokens // 2 :] = False
    return found, mask


def ours(query, key, value, mask):
    module = nn.Module()
    # What it is not told, it takes for a decoder where there is no mask.
    module.is_causal = False
    return attend(module, query, key, value, mask)[0]


def naive(query, key, value, mask):
    """Softmax of the scaled scores, one row and head at a time."""
    rows = []
    for b in range(len(query)):
        heads = []
        for a in range(query.shape[1]):
            scores = query[b, a] @ key[b, a].T / math.sqrt(query.shape[-1])
            scores = scores.masked_fill(~mask[b, 0], -math.inf)
            heads.append(scores.exp() / scores.exp().sum(-1, keepdim=True) @ value[b, a])
        rows.append(torch.stack(heads, dim=1))
    return torch.stack(rows)


def outputs_and_gradients(function, tensors, mask):
    output = function(*tensors, mask)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    return output, torch.autograd.grad(output, tensors, weights)


@pytest.fixture
def types_of_sdpa(monkeypatch):
    """The types that PyTorch's attention is called with."""
    seen, function = [], nn.functional.scaled_dot_product_attention

    def noting(query, *arguments, **settings):
        seen.append(query.dtype)
        return function(query, *arguments, **settings)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", noting)
    return seen


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["boolean", "added", "none"])
def test_short_rows_are_those_of_a_float64_reference_up_to_one_rounding(kind, autocast):
    tensors, visible = inputs(tokens=12)
    added = torch.zeros(visible.shape).masked_fill(~visible, -math.inf).bfloat16()
    mask = {"boolean": visible, "added": added, "none": None}[kind]
    if kind == "none":
        visible = torch.ones_like(visible)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output, gradients = outputs_and_gradients(ours, tensors, mask)
    expected, exact = outputs_and_gradients(naive, [x.detach().double().requires_grad_() for x in tensors], visible)
    assert output.dtype == torch.bfloat16
    for found, reference in zip([output, *gradients], [expected, *exact], strict=True):
        # Half of a bfloat16's last place, of results and of the gradient that comes in.
        torch.testing.assert_close(found.double(), reference, rtol=2**-7, atol=2**-8 * reference.abs().max().item())


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_are_closer_than_those_in_bfloat16(autocast):
    tensors, mask = inputs(tokens=40)
    _, exact = outputs_and_gradients(naive, [x.detach().double().requires_grad_() for x in tensors], mask)

    def error(function):
        # Which would take attention in float32 to bfloat16 again.
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            _, found = outputs_and_gradients(function, tensors, mask)
        return sum((a.double() - b).square().mean().item() for a, b in zip(found, exact, strict=True))

    plain = error(lambda q, k, v, m: nn.functional.scaled_dot_product_attention(q, k, v, m).transpose(1, 2))
    assert error(ours) < plain


@pytest.mark.parametrize(
    ("tokens", "dtype", "grad", "expected"),
    [
        (_SHORT - 1, torch.bfloat16, True, torch.float32),
        (_SHORT, torch.bfloat16, True, torch.bfloat16),
        (12, torch.bfloat16, False, torch.bfloat16),
        (12, torch.float32, True, torch.float32),
        (12, torch.float64, True, torch.float64),
    ],
)
def test_what_is_long_or_has_no_gradient_stays_in_its_type(tokens, dtype, grad, expected, types_of_sdpa):
    tensors, mask = inputs(tokens, dtype, grad)
    output, maps = attend(nn.Module(), *tensors, mask)
    assert types_of_sdpa == [expected]
    assert output.dtype == dtype
    assert maps is None


@pytest.mark.parametrize("captures", [False, True])
def test_a_student_trains_and_answers_through_it(captures, types_of_sdpa):
    student = make_student(dropout=0.0)
    model = seeded(5, lambda: DistillationModel(student, DistillationObjective({"ce": CrossEntropyLoss()})))
    assert student.config._attn_implementation == ATTENTION_NAME
    batch = make_batch()
    with torch.autocast("cpu", torch.bfloat16):
        model.train()(**batch).loss.backward()
        assert set(types_of_sdpa) == {torch.float32}
        types_of_sdpa.clear()
        with torch.no_grad():
            model.eval()(**batch)
    assert set(types_of_sdpa) == {torch.bfloat16}


def test_in_float32_the_student_is_what_it_was_on_sdpa():
    first, second = make_student(dropout=0.0), make_student(dropout=0.0)
    second.load_state_dict(first.state_dict())
    enable_quick_attention(second)
    assert first.config._attn_implementation == "sdpa"
    found = []
    for model in (first, second):
        model(**{name: x for name, x in make_batch().items() if name != "labels"}).logits.square().sum().backward()
        found.append({name: x.grad for name, x in model.named_parameters()})
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


def test_the_saved_student_does_not_ask_for_it(tmp_path):
    student = make_student()
    enable_quick_attention(student)
    student.save_pretrained(tmp_path)
    assert ATTENTION_NAME not in (tmp_path / "config.json").read_text()
    assert type(student).from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_other_attention_and_machines_with_an_accelerator_are_left_alone(monkeypatch):
    eager = make_student()
    eager.set_attn_implementation("eager")
    enable_quick_attention(eager)
    assert eager.config._attn_implementation == "eager"
    enable_quick_attention(nn.Linear(2, 2))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda *_: True)
    student = make_student()
    enable_quick_attention(student)
    assert student.config._attn_implementation == "sdpa"
