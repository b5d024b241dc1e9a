"""Narrower students: what of the teacher is kept, at full width all of it, and how near the rest comes."""

import importlib
import os
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers import LABELS, make_student, make_teacher, parameters_of, seeded
from test_student_layers import assert_same, jitter, make_family, outputs
from torch.nn.functional import linear
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, BertConfig

from distill_nlp import build_student
from distill_nlp.student_width import Sizes, choose_sizes, cut

BERT_TO_BERT = {"layers": 4, "architecture": "same"}
TEACHER = Sizes(width=32, heads=4, intermediate_size=48)
ROOT = Path(__file__).parents[1]
MINILM = Path(os.environ.get("DISTILL_NLP_MINILM", ROOT / "models" / "all-MiniLM-L6-v2"))
REVIEWS = ROOT.parent / "shared" / "data" / "imdb-small" / "validation.parquet"


def bert():
    """Scales and biases of the norms differ from column to column, as they do after training."""
    return jitter(make_teacher())


# ---- sizes ----


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (32, 4, 48)),
        ({"width": 32}, (32, 4, 48)),
        ({"width": 16}, (16, 2, 48)),
        ({"width": 8}, (8, 1, 32)),
        ({"width": 24}, (24, 3, 48)),
        # Not a multiple of the head's 8: as few heads as make none larger.
        ({"width": 20}, (20, 4, 48)),
        ({"width": 18}, (18, 3, 48)),
        ({"width": 16, "heads": 4}, (16, 4, 48)),
        ({"width": 16, "heads": 2, "intermediate_size": 5}, (16, 2, 5)),
        ({"intermediate_size": 10}, (32, 4, 10)),
    ],
)
@pytest.mark.parametrize("architecture", ["distilbert", "same"])
def test_what_is_not_given_follows_from_the_width(given, expected, architecture):
    student = build_student(LABELS, from_teacher={"layers": 2, "architecture": architecture} | given, teacher=bert())
    assert Sizes.of(student.config) == Sizes(*expected)
    names = (
        ("transformer.layer.0.ffn.lin1",) if architecture == "distilbert" else ("encoder.layer.0.intermediate.dense",)
    )
    assert student.base_model.get_submodule(*names).weight.shape == (expected[2], expected[0])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"width": 33}, r"from_teacher.width must be in 1\.\.32 \(the teacher's\), got 33"),
        ({"width": 0}, r"from_teacher.width must be in 1\.\.32 .* got 0"),
        ({"width": 31}, "width 31 cannot be shared by at most 4 heads of at most 8 .*: take a multiple of 8"),
        ({"width": 16, "heads": 8}, "heads must share the width 16 among at most 4 .* got 8; possible: 2, 4"),
        ({"width": 16, "heads": 3}, "heads must share the width 16 .* got 3"),
        ({"heads": 2}, "heads must share the width 32 .* got 2; possible: 4"),
        ({"width": 31, "heads": 2}, "got 2; possible: none"),
        ({"width": 16, "intermediate_size": 49}, r"from_teacher.intermediate_size must be in 1\.\.48 .* got 49"),
        ({"width": 16, "intermediate_size": 0}, r"from_teacher.intermediate_size must be in 1\.\.48 .* got 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(given, message):
    with pytest.raises(ValueError, match=message):
        build_student(LABELS, from_teacher={"layers": 2} | given, teacher=bert())


@pytest.mark.parametrize("name", ["width", "heads", "intermediate_size"])
def test_other_families_keep_their_sizes(name):
    with pytest.raises(ValueError, match="cut bert, roberta, .*, distilbert, this is mpnet: leave them out"):
        build_student(LABELS, from_teacher=BERT_TO_BERT | {name: 4}, teacher=make_family("mpnet"))


def test_at_full_width_a_wide_feed_forward_part_is_kept():
    assert choose_sizes(
        BertConfig(hidden_size=8, num_attention_heads=2, intermediate_size=100), 8, None, None
    ) == Sizes(8, 2, 100)


# ---- the weights ----


@pytest.mark.parametrize("architecture", ["distilbert", "same"])
def test_at_full_width_the_student_is_the_teacher(architecture):
    teacher = bert()
    recipe = {"layers": 4, "architecture": architecture}
    plain = build_student(LABELS, from_teacher=recipe, teacher=teacher)
    student = build_student(
        LABELS, from_teacher=recipe | {"width": 32, "heads": 4, "intermediate_size": 48}, teacher=teacher
    )
    assert_same(student, plain)
    torch.testing.assert_close(outputs(student)[1][4], outputs(teacher)[1][4], rtol=0, atol=1e-4)


def zeroed(teacher, columns, neurons, heads):
    """The teacher whose other columns of the states, neurons and heads are without effect: what a cut may lose."""
    gone = torch.ones(32, dtype=torch.bool)
    gone[columns] = False
    with torch.no_grad():
        embeddings = teacher.bert.embeddings
        norms = [embeddings.LayerNorm]
        for block in teacher.bert.encoder.layer:
            norms += [block.attention.output.LayerNorm, block.output.LayerNorm]
            idle = torch.ones(48, dtype=torch.bool)
            idle[neurons] = False
            block.output.dense.weight[:, idle] *= 1e-6
            silent = torch.ones(4, dtype=torch.bool)
            silent[heads] = False
            block.attention.output.dense.weight.unflatten(1, (4, 8))[:, silent] *= 1e-6
        for norm in norms:
            norm.weight[gone] *= 1e-6
    return teacher


@pytest.mark.parametrize("architecture", ["distilbert", "same"])
def test_the_weights_kept_are_those_of_the_largest_norms(architecture):
    columns, neurons, heads = torch.arange(1, 32, 2), torch.arange(3, 23), torch.tensor([1, 3])
    teacher = zeroed(bert(), columns, neurons, heads)
    recipe = {"layers": 1, "select": [2], "architecture": architecture, "width": 16, "intermediate_size": 20}
    student = build_student(LABELS, from_teacher=recipe, teacher=teacher)
    rows = torch.cat([torch.arange(8, 16), torch.arange(24, 32)])
    theirs = teacher.bert.encoder.layer[1]
    if architecture == "same":
        ours = student.bert.encoder.layer[0]
        query, key, value = (ours.attention.self.get_submodule(name) for name in ("query", "key", "value"))
        parts = [ours.attention.output.dense, ours.intermediate.dense, ours.output.dense]
        norms = [student.bert.embeddings.LayerNorm, ours.attention.output.LayerNorm, ours.output.LayerNorm]
    else:
        ours = student.distilbert.transformer.layer[0]
        query, key, value = (ours.attention.get_submodule(name) for name in ("q_lin", "k_lin", "v_lin"))
        parts = [ours.attention.out_lin, ours.ffn.lin1, ours.ffn.lin2]
        norms = [student.distilbert.embeddings.LayerNorm, ours.sa_layer_norm, ours.output_layer_norm]
    inner = theirs.attention.self
    for mine, source, outs, ins in (
        (query, inner.query, rows, columns),
        (key, inner.key, rows, columns),
        (value, inner.value, rows, columns),
        (parts[0], theirs.attention.output.dense, columns, rows),
        (parts[1], theirs.intermediate.dense, neurons, columns),
        (parts[2], theirs.output.dense, columns, neurons),
    ):
        assert torch.equal(mine.weight, source.weight[outs][:, ins])
        assert torch.equal(mine.bias, source.bias[outs])
    sources = [teacher.bert.embeddings.LayerNorm, theirs.attention.output.LayerNorm, theirs.output.LayerNorm]
    for mine, source in zip(norms, sources, strict=True):
        assert torch.equal(mine.weight, source.weight[columns])
        assert torch.equal(mine.bias, source.bias[columns])
    words = teacher.bert.embeddings.word_embeddings.weight
    assert torch.equal(student.get_input_embeddings().weight, words[:, columns])


@pytest.mark.parametrize(("reads", "writes"), [(1e-6, 1e3), (1e3, 1e-6)])
def test_what_a_part_reads_and_what_it_writes_count_together(reads, writes):
    """A head, or a neuron, that is loud on one side and without effect on the other is cut."""
    teacher = bert()
    block = teacher.bert.encoder.layer[0]
    with torch.no_grad():
        block.attention.self.value.weight[:8] *= reads
        block.attention.output.dense.weight[:, :8] *= writes
        block.intermediate.dense.weight[:4] *= reads
        block.output.dense.weight[:, :4] *= writes
    recipe = {"layers": 1, "select": "first", "architecture": "same", "width": 24, "intermediate_size": 44}
    student = build_student(LABELS, from_teacher=recipe, teacher=teacher).bert.encoder.layer[0]
    assert torch.equal(student.attention.self.query.bias, block.attention.self.query.bias[8:])
    assert torch.equal(student.intermediate.dense.bias, block.intermediate.dense.bias[4:])


def test_the_norms_of_blocks_that_are_left_out_do_not_count():
    teacher = bert()
    columns = torch.arange(0, 32, 2)
    with torch.no_grad():
        for norm in (teacher.bert.encoder.layer[0].output.LayerNorm, teacher.bert.embeddings.LayerNorm):
            norm.weight.fill_(1.0)
        teacher.bert.encoder.layer[0].attention.output.LayerNorm.weight.fill_(1.0)
        teacher.bert.encoder.layer[0].output.LayerNorm.weight[columns] = -2.0
        teacher.bert.encoder.layer[3].output.LayerNorm.weight.copy_(100.0 * torch.arange(32))
    student = build_student(
        LABELS, from_teacher={"layers": 1, "select": "first", "architecture": "same", "width": 16}, teacher=teacher
    )
    assert torch.equal(
        student.bert.embeddings.word_embeddings.weight, teacher.bert.embeddings.word_embeddings.weight[:, columns]
    )


def test_the_head_keeps_the_neurons_of_the_largest_norms():
    teacher = bert()
    kept = torch.arange(4, 20)
    with torch.no_grad():
        gone = torch.ones(32, dtype=torch.bool)
        gone[kept] = False
        teacher.classifier.weight[:, gone] *= 1e-6
        teacher.bert.encoder.layer[0].output.LayerNorm.weight.copy_(100.0 * (torch.arange(32) % 2))
    student = build_student(
        LABELS, from_teacher={"layers": 1, "select": "first", "architecture": "same", "width": 16}, teacher=teacher
    )
    assert torch.equal(student.classifier.weight, teacher.classifier.weight[:, kept])
    assert torch.equal(student.bert.pooler.dense.weight, teacher.bert.pooler.dense.weight[kept, 1::2])
    assert torch.equal(student.bert.pooler.dense.bias, teacher.bert.pooler.dense.bias[kept])


def test_without_a_head_the_pooler_is_cut_all_the_same():
    student = build_student(LABELS, from_teacher=BERT_TO_BERT | {"width": 16}, teacher=bert().bert)
    assert student.bert.pooler.dense.weight.shape == (16, 16)


KIN = [("roberta", {}), ("xlm-roberta", {}), ("camembert", {}), ("electra", {}), ("electra", {"embedding_size": 32})]


@pytest.mark.parametrize(("family", "changes"), KIN)
def test_the_kin_of_bert_is_cut_as_bert_is(family, changes, tmp_path):
    """A BERT of the same weights is cut to the same ones, embeddings of a width of their own aside."""
    teacher = make_family(family, **changes)
    own = "electra" if family == "electra" else "roberta"
    names = {"classifier.dense": "bert.pooler.dense", "classifier.out_proj": "classifier", f"{own}.": "bert."}
    recipe = {"layers": 3, "select": "first", "architecture": "same", "width": 20, "intermediate_size": 30}
    student = build_student(LABELS, from_teacher=recipe, teacher=teacher)
    assert Sizes.of(student.config) == Sizes(20, 4, 30)

    def as_bert(state):
        for theirs, berts in names.items():
            state = {key.replace(theirs, berts, 1) if key.startswith(theirs) else key: t for key, t in state.items()}
        return state

    taken = {key: t for key, t in as_bert(parameters_of(teacher)).items() if ".layer.3." not in key}
    projected = family == "electra" and not changes
    apart = {key for key in taken if projected and ".embeddings" in key}
    small = cut({key: t for key, t in taken.items() if key not in apart}, "bert", TEACHER, Sizes(20, 4, 30), depth=3)
    found = as_bert(parameters_of(student))
    assert found.keys() == taken.keys()
    assert [key for key, tensor in small.items() if not torch.equal(found[key], tensor)] == []
    if projected:
        columns = torch.stack([t.abs() for k, t in small_norms(taken)]).mean(0).argsort(descending=True)[:20].sort()[0]
        weight = "bert.embeddings_project.weight"
        assert torch.equal(found.pop(weight), taken[weight][columns])
        assert torch.equal(found["bert.embeddings_project.bias"], taken["bert.embeddings_project.bias"][columns])
        kept = apart - {weight, "bert.embeddings_project.bias"}
        assert len(kept) == 5
        assert all(torch.equal(found[key], taken[key]) for key in kept)
    # Reloads to the same logits, and nothing of it was drawn at random.
    student.save_pretrained(tmp_path)
    reloaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(outputs(reloaded)[0], outputs(student)[0])


def small_norms(state):
    return [(k, t) for k, t in state.items() if k.endswith("LayerNorm.weight") and len(t) == 32]


def test_the_encoder_of_a_roberta_is_cut_without_its_pooler():
    student = build_student(LABELS, from_teacher=BERT_TO_BERT | {"width": 16}, teacher=make_family("roberta").roberta)
    assert student.classifier.dense.weight.shape == (16, 16)
    backbone = AutoModel.from_config(make_family("roberta").config)
    assert hasattr(backbone, "pooler")
    student = build_student(LABELS, from_teacher=BERT_TO_BERT | {"width": 16}, teacher=backbone)
    assert student.roberta.encoder.layer[0].output.dense.weight.shape == (16, 48)


def test_a_width_at_which_an_electra_has_no_projection_is_refused():
    with pytest.raises(ValueError, match="width 16 is that of the embeddings, .* take another width"):
        build_student(LABELS, from_teacher=BERT_TO_BERT | {"width": 16}, teacher=make_family("electra"))


def test_a_distilbert_can_be_cut_too():
    teacher = jitter(make_student())
    recipe = {"layers": 2, "architecture": "same", "width": 16, "intermediate_size": 8}
    student = build_student(LABELS, from_teacher=recipe, teacher=teacher)
    assert (student.config.dim, student.config.n_heads, student.config.hidden_dim) == (16, 2, 8)
    assert student.pre_classifier.weight.shape == (16, 16)
    one, other = (seeded(s, lambda: build_student(LABELS, from_teacher=recipe, teacher=teacher)) for s in (0, 1))
    assert_same(one, other)


@pytest.mark.parametrize("rank", [3, 8])
def test_smaller_heads_are_the_best_of_their_rank(rank):
    """Scores and what a head writes, against the truncated SVD of the products, computed in the plain way."""
    teacher = bert()
    state = {key: tensor.double() for key, tensor in teacher.state_dict().items()}
    small = cut(parameters_of(teacher), "bert", TEACHER, Sizes(4 * rank, 4, 48), depth=4)
    columns = teacher_columns(teacher, 4 * rank)
    block = "bert.encoder.layer.2.attention."
    states = torch.randn(6, 4 * rank, generator=torch.Generator().manual_seed(0))

    def both(weights, name, head, size):
        rows = slice(head * size, (head + 1) * size)
        return torch.cat(
            [weights[f"{block}self.{name}.weight"][rows], weights[f"{block}self.{name}.bias"][rows, None]], 1
        )

    for head in range(4):
        query, key, value = (
            torch.cat([part[:, :-1][:, columns], part[:, -1:]], 1)
            for part in (both(state, name, head, 8) for name in ("query", "key", "value"))
        )
        out = state[f"{block}output.dense.weight"][columns][:, head * 8 : (head + 1) * 8]
        extended = torch.cat([states.double(), torch.ones(6, 1)], 1)
        scores = extended @ best(query.T @ key, rank) @ extended.T / 8**0.5
        written = extended @ best(out @ value, rank).T
        q, k, v = (
            linear(torch.cat([states, torch.ones(6, 1)], 1), both(small, n, head, rank))
            for n in ("query", "key", "value")
        )
        torch.testing.assert_close((q @ k.T / rank**0.5).double(), scores, rtol=1e-3, atol=1e-3)
        mine = linear(v, small[f"{block}output.dense.weight"][:, head * rank : (head + 1) * rank])
        torch.testing.assert_close(mine.double(), written, rtol=1e-3, atol=1e-3)


def teacher_columns(teacher, width):
    scales = [p.abs() for name, p in teacher.named_parameters() if name.endswith("LayerNorm.weight")]
    return torch.stack(scales).mean(0).argsort(descending=True)[:width].sort().values


def best(product, rank):
    u, values, vh = torch.linalg.svd(product)
    return u[:, :rank] * values[:rank] @ vh[:rank]


@pytest.mark.parametrize("architecture", ["distilbert", "same"])
@pytest.mark.parametrize("sizes", [{"width": 16}, {"width": 20}, {"width": 16, "heads": 4}, {"intermediate_size": 7}])
def test_reloading_gives_the_same_logits(architecture, sizes, tmp_path):
    recipe = {"layers": 2, "architecture": architecture} | sizes
    student = build_student(LABELS, from_teacher=recipe, teacher=bert())
    student.save_pretrained(tmp_path)
    reloaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert torch.equal(outputs(reloaded)[0], outputs(student)[0])
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}


def test_a_half_precision_teacher_can_be_cut():
    student = build_student(LABELS, from_teacher={"layers": 2, "width": 20}, teacher=bert().to(torch.bfloat16))
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}


# ---- how near it comes ----


def first_columns(encoder, width, heads, neurons):
    """The same encoder cut to the first columns, heads and neurons."""
    config = BertConfig(
        **encoder.config.to_dict() | {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": neurons}
    )
    small = seeded(0, lambda: AutoModel.from_config(config))
    with torch.no_grad():
        for name, parameter in small.named_parameters():
            source = encoder.get_parameter(name)
            parameter.copy_(source[tuple(slice(0, n) for n in parameter.shape)])
    return small


def states_of(encoder, inputs):
    """Of each layer, the states of all real tokens."""
    with torch.no_grad():
        found = encoder.eval()(**inputs, output_hidden_states=True).hidden_states
    return [states[inputs["attention_mask"].bool()] for states in found]


def distance(found, expected):
    """Squared distance over the variance of what is expected."""
    return ((found - expected).square().sum() / (expected - expected.mean(0)).square().sum()).item()


def explained(ours, theirs):
    """Part of the variance of the teacher's states that a linear map of the student's gives, on tokens left out."""
    ours = torch.cat([ours, torch.ones(len(ours), 1)], 1).double()
    theirs, fitted = theirs.double(), len(ours) * 2 // 3
    gram = ours[:fitted].T @ ours[:fitted] + 0.1 * torch.eye(ours.shape[1])
    weights = torch.linalg.solve(gram, ours[:fitted].T @ theirs[:fitted])
    rest, mean = theirs[fitted:] - ours[fitted:] @ weights, theirs[:fitted].mean(0)
    return 1 - (rest.square().sum() / (theirs[fitted:] - mean).square().sum()).item()


def states_of_three(teacher, recipe, inputs):
    """Of the encoder cut by norm, cut to what stands first, and of random weights."""
    student = build_student(LABELS, from_teacher=recipe, teacher=teacher).base_model
    sizes = Sizes.of(student.config)
    first = first_columns(teacher.base_model, sizes.width, sizes.heads, sizes.intermediate_size)
    random = seeded(0, lambda: AutoModel.from_config(student.config))
    return [states_of(encoder, inputs) for encoder in (student, first, random)]


def test_at_half_width_it_is_nearer_to_the_teacher_than_random_weights_and_the_first_columns():
    teacher = bert()
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            # As in trained models: columns of small scale in one norm are so in most, and a block adds a little.
            if name.endswith("LayerNorm.weight"):
                parameter.copy_(torch.linspace(0.1, 2.0, 32) + 0.05 * parameter)
            elif name.endswith("output.dense.weight"):
                parameter.mul_(0.1)
    inputs = {"input_ids": torch.randint(4, 100, (40, 12), generator=torch.Generator().manual_seed(0))}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    expected = states_of(teacher.bert, inputs)
    mine, first, random = states_of_three(teacher, BERT_TO_BERT | {"width": 16}, inputs)
    columns = teacher_columns(teacher, 16)
    for layer in (1, 2, 3, 4):
        nearest, kept = distance(mine[layer], expected[layer][:, columns]), explained(mine[layer], expected[layer])
        assert nearest < 0.8 * distance(first[layer], expected[layer][:, :16])
        assert nearest < 0.8 * distance(random[layer], expected[layer][:, columns])
        assert kept > 0.1 + explained(first[layer], expected[layer])
        assert kept > 0.1 + explained(random[layer], expected[layer])


@pytest.fixture
def width_benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("width")


def test_the_benchmark_puts_a_teacher_into_another_basis(width_benchmark, monkeypatch):
    """With the columns that the package picks for a basis, it is the package's student; the svd's is orthonormal."""
    teacher = bert().bert
    basis = torch.eye(32)[:, teacher_columns(teacher, 16)]
    assert_same(width_benchmark.in_basis(teacher, basis, 16), width_benchmark.by_columns(teacher, 16))
    found = []
    monkeypatch.setattr(width_benchmark, "in_basis", lambda teacher, basis, width: found.append(basis))
    width_benchmark.by_svd(teacher, 16)
    width_benchmark.by_svd(teacher, 16, mean_apart=True)
    for basis in found:
        torch.testing.assert_close(basis.T @ basis, torch.eye(16), rtol=0, atol=1e-5)
    # What a LayerNorm takes out of the states is their mean; of the new columns it is the same direction.
    torch.testing.assert_close(found[1] @ torch.full((16,), 0.25), torch.full((32,), 32**-0.5), rtol=0, atol=1e-5)


@pytest.mark.real_data
def test_at_half_width_a_minilm_keeps_more_than_its_first_columns_or_random_weights():
    """all-MiniLM-L6-v2 with its tokenizer, as for configs/imdb_small.yaml, or the folder in DISTILL_NLP_MINILM."""
    for path in (MINILM, REVIEWS):
        if not path.exists():
            pytest.skip(f"no {path}")
    teacher = AutoModel.from_pretrained(MINILM, dtype=torch.float32)
    texts = pd.read_parquet(REVIEWS)["text"].tolist()[:48]
    tokenizer = AutoTokenizer.from_pretrained(MINILM)
    inputs = dict(tokenizer(texts, truncation=True, max_length=48, padding=True, return_tensors="pt"))
    expected = states_of(teacher, inputs)
    recipe = {"layers": 6, "architecture": "same", "width": 192}
    mine, first, random = states_of_three(teacher, recipe, inputs)
    columns = teacher_columns(teacher, 192)
    for layer in (1, 3, 6):
        nearest, kept = distance(mine[layer], expected[layer][:, columns]), explained(mine[layer], expected[layer])
        assert nearest < 0.8 * distance(first[layer], expected[layer][:, :192])
        assert kept > 0.05 + explained(first[layer], expected[layer])
        assert kept > 0.1 + explained(random[layer], expected[layer])
