"""Fixtures of all tests. No test needs a network: the Hub is switched off before anything is imported."""

from __future__ import annotations

import gc
import os
import shutil
import signal
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A shell has what it starts in the background ignore Ctrl-C, which tests send.
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# The processor's flags decide; else four compilations try them on a machine that has none cached.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

import helpers
import pytest
import torch
import yaml
from hub_server import TOKEN, HubServer
from huggingface_hub import constants
from safetensors.torch import load_file

from distill_nlp.cli import main
from distill_nlp.trainer import DistillationTrainer

# xdist gives files to its workers in this order: one that takes a minute must not come last.
LONG = (
    "test_faults.py",
    "test_sweep.py",
    "test_bad_inputs.py",
    "test_cli.py",
    "test_capture.py",
    "test_speed_benchmark.py",
    "test_export.py",
    "test_recipes.py",
    "test_trainer_launches.py",
    "test_multi_label_run.py",
    "test_run_teachers.py",
    "test_real_data.py",
    "test_examples.py",
)


def pytest_collection_modifyitems(items):
    places = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONG)))


@pytest.fixture(scope="module", autouse=True)
def _frozen_imports():
    """Each `Trainer.train()` runs a full garbage collection, over all that PyTorch and Transformers import.

    Anew for each file, as plots, sweeps and exports import more.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _quick_plots(request, monkeypatch):
    """Plots are drawn and not laid out, which takes longest; the mark `plots` has them whole."""
    if request.node.get_closest_marker("plots") is not None:
        return
    from distill_nlp.report import plots

    def quick(name, draw, description, size=plots._SIZE):
        from matplotlib.figure import Figure

        draw(Figure(figsize=size).subplots())
        return plots._inline('<svg width="1" height="1"></svg>', name, description)

    monkeypatch.setattr(plots, "_svg", quick)


@pytest.fixture
def small_synthetic(monkeypatch):
    """The synthetic set with a few rows in each split: all are made, and most tokenized, whatever is used of them."""
    sizes = {"test": 60, "validation": 40, "train": 100, "unlabeled": 60, "teacher_train": 160}
    monkeypatch.setattr("distill_nlp.synthetic.SPLITS", sizes)


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


@pytest.fixture(scope="session")
def _backbone_and_data(tmp_path_factory):
    """What each experiment has a copy of."""
    folder = tmp_path_factory.mktemp("experiment")
    model = helpers.make_teacher(id2label={0: "LABEL_0", 1: "LABEL_1"}, label2id={"LABEL_0": 0, "LABEL_1": 1})
    model.bert.save_pretrained(folder / "backbone")
    helpers.make_tokenizer().save_pretrained(folder / "backbone")
    helpers.write_rows(folder / "data")
    return folder


@pytest.fixture
def experiment(tmp_path, _backbone_and_data):
    """`experiment(dotted changes)`: the path of a config of a tiny experiment with a local teacher backbone."""
    shutil.copytree(_backbone_and_data, tmp_path, dirs_exist_ok=True)
    backbone = tmp_path / "backbone"

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
