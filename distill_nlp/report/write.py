"""Writes the report's files: report.json, report.md, report.html and predictions.npz."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from distill_nlp.report.build import LOGITS, PRIVATE
from distill_nlp.report.details import class_rows, detail_rows, machine_line, slice_rows, stage_rows
from distill_nlp.report.earlier import PREDICTIONS_FILE, REPORT_FILE
from distill_nlp.report.exports import NOTE, export_head, export_rows
from distill_nlp.report.page import render_page
from distill_nlp.report.render import COLUMNS, metric_title, summary_lines, table_rows, title_of, verdict
from distill_nlp.stages import write_json

MARKDOWN_FILE = "report.md"
PAGE_FILE = "report.html"
_MOST_CLASSES = 30


def render_markdown(report: dict[str, Any]) -> str:
    """The report as Markdown, without plots and examples."""
    lines = [f"# {title_of(report)}", "", f"**{verdict(report)}**", ""]
    lines += _table(["", *COLUMNS], [*table_rows(report), *detail_rows(report)])
    lines += ["", *(f"- {line}" for line in summary_lines(report)), "", machine_line(report)]
    if report.get("slices"):
        lines += ["", *_table([f"{metric_title(report)} by length", "rows", *COLUMNS], slice_rows(report))]
    if exports := export_rows(report):
        lines += ["", *_table(export_head(report), exports), "", NOTE]
    classes = class_rows(report)
    head = ["class", "rows", *(f"{kind} {name}" for kind in COLUMNS for name in ("P", "R", "F1"))]
    lines += ["", *_table(head, classes[:_MOST_CLASSES])]
    if len(classes) > _MOST_CLASSES:
        lines += ["", f"{len(classes) - _MOST_CLASSES} classes more stand in report.json."]
    if run := report.get("run"):
        head, rows, note = stage_rows(report)
        lines += ["", *_table(head, rows, text=2), "", note]
        lines += ["", "Versions: " + ", ".join(f"{k} {v}" for k, v in run["versions"].items()) + "."]
    return "\n".join(lines) + "\n"


def _table(head: list[str], rows: Any, text: int = 1) -> list[str]:
    """The first columns are text, the others numbers."""
    lines = ["| " + " | ".join(map(_cell, head)) + " |", "|" + "---|" * text + "---:|" * (len(head) - text)]
    return lines + ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]


def _cell(text: str) -> str:
    """Names of classes are the data's: they must not end a cell or become markup."""
    return re.sub(r"([|<`*_\[\]\\])", r"\\\1", text.replace("\n", " "))


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Writes report.json, report.md, report.html and the logits behind them (predictions.npz), each whole.

    Args:
        report: as `build_report` gives it.
        folder: of the run: the page's curves come from the training logs in it.
    """
    page, markdown = render_page(report, folder), render_markdown(report)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".predictions.{os.getpid()}.tmp.npz"
    np.savez_compressed(temporary, **report[LOGITS])
    os.replace(temporary, folder / PREDICTIONS_FILE)
    _write(folder / MARKDOWN_FILE, markdown)
    _write(folder / PAGE_FILE, page)
    # Last: where it is there, all of them are.
    write_json(folder / REPORT_FILE, {k: v for k, v in report.items() if k not in PRIVATE})


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    # A text of the data may hold half of a surrogate pair, which UTF-8 cannot.
    temporary.write_text(text, encoding="utf-8", errors="replace")
    os.replace(temporary, path)
