"""A sweep from its file to its tables: the teacher once, then trials until there are enough, then what they cost."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from optuna.trial import TrialState

from distill_nlp.errors import DistillError, UsageError
from distill_nlp.output_folder import check_can_be_made
from distill_nlp.stage_training import Say
from distill_nlp.sweep.measure import add_costs
from distill_nlp.sweep.plan import SweepPlan, load_sweep
from distill_nlp.sweep.space import Space
from distill_nlp.sweep.study import REASON, SweepStudy
from distill_nlp.sweep.tables import collect, write_tables
from distill_nlp.sweep.trial import TeacherHome, prepare_base
from distill_nlp.sweep.workers import first_gpu_alone, refuse_several_gpus, work, work_in_processes


def run_sweep(
    path: str | Path,
    overrides: Mapping[str, Any] | None = None,
    output_dir: str | None = None,
    trials: int | None = None,
    workers: int = 1,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Runs a sweep, or goes on with it, until it has its number of finished trials.

    The same call may run several times at once, on machines that share the folder: they share the trials, and the last
    one to finish measures and writes the tables. What an interrupted or killed one leaves is taken up by the next.
    A script that asks for several workers calls it under `if __name__ == "__main__":`, as it starts processes. Those
    have a GPU each; this process uses the first one alone, so call it before anything else uses CUDA.

    Args:
        path: of the sweep's YAML.
        overrides: settings of the experiment by dotted name, for all trials.
        output_dir, trials: instead of the file's.
        workers: processes on this machine.
        say: gets one line for the user at each event.

    Returns:
        What sweep.json holds; `running` counts the trials that others are still at, with which nothing is measured yet.

    Raises:
        UsageError: settings, data and models do not fit each other, the folder holds another sweep, or this process
            uses several GPUs already.
        DistillError: no trial came to its end; with the first reason.

    Example:
        >>> result = run_sweep("configs/sweeps/kl.yaml", trials=4)
        >>> result["best"], result["command"]
        (2, 'distill-nlp run configs/imdb_small.yaml --losses.kl.temperature 3.1 --output_dir runs/kl/base')
    """
    if workers < 1:
        raise UsageError(f"--workers must be at least 1, got {workers}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("a sweep is not launched on several ranks: each trial is one process; use --workers")
    with first_gpu_alone() as visible:
        plan = load_sweep(path, overrides, output_dir, trials)
        check_can_be_made(plan.root, "output_dir")
        space = Space(plan.sweep.space)
        definition = check(plan, space, say)
        study = SweepStudy(plan, space, definition)
        _ = study.wanted  # a grid that cannot be made is known before the teacher is trained
        base = prepare_base(plan, study, space.ends()[0], say)
        if study.finished < study.wanted:
            if workers > 1:
                arguments = (plan, space, definition, base)
                work_in_processes(min(workers, study.wanted - study.finished), work_apart, arguments, say, visible)
            # After the processes as well: one of them may have died.
            work(plan, study, base, say, partial(_write, plan, study))
        return finish(plan, study, base, say)


def work_apart(
    say: Say, go_on: Callable[[], bool], plan: SweepPlan, space: Space, definition: Mapping[str, Any], base: TeacherHome
) -> None:
    """`work` in a process of its own."""
    study = SweepStudy(plan, space, dict(definition))
    work(plan, study, base, say, partial(_write, plan, study), go_on)


def check(plan: SweepPlan, space: Space, say: Say) -> dict[str, Any]:
    """Validates the experiment at the first point; gives what makes the trials of a folder comparable.

    Raises:
        UsageError: the experiment with the first point's settings is not valid, or this process has several GPUs.
    """
    first, others = space.ends()
    experiment = plan.experiment(first, plan.root)
    if not experiment.training.use_cpu:
        refuse_several_gpus()
    for settings in others:
        try:
            plan.experiment(settings, plan.root)
        except UsageError as error:
            # Beside other values it may be valid, so it is not refused.
            say(f"warning: such trials will fail: {error}")
    metric = plan.metric(experiment)
    if experiment.training.eval_strategy == "no" and plan.sweep.pruner != "none":
        say("warning: training.eval_strategy is no, so nothing is pruned")
    return {
        "experiment": experiment.model_dump(mode="json", exclude_unset=True, exclude={"output_dir", "cache_dir"}),
        "space": plan.sweep.model_dump(mode="json")["space"],
        "metric": metric,
    }


def finish(plan: SweepPlan, study: SweepStudy, base: TeacherHome, say: Say) -> dict[str, Any]:
    """Measures what the best trials cost and writes the tables; see `run_sweep`."""
    if running := study.running():
        say(f"{running} trials are still run by other processes; the last of these writes the tables")
        return _write(plan, study) | {"running": running}
    failed = [t.user_attrs["record"][REASON] for t in study.trials if t.state == TrialState.FAIL]
    if not any(trial.state == TrialState.COMPLETE for trial in study.trials):
        _write(plan, study)
        pruned = len(study.trials) - len(failed)
        rest = f"; the first that failed: {failed[0]}" if failed else ""
        raise DistillError(f"no trial came to its end: {pruned} pruned, {len(failed)} failed{rest}")
    with study.lock("finish"):
        result = collect(plan, study)
        add_costs(result, plan, base, say)
        write_tables(result, plan.root)
    say(f"{plan.root / 'sweep.md'}, pareto.svg")
    return result | {"running": 0}


def _write(plan: SweepPlan, study: SweepStudy) -> dict[str, Any]:
    """The tables as far as they are known. Under the lock: an older state must not take the place of a newer one."""
    with study.lock("tables"):
        result = collect(plan, study)
        write_tables(result, plan.root)
    return result
