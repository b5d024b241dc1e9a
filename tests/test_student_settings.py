"""The student's settings: what they accept, what a result is known by, and which weights they stand for."""

import pytest
import torch
from helpers import BINARY, bert_config, label_config, make_tokenizer, parameters_of, seeded
from test_student_layers import jitter
from transformers import BertForSequenceClassification, set_seed

from distill_nlp.config_file import load_experiment
from distill_nlp.config_student import FromTeacher
from distill_nlp.errors import UsageError
from distill_nlp.materials import Materials

PLAIN = {"layers": 2, "select": "uniform", "architecture": "distilbert"}


def materials_of(path, **overrides):
    return Materials(load_experiment(path, {name.replace("__", "."): value for name, value in overrides.items()}))


@pytest.fixture
def trained(tmp_path):
    """Folder of a teacher after its training, its labels the other way round."""
    folder = tmp_path / "trained"
    config = bert_config(**label_config(BINARY[::-1]))
    jitter(seeded(7, lambda: BertForSequenceClassification(config))).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


# ---- what a result is known by ----


def test_settings_at_their_default_leave_the_fingerprint_as_it_was():
    assert FromTeacher(layers=2).chosen() == PLAIN
    stated = {"weights": "pretrained", "head": "auto", "width": None, "heads": None, "intermediate_size": None}
    assert FromTeacher(**PLAIN, **stated).chosen() == PLAIN


@pytest.mark.parametrize(
    "change", [{"weights": "finetuned"}, {"head": "random"}, {"width": 16}, {"heads": 2}, {"intermediate_size": 8}]
)
def test_other_settings_change_the_fingerprint(change):
    assert FromTeacher(layers=2, **change).chosen() == PLAIN | change


@pytest.mark.parametrize(
    ("name", "value"),
    [("weights", "trained"), ("head", "copied"), ("width", 0), ("heads", 0), ("intermediate_size", 0)],
)
def test_values_out_of_range_are_refused_by_name(experiment, name, value):
    with pytest.raises(UsageError, match=f"student.from_teacher.{name}: "):
        load_experiment(experiment(), {f"student.from_teacher.{name}": value})


# ---- the weights ----


@pytest.mark.parametrize("weights", ["pretrained", "finetuned"])
def test_finetuned_weights_are_those_of_the_teacher_after_its_training(experiment, trained, weights):
    materials = materials_of(experiment(), student__from_teacher__weights=weights)
    lines = []
    student = materials.new_student((str(trained), None), say=lines.append)
    after = BertForSequenceClassification.from_pretrained(trained)
    same = torch.equal(
        student.distilbert.embeddings.word_embeddings.weight, after.bert.embeddings.word_embeddings.weight
    )
    assert same == (weights == "finetuned")
    # The head in the order of the data's labels.
    assert torch.equal(student.classifier.weight, after.classifier.weight[[1, 0]]) == (weights == "finetuned")
    assert lines[0].endswith("head copied" if weights == "finetuned" else "head random")
    assert [student.config.id2label[i] for i in range(2)] == list(BINARY)


@pytest.mark.parametrize(("finetune", "copied"), [("auto", True), ("always", False)])
def test_a_teacher_that_is_finished_hands_its_head_over(experiment, trained, finetune, copied):
    materials = materials_of(experiment(), teacher__model=str(trained), teacher__finetune=finetune)
    lines = []
    student = materials.new_student(say=lines.append)
    teacher = BertForSequenceClassification.from_pretrained(trained)
    assert torch.equal(student.classifier.weight, teacher.classifier.weight[[1, 0]]) == copied
    assert lines[0].endswith("head copied" if copied else "head random")


def test_a_finetuned_teacher_without_its_head(experiment, trained):
    materials = materials_of(
        experiment(), student__from_teacher__weights="finetuned", student__from_teacher__head="random"
    )
    lines = []
    materials.new_student((str(trained), None), say=lines.append)
    assert lines[0].endswith("head random")


@pytest.mark.parametrize("weights", ["pretrained", "finetuned"])
def test_before_the_training_there_is_a_student_of_the_same_shapes(experiment, trained, weights):
    materials = materials_of(experiment(), student__from_teacher__weights=weights, student__from_teacher__width=16)
    early, late = materials.new_student(), materials.new_student((str(trained), None))
    shapes = [{name: tensor.shape for name, tensor in parameters_of(model).items()} for model in (early, late)]
    assert shapes[0] == shapes[1]
    assert early.config.dim == 16
    assert materials.objective is not None


def test_before_the_training_a_teacher_from_scratch_has_its_shapes_too(experiment, trained):
    materials = materials_of(experiment(), student__from_teacher__weights="finetuned", data__tokenizer=str(trained))
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 3, "intermediate_size": 8}
    materials.experiment.teacher.model = None
    materials.experiment.teacher.config = {"model_type": "bert", **sizes}
    student = materials.new_student()
    assert (student.config.dim, student.config.n_layers) == (16, 2)


@pytest.mark.parametrize("weights", ["pretrained", "finetuned"])
def test_the_start_follows_the_seed(experiment, trained, weights):
    materials = materials_of(experiment(), student__from_teacher__weights=weights)

    def start(seed):
        set_seed(seed)
        return parameters_of(materials.new_student((str(trained), None)))

    one, same, other = start(0), start(0), start(1)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert all(torch.equal(one[name], other[name]) for name in one) == (weights == "finetuned")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("width", 64, r"student.from_teacher.width must be in 1\.\.32 \(the teacher's\), got 64"),
        ("heads", 3, "student.from_teacher.heads must share the width 32"),
    ],
)
def test_what_does_not_fit_the_teacher_is_said_by_its_path(experiment, name, value, message):
    materials = materials_of(experiment(), **{f"student__from_teacher__{name}": value})
    with pytest.raises(UsageError, match=message):
        materials.check_student()


def test_an_override_is_said_by_its_path(experiment):
    materials = materials_of(experiment(), student__overrides={"dim": 16})
    with pytest.raises(UsageError, match="student.overrides.dim is set by from_teacher.width"):
        materials.check_student()
