"""Variants timed in turn, and their figures as a table."""

from __future__ import annotations

import resource
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from tqdm.auto import tqdm

Seconds = tuple[float, float]
"""Wall and CPU time."""
Pass = Callable[[int], Seconds]
"""Trains once over all rows, in an order that its argument seeds."""
Figures = dict[str, Any]
"""Of one variant, by the names of `COLUMNS`; None where there is none."""

# Name of a figure -> head of its column, and how it is shown.
COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "seconds": ("seconds", "{:.2f}".format),
    "share": ("share of the run", "{:.1%}".format),
    "idle": ("idle", "{:.1%}".format),
    "ratio": ("time ×", "{:.2f}".format),
    "range": ("range", lambda ends: f"{ends[0]:.2f} … {ends[1]:.2f}"),
    "quickest_ratio": ("quickest ×", "{:.2f}".format),
    "cpu_ratio": ("CPU time ×", "{:.2f}".format),
    "peak_mib": ("peak MiB", "{:,.0f}".format),
    "above_kl_mib": ("above KL alone, MiB", "{:,.0f}".format),
    "memory_ratio": ("memory above KL alone ×", "{:.2f}".format),
    "accuracy": ("test accuracy", lambda values: mean_and_sd(values)),
    "tokens_per_second": ("tokens per second", "{:,.0f}".format),
    "utilisation": ("utilisation", "{:.2f}".format),
    "peak_gib": ("peak GiB", "{:,.2f}".format),
}


def wait_for(device: torch.device) -> None:
    """Work that was given to an accelerator counts when it is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def measured(passes: Mapping[str, Pass], rounds: int) -> dict[str, Figures]:
    """Seconds of each, and ratios to the first in the same round; the first pass of each is not counted."""
    names = list(passes)
    found: dict[str, list[Seconds]] = {name: [] for name in names}
    with tqdm(total=len(names) * (rounds + 1), disable=None, leave=False, unit="pass") as bar:
        for name in names:
            passes[name](0)
            bar.update()
        for turn in range(rounds):
            for i in range(len(names)):
                name = names[(i + turn) % len(names)]
                found[name].append(passes[name](turn + 1))
                bar.update()
    return compared(found)


def compared(found: Mapping[str, Sequence[Seconds]]) -> dict[str, Figures]:
    """Of the passes of each variant, one a round: medians, and those of the ratios to the first variant.

    What else a machine does only ever adds to a time, so that the quickest pass of each has least of it: their ratio is
    given too.
    """
    first = next(iter(found.values()))
    quickest = min(wall for wall, _ in first)
    figures = {}
    for name, passes in found.items():
        ratios, busy = ([a[k] / b[k] for a, b in zip(passes, first, strict=True)] for k in (0, 1))
        figures[name] = {
            "seconds": statistics.median(wall for wall, _ in passes),
            "ratio": statistics.median(ratios),
            "range": [min(ratios), max(ratios)],
            "quickest_ratio": min(wall for wall, _ in passes) / quickest if len(passes) > 1 else None,
            "cpu_ratio": None if busy[0] != busy[0] else statistics.median(busy),
        }
    return figures


def cpu_of_children() -> float:
    """Seconds of CPU time that processes begun here, and ended, have taken."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def in_a_process_of_its_own(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function(*arguments)` gives in a fresh interpreter; what it raises is raised."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def table(title: str, found: Mapping[str, Figures]) -> str:
    """The figures as Markdown: a row for each variant, and the columns that one of them has."""
    keys = [key for key in COLUMNS if any(figures.get(key) is not None for figures in found.values())]
    lines = [f"**{title}**", "", "| " + " | ".join(["", *(COLUMNS[key][0] for key in keys)]) + " |"]
    lines.append("|---|" + "---:|" * len(keys))
    for name, figures in found.items():
        cells = ["" if figures.get(key) is None else COLUMNS[key][1](figures[key]) for key in keys]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def mean_and_sd(values: Sequence[float]) -> str:
    """Over seeds."""
    sd = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{sd}"
