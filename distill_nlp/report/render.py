"""The report as a terminal table and in words; rows and lines that Markdown and the page share."""

from __future__ import annotations

from typing import Any

from distill_nlp.report.exports import export_head, export_rows

COLUMNS = ("teacher", "baseline", "student")
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
    models, metric = report["models"], metric_of(report)
    intervals = report["comparison"][f"{metric}_intervals"]

    def row(label: str, value: Any) -> tuple[str, str, str, str]:
        return (label, *(value(name, models[name]) for name in COLUMNS))

    teacher = models["teacher"]
    # The teacher has no agreement with itself.
    shown = [
        row(title, lambda name, m, key=key: score(m[key]) if key in m else "") for key, title in _SHOWN[metric].items()
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
    c, metric = report["comparison"], metric_of(report)
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
    """One sentence that claims no more than the intervals of the difference allow."""
    comparison = report["comparison"]
    difference, seeds = comparison["difference"], len(comparison["mcnemar"]["seeds"])
    low, high = difference["interval"] or (0.0, 0.0)
    # A report of before it was measured has none.
    of_rows = difference.get("rows_interval") or (0.0, 0.0)
    metric = metric_of(report)
    unit = "points" if metric == "accuracy" else f"points of {_SHOWN[metric][metric]}"
    points = f"{abs(difference['value']) * 100:.2f} {unit}"
    if seeds > 1 and low > 0:
        return f"The distilled student beats the plain baseline by {points}."
    if seeds > 1 and high < 0:
        return f"The distilled student is WORSE than the plain baseline by {points}."
    low, high = (low, high) if seeds == 1 else of_rows
    if low > 0 or high < 0:
        those = "This distilled student" if seeds == 1 else f"These {seeds} distilled students"
        theirs = "its plain baseline" if seeds == 1 else "their plain baselines"
        verb = ("beats" if seeds == 1 else "beat") if low > 0 else ("is WORSE than" if seeds == 1 else "are WORSE than")
        few = "one seed says" if seeds == 1 else f"{seeds} seeds say"
        return f"{those} {verb} {theirs} by {points}; {few} nothing sure of others."
    return "No difference between the distilled student and the plain baseline can be told on these test rows."


def terminal_table(report: dict[str, Any]) -> Any:
    """A `rich` renderable."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title_of(report), title_justify="left")
    table.add_column("")
    for name in COLUMNS:
        table.add_column(name, justify="right")
    for row in table_rows(report):
        table.add_row(*(Text(cell) for cell in row))
    lines = [Text(line) for line in summary_lines(report)]
    return Group(table, *lines, *_exports(report), Text(verdict(report), style="bold"))


def _exports(report: dict[str, Any]) -> list[Any]:
    from rich.table import Table
    from rich.text import Text

    if not (head := export_head(report)):
        return []
    table = Table(title="Exports", title_justify="left")
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i else "left")
    for row in export_rows(report):
        table.add_row(*(Text(cell) for cell in row))
    return [table]


def metric_of(report: dict[str, Any]) -> str:
    """The key of the score that models are compared by."""
    # A report of before it was named.
    return report.get("metric", "accuracy")


def metric_title(report: dict[str, Any]) -> str:
    """Its name."""
    return _SHOWN[metric_of(report)][metric_of(report)]


def title_of(report: dict[str, Any]) -> str:
    """How much the report rests on."""
    seeds = len(report["models"]["student"]["seeds"])
    return f"{report['test_rows']:,} test rows, {seeds} seed{'s' if seeds > 1 else ''}"


def score(value: Any) -> str:
    """Four digits, with the deviation over seeds where it has one."""
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
