"""Attention of short rows in bfloat16 on a CPU, against a float64 reference and against PyTorch's own."""

import copy
import math

import pytest
import torch
from helpers import make_batch, make_dataset, make_student, make_teacher, make_tokenizer, seeded
from torch import nn
from transformers import AutoModelForSequenceClassification, GPT2Config, ModernBertConfig, Qwen2Config, T5Config

from distill_nlp import AttentionLoss, DistillationArguments, DistillationTrainer, KLDivergenceLoss
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


def test_a_gradient_of_the_values_alone_is_reason_enough(types_of_sdpa):
    """As of a student with adapters there, in its first block."""
    tensors, mask = inputs(12, grad=False)
    tensors[2].requires_grad_()
    attend(nn.Module(), *tensors, mask)
    assert types_of_sdpa == [torch.float32]


@pytest.mark.parametrize(
    "losses", [{"kl": KLDivergenceLoss()}, {"attention": AttentionLoss()}], ids=["plain", "captured"]
)
def test_a_trainer_has_its_student_train_and_answer_through_it(losses, types_of_sdpa, tmp_path):
    student, teacher = make_student(dropout=0.0), make_teacher()
    teacher.set_attn_implementation("eager")
    args = DistillationArguments(str(tmp_path), use_cpu=True, bf16=True, max_steps=1, disable_tqdm=True)
    trainer = DistillationTrainer(
        student, teacher, losses, args=args, train_dataset=make_dataset(8), processing_class=make_tokenizer()
    )
    assert student.config._attn_implementation == ATTENTION_NAME
    trainer.train()
    assert torch.float32 in types_of_sdpa
    types_of_sdpa.clear()
    trainer.evaluate(make_dataset(8))
    assert set(types_of_sdpa) == {torch.bfloat16}


def gradients_of(model, batch, quick):
    """Of a copy of the model under autocast; and the types that its attention had."""
    model = copy.deepcopy(model)
    if quick:
        enable_quick_attention(model)
        assert model.config._attn_implementation == ATTENTION_NAME
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch).logits.float().square().sum().backward()
    return {name: x.grad for name, x in model.named_parameters() if x.grad is not None}


@pytest.mark.parametrize(
    "config",
    [
        # Queries and keys are float32 still when rotary positions have been added; fewer keys than queries.
        Qwen2Config(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
            vocab_size=100, pad_token_id=0,
        ),
        # A bias on the scores.
        T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=100, decoder_start_token_id=0,
                 eos_token_id=1),
        ModernBertConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=100,
            local_attention=4, pad_token_id=0,
        ),
        GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=100, attn_pdrop=0.0, pad_token_id=0),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
def test_models_of_other_kinds_learn_the_same_but_for_rounding(config, types_of_sdpa):
    model = seeded(3, lambda: AutoModelForSequenceClassification.from_config(config)).eval()
    if model.config._attn_implementation != "sdpa":
        pytest.skip(f"this Transformers has {config.model_type} on {model.config._attn_implementation}")
    batch = {"input_ids": torch.randint(5, 90, (3, 9)), "attention_mask": torch.ones(3, 9, dtype=torch.long)}
    batch["attention_mask"][0, 6:] = 0
    batch["input_ids"][0, 6:] = 0
    batch["input_ids"][:, 5] = 1
    batch["input_ids"][:, 6:] = 0
    plain = gradients_of(model, batch, quick=False)
    types_of_sdpa.clear()
    quick = gradients_of(model, batch, quick=True)
    assert set(types_of_sdpa) == {torch.float32}
    assert quick.keys() == plain.keys()
    for name, gradient in quick.items():
        scale = plain[name].abs().max().item()
        torch.testing.assert_close(gradient, plain[name], rtol=0.1, atol=0.1 * scale + 1e-6, msg=name)


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


def test_other_attention_is_left_alone():
    eager = make_student()
    eager.set_attn_implementation("eager")
    enable_quick_attention(eager)
    assert eager.config._attn_implementation == "eager"
    enable_quick_attention(nn.Linear(2, 2))
