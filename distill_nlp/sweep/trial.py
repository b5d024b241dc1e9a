"""One trial: a student of one seed on a teacher that is there, watched at each evaluation."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import safetensors
import torch
from optuna.trial import TrialState
from transformers import TrainerCallback

from distill_nlp.config import Experiment
from distill_nlp.durable_files import storage_problem
from distill_nlp.errors import DistillError
from distill_nlp.pipeline import Pipeline
from distill_nlp.resumable import CheckpointNotWritten
from distill_nlp.stage_training import Say
from distill_nlp.stages import StageFolder
from distill_nlp.sweep.plan import SweepPlan
from distill_nlp.sweep.study import REASON, Claim, SweepStudy

BASE = "base"
CACHE = "teacher_cache"


def trial_folder(plan: SweepPlan, number: int) -> Path:
    """Where a trial's student and log lie."""
    return plan.root / "trials" / f"{number:04d}"


def student_folder(plan: SweepPlan, number: int, experiment: Experiment) -> StageFolder:
    """The student of a trial."""
    return StageFolder(trial_folder(plan, number) / "student" / f"seed-{experiment.seeds[0]}")


class PruningCallback(TrainerCallback):
    """Reports a metric at each evaluation, and ends the training where the pruner says so.

    Evaluations are counted, not steps: so trials with other batch sizes compare.

    Args:
        trial: what to report to.
        metric: a validation metric.
        checkpoints: output folder of the training that counts; a student's earlier phases do not.
    """

    def __init__(self, trial: optuna.trial.Trial, metric: str, checkpoints: Path) -> None:
        self.trial = trial
        self.metric = metric
        self.checkpoints = checkpoints
        self.counts = False
        self.steps = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.counts = Path(args.output_dir) == self.checkpoints

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.counts:
            self.steps = state.global_step

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The evaluation of the best checkpoint comes after it.
        self.counts = False

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        key = f"eval_{self.metric}"
        value = (metrics or {}).get(key)
        if not self.counts or value is None:
            return
        evaluation = sum(key in entry for entry in state.log_history)
        # Where a training goes on, Optuna has had some of them.
        known = self.trial.study.get_trials(deepcopy=False)[self.trial.number].intermediate_values
        if evaluation not in known:
            self.trial.report(value, evaluation)
        if state.global_step < state.max_steps and self.trial.should_prune():
            raise optuna.TrialPruned(f"{self.metric} {value:.4f} at evaluation {evaluation}")


@dataclass
class TeacherHome:
    """The teacher of most trials.

    Args:
        root: the folder of its stages and its cache.
        settings: of the first point, which it was made with.
        fingerprint: of each of its models.
    """

    root: Path
    settings: dict[str, Any]
    fingerprint: list[Any]


def quiet(say: Say) -> Say:
    """Without the lines on data: they count the rows of a test split that is another one."""
    return lambda line: None if line.startswith("data ") else say(line)


def prepare_base(plan: SweepPlan, study: SweepStudy, settings: dict[str, Any], say: Say) -> TeacherHome:
    """Trains the teacher of the base experiment and fills its cache, once for all trials and workers.

    Args:
        plan: of the sweep.
        study: locks out the other workers meanwhile.
        settings: of the first point.
        say: gets one line at each event.

    Raises:
        UsageError: data, models and settings do not fit each other.
    """
    pipeline = Pipeline(plan.experiment(settings, plan.root / BASE), quiet(say))
    with study.lock(BASE, waits=lambda: say("waiting for another process, which trains the teacher")):
        # Here, so that the first worker decides for all; the trials train as it does.
        pipeline.settle()
        pipeline.students.check()
        study.keep_to(pipeline.prints.given)
        home = TeacherHome(pipeline.root, settings, pipeline.prints.teachers)
        pipeline.run(("teacher",), doctor=False)
        if any(view.live_because is None for view in pipeline.students.views):
            pipeline.fill_cache()
    return home


def run_trial(plan: SweepPlan, study: SweepStudy, claim: Claim, base: TeacherHome, say: Say) -> str:
    """Trains the student of a claim and writes down how it went; gives a line on it.

    What goes wrong is the trial's end and not the sweep's, but for an interruption, and for what is wrong with the
    machine: a disk that is full, a device that takes no more work. There the next trial would end alike, so this one
    is left to be gone on with.
    """
    folder = trial_folder(plan, claim.number)
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    watch: PruningCallback | None = None
    with open(folder / "log.txt", "a", encoding="utf-8") as log:

        def write(line: str) -> None:
            log.write(line + "\n")
            log.flush()

        try:
            pipeline, home = _pipeline(plan, study, claim, base, write, say)
            metric = study.metric
            student = student_folder(plan, claim.number, pipeline.experiment)
            watch = PruningCallback(claim.trial, metric, student.checkpoints)
            pipeline.runner.callbacks.append(watch)
            pipeline.run(("student",), doctor=False)
            value, record = _result(student, metric)
            record |= {"teacher": str(home.relative_to(plan.root))}
            state, words = TrialState.COMPLETE, f"{metric} {value:.4f}"
        except optuna.TrialPruned as pruned:
            value, record, state = None, {REASON: str(pruned)}, TrialState.PRUNED
            words = f"pruned, {pruned}"
        except Exception as error:
            traceback.print_exc(file=log)
            if storage_problem(error) is not None or _comes_of(error, CheckpointNotWritten):
                claim.give_up()
                raise
            if _comes_of(error, torch.AcceleratorError):
                # Not given up: settings that break the device each time count as failed after some attempts.
                claim.lock.release()
                raise
            text = " ".join(str(error).split())
            reason = text if isinstance(error, DistillError) else f"{type(error).__name__}: {text}"
            value, record, state = None, {REASON: reason}, TrialState.FAIL
            words = f"failed: {reason}"
    if state != TrialState.COMPLETE:
        # Half a student is of no use to anyone, and large.
        shutil.rmtree(folder / "student", ignore_errors=True)
    record = {"seconds": round(time.monotonic() - start, 1), "steps": watch.steps if watch else 0} | record
    claim.finish(state, record, value)
    return f"{words}, {record['steps']} steps in {record['seconds']:.0f} s"


def _comes_of(error: BaseException | None, kind: type[BaseException]) -> bool:
    while error is not None and not isinstance(error, kind):
        error = error.__cause__ or error.__context__
    return error is not None


def _pipeline(
    plan: SweepPlan, study: SweepStudy, claim: Claim, base: TeacherHome, log: Say, say: Say
) -> tuple[Pipeline, Path]:
    """The trial's pipeline with the teacher in place, and the folder that the teacher lies in."""
    folder, home = trial_folder(plan, claim.number), base.root
    pipeline = _trial_pipeline(plan, claim, folder, home / CACHE, log)
    fingerprint = pipeline.prints.teachers
    if fingerprint != base.fingerprint:
        digest = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:8]
        home = plan.root / "teachers" / digest
        say(f"trial {claim.number}: its settings change the teacher; it has one of its own, in {home}")
        with study.lock(f"teacher-{digest}"):
            _trial_pipeline(plan, claim, home, None, log).run(("teacher",), doctor=False)
        pipeline = _trial_pipeline(plan, claim, folder, home / CACHE, log)
    for part in pipeline.materials.teachers:
        if part.finished is None:
            _link(home / part.name, folder / part.name)
    return pipeline, home


def _trial_pipeline(plan: SweepPlan, claim: Claim, folder: Path, cache: Path | None, log: Say) -> Pipeline:
    pipeline = Pipeline(plan.experiment(claim.settings, folder, cache), log)
    pipeline.settle(as_in=plan.root / BASE)
    return pipeline


def _link(source: Path, target: Path) -> None:
    """Makes a finished teacher appear in the folder of a trial."""
    if target.exists():
        return
    try:
        # Relative: other machines may see the folder under another name.
        target.symlink_to(os.path.relpath(source, target.parent), target_is_directory=True)
    except OSError:
        shutil.copytree(source, target)


def _result(student: StageFolder, metric: str) -> tuple[float, dict[str, Any]]:
    """The metric of a finished student, and what else is known of it."""
    record = student.record() or {}
    value = record.get("validation", {}).get(metric)
    if value is None or math.isnan(value):
        there = ", ".join(record.get("validation", {})) or "none"
        raise DistillError(f"the validation metric {metric} is {value}; there are {there}")
    return value, {"steps": record["steps"], "validation": record["validation"], **sizes(student.path)}


def sizes(model: Path) -> dict[str, Any]:
    """Parameters of a saved model and megabytes (10^6) of its weights, without loading it."""
    parameters, size = 0, 0
    for file in model.glob("model*.safetensors"):
        size += file.stat().st_size
        with safetensors.safe_open(file, framework="pt") as weights:
            parameters += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    return {"parameters": parameters, "size_mb": round(size / 1e6, 2)}
