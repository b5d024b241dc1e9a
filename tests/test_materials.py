"""What the stages share, taken from data and settings."""

import pandas as pd
import pytest
from helpers import make_tokenizer
from transformers import AutoTokenizer

from distill_nlp.config import DataSection
from distill_nlp.config_file import load_experiment
from distill_nlp.errors import UsageError
from distill_nlp.materials import Materials
from distill_nlp.teacher_parts import prepared


def write(folder, labels):
    folder.mkdir()
    for split in ("train", "validation", "test"):
        rows = labels if split == "train" else [0, 1] * 4
        table = pd.DataFrame({"text": [f"w{4 + label} w{10 + i}" for i, label in enumerate(rows)], "label": rows})
        table.to_parquet(folder / f"{split}.parquet")
    return str(folder)


def test_balanced_class_weights_are_those_of_the_training_rows(experiment, tmp_path):
    data = write(tmp_path / "uneven", [0] * 9 + [1] * 3)
    config = experiment(data__dataset=data, losses={"ce": {"class_weights": "balanced"}, "kl": {}})
    materials = Materials(load_experiment(config))
    assert materials.new_losses()["ce"].class_weights.tolist() == pytest.approx([12 / (2 * 9), 12 / (2 * 3)])


def test_balanced_class_weights_need_a_row_of_each_class(experiment, tmp_path):
    data = write(tmp_path / "two_of_three", [0] * 9 + [1] * 3)
    names = ["bad", "good", "mixed"]
    config = experiment(data__dataset=data, data__label_names=names, losses={"ce": {"class_weights": "balanced"}})
    with pytest.raises(UsageError, match=r"losses\.ce\.class_weights: balanced needs a training row of each class"):
        Materials(load_experiment(config)).new_losses()


def test_the_students_attention_dropout_is_that_of_the_settings(experiment):
    student = Materials(load_experiment(experiment(student__attention_dropout=0.25))).new_student()
    assert student.config.attention_dropout == 0.25


@pytest.mark.parametrize(
    ("settings", "rate"),
    [
        ({}, 0.0),
        ({"student__attention_dropout": None}, 0.1),
        ({"student__overrides": {"attention_dropout": 0.2}}, 0.2),
        ({"student__overrides": {"dropout": 0.2}}, 0.0),
    ],
    ids=["by default", "as it has it", "overrides", "other overrides"],
)
def test_students_have_no_attention_dropout_unless_it_is_set(experiment, settings, rate):
    student = Materials(load_experiment(experiment(**settings))).new_student()
    assert student.config.attention_dropout == rate
    inside = [m.dropout.p for n, m in student.named_modules() if n.endswith(".attention")]
    assert inside
    assert set(inside) == {rate}


def test_the_side_that_texts_are_cut_on_is_saved_where_no_text_was_read(tmp_path):
    """As where all tokens are found in the cache of the datasets library: a second seed, a run that goes on."""
    data = DataSection(dataset="any", truncation_side="left")
    prepared(make_tokenizer(), data, 16).save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert (saved.truncation_side, saved.model_max_length) == ("left", 16)
