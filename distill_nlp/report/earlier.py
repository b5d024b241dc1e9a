"""What an earlier report of a run found, as far as it still holds."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distill_nlp.durable_files import read_json
from distill_nlp.report.evaluation import Answers
from distill_nlp.report.schema import SCHEMA_VERSION
from distill_nlp.report.scores import scores

REPORT_FILE = "report.json"
REPORT_MANIFEST_FILE = "report_manifest.json"
PREDICTIONS_FILE = "predictions.npz"
_COSTS = ("parameters", "size_mb", "weights_mb", "latency_ms", "throughput", "pass_memory")
_OF_SPEED = ("latency_samples", "throughput_batch_size", "throughput_batches")


@dataclass
class Earlier:
    """Results that are not computed again.

    Args:
        answers: of all models on these rows.
        costs: as `measure_costs` gives them; None where they were measured otherwise, elsewhere, or not in full.
    """

    answers: Answers
    costs: dict[str, dict[str, Any]] | None


def read_earlier(
    folder: Path, fingerprint: dict[str, Any], labels: np.ndarray, machine: dict[str, Any]
) -> Earlier | None:
    """What the report in a folder found of the same models on the same rows; None where there is no such report.

    Args:
        folder: with report.json and predictions.npz.
        fingerprint: of the report that is to be made: `models`, `test` and `weights` must be the same,
            `settings` for the costs.
        labels: of the test rows, which must be those in predictions.npz.
        machine: this one; costs of another do not hold.
    """
    report = read_json(folder / REPORT_FILE)
    if report is None:
        return None
    # Reports of earlier versions do not say which weights they are of.
    known = {"weights": fingerprint["weights"]} | report.get("run", {}).get("fingerprint", {})
    if any(known.get(key) != fingerprint[key] for key in ("models", "test", "weights")):
        return None
    logits = _logits(folder / PREDICTIONS_FILE, labels)
    if logits is None or not _of_one_run(report, logits, labels):
        return None
    answers = Answers(logits, report["models"]["teacher"].get("ensemble"))
    same_speed = all(known.get("settings", {}).get(key) == fingerprint["settings"][key] for key in _OF_SPEED)
    return Earlier(answers, _costs(report) if same_speed and report.get("machine") == machine else None)


def _logits(path: Path, labels: np.ndarray) -> dict[str, np.ndarray] | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None
    if not np.array_equal(found.pop("labels", None), labels):
        return None
    return found


def _of_one_run(report: dict[str, Any], logits: dict[str, np.ndarray], labels: np.ndarray) -> bool:
    """Whether the logits give the scores of the report: the two are written one after the other."""
    models = report["models"]
    said = {"teacher": models["teacher"]}
    said |= {f"{kind}/{seed}": s for kind in ("baseline", "student") for seed, s in models[kind]["seeds"].items()}
    if said.keys() != logits.keys():
        return False
    found = {name: scores(values, labels) for name, values in logits.items()}
    return all(np.isclose(found[name][key], said[name][key]) for name in said for key in found[name])


def _costs(report: dict[str, Any]) -> dict[str, dict[str, Any]] | None:
    if report.get("schema_version") != SCHEMA_VERSION:
        return None
    return {kind: {key: model[key] for key in _COSTS} for kind, model in report["models"].items()}
