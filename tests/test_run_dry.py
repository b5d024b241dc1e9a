"""`run --dry-run`: two steps of every stage, and nothing is kept."""

from __future__ import annotations

import pytest

from distill_nlp.cli import main

pytestmark = pytest.mark.slow


def test_every_stage_takes_two_steps_and_leaves_nothing(experiment, tmp_path, capsys):
    phases = [{"losses": {"hidden": {}, "attention": {}}}, {"losses": {"kl": {}}}]
    config = str(experiment(phases=phases, seeds=[0, 1]))
    before = {path for path in tmp_path.rglob("*")}
    assert main(["run", config, "--dry-run"]) == 0
    said = capsys.readouterr().err
    for stage in ("teacher  ", "baseline, seed 0", "student 0, phase 1", "student 0, phase 2"):
        (line,) = [line for line in said.splitlines() if line.startswith(stage) and "dry run" in line]
        assert "2 steps" in line
    assert {path for path in tmp_path.rglob("*")} == before


def test_a_dry_run_of_an_ensemble_with_a_cached_config_needs_no_finished_teacher(experiment, tmp_path, capsys):
    config = str(experiment(losses={"kl": {}}, teacher__ensemble=[{"seed": 1}], teacher__max_length=20))
    assert main(["run", config, "--dry-run"]) == 0
    said = capsys.readouterr().err
    assert "teacher-2            dry run" in said
    assert "student, seed 0      dry run" in said
    assert not (tmp_path / "run").exists()
    assert main(["run", config, "--no-doctor", "--stages", "teacher"]) == 0
    capsys.readouterr()
    assert main(["run", config, "--dry-run"]) == 0
    assert "teacher-2            dry run" not in capsys.readouterr().err


def test_a_student_of_the_trained_layers_of_a_teacher_from_scratch(experiment, tmp_path, capsys):
    config = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings = {
        "teacher": {"config": config | {"intermediate_size": 16}, "training": {"max_steps": 2}},
        "student": {"from_teacher": {"layers": 1, "weights": "finetuned"}},
        "losses": {"kl": {}},
        "data__tokenizer": str(tmp_path / "backbone"),
    }
    made = str(experiment(**settings))
    assert main(["run", made, "--dry-run"]) == 0
    assert "student, seed 0      dry run" in capsys.readouterr().err
    assert main(["run", made, "--no-doctor", "--stages", "teacher,student"]) == 0


def test_what_does_not_fit_ends_a_dry_run_with_code_2(experiment, capsys):
    assert main(["run", str(experiment(losses={"hidden": {"layers": [[9, 9]]}})), "--dry-run"]) == 2
    assert "layers" in capsys.readouterr().err
