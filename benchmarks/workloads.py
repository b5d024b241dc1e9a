"""What is trained on: pairs of models with random weights, rows of given or of real lengths, and their batches."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedTokenizerFast,
)

VOCABULARY = 30522
SHARED = Path(__file__).resolve().parents[2] / "shared"
# Width, heads, layers of the teacher, layers of the student.
MODELS = {"tiny": (64, 2, 2, 1), "minilm": (384, 12, 6, 3), "base": (768, 12, 12, 6)}
_MEGABATCH = 50


@dataclass(frozen=True)
class Pair:
    """A teacher and what makes students beside it.

    Args:
        name: of `MODELS`.
        device: where both live.
    """

    name: str
    device: torch.device

    def teacher(self) -> BertForSequenceClassification:
        width, heads, layers, _ = MODELS[self.name]
        torch.manual_seed(0)
        config = BertConfig(
            hidden_size=width,
            num_attention_heads=heads,
            num_hidden_layers=layers,
            intermediate_size=4 * width,
            vocab_size=VOCABULARY,
        )
        return BertForSequenceClassification(config).to(self.device).eval().requires_grad_(False)

    def student(self, attention_dropout: float) -> DistilBertForSequenceClassification:
        width, heads, _, layers = MODELS[self.name]
        torch.manual_seed(1)
        config = DistilBertConfig(
            dim=width,
            n_heads=heads,
            n_layers=layers,
            hidden_dim=4 * width,
            vocab_size=VOCABULARY,
            attention_dropout=attention_dropout,
        )
        return DistilBertForSequenceClassification(config).to(self.device).train()


def fixed_rows(count: int, tokens: int) -> Dataset:
    """Rows of one length."""
    return random_rows([tokens] * count)


def imdb_rows(count: int, longest: int) -> tuple[Dataset, str]:
    """Rows of the lengths of IMDB reviews, cut; and where the lengths are from."""
    reviews, vocabulary = SHARED / "data" / "imdb" / "train.parquet", SHARED / "models" / "bert-base-uncased-tokenizer"
    if not (reviews.is_file() and vocabulary.is_dir()):
        drawn = np.random.default_rng(0).lognormal(5.4, 0.65, count).astype(int)
        return random_rows(np.clip(drawn, 12, longest).tolist()), "lengths drawn from a log-normal like IMDB's"
    from transformers import AutoTokenizer

    texts = Dataset.from_parquet(str(reviews)).shuffle(seed=0).select(range(count))["text"][:]
    encoded = AutoTokenizer.from_pretrained(vocabulary)(texts, truncation=True, max_length=longest)
    return random_rows([len(ids) for ids in encoded["input_ids"]]), "lengths of IMDB reviews"


def random_rows(lengths: list[int]) -> Dataset:
    """Rows of random tokens."""
    rng = np.random.default_rng(1)
    ids = [rng.integers(1000, VOCABULARY, length).tolist() for length in lengths]
    labels = rng.integers(0, 2, len(lengths)).tolist()
    return Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * n for n in lengths], "labels": labels})


def padder() -> PreTrainedTokenizerFast:
    """A tokenizer that pads, and that is all."""
    tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]"))
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_input_names=names
    )


def batches_of(data: Dataset, size: int, grouped: bool, seed: int) -> list[list[int]]:
    """Row numbers of each batch of an epoch: at random, or grouped by length as Transformers' sampler does it."""
    rows = random.Random(seed).sample(range(len(data)), len(data))
    if not grouped:
        return [rows[start : start + size] for start in range(0, len(rows), size)]
    lengths = [len(ids) for ids in data["input_ids"]]
    found = []
    for start in range(0, len(rows), _MEGABATCH * size):
        own = sorted(rows[start : start + _MEGABATCH * size], key=lambda row: -lengths[row])
        found += [own[first : first + size] for first in range(0, len(own), size)]
    random.Random(seed).shuffle(found)
    return found


def padded_share(data: Dataset, batches: list[list[int]]) -> float:
    """Tokens that are computed for each real one, each batch padded to its longest row."""
    lengths = [len(ids) for ids in data["input_ids"]]
    computed = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    return computed / sum(lengths[row] for batch in batches for row in batch)


def machine(device: torch.device) -> dict[str, Any]:
    """Where it ran."""
    from distill_nlp.report import machine as of_report

    return {**of_report(device), "torch": torch.__version__}
