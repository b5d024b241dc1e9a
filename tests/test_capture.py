"""Hidden states and attention inputs, against what the models give by themselves."""

import copy
import json

import pytest
import torch
from helpers import (
    ALL_WEIGHTS,
    all_losses,
    bert_config,
    distilbert_config,
    label_config,
    largest_difference,
    make_batch,
    make_student,
    make_teacher,
    seeded,
)
from torch import nn
from transformers import (
    AlbertConfig,
    AutoModelForSequenceClassification,
    DebertaV2Config,
    ElectraConfig,
    GPT2Config,
    Qwen2Config,
    RobertaConfig,
)

from distill_nlp import AttentionLoss, DistillationModel, DistillationObjective
from distill_nlp.capture import (
    _active,
    _capturing_attention,
    enable_attention_capture,
    forward_with_features,
    logits_of,
)
from distill_nlp.losses.maps import log_attention_map
from distill_nlp.modeling import accepted_arguments

SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "initializer_range": 0.2,
    **label_config(),
}
CONFIGS = {
    "bert": bert_config(),
    "distilbert": distilbert_config(),
    "roberta": RobertaConfig(**SIZES, pad_token_id=0, bos_token_id=2, eos_token_id=3),
    "electra": ElectraConfig(**SIZES, embedding_size=16),
    # All blocks share one set of weights: a layer cannot be told by its module.
    "albert": AlbertConfig(**SIZES, embedding_size=16),
    # Causal, which SDPA is told by a flag where nothing is padded; in the second, heads share their keys.
    "gpt2": GPT2Config(
        vocab_size=100, n_embd=32, n_layer=3, n_head=4, n_positions=40, initializer_range=0.2, pad_token_id=0
    ),
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=2, pad_token_id=0),
}
BLOCKS = {
    "bert": "bert.encoder.layer",
    "distilbert": "distilbert.transformer.layer",
    "roberta": "roberta.encoder.layer",
    "electra": "electra.encoder.layer",
}
FAMILIES = pytest.mark.parametrize("family", list(CONFIGS))


def build(family, implementation):
    config = copy.deepcopy(CONFIGS[family])
    return seeded(
        7, lambda: AutoModelForSequenceClassification.from_config(config, attn_implementation=implementation)
    ).eval()


def inputs_for(model, padded=True):
    accepted = accepted_arguments(model)
    batch = make_batch(rows=range(4) if padded else [0, 0])
    return {name: tensor for name, tensor in batch.items() if name in accepted and name != "labels"}


@FAMILIES
@pytest.mark.parametrize("padded", [True, False])
def test_recomputed_maps_equal_those_of_eager_attention(family, padded):
    eager, fused = build(family, "eager"), build(family, "sdpa")
    inputs = inputs_for(eager, padded)
    assert (inputs["attention_mask"] == 0).any() == padded
    depth = eager.config.num_hidden_layers
    with torch.no_grad():
        expected = eager(**inputs, output_attentions=True).attentions
        enable_attention_capture(fused)
        found = forward_with_features(fused, inputs, set(), set(range(1, depth + 1))).attentions
    assert len(expected) == depth == len(found)
    real = inputs["attention_mask"].bool()
    for layer in range(1, depth + 1):
        difference = (log_attention_map(found[layer]).exp() - expected[layer - 1]).abs()
        assert difference.transpose(1, 2)[real].max() < 1e-6
    # Far enough apart that a layer taken for its neighbour would be seen.
    assert (expected[0] - expected[1]).abs().max() > 0.01


@FAMILIES
def test_logits_are_those_of_the_model_as_it_was(family):
    eager, fused, captured = build(family, "eager"), build(family, "sdpa"), build(family, "sdpa")
    enable_attention_capture(captured)
    inputs = inputs_for(eager)
    with torch.no_grad():
        plain = fused(**inputs).logits
        torch.testing.assert_close(captured(**inputs).logits, plain, rtol=0, atol=0)
        torch.testing.assert_close(
            forward_with_features(captured, inputs, {0, 1}, {1}).logits, plain, rtol=0, atol=1e-6
        )
        torch.testing.assert_close(plain, eager(**inputs).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", list(BLOCKS))
@pytest.mark.parametrize("training", [False, True])
def test_hidden_state_zero_is_the_embeddings_and_n_is_block_n(family, training):
    model = build(family, "sdpa").train(training)
    blocks = model.get_submodule(BLOCKS[family])
    seen = {}

    def keep(layer):
        def hook(module, args, output):
            seen[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    def keep_input(module, args, kwargs):
        seen[0] = args[0] if args else kwargs["hidden_states"]

    blocks[0].register_forward_pre_hook(keep_input, with_kwargs=True)
    for number, block in enumerate(blocks, start=1):
        block.register_forward_hook(keep(number))
    found = forward_with_features(model, inputs_for(model), set(range(len(blocks) + 1)), set()).hidden_states
    assert set(found) == set(seen)
    for layer, expected in seen.items():
        torch.testing.assert_close(found[layer], expected, rtol=0, atol=0)


def test_only_the_layers_asked_for_are_kept():
    model = build("bert", "sdpa")
    enable_attention_capture(model)
    found = forward_with_features(model, inputs_for(model), {0, 3}, {2})
    assert set(found.hidden_states) == {0, 3}
    assert set(found.attentions) == {2}
    none = forward_with_features(model, inputs_for(model), set(), set())
    assert none.hidden_states == {}
    assert none.attentions == {}


def test_attention_dropout_does_not_reach_the_map():
    """In eager mode the returned map is after dropout; the one of the first block must be the same as in eval."""
    config = bert_config(dropout=0.0, attention_probs_dropout_prob=0.5)
    model = seeded(7, lambda: AutoModelForSequenceClassification.from_config(config))
    inputs = inputs_for(model)
    enable_attention_capture(model)
    still = log_attention_map(forward_with_features(model.eval(), inputs, set(), {1}).attentions[1])
    noisy = log_attention_map(forward_with_features(model.train(), inputs, set(), {1}).attentions[1])
    torch.testing.assert_close(noisy, still, rtol=0, atol=0)
    model.set_attn_implementation("eager")
    after_dropout = model(**inputs, output_attentions=True).attentions[0]
    assert (after_dropout - still.exp()).abs().max() > 0.1


def gradients(checkpointing, family, dropout):
    student = seeded(
        2,
        lambda: AutoModelForSequenceClassification.from_config(
            distilbert_config(dropout) if family == "distilbert" else bert_config(dropout, num_hidden_layers=2)
        ),
    )
    teacher = make_teacher()
    model = seeded(
        5, lambda: DistillationModel(student, DistillationObjective(all_losses(), ALL_WEIGHTS), teacher.config)
    )
    enable_attention_capture(teacher)
    batch = make_batch()
    with torch.no_grad():
        teacher_features = forward_with_features(teacher, inputs_for(teacher), {2, 4}, {2, 4})
    if checkpointing:
        model.activation_checkpointing_enable()
    model.train()
    torch.manual_seed(0)
    output = model(teacher=teacher_features, **batch)
    output.loss.backward()
    return output, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["distilbert", "bert"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_gradient_checkpointing_gives_the_same_loss_and_gradients(family, dropout):
    plain_output, plain = gradients(False, family, dropout)
    output, checkpointed = gradients(True, family, dropout)
    assert output.loss.item() == pytest.approx(plain_output.loss.item(), rel=1e-6)
    queries = [grad for name, grad in plain.items() if "q_lin.weight" in name or "query.weight" in name]
    assert len(queries) == 2
    assert all(grad.any() for grad in queries)
    assert largest_difference(plain, checkpointed) < 1e-6


def test_attention_loss_alone_reaches_queries_and_keys_under_gradient_checkpointing():
    def run(checkpointing):
        teacher = make_teacher()
        model = DistillationModel(make_student(), DistillationObjective({"attention": AttentionLoss()}), teacher.config)
        enable_attention_capture(teacher)
        with torch.no_grad():
            teacher_features = forward_with_features(teacher, inputs_for(teacher), set(), {2, 4})
        if checkpointing:
            model.activation_checkpointing_enable()
        torch.manual_seed(0)
        model.train()(teacher=teacher_features, **make_batch()).loss.backward()
        return {name: p.grad for name, p in model.student.named_parameters() if p.grad is not None}

    plain, checkpointed = run(False), run(True)
    assert plain["distilbert.transformer.layer.1.attention.q_lin.weight"].any()
    assert largest_difference(plain, checkpointed) < 1e-7


def test_reentrant_checkpointing_does_not_lose_the_attention_gradient_silently():
    """A reentrant checkpoint runs the blocks without gradient: captured queries and keys would be constants."""
    model = DistillationModel(
        make_student(), DistillationObjective({"attention": AttentionLoss()}), make_teacher().config
    )
    for settings in ({"activation_checkpointing_kwargs": {"use_reentrant": True}}, {}):
        positional = () if settings else ({"use_reentrant": True},)
        with pytest.raises(ValueError, match=r"attention losses need .*'use_reentrant': False"):
            model.activation_checkpointing_enable(*positional, **settings)
    with pytest.raises(ValueError, match="attention losses need"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.activation_checkpointing_enable({"use_reentrant": False})


def test_deberta_is_refused_by_name_in_one_line():
    config = DebertaV2Config(**SIZES, relative_attention=True, pos_att_type=["p2c", "c2p"])
    model = AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(
        ValueError, match=r"^DebertaV2ForSequenceClassification does not use .* attention interface"
    ) as e:
        enable_attention_capture(model)
    assert "\n" not in str(e.value)
    # Hidden states need no capture.
    assert set(forward_with_features(model.eval(), inputs_for(model), {0, 3}, set()).hidden_states) == {0, 3}


def test_a_position_bias_is_refused_because_the_map_does_not_follow_from_queries_and_keys():
    class T5Attention(nn.Module):
        def forward(self, **kwargs):
            tensor = torch.randn(1, 2, 3, 4)
            bias = torch.zeros(1, 2, 3, 3)
            return _capturing_attention(self, tensor, tensor, tensor, None, is_causal=False, position_bias=bias)

    with pytest.raises(ValueError, match="T5Attention adds a position bias to its scores"):
        forward_with_features(T5Attention(), {}, set(), {1})
    assert torch.is_tensor(forward_with_features(T5Attention(), {}, set(), set()).logits)


def test_a_module_that_is_no_transformers_model_is_refused_by_name():
    with pytest.raises(ValueError, match=r"^Linear does not use"):
        enable_attention_capture(nn.Linear(2, 2))


def test_saved_config_does_not_mention_the_capturing_attention(tmp_path):
    student = make_student().eval()
    enable_attention_capture(student)
    student.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert "distill_nlp" not in text
    assert "attn_implementation" not in json.loads(text)
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert reloaded.config._attn_implementation == "sdpa"
    inputs = inputs_for(student)
    with torch.no_grad():
        torch.testing.assert_close(reloaded(**inputs).logits, student(**inputs).logits, rtol=0, atol=1e-6)


def test_layers_that_the_model_does_not_have_are_named():
    model = build("distilbert", "sdpa")
    with pytest.raises(ValueError, match=r"returned 3 hidden states .* but a loss reads layer 3"):
        forward_with_features(model, inputs_for(model), {3}, set())
    with pytest.raises(ValueError, match=r"made 0 calls .* reads layers \[1\]; is it on the capturing attention"):
        forward_with_features(model, inputs_for(model), set(), {1})


def test_nothing_is_collected_outside_nor_after_an_error():
    model = build("bert", "sdpa")
    enable_attention_capture(model)
    with pytest.raises(AttributeError):
        forward_with_features(model, {"input_ids": "no tensor"}, set(), {1})
    assert _active.get() is None
    model(**inputs_for(model))
    assert _active.get() is None


def test_two_models_may_capture_one_inside_the_other():
    model, other = build("bert", "sdpa"), build("distilbert", "sdpa")
    for each in (model, other):
        enable_attention_capture(each)
    inner = {}

    def run_other(module, args, kwargs):
        inner["found"] = forward_with_features(other, inputs_for(other), set(), {1})

    model.bert.encoder.layer[1].register_forward_pre_hook(run_other, with_kwargs=True)
    found = forward_with_features(model, inputs_for(model), set(), {2})
    assert found.attentions[2].query.shape[1] == 4
    assert inner["found"].attentions[1].query.shape[1] == 3


def test_logits_are_found_in_any_usual_output():
    logits = torch.ones(2, 3)
    model = build("distilbert", "sdpa")
    assert logits_of(model(**inputs_for(model))).shape == (4, 3)
    for output in (logits, {"logits": logits}, (logits, "more")):
        assert logits_of(output) is logits
