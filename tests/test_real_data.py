"""The command on real reviews with the real vocabulary, in a small size; skipped where the data are absent."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from distill_nlp.cli import main

SHARED = Path(__file__).parents[2] / "shared"
TOKENIZER = SHARED / "models" / "bert-base-uncased-tokenizer"

pytestmark = pytest.mark.real_data


def require(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"no real data in {path}")
    return path


def settings_of(name: str, tmp_path: Path, **data) -> dict:
    """A tiny experiment on a real data set."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return {
        "output_dir": str(tmp_path / "run"),
        "data": {
            "dataset": str(require(SHARED / "data" / name)),
            "validation_split": "validation",
            "tokenizer": str(require(TOKENIZER)),
            "max_length": 64,
            "max_train_samples": 64,
            "max_test_samples": 64,
            **data,
        },
        "teacher": {"config": {"model_type": "bert", **sizes}},
        "student": {"config": {"model_type": "distilbert", "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32}},
        "losses": {"ce": {}, "kl": {}, "hidden": {"layers": "last"}, "attention": {"layers": "last"}},
        "training": {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 2},
        "report": {"latency_samples": 4, "throughput_batches": 2, "bootstrap_samples": 100},
    }


def run(settings: dict, tmp_path: Path) -> dict:
    """The report of it."""
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    # A teacher of two steps is at chance, where the doctor stops.
    assert main(["run", str(config), "--no-doctor"]) == 0
    return json.loads((tmp_path / "run" / "report.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "labels", "unlabeled"),
    [("imdb-small", ["negative", "positive"], "imdb/unsup.parquet"), ("sst2", None, None)],
)
def test_real_reviews_go_through_all_stages(name, labels, unlabeled, tmp_path):
    pool = unlabeled and str(require(SHARED / "data" / unlabeled))
    settings = settings_of(name, tmp_path, unlabeled=pool, max_unlabeled_samples=50, label_names=labels)
    report = run(settings, tmp_path)
    assert report["test_rows"] == 64
    assert report["label_names"] == (labels or ["LABEL_0", "LABEL_1"])
    assert report["models"]["student"]["parameters"] < report["models"]["teacher"]["parameters"]


@pytest.mark.slow
def test_real_comments_with_several_labels_go_through_all_stages(tmp_path):
    names = json.loads(require(SHARED / "data" / "label_names.json").read_text())["goemotions"]
    report = run(settings_of("goemotions", tmp_path, label_column="labels", label_names=names), tmp_path)
    assert (report["test_rows"], report["metric"]) == (64, "f1_macro")
    assert report["label_names"] == names
    wanted = np.load(tmp_path / "run" / "predictions.npz")["labels"]
    assert wanted.shape == (64, 28)
    assert 64 <= wanted.sum() < 2 * 64
