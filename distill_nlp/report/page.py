"""report.html: the whole report as one file that needs no other, nor a network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from distill_nlp.report import plots
from distill_nlp.report.build import LOGITS, ROWS
from distill_nlp.report.curves import Panel, read_panels
from distill_nlp.report.details import class_rows, detail_rows, machine_line, slice_rows, stage_rows
from distill_nlp.report.explorer import listed
from distill_nlp.report.explorer_page import explorer
from distill_nlp.report.exports import NOTE, export_head, export_rows
from distill_nlp.report.quality import CALIBRATION_BINS
from distill_nlp.report.render import (
    COLUMNS,
    metric_of,
    metric_title,
    summary_lines,
    table_rows,
    title_of,
    verdict,
)

NO_PLOTS = "The plots are left out: matplotlib is not installed (pip install 'distill-nlp[report]')"
_MOST_CLASSES = 60


def render_page(report: dict[str, Any], folder: Path) -> str:
    """The page as HTML.

    Args:
        report: as `build_report` gives it, with `logits`; with `rows`, the page has the lists of examples.
        folder: of the run, whose training logs become curves.
    """
    stages = report.get("run", {}).get("stages", {})
    panels = read_panels(folder, stages, metric_of(report)) if plots.is_available() else []
    dataset = _data_name(report.get("run", {}).get("dataset"))
    parts = [
        f"<h1>{_e(verdict(report))}</h1>",
        f'<p class="quiet">{_e(f"{dataset}: " if dataset else "")}{_e(title_of(report))}</p>',
        _tiles(report),
        "" if plots.is_available() else f'<p class="quiet">{_e(NO_PLOTS)}.</p>',
        *_scores(report),
        *_exports(report),
        *_calibration(report),
        *_classes(report),
        *_slices(report),
        *_curves(panels),
        *_stages(report),
        *_explorer(report),
        _footer(report),
    ]
    asset = files("distill_nlp.report")
    css, script = ((asset / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_e(f'{dataset}: ' if dataset else '')}distill-nlp report</title>\n<style>\n{css}</style>\n</head>\n"
        f"<body>\n<main>\n{chr(10).join(part for part in parts if part)}\n</main>\n<script>\n{script}</script>\n"
        "</body>\n</html>\n"
    )


def _data_name(dataset: str | None) -> str | None:
    """An id on the Hub as it is, a folder by its name: where it lies is nobody's business who is shown the page."""
    if dataset is None:
        return None
    path = Path(dataset).expanduser()
    return path.resolve().name if path.is_absolute() or path.exists() else dataset


def _e(value: Any) -> str:
    return escape(str(value))


def _tiles(report: dict[str, Any]) -> str:
    teacher, student = report["models"]["teacher"], report["models"]["student"]
    comparison, metric = report["comparison"], metric_of(report)

    def percent(figure: dict[str, Any]) -> str:
        return "not defined" if figure["value"] is None else f"{figure['value'] * 100:.1f}%"

    tiles = [
        (f"{student[metric]['mean']:.4f}", f"student's {metric_title(report)}; teacher {teacher[metric]:.4f}"),
        (f"{comparison['difference']['value'] * 100:+.2f}", "points over the plain baseline"),
        (percent(comparison["retention"]), "of the teacher's score kept"),
        (percent(comparison["gap_closed"]), "of the gap to the teacher closed"),
        (f"{student['throughput'] / teacher['throughput']:.1f}×", "the teacher's throughput"),
        (f"{teacher['parameters'] / student['parameters']:.1f}×", "fewer parameters"),
    ]
    cells = "".join(f'<div class="tile"><b>{_e(value)}</b><span>{_e(what)}</span></div>' for value, what in tiles)
    return f'<div class="tiles">{cells}</div>'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "fit") -> str:
    def cell(tag: str, text: str) -> str:
        name = f' class="{text}"' if tag == "th" and text in COLUMNS else ""
        return f"<{tag}{name}>{_e(text)}</{tag}>"

    lines = ["<thead><tr>" + "".join(cell("th", text) for text in head) + "</tr></thead>", "<tbody>"]
    lines += ["<tr>" + "".join(cell("td", text) for text in row) + "</tr>" for row in rows]
    return f'<div class="scroll"><table class="{kind}">' + "\n".join(lines) + "</tbody></table></div>"


def _plots(drawn: Sequence[str], kind: str = "plots") -> str:
    return f'<div class="{kind}">' + "".join(f'<div class="panel">{svg}</div>' for svg in drawn) + "</div>"


def _scores(report: dict[str, Any]) -> list[str]:
    lines = "".join(f"<li>{_e(line)}</li>" for line in summary_lines(report))
    rows = [*table_rows(report), *detail_rows(report)]
    return ["<h2>Scores and costs</h2>", _table(["", *COLUMNS], rows), f"<ul>{lines}</ul>"]


def _exports(report: dict[str, Any]) -> list[str]:
    rows = export_rows(report)
    if not rows:
        return []
    return ["<h2>Exports</h2>", _table(export_head(report), rows), f'<p class="quiet">{_e(NOTE)}</p>']


def _first(report: dict[str, Any], kind: str) -> dict[str, Any]:
    model = report["models"][kind]
    return next(iter(model["seeds"].values())) if "seeds" in model else model


def _of_first_seed(report: dict[str, Any]) -> str:
    seeds = list(report["models"]["student"]["seeds"])
    return f" Baseline and student are those of seed {seeds[0]}." if len(seeds) > 1 else ""


def _calibration(report: dict[str, Any]) -> list[str]:
    if not plots.is_available():
        return []
    metric = metric_of(report)
    several = report["problem_type"] == "multi_label_classification"
    bins = {kind: _first(report, kind)["reliability"] for kind in COLUMNS}
    note = (
        "How far probabilities can be believed: points below the diagonal are more certain than right; their size is "
        f"the share of rows. ECE is their mean distance from it, over {CALIBRATION_BINS} bins of equal width."
        f"{_of_first_seed(report)}"
    )
    drawn = [plots.scores_plot(report, metric, metric_title(report)), plots.reliability_plot(bins, several)]
    return [_plots(drawn), f'<p class="quiet">{_e(note)}</p>']


def _classes(report: dict[str, Any]) -> list[str]:
    rows = class_rows(report)
    shown, names = rows[:_MOST_CLASSES], report["label_names"]
    parts = ["<h2>Classes</h2>"]
    if plots.is_available() and _first(report, "teacher")["confusion"] is not None:
        drawn = [plots.confusion_plot(kind, _first(report, kind)["confusion"], names) for kind in COLUMNS]
        note = f"Rows by label and class named; colour: share of the label's rows.{_of_first_seed(report)}"
        parts += [_plots(drawn, "plots three"), f'<p class="quiet">{_e(note)}</p>']
    head = ["class", "rows", *(f"{kind} {name}" for kind in COLUMNS for name in ("P", "R", "F1"))]
    left = f" {len(rows) - len(shown)} classes more stand in report.json." if len(rows) > len(shown) else ""
    note = f"P: precision, R: recall; baseline and student as means over seeds.{left}"
    return [*parts, _table(head, shown, "wide"), f'<p class="quiet">{_e(note)}</p>']


def _slices(report: dict[str, Any]) -> list[str]:
    if not report.get("slices"):
        return []
    title = f"{metric_title(report)} by length"
    return [
        f"<h2>{_e(title[0].upper() + title[1:])}</h2>",
        _table(["test rows", "rows", *COLUMNS], slice_rows(report)),
        '<p class="quiet">Tokens of the whole text. Cut: the student does not read all of it.</p>',
    ]


def _curves(panels: list[Panel]) -> list[str]:
    if not panels:
        return []
    parts = ["<h2>Training</h2>"]
    number = 0
    for kind in dict.fromkeys(panel.kind for panel in panels):
        drawn = []
        for panel in panels:
            if panel.kind == kind:
                drawn.append(plots.curves_plot(panel, number))
                number += 1
        parts += [f"<h3>{_e(kind)}</h3>", _plots(drawn, "plots small")]
    note = "Terms of the loss are unweighted, as in the log; one line for each seed, that of the first the strongest."
    return [*parts, f'<p class="quiet">{note}</p>']


def _stages(report: dict[str, Any]) -> list[str]:
    if not report.get("run"):
        return []
    head, rows, note = stage_rows(report)
    return ["<h2>Time and energy</h2>", _table(head, rows, "fit stages"), f'<p class="quiet">{_e(note)}</p>']


def _explorer(report: dict[str, Any]) -> list[str]:
    if report.get(ROWS) is None:
        return []
    logits = report[LOGITS]
    models = {name: values for name, values in logits.items() if name != "labels"}
    seeds = [int(seed) for seed in report["models"]["student"]["seeds"]]
    lists = listed(report[ROWS], models, np.asarray(logits["labels"]), report["label_names"], seeds)
    return explorer(lists, report["label_names"], report[ROWS].lengths, len(seeds))


def _footer(report: dict[str, Any]) -> str:
    lines = [machine_line(report)]
    if run := report.get("run"):
        lines.append("Versions: " + ", ".join(f"{k} {v}" for k, v in run["versions"].items()) + ".")
    return '<footer class="quiet">' + "".join(f"<p>{_e(line)}</p>" for line in lines) + "</footer>"
