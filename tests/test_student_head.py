"""The head that a student takes over: for the same labels by name, in the student's order."""

import pytest
import torch
from helpers import BINARY, LABELS, label_config, make_batch, make_teacher, seeded
from test_student_layers import make_family, outputs
from transformers import AutoModelForMaskedLM

from distill_nlp import build_student
from distill_nlp.student_head import distilbert_head, head_state

EVERY_HEAD = pytest.mark.parametrize("family", ["bert", "roberta", "electra", "distilbert", "deberta-v2", "modernbert"])
SWAPPED = ("positive", "negative", "neutral")


@EVERY_HEAD
@pytest.mark.parametrize("names", [SWAPPED, ("POSITIVE", "Negative", "neutral")])
def test_the_logits_come_in_the_students_order(family, names):
    teacher = make_family(family)
    student = build_student(names, from_teacher={"layers": 4, "architecture": "same"}, teacher=teacher)
    expected = outputs(teacher)[0][:, [2, 0, 1]]
    assert not torch.allclose(expected, outputs(teacher)[0], atol=1e-3)
    torch.testing.assert_close(outputs(student)[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta"])
def test_other_layers_with_as_many_outputs_as_labels_stay_as_they_are(family):
    names = [f"class {i}" for i in range(32)]
    teacher = make_family(family, **label_config(names))
    student = build_student(names[::-1], from_teacher={"layers": 4, "architecture": "same"}, teacher=teacher)
    torch.testing.assert_close(outputs(student)[0], outputs(teacher)[0].flip(1), rtol=0, atol=1e-6)


@EVERY_HEAD
def test_of_more_labels_the_students_are_taken(family):
    teacher = make_family(family)
    student = build_student(
        ("positive", "negative"), from_teacher={"layers": 4, "architecture": "same"}, teacher=teacher
    )
    torch.testing.assert_close(outputs(student)[0], outputs(teacher)[0][:, [2, 0]], rtol=0, atol=1e-6)


@EVERY_HEAD
@pytest.mark.parametrize(
    ("names", "head"),
    [(("cat", "dog", "cow"), "auto"), (BINARY, "auto"), ((*LABELS, "more"), "auto"), (LABELS, "random")],
)
def test_else_the_whole_head_is_drawn(family, names, head):
    teacher, lines = make_family(family), []
    recipe = {"layers": 2, "architecture": "same", "head": head}
    one, other = (
        seeded(s, lambda: build_student(names, from_teacher=recipe, teacher=teacher, say=lines.append)) for s in (0, 1)
    )
    prefix = f"{one.base_model_prefix}."
    drawn = [
        not torch.equal(ours, dict(other.named_parameters())[name])
        for name, ours in one.named_parameters()
        if name.endswith("weight") and "norm" not in name and not name.startswith(prefix)
    ]
    assert drawn
    assert all(drawn)
    assert all(line.endswith("head random") for line in lines)


def test_names_that_say_nothing_are_taken_in_their_order():
    anonymous = label_config(("LABEL_0", "LABEL_1", "LABEL_2"))
    teacher = make_teacher(**anonymous)
    student = build_student(LABELS, from_teacher={"layers": 4, "architecture": "same"}, teacher=teacher)
    assert torch.equal(outputs(student)[0], outputs(teacher)[0])


def test_the_pooler_of_a_bert_is_copied_without_a_head_too():
    teacher = make_teacher()
    recipe = {"layers": 2, "architecture": "same", "head": "random"}
    student = build_student(LABELS, from_teacher=recipe, teacher=teacher)
    assert torch.equal(student.bert.pooler.dense.weight, teacher.bert.pooler.dense.weight)
    assert not torch.equal(student.classifier.weight, teacher.classifier.weight)


def test_a_model_with_another_task_has_no_head_to_give():
    config = make_teacher().config
    language_model = AutoModelForMaskedLM.from_config(config)
    assert head_state(language_model, config) == {}
    student = build_student(LABELS, from_teacher={"layers": 2, "architecture": "same"}, teacher=language_model)
    assert torch.equal(
        student.bert.encoder.layer[1].output.dense.weight, language_model.bert.encoder.layer[3].output.dense.weight
    )


def test_a_head_with_other_parts_is_drawn_whole():
    teacher, lines = make_family("modernbert"), []
    student = build_student(
        LABELS,
        from_teacher={"layers": 2, "architecture": "same"},
        teacher=teacher,
        overrides={"classifier_bias": True},
        say=lines.append,
    )
    assert teacher.head.dense.bias is None
    assert student.head.dense.bias is not None
    for name in ("head.dense.weight", "classifier.weight", "classifier.bias"):
        assert not torch.equal(student.get_parameter(name), teacher.get_parameter(name))
    assert lines[0].endswith("head random")


def test_a_head_of_another_shape_is_drawn_whole():
    lines = []
    student = build_student(
        LABELS,
        from_teacher={"layers": 2, "architecture": "same"},
        teacher=make_family("deberta-v2"),
        overrides={"pooler_hidden_size": 16},
        say=lines.append,
    )
    assert student.pooler.dense.weight.shape == (16, 16)
    assert lines[0].endswith("head random")


# ---- BERT to DistilBERT ----


def distilbert_logits(teacher, **changes):
    student = build_student(LABELS, from_teacher={"layers": 4}, teacher=teacher)
    with torch.no_grad():
        for name, tensor in changes.items():
            student.get_parameter(name.replace("__", ".")).copy_(tensor)
    return outputs(student)[0]


def error(found, expected):
    return ((found - expected).square().sum() / (expected - expected.mean(0)).square().sum()).item()


@pytest.mark.parametrize("scale", [0.05, 0.3])
def test_distilberts_head_is_closest_to_the_teachers_with_the_pooler_shifted_by_one(scale):
    """Closer than the pooler as it is, under ReLU for tanh, and than the classifier over a drawn pre_classifier."""
    teacher = make_teacher()
    with torch.no_grad():
        teacher.bert.pooler.dense.weight.mul_(scale)
    expected = outputs(teacher)[0]
    pooler, classifier = teacher.bert.pooler.dense, teacher.classifier
    shifted = error(distilbert_logits(teacher), expected)
    plain = {"pre_classifier__bias": pooler.bias, "classifier__bias": classifier.bias}
    drawn = plain | {"pre_classifier__weight": seeded(0, lambda: 0.3 * torch.randn(32, 32))}
    assert shifted < 0.25 * error(distilbert_logits(teacher, **plain), expected)
    assert shifted < 0.25 * error(distilbert_logits(teacher, **drawn), expected)
    assert shifted < 1


def test_distilberts_head_is_a_bounded_identity_in_the_place_of_tanh():
    draw = torch.Generator().manual_seed(0)
    pooler = {"weight": torch.randn(6, 6, generator=draw), "bias": torch.randn(6, generator=draw)}
    classifier = {"weight": torch.randn(3, 6, generator=draw), "bias": torch.randn(3, generator=draw)}
    states = torch.randn(20, 6, generator=draw)
    head = distilbert_head(pooler, classifier)
    hidden = torch.relu(states @ head["pre_classifier.weight"].T + head["pre_classifier.bias"])
    logits = hidden @ head["classifier.weight"].T + head["classifier.bias"]
    inner = (states @ pooler["weight"].T + pooler["bias"]).clamp(min=-1)
    torch.testing.assert_close(logits, inner @ classifier["weight"].T + classifier["bias"])


def test_the_labels_of_distilberts_head_are_in_the_students_order():
    teacher = make_teacher()
    straight = build_student(LABELS, from_teacher={"layers": 4}, teacher=teacher)
    swapped = build_student(SWAPPED, from_teacher={"layers": 4}, teacher=teacher)
    torch.testing.assert_close(outputs(swapped)[0], outputs(straight)[0][:, [2, 0, 1]], rtol=0, atol=1e-6)


def test_without_a_head_distilberts_is_drawn_whole():
    encoder = make_teacher().bert
    one, other = (seeded(s, lambda: build_student(LABELS, from_teacher={"layers": 2}, teacher=encoder)) for s in (0, 1))
    assert not torch.equal(one.pre_classifier.weight, other.pre_classifier.weight)
    assert not torch.equal(one.pre_classifier.weight, encoder.pooler.dense.weight)
    assert not torch.equal(one.classifier.weight, other.classifier.weight)


def test_the_head_is_trained_with_the_rest():
    student = build_student(LABELS, from_teacher={"layers": 2}, teacher=make_teacher())
    batch = make_batch()
    student.train()(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]
    ).loss.backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert student.pre_classifier.weight.grad.abs().max() > 0
