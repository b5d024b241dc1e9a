"""The usual report, of images: their names stand in the place of texts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm

from distill_nlp.config import ReportSection
from distill_nlp.labels import label_order
from distill_nlp.report import ReportTeacher, build_report
from distill_nlp.report.earlier import Earlier
from distill_nlp.report.evaluation import Answers, model_size
from distill_nlp.report.rows import TestRows
from distill_nlp.report.scores import right_rows
from distill_nlp.report.speed import measure_speed
from distill_nlp.report.statistics import paired_over_seeds
from distill_nlp.stage_training import versions
from image_classifiers.files import Images
from image_classifiers.trainings import DEVICE, Runs

KINDS = ("baseline", "student")


@dataclass
class TimedImages:
    """A model with the test images, as the package measures speed and memory."""

    model: nn.Module
    images: Images

    @property
    def rows(self) -> Sequence[dict[str, Any]]:
        return [{}] * len(self.images)

    def prepare(self, device: Any) -> None:
        self.model.eval().to(device)

    def seconds(self, part: Sequence[int], device: Any) -> float:
        batch = self.images.pixel_values(list(part)).to(device)
        wait: Callable[[], Any] = torch.accelerator.synchronize if torch.device(device).type != "cpu" else lambda: None
        with torch.inference_mode():
            wait()
            start = time.perf_counter()
            self.model(pixel_values=batch)
            wait()
        return time.perf_counter() - start


def predict(model: nn.Module, images: Images, batch_size: int, what: str) -> np.ndarray:
    """(N, C) logits of all images, in order."""
    found = []
    with torch.inference_mode():
        starts = range(0, len(images), batch_size)
        for start in tqdm(starts, desc=f"Evaluating {what}", disable=None, leave=False):
            rows = range(start, min(start + batch_size, len(images)))
            outputs = model(pixel_values=images.pixel_values(rows).to(DEVICE))
            found.append(getattr(outputs, "logits", outputs).float().cpu().numpy())
    return np.concatenate(found)


def make_report(runs: Runs, models: dict[str, nn.Module]) -> dict[str, Any]:
    """The usual report, with the names of images in the place of texts."""
    options, data = runs.options, runs.data
    logits = {name: predict(model, data.test, 4 * options.batch_size, name) for name, model in models.items()}
    order = label_order(models["teacher"].config, models[f"student/{options.seeds[0]}"].config)
    logits["teacher"] = logits["teacher"] if order is None else logits["teacher"][:, order]
    folders = {kind: {seed: runs.folders[f"{kind}/seed-{seed}"].path for seed in options.seeds} for kind in KINDS}
    paths: dict[str, Any] = {kind: own[options.seeds[0]] for kind, own in folders.items()}
    paths["teacher"] = runs.folders["teacher"].path if "teacher" in runs.folders else options.teacher
    firsts = {"teacher": models["teacher"]} | {kind: models[f"{kind}/{options.seeds[0]}"] for kind in KINDS}
    costs = {kind: model_size(model, paths[kind]) for kind, model in firsts.items()}
    timed = {kind: [TimedImages(model, data.test)] for kind, model in firsts.items()}
    for kind, speed in measure_speed(timed, ReportSection(), DEVICE).items():
        costs[kind] |= speed
    report = build_report(
        teachers=[ReportTeacher(str(paths["teacher"]), None, None)],
        baselines=folders["baseline"],
        students=folders["student"],
        tokenizer=None,
        test=Dataset.from_dict({"labels": data.test.labels}),
        label_names=data.classes,
        settings=ReportSection(),
        device=DEVICE,
        rows=TestRows(data.test.names),
        earlier=Earlier(Answers(logits), costs),
    )
    records = {name: folder.record() or {} for name, folder in runs.folders.items()}
    keys = ("objective", "steps", "seconds", "energy")
    report["run"] = {
        "dataset": str(options.data),
        "stages": {name: {key: record.get(key) for key in keys} for name, record in records.items()},
        "versions": versions(),
        "fingerprint": {name: record.get("fingerprint") for name, record in records.items()},
    }
    return report


def over_seeds(report: dict[str, Any], seeds: Sequence[int]) -> str:
    """One line: the paired test over all seeds."""
    logits = report["logits"]
    right = {name: right_rows(values, logits["labels"]) for name, values in logits.items() if name != "labels"}
    p = paired_over_seeds([(right[f"student/{seed}"], right[f"baseline/{seed}"]) for seed in seeds])
    return f"student against baseline, paired t-test over {report['test_rows']:,} test rows, all seeds: p = {p:.2g}"
