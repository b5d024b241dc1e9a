"""The report as a terminal table, as Markdown and as JSON."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from distill_nlp.report.build import LOGITS
from distill_nlp.stages import write_json

REPORT_FILE = "report.json"

_COLUMNS = ("teacher", "baseline", "student")
# By the metric that models are compared by: what is shown of them, in this order.
_SHOWN = {
    "accuracy": {"accuracy": "accuracy", "f1_macro": "macro-F1", "agreement": "agreement with the teacher"},
    "f1_macro": {
        "f1_macro": "macro-F1",
        "f1_micro": "micro-F1",
        "accuracy": "exact match",
        "agreement": "agreement with the teacher, per row and class",
    },
}


def table_rows(report: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """What is compared, then teacher, baseline and student, as text."""
    models, metric = report["models"], _metric(report)
    intervals = report["comparison"][f"{metric}_intervals"]

    def row(label: str, value: Any) -> tuple[str, str, str, str]:
        return (label, *(value(name, models[name]) for name in _COLUMNS))

    teacher = models["teacher"]
    # The teacher has no agreement with itself.
    shown = [
        row(title, lambda name, m, key=key: _score(m[key]) if key in m else "") for key, title in _SHOWN[metric].items()
    ]
    return [
        shown[0],
        row("  95% interval", lambda name, m: _interval(intervals[name])),
        *shown[1:],
        row("parameters", lambda name, m: f"{m['parameters'] / 1e6:.2f}M"),
        row("size on disk", lambda name, m: f"{m['size_mb']:.1f} MB"),
        row("latency p50 / p95, batch 1", lambda name, m: "{p50:.1f} / {p95:.1f} ms".format(**m["latency_ms"])),
        row("throughput", lambda name, m: f"{m['throughput']:.0f}/s ({m['throughput'] / teacher['throughput']:.1f}×)"),
    ]


def summary_lines(report: dict[str, Any]) -> list[str]:
    """The comparison in sentences."""
    c, metric = report["comparison"], _metric(report)
    score = _SHOWN[metric][metric]
    lines = [
        f"retention (student / teacher {score}): {_percent(c['retention'])}",
        f"gap closed ((student - baseline) / (teacher - baseline)): {_percent(c['gap_closed'])}"
        + ("" if c["gap_closed"]["value"] is not None else ": the teacher is not above the baseline"),
        f"student - baseline: {c['difference']['value'] * 100:+.2f} points of {score}"
        + (f", 95% interval {_points(c['difference']['interval'])}" if c["difference"]["interval"] else ""),
    ]
    rows = "" if metric == "accuracy" else " on rows whose labels are all right"
    for seed, test in c["mcnemar"]["seeds"].items():
        lines.append(f"McNemar{rows}, seed {seed}: {_mcnemar(test)}")
    return lines


def verdict(report: dict[str, Any]) -> str:
    """One sentence that claims no more than the interval of the difference allows."""
    difference = report["comparison"]["difference"]
    low, high = difference["interval"] or (0.0, 0.0)
    metric = _metric(report)
    unit = "points" if metric == "accuracy" else f"points of {_SHOWN[metric][metric]}"
    points = f"{abs(difference['value']) * 100:.2f} {unit}"
    if low > 0:
        return f"The distilled student beats the plain baseline by {points}."
    if high < 0:
        return f"The distilled student is WORSE than the plain baseline by {points}."
    return "No difference between the distilled student and the plain baseline can be told on these test rows."


def terminal_table(report: dict[str, Any]) -> Any:
    """A `rich` renderable."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(title=_title(report), title_justify="left")
    table.add_column("")
    for name in _COLUMNS:
        table.add_column(name, justify="right")
    for row in table_rows(report):
        table.add_row(*(Text(cell) for cell in row))
    lines = [Text(line) for line in summary_lines(report)]
    return Group(table, *lines, Text(verdict(report), style="bold"))


def render_markdown(report: dict[str, Any]) -> str:
    """The same as Markdown."""
    lines = [f"# {_title(report)}", "", f"**{verdict(report)}**", ""]
    lines += ["| | " + " | ".join(_COLUMNS) + " |", "|---|" + "---:|" * len(_COLUMNS)]
    lines += ["| " + " | ".join(row) + " |" for row in table_rows(report)]
    lines += ["", *(f"- {line}" for line in summary_lines(report)), ""]
    machine = report["machine"]
    lines.append(
        f"Speed on {machine['name']} ({machine['device']}, {machine['threads']} threads), models in turns on the same "
        "rows at their real lengths, without tokenization."
    )
    if run := report.get("run"):
        lines += ["", "| stage | objective | steps | seconds |", "|---|---|---:|---:|"]
        for stage, record in run["stages"].items():
            lines.append(f"| {stage} | {record['objective']} | {record['steps']:,} | {record['seconds']:.0f} |")
        lines += ["", "Versions: " + ", ".join(f"{k} {v}" for k, v in run["versions"].items()) + "."]
    return "\n".join(lines) + "\n"


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Writes report.json, report.md and the logits behind them (predictions.npz)."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".predictions.{os.getpid()}.tmp.npz"
    np.savez_compressed(temporary, **report[LOGITS])
    os.replace(temporary, folder / "predictions.npz")
    write_json(folder / REPORT_FILE, {k: v for k, v in report.items() if k != LOGITS})
    markdown = folder / f".report.{os.getpid()}.tmp"
    markdown.write_text(render_markdown(report), encoding="utf-8")
    os.replace(markdown, folder / "report.md")


def _metric(report: dict[str, Any]) -> str:
    # A report of before it was named.
    return report.get("metric", "accuracy")


def _title(report: dict[str, Any]) -> str:
    seeds = len(report["models"]["student"]["seeds"])
    return f"{report['test_rows']:,} test rows, {seeds} seed{'s' if seeds > 1 else ''}"


def _score(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['mean']:.4f}" + (f" ± {value['sd']:.4f}" if value["sd"] is not None else "")
    return f"{value:.4f}"


def _interval(value: list[float] | None) -> str:
    return "" if value is None else f"{value[0]:.4f} … {value[1]:.4f}"


def _points(value: list[float]) -> str:
    return f"{value[0] * 100:+.2f} … {value[1] * 100:+.2f}"


def _percent(value: dict[str, Any]) -> str:
    if value["value"] is None:
        return "not defined"
    text = f"{value['value'] * 100:.1f}%"
    if value["interval"]:
        low, high = value["interval"]
        text += f" (95% interval {low * 100:.1f}% … {high * 100:.1f}%)"
    return text


def _mcnemar(test: dict[str, Any]) -> str:
    return (
        f"only the student right on {test['student_only']}, only the baseline on {test['baseline_only']}, "
        f"p = {test['p_value']:.2g}"
    )
