"""Tasks over pairs of texts, from the training to what is delivered: segments, predict, exports."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import BINARY, label_config, make_student, make_teacher, make_tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer, RobertaConfig

from distill_nlp.cli import main
from distill_nlp.tokenization import with_segments

def without_segments():
    """A tokenizer that does not list `token_type_ids`, as DistilBERT's."""
    tokenizer = make_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.init_kwargs["model_input_names"] = list(tokenizer.model_input_names)
    return tokenizer


def saved(folder, model, tokenizer=None):
    model.save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    return str(folder)


def by_hand(folder, tokenizer, first, second, **settings):
    """The logits of each pair, one at a time, of the stock model."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        pairs = zip(first, second, strict=True)
        found = [model(**tokenizer(a, b, return_tensors="pt", **settings)).logits[0].numpy() for a, b in pairs]
    return np.stack(found)


# ---- what is saved with a model ----


def test_a_checkpoint_of_pairs_answers_by_its_own_tokenizer_as_in_the_report(experiment, tmp_path, no_doctor):
    backbone = tmp_path / "backbone"
    config = experiment(data__text_pair_column="other", student__from_teacher={"layers": 2, "architecture": "same"})
    without_segments().save_pretrained(backbone)
    assert "token_type_ids" not in AutoTokenizer.from_pretrained(backbone).model_input_names
    assert main(["run", str(config)]) == 0
    test = pd.read_parquet(tmp_path / "data" / "test.parquet")
    reported = np.load(tmp_path / "run" / "predictions.npz")
    for name, key in {"teacher": "teacher", "baseline/seed-0": "baseline/0", "student/seed-0": "student/0"}.items():
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / name)
        assert tokenizer.model_input_names == ["input_ids", "attention_mask", "token_type_ids"]
        found = by_hand(tmp_path / "run" / name, tokenizer, test.text, test.other)
        np.testing.assert_allclose(found, reported[key], atol=1e-5)


def test_only_models_that_tell_segments_apart_get_a_tokenizer_that_makes_them(tmp_path):
    plain, own = without_segments(), make_tokenizer()
    roberta = RobertaConfig(
        vocab_size=100, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, type_vocab_size=1
    )
    assert with_segments(plain, make_student()) is plain
    assert with_segments(plain, AutoModelForSequenceClassification.from_config(roberta)) is plain
    assert with_segments(own, make_teacher()) is own
    made = with_segments(plain, make_teacher())
    made.save_pretrained(tmp_path)
    for tokenizer in (made, AutoTokenizer.from_pretrained(tmp_path)):
        assert tokenizer("w4", "w5")["token_type_ids"] == [0, 0, 0, 1, 1]
    assert "token_type_ids" not in plain("w4", "w5")
