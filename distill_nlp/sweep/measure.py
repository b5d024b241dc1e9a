"""What the best trials and the teacher cost: timed in turns on the validation rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import EvalPrediction

from distill_nlp.config import Experiment
from distill_nlp.durable_files import read_json
from distill_nlp.ensemble import mean_logits
from distill_nlp.inference import predict_logits
from distill_nlp.labels import label_order
from distill_nlp.loading import load_classifier
from distill_nlp.losses import ModelShape
from distill_nlp.materials import Materials
from distill_nlp.metrics import compute_metrics
from distill_nlp.pipeline import Pipeline
from distill_nlp.report.build import machine
from distill_nlp.report.speed import Run, measure_speed
from distill_nlp.stage_training import Say
from distill_nlp.sweep.plan import SweepPlan
from distill_nlp.sweep.tables import TABLE_FILE, front_of, ranked
from distill_nlp.sweep.trial import TeacherHome, student_folder

BEST = 3
MOST_MEASURED = 12
_SHAPELESS = ("dropout", "dtype", "label", "name_or_path", "version", "architectures", "problem_type", "token_id")
"""Parts of the names of a config's settings that change no time."""


def add_costs(result: dict[str, Any], plan: SweepPlan, base: TeacherHome, say: Say) -> None:
    """Adds latency (ms, p50 of one row) and throughput (rows/s) to teacher and trials that can be on the front.

    Models of one shape take the same time, so that only the best of each shape can be on the front of latency. These
    and the best few are timed, at most `MOST_MEASURED`. What was timed already on this machine is not timed again.
    """
    device = PartialState().device
    chosen = candidates(result, plan)
    result["measured"] = len(chosen)
    result["machine"] = machine(device)
    earlier = read_json(plan.root / TABLE_FILE) or {}
    known = {t["number"]: t for t in earlier.get("trials", ()) if t.get("latency") is not None}
    if known.keys() == set(chosen) and earlier.get("machine") == result["machine"]:
        result["teacher"] = earlier["teacher"]
        for trial in result["trials"]:
            if trial["number"] in known:
                trial |= {key: known[trial["number"]][key] for key in ("latency", "throughput")}
    else:
        say(f"measuring teacher and {len(chosen)} trials, in turns")
        _measure(result, chosen, plan, base, device)
    result["fronts"] = {cost: front_of(result["trials"], cost) for cost in ("latency", "parameters")}


def candidates(result: dict[str, Any], plan: SweepPlan) -> list[int]:
    """Numbers of the trials to time: the best of each shape, those on the front of size first, and the best few."""
    order = ranked(result["trials"])
    best_of_shape: dict[str, int] = {}
    for trial in order:
        best_of_shape.setdefault(_shape(trial, plan), trial["number"])
    front = set(result["fronts"]["parameters"])
    shapes = sorted(best_of_shape.values(), key=lambda number: number not in front)
    best = [trial["number"] for trial in order[:BEST]]
    return list(dict.fromkeys([*best, *shapes]))[:MOST_MEASURED]


def _shape(trial: dict[str, Any], plan: SweepPlan) -> str:
    """What its time depends on: the model's config, and how texts are cut."""
    experiment = _experiment(trial, plan)
    config = read_json(_folder(trial, plan, experiment) / "config.json") or {}
    kept = {k: v for k, v in config.items() if not any(part in k for part in _SHAPELESS)}
    return json.dumps([kept, experiment.data.max_length], sort_keys=True)


def _experiment(trial: dict[str, Any], plan: SweepPlan) -> Experiment:
    return plan.experiment(trial["settings"], plan.root)


def _folder(trial: dict[str, Any], plan: SweepPlan, experiment: Experiment) -> Path:
    return student_folder(plan, trial["number"], experiment).path


def _measure(result: dict[str, Any], chosen: list[int], plan: SweepPlan, base: TeacherHome, device: Any) -> None:
    trials = {trial["number"]: trial for trial in result["trials"]}
    best = trials[result["best"]]
    timed, value = _teacher(plan, base, best, result["metric"], device)
    runs: dict[str, list[Run]] = {"teacher": timed}
    rows_of: dict[str, tuple[Any, list[dict[str, Any]]]] = {}
    for number in chosen:
        own = _experiment(trials[number], plan)
        # Trials that read alike share their rows.
        key = own.model_dump_json(include={"data", "teacher", "student"})
        if key not in rows_of:
            materials = Materials(own)
            rows_of[key] = (materials.tokenizer, materials.tokens_alone(materials.splits.validation).to_list())
        tokenizer, rows = rows_of[key]
        model = load_classifier(str(_folder(trials[number], plan, own)))
        runs[str(number)] = [Run(model, tokenizer, rows)]
    # A swept split of validation may be shorter.
    count = min(len(run.rows) for models in runs.values() for run in models)
    for models in runs.values():
        for run in models:
            run.rows = run.rows[:count]
    speeds = measure_speed(runs, _experiment(best, plan).report, device)
    for name, speed in speeds.items():
        found = {"latency": speed["latency_ms"]["p50"], "throughput": speed["throughput"]}
        if name != "teacher":
            trials[int(name)] |= found
            continue
        parameters = sum(p.numel() for run in timed for p in run.model.parameters())
        result["teacher"] = {"value": value, "parameters": parameters, **found}


def _teacher(
    plan: SweepPlan, base: TeacherHome, trial: dict[str, Any], metric: str, device: Any
) -> tuple[list[Run], float]:
    """The models of the base experiment's teacher with their validation rows, and its metric there."""
    pipeline = Pipeline(plan.experiment(base.settings, base.root))
    pipeline.settle(measure=False)
    materials, experiment = pipeline.materials, pipeline.experiment
    labels = materials.tokens_alone(materials.splits.validation)["labels"]
    student = load_classifier(str(_folder(trial, plan, _experiment(trial, plan)))).config
    runs, answers = [], []
    for part in materials.teachers:
        path, revision = pipeline.teachers.source(part)
        rows = materials.tokens_alone(materials.splits.validation, part).to_list()
        model = load_classifier(path, revision).to(device)
        runs.append(Run(model, part.tokenizer, rows))
        logits = torch.from_numpy(predict_logits(model, part.tokenizer, rows))
        order = label_order(model.config, student, part.settings.restrict_labels)
        answers.append(logits if order is None else logits[:, order])
    logits = answers[0]
    if len(answers) > 1:
        weights = torch.tensor([part.settings.weight for part in materials.teachers])
        problem_type = ModelShape.from_config(student).problem_type
        shares = (weights / weights.sum()).tolist()
        logits = mean_logits(answers, shares, experiment.teacher.mean, problem_type)
    return runs, compute_metrics(EvalPrediction(logits.numpy(), labels))[metric]
