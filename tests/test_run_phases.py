"""Several trainings of the student, one after the other."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from distill_nlp.cli import main
from distill_nlp.trainer import DistillationTrainer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_doctor")]

TWO = [
    {"losses": {"hidden": {}, "attention": {}}, "training": {"max_steps": 4, "learning_rate": 0.001}},
    {"losses": {"ce": {"weight": 0.3}, "kl": {"weight": 0.7}}},
]
STAGES = ["--stages", "teacher,baseline,student"]


def record_of(folder):
    return json.loads((folder / "stage.json").read_text())


def test_phases_run_one_after_the_other_and_the_baseline_makes_as_many_steps(experiment, tmp_path, capsys):
    config = str(experiment(phases=TWO))
    assert main(["run", config]) == 0
    said = capsys.readouterr().err
    student = tmp_path / "run" / "student"
    first, last = record_of(student / "seed-0-phase-1"), record_of(student / "seed-0")
    assert first["objective"].startswith("1·hidden")
    assert last["objective"] == "0.3·ce + 0.7·kl(T=2)"
    assert (first["steps"], last["steps"]) == (4, 3)
    assert record_of(tmp_path / "run" / "baseline" / "seed-0")["steps"] == 7
    # The logits of the second phase are cached, the layers of the first are not.
    assert said.count("teacher cache") == 1
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert {"student/seed-0-phase-1", "student/seed-0"} <= report["run"]["stages"].keys()
    assert main(["run", config]) == 0
    assert capsys.readouterr().err.count("done already") == 4


def test_a_phase_starts_from_what_the_one_before_it_left(experiment, tmp_path):
    """With a learning rate of almost nothing, the second phase leaves the first one's weights as they are."""
    still = [TWO[0], {"losses": {"kl": {}}, "training": {"learning_rate": 1.0e-12, "weight_decay": 0.0}}]
    assert main(["run", str(experiment(phases=still)), *STAGES]) == 0
    student = tmp_path / "run" / "student"
    one, two = (load_file(student / name / "model.safetensors") for name in ("seed-0-phase-1", "seed-0"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-7)


@pytest.mark.parametrize("losses", [{"hidden": {}}, {"hidden": {}, "kl": {}}])
def test_a_phase_whose_head_does_not_learn_keeps_its_last_step(experiment, tmp_path, capsys, losses):
    """By accuracy, which a head that is not trained has by chance, it would keep an early one, or stop."""
    first = {"losses": losses, "training": {"max_steps": 6, "learning_rate": 0.001}}
    ends = {}
    for strategy, every in (("steps", {"eval_steps": 1}), ("no", {})):
        phases = [first | {"training": first["training"] | {"eval_strategy": strategy} | every}, TWO[1]]
        # Without dropout: an evaluation draws numbers too.
        changes = {"student__overrides": {"dropout": 0.0}, "output_dir": str(tmp_path / strategy)}
        config = str(experiment(phases=phases, **changes))
        assert main(["run", config, *STAGES, "--training.early_stopping_patience", "1"]) == 0
        folder = tmp_path / strategy / "student" / "seed-0-phase-1"
        ends[strategy] = load_file(folder / "model.safetensors"), record_of(folder)
    weights, record = ends["steps"]
    last, _ = ends["no"]
    if "kl" in losses:
        assert record["best_step"] is not None
        return
    assert (record["steps"], record["best_step"], record["stopped_early"]) == (6, None, None)
    assert all(torch.equal(weights[name], last[name]) for name in last)
    assert record_of(tmp_path / "steps" / "student" / "seed-0")["best_step"] is not None


def test_parts_are_frozen_in_the_phases_that_say_so(experiment, tmp_path):
    phases = [TWO[0] | {"training": TWO[0]["training"] | {"freeze": ["embeddings", "layer.1"]}}, TWO[1]]
    config = str(experiment(phases=phases))
    assert main(["run", config, *STAGES, "--phases.1.training.freeze", "[layer.2]"]) == 0
    student = tmp_path / "run" / "student"
    one, two = (load_file(student / name / "model.safetensors") for name in ("seed-0-phase-1", "seed-0"))
    # What was frozen at first is as the teacher's backbone has it.
    words = load_file(tmp_path / "backbone" / "model.safetensors")["embeddings.word_embeddings.weight"]
    name = "distilbert.embeddings.word_embeddings.weight"
    assert torch.equal(one[name], words)
    assert not torch.equal(two[name], words)
    moved = {key: not torch.equal(one[key], two[key]) for key in one}
    assert not any(value for key, value in moved.items() if ".layer.1." in key)
    assert all(value for key, value in moved.items() if ".layer.0." in key and "k_lin.bias" not in key)


def test_another_cross_entropy_in_a_phase_makes_the_baseline_anew(experiment, capsys):
    def run(smoothing):
        phases = [TWO[0], {"losses": {"ce": {"label_smoothing": smoothing}, "kl": {}}}]
        assert main(["run", str(experiment(phases=phases)), "--stages", "teacher,baseline"]) == 0
        return capsys.readouterr().err

    run(0.0)
    assert "baseline, seed 0     done already" in run(0.0)
    assert "ce.label_smoothing: 0.0 → 0.2" in run(0.2)


def test_a_change_of_the_second_phase_leaves_the_first_alone(experiment, capsys):
    assert main(["run", str(experiment(phases=TWO)), *STAGES]) == 0
    capsys.readouterr()
    other = [TWO[0], {"losses": {"kl": {"temperature": 5}}}]
    assert main(["run", str(experiment(phases=other)), *STAGES]) == 0
    said = capsys.readouterr().err
    assert "student 0, phase 1   done already" in said
    assert "student 0, phase 2   settings changed" in said
    changed = [TWO[0] | {"losses": {"hidden": {"kind": "cosine"}}}, other[1]]
    assert main(["run", str(experiment(phases=changed)), *STAGES]) == 0
    said = capsys.readouterr().err
    assert "student 0, phase 1   settings changed" in said
    assert "student 0, phase 2   settings changed" in said


def test_a_teacher_that_changed_makes_all_phases_anew(experiment, capsys):
    """Also those that set for themselves what the teacher takes from the shared settings."""
    own = [{**phase, "training": {**phase.get("training", {}), "learning_rate": 1e-3}} for phase in TWO]
    training = {"max_steps": 3, "per_device_train_batch_size": 8, "eval_strategy": "no"}
    shared = {"phases": own, "training": training, "teacher__training": {"max_steps": 2}}
    assert main(["run", str(experiment(**shared)), *STAGES, "--training.learning_rate", "1e-4"]) == 0
    capsys.readouterr()
    assert main(["run", str(experiment(**shared)), *STAGES, "--training.learning_rate", "2e-4"]) == 0
    said = capsys.readouterr().err
    for name in ("teacher             ", "student 0, phase 1  ", "student 0, phase 2  "):
        assert f"{name} settings changed" in said, name


def test_an_interrupted_second_phase_goes_on_and_ends_like_an_uninterrupted_one(experiment, ends_alike):
    said = ends_alike(str(experiment(phases=TWO)), interrupted_at=2)
    assert "student 0, phase 1   done already" in said
    assert "going on from checkpoint-2" in said


def test_a_killed_phase_without_evaluations_goes_on_from_its_last_epoch(experiment, tmp_path, capsys, monkeypatch):
    first = {"losses": {"hidden": {}}, "training": {"num_train_epochs": 3, "eval_strategy": "no"}}
    settings = {"phases": [first, TWO[1]], "training": {"per_device_train_batch_size": 8}}
    config = str(experiment(**settings, output_dir=str(tmp_path / "whole")))
    stages = ["--stages", "teacher,student"]
    assert main(["run", config, *stages]) == 0
    epoch = record_of(tmp_path / "whole" / "student" / "seed-0-phase-1")["steps"] // 3
    step = DistillationTrainer.training_step

    def killed(self, *arguments, **keywords):
        if self.state.global_step == 2 * epoch + 1 and "hidden" in self.objective.losses:
            raise RuntimeError("as if by a power cut: nothing is saved")
        return step(self, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(DistillationTrainer, "training_step", killed)
        assert main(["run", config, *stages, "--output_dir", str(tmp_path / "second")]) == 1
    capsys.readouterr()
    assert main(["run", config, *stages, "--output_dir", str(tmp_path / "second")]) == 0
    assert f"going on from checkpoint-{2 * epoch}" in capsys.readouterr().err
    weights = [load_file(tmp_path / name / "student" / "seed-0" / "model.safetensors") for name in ("whole", "second")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_phase_without_losses_has_the_experiments_and_the_cache_is_filled_for_those_that_use_it(experiment, capsys):
    phases = [{"losses": {"hidden": {}}}, {"training": {"learning_rate": 0.001}}]
    config = str(experiment(losses={"kl": {}}, phases=phases))
    assert main(["run", config, "--stages", "teacher"]) == 0
    assert main(["cache", config]) == 0
    assert capsys.readouterr().err.count("teacher cache") == 1
    live = str(experiment(phases=[{"losses": {"hidden": {}}}, {"losses": {"attention": {}}}]))
    assert main(["cache", live]) == 2
    assert "nothing to cache: losses hidden compare token by token" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"phases": [{"losses": {"hiden": {}}}]}, "phases.0.losses.hiden: unknown loss"),
        ({"phases": [{"losses": {}}]}, "phases.0.losses: losses is empty"),
        ({"losses": {}, "phases": [{"training": {"max_steps": 2}}]}, "losses is empty"),
        ({"phases": [{"lossess": {}}]}, "phases.0.lossess: unknown setting"),
        ({"phases": [{"training": {"learning_rate": -1}}]}, "phases.0.training.learning_rate"),
        ({"phases": [TWO[1], {"losses": {"hidden": {"layers": [[9, 9]]}}}]}, "layers"),
        ({"phases": [TWO[0], TWO[1] | {"training": {"freeze": ["layer.9"]}}]}, "freeze: 'layer.9' is no part"),
        ({"training__freeze": ["layer.9"]}, "freeze: 'layer.9' is no part"),
        (
            {"phases": [TWO[0] | {"training": {"freeze": ["body"]}}, TWO[1]]},
            "freeze: body leaves the head alone to learn, and no loss reads the answers",
        ),
    ],
)
def test_what_is_wrong_with_a_phase_is_said_before_anything_is_trained(experiment, tmp_path, capsys, changes, message):
    assert main(["run", str(experiment(**changes))]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "teacher").exists()
