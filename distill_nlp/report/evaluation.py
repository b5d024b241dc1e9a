"""What is taken from the models themselves: their logits on the test rows, their sizes, speed and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from distill_nlp.config import ReportSection
from distill_nlp.ensemble import mean_logits
from distill_nlp.inference import predict_logits
from distill_nlp.labels import label_order
from distill_nlp.loading import load_classifier, load_config
from distill_nlp.losses import ModelShape
from distill_nlp.report.scores import scores
from distill_nlp.report.speed import Run, measure_speed

Folders = Mapping[int, Path]
"""Seed -> folder of a finished model."""


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


@dataclass
class Answers:
    """The models' answers on the test rows.

    Args:
        logits: `teacher`, `baseline/SEED`, `student/SEED` -> (N, C).
        members: of an ensemble, what the report says of each; None for a single teacher.
    """

    logits: dict[str, np.ndarray]
    members: list[dict[str, Any]] | None = None


def predict_all(
    teachers: Sequence[ReportTeacher],
    baselines: Folders,
    students: Folders,
    tokenizer: Any,
    rows: list[dict[str, Any]],
    mean: str,
    device: Any,
) -> Answers:
    """Runs every model over the test rows, once. Arguments as of `build_report`; rows are tokenized, with `labels`."""
    student_config = load_config(str(next(iter(students.values()))))
    labels = np.array([row["labels"] for row in rows])
    answers = []
    for i, teacher in enumerate(teachers):
        which = f" {i + 1} of {len(teachers)}" if len(teachers) > 1 else ""
        model = load_classifier(teacher.path, teacher.revision).to(device)
        found = predict_logits(
            model, teacher.tokenizer, teacher.test.to_list(), description=f"Evaluating teacher{which}"
        )
        order = label_order(model.config, student_config, teacher.restrict_labels)
        answers.append(found if order is None else found[:, order])
    members = None
    if len(teachers) > 1:
        members = [
            {"path": str(teacher.path), "weight": teacher.weight, **scores(found, labels)}
            for teacher, found in zip(teachers, answers, strict=True)
        ]
    logits = {"teacher": answers[0] if len(answers) == 1 else _mean(answers, teachers, mean, student_config)}
    for kind, folders in (("baseline", baselines), ("student", students)):
        for seed, folder in folders.items():
            model = load_classifier(str(folder)).to(device)
            logits[f"{kind}/{seed}"] = predict_logits(
                model, tokenizer, rows, description=f"Evaluating {kind} seed {seed}"
            )
    return Answers(logits, members)


def measure_costs(
    teachers: Sequence[ReportTeacher],
    baselines: Folders,
    students: Folders,
    tokenizer: Any,
    rows: list[dict[str, Any]],
    settings: ReportSection,
    device: Any,
) -> dict[str, dict[str, Any]]:
    """Size, speed and memory of each kind of model, of the first seed; arguments as of `predict_all`."""
    timed, sizes = {"teacher": []}, []
    for teacher in teachers:
        model = load_classifier(teacher.path, teacher.revision)
        timed["teacher"].append(Run(model, teacher.tokenizer, teacher.test.to_list()))
        sizes.append(model_size(model, teacher.path))
    costs = {"teacher": {key: round(sum(size[key] for size in sizes), 2) for key in sizes[0]}}
    for kind, folders in (("baseline", baselines), ("student", students)):
        folder = next(iter(folders.values()))
        model = load_classifier(str(folder))
        timed[kind] = [Run(model, tokenizer, rows)]
        costs[kind] = model_size(model, folder)
    for name, speed in measure_speed(timed, settings, device).items():
        costs[name] |= speed
    return costs


def _mean(answers: list[np.ndarray], teachers: Sequence[ReportTeacher], mean: str, config: Any) -> np.ndarray:
    total = sum(teacher.weight for teacher in teachers)
    shares = [teacher.weight / total for teacher in teachers]
    problem_type = ModelShape.from_config(config).problem_type
    return mean_logits([torch.from_numpy(found) for found in answers], shares, mean, problem_type).numpy()


def model_size(model: nn.Module, path: str | Path) -> dict[str, Any]:
    """Parameters, megabytes (10^6) of the weights on disk (for a model on the Hub, of its tensors) and in memory."""
    folder = Path(path).expanduser()
    # A folder may hold the same weights in both formats.
    files = list(folder.glob("model*.safetensors")) or list(folder.glob("pytorch_model*.bin"))
    weights = sum(t.nbytes for t in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())
    size = sum(f.stat().st_size for f in files) or weights
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "size_mb": round(size / 1e6, 2),
        "weights_mb": round(weights / 1e6, 2),
    }
