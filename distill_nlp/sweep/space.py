"""The space of a sweep as Optuna sees it, and its points as settings of an experiment."""

from __future__ import annotations

import inspect
import itertools
import json
import math
import random
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from distill_nlp.config_file import leaves, name_outside_phases
from distill_nlp.errors import UsageError
from distill_nlp.sweep.plan import Dimension, Range

if TYPE_CHECKING:
    from optuna.trial import Trial

DIGITS = 4
"""Significant digits of a sampled number: what is printed is what was trained."""
WRITTEN_DIGITS = 12
"""Of a number on steps: those that were written, without the rounding error of a sum."""


class Space:
    """Dimensions by dotted name.

    Choices are kept as JSON text: a study on disk takes lists and blocks then too, and 1 is not true.

    Args:
        dimensions: dotted name -> range or list of values.

    Raises:
        UsageError: a range that is not whole where the setting is, or a value that stands twice.
    """

    def __init__(self, dimensions: Mapping[str, Dimension]) -> None:
        self.dimensions = dict(dimensions)
        self._whole = {name: _is_whole(name, d) for name, d in dimensions.items() if isinstance(d, Range)}
        for name, dimension in self.dimensions.items():
            if isinstance(dimension, Range):
                continue
            texts = [_text(name, value) for value in dimension]
            if len(set(texts)) < len(texts):
                raise UsageError(f"space.{name}: a value stands twice in {dimension}")

    @property
    def names(self) -> set[str]:
        return set(self.dimensions)

    def sample(self, trial: Trial) -> None:
        """Gives the trial a value in each dimension where it has none."""
        for name, dimension in self.dimensions.items():
            if not isinstance(dimension, Range):
                trial.suggest_categorical(name, [_text(name, value) for value in dimension])
                continue
            low, high, log, step = dimension.low, dimension.high, dimension.log, dimension.step
            if step is not None:
                # To the last value on the steps: Optuna warns where high is none.
                high = _rounded(low + _steps(dimension) * step, WRITTEN_DIGITS)
            if self._whole[name]:
                trial.suggest_int(name, int(low), int(high), log=log, step=int(step or 1))
            else:
                trial.suggest_float(name, low, high, log=log, step=step)

    def settings(self, sampled: Mapping[str, Any]) -> dict[str, Any]:
        """Optuna's point as settings of an experiment; numbers are rounded, and stay in range."""
        found = {}
        for name, dimension in self.dimensions.items():
            value = sampled[name]
            if not isinstance(dimension, Range):
                found[name] = json.loads(value)
            elif self._whole[name]:
                found[name] = int(value)
            else:
                digits = DIGITS if dimension.step is None else WRITTEN_DIGITS
                found[name] = min(max(_rounded(value, digits), dimension.low), dimension.high)
        return found

    def ends(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The first point, and those that differ from it in one dimension: its last number or another choice."""
        first = {name: d.low if isinstance(d, Range) else d[0] for name, d in self.dimensions.items()}
        others = []
        for name, dimension in self.dimensions.items():
            rest = [dimension.high] if isinstance(dimension, Range) else dimension[1:]
            others += [first | {name: value} for value in rest]
        return first, others

    def grid(self, seed: int) -> list[dict[str, Any]]:
        """All points as Optuna takes them, in an order that follows the seed.

        Raises:
            UsageError: a range of numbers has no step.
        """
        values = []
        for name, dimension in self.dimensions.items():
            if not isinstance(dimension, Range):
                values.append([_text(name, value) for value in dimension])
                continue
            step = dimension.step or (1 if self._whole[name] else None)
            if step is None:
                raise UsageError(f"space.{name}: a grid needs a step, or a list of values")
            count = _steps(dimension, step)
            values.append([dimension.low + i * step for i in range(count + 1)])
        points = [dict(zip(self.dimensions, point, strict=True)) for point in itertools.product(*values)]
        random.Random(seed).shuffle(points)
        return points


def _rounded(number: float, digits: int) -> float:
    return float(f"{number:.{digits}g}")


def _steps(dimension: Range, step: float | None = None) -> int:
    """How many steps lead from low to the last value; a rounding error is no missing step."""
    return math.floor((dimension.high - dimension.low) / (step or dimension.step or 1) + 1e-9)


def _text(name: str, value: Any) -> str:
    try:
        return json.dumps(value, sort_keys=True)
    except TypeError:
        raise UsageError(f"space.{name}: {value!r} is no number, text, truth value, list or block of these") from None


def _is_whole(name: str, dimension: Range) -> bool:
    """Whether the setting takes whole numbers; where nothing says so, whether the range is written in them."""
    numbers = [n for n in (dimension.low, dimension.high, dimension.step) if n is not None]
    written = all(isinstance(number, int) for number in numbers)
    declared = _declared(name)
    if declared == "int" and not written:
        raise UsageError(f"space.{name}: takes whole numbers, got low {dimension.low}, high {dimension.high}")
    return written if declared is None else declared == "int"


def _declared(name: str) -> str | None:
    """What the package declares the setting as: "int", "float", or None where it says neither."""
    name = name_outside_phases(name)
    section, _, rest = name.partition(".")
    known: Any = dict(leaves()).get(name)
    if known is not None:
        return _number(str(known.annotation))
    loss, _, setting = rest.partition(".")
    if section == "losses":
        if setting == "weight":
            return "float"
        from distill_nlp.losses import LOSSES

        arguments = inspect.signature(LOSSES[loss].__init__).parameters if loss in LOSSES else {}
        # A number that may follow a schedule is declared as a Setting.
        return _number(str(arguments[setting].annotation).replace("Setting", "float")) if setting in arguments else None
    last = name.rpartition(".")[2]
    if name.startswith(("training.", "teacher.training.")):
        from distill_nlp.arguments import DistillationArguments

        field = DistillationArguments.__dataclass_fields__.get(last)
        return _number(str(field.type)) if field is not None else None
    return None


def _number(annotation: str) -> str | None:
    words = set(re.findall(r"\w+", annotation))
    return "float" if "float" in words else "int" if "int" in words else None
