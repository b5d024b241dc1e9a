"""How many steps are left, and how long they may take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from distill_nlp.doctor.findings import Finding

LOW, HIGH = 0.75, 1.5
"""The range around an estimate from a few steps: another length of texts, another load of the machine, saving."""
LONG = 24 * 3600.0


@dataclass(frozen=True)
class StageTime:
    """A stage that is still to do.

    Args:
        name: of the stage.
        steps: optimizer steps left, 0 for a stage that takes none.
        seconds: for the whole of it, evaluations included.
    """

    name: str
    steps: int
    seconds: float


def evaluations(strategy: str, steps: int, eval_steps: float | None, epochs: float) -> int:
    """Passes over the validation rows in a training, that at its end included.

    Args:
        strategy: "epoch", "steps" or "no".
        steps: of the training.
        eval_steps: between evaluations with "steps"; below 1, a part of all.
        epochs: of the training.
    """
    if strategy == "epoch":
        return math.ceil(epochs) + 1
    if strategy == "steps" and eval_steps:
        every = eval_steps if eval_steps >= 1 else max(math.ceil(eval_steps * steps), 1)
        return int(steps // every) + 1
    return 1


def check_time(stages: Sequence[StageTime], basis: str) -> Finding:
    """The steps and the time of all that is left.

    Args:
        stages: in their order; those of one name are added up.
        basis: what the estimate rests on.

    Returns:
        A warning above a day, else ok.
    """
    if not stages:
        return Finding("ok", "time", "nothing is left to do: all stages are finished with these settings")
    names = list(dict.fromkeys(stage.name for stage in stages))
    parts = []
    for name in names:
        same = [stage for stage in stages if stage.name == name]
        times = f" × {len(same)}" if len(same) > 1 else ""
        steps = f" {same[0].steps:,} steps{times}," if same[0].steps else ""
        parts.append(f"{name}{steps} {duration(sum(stage.seconds for stage in same))}")
    total = sum(stage.seconds for stage in stages)
    what = (
        f"about {duration(total)} ({duration(LOW * total)} to {duration(HIGH * total)}): {'; '.join(parts)}; "
        f"an estimate from {basis}"
    )
    if total <= LONG:
        return Finding("ok", "time", what)
    return Finding(
        "warning",
        "time",
        what,
        "more than a day",
        "fewer --training.max_steps or --seeds, a shorter --data.max_length, --training.precision bf16, or a GPU",
    )


def duration(seconds: float) -> str:
    """As people say it: `40 s`, `12 min`, `3.5 h`, `2.1 days`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 36 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"
