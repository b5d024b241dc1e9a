"""Hidden states and attention inputs, against what the models give by themselves."""

import copy
import gc
import json
import threading
import weakref
from functools import partial
from types import SimpleNamespace

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
from torch.utils.checkpoint import checkpoint
from transformers import (
    AlbertConfig,
    AttentionInterface,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BartConfig,
    BartModel,
    ConvNextConfig,
    DebertaConfig,
    DebertaV2Config,
    ElectraConfig,
    GPT2Config,
    ModernBertConfig,
    MPNetConfig,
    Qwen2Config,
    ResNetConfig,
    RobertaConfig,
    XLMRobertaConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from distill_nlp import AttentionLoss, DistillationModel, DistillationObjective
from distill_nlp.capture import (
    _SELECTS_HIDDEN_STATES,
    ATTENTION_NAME,
    _active,
    _capturing,
    enable_attention_capture,
    forward_with_features,
    logits_of,
)
from distill_nlp.losses import ModelShape
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
    "xlm-roberta": XLMRobertaConfig(**SIZES, pad_token_id=0, bos_token_id=2, eos_token_id=3),
    "electra": ElectraConfig(**SIZES, embedding_size=16),
    # All blocks share one set of weights: a layer cannot be told by its module.
    "albert": AlbertConfig(**SIZES, embedding_size=16),
    # Rotary positions; of its layers the first sees all tokens, the others 4 to each side, fewer than a text has.
    "modernbert": ModernBertConfig(
        **SIZES, local_attention=8, **dict.fromkeys(("pad_token_id", "bos_token_id", "cls_token_id"), 0), eos_token_id=3
    ),
    # Causal, which SDPA is told by a flag where nothing is padded; in the second, heads share their keys.
    "gpt2": GPT2Config(
        vocab_size=100, n_embd=32, n_layer=3, n_head=4, n_positions=40, initializer_range=0.2, pad_token_id=0
    ),
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=2, pad_token_id=0),
    # Not on the attention interface: eager only, with a learned bias of relative positions.
    "mpnet": MPNetConfig(**SIZES),
}
BLOCKS = {
    "bert": "bert.encoder.layer",
    "distilbert": "distilbert.transformer.layer",
    "roberta": "roberta.encoder.layer",
    "xlm-roberta": "roberta.encoder.layer",
    "modernbert": "model.layers",
    "electra": "electra.encoder.layer",
    "mpnet": "mpnet.encoder.layer",
}
FAMILIES = pytest.mark.parametrize("family", list(CONFIGS))


def build(family, implementation, seed=7):
    config = copy.deepcopy(CONFIGS[family])
    implementation = "eager" if family == "mpnet" else implementation
    return seeded(
        seed, lambda: AutoModelForSequenceClassification.from_config(config, attn_implementation=implementation)
    ).eval()


def exactly(model):
    """In float64: in float32, how far two ways are apart is up to the order in which a CPU adds up.

    Two families stay in float32, in which their eager attention takes its softmax whatever the rest is in.
    """
    return model if model.config.model_type in ("modernbert", "qwen2") else model.double()


def skip_where_it_cannot_be_captured(model):
    if model.config.model_type != "mpnet" and not model._can_set_attn_implementation():
        pytest.skip("in this version of Transformers the family is not on the attention interface")


def inputs_for(model, padded=True):
    accepted = accepted_arguments(model)
    batch = make_batch(rows=range(4) if padded else [0, 0])
    return {name: tensor for name, tensor in batch.items() if name in accepted and name != "labels"}


@FAMILIES
@pytest.mark.parametrize("padded", [True, False])
def test_recomputed_maps_equal_those_of_eager_attention(family, padded):
    eager, fused = exactly(build(family, "eager")), exactly(build(family, "sdpa"))
    skip_where_it_cannot_be_captured(fused)
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


def eager_attention_loss(student_maps, teacher_maps, mask):
    """KL(teacher ‖ student) of maps of eager attention: over keys, then the mean over heads, real tokens and rows."""
    total = 0.0
    for p, q in zip(student_maps, teacher_maps, strict=True):
        terms = torch.where(q > 0, q * (q / p.clamp(min=1e-300)).clamp(min=1e-300).log(), torch.zeros_like(q))
        tokens = terms.sum(dim=-1).mean(dim=1) * mask
        total = total + (tokens.sum(dim=1) / mask.sum(dim=1)).mean()
    return total / len(student_maps)


@FAMILIES
def test_the_attention_loss_and_its_gradients_are_those_of_eager_maps(family):
    eager, fused = (build(family, name, seed=3).double() for name in ("eager", "sdpa"))
    teacher, eager_teacher = (build(family, name, seed=4).double() for name in ("sdpa", "eager"))
    skip_where_it_cannot_be_captured(fused)
    inputs = inputs_for(eager)
    mask = inputs["attention_mask"]
    # Eager attention in float64 gives NaN where a padded token has no real one in its window.
    mask[:, :8] = 1
    depth = eager.config.num_hidden_layers
    layers = set(range(1, depth + 1))
    expected = eager_attention_loss(
        eager(**inputs, output_attentions=True).attentions,
        [maps.detach() for maps in eager_teacher(**inputs, output_attentions=True).attentions],
        mask,
    )
    expected.backward()

    for model in (fused, teacher):
        enable_attention_capture(model)
    loss = AttentionLoss(layers=[[layer, layer] for layer in sorted(layers)])
    loss.bind(ModelShape.from_config(fused.config), ModelShape.from_config(teacher.config))
    with torch.no_grad():
        target = forward_with_features(teacher, inputs, set(), layers)
    value = loss(forward_with_features(fused, inputs, set(), layers), target, None, mask)
    value.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert value.item() > 0.01
    reached = 0
    for (name, parameter), other in zip(fused.named_parameters(), eager.parameters(), strict=True):
        if other.grad is None or not other.grad.any():
            # A branch that the maps do not depend on.
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        difference = (parameter.grad - other.grad).norm()
        # A key's bias shifts all scores of a query alike: its gradient is zero but for rounding.
        assert difference <= 1e-5 * other.grad.norm() + 1e-12, name
        reached += 1
    assert reached > depth
    if family == "mpnet":
        assert fused.mpnet.encoder.relative_attention_bias.weight.grad.any()


@FAMILIES
def test_logits_are_those_of_the_model_as_it_was(family):
    eager, fused, captured = build(family, "eager"), build(family, "sdpa"), build(family, "sdpa")
    skip_where_it_cannot_be_captured(captured)
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
    if family == "modernbert":
        seen[len(blocks)] = model.model.final_norm(seen[len(blocks)])
    for layer, expected in seen.items():
        torch.testing.assert_close(found[layer], expected, rtol=0, atol=0)
        assert found[layer].requires_grad


def test_only_the_layers_asked_for_are_kept():
    model = build("bert", "sdpa")
    enable_attention_capture(model)
    found = forward_with_features(model, inputs_for(model), {0, 3}, {2})
    assert set(found.hidden_states) == {0, 3}
    assert set(found.attentions) == {2}
    none = forward_with_features(model, inputs_for(model), set(), set())
    assert none.hidden_states == {}
    assert none.attentions == {}


@pytest.mark.skipif(not _SELECTS_HIDDEN_STATES, reason="this version of Transformers keeps the states of all layers")
@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert"])
def test_states_of_other_layers_are_free_as_soon_as_the_model_is_through(family):
    model = build(family, "sdpa")
    blocks = model.get_submodule(BLOCKS[family])
    outputs = {}
    for number, block in enumerate(blocks, start=1):
        block.register_forward_hook(lambda module, args, output, n=number: outputs.update({n: weakref.ref(output)}))
    alive = {}

    def look(module, args):
        gc.collect()
        alive.update({number: reference() is not None for number, reference in outputs.items()})

    model.classifier.register_forward_pre_hook(look)
    with torch.no_grad():
        found = forward_with_features(model, inputs_for(model), {1}, set())
    assert set(found.hidden_states) == {1}
    assert alive[1]
    assert not any(alive[number] for number in range(2, len(blocks)))
    assert len(alive) == len(blocks)


def test_the_last_hidden_state_and_a_single_one_are_found():
    model = build("bert", "sdpa")
    inputs = inputs_for(model)
    expected = model(**inputs, output_hidden_states=True).hidden_states
    for layers in ({0}, {3}, {4}, {2, 4}):
        found = forward_with_features(model, inputs, layers, set()).hidden_states
        assert set(found) == layers
        for layer in layers:
            torch.testing.assert_close(found[layer], expected[layer], rtol=0, atol=0)


def dense_mask(mask, tokens, is_causal, sliding_window):
    """Loops: which query may see which key, from what flash attention is told."""
    rows = 1 if mask is None else len(mask)
    seen = torch.zeros(rows, 1, tokens, tokens, dtype=torch.bool)
    for b in range(rows):
        for i in range(tokens):
            for j in range(tokens):
                real = mask is None or bool(mask[b, j])
                near = sliding_window is None or abs(i - j) <= sliding_window - 1
                seen[b, 0, i, j] = real and near and not (is_causal and j > i)
    return seen


@pytest.fixture
def flash_calls(monkeypatch):
    """A stand-in for flash attention, which gets a mask of two dimensions or none; counts its calls."""
    calls = []

    def flash(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **kwargs):
        assert attention_mask is None or attention_mask.dim() == 2
        assert module.config._attn_implementation == "flash_attention_2"
        calls.append(attention_mask)
        is_causal = module.is_causal if is_causal is None else is_causal
        mask = dense_mask(attention_mask, query.shape[2], is_causal, kwargs.get("sliding_window"))
        return sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, is_causal=False)

    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", flash)
    return calls


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "modernbert", "gpt2", "qwen2"])
@pytest.mark.parametrize("padded", [True, False])
def test_a_model_on_flash_attention_stays_on_it(flash_calls, family, padded):
    eager, model = exactly(build(family, "eager")), exactly(build(family, "sdpa"))
    skip_where_it_cannot_be_captured(model)
    # As `attn_implementation="flash_attention_2"` leaves it where that package is installed.
    model.config._attn_implementation_internal = "flash_attention_2"
    enable_attention_capture(model)
    enable_attention_capture(model)
    assert model.config._attn_implementation == "flash_attention_2"
    inputs = inputs_for(eager, padded)
    depth = eager.config.num_hidden_layers
    layers = set(range(1, depth + 1))
    with torch.no_grad():
        expected = eager(**inputs, output_attentions=True)
        found = forward_with_features(model, inputs, set(), layers)
    assert len(flash_calls) == depth
    assert (flash_calls[0] is not None) == padded
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5)
    real = inputs["attention_mask"].bool()
    for layer in layers:
        maps = log_attention_map(found.attentions[layer]).exp()
        assert (maps - expected.attentions[layer - 1]).abs().transpose(1, 2)[real].max() < 1e-6


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_model_on_any_other_attention_goes_to_sdpa(implementation):
    model = build("bert", implementation)
    enable_attention_capture(model)
    enable_attention_capture(model)
    assert model.config._attn_implementation == ATTENTION_NAME
    found = forward_with_features(model, inputs_for(model), set(), {4})
    assert set(found.attentions) == {4}


def test_another_thread_does_not_see_the_collector():
    """Replicas of one process (DataParallel) run at the same time, each with its own."""
    model, other = build("bert", "sdpa"), build("distilbert", "sdpa")
    for each in (model, other):
        enable_attention_capture(each)

    def run_other(*_):
        thread = threading.Thread(target=lambda: other(**inputs_for(other)))
        thread.start()
        thread.join()

    model.bert.encoder.layer[1].register_forward_pre_hook(run_other)
    found = forward_with_features(model, inputs_for(model), set(), {2, 3})
    torch.testing.assert_close(
        found.attentions[3].query,
        forward_with_features(build_enabled("bert"), inputs_for(model), set(), {3}).attentions[3].query,
    )
    assert found.attentions[2].query.shape[1] == 4


def build_enabled(family):
    model = build(family, "sdpa")
    enable_attention_capture(model)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "modernbert", "mpnet"])
def test_a_compiled_model_gives_the_same_inputs_of_its_attention_each_time(family):
    model = build_enabled(family)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch._dynamo.reset()
    # Without collecting, then other layers and other texts through what is compiled already.
    for rows, layers in ((range(4), set()), (range(4), {1, 2}), (range(4, 8), {1, 2}), (range(4), {2})):
        batch = make_batch(rows=rows, width=12)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            expected = forward_with_features(model, inputs, layers, layers)
            found = forward_with_features(compiled, inputs, layers, layers)
        torch.testing.assert_close(found.logits, expected.logits)
        assert set(found.attentions) == set(found.hidden_states) == layers
        for layer in layers:
            torch.testing.assert_close(found.hidden_states[layer], expected.hidden_states[layer])
            for name in ("query", "key", "value", "mask", *(["bias"] if family == "mpnet" else [])):
                torch.testing.assert_close(
                    getattr(found.attentions[layer], name), getattr(expected.attentions[layer], name)
                )


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_step_gives_the_same_loss_and_gradients(backend):
    def step(compile_model):
        torch._dynamo.reset()
        teacher = build_enabled("bert")
        with torch.no_grad():
            target = forward_with_features(teacher, inputs_for(teacher), {2, 4}, {2, 4})
        objective = DistillationObjective(all_losses(), ALL_WEIGHTS)
        model = seeded(5, lambda: DistillationModel(make_student(dropout=0.0), objective, teacher.config)).train()
        run = torch.compile(model, backend=backend) if compile_model else model
        for _ in range(2):
            model.zero_grad()
            output = run(teacher=target, **make_batch())
            output.loss.backward()
        return output, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain_output, plain = step(False)
    output, compiled = step(True)
    assert output.loss.item() == pytest.approx(plain_output.loss.item(), rel=1e-5)
    for name, term in plain_output.terms.items():
        assert output.terms[name].item() == pytest.approx(term.item(), rel=1e-5)
    assert any("q_lin.weight" in name and grad.any() for name, grad in compiled.items())
    assert largest_difference(plain, compiled) < 1e-5


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


# ---- MPNet ----


def test_attention_dropout_does_not_reach_the_map_of_mpnet():
    settings = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.5}
    config = MPNetConfig(**SIZES, **settings)
    model = seeded(7, lambda: AutoModelForSequenceClassification.from_config(config))
    inputs = inputs_for(model)
    enable_attention_capture(model)
    still = log_attention_map(forward_with_features(model.eval(), inputs, set(), {1}).attentions[1])
    noisy = log_attention_map(forward_with_features(model.train(), inputs, set(), {1}).attentions[1])
    torch.testing.assert_close(noisy, still, rtol=0, atol=0)
    after_dropout = model(**inputs, output_attentions=True).attentions[0]
    assert (after_dropout - still.exp()).abs().max() > 0.1


def maps_of(model, inputs, layer):
    with torch.no_grad():
        return log_attention_map(forward_with_features(model, inputs, set(), {layer}).attentions[layer]).exp()


def test_mpnet_enabled_twice_or_copied_has_its_calls_counted_once():
    model = build_enabled("mpnet")
    copied = copy.deepcopy(model)
    inputs = inputs_for(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(1.5)
        for each in (model, copied):
            enable_attention_capture(each)
            expected = each(**inputs, output_attentions=True).attentions[1]
            assert (maps_of(each, inputs, 2) - expected).abs().transpose(1, 2)[
                inputs["attention_mask"] == 1
            ].max() < 1e-6


@pytest.mark.parametrize("enabled_before", [True, False])
def test_adapters_of_mpnet_are_part_of_its_map(enabled_before):
    peft = pytest.importorskip("peft")
    model = build("mpnet", "eager")
    if enabled_before:
        enable_attention_capture(model)
    inputs = inputs_for(model)
    before = model(**inputs, output_attentions=True).attentions[1]
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q", "k"], init_lora_weights=False)
    model = seeded(3, lambda: peft.get_peft_model(model, config)).eval()
    enable_attention_capture(model)
    real = inputs["attention_mask"] == 1
    expected = model(**inputs, output_attentions=True).attentions[1]
    assert (expected - before).abs().transpose(1, 2)[real].max() > 0.01
    assert (maps_of(model, inputs, 2) - expected).abs().transpose(1, 2)[real].max() < 1e-6


def test_only_what_is_asked_for_is_kept_of_mpnet():
    model = build_enabled("mpnet")
    inputs = inputs_for(model)
    outputs = {}
    for number, block in enumerate(model.mpnet.encoder.layer, start=1):
        for name in "qkv":
            linear = getattr(block.attention.attn, name)
            linear.register_forward_hook(
                lambda module, args, output, key=(number, name): outputs.update({key: weakref.ref(output)})
            )
    alive = set()

    def look(module, args):
        gc.collect()
        alive.update(number for (number, _), reference in outputs.items() if reference() is not None)

    handle = model.classifier.register_forward_pre_hook(look)
    with torch.no_grad():
        found = forward_with_features(model, inputs, set(), {2})
        handle.remove()
        assert len(outputs) == 9
        # Those of layer 2, of which the views into them hold the storage.
        assert alive <= {2}
        bias = found.attentions[2].bias
        tokens = inputs["input_ids"].shape[1]
        assert bias.shape == (1, 4, tokens, tokens)
        # Not a view into the one that MPNet repeats for each row.
        assert bias.untyped_storage().nbytes() == 4 * bias.numel()
        model(**inputs)
        gc.collect()
        del found
        assert not any(reference() is not None for reference in outputs.values())
    assert _active.collectors == []


def test_mpnet_may_be_checkpointed_block_by_block_and_refuses_it_as_a_whole():
    """Its class in Transformers has no gradient checkpointing; wrappers around its blocks have."""

    def run(checkpointing):
        student, teacher = build("mpnet", "eager", seed=3).train(), build_enabled("bert")
        objective = DistillationObjective({"attention": AttentionLoss()})
        model = DistillationModel(student, objective, teacher.config).train()
        with pytest.raises(ValueError, match="MPNetForSequenceClassification does not support"):
            model.activation_checkpointing_enable()
        if checkpointing:
            for block in student.mpnet.encoder.layer:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        with torch.no_grad():
            target = forward_with_features(teacher, inputs_for(teacher), set(), {1, 2, 3, 4})
        torch.manual_seed(0)
        output = model(teacher=target, **make_batch())
        output.loss.backward()
        return output.loss.item(), {name: p.grad for name, p in student.named_parameters() if p.grad is not None}

    (plain_loss, plain), (loss, checkpointed) = run(False), run(True)
    assert loss == pytest.approx(plain_loss, rel=1e-6)
    assert plain["mpnet.encoder.relative_attention_bias.weight"].any()
    assert plain["mpnet.encoder.layer.2.attention.attn.q.weight"].any()
    assert largest_difference(plain, checkpointed) < 1e-6


@pytest.mark.slow
def test_a_compiled_step_of_mpnet_gives_the_same_gradients():
    def step(compile_model):
        torch._dynamo.reset()
        student, teacher = build("mpnet", "eager", seed=3), build_enabled("mpnet")
        model = DistillationModel(student, DistillationObjective({"attention": AttentionLoss()}), teacher.config)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        with torch.no_grad():
            target = forward_with_features(teacher, inputs_for(teacher), set(), {1, 2, 3})
        run = torch.compile(model.train(), backend="aot_eager") if compile_model else model.train()
        run(teacher=target, **make_batch()).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain = step(False)
    assert plain["student.mpnet.encoder.relative_attention_bias.weight"].any()
    assert largest_difference(plain, step(True)) < 1e-5


# ---- gradient checkpointing ----


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


# ---- what does not fit ----


# Their scores hold relative positions; each has its own loop over its layers.
REFUSED = {
    "Deberta": DebertaConfig(**SIZES, relative_attention=True, pos_att_type=["p2c", "c2p"]),
    "DebertaV2": DebertaV2Config(**SIZES, relative_attention=True, pos_att_type=["p2c", "c2p"]),
}


@pytest.mark.parametrize("family", list(REFUSED))
def test_models_with_attention_of_their_own_are_refused_by_name_in_one_line(family):
    model = seeded(7, lambda: AutoModelForSequenceClassification.from_config(copy.deepcopy(REFUSED[family])))
    with pytest.raises(
        ValueError,
        match=rf"^{family}ForSequenceClassification does not use .* interface, so that .* \(DeBERTa adds terms of "
        "relative positions to its scores, computed from the hidden states inside",
    ) as e:
        enable_attention_capture(model)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("family", list(REFUSED))
def test_hidden_states_of_models_with_a_loop_of_their_own(family):
    model = seeded(7, lambda: AutoModelForSequenceClassification.from_config(copy.deepcopy(REFUSED[family]))).eval()
    inputs = inputs_for(model)
    expected = model(**inputs, output_hidden_states=True)
    found = forward_with_features(model, inputs, {0, 3}, set())
    assert set(found.hidden_states) == {0, 3}
    for layer, states in found.hidden_states.items():
        torch.testing.assert_close(states, expected.hidden_states[layer], rtol=0, atol=0)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("family", [ResNetConfig, ConvNextConfig])
def test_states_of_stages_are_read_as_sequences_of_positions(family, training):
    config = family(num_channels=1, depths=[1, 2], hidden_sizes=[4, 6], num_stages=2, embedding_size=4)
    model = seeded(0, lambda: AutoModelForImageClassification.from_config(config)).train(training)
    inputs = {"pixel_values": torch.randn(3, 1, 32, 64, generator=torch.Generator().manual_seed(0))}
    assert ModelShape.from_config(config).num_layers == 2
    features = forward_with_features(model, inputs, {1, 2}, set())
    maps = model.train(False)(**inputs, output_hidden_states=True).hidden_states if not training else None
    for layer, width in ((1, 4), (2, 6)):
        states = features.hidden_states[layer]
        assert states.shape[0] == 3
        assert states.shape[2] == width
        if maps is not None:
            _, _, rows, columns = maps[layer].shape
            assert columns == 2 * rows
            # A position is one place of the map, row by row, with all of its channels.
            assert torch.equal(states[1, columns + 2], maps[layer][1, :, 1, 2])
            assert states.shape[1] == rows * columns


@pytest.mark.parametrize("wrap", ["plain", "compiled", "peft"])
def test_layers_that_hold_several_blocks_are_refused_because_they_cannot_be_numbered(wrap):
    """Two inner blocks make four calls for two layers: "last" would take the second call of four."""
    config = AlbertConfig(**SIZES | {"num_hidden_layers": 2, "inner_group_num": 2}, embedding_size=16)
    model = AutoModelForSequenceClassification.from_config(config)
    enable_attention_capture(model)
    inputs = inputs_for(model)
    if wrap == "compiled":
        model = torch.compile(model, backend="eager")
    elif wrap == "peft":
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]))
    for layers, what in (((set(), {2}), "calls of its attention"), (({2}, set()), "hidden states after that of")):
        with pytest.raises(ValueError, match=rf"made 4 {what} .* num_hidden_layers=2, so that") as error:
            forward_with_features(model, inputs, *layers)
        assert "\n" not in str(error.value)
    assert forward_with_features(model, inputs, set(), set()).logits.shape == (4, 3)


def test_an_encoder_and_a_decoder_are_refused_because_they_cannot_be_numbered():
    settings = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    config = BartConfig(
        vocab_size=100, d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=40, **settings
    )
    model = BartModel(config).eval()
    enable_attention_capture(model)
    inputs = {name: make_batch()[name] for name in ("input_ids", "attention_mask")}

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.config = model, config

        def forward(self, **inputs):
            return self.model(**inputs).last_hidden_state[:, 0]

    # Two blocks of self-attention in each, and two of cross-attention.
    with pytest.raises(ValueError, match=r"made 6 calls of its attention function, .* num_hidden_layers=2, so that"):
        forward_with_features(Classifier(), inputs, set(), {2})


def test_a_module_whose_config_names_no_depth_is_numbered_by_its_calls():
    inner = build_enabled("distilbert")
    inputs = inputs_for(inner)
    for config in (None, SimpleNamespace(num_labels=3)):

        class Wrapper(nn.Module):
            def __init__(self, config):
                super().__init__()
                self.inner = inner
                if config is not None:
                    self.config = config

            def forward(self, **inputs):
                return self.inner(**inputs)

        found = forward_with_features(Wrapper(config), inputs, {1}, {2})
        assert (set(found.hidden_states), set(found.attentions)) == ({1}, {2})


def test_a_position_bias_is_refused_because_the_map_does_not_follow_from_queries_and_keys():
    class T5Attention(nn.Module):
        def forward(self, **changes):
            tensor = torch.randn(1, 2, 3, 4)
            return _capturing(lambda module, query, *_, **__: query)(self, tensor, tensor, tensor, None, **changes)

    for name, value in {"position_bias": torch.zeros(1, 2, 3, 3), "softcap": 30.0, "s_aux": torch.zeros(2)}.items():
        with pytest.raises(ValueError, match=f"T5Attention changes its scores by {name}, so that"):
            forward_with_features(T5Attention(), {name: value}, set(), {1})
        assert torch.is_tensor(forward_with_features(T5Attention(), {name: value}, set(), set()).logits)
        assert set(forward_with_features(T5Attention(), {name: None}, set(), {1}).attentions) == {1}


@pytest.mark.parametrize("is_causal", [True, False, None])
@pytest.mark.parametrize("scaling", [0.7, None])
@pytest.mark.parametrize("module_is_causal", [True, False])
def test_scaling_and_causality_are_those_of_the_call_or_else_of_sdpa_and_the_module(
    is_causal, scaling, module_is_causal
):
    """In float64: softmax over the keys of scaled scores, times values, is what SDPA gave."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 2, 4, 3, dtype=torch.float64, generator=generator) for _ in range(3))

    class Attention(nn.Module):
        def forward(self):
            self.is_causal = module_is_causal
            attend = _capturing(sdpa_attention_forward)
            return attend(self, query, key, value, None, scaling=scaling, is_causal=is_causal)

    found = forward_with_features(Attention(), {}, set(), {1})
    expected = log_attention_map(found.attentions[1]).exp() @ value
    torch.testing.assert_close(expected.transpose(1, 2), found.logits)


def test_dropout_is_that_of_sdpa():
    plain, captured = build("distilbert", "sdpa").train(), build_enabled("distilbert").train()
    inputs = inputs_for(plain)
    logits = []
    for model in (plain, captured):
        torch.manual_seed(0)
        logits.append(model(**inputs).logits)
    torch.testing.assert_close(*logits, rtol=0, atol=0)
    assert (logits[0] - plain.eval()(**inputs).logits).abs().max() > 1e-3


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
    assert _active.collectors == []
    model(**inputs_for(model))
    assert _active.collectors == []


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
