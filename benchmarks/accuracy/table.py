"""The table as Markdown, and its place in a file."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

from scores import SetScores

from distill_nlp.report.statistics import gap_closed


def write_section(sets: list[SetScores], results: Path, command: str | None, mark: str = "accuracy") -> str:
    """The tables of all sets; with the command that made them, also put between its marks in the results' file.

    Raises:
        SystemExit: the file has no such marks.
    """
    text = "\n\n".join(_table(scores) for scores in sets)
    if command is not None:
        begin, end = f"<!-- {mark}: begin -->", f"<!-- {mark}: end -->"
        before, _, rest = results.read_text(encoding="utf-8").partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise SystemExit(f"{results} has no lines {begin} and {end} to put the tables between")
        body = f"```\n{command}\n```\n\n{text}"
        results.write_text(f"{before}{begin}\n{body}\n{end}{after}", encoding="utf-8")
    return text


def _table(scores: SetScores) -> str:
    teacher = scores.score("base/teacher")
    baseline = scores.of_seeds("base/baseline")
    lines = [
        f"**{scores.name}**: {len(scores.labels):,} test rows, seeds {', '.join(map(str, scores.seeds))}",
        "",
        f"| | {scores.metric} | gap closed | p, all seeds | p, each seed | steps | minutes |",
        "|---|---:|---:|---:|---:|---:|---:|",
        f"| teacher | {teacher:.4f} | | | | | |",
        f"| baseline | {_mean_sd(baseline)} | | | | {_cost(scores, 'base/baseline')} |",
    ]
    for recipe in scores.recipes:
        student = scores.of_seeds(f"{recipe}/student")
        closed = float(gap_closed(teacher, statistics.mean(baseline), statistics.mean(student)))
        gap = f"{closed:.0%}" if math.isfinite(closed) else "no gap"
        pooled, each = scores.against_baseline(recipe)
        lines.append(
            f"| {recipe} | {_mean_sd(student)} | {gap} | {pooled:.1g} | "
            f"{', '.join(f'{p:.1g}' for p in each)} | {_cost(scores, f'{recipe}/student')} |"
        )
    return "\n".join(lines)


def _mean_sd(values: list[float]) -> str:
    sd = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{sd}"


def _cost(scores: SetScores, kind: str) -> str:
    """Steps and minutes of one seed."""
    records, seeds = scores.stages(kind), len(scores.seeds)
    steps = sum(record["steps"] for record in records) / seeds
    minutes = sum(record["seconds"] for record in records) / seeds / 60
    return f"{steps:,.0f} | {minutes:.1f}"
