"""The temperature that softens logits: a number, a schedule, or one per row."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from distill_nlp.losses.base import check_choice, check_positive
from distill_nlp.schedules import KINDS, Schedule, Setting, build_schedule

PER_ROW = ("flsw", "cwsm")


class Temperature:
    """T > 0, constant, scheduled, or per row as in Dynamic Temperature Distillation.

    Per row `T_i = T + β (mean(ω) - ω_i)`, the mean over the rows at hand: a row with a large ω gets a lower, sharper
    temperature. FLSW: `ω = (1 - cos(z_s, z_t))^γ`, large where the student disagrees; CWSM: `ω = 1 / max softmax(z_s)`,
    large where the student is unsure. No gradient flows through ω.
    Source: Wen et al. 2019, "Preparing Lessons: Improve Knowledge Distillation with Better Supervision"
    (arXiv:1911.07471).

    Args:
        setting: a number; `{schedule: linear, start: 8, end: 1}` and the like (see `build_schedule`); or
            `{schedule: flsw, value: 4, beta: 1, gamma: 1}`, `{schedule: cwsm, value: 4, beta: 1}`.

    Raises:
        ValueError: a temperature that is not, or not always, above zero; unknown settings.
    """

    def __init__(self, setting: Setting) -> None:
        self.per_row: str | None = None
        self.beta, self.gamma = 1.0, 1.0
        if not isinstance(setting, Mapping):
            self.schedule = build_schedule(check_positive("temperature", setting), "temperature")
        elif check_choice("temperature.schedule", setting.get("schedule"), (*KINDS, *PER_ROW)) in PER_ROW:
            self.per_row = setting["schedule"]
            known = {"schedule", "value", "beta"} | ({"gamma"} if self.per_row == "flsw" else set())
            if unknown := [name for name in setting if name not in known]:
                raise ValueError(f"temperature: {self.per_row} takes {', '.join(sorted(known))}, not {unknown[0]!r}")
            if "value" not in setting:
                raise ValueError(f"temperature: {self.per_row} needs value, the temperature to vary around")
            value = check_positive("temperature.value", setting["value"])
            self.schedule = Schedule("constant", float(value), float(value))
            self.beta = float(check_positive("temperature.beta", setting.get("beta", 1.0)))
            self.gamma = float(check_positive("temperature.gamma", setting.get("gamma", 1.0)))
            if self.per_row == "flsw":
                self._check_range(2**self.gamma)
        else:
            self.schedule = build_schedule(setting, "temperature")
            if self.schedule.lowest <= 0:
                hint = "; a range is 0 elsewhere unless outside is given" if self.schedule.kind == "range" else ""
                raise ValueError(f"temperature must be > 0, but {self.schedule} reaches {self.schedule.lowest:g}{hint}")
        self._now = self.schedule(0.0)

    def check_classes(self, classes: int) -> None:
        """Refuses a β that could bring a row's temperature to zero with so many classes: there 1 <= ω <= classes."""
        if self.per_row == "cwsm":
            self._check_range(classes - 1)

    def _check_range(self, spread: float) -> None:
        value = self.schedule.start
        if self.beta * spread >= value:
            raise ValueError(
                f"temperature: {self.per_row} with value {value:g} and beta {self.beta:g} could reach zero; beta must "
                f"be below {value / spread:.3g}"
            )

    def set_progress(self, progress: float) -> None:
        self._now = self.schedule(progress)

    def __call__(self, student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor | float:
        """T, or `(B, 1)` of them for logits of `(B, C)`."""
        if self.per_row is None:
            return self._now
        with torch.no_grad():
            if self.per_row == "flsw":
                cosine = torch.cosine_similarity(student_logits, teacher_logits, dim=-1)  # (B,)
                omega = (1 - cosine).clamp(min=0) ** self.gamma
            else:
                omega = 1 / student_logits.softmax(dim=-1).amax(dim=-1)  # (B,)
            return (self._now + self.beta * (omega.mean() - omega))[:, None]

    def __str__(self) -> str:
        if self.per_row is None:
            return str(self.schedule)
        power = f", γ={self.gamma:g}" if self.per_row == "flsw" else ""
        return f"[{self.schedule.start:g} {self.per_row} β={self.beta:g}{power}]"
