"""Students of the teacher's layers, family by family: each block where it belongs, nothing left at random."""

import logging

import pytest
import torch
from helpers import LABELS, bert_config, label_config, make_batch, make_student, make_teacher, parameters_of, seeded
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, BertForSequenceClassification

from distill_nlp import build_student

DEPTH = 4
COMMON = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
RELATIVE = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 8,
    "max_position_embeddings": 16,
}
FAMILIES = {
    "bert": {},
    "roberta": {},
    "xlm-roberta": {},
    "electra": {"embedding_size": 16},
    "distilbert": {},
    "mpnet": {},
    "deberta-v2": RELATIVE | {"share_att_key": True, "norm_rel_ebd": "layer_norm", "conv_kernel_size": 3},
    "modernbert": {
        "cls_token_id": 2,
        "sep_token_id": 3,
        "local_attention": 4,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    },
    "camembert": {},
    "ernie": {},
}
EACH = pytest.mark.parametrize("family", FAMILIES)


def jitter(model, seed=3):
    """Noise on each parameter: fresh norms and biases are all alike, and would hide an exchange."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def make_family(family, **changes):
    config = AutoConfig.for_model(family, **(COMMON | FAMILIES[family] | label_config() | changes))
    return jitter(seeded(1, lambda: AutoModelForSequenceClassification.from_config(config)))


def outputs(model):
    batch = make_batch()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        found = model.eval()(**inputs, output_hidden_states=True)
    return found.logits, [states[batch["attention_mask"].bool()] for states in found.hidden_states]


def blocks_of(model):
    return next(m for m in model.base_model.modules() if isinstance(m, nn.ModuleList))


def assert_same(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


# ---- each family ----


@EACH
def test_with_all_blocks_and_the_head_the_student_is_the_teacher(family):
    teacher = make_family(family)
    student = build_student(LABELS, from_teacher={"layers": DEPTH, "architecture": "same"}, teacher=teacher)
    assert type(student) is type(teacher)
    (logits, states), (expected, expected_states) = outputs(student), outputs(teacher)
    assert len(states) == DEPTH + 1
    assert expected.std() > 0.01
    for found, wanted in zip([logits, *states], [expected, *expected_states], strict=True):
        assert torch.equal(found, wanted)


@EACH
def test_each_block_is_the_chosen_one_of_the_teacher(family):
    teacher = make_family(family)
    recipe = {"layers": 2, "select": [1, 3], "architecture": "same"}
    student = build_student(LABELS, from_teacher=recipe, teacher=teacher)
    assert student.config.num_hidden_layers == len(blocks_of(student)) == 2
    assert_same(blocks_of(student)[0], blocks_of(teacher)[0])
    assert_same(blocks_of(student)[1], blocks_of(teacher)[2])


@EACH
def test_the_first_blocks_give_the_teachers_states(family):
    teacher = make_family(family)
    recipe = {"layers": 2, "select": "first", "architecture": "same"}
    student = build_student(LABELS, from_teacher=recipe, teacher=teacher)
    found, expected = outputs(student)[1], outputs(teacher)[1]
    # ModernBERT has one more norm over its last states.
    for layer in range(2 if family == "modernbert" else 3):
        assert torch.equal(found[layer], expected[layer])


@EACH
def test_reloading_gives_the_same_logits_with_no_key_missing_or_over(family, tmp_path):
    teacher = make_family(family)
    student = build_student(LABELS, from_teacher={"layers": 2, "architecture": "same"}, teacher=teacher)
    student.save_pretrained(tmp_path)
    reloaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(outputs(reloaded)[0], outputs(student)[0])


@EACH
def test_nothing_is_drawn_at_random(family):
    teacher = make_family(family)
    recipe = {"layers": 2, "architecture": "same"}
    one, other = (seeded(s, lambda: build_student(LABELS, from_teacher=recipe, teacher=teacher)) for s in (0, 1))
    assert_same(one, other)


@EACH
def test_the_encoder_alone_gives_all_but_the_head(family, tmp_path):
    """`AutoModel` gives some families a pooler that their classifier does not have."""
    make_family(family).save_pretrained(tmp_path)
    encoder = AutoModel.from_pretrained(tmp_path)
    recipe = {"layers": 2, "select": "last", "architecture": "same"}
    one, other = (seeded(s, lambda: build_student(LABELS, from_teacher=recipe, teacher=encoder)) for s in (0, 1))
    assert_same(one.base_model, other.base_model)
    assert not torch.equal(outputs(one)[0], outputs(other)[0])


# ---- what is special about one ----


def test_electra_keeps_the_projection_of_its_embeddings():
    teacher = make_family("electra")
    student = build_student(LABELS, from_teacher={"layers": 1, "architecture": "same"}, teacher=teacher)
    assert student.config.embedding_size == 16
    assert_same(student.electra.embeddings_project, teacher.electra.embeddings_project)


@pytest.mark.parametrize(
    ("select", "types"), [([1, 3], ["full", "sliding"]), ("last", ["sliding", "full"]), ([2, 4], ["sliding", "full"])]
)
def test_the_kinds_of_attention_go_with_their_blocks(select, types, tmp_path):
    recipe = {"layers": 2, "select": select, "architecture": "same"}
    student = build_student(LABELS, from_teacher=recipe, teacher=make_family("modernbert"))
    expected = [f"{kind}_attention" for kind in types]
    assert student.config.layer_types == expected
    assert [block.attention_type for block in student.model.layers] == expected
    student.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).layer_types == expected


@pytest.mark.parametrize("biases", [False, True])
def test_the_norm_before_the_attention_is_folded_into_modernberts_first_block(biases):
    teacher = make_family("modernbert", norm_bias=biases, attention_bias=biases)
    recipe = {"layers": 2, "select": [2, 4], "architecture": "same"}
    student = build_student(LABELS, from_teacher=recipe, teacher=teacher)
    ours, theirs = student.model.layers[0], teacher.model.layers[1]
    normalized = torch.nn.functional.layer_norm(seeded(0, lambda: torch.randn(5, 32)), (32,))
    expected = theirs.attn.Wqkv(normalized * theirs.attn_norm.weight + (theirs.attn_norm.bias if biases else 0))
    torch.testing.assert_close(ours.attn.Wqkv(normalized), expected, rtol=1e-4, atol=1e-5)
    assert_same(ours.mlp, theirs.mlp)
    assert_same(student.model.layers[1], teacher.model.layers[3])


def test_modernberts_first_block_can_only_be_the_first():
    recipe = {"layers": 2, "select": [3, 1], "architecture": "same"}
    with pytest.raises(ValueError, match=r"select: block 1 of a modernbert has no norm .* got \[3, 1\]"):
        build_student(LABELS, from_teacher=recipe, teacher=make_family("modernbert"))


def test_a_norm_bias_that_has_no_place_is_left_out():
    teacher = make_family("modernbert", norm_bias=True)
    student = build_student(LABELS, from_teacher={"layers": 2, "architecture": "same"}, teacher=teacher)
    assert student.model.layers[0].attn.Wqkv.bias is None
    assert torch.isfinite(outputs(student)[0]).all()


def test_an_albert_is_refused_in_plain_words():
    config = AutoConfig.for_model("albert", **COMMON, embedding_size=16)
    with pytest.raises(ValueError, match="cannot take layers of this albert: its layers share one block; give student"):
        build_student(LABELS, from_teacher={"layers": 1, "architecture": "same"}, teacher=AutoModel.from_config(config))


def test_a_model_whose_blocks_are_not_those_of_its_config_is_refused():
    teacher = make_teacher()
    teacher.bert.encoder.layer.append(teacher.bert.encoder.layer[0])
    with pytest.raises(ValueError, match="this bert: its blocks do not stand in one list"):
        build_student(LABELS, from_teacher={"layers": 2}, teacher=teacher)


def test_an_encoder_with_a_decoder_is_refused():
    sizes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": 100}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    teacher = AutoModel.from_config(AutoConfig.for_model("bart", **sizes, **heads))
    with pytest.raises(ValueError, match="this bart: its blocks do not stand in one list"):
        build_student(LABELS, from_teacher={"layers": 1, "architecture": "same"}, teacher=teacher)


@pytest.mark.parametrize("family", ["roberta", "electra"])
def test_distilbert_is_made_of_a_bert_only(family):
    with pytest.raises(ValueError, match=f'needs a BERT teacher, this is {family}: use architecture "same"'):
        build_student(LABELS, from_teacher={"layers": 1}, teacher=make_family(family))


def test_distilbert_has_the_settings_of_the_bert():
    settings = {"hidden_act": "relu", "pad_token_id": 5, "initializer_range": 0.07}
    teacher = make_teacher(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3, **settings)
    config = build_student(LABELS, from_teacher={"layers": 2}, teacher=teacher).config
    assert (config.activation, config.pad_token_id, config.initializer_range) == ("relu", 5, 0.07)
    assert (config.dropout, config.attention_dropout) == (0.2, 0.3)
    assert (config.vocab_size, config.max_position_embeddings) == (100, 40)


def test_a_weight_that_has_no_place_is_named():
    teacher = make_teacher()
    teacher.bert.register_parameter("extra", nn.Parameter(torch.zeros(2)))
    with pytest.raises(ValueError, match="cannot copy a bert: bert.extra has no partner"):
        build_student(LABELS, from_teacher={"layers": 2, "architecture": "same"}, teacher=teacher)


def test_a_weight_that_is_missing_is_named():
    teacher = make_teacher()
    teacher.bert.encoder.layer[1].output.dense.bias = None
    with pytest.raises(ValueError, match="cannot copy a bert: bert.encoder.layer.0.output.dense.bias has no partner"):
        build_student(LABELS, from_teacher={"layers": 2, "architecture": "same"}, teacher=teacher)


@pytest.mark.parametrize("epsilon", [1e-12, 1e-5])
def test_a_small_epsilon_of_the_norms_hardly_matters_to_distilbert(epsilon):
    teacher = make_teacher(layer_norm_eps=epsilon)
    student = build_student(LABELS, from_teacher={"layers": 4}, teacher=teacher)
    torch.testing.assert_close(outputs(student)[1][4], outputs(teacher)[1][4], rtol=0, atol=1e-3)


def test_a_large_epsilon_of_the_norms_is_refused_for_distilbert():
    teacher = make_teacher(layer_norm_eps=1e-3)
    with pytest.raises(ValueError, match=r"LayerNorm epsilon of 1e-12, the teacher 0\.001, .* use architecture"):
        build_student(LABELS, from_teacher={"layers": 2}, teacher=teacher)
    student = build_student(LABELS, from_teacher={"layers": 2, "architecture": "same"}, teacher=teacher)
    assert student.config.layer_norm_eps == 1e-3


def test_a_bert_without_a_pooler_gives_the_rest():
    teacher = seeded(1, lambda: BertForSequenceClassification(bert_config())).bert
    teacher.pooler = None
    recipe = {"layers": 2, "architecture": "same"}
    one, other = (seeded(s, lambda: build_student(LABELS, from_teacher=recipe, teacher=teacher)) for s in (0, 1))
    assert_same(one.bert.encoder, other.bert.encoder)
    assert not torch.equal(one.bert.pooler.dense.weight, other.bert.pooler.dense.weight)


# ---- settings ----


@pytest.mark.parametrize("architecture", ["distilbert", "same"])
@pytest.mark.parametrize(
    ("name", "instead"), [("num_hidden_layers", "layers"), ("hidden_size", "width"), ("num_attention_heads", "heads")]
)
def test_sizes_are_no_overrides(architecture, name, instead):
    with pytest.raises(ValueError, match=f"overrides.{name} is set by from_teacher.{instead}"):
        build_student(
            LABELS,
            from_teacher={"layers": 2, "architecture": architecture},
            teacher=make_teacher(),
            overrides={name: 2},
        )


@pytest.mark.parametrize(
    ("name", "instead"), [("n_layers", "layers"), ("dim", "width"), ("hidden_dim", "intermediate")]
)
def test_sizes_are_no_overrides_by_distilberts_names_either(name, instead):
    with pytest.raises(ValueError, match=f"overrides.{name} is set by from_teacher.{instead}"):
        build_student(LABELS, from_teacher={"layers": 2}, teacher=make_teacher(), overrides={name: 2})


def test_an_override_that_changes_a_shape_is_named():
    with pytest.raises(
        ValueError, match=r"overrides \(vocab_size\) make .*word_embeddings.weight \(50, 32\), .*100, 32"
    ):
        build_student(LABELS, from_teacher={"layers": 2}, teacher=make_teacher(), overrides={"vocab_size": 50})


@pytest.mark.parametrize("architecture", ["distilbert", "same"])
def test_an_override_of_a_wrong_type_is_refused_in_one_line(architecture):
    with pytest.raises(
        ValueError, match=r"^overrides: no valid config for this student: .*(attention_dropout|hidden_act)"
    ):
        build_student(
            LABELS,
            from_teacher={"layers": 2, "architecture": architecture},
            teacher=make_teacher(),
            overrides={"attention_dropout" if architecture == "distilbert" else "hidden_act": ["x"]},
        )


def test_other_overrides_reach_the_model():
    overrides = {"hidden_dropout_prob": 0.3, "problem_type": "multi_label_classification"}
    student = build_student(
        LABELS, from_teacher={"layers": 1, "architecture": "same"}, teacher=make_teacher(), overrides=overrides
    )
    assert student.bert.encoder.layer[0].output.dropout.p == 0.3
    assert student.config.problem_type == "multi_label_classification"


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({}, "from_teacher.layers is needed"),
        ({"layers": True}, "layers must be in 1..4 .* got True"),
        ({"layers": 2, "select": [True, 2]}, r"select must name 2 blocks .* got \[True, 2\]"),
        ({"layers": 2, "select": [1.0, 2.0]}, r"select must name 2 blocks .* got \[1.0, 2.0\]"),
        ({"layers": 2, "select": ["a", "b"]}, r"select must name 2 blocks .* got \['a', 'b'\]"),
        ({"layers": 2, "width": 16.0}, "from_teacher.width must be in 1..32 .* got 16.0"),
        ({"layers": 2, "heads": True}, "heads"),
        ({"layers": 2, "intermediate_size": "many"}, "from_teacher.intermediate_size must be in 1..48 .* got 'many'"),
    ],
)
def test_numbers_that_are_none_are_refused_by_name(recipe, message):
    with pytest.raises(ValueError, match=message):
        build_student(LABELS, from_teacher=recipe, teacher=make_teacher())


@pytest.mark.parametrize(
    ("recipe", "line"),
    [
        ({"layers": 2}, "student: 2 of 4 blocks (2, 4) of bert, distilbert, head copied"),
        (
            {"layers": 1, "select": "first", "architecture": "same", "head": "random"},
            "student: 1 of 4 blocks (1) of bert, bert, head random",
        ),
        (
            {"layers": 2, "width": 16, "intermediate_size": 20},
            "student: 2 of 4 blocks (2, 4) of bert, distilbert, width 16, 2 heads, 20 neurons, head copied",
        ),
    ],
)
def test_one_line_says_what_was_made(recipe, line, caplog):
    lines = []
    build_student(LABELS, from_teacher=recipe, teacher=make_teacher(), say=lines.append)
    assert lines == [line]
    with caplog.at_level(logging.INFO, "distill_nlp"):
        build_student(LABELS, from_teacher=recipe, teacher=make_teacher())
    assert line in caplog.messages


def test_the_teacher_stays_as_it_was():
    teacher = make_student()
    before, depth = parameters_of(teacher), teacher.config.n_layers
    build_student(LABELS, from_teacher={"layers": 1, "architecture": "same", "width": 8}, teacher=teacher)
    assert all(torch.equal(tensor, before[name]) for name, tensor in parameters_of(teacher).items())
    assert teacher.config.n_layers == depth


def test_sizes_in_overrides_that_the_teacher_has_not_are_named_without_the_settings_of_the_labels():
    settings = {"from_teacher": {"layers": 2}, "overrides": {"vocab_size": 50}}
    with pytest.raises(ValueError, match=r"overrides \(vocab_size\) make .* the teacher has .*: leave the size out"):
        build_student(LABELS, **settings, teacher=make_teacher(), problem_type="multi_label_classification")
