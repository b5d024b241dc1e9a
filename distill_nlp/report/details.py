"""Rows of the report's longer tables, as text, for Markdown and the page alike."""

from __future__ import annotations

from typing import Any

import numpy as np

from distill_nlp.report.render import COLUMNS, score

_QUALITY = {
    "mcc": "Matthews correlation",
    "log_loss": "log-loss (nats)",
    "ece": "calibration error (ECE)",
    "kl_to_teacher": "KL to the teacher (nats)",
}


def detail_rows(report: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """What `table_rows` has no room for: a title, then teacher, baseline and student."""
    models = report["models"]

    def row(title: str, value: Any) -> tuple[str, str, str, str]:
        return (title, *(value(models[name]) for name in COLUMNS))

    rows = [row(title, lambda m, key=key: score(m[key]) if key in m else "") for key, title in _QUALITY.items()]
    size = models["student"]["pass_memory"]["rows"]
    return [
        *rows,
        row("latency p99, batch 1", lambda m: f"{m['latency_ms']['p99']:.1f} ms"),
        row("weights in memory", lambda m: f"{m['weights_mb']:.1f} MB"),
        row(f"memory of a pass, batch {size}", lambda m: _memory(m["pass_memory"])),
    ]


def _memory(found: dict[str, Any]) -> str:
    return "not readable" if found["mb"] is None else f"{found['mb']:.1f} MB"


def class_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Of each class its name and rows, then precision, recall and F1 of teacher, baseline and student."""
    rows = []
    for i, name in enumerate(report["label_names"]):
        cells = [name, f"{report['models']['teacher']['per_class'][i]['support']:,}"]
        for kind in COLUMNS:
            model = report["models"][kind]
            own = [seed["per_class"][i] for seed in model.get("seeds", {"": model}).values()]
            cells += [f"{np.mean([found[key] for found in own]):.3f}" for key in ("precision", "recall", "f1")]
        rows.append(tuple(cells))
    return rows


def slice_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Of each slice its name and rows, then the score of teacher, baseline and student."""
    return [
        (part["name"], f"{part['rows']:,}", *(f"{part[kind]:.4f}" for kind in COLUMNS))
        for part in report.get("slices") or []
    ]


def stage_rows(report: dict[str, Any]) -> tuple[list[str], list[list[str]], str]:
    """Head and rows of the stages' table, and what is to be said of their energy."""
    stages = report["run"]["stages"]
    measured = {name: stage["energy"] for name, stage in stages.items() if stage.get("energy")}
    head = ["stage", "objective", "steps", "seconds", *(["energy"] if measured else [])]
    rows = []
    for name, stage in stages.items():
        # What came before an interruption was counted by a process that is gone.
        since = f" (from {stage['resumed_from']} on)" if stage.get("resumed_from") else ""
        cells = [name, stage["objective"], f"{stage['steps']:,}", f"{stage['seconds']:.0f}{since}"]
        if measured:
            cells.append(f"{measured[name]['joules'] / 1000:.1f} kJ" if name in measured else "not read")
        rows.append(cells)
    if not measured:
        note = "Energy is left out: the machine has no counter of it that could be read."
        return head, rows, note
    sources = dict.fromkeys(source for energy in measured.values() for source in energy["sources"])
    note = f"Energy as counted by {', '.join(sources)}: all that ran there, and no other part of the machine."
    return head, rows, note


def machine_line(report: dict[str, Any]) -> str:
    """What costs were measured on, and how."""
    machine, memory = report["machine"], report["models"]["student"]["pass_memory"]
    how = f" Memory of a pass: {memory['how']}, beside the weights, at the longest rows." if memory["how"] else ""
    return (
        f"Speed on {machine['name']} ({machine['device']}, {machine['threads']} threads), models in turns on the same "
        f"rows at their real lengths, without preparing these.{how}"
    )
