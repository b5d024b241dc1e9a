"""Fixtures of all tests. No test needs a network: the Hub is switched off before anything is imported."""

from __future__ import annotations

import gc
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import helpers
import pytest
import torch
import yaml
from hub_server import TOKEN, HubServer
from huggingface_hub import constants
from safetensors.torch import load_file

from distill_nlp.cli import main
from distill_nlp.trainer import DistillationTrainer


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


@pytest.fixture
def experiment(tmp_path):
    """`experiment(dotted changes)`: the path of a config of a tiny experiment with a local teacher backbone."""
    backbone = tmp_path / "backbone"
    model = helpers.make_teacher(id2label={0: "LABEL_0", 1: "LABEL_1"}, label2id={"LABEL_0": 0, "LABEL_1": 1})
    model.bert.save_pretrained(backbone)
    helpers.make_tokenizer().save_pretrained(backbone)
    helpers.write_rows(tmp_path / "data")

    def write(**changes) -> Path:
        settings = {
            "output_dir": str(tmp_path / "run"),
            "seeds": [0],
            "data": {
                "dataset": str(tmp_path / "data"),
                "validation_split": "validation",
                "label_names": list(helpers.BINARY),
                "max_length": 16,
            },
            "teacher": {"model": str(backbone), "training": {"max_steps": 4}},
            "student": {"from_teacher": {"layers": 2}},
            "losses": {"ce": {"weight": 0.3}, "kl": {"weight": 0.7}, "hidden": {}, "attention": {"layers": "last"}},
            "training": {"max_steps": 3, "per_device_train_batch_size": 8, "eval_strategy": "steps", "eval_steps": 2},
            "report": {
                "latency_samples": 2,
                "throughput_batch_size": 4,
                "throughput_batches": 2,
                "bootstrap_samples": 100,
            },
        }
        for dotted, value in changes.items():
            *parents, last = dotted.split("__")
            inner = settings
            for name in parents:
                inner = inner.setdefault(name, {})
            inner[last] = value
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        return path

    return write


@pytest.fixture
def no_doctor(monkeypatch):
    """`run` without its examination, which would rightly stop at teachers of random weights."""
    for name in ("examine", "examine_teachers"):
        monkeypatch.setattr(f"distill_nlp.pipeline.{name}", lambda *arguments, **settings: [])


@pytest.fixture
def ends_alike(tmp_path, monkeypatch, capsys):
    """`ends_alike(config, interrupted_at=2)`: what a run said that was stopped in that step of the student and went on.

    The step is one of a training with `kl`; the weights must be those of a run that nothing stopped.
    """

    def check(config: str, interrupted_at: int) -> str:
        stages = ["--stages", "teacher,student"]
        assert main(["run", config, *stages]) == 0
        whole = load_file(tmp_path / "run" / "student" / "seed-0" / "model.safetensors")
        step = DistillationTrainer.training_step

        def interrupted(self, *arguments, **keywords):
            if self.state.global_step == interrupted_at and "kl" in self.objective.losses:
                raise KeyboardInterrupt
            return step(self, *arguments, **keywords)

        other = ["--output_dir", str(tmp_path / "second"), *stages]
        with monkeypatch.context() as patch:
            patch.setattr(DistillationTrainer, "training_step", interrupted)
            assert main(["run", config, *other]) == 130
        capsys.readouterr()
        assert main(["run", config, *other]) == 0
        resumed = load_file(tmp_path / "second" / "student" / "seed-0" / "model.safetensors")
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
        return capsys.readouterr().err

    return check


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A server that the client in this process takes for the Hub."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with HubServer(token=TOKEN) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        # Made of the endpoint when the client was imported.
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield server
