"""Fixtures of all tests. No test needs a network: the Hub is switched off before anything is imported."""

from __future__ import annotations

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import helpers
import pytest


@pytest.fixture(scope="session", autouse=True)
def _frozen_imports():
    """Each `Trainer.train()` runs a full garbage collection: 0.3 s over what PyTorch and Transformers import."""
    gc.freeze()


@pytest.fixture
def make_teacher():
    """`make_teacher(**config changes)`: a fresh tiny BERT, the same each time; in eval."""
    return helpers.make_teacher


@pytest.fixture
def make_student():
    """`make_student(**config changes)`: a fresh tiny DistilBERT of other width, depth and head count."""
    return helpers.make_student


@pytest.fixture
def tokenizer():
    return helpers.make_tokenizer()


@pytest.fixture
def dataset():
    """16 rows of ragged token ids, two of them without a label."""
    return helpers.make_dataset(unlabeled=(1, 6))


@pytest.fixture
def batch():
    """4 rows of different lengths, padded."""
    return helpers.make_batch()


@pytest.fixture
def make_trainer(tmp_path):
    """`make_trainer(folder name, **settings)`: see `helpers.make_trainer`."""

    def make(name: str = "run", **settings):
        return helpers.make_trainer(tmp_path / name, **settings)

    return make
