"""The training logs of a run as curves, one for each term."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_nlp.durable_files import read_json

LOG_FILE = "training_log.json"
MOST_POINTS = 400
"""Of a curve: a page need not hold every entry of a long training."""

Curve = tuple[list[float], list[float]]
"""Steps, values."""


@dataclass
class Panel:
    """Curves of one term, of all seeds of one model.

    Args:
        kind: "teacher", "baseline", "student"; of an earlier phase "student, phase 1"; of an ensemble "teacher-2".
        term: as in the log, such as `loss_kl` or `eval_accuracy`.
        curves: stage -> steps and values.
    """

    kind: str
    term: str
    curves: dict[str, Curve]


def read_panels(folder: Path, stages: Iterable[str], metric: str) -> list[Panel]:
    """The curves of every term of every stage, and of the validation metric.

    Args:
        folder: of the run.
        stages: names, as in the report; one without a readable log is left out.
        metric: that models are compared by.

    Returns:
        In the order of the stages and of the log. The loss itself is left out where it has one term alone.
    """
    panels: dict[tuple[str, str], Panel] = {}
    for stage in stages:
        log = (read_json(folder / stage / LOG_FILE) or {}).get("log", [])
        for term in _terms(log, metric):
            key = (_kind(stage), term)
            points = _points(log, term)
            if points:
                panel = panels.setdefault(key, Panel(*key, {}))
                panel.curves[stage] = _thinned(points)
    return list(panels.values())


def _terms(log: list[dict[str, Any]], metric: str) -> list[str]:
    entries = [entry for entry in log if "loss" in entry]
    terms = list(dict.fromkeys(key for entry in entries for key in entry if key.startswith("loss_")))
    whole = ["loss"] if entries and len(terms) != 1 else []
    return [*whole, *terms, f"eval_{metric}"]


def _points(log: list[dict[str, Any]], term: str) -> list[tuple[float, float]]:
    found: dict[float, float] = {}
    for entry in log:
        if _is_number(entry.get(term)) and "step" in entry:
            # The last evaluation, of the best checkpoint, stands at the last step again.
            found.setdefault(entry["step"], entry[term])
    return list(found.items())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _kind(stage: str) -> str:
    """`student/seed-0-phase-1` -> `student, phase 1`."""
    kind, _, rest = stage.partition("/")
    _, found, phase = rest.partition("-phase-")
    return f"{kind}, phase {phase}" if found else kind


def _thinned(points: list[tuple[float, float]]) -> Curve:
    stride = -(-len(points) // MOST_POINTS)
    kept = points[::stride]
    if kept[-1] != points[-1]:
        kept.append(points[-1])
    return [step for step, _ in kept], [value for _, value in kept]
