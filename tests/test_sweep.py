"""Sweeps from the YAML to the tables, on tiny models; the test split is not there in any of them."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import optuna
import pandas as pd
import pytest
import torch
from helpers import BINARY, label_config, make_teacher, make_tokenizer
from optuna.storages.journal import JournalFileBackend
from test_sweep_plan import write_sweep

from distill_nlp import settling
from distill_nlp.arguments import DistillationArguments
from distill_nlp.cli import main
from distill_nlp.errors import DistillError, UsageError
from distill_nlp.resumable import CheckpointNotWritten
from distill_nlp.sweep import load_sweep, measure, run_sweep, runner, study, trial
from distill_nlp.sweep.runner import check
from distill_nlp.sweep.space import Space

pytestmark = pytest.mark.slow

LOSSES = {"ce": {"weight": 0.3}, "kl": {"weight": 0.7}}
SPACE = {"losses.kl.temperature": {"low": 1, "high": 8, "log": True}, "student.from_teacher.layers": [1, 2]}


@pytest.fixture(autouse=True)
def _no_front(request, monkeypatch):
    """The tables are written after each trial, each time with a plot."""
    if request.node.get_closest_marker("plots") is None:
        monkeypatch.setattr("distill_nlp.sweep.tables.draw", lambda result, path: path.write_text("<svg/>"))


@pytest.fixture
def sweep(experiment, tmp_path):
    """`sweep(experiment's changes by dotted__name, **settings of the sweep)`: its path; there are no test rows."""

    def write(changes=None, **settings) -> Path:
        (tmp_path / "data" / "test.parquet").rename(tmp_path / "test.parquet")
        config = experiment(**{"losses": LOSSES, "training__max_steps": 4, **(changes or {})})
        return write_sweep(config, **{"space": SPACE, "trials": 3, "sampler": "random", **settings})

    return write


def states(result) -> list[str]:
    return [found["state"] for found in result["trials"]]


def record_of(folder: Path) -> dict:
    return json.loads((folder / "stage.json").read_text())


def reported(folder: Path) -> list[dict[int, float]]:
    """What Optuna has of each trial: number of the evaluation -> metric."""
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(folder / study.JOURNAL)))
    return [found.intermediate_values for found in optuna.load_study(study_name="sweep", storage=storage).trials]


@pytest.mark.plots
def test_a_sweep_trains_one_teacher_runs_its_trials_and_writes_the_tables(sweep, tmp_path):
    said: list[str] = []
    result = run_sweep(sweep({"seeds": [3, 4]}), say=said.append)
    out = tmp_path / "sweep"
    assert states(result) == ["finished"] * 3
    assert result["running"] == 0
    assert sum("teacher " in line and "4 steps in" in line for line in said) == 1
    assert sum("40 computed" in line for line in said) == 1
    # They would count the rows of the split that stands in for test.
    assert not any(line.startswith("data") for line in said)
    for found in result["trials"]:
        folder = out / "trials" / f"{found['number']:04d}"
        assert [path.name for path in (folder / "student").glob("[!.]*")] == ["seed-3"]
        record = record_of(folder / "student" / "seed-3")
        assert record["fingerprint"]["losses"]["kl"]["temperature"] == found["settings"]["losses.kl.temperature"]
        assert (
            record["fingerprint"]["student"]["from_teacher"]["layers"]
            == found["settings"]["student.from_teacher.layers"]
        )
        assert found["value"] == record["validation"]["accuracy"]
        assert found["steps"] == record["steps"] == 4
        assert len(found["evaluations"]) == 2
        # The teacher is the base's, and its answers were there.
        assert (folder / "teacher").resolve() == (out / "base" / "teacher").resolve()
        assert "100.0% there, 0 computed" in (folder / "log.txt").read_text()
        assert found["parameters"] == sum(
            p.numel() for p in measure.load_classifier(str(folder / "student" / "seed-3")).parameters()
        )
        assert found["latency"] > 0
        assert found["throughput"] > 0
    best = max(found["value"] for found in result["trials"])
    assert result["trials"][result["best"]]["value"] == best
    assert result["teacher"]["value"] == record_of(out / "base" / "teacher")["validation"]["accuracy"]
    assert json.loads((out / "sweep.json").read_text()) == {k: v for k, v in result.items() if k != "running"}
    assert result["command"] in (out / "sweep.md").read_text()
    assert (out / "pareto.svg").exists()
    assert not list(out.rglob("*.partial"))
    assert not list(out.rglob("*.tmp"))


def test_the_command_that_is_printed_makes_the_report_without_training_the_teacher_again(
    sweep, tmp_path, capsys, no_doctor
):
    result = run_sweep(sweep(trials=1))
    (tmp_path / "test.parquet").rename(tmp_path / "data" / "test.parquet")
    words = shlex.split(result["command"])
    assert words[:2] == ["distill-nlp", "run"]
    assert main(words[1:]) == 0
    said = capsys.readouterr().err
    assert said.count("done already") == 1
    assert "100.0% there, 0 computed" in said
    report = json.loads((tmp_path / "sweep" / "base" / "report.json").read_text())
    assert report["test_rows"] == 16
    # The same student as the trial's, from the same start on the same teacher.
    one, two = (record_of(tmp_path / "sweep" / folder / "student" / "seed-0") for folder in ("base", "trials/0000"))
    assert all(one["validation"][key] == two["validation"][key] for key in ("loss", "accuracy"))
    assert one["fingerprint"] == two["fingerprint"]


def test_more_trials_go_on_and_what_is_there_is_not_done_again(sweep, tmp_path):
    path = sweep(trials=1)
    first = run_sweep(path)
    weights = tmp_path / "sweep" / "trials" / "0000" / "student" / "seed-0" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    said: list[str] = []
    again = run_sweep(path, say=said.append)
    # Not measured again either.
    assert again == first
    assert not any("measuring" in line or line.startswith("trial") for line in said)
    more = run_sweep(path, trials=2, say=said.append)
    assert states(more) == ["finished"] * 2
    assert more["trials"][0]["settings"] == first["trials"][0]["settings"]
    assert weights.stat().st_mtime_ns == before
    assert more["measured"] == 2
    with pytest.raises(UsageError, match=r"holds a sweep with other settings \(experiment\.training\.max_steps: 4 → 3"):
        run_sweep(path, {"training.max_steps": 3})


def test_the_folder_may_be_moved(sweep, tmp_path):
    path = sweep(trials=1)
    run_sweep(path)
    (tmp_path / "sweep").rename(tmp_path / "moved")
    teacher = tmp_path / "moved" / "trials" / "0000" / "teacher"
    assert teacher.resolve() == tmp_path / "moved" / "base" / "teacher"
    assert states(run_sweep(path, output_dir=str(tmp_path / "moved"), trials=2)) == ["finished"] * 2


def test_where_there_are_no_links_the_teacher_is_copied(sweep, tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError("no links here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    assert states(run_sweep(sweep(trials=1))) == ["finished"]
    assert not (tmp_path / "sweep" / "trials" / "0000" / "teacher").is_symlink()


# Not a fork of this process: PyTorch's threads do not come along, and the child crashes.
DIES_IN_ITS_SECOND_TRIAL = """
import os, signal, sys
from distill_nlp.sweep import run_sweep, trial

def die(self, args, state, control, **kwargs):
    if self.counts and self.trial.number == 1:
        os.kill(os.getpid(), signal.SIGKILL)

trial.PruningCallback.on_save = die
run_sweep(sys.argv[1])
"""


def test_a_killed_worker_leaves_a_trial_that_goes_on_from_its_checkpoint(sweep, tmp_path, monkeypatch):
    path = sweep(trials=2)
    reported = trial.PruningCallback.on_evaluate
    died = subprocess.run([sys.executable, "-c", DIES_IN_ITS_SECOND_TRIAL, str(path)], timeout=300)
    assert died.returncode == -signal.SIGKILL
    assert not (tmp_path / "sweep" / "trials" / "0001" / "student" / "seed-0").exists()
    evaluations = []

    def note(self, args, state, control, **kwargs):
        if self.counts:
            evaluations.append((self.trial.number, state.global_step))
        return reported(self, args, state, control, **kwargs)

    monkeypatch.setattr(trial.PruningCallback, "on_evaluate", note)
    said: list[str] = []
    result = run_sweep(path, say=said.append)
    assert states(result) == ["finished"] * 2
    assert any("trial 1, begun by another worker" in line for line in said)
    assert evaluations == [(1, 4)]
    assert "going on from checkpoint-2" in (tmp_path / "sweep" / "trials" / "0001" / "log.txt").read_text()
    assert len(result["trials"][1]["evaluations"]) == 2


def test_two_processes_end_with_just_the_number_of_trials_and_the_points_of_one(sweep, tmp_path):
    path = sweep(trials=4)
    said: list[str] = []
    result = run_sweep(path, workers=2, say=said.append)
    assert states(result) == ["finished"] * 4
    begun = [line for line in said if line.startswith("worker ") and ": losses" in line]
    assert len(begun) == 4
    alone = run_sweep(path, output_dir=str(tmp_path / "alone"), trials=2)
    assert [t["settings"] for t in alone["trials"]] == [t["settings"] for t in result["trials"][:2]]
    assert [t["value"] for t in alone["trials"]] == [t["value"] for t in result["trials"][:2]]


def test_among_several_gpus_the_teacher_and_the_trials_of_dead_workers_take_the_first(sweep, monkeypatch):
    def visible(arguments):
        return len(os.environ["CUDA_VISIBLE_DEVICES"].split(","))

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    monkeypatch.setattr(DistillationArguments, "n_gpu", property(visible))
    handed = []
    # The workers die before they take a trial.
    monkeypatch.setattr(runner, "work_in_processes", lambda *given: handed.append(given[-1]))
    assert states(run_sweep(sweep(trials=1), workers=2)) == ["finished"]
    assert handed == ["2,3"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,3"


def test_the_same_command_twice_at_once_shares_the_trials(sweep, tmp_path):
    path = sweep(trials=3)
    command = [sys.executable, "-m", "distill_nlp", "sweep", str(path)]
    processes = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    result = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert states(result) == ["finished"] * 3
    assert result["measured"] > 0
    stages = [path for path in (tmp_path / "sweep").rglob("stage.json") if "teacher" not in str(path)]
    assert len(stages) == 3


def test_while_others_run_trials_nothing_is_measured_and_the_last_one_does_it(sweep):
    path = sweep(trials=2)
    plan = load_sweep(path)
    space = Space(plan.sweep.space)
    other = study.SweepStudy(plan, space, check(plan, space, lambda line: None))
    claim = other.claim()
    said: list[str] = []
    result = run_sweep(path, say=said.append)
    assert states(result) == ["unfinished", "finished"]
    assert (result["running"], result["best"]) == (1, 1)
    assert "machine" not in result
    assert said[-1] == "1 trials are still run by other processes; the last of these writes the tables"
    claim.give_up()
    assert run_sweep(path)["measured"] == 2


class Always(optuna.pruners.BasePruner):
    """Prunes at each evaluation."""

    def prune(self, study, trial):
        return True


def test_a_pruned_trial_stops_at_once_is_recorded_and_the_sweep_goes_on(sweep, tmp_path, monkeypatch):
    path = sweep({"training__logging_steps": 1}, trials=2)
    monkeypatch.setattr(study, "make_pruner", lambda name: Always())
    with pytest.raises(DistillError, match="no trial came to its end: 2 pruned, 0 failed") as error:
        run_sweep(path)
    assert error.value.exit_code == 1
    result = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert states(result) == ["pruned"] * 2
    for found in result["trials"]:
        # Of four steps; the last evaluation would have been too late to save anything.
        assert found["steps"] == 2
        assert len(found["evaluations"]) == 1
        assert found["value"] is None
        assert found["reason"].endswith("at evaluation 1")
        assert not (tmp_path / "sweep" / "trials" / f"{found['number']:04d}" / "student").exists()
    monkeypatch.undo()
    assert [list(values) for values in reported(tmp_path / "sweep")] == [[1]] * 2
    more = run_sweep(path, trials=3)
    assert list(reported(tmp_path / "sweep")[2]) == [1, 2]
    assert states(more) == ["pruned", "pruned", "finished"]
    assert more["best"] == 2
    assert "pruned: accuracy" in (tmp_path / "sweep" / "sweep.md").read_text()


def test_nothing_is_pruned_at_the_last_evaluation(sweep, monkeypatch):
    monkeypatch.setattr(study, "make_pruner", lambda name: Always())
    result = run_sweep(sweep({"training__eval_steps": 4}, trials=1))
    assert states(result) == ["finished"]


def test_a_failing_trial_is_recorded_with_its_reason_and_the_sweep_goes_on(sweep, tmp_path, capsys):
    said: list[str] = []
    result = run_sweep(sweep(space={"student.from_teacher.layers": [2, 9]}, sampler="grid"), say=said.append)
    assert sorted(states(result)) == ["failed", "finished"]
    failed = next(found for found in result["trials"] if found["state"] == "failed")
    assert failed["settings"] == {"student.from_teacher.layers": 9}
    assert "9" in failed["reason"]
    assert "\n" not in failed["reason"]
    log = tmp_path / "sweep" / "trials" / f"{failed['number']:04d}" / "log.txt"
    assert "Traceback" in log.read_text()
    assert f"failed: {failed['reason']}" in (tmp_path / "sweep" / "sweep.md").read_text()


def test_out_of_memory_fails_one_trial(sweep, monkeypatch):
    step = trial.Pipeline.run.__globals__["StudentStages"].student
    calls = []

    def student(self, seed):
        calls.append(seed)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, seed)

    monkeypatch.setattr("distill_nlp.student_stages.StudentStages.student", student)
    result = run_sweep(sweep(trials=2))
    assert states(result) == ["failed", "finished"]
    assert result["trials"][0]["reason"] == "OutOfMemoryError: CUDA out of memory"


def test_rows_of_a_stream_are_swept_too(sweep):
    changes = {"data__streaming": True, "data__shuffle_buffer": 7, "training__eval_steps": 2}
    assert states(run_sweep(sweep(changes, trials=2))) == ["finished"] * 2


def test_without_a_split_for_validation_texts_of_train_may_stand_in_the_pool(sweep, tmp_path):
    """As in `run`, which holds out validation and test; here train stands in for that."""
    path = sweep({"data__unlabeled": "pool", "data__validation_split": None}, trials=1)
    train = pd.read_parquet(tmp_path / "data" / "train.parquet")
    train.to_parquet(tmp_path / "data" / "pool.parquet")
    result = run_sweep(path)
    assert states(result) == ["finished"]
    log = (tmp_path / "sweep" / "trials" / "0000" / "log.txt").read_text()
    carved = int(re.search(r"(\d+) validation rows carved", log)[1])
    assert f"{len(train) - carved:,} train, {len(train) - carved:,} unlabeled" in log


def refuse_once(monkeypatch, errors):
    """The students' stage raises these, one at a call, and then works."""
    step = trial.Pipeline.run.__globals__["StudentStages"].student

    def student(self, seed):
        if errors:
            raise errors.pop()
        return step(self, seed)

    monkeypatch.setattr("distill_nlp.student_stages.StudentStages.student", student)


def wrapped(error):
    """As the stages hand over what a library raised."""
    outer = DistillError("student, seed 0: a checkpoint could not be written")
    outer.__cause__ = error
    return outer


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        wrapped(CheckpointNotWritten("checkpoint-2 could not be written")),
        wrapped(OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))),
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
    ],
    ids=["full disk", "checkpoint", "quota", "device"],
)
def test_what_is_wrong_with_the_machine_uses_up_no_trial(sweep, monkeypatch, error):
    path = sweep(space={"losses.kl.temperature": [1, 2]}, sampler="grid", trials=2)
    errors = [error]
    refuse_once(monkeypatch, errors)
    with pytest.raises(type(error)):
        run_sweep(path)
    result = run_sweep(path)
    assert states(result) == ["finished"] * 2
    assert {found["settings"]["losses.kl.temperature"] for found in result["trials"]} == {1, 2}


def test_a_disk_that_is_full_many_times_uses_up_no_trial_either(sweep, monkeypatch):
    path = sweep(trials=1)
    refuse_once(monkeypatch, [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) for _ in range(5)])
    for _ in range(5):
        with pytest.raises(OSError, match="No space left"):
            run_sweep(path)
    assert states(run_sweep(path)) == ["finished"]


def test_settings_that_break_the_device_each_time_fail(sweep, monkeypatch):
    path = sweep(trials=2)
    refuse_once(monkeypatch, [torch.AcceleratorError("CUDA error") for _ in range(study.MOST_ATTEMPTS)])
    for _ in range(study.MOST_ATTEMPTS):
        with pytest.raises(torch.AcceleratorError):
            run_sweep(path)
    assert states(run_sweep(path)) == ["failed", "finished"]


def test_where_all_trials_fail_the_first_reason_is_the_error(sweep, monkeypatch, tmp_path):
    def student(self, seed):
        raise ValueError(f"no luck with {self.experiment.losses['kl'].arguments()}")

    monkeypatch.setattr("distill_nlp.student_stages.StudentStages.student", student)
    with pytest.raises(DistillError, match="0 pruned, 2 failed; the first that failed: ValueError: no luck with") as e:
        run_sweep(sweep(trials=2))
    assert e.value.exit_code == 1
    result = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert result["trials"][0]["reason"] in str(e.value)
    assert "No trial is finished." in (tmp_path / "sweep" / "sweep.md").read_text()


def test_an_interruption_ends_the_sweep_and_the_same_call_goes_on(sweep, tmp_path, monkeypatch):
    path = sweep(trials=2)

    def interrupt(self, args, state, control, **kwargs):
        if self.trial.number == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trial.PruningCallback, "on_step_begin", interrupt)
        for _ in range(study.MOST_ATTEMPTS + 1):
            with pytest.raises(KeyboardInterrupt):
                run_sweep(path)
    # The tables are those after the first trial.
    result = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert states(result)[0] == "finished"
    assert states(run_sweep(path)) == ["finished"] * 2


def test_the_students_learning_rate_is_tried_on_one_teacher(sweep, tmp_path):
    said: list[str] = []
    result = run_sweep(sweep(space={"training.learning_rate": [1e-4, 1e-3]}, sampler="grid", trials=2), say=said.append)
    assert states(result) == ["finished"] * 2
    assert {found["teacher"] for found in result["trials"]} == {"base"}
    assert not (tmp_path / "sweep" / "teachers").exists()
    assert not any("change the teacher" in line for line in said)


def test_a_trial_with_another_teacher_says_so_and_shares_it_with_its_like(sweep, tmp_path):
    said: list[str] = []
    space = {"data.max_length": [16, 12], "losses.kl.temperature": [1, 2]}
    result = run_sweep(sweep(space=space, sampler="grid", trials=4), say=said.append)
    assert states(result) == ["finished"] * 4
    own = [found for found in result["trials"] if found["settings"]["data.max_length"] == 12]
    assert {found["teacher"] for found in own} == {own[0]["teacher"]}
    assert own[0]["teacher"].startswith("teachers/")
    assert {found["teacher"] for found in result["trials"] if found not in own} == {"base"}
    assert sum("its settings change the teacher" in line for line in said) == 2
    assert len(list((tmp_path / "sweep" / "teachers").iterdir())) == 1
    log = "".join((tmp_path / "sweep" / "trials" / f"{t['number']:04d}" / "log.txt").read_text() for t in own)
    assert log.count("done already") == 1
    assert record_of(tmp_path / "sweep" / own[0]["teacher"] / "teacher")["fingerprint"]["data"]["max_length"] == 12


def test_a_finished_teacher_and_several_of_them_are_measured_as_one(sweep, tmp_path):
    for i, flipped in enumerate((False, True)):
        labels = BINARY[::-1] if flipped else BINARY
        make_teacher(seed=1 + i, **label_config(labels)).save_pretrained(tmp_path / f"ready{i}")
        make_tokenizer().save_pretrained(tmp_path / f"ready{i}")
    teacher = {"model": str(tmp_path / "ready0"), "ensemble": [{"model": str(tmp_path / "ready1"), "weight": 3}]}
    student = {"from_teacher": {"layers": 2}}
    result = run_sweep(sweep({"teacher": teacher, "student": student}, space={"losses.kl.temperature": [2]}, trials=1))
    assert states(result) == ["finished"]
    assert result["teacher"]["parameters"] == 2 * make_teacher(**label_config(BINARY)).num_parameters()
    assert result["teacher"]["value"] == reference_ensemble_accuracy(tmp_path)
    assert not os.path.lexists(tmp_path / "sweep" / "trials" / "0000" / "teacher")


def reference_ensemble_accuracy(folder: Path) -> float:
    import pandas as pd

    rows = pd.read_parquet(folder / "data" / "validation.parquet")
    tokenizer = make_tokenizer()
    right = 0
    for text, label in zip(rows.text, rows.label, strict=True):
        inputs = tokenizer(text, return_tensors="pt")
        total = torch.zeros(2)
        for i, weight in enumerate((0.25, 0.75)):
            model = measure.load_classifier(str(folder / f"ready{i}")).eval()
            with torch.no_grad():
                probabilities = model(**inputs).logits[0].softmax(-1)
            total += weight * (probabilities.flip(0) if i else probabilities)
        right += int(total.argmax()) == label
    return right / len(rows)


def test_a_student_of_several_phases_counts_by_its_last(sweep, monkeypatch):
    phases = [{"losses": {"hidden": {}}}, {}]
    monkeypatch.setattr(study, "make_pruner", lambda name: Always())
    with pytest.raises(DistillError, match="1 pruned"):
        run_sweep(path := sweep({"phases": phases}, space={"losses.kl.temperature": [2, 3]}, trials=1))
    result = json.loads((path.parent / "sweep" / "sweep.json").read_text())
    assert (result["trials"][0]["steps"], len(result["trials"][0]["evaluations"])) == (2, 1)
    assert "phase 2" in (path.parent / "sweep" / "trials" / "0000" / "log.txt").read_text()


def test_the_best_of_each_shape_is_measured_and_the_others_are_not(sweep, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "BEST", 1)
    space = {"losses.kl.temperature": [1, 2, 3], "student.from_teacher.layers": [1, 2]}
    result = run_sweep(sweep(space=space, sampler="grid", trials=6, metric="f1_macro"))
    assert result["metric"] == "f1_macro"
    folders = [
        tmp_path / "sweep" / "trials" / f"{found['number']:04d}" / "student" / "seed-0" for found in result["trials"]
    ]
    scores = [record_of(folder)["validation"] for folder in folders]
    assert [found["value"] for found in result["trials"]] == [score["f1_macro"] for score in scores]
    assert any(score["f1_macro"] != score["accuracy"] for score in scores)
    teacher = record_of(tmp_path / "sweep" / "base" / "teacher")["validation"]
    assert result["teacher"]["value"] == teacher["f1_macro"] != teacher["accuracy"]
    measured = [found for found in result["trials"] if found.get("latency") is not None]
    assert result["measured"] == len(measured) == 2
    for layers in (1, 2):
        alike = [t for t in result["trials"] if t["settings"]["student.from_teacher.layers"] == layers]
        (one,) = [t for t in alike if t in measured]
        assert one["value"] == max(t["value"] for t in alike)


def test_validation_that_picks_nothing_to_prune_and_points_that_will_fail_are_said(sweep):
    said: list[str] = []
    changes = {"training__eval_strategy": "no", "training__eval_steps": None}
    space = {"losses.kl.temperature": [2, -1]}
    result = run_sweep(sweep(changes, space=space, sampler="grid"), say=said.append)
    assert sorted(states(result)) == ["failed", "finished"]
    assert [found["evaluations"] for found in result["trials"]] == [[], []]
    assert any("eval_strategy is no, so nothing is pruned" in line for line in said)
    assert any(line.startswith("warning: such trials will fail: ") and "temperature" in line for line in said)


def test_the_teachers_precision_is_that_of_all_trials_and_of_the_measurement(sweep, tmp_path, monkeypatch):
    found = iter([(True, "bf16: it was measured")])
    # Asked again it would fail.
    monkeypatch.setattr(settling, "prefers_bf16", lambda *arguments: next(found))
    result = run_sweep(sweep(trials=2))
    assert states(result) == ["finished"] * 2
    assert result["teacher"]["value"] is not None
    for number in (0, 1):
        record = record_of(tmp_path / "sweep" / "trials" / f"{number:04d}" / "student" / "seed-0")
        assert record["fingerprint"]["training"]["bf16"] is True
