"""How long a text may be: models that are asked at the limit, and beyond it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers import BINARY, label_config, make_teacher, make_tokenizer, seeded
from transformers import AutoConfig, AutoModelForSequenceClassification, RobertaConfig, XLNetConfig

from distill_nlp.candidates import open_candidate
from distill_nlp.cli import main
from distill_nlp.config_file import load_experiment
from distill_nlp.errors import UsageError
from distill_nlp.inference import encoded_rows
from distill_nlp.lengths import longest_input, most_positions
from distill_nlp.materials import Materials
from distill_nlp.stage_training import TrainingJob

SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
}
MORE = {
    "albert": {"embedding_size": 16},
    "distilbert": {"dim": 32, "n_layers": 1, "n_heads": 4},
    "esm": {"mask_token_id": 4},
    "longformer": {"attention_window": [8]},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
}
FROM_PADDING = (
    "camembert",
    "data2vec-text",
    "esm",
    "ibert",
    "longformer",
    "luke",
    "markuplm",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)
FROM_ZERO = ("albert", "bert", "distilbert", "electra")
LONG = " ".join(f"w{4 + i % 90}" for i in range(100))


def answers(model, length: int) -> bool:
    ids = torch.full((1, length), 7)
    try:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("kind", FROM_PADDING + FROM_ZERO)
def test_a_model_reads_so_many_tokens_and_not_one_more(kind, padding):
    config = AutoConfig.for_model(kind, pad_token_id=padding, **SIZES, **MORE.get(kind, {}))
    model = AutoModelForSequenceClassification.from_config(config).eval()
    longest = most_positions(config)
    assert longest == 40 - (0 if kind in FROM_ZERO else 2 if kind == "mpnet" else padding + 1)
    assert answers(model, longest)
    assert not answers(model, longest + 1)


def test_the_smallest_limit_counts():
    tokenizer, config = make_tokenizer(), make_teacher().config
    assert longest_input(config, tokenizer) == 32
    assert longest_input(config, tokenizer, 12) == 12
    tokenizer.model_max_length = int(1e30)
    assert longest_input(config, tokenizer) == 40
    assert longest_input(None, tokenizer, 50) == 50


def test_a_model_without_positions_sets_no_limit():
    assert most_positions(XLNetConfig()) is None
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = int(1e30)
    assert longest_input(XLNetConfig(), tokenizer) is None
    assert longest_input(XLNetConfig(), tokenizer, 12) == 12
    (row,) = encoded_rows(tokenizer, [LONG], None, None)
    assert len(row["input_ids"]) == 102


@pytest.fixture
def roberta(tmp_path):
    """A checkpoint of 38 positions for tokens, whose tokenizer says nothing of a length."""
    config = RobertaConfig(**SIZES, pad_token_id=1, **label_config(BINARY))
    seeded(1, lambda: AutoModelForSequenceClassification.from_config(config)).save_pretrained(tmp_path / "roberta")
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = int(1e30)
    tokenizer.save_pretrained(tmp_path / "roberta")
    return str(tmp_path / "roberta")


def test_predict_and_compare_cut_where_the_model_ends(roberta, capsys):
    # 36 words and the template are what it reads; the rest changes nothing.
    assert main(["predict", roberta, LONG, " ".join(LONG.split()[:36])]) == 0
    whole, cut = (line.split("\t")[:2] for line in capsys.readouterr().out.splitlines())
    assert whole == cut
    from datasets import Dataset

    candidate = open_candidate(roberta)
    candidate.read(Dataset.from_dict({"text": [LONG], "labels": [0]}))
    assert len(candidate.rows[0]["input_ids"]) == 38


def test_a_stage_refuses_a_length_beyond_the_positions(roberta):
    model = AutoModelForSequenceClassification.from_pretrained(roberta)
    TrainingJob._check_length(SimpleNamespace(model=model, max_length=38, name="student"))
    with pytest.raises(
        UsageError, match=r"data\.max_length is 39, but the model of the stage student reads at most 38"
    ):
        TrainingJob._check_length(SimpleNamespace(model=model, max_length=39, name="student"))


def test_a_length_beyond_the_positions_is_refused_before_training(experiment, roberta):
    student = {"layers": 1, "architecture": "same"}
    config = experiment(teacher__model=roberta, data__max_length=39, student__from_teacher=student)
    with pytest.raises(UsageError, match=r"data\.max_length is 39, but the teacher reads at most 38 tokens"):
        _ = Materials(load_experiment(config)).objective


@pytest.mark.parametrize(("biased", "limit"), [(False, None), (True, 40)])
def test_a_deberta_without_a_table_of_positions_reads_longer_texts(biased, limit):
    settings = SIZES | {"position_biased_input": biased, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
    config = AutoConfig.for_model("deberta-v2", **settings)
    assert most_positions(config) == limit
    model = AutoModelForSequenceClassification.from_config(config).eval()
    if not biased:
        assert model(input_ids=torch.full((1, 60), 5)).logits.isfinite().all()
