"""The fronts of a sweep as a picture: score against latency and against size, with the teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distill_nlp.durable_files import replacing

_PANELS = (
    ("latency", "latency of one row, ms (p50)", 1.0),
    ("parameters", "parameters, millions", 1e6),
)


def draw(result: dict[str, Any], path: Path) -> None:
    """Writes an SVG, whole or not at all; the same result gives the same bytes. No display is needed.

    Args:
        result: what sweep.json holds; a panel has the trials whose cost is known.
        path: of the file.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "distill-nlp", "svg.fonttype": "none"}):
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        for axis, (cost, label, unit) in zip(axes, _PANELS, strict=True):
            _panel(axis, result, cost, unit)
            axis.set_xlabel(label)
        axes[0].set_ylabel(f"validation {result['metric']}")
        with replacing(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})


def _panel(axis: Any, result: dict[str, Any], cost: str, unit: float) -> None:
    known = {t["number"]: t for t in result["trials"] if t["value"] is not None and t.get(cost) is not None}
    front = [known[number] for number in result["fronts"].get(cost, ())]
    rest = [trial for number, trial in known.items() if number not in {t["number"] for t in front}]
    axis.scatter([t[cost] / unit for t in rest], [t["value"] for t in rest], color="0.6", label="trial")
    axis.plot([t[cost] / unit for t in front], [t["value"] for t in front], "o-", color="C0", label="front")
    names: dict[tuple[float, float], list[str]] = {}
    for trial in front:
        names.setdefault((trial[cost] / unit, trial["value"]), []).append(str(trial["number"]))
    for point, numbers in names.items():
        axis.annotate(", ".join(numbers), point, xytext=(4, 4), textcoords="offset points")
    teacher = result.get("teacher")
    if teacher is not None and teacher.get(cost) is not None:
        axis.scatter([teacher[cost] / unit], [teacher["value"]], color="C3", marker="*", s=120, label="teacher")
    axis.grid(alpha=0.3)
    axis.legend()
