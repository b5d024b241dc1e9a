"""Evaluates the models of an experiment on the test rows and compares them."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from distill_nlp.config import ReportSection
from distill_nlp.config_training import task_metric
from distill_nlp.losses.base import MULTI_LABEL, SINGLE_LABEL
from distill_nlp.report.earlier import Earlier
from distill_nlp.report.evaluation import Answers, Folders, ReportTeacher, measure_costs, predict_all
from distill_nlp.report.quality import detail, kl_to_teacher, quality
from distill_nlp.report.rows import TestRows, slices
from distill_nlp.report.schema import SCHEMA_VERSION
from distill_nlp.report.scores import Logits, agreement, compared, right_rows, scores
from distill_nlp.report.statistics import gap_closed, interval, mcnemar, seed_shifts

LOGITS = "logits"
ROWS = "rows"
PRIVATE = (LOGITS, ROWS)
"""What a report holds beside that which report.json does."""


def build_report(
    teachers: Sequence[ReportTeacher],
    baselines: Folders,
    students: Folders,
    tokenizer: Any,
    test: Any,
    label_names: list[str],
    settings: ReportSection,
    mean: str = "probabilities",
    device: Any = "cpu",
    rows: TestRows | None = None,
    earlier: Earlier | None = None,
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
        rows: the same rows as texts, for scores by length and the lists of the page; left out without.
        earlier: what a report of just these models and rows found, which is then not done again.

    Returns:
        A JSON-ready dict, see `schema.Report`; under `logits` and `rows`, which are no part of report.json, each
        model's logits by name, and the rows.
    """
    examples = test.to_list()
    labels = np.array([row["labels"] for row in examples])
    problem_type = MULTI_LABEL if labels.ndim == 2 else SINGLE_LABEL
    models = (teachers, baselines, students, tokenizer, examples)
    answers = earlier.answers if earlier is not None else predict_all(*models, mean, device)
    costs = earlier.costs if earlier is not None else None
    costs = costs or measure_costs(*models, settings, device)
    logits = answers.logits
    report = {
        "schema_version": SCHEMA_VERSION,
        "problem_type": problem_type,
        "metric": task_metric(problem_type),
        "test_rows": len(examples),
        "label_names": label_names,
        "models": {
            "teacher": _teacher(teachers, answers, labels, mean) | costs["teacher"],
            "baseline": _seeds("baseline", baselines, logits, labels) | costs["baseline"],
            "student": _seeds("student", students, logits, labels) | costs["student"],
        },
        "comparison": compare_seeds(logits, labels, list(students), settings.bootstrap_samples),
        "machine": machine(device),
        LOGITS: {**logits, "labels": labels},
    }
    if rows is not None:
        report["slices"] = slices(rows, logits, labels, list(students))
        report[ROWS] = rows
    return report


def _teacher(teachers: Sequence[ReportTeacher], answers: Answers, labels: np.ndarray, mean: str) -> dict[str, Any]:
    found = _scored(answers.logits["teacher"], labels)
    ensemble = {} if answers.members is None else {"ensemble": answers.members, "mean": mean}
    return {"path": str(teachers[0].path), **found, **ensemble}


def _seeds(kind: str, folders: Folders, logits: Logits, labels: np.ndarray) -> dict[str, Any]:
    """Each seed's scores, and of each score its mean and deviation over seeds."""
    several, teacher = labels.ndim == 2, logits["teacher"]
    seeds = {}
    for seed, folder in folders.items():
        own = logits[f"{kind}/{seed}"]
        against = {
            "agreement": agreement(own, teacher, several),
            "kl_to_teacher": kl_to_teacher(own, teacher, several),
        }
        seeds[str(seed)] = {"path": str(folder), **_scored(own, labels), **against}
    first = next(iter(seeds.values()))
    summary = {key: _mean_sd([s[key] for s in seeds.values()]) for key in first if isinstance(first[key], float)}
    return {"seeds": seeds, **summary}


def _scored(logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    return {**scores(logits, labels), **quality(logits, labels), **detail(logits, labels)}


def compare_seeds(logits: Logits, labels: np.ndarray, seeds: list[int], samples: int) -> dict[str, Any]:
    """Student against baseline: differences with intervals over rows and seeds, and McNemar's test for each seed.

    Args:
        logits: of `teacher`, `baseline/SEED` and `student/SEED`, (N, C) each.
        labels: (N,) classes, or (N, C) of 0 and 1.
        seeds: of baselines and students.
        samples: number of resamples.

    Returns:
        See `schema.Comparison`.
    """
    baselines, students = ([f"{kind}/{seed}" for seed in seeds] for kind in ("baseline", "student"))
    found, values = compared(logits, labels, [["teacher"], baselines, students], samples)  # (samples, 1 + 2 seeds)
    t, b, s = (float(own.mean()) for own in found)
    # Each resample draws test rows, the same for all models, and then other seeds than this run happened to have.
    shifts = seed_shifts(len(seeds), samples, seed=1)
    bt = values[:, 0]
    of_rows = [part.mean(axis=1) for part in (values[:, 1 : 1 + len(seeds)], values[:, 1 + len(seeds) :])]
    moved = [shifts @ (own - own.mean()) for own in found[1:]]
    bb, bs = (np.clip(rows + shift, 0.0, 1.0) for rows, shift in zip(of_rows, moved, strict=True))
    closed = float(gap_closed(t, b, s))
    tests = {}
    for seed, student, baseline in zip(seeds, students, baselines, strict=True):
        tests[str(seed)] = _named(mcnemar(*(right_rows(logits[name], labels) for name in (student, baseline))))
    metric = task_metric(MULTI_LABEL if labels.ndim == 2 else SINGLE_LABEL)
    return {
        "difference": {
            "value": float(s - b),
            "interval": interval(bs - bb),
            "rows_interval": interval(of_rows[1] - of_rows[0]),
        },
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


def machine(device: Any) -> dict[str, Any]:
    """What the speeds were measured on."""
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else _processor()
    return {
        "device": torch.device(device).type,
        "name": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
