"""Writes the report's files: report.json, report.md, report.html and predictions.npz."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from distill_nlp.durable_files import replacing, write_json, write_text
from distill_nlp.manifests import write_manifest
from distill_nlp.report.build import LOGITS, PRIVATE
from distill_nlp.report.details import class_rows, detail_rows, machine_line, slice_rows, stage_rows
from distill_nlp.report.earlier import PREDICTIONS_FILE, REPORT_FILE, REPORT_MANIFEST_FILE
from distill_nlp.report.exports import NOTE, export_head, export_rows
from distill_nlp.report.page import render_page
from distill_nlp.report.render import COLUMNS, metric_title, summary_lines, table_rows, title_of, verdict

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
    with replacing(folder / PREDICTIONS_FILE) as temporary, open(temporary, "wb") as stream:
        np.savez_compressed(stream, **report[LOGITS])
    write_text(folder / MARKDOWN_FILE, markdown)
    write_text(folder / PAGE_FILE, page)
    write_json(folder / REPORT_FILE, {k: v for k, v in report.items() if k not in PRIVATE})
    # Last: where it fits, all of them are there and as they were written.
    names = (PREDICTIONS_FILE, MARKDOWN_FILE, PAGE_FILE, REPORT_FILE)
    write_manifest(folder, names, REPORT_MANIFEST_FILE)
