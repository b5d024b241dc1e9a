"""Evaluates the models of an experiment on the test rows and compares them."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from distill_nlp.config import ReportSection
from distill_nlp.config_training import task_metric
from distill_nlp.ensemble import mean_logits
from distill_nlp.inference import predict_logits
from distill_nlp.labels import label_order
from distill_nlp.loading import load_classifier, load_config
from distill_nlp.losses import ModelShape
from distill_nlp.losses.base import MULTI_LABEL, SINGLE_LABEL
from distill_nlp.report.scores import agreement, compared, right_rows, scores
from distill_nlp.report.speed import Run, measure_speed
from distill_nlp.report.statistics import gap_closed, interval, mcnemar

SCHEMA_VERSION = 1
LOGITS = "logits"


@dataclass
class ReportTeacher:
    """The teacher, or one of an ensemble.

    Args:
        path: Hub id or folder of the fine-tuned model.
        test: the test rows as it reads them, tokenized.
        tokenizer: that pads them.
        revision: on the Hub.
        weight: in the ensemble's mean.
        restrict_labels: keep only the student's labels.
    """

    path: str
    test: Any
    tokenizer: Any
    revision: str | None = None
    weight: float = 1.0
    restrict_labels: bool = False


def build_report(
    teachers: Sequence[ReportTeacher],
    baselines: Mapping[int, Path],
    students: Mapping[int, Path],
    tokenizer: Any,
    test: Any,
    label_names: list[str],
    settings: ReportSection,
    mean: str = "probabilities",
    device: Any = "cpu",
) -> dict[str, Any]:
    """Runs every model over the test rows, once, and compares.

    Args:
        teachers: the teacher, or all of an ensemble, which is then compared as one.
        baselines, students: seed -> folder, the same seeds in both.
        tokenizer: of the baselines and the students.
        test: tokenized rows with `labels`, as these read them; lists of 0 and 1 where texts have several labels.
        label_names: names of the classes, by index.
        settings: what to measure.
        mean: that an ensemble takes, "probabilities" or "logits".
        device: where to run.

    Returns:
        A JSON-ready dict; under `logits`, which is no part of report.json, each model's logits by name.
    """
    rows = test.to_list()
    labels = np.array([row["labels"] for row in rows])
    problem_type = MULTI_LABEL if labels.ndim == 2 else SINGLE_LABEL
    student_config = load_config(str(next(iter(students.values()))))
    runs, answers = [], []
    for i, teacher in enumerate(teachers):
        which = f" {i + 1} of {len(teachers)}" if len(teachers) > 1 else ""
        model = load_classifier(teacher.path, teacher.revision).to(device)
        runs.append(Run(model, teacher.tokenizer, teacher.test.to_list()))
        found = predict_logits(model, teacher.tokenizer, runs[-1].rows, description=f"Evaluating teacher{which}")
        order = label_order(model.config, student_config, teacher.restrict_labels)
        answers.append(found if order is None else found[:, order])
    logits = {"teacher": answers[0] if len(answers) == 1 else _mean(answers, teachers, mean, student_config)}
    for kind, folders in (("baseline", baselines), ("student", students)):
        for seed, folder in folders.items():
            model = load_classifier(str(folder)).to(device)
            name = f"{kind} seed {seed}"
            logits[f"{kind}/{seed}"] = predict_logits(model, tokenizer, rows, description=f"Evaluating {name}")

    sizes = [_size(run.model, teacher.path) for run, teacher in zip(runs, teachers, strict=True)]
    models: dict[str, Any] = {
        "teacher": {
            "path": str(teachers[0].path),
            **scores(logits["teacher"], labels),
            **{key: round(sum(size[key] for size in sizes), 2) for key in sizes[0]},
        }
    }
    if len(teachers) > 1:
        models["teacher"] |= {
            "ensemble": [
                {"path": str(t.path), "weight": t.weight, **scores(found, labels)}
                for t, found in zip(teachers, answers, strict=True)
            ],
            "mean": mean,
        }
    timed = {"teacher": runs}
    for kind, folders in (("baseline", baselines), ("student", students)):
        seeds = {
            str(seed): {
                "path": str(folder),
                **scores(logits[f"{kind}/{seed}"], labels),
                "agreement": agreement(logits[f"{kind}/{seed}"], logits["teacher"], labels.ndim == 2),
            }
            for seed, folder in folders.items()
        }
        model = load_classifier(str(next(iter(folders.values()))))
        timed[kind] = [Run(model, tokenizer, rows)]
        summarized = [key for key in next(iter(seeds.values())) if key != "path"]
        summary = {key: _mean_sd([s[key] for s in seeds.values()]) for key in summarized}
        models[kind] = {"seeds": seeds, **summary, **_size(model, next(iter(folders.values())))}
    for name, speed in measure_speed(timed, settings, device).items():
        models[name] |= speed

    return {
        "schema_version": SCHEMA_VERSION,
        "problem_type": problem_type,
        "metric": task_metric(problem_type),
        "test_rows": len(rows),
        "label_names": label_names,
        "models": models,
        "comparison": _compare(logits, labels, list(students), settings.bootstrap_samples),
        "machine": machine(device),
        LOGITS: {**logits, "labels": labels},
    }


def _mean(answers: list[np.ndarray], teachers: Sequence[ReportTeacher], mean: str, config: Any) -> np.ndarray:
    total = sum(teacher.weight for teacher in teachers)
    shares = [teacher.weight / total for teacher in teachers]
    problem_type = ModelShape.from_config(config).problem_type
    return mean_logits([torch.from_numpy(found) for found in answers], shares, mean, problem_type).numpy()


def _compare(logits: dict[str, np.ndarray], labels: np.ndarray, seeds: list[int], samples: int) -> dict[str, Any]:
    """Student against baseline: differences with intervals over rows and seeds, and McNemar's test for each seed."""
    baselines, students = ([f"{kind}/{seed}" for seed in seeds] for kind in ("baseline", "student"))
    # Each resample draws test rows, the same for all models, and then seeds: another run would have had other ones.
    (t, b, s), values = compared(logits, labels, [["teacher"], baselines, students], samples)  # (samples, 1 + 2 seeds)
    drawn = np.random.default_rng(1).integers(len(seeds), size=(samples, len(seeds)))
    bt = values[:, 0]
    bb = np.take_along_axis(values[:, 1 : 1 + len(seeds)], drawn, axis=1).mean(axis=1)
    bs = np.take_along_axis(values[:, 1 + len(seeds) :], drawn, axis=1).mean(axis=1)
    closed = float(gap_closed(t, b, s))
    tests = {}
    for seed, student, baseline in zip(seeds, students, baselines, strict=True):
        tests[str(seed)] = _named(mcnemar(*(right_rows(logits[name], labels) for name in (student, baseline))))
    metric = task_metric(MULTI_LABEL if labels.ndim == 2 else SINGLE_LABEL)
    return {
        "difference": {"value": float(s - b), "interval": interval(bs - bb)},
        "retention": {"value": float(s / t) if t else None, "interval": interval(bs / np.where(bt > 0, bt, np.nan))},
        "gap_closed": {
            "value": closed if np.isfinite(closed) else None,
            "interval": interval(gap_closed(bt, bb, bs)) if np.isfinite(closed) else None,
        },
        f"{metric}_intervals": {"teacher": interval(bt), "baseline": interval(bb), "student": interval(bs)},
        "mcnemar": {"seeds": tests},
        "bootstrap_samples": samples,
    }


def _named(test: dict[str, Any]) -> dict[str, Any]:
    return {"student_only": test["a_only"], "baseline_only": test["b_only"], "p_value": test["p_value"]}


def _mean_sd(values: list[float]) -> dict[str, float | None]:
    return {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None}


def _size(model: nn.Module, path: str | Path) -> dict[str, Any]:
    """Parameters, and megabytes (10^6) of the weights on disk; for a model on the Hub, of its tensors."""
    folder = Path(path).expanduser()
    # A folder may hold the same weights in both formats.
    files = list(folder.glob("model*.safetensors")) or list(folder.glob("pytorch_model*.bin"))
    size = sum(f.stat().st_size for f in files) or sum(t.nbytes for t in model.state_dict().values())
    return {"parameters": sum(p.numel() for p in model.parameters()), "size_mb": round(size / 1e6, 2)}


def machine(device: Any) -> dict[str, Any]:
    """What the speeds were measured on."""
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else _processor()
    return {"device": str(device), "name": name, "cores": os.cpu_count(), "threads": torch.get_num_threads()}


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
