"""The lists of examples in report.html; every text in them is escaped."""

from __future__ import annotations

import json
from html import escape

import numpy as np

from distill_nlp.report.explorer import Example, Listed
from distill_nlp.report.rows import length_buckets

MOST_CHARACTERS = 4000
"""Of a text in the page."""


def explorer(lists: list[Listed], label_names: list[str], lengths: np.ndarray | None, seeds: int) -> list[str]:
    """The section with its search, filters and lists.

    Args:
        lists: to show.
        label_names: of all classes, by index.
        lengths: of all test rows, in tokens; None of rows that are no texts, which have no filters by length.
        seeds: number of students.
    """
    buttons = "".join(
        f'<button type="button" data-list="{part.name}">{escape(part.title)} ({part.total:,})</button>'
        for part in lists
    )
    # By number: names may hold anything.
    classes = "".join(f'<option value="{i}">{escape(name)}</option>' for i, name in enumerate(label_names))
    what = "names" if lengths is None else "texts"
    return [
        "<h2>Examples</h2>",
        '<div id="explorer">',
        f'<div class="tools" hidden>{buttons}</div>',
        '<div class="tools filters" hidden>',
        f'<input type="search" name="search" placeholder="Search the {what}" aria-label="Search the {what}">',
        f'<select name="class" aria-label="Class"><option value="">all classes</option>{classes}</select>',
        *([] if lengths is None else _length_filters(lengths)),
        "</div>",
        *(line for part in lists for line in _list(part, label_names, seeds)),
        "</div>",
    ]


def _length_filters(lengths: np.ndarray) -> list[str]:
    buckets = "".join(
        f'<option value="{i}">{low} to {high} tokens</option>' for i, (low, high) in enumerate(length_buckets(lengths))
    )
    return [
        f'<select name="bucket" aria-label="Length"><option value="">all lengths</option>{buckets}</select>',
        '<select name="cut" aria-label="Truncation"><option value="">whole and cut</option>'
        '<option value="0">read whole</option><option value="1">cut</option></select>',
    ]


def _list(part: Listed, label_names: list[str], seeds: int) -> list[str]:
    shown = len(part.examples)
    left_out = f" {part.left_out:,} more rows are left out." if part.left_out else ""
    return [
        f'<section data-list="{part.name}">',
        f'<h3>{escape(part.title)}: <span class="shown">{shown}</span> of {part.total:,} rows</h3>',
        f'<p class="quiet">{escape(part.rule)}{left_out}</p>',
        *(_example(example, label_names, seeds) for example in part.examples),
        "</section>",
    ]


def _example(example: Example, label_names: list[str], seeds: int) -> str:
    def named(who: str, name: str, probability: float) -> str:
        wrong = "" if name == example.label else ' class="wrong"'
        return f"<span>{who} <b{wrong}>{escape(name)}</b> {probability:.2f}</span>"

    index = {name: i for i, name in enumerate(label_names)}
    classes = json.dumps([index[name] for name in example.classes])
    cut = ' <span class="tag">cut</span>' if example.truncated else ""
    length = "" if example.length is None else f"<span>{example.length} tokens{cut}</span>"
    of_seeds = f"<span>{example.students_right} of {seeds} students right</span>" if seeds > 1 else ""
    rest = len(example.text) - MOST_CHARACTERS
    more = f'<span class="quiet"> … {rest:,} more characters</span>' if rest > 0 else ""
    return (
        f'<article class="example" data-classes="{classes}" data-bucket="{example.bucket}" '
        f'data-cut="{int(example.truncated)}"><header><span>row {example.index}</span>'
        f"<span>label <b>{escape(example.label)}</b></span>"
        f"{named('teacher', example.teacher, example.teacher_probability)}"
        f"{named('student', example.student, example.student_probability)}{of_seeds}"
        f"{length}</header>"
        f'<div class="text">{escape(example.text[:MOST_CHARACTERS])}{more}</div></article>'
    )
