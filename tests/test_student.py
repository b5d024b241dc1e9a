"""Students from a checkpoint, from a config and from the teacher's layers."""

import os

import pytest
import torch
from helpers import (
    LABELS,
    bert_config,
    distilbert_config,
    label_config,
    make_batch,
    make_student,
    make_teacher,
    parameters_of,
    seeded,
)
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    DistilBertForSequenceClassification,
)

from distill_nlp import build_student
from distill_nlp.capture import enable_attention_capture, forward_with_features
from distill_nlp.errors import DistillError
from distill_nlp.loading import checkpoint_print, load_classifier
from distill_nlp.student import attention_dropout_name
from distill_nlp.student_layers import select_layers

SMALL = {"model_type": "distilbert", "dim": 24, "n_layers": 2, "n_heads": 3, "hidden_dim": 32, "vocab_size": 100}
SIX_LAYERS = {"num_hidden_layers": 6}


def hidden_states(model, segment_ids=None):
    batch = make_batch()
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    if segment_ids is not None:
        inputs["token_type_ids"] = segment_ids
    depth = model.config.num_hidden_layers
    with torch.no_grad():
        found = forward_with_features(model.eval(), inputs, set(range(depth + 1)), set())
    return [found.hidden_states[layer] for layer in range(depth + 1)], batch["attention_mask"].bool()


# ---- exactly one way ----


@pytest.mark.parametrize(
    "ways", [{}, {"model": "x", "config": SMALL}, {"config": SMALL, "from_teacher": {"layers": 1}}]
)
def test_exactly_one_way_is_given(ways):
    with pytest.raises(ValueError, match="exactly one of model, config and from_teacher"):
        build_student(LABELS, **ways)


# ---- from a config ----


def test_from_config_has_the_sizes_and_the_labels():
    lines = []
    student = build_student(LABELS, config=SMALL, say=lines.append)
    assert lines == ["student: distilbert from scratch"]
    assert isinstance(student, DistilBertForSequenceClassification)
    assert (student.config.dim, student.config.n_layers, student.config.n_heads) == (24, 2, 3)
    assert student.config.id2label == dict(enumerate(LABELS))
    assert student.config.label2id == {label: i for i, label in enumerate(LABELS)}
    assert student.classifier.out_features == 3
    assert student.dtype == torch.float32


def test_from_config_takes_the_common_names_too_and_overrides():
    config = {"model_type": "distilbert", "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3}
    student = build_student(
        LABELS, config=config | {"vocab_size": 100}, overrides={"attention_dropout": 0.0, "num_hidden_layers": 2}
    )
    assert (student.config.dim, student.config.n_layers, student.config.attention_dropout) == (24, 2, 0.0)


def test_from_config_follows_the_seed_and_leaves_the_setting_as_it_was():
    config = dict(SMALL)
    one, same, other = (seeded(seed, lambda: build_student(LABELS, config=config)) for seed in (0, 0, 1))
    assert torch.equal(one.classifier.weight, same.classifier.weight)
    assert not torch.equal(one.classifier.weight, other.classifier.weight)
    assert config == SMALL


def test_from_config_for_several_labels_of_a_row():
    student = build_student(LABELS, config=SMALL, overrides={"problem_type": "multi_label_classification"})
    assert student.config.problem_type == "multi_label_classification"


@pytest.mark.parametrize("problem_type", [None, "single_label_classification", "multi_label_classification"])
def test_the_kind_of_task_goes_into_the_config_where_it_is_given(problem_type):
    assert build_student(LABELS, config=SMALL, problem_type=problem_type).config.problem_type == problem_type


def test_overrides_of_another_kind_of_task_are_refused():
    overrides = {"problem_type": "regression"}
    expected = "overrides.problem_type is regression, but the labels are those of multi_label_classification"
    with pytest.raises(ValueError, match=expected):
        build_student(LABELS, config=SMALL, overrides=overrides, problem_type="multi_label_classification")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hiden_size": 24}, "config: distilbert does not know hiden_size"),
        ({"dropuot": 0.1, "a": 1}, "does not know a, dropuot"),
        ({"model_type": "distilbertt"}, "must name a Transformers model, e.g. \"distilbert\", got 'distilbertt'"),
        ({"model_type": None}, "config.model_type must name a Transformers model, .* got None"),
        ({"n_heads": 5}, "24|5"),
    ],
)
def test_from_config_refuses_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        build_student(LABELS, config=SMALL | changes)


# ---- from a checkpoint ----


def test_from_a_checkpoint_keeps_the_body_and_makes_a_head(tmp_path):
    make_student(**label_config(("no", "yes"))).save_pretrained(tmp_path)
    lines = []
    student = build_student(LABELS, model=str(tmp_path), say=lines.append)
    assert lines == [f"student: distilbert from {tmp_path}"]
    source = DistilBertForSequenceClassification.from_pretrained(tmp_path)
    assert student.classifier.out_features == 3
    assert student.config.id2label == dict(enumerate(LABELS))
    body, theirs = parameters_of(student.distilbert), parameters_of(source.distilbert)
    assert all(torch.equal(body[name], theirs[name]) for name in theirs)


INF = float("inf")


@pytest.mark.parametrize(
    ("values", "finite"), [([3e38] * 4, True), ([float("nan")], False), ([INF], False), ([INF, -INF], False)]
)
def test_weights_that_are_not_finite_are_told_from_large_ones(tmp_path, values, finite):
    """The sum of a few of the largest numbers is infinite, and each of them is not."""
    broken = make_student()
    with torch.no_grad():
        broken.pre_classifier.weight[0, : len(values)] = torch.tensor(values)
    broken.save_pretrained(tmp_path)
    if finite:
        assert build_student(LABELS, model=str(tmp_path)).pre_classifier.weight[0, 0] == values[0]
    else:
        with pytest.raises(DistillError, match="1 of its weights are not finite, the first is .*pre_classifier.weight"):
            build_student(LABELS, model=str(tmp_path))


def test_a_half_precision_checkpoint_is_trained_in_float32(tmp_path):
    make_student().half().save_pretrained(tmp_path)
    assert build_student(LABELS, model=str(tmp_path)).dtype == torch.float32


def test_under_fsdp_each_rank_loads_its_own_weights(tmp_path, monkeypatch):
    """As a launcher says it by default, the others would wait for those of the first, and theirs be missing."""
    make_student().save_pretrained(tmp_path)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    seen, load = [], AutoModelForSequenceClassification.from_pretrained

    def spied(*arguments, **settings):
        seen.append(os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"])
        return load(*arguments, **settings)

    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", spied)
    load_classifier(str(tmp_path))
    assert (seen, os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"]) == (["false"], "true")


# ---- from the teacher ----


def make_bert(**changes):
    return seeded(1, lambda: BertForSequenceClassification(bert_config(**changes))).eval()


def test_distilbert_with_all_blocks_has_the_hidden_states_of_the_bert():
    """The token-type embedding of segment 0 stands in the position embeddings."""
    teacher = make_bert()
    student = build_student(LABELS, from_teacher={"layers": 4}, teacher=teacher)
    assert isinstance(student, DistilBertForSequenceClassification)
    segment = teacher.bert.embeddings.token_type_embeddings.weight[0]
    assert segment.abs().max() > 0.1
    expected, real = hidden_states(teacher)
    found, _ = hidden_states(student)
    assert len(found) == len(expected) == 5
    for layer in range(5):
        torch.testing.assert_close(found[layer][real], expected[layer][real], rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", ["distilbert", "same"])
def test_the_first_block_of_a_shallow_student_is_the_teachers(architecture):
    teacher = make_bert()
    student = build_student(
        LABELS, from_teacher={"layers": 2, "select": "first", "architecture": architecture}, teacher=teacher
    )
    expected, real = hidden_states(teacher)
    found, _ = hidden_states(student)
    for layer in (0, 1, 2):
        torch.testing.assert_close(found[layer][real], expected[layer][real], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("select", "layers", "blocks"),
    [
        ("uniform", 3, [2, 4, 6]),
        ("uniform", 1, [6]),
        ("uniform", 6, [1, 2, 3, 4, 5, 6]),
        ("first", 2, [1, 2]),
        ("last", 2, [5, 6]),
        ([1, 6], 2, [1, 6]),
        ((3, 3, 1), 3, [3, 3, 1]),
    ],
)
@pytest.mark.parametrize("architecture", ["distilbert", "same"])
def test_takes_the_blocks_asked_for(select, layers, blocks, architecture):
    assert select_layers(select, layers, 6) == blocks
    teacher = make_bert(**SIX_LAYERS)
    student = build_student(
        LABELS, from_teacher={"layers": layers, "select": select, "architecture": architecture}, teacher=teacher
    )
    assert student.config.num_hidden_layers == layers
    for new, block in enumerate(blocks):
        theirs = teacher.bert.encoder.layer[block - 1]
        if architecture == "distilbert":
            ours = student.distilbert.transformer.layer[new]
            pairs = [
                (ours.attention.q_lin, theirs.attention.self.query),
                (ours.attention.k_lin, theirs.attention.self.key),
                (ours.attention.v_lin, theirs.attention.self.value),
                (ours.attention.out_lin, theirs.attention.output.dense),
                (ours.sa_layer_norm, theirs.attention.output.LayerNorm),
                (ours.ffn.lin1, theirs.intermediate.dense),
                (ours.ffn.lin2, theirs.output.dense),
                (ours.output_layer_norm, theirs.output.LayerNorm),
            ]
        else:
            pairs = [(student.bert.encoder.layer[new], theirs)]
        for mine, source in pairs:
            assert all(
                torch.equal(a, b) for a, b in zip(mine.state_dict().values(), source.state_dict().values(), strict=True)
            )


@pytest.mark.parametrize("architecture", ["distilbert", "same"])
def test_student_and_teacher_share_no_memory(architecture):
    teacher = make_bert()
    before = parameters_of(teacher)
    student = build_student(LABELS, from_teacher={"layers": 2, "architecture": architecture}, teacher=teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in parameters_of(teacher).items())
    assert teacher.config.num_hidden_layers == 4
    assert all(parameter.requires_grad for parameter in student.parameters())


@pytest.mark.parametrize("architecture", ["distilbert", "same"])
def test_a_frozen_half_precision_teacher_on_capturing_attention_gives_a_plain_float32_student(architecture):
    teacher = make_bert().to(torch.bfloat16).requires_grad_(False)
    teacher.config.dtype = torch.bfloat16
    enable_attention_capture(teacher)
    student = build_student(LABELS, from_teacher={"layers": 2, "architecture": architecture}, teacher=teacher)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    assert student.config._attn_implementation == "sdpa"
    assert all(parameter.requires_grad for parameter in student.parameters())
    # What is added up on the way (positions, the head) is not rounded to the teacher's precision.
    same = build_student(LABELS, from_teacher={"layers": 2, "architecture": architecture}, teacher=teacher.float())
    assert all(torch.equal(tensor, parameters_of(same)[name]) for name, tensor in parameters_of(student).items())


@pytest.mark.parametrize("architecture", ["distilbert", "same"])
def test_settings_of_the_student_win_over_the_teachers(architecture):
    names = ("bad", "good")
    student = build_student(
        names,
        from_teacher={"layers": 2, "architecture": architecture},
        teacher=make_bert(),
        overrides={"initializer_range": 0.5},
    )
    assert student.config.id2label == {0: "bad", 1: "good"}
    assert student.config.num_labels == 2
    assert student.classifier.out_features == 2
    assert student.config.initializer_range == 0.5


@pytest.mark.parametrize("architecture", ["distilbert", "same"])
def test_reloading_gives_the_same_logits(architecture, tmp_path):
    student = build_student(LABELS, from_teacher={"layers": 2, "architecture": architecture}, teacher=make_bert())
    student.eval().save_pretrained(tmp_path)
    reloaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    inputs = {name: make_batch()[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        torch.testing.assert_close(reloaded.eval()(**inputs).logits, student(**inputs).logits, rtol=0, atol=1e-7)
    assert reloaded.config.num_hidden_layers == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": 0}, r"from_teacher.layers must be in 1\.\.4 \(the teacher's depth\), got 0"),
        ({"layers": 5}, r"must be in 1\.\.4 .* got 5"),
        ({"layers": 2, "select": "middle"}, "select must be uniform, first, last or a list, got 'middle'"),
        ({"layers": "2"}, r"must be in 1\.\.4 .* got '2'"),
        ({"layers": 2, "select": [1]}, r"must name 2 blocks in 1\.\.4, counted from 1, got \[1\]"),
        ({"layers": 2, "select": [0, 4]}, r"must name 2 blocks in 1\.\.4, counted from 1, got \[0, 4\]"),
        ({"layers": 2, "architecture": "tiny"}, "from_teacher.architecture must be distilbert or same, got 'tiny'"),
        ({"layers": 2, "head": "copied"}, "from_teacher.head must be auto or random, got 'copied'"),
    ],
)
def test_from_teacher_refuses_what_does_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        build_student(LABELS, from_teacher=settings, teacher=make_bert())


@pytest.mark.parametrize("architecture", ["distilbert", "same"])
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"pad_token_id": 5000}, "^overrides: no student can be made with them: AssertionError: Padding_idx"),
        ({"num_labels": 5}, "^overrides.num_labels: the labels are those of the data: leave it out$"),
        ({"id2label": {0: "a"}}, "^overrides.id2label: the labels are those of the data"),
        ({"label2id": {"a": 0}}, "^overrides.label2id: the labels are those of the data"),
    ],
)
def test_overrides_that_no_model_can_be_made_of(overrides, message, architecture):
    recipe = {"layers": 2, "architecture": architecture}
    with pytest.raises(ValueError, match=message):
        build_student(LABELS, from_teacher=recipe, teacher=make_bert(), overrides=overrides)


@pytest.mark.parametrize("architecture", ["distilbert", "same"])
def test_an_activation_that_there_is_not(architecture):
    name = "activation" if architecture == "distilbert" else "hidden_act"
    with pytest.raises(ValueError, match="^overrides: no student can be made with them: KeyError: .*gelu2"):
        build_student(
            LABELS,
            from_teacher={"layers": 2, "architecture": architecture},
            teacher=make_bert(),
            overrides={name: "gelu2"},
        )


@pytest.mark.parametrize("name", ["num_labels", "id2label", "label2id"])
def test_a_config_from_scratch_does_not_name_the_labels(name):
    config = {"model_type": "distilbert", "dim": 32, "n_heads": 4, name: 5}
    with pytest.raises(ValueError, match=f"^config.{name}: the labels are those of the data: leave it out$"):
        build_student(LABELS, config=config)


@pytest.mark.parametrize("architecture", ["distilbert", "same"])
def test_a_teacher_with_adapters_is_to_be_merged_first(architecture):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(make_bert(), peft.LoraConfig(task_type="SEQ_CLS", r=2))
    recipe = {"layers": 2, "architecture": architecture}
    with pytest.raises(ValueError, match=r"^from_teacher needs a model without adapters: .*merge_and_unload\(\)"):
        build_student(LABELS, from_teacher=recipe, teacher=adapted)
    assert build_student(LABELS, from_teacher=recipe, teacher=adapted.merge_and_unload()) is not None


def test_from_teacher_needs_a_teacher_of_a_known_kind():
    with pytest.raises(ValueError, match="from_teacher needs the teacher's model"):
        build_student(LABELS, from_teacher={"layers": 2})
    distilbert = DistilBertForSequenceClassification(distilbert_config())
    with pytest.raises(ValueError, match='needs a BERT teacher, this is distilbert: use architecture "same"'):
        build_student(LABELS, from_teacher={"layers": 1}, teacher=distilbert)
    student = build_student(LABELS, from_teacher={"layers": 1, "architecture": "same"}, teacher=distilbert)
    assert student.config.n_layers == 1


# ---- attention dropout ----


@pytest.mark.parametrize("way", ["config", "teacher as DistilBERT", "teacher as it is", "checkpoint"])
def test_attention_dropout_reaches_the_attention_under_any_name(tmp_path, way):
    teacher = BertForSequenceClassification(bert_config())
    teacher.save_pretrained(tmp_path)
    ways = {
        "config": {"config": SMALL},
        "teacher as DistilBERT": {"from_teacher": {"layers": 1}, "teacher": teacher},
        "teacher as it is": {"from_teacher": {"layers": 1, "architecture": "same"}, "teacher": teacher},
        "checkpoint": {"model": str(tmp_path)},
    }
    labels = LABELS if way != "checkpoint" else list(teacher.config.id2label.values())
    for rate in (0.0, 0.25):
        student = build_student(labels, **ways[way], attention_dropout=rate)
        name = attention_dropout_name(student.config)
        assert name == (
            "attention_dropout" if "DistilBERT" in way or way == "config" else "attention_probs_dropout_prob"
        )
        assert getattr(student.config, name) == rate
        inside = [
            m.dropout.p
            for n, m in student.named_modules()
            if n.endswith(("attention", "attention.self")) and isinstance(getattr(m, "dropout", None), torch.nn.Dropout)
        ]
        assert inside
        assert set(inside) == {rate}


def test_attention_dropout_that_is_set_twice_or_unknown_is_refused():
    with pytest.raises(ValueError, match="set twice, also as attention_dropout: leave one of them out"):
        build_student(LABELS, config=SMALL, overrides={"attention_dropout": 0.1}, attention_dropout=0.0)
    with pytest.raises(ValueError, match="set twice"):
        build_student(LABELS, config={**SMALL, "attention_dropout": 0.1}, attention_dropout=0.0)
    with pytest.raises(ValueError, match="attention_dropout is none of fnet's settings"):
        build_student(LABELS, config={"model_type": "fnet"}, attention_dropout=0.0)


def test_automatic_attention_dropout_is_zero_where_nothing_sets_it():
    name = "attention_dropout"
    assert build_student(LABELS, config=SMALL, attention_dropout="auto").config.attention_dropout == 0
    for given in ({"config": {**SMALL, name: 0.3}}, {"config": SMALL, "overrides": {name: 0.3}}):
        assert build_student(LABELS, **given, attention_dropout="auto").config.attention_dropout == 0.3
    small = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16, "vocab_size": 50}
    fnet = build_student(LABELS, config={"model_type": "fnet", **small}, attention_dropout="auto")
    assert attention_dropout_name(fnet.config) is None


def test_gpt2_has_attention_dropout_too():
    small = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 50, "pad_token_id": 0}
    for rate, wanted in (("auto", 0.0), (0.25, 0.25), (None, 0.1)):
        assert build_student(LABELS, config=small, attention_dropout=rate).config.attn_pdrop == wanted


def test_a_checkpoint_is_known_by_its_content(tmp_path):
    """Also where a file is written anew under the same name, with as many bytes."""
    prints = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model = make_student()
        with torch.no_grad():
            model.classifier.bias.fill_(float(seed))
        model.save_pretrained(tmp_path)
        prints.append(checkpoint_print(str(tmp_path)))
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize("architecture", ["bert", "distilbert"])
def test_a_finished_head_answers_in_the_order_of_the_data(tmp_path, architecture):
    make = {"bert": make_teacher, "distilbert": make_student}[architecture]
    make(**label_config(("good", "bad"))).save_pretrained(tmp_path)
    old, new = load_classifier(str(tmp_path)).eval(), build_student(["Bad", "Good"], model=str(tmp_path)).eval()
    batch = {"input_ids": torch.tensor([[2, 5, 6, 3]])}
    torch.testing.assert_close(new(**batch).logits, old(**batch).logits[:, [1, 0]])
    # Other names say nothing of an order.
    other = build_student(["dull", "lively"], model=str(tmp_path)).eval()
    torch.testing.assert_close(other(**batch).logits, old(**batch).logits)
