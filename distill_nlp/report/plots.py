"""The plots of the page as inline SVG whose colours follow the page's own."""

from __future__ import annotations

import io
import math
import re
import warnings
from typing import Any

import numpy as np

from distill_nlp.report.curves import Panel

# matplotlib writes colours as numbers; each of these stands for a colour of the page.
_COLOURS = {
    "#010203": "var(--ink)",
    "#010204": "var(--muted)",
    "#010205": "var(--grid)",
    "#010206": "var(--teacher)",
    "#010207": "var(--baseline)",
    "#010208": "var(--student)",
    "#010209": "var(--panel)",
}
_INK, _MUTED, _GRID, *_MODELS, _PANEL = _COLOURS
_COLOUR_OF = dict(zip(("teacher", "baseline", "student"), _MODELS, strict=True))
_MARKER_OF = {"teacher": "D", "baseline": "s", "student": "o"}
_STYLE_OF = {"teacher": "-", "baseline": "--", "student": "-"}
_SIZE = (4.6, 3.1)
# More cells than this have no numbers in them, more classes no names beside them.
_MOST_NUMBERS, _MOST_NAMES = 12, 40
_SETTINGS = {
    "svg.hashsalt": "distill-nlp",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    # Names of classes and losses are text, also with a dollar.
    "text.parse_math": False,
    "text.color": _INK,
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}


def is_available() -> bool:
    """Whether matplotlib, an extra of the package, is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def scores_plot(report: dict[str, Any], metric: str, title: str) -> str:
    """The score of each model with its 95% interval, and each seed as a small point."""
    intervals = report["comparison"][f"{metric}_intervals"]

    def draw(axis: Any) -> None:
        for y, kind in enumerate(("student", "baseline", "teacher")):
            model, colour = report["models"][kind], _COLOUR_OF[kind]
            value = model[metric]["mean"] if isinstance(model[metric], dict) else model[metric]
            if intervals[kind] is not None:
                axis.plot(intervals[kind], [y, y], color=colour, linewidth=2.5, solid_capstyle="round")
            axis.plot([value], [y], _MARKER_OF[kind], color=colour, markersize=8)
            seeds = [seed[metric] for seed in model.get("seeds", {}).values()]
            axis.plot(seeds, [y - 0.22] * len(seeds), "|", color=colour, markersize=7)
            axis.annotate(f"{value:.4f}", (value, y), (0, 8), textcoords="offset points", ha="center")
        axis.set_yticks(range(3), ["student", "baseline", "teacher"])
        axis.set_ylim(-0.6, 2.6)
        axis.grid(axis="y", visible=False)
        axis.set_xlabel(title)

    return _svg("scores", draw, f"{title} of teacher, baseline and student with 95% intervals")


def reliability_plot(bins_of: dict[str, list[dict[str, Any]]], several: bool) -> str:
    """Confidence against what came true, of each model; the diagonal is a calibrated one."""

    def draw(axis: Any) -> None:
        axis.plot([0, 1], [0, 1], color=_MUTED, linewidth=1, linestyle=":")
        for kind, bins in bins_of.items():
            some = [b for b in bins if b["count"]]
            total = sum(b["count"] for b in some)
            x, y = [b["confidence"] for b in some], [b["right"] for b in some]
            axis.plot(x, y, _STYLE_OF[kind], color=_COLOUR_OF[kind], linewidth=1.2, label=kind)
            sizes = [8 + 120 * b["count"] / total for b in some]
            axis.scatter(x, y, s=sizes, color=_COLOUR_OF[kind], marker=_MARKER_OF[kind])
        axis.set_xlabel("probability that a class applies" if several else "probability of the class named")
        axis.set_ylabel("share where it applies" if several else "share right")
        axis.legend(loc="upper left")

    return _svg("reliability", draw, "Confidence against the share that came true")


def confusion_plot(kind: str, counts: list[list[int]], names: list[str]) -> str:
    """Rows by their class and the class named, as shares of each class."""
    cells = np.array(counts)
    shares = cells / np.maximum(cells.sum(axis=1, keepdims=True), 1)
    classes = len(names)

    def draw(axis: Any) -> None:
        for (row, column), share in np.ndenumerate(shares):
            if share > 0:
                # One colour in grades of opacity is right on a light page and on a dark one.
                corner = (column - 0.5, row - 0.5)
                axis.add_patch(_rectangle(corner, _COLOUR_OF[kind], 0.08 + 0.72 * share))
            if classes <= _MOST_NUMBERS:
                axis.text(column, row, f"{cells[row, column]:,}", ha="center", va="center", color=_INK)
        axis.set_xlim(-0.5, classes - 0.5)
        axis.set_ylim(classes - 0.5, -0.5)
        axis.grid(visible=False)
        if classes <= _MOST_NAMES:
            small = {"fontsize": 10 if classes <= _MOST_NUMBERS else 6}
            longest = max(map(len, names))
            short = [name if len(name) <= 16 else name[:15] + "…" for name in names]
            axis.set_xticks(range(classes), short, rotation=90 if classes > 4 or longest > 10 else 0, **small)
            axis.set_yticks(range(classes), short, **small)
        axis.set_xlabel(f"named by the {kind}")
        axis.set_ylabel("label")

    return _svg(f"confusion-{kind}", draw, f"Confusion of the {kind}")


def _rectangle(corner: tuple[float, float], colour: str, opacity: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(corner, 1, 1, facecolor=colour, edgecolor=_PANEL, alpha=opacity, linewidth=0.8)


def curves_plot(panel: Panel, number: int) -> str:
    """One term over the steps of training, a line for each seed."""
    kind = re.match(r"\w+", panel.kind).group()
    colour = _COLOUR_OF.get(kind, _INK)

    def draw(axis: Any) -> None:
        values: list[float] = []
        for i, (steps, own) in enumerate(panel.curves.values()):
            finite = [v if math.isfinite(v) else math.nan for v in own]
            marker = "o" if len(own) < 15 else None
            axis.plot(steps, finite, color=colour, alpha=1 / (1 + 0.4 * i), marker=marker, markersize=3)
            values += [v for v in finite if v > 0]
        if not panel.term.startswith("eval_") and values and max(values) > 50 * min(values):
            axis.set_yscale("log")
        axis.set_xlabel("step")
        axis.set_ylabel(panel.term)
        axis.locator_params(axis="x", nbins=6, integer=True)

    return _svg(f"curve-{number}", draw, f"{panel.term} of the {panel.kind}", (3.6, 2.3))


def _svg(name: str, draw: Any, description: str, size: tuple[float, float] = _SIZE) -> str:
    """One figure with one pair of axes; `name` keeps its ids apart from those of the page's other figures."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
        # Names in a script that matplotlib's font lacks: the reader's browser has it.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None}, transparent=True)
    return _inline(stream.getvalue(), name, description)


def _inline(svg: str, name: str, description: str) -> str:
    from html import escape

    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\b(id="|xlink:href="#|url\(#)', rf"\g<1>{name}-", svg)
    for number, colour in _COLOURS.items():
        svg = svg.replace(number, colour)
    # The page sets the width; the height follows from the view box.
    head, end, rest = svg.partition(">")
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{escape(description)}"{end}{rest}'.strip()
