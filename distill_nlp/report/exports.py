"""Exports of a run's students, as `distill-nlp export` measured them: found beside the students, and shown."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from distill_nlp.loading import checkpoint_print
from distill_nlp.onnx_model import EXPORT_FILE, is_exported
from distill_nlp.report.schema import Export
from distill_nlp.stages import read_json

HEAD = ("export", "score: student → export", "other label", "weights", "latency p50, batch 1", "throughput")
NOTE = (
    "As measured by `distill-nlp export` on the rows named, by PyTorch and ONNX Runtime in turns on the CPU; times are "
    "relative to the student's in PyTorch, and to the teacher's where it was timed as well."
)


def read_exports(students: Mapping[int, Path]) -> list[dict[str, Any]]:
    """What the exports beside the students say of themselves, by seed and name.

    Args:
        students: seed -> folder of the finished student; its exports lie in `FOLDER-*`.

    Returns:
        JSON-ready dicts, see `schema.Export`. An export of other weights than the student's is left out, as is one
        whose record cannot be read.
    """
    found = []
    for seed, student in students.items():
        own = None
        for folder in sorted(student.parent.glob(f"{student.name}-*")):
            if not is_exported(str(folder)):
                continue
            own = own or checkpoint_print(str(student))
            record = read_json(folder / EXPORT_FILE) or {}
            try:
                if record["model"]["content"] == own["content"]:
                    found.append(_export(seed, folder.name, record))
            except (KeyError, TypeError, ValidationError):
                continue
    return found


def _export(seed: int, name: str, record: dict[str, Any]) -> dict[str, Any]:
    parity, size, speed = record["parity"], record["size_mb"], record["speed"]
    fields: dict[str, Any] = {
        "seed": seed,
        "name": name,
        "numbers": record["numbers"],
        "source": parity["source"],
        "rows": parity["rows"],
        "flips": parity["flips"],
        "max_difference": parity["max_difference"],
        "size_mb": {"student": size["original"], "export": size["exported"]},
    }
    if "metric" in parity:
        scores = {"student": parity["original"], "export": parity["exported"]}
        fields |= {"metric": parity["metric"], "score": scores}
    if speed is not None:
        own, student, teacher = speed["exported"], speed["original"], speed.get("teacher")
        fields["speed"] = {
            "latency_ms": own["latency_ms"],
            "throughput": own["throughput"],
            "batch_size": speed["batch_size"],
            "times_student": own["throughput"] / student["throughput"],
            "times_teacher": None if teacher is None else own["throughput"] / teacher["throughput"],
            "machine": speed["machine"],
        }
    return Export.model_validate(fields).model_dump()


def export_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Of each export the cells under `HEAD`."""
    return [_cells(found) for found in report.get("exports") or []]


def _cells(found: dict[str, Any]) -> tuple[str, ...]:
    score, speed, size = found["score"], found["speed"], found["size_mb"]
    title = {"accuracy": "accuracy", "f1_macro": "macro-F1", None: ""}[found["metric"]]
    compared = "no labels" if score is None else f"{title} {score['student']:.4f} → {score['export']:.4f}"
    cells = [
        f"seed {found['seed']}, ONNX {found['numbers']}",
        compared,
        f"{found['flips']:,} of {found['rows']:,} rows ({found['source']})",
        f"{size['export']:.1f} MB ({size['student'] / size['export']:.1f}× smaller)",
    ]
    if speed is None:
        return (*cells, "not timed", "not timed")
    times = f"{speed['times_student']:.1f}× the student"
    if speed["times_teacher"] is not None:
        times += f", {speed['times_teacher']:.1f}× the teacher"
    return (*cells, f"{speed['latency_ms']['p50']:.1f} ms", f"{speed['throughput']:.0f}/s ({times})")
