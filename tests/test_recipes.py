"""Every recipe trains on the quickstart's data and models, two steps of each stage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from distill_nlp.cli import main
from distill_nlp.config_file import load_experiment
from distill_nlp.losses import LOSSES

CONFIGS = Path(__file__).parent.parent / "configs"
RECIPES = sorted((CONFIGS / "recipes").glob("*.yaml"))
EACH = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def settings_of(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_there_are_the_recipes():
    names = {"vanilla_kd", "distilbert", "pkd", "tinybert", "minilm", "minilmv2", "dkd", "rkd", "all_in_one"}
    assert names <= {path.stem for path in RECIPES}


@EACH
def test_a_recipe_names_its_source_at_the_top(path):
    first = path.read_text(encoding="utf-8").split("\noutput_dir")[0]
    assert "arXiv:" in first
    assert all(line.startswith("# ") for line in first.splitlines())


@EACH
def test_what_a_recipe_trains_with_is_written_out(path):
    for experiment in load_experiment(path).student_trainings():
        assert experiment.losses.keys() <= LOSSES.keys()
        assert {"learning_rate", "num_train_epochs"} <= experiment.training.model_fields_set


@pytest.mark.slow
@pytest.mark.usefixtures("no_doctor", "small_synthetic")
@EACH
def test_a_recipe_runs_on_the_quickstart(path, tmp_path, capsys):
    recipe, quickstart = settings_of(path), settings_of(CONFIGS / "quickstart.yaml")
    two_steps = {"max_steps": 2, "eval_strategy": "no", "per_device_train_batch_size": 8}
    settings = {
        **recipe,
        "output_dir": str(tmp_path / "run"),
        "seeds": [0],
        "data": quickstart["data"] | {"max_unlabeled_samples": 16, "max_test_samples": 20, "max_train_samples": 40},
        "teacher": quickstart["teacher"] | {"training": two_steps},
        "student": {"config": quickstart["student"]["config"]},
        "training": recipe["training"] | two_steps,
        "report": {"latency_samples": 1, "throughput_batches": 1, "throughput_batch_size": 2, "bootstrap_samples": 100},
    }
    for phase in settings.get("phases", []):
        phase["training"] = phase["training"] | two_steps
        for loss in phase["losses"].values():
            # Widths 96 and 64.
            loss.update({"relation_heads": 8} if "relation_heads" in loss else {})
    if "dkd" in settings.get("losses", {}):
        # The quickstart has two classes.
        settings["data"] |= {"dataset": str(three_classes(tmp_path)), "unlabeled": None}
        settings["teacher"].pop("train_split")
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    assert main(["run", str(config)]) == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    stages = report["run"]["stages"]
    phases = max(1, len(settings.get("phases", [])))
    assert sum(name.startswith("student/") for name in stages) == phases
    assert all(record["steps"] == (2 * phases if "baseline" in name else 2) for name, record in stages.items())


def three_classes(folder):
    import pandas as pd

    for split, rows in (("train", 40), ("validation", 12), ("test", 12)):
        texts = [f"{split} text number {i} of kind {i % 3}" for i in range(rows)]
        pd.DataFrame({"text": texts, "label": [i % 3 for i in range(rows)]}).to_csv(
            folder / f"{split}.csv", index=False
        )
    return folder
