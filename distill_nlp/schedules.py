"""Numbers that change in the course of training: the weight of a loss, a temperature."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Setting = float | Mapping[str, Any]
"""A number, or `{schedule: linear, start: 1.0, end: 0.0}` and the like."""


def _linear(start: float, end: float, part: float) -> float:
    # Exact at both ends, unlike start + (end - start) * part, which can end at 0 instead of a small `end`.
    return start * (1 - part) + end * part


def _cosine(start: float, end: float, part: float) -> float:
    return _linear(start, end, (1 - math.cos(math.pi * part)) / 2)


def _exponential(start: float, end: float, part: float) -> float:
    return start ** (1 - part) * end**part


_CURVES: dict[str, Callable[[float, float, float], float]] = {
    "linear": _linear,
    "cosine": _cosine,
    "exponential": _exponential,
}
KINDS = ("constant", *_CURVES, "range")


@dataclass(frozen=True)
class Schedule:
    """A number as a function of progress, which runs from 0 (first step) to 1 (the end of training).

    Kinds, with `u` the progress within `begin..until`, from 0 to 1, and constant before and after:
    constant `value`; linear `start + (end - start) u`; cosine `end + (start - end)(1 + cos πu) / 2`; exponential
    `start (end / start)^u`; range `value` while `begin <= progress < until`, else `outside`.

    Args:
        kind: one of the above.
        start, end: the values at `begin` and `until`; equal for constant and range.
        begin, until: parts of the training, in [0, 1].
        outside: the value of a range elsewhere.

    Example:
        >>> build_schedule({"schedule": "linear", "start": 1.0, "end": 0.0}, "weight")(0.25)
        0.75
    """

    kind: str
    start: float
    end: float
    begin: float = 0.0
    until: float = 1.0
    outside: float = 0.0

    def __call__(self, progress: float) -> float:
        if self.kind == "constant":
            return self.start
        if self.kind == "range":
            # At the very end a range that lasts to the end still holds.
            inside = self.begin <= progress and (progress < self.until or self.until == 1.0)
            return self.start if inside else self.outside
        part = min(max((progress - self.begin) / (self.until - self.begin), 0.0), 1.0)
        return _CURVES[self.kind](self.start, self.end, part)

    @property
    def constant(self) -> bool:
        return self.kind == "constant"

    @property
    def lowest(self) -> float:
        """The least value it ever has."""
        return min(self._values())

    @property
    def highest(self) -> float:
        """The greatest value it ever has."""
        return max(self._values())

    def _values(self) -> tuple[float, ...]:
        whole = (self.begin, self.until) == (0.0, 1.0)
        if self.kind == "range" and not whole:
            return self.start, self.outside
        return self.start, self.end

    def __str__(self) -> str:
        if self.constant:
            return f"{self.start:g}"
        span = "" if (self.begin, self.until) == (0.0, 1.0) else f" {self.begin:.3g}..{self.until:.3g}"
        if self.kind == "range":
            elsewhere = f", else {self.outside:g}" if self.outside else ""
            return f"[{self.start:g} in{span or ' 0..1'}{elsewhere}]"
        return f"[{self.start:g}→{self.end:g} {self.kind}{span}]"


def build_schedule(setting: Setting, name: str) -> Schedule:
    """The schedule that a setting describes: a plain number is constant.

    Args:
        setting: a number, or a mapping with `schedule` (constant, linear, cosine, exponential, range) and its values:
            `value` (constant, range), `start` and `end` (the others), and where wanted `begin`, `until` (parts of the
            training in [0, 1]) and `outside` (range).
        name: of the setting, for messages.

    Raises:
        ValueError: unknown kind, a value that is missing, unknown, no finite number, or out of range.
    """
    if not isinstance(setting, Mapping):
        value = _number(setting, name)
        return Schedule("constant", value, value)
    kind = setting.get("schedule")
    if kind not in KINDS:
        raise ValueError(f"{name}: schedule must be one of {', '.join(KINDS)}, got {kind!r}")
    takes = {"constant": {"value"}, "range": {"value", "begin", "until", "outside"}}.get(
        kind, {"start", "end", "begin", "until"}
    )
    needed = {"value"} if "value" in takes else {"start", "end"}
    if unknown := [key for key in setting if key not in takes | {"schedule"}]:
        raise ValueError(f"{name}: schedule {kind} takes {', '.join(sorted(takes))}, not {unknown[0]!r}")
    if missing := sorted(needed - set(setting)):
        raise ValueError(f"{name}: schedule {kind} needs {missing[0]}")
    values = {key: _number(value, f"{name}.{key}") for key, value in setting.items() if key != "schedule"}
    begin, until = values.get("begin", 0.0), values.get("until", 1.0)
    if not 0 <= begin < until <= 1:
        raise ValueError(f"{name}: needs 0 <= begin < until <= 1 (parts of the training), got {begin:g} and {until:g}")
    start = values.get("start", values.get("value", 0.0))
    end = values.get("end", start)
    if kind == "exponential" and not (start > 0 and end > 0):
        raise ValueError(f"{name}: schedule exponential needs start and end > 0, got {start:g} and {end:g}")
    return Schedule(kind, start, end, begin, until, values.get("outside", 0.0))


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return float(value)
