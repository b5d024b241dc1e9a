"""The table as Markdown, and its place in a file."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path

from scores import SetScores

from distill_nlp.report.statistics import gap_closed

sys.path.append(str(Path(__file__).resolve().parents[1]))
from page_blocks import put_blocks


def write_section(
    sets: list[SetScores], results: Path, commands: Mapping[str, str] | None, mark: str = "accuracy"
) -> str:
    """The tables of the sets; with the commands that made them, each also takes its place in the results' file.

    Args:
        sets: with their scores.
        results: file with the lines `<!-- MARK: begin -->` and `<!-- MARK: end -->`, between which tables stand; those
            of other sets stay as they are.
        commands: set -> what made its table.
        mark: of the place.

    Raises:
        SystemExit: the file has no such marks.
    """
    tables = {scores.name: _table(scores) for scores in sets}
    if commands is not None:
        texts = {name: f"```\n{commands[name]}\n```\n\n{table}" for name, table in tables.items()}
        put_blocks(results, mark, "set", texts)
    return "\n\n".join(tables.values())


def _table(scores: SetScores) -> str:
    teacher, kind = scores.score("base/teacher"), scores.baseline
    baseline = scores.of_seeds(kind)
    # McNemar's test and the t-test are of rows, right or wrong: where the score is macro-F1, of whole sets of labels.
    of = "" if scores.metric == "accuracy" else " (sets of labels)"
    lines = [
        f"**{scores.name}**: {len(scores.labels):,} test rows, seeds {', '.join(map(str, scores.seeds))}",
        "",
        f"| | {scores.metric} | gap closed | over the baseline, 95% | p, all seeds{of} | p, each seed{of} | steps "
        "| minutes |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        f"| teacher | {teacher:.4f} | | | | | | |",
        f"| baseline | {_mean_sd(baseline)} | | | | | {_cost(scores, kind)} |",
    ]
    for recipe in scores.recipes:
        student = scores.of_seeds(f"{recipe}/student")
        closed = float(gap_closed(teacher, statistics.mean(baseline), statistics.mean(student)))
        gap = f"{closed:.0%}" if math.isfinite(closed) else "no gap"
        low, high = scores.interval(recipe)
        pooled, each = scores.against_baseline(recipe)
        leads = scores.leads(recipe)
        lines.append(
            f"| {recipe} | {_mean_sd(student)} | {gap} | {100 * low:+.1f} … {100 * high:+.1f} | "
            f"{_shown(pooled, sum(leads))} | {', '.join(map(_shown, each, leads))} | "
            f"{_cost(scores, f'{recipe}/student')} |"
        )
    if answers := scores.teacher_answers():
        (on_train, unsure_there), (on_test, unsure_here) = answers["train"], answers["test"]
        lines += [
            "",
            f"The teacher on the students' labeled rows: {scores.metric} {on_train:.4f}, entropy of its answers "
            f"{unsure_there:.3f} nats; on test rows {on_test:.4f}, {unsure_here:.3f} nats.",
        ]
    if len(scores.baselines) > 1:
        tried = scores.validation(scores.baselines).items()
        budgets = ", ".join(f"{value:.4f} after {scores.steps(own):,} steps" for own, value in tried)
        lines += ["", f"Baselines, mean of the validation scores: {budgets}."]
    if len(scores.recipes) > 1:
        tried = scores.validation([f"{recipe}/student" for recipe in scores.recipes]).values()
        students = ", ".join(f"{recipe} {value:.4f}" for recipe, value in zip(scores.recipes, tried, strict=True))
        lines += ["", f"Students, mean of the validation scores: {students}."]
    if scores.variant_of:
        compared = [(name, recipe, *scores.against_recipe(name)) for name, recipe in scores.variant_of.items()]
        shown = ", ".join(f"{name} {100 * lead:+.2f} to {recipe} (p = {p:.1g})" for name, recipe, lead, p in compared)
        lines += ["", f"Variants, points of right {'rows' if not of else 'sets of labels'}, all seeds: {shown}."]
    return "\n".join(lines)


def _shown(p: float, lead: float) -> str:
    """A p-value, with an arrow where it is the baseline that has more rows right."""
    return f"{p:.1g}{' ↓' if lead < 0 else ''}"


def _mean_sd(values: list[float]) -> str:
    sd = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{sd}"


def _cost(scores: SetScores, kind: str) -> str:
    """Steps and minutes of one seed; of a training that was interrupted, its last attempt's are known."""
    records = scores.stages(kind)
    minutes = sum(record["seconds"] for record in records) / len(scores.seeds) / 60
    over = "> " if any(record.get("resumed_from") for record in records) else ""
    return f"{scores.steps(kind):,} | {over}{minutes:.1f}"
