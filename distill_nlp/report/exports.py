"""Exports of a run's students, as `distill-nlp export` measured them: found beside the students, and shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from distill_nlp.loading import checkpoint_print
from distill_nlp.onnx_model import export_record, is_exported
from distill_nlp.report.schema import Export

NOTE = "As measured by distill-nlp export; student and teacher in PyTorch, in turns with the export, on the CPU."


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
            try:
                if record := export_record(folder, own):
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


def export_head(report: dict[str, Any]) -> list[str]:
    """Names of the exports, over the columns of `export_rows`; empty where there are none."""
    exports = report.get("exports") or []
    return ["", *(f"seed {one['seed']}, ONNX {one['numbers']}" for one in exports)] if exports else []


def export_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Titles, and what each export has under them."""
    exports = report.get("exports") or []
    if not exports:
        return []
    metric = "macro-F1" if report.get("metric") == "f1_macro" else "accuracy"

    def row(title: str, value: Callable[[dict[str, Any]], str]) -> tuple[str, ...]:
        return (title, *(value(one) for one in exports))

    def timed(title: str, value: Callable[[dict[str, Any]], str]) -> tuple[str, ...]:
        return row(title, lambda one: "not timed" if one["speed"] is None else value(one["speed"]))

    return [
        row(f"{metric} of the student", lambda one: _score(one, "student")),
        row(f"{metric} of the export", lambda one: _score(one, "export")),
        row("rows with another label", lambda one: f"{one['flips']:,} of {one['rows']:,}"),
        row("rows", lambda one: one["source"]),
        row("size of the weights", lambda one: "{student:.1f} → {export:.1f} MB".format(**one["size_mb"])),
        timed("latency p50, batch 1", lambda speed: f"{speed['latency_ms']['p50']:.1f} ms"),
        timed("throughput", lambda speed: f"{speed['throughput']:.0f}/s"),
        timed("  against the student", lambda speed: f"{speed['times_student']:.1f}×"),
        timed("  against the teacher", lambda speed: _times(speed["times_teacher"])),
    ]


def _score(one: dict[str, Any], which: str) -> str:
    return "no labels" if one["score"] is None else f"{one['score'][which]:.4f}"


def _times(value: float | None) -> str:
    return "not timed" if value is None else f"{value:.1f}×"
