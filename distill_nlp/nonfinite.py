"""NaN and infinity in training: found without waiting for the device, named by term, step and rows."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object

logger = logging.getLogger(__name__)

POLICIES = ("stop", "skip")
# A loss scale of float16 begins at 2^16 and is halved at each overflow: after so many in a row it is not to blame.
_OVERFLOWS_IN_A_ROW = 25
_MOST_ROWS = 10
# Where nothing is logged, evaluated or saved for long, numbers are not kept for ever.
_MOST_KEPT = 1000


class NonFiniteError(FloatingPointError):
    """Training met NaN or infinity; what was saved before is as it was."""


@dataclass
class _Batch:
    """The numbers of one micro-batch, on the device."""

    step: int
    micro: int
    names: list[str]
    terms: torch.Tensor | None  # (T,)
    student: torch.Tensor  # (B,), each row's logits added up
    teacher: torch.Tensor | None  # (B,)


class FiniteCheck:
    """Keeps the numbers of each step on the device, and looks at them when the training logs, evaluates or saves.

    With the policy "skip", a step whose gradient is not finite changes neither weights nor optimizer, and counts; the
    schedules go on. Optimizers that are fused do so on the device; others wait for it at each step.

    Args:
        policy: "stop" or "skip".
        limit: steps that may be skipped in one training.
        accelerator: of the trainer.
        rows_of: gives the row numbers of a micro-batch, by step and place in it; None where they cannot be known.

    Example:
        >>> check = FiniteCheck("stop", 0, trainer.accelerator, rows_of)
        >>> check.add(step=3, terms={"kl": value}, student=logits, teacher=None)
        >>> check.look()
        Traceback (most recent call last):
        NonFiniteError: step 4: the loss kl is NaN, in a batch of the rows 3, 8, 12 of the training data; ...
    """

    def __init__(self, policy: str, limit: int, accelerator: Any, rows_of: Callable[[int, int], Sequence[int] | None]):
        self._policy, self._limit, self._accelerator, self._rows_of = policy, limit, accelerator, rows_of
        self._batches: list[_Batch] = []
        self._norms: list[tuple[int, torch.Tensor]] = []
        self.skipped = 0
        self.overflows = 0
        self._in_a_row = 0

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps of it."""
        return {"skipped": self.skipped, "overflows": self.overflows}

    def restore(self, state: dict[str, int]) -> None:
        """Goes on counting."""
        self.skipped, self.overflows = state["skipped"], state["overflows"]

    @property
    def _scaler(self) -> Any:
        return getattr(self._accelerator, "scaler", None)

    # ---- in each step ----

    def add(
        self, step: int, terms: dict[str, torch.Tensor], student: torch.Tensor, teacher: torch.Tensor | None
    ) -> None:
        """Takes in a micro-batch: its terms, and the logits (B, C) of both models."""
        last = self._batches[-1] if self._batches else None
        micro = last.micro + 1 if last is not None and last.step == step else 0
        values = torch.stack([value.detach().float() for value in terms.values()]) if terms else None
        sums = [None if logits is None else logits.detach().float().sum(dim=-1) for logits in (student, teacher)]
        self._batches.append(_Batch(step, micro, list(terms), values, *sums))

    def add_norm(self, step: int, norm: Any, optimizer: Any) -> None:
        """Takes in the norm of a step's gradient, before the optimizer's step, which then may be left out.

        Where a loss scale is at work, it leaves out by itself the step of a gradient that is not finite.
        """
        if not isinstance(norm, torch.Tensor):
            return
        self._norms.append((step, norm.detach().float()))
        if self._policy == "skip" and self._scaler is None:
            self._hold(optimizer, norm)

    def _hold(self, optimizer: Any, norm: torch.Tensor) -> None:
        inner, norm = getattr(optimizer, "optimizer", optimizer), _whole(norm)
        if getattr(inner, "_step_supports_amp_scaling", False):
            # As a loss scaler tells it: the step is left out on the device.
            inner.grad_scale, inner.found_inf = None, (~torch.isfinite(norm)).float()
        elif not bool(torch.isfinite(norm)):
            inner.zero_grad(set_to_none=True)

    def take(self, value: torch.Tensor) -> torch.Tensor:
        """A number for the log, which one that is not finite would spoil for good."""
        return torch.where(torch.isfinite(value), value, torch.zeros_like(value)) if self._policy == "skip" else value

    @property
    def is_full(self) -> bool:
        """Whether it is time to look although nothing else asks for it."""
        return len(self._batches) >= _MOST_KEPT

    # ---- now and then ----

    def look(self) -> None:
        """Looks at what was taken in since the last time; all ranks together.

        Raises:
            NonFiniteError: there was NaN or infinity, and the policy is to stop, or too many steps were skipped.
        """
        batches, norms = self._batches, [(step, _whole(norm)) for step, norm in self._norms]
        self._batches, self._norms = [], []
        numbers = [x for batch in batches for x in (batch.terms, batch.student, batch.teacher)]
        kept = [x.reshape(-1) for x in (*numbers, *(norm for _, norm in norms)) if x is not None]
        several = self._accelerator.num_processes > 1
        if not kept and not several:
            return
        device = self._accelerator.device
        bad = (~torch.isfinite(torch.cat([x.to(device) for x in kept]))).any() if kept else torch.zeros(())
        bad = bad.to(device, torch.float32)
        if several:
            bad = self._accelerator.reduce(bad, reduction="sum")
        if not bad.item():
            self._in_a_row = 0 if norms else self._in_a_row
            return
        norms = self._count_overflows(norms)
        found = _found(batches, norms)
        if several:
            # A dict for each rank; the first step at fault is the same place for all of them.
            everyone = gather_object([{s: (what.of_norm, self._words(s, what)) for s, what in found.items()}])
            messages = _of_the_cause(everyone)
        else:
            messages = {step: self._words(step, what) for step, what in found.items()}
        self._judge(dict(sorted(messages.items())))

    def _count_overflows(self, norms: list[tuple[int, torch.Tensor]]) -> list[tuple[int, torch.Tensor]]:
        """Counts the steps that a loss scale has left out, and gives the norms that are left to judge: none then.

        By the norms, which are those of all ranks: whether a fused optimizer left out a step, accelerate cannot say.

        Raises:
            NonFiniteError: so often in a row that the scale is not the cause.
        """
        if self._scaler is None:
            return norms
        for _, norm in norms:
            left_out = not math.isfinite(norm.item())
            self.overflows += left_out
            self._in_a_row = self._in_a_row + 1 if left_out else 0
            if self._in_a_row >= _OVERFLOWS_IN_A_ROW:
                raise NonFiniteError(
                    f"the gradient was not finite in {self._in_a_row} steps in a row, at a loss scale of "
                    f"{self._scaler.get_scale():g}: it is not float16's range; lower learning_rate or the losses' "
                    "weights, or train in bf16"
                )
        return []

    def _judge(self, messages: dict[int, str]) -> None:
        for message in messages.values():
            if self._policy == "stop":
                raise NonFiniteError(
                    f"{message}. Lower learning_rate or the loss's weight, look at these rows, or set on_nonfinite to "
                    "skip"
                )
            self.skipped += 1
            if self.skipped > self._limit:
                raise NonFiniteError(
                    f"{message}; that is the {self.skipped}th step that is not finite, and max_nonfinite_steps is "
                    f"{self._limit}. Lower learning_rate or the loss's weight, or look at these rows"
                )
            logger.warning("%s; skipped (%d of at most %d)", message, self.skipped, self._limit)

    def _words(self, step: int, what: _Finding) -> str:
        rows = None
        # The order of some data cannot be drawn again; the step is named all the same.
        with suppress(Exception):
            drawn = [self._rows_of(step, micro) for micro in what.micros]
            if None not in drawn:
                rows = [row for some in drawn for row in some]
        if rows is not None and what.places is not None:
            rows = [rows[place] for place in what.places if place < len(rows)]
        if not rows:
            return f"step {step + 1}: {what.what}"
        shown = ", ".join(map(str, rows[:_MOST_ROWS]))
        if len(rows) > _MOST_ROWS:
            shown += f" and {len(rows) - _MOST_ROWS} more"
        where = "for" if what.places is not None else "in a batch of"
        return f"step {step + 1}: {what.what}, {where} row{'s' * (len(rows) > 1)} {shown} of the training data"


@dataclass
class _Finding:
    """What was wrong with a step: in words, in which micro-batches, and in which rows of one, where known.

    `of_norm`: that is all that this rank knows of it; the cause may lie on another one.
    """

    what: str
    micros: list[int]
    places: list[int] | None = None
    of_norm: bool = False


def _found(batches: list[_Batch], norms: list[tuple[int, torch.Tensor]]) -> dict[int, _Finding]:
    """The first thing that is wrong with each step."""
    found: dict[int, _Finding] = {}
    for batch in batches:
        if batch.step in found:
            continue
        teacher = _places(batch.teacher)
        if teacher:
            found[batch.step] = _Finding("the teacher's logits are NaN or infinite", [batch.micro], teacher)
            continue
        values = [] if batch.terms is None else batch.terms.tolist()
        wrong = [(n, value) for n, value in zip(batch.names, values, strict=True) if not math.isfinite(value)]
        student = _places(batch.student)
        if wrong:
            named = " and ".join(f"{name} is {_kind(value)}" for name, value in wrong)
            what = f"the loss {named}" + (", as the student's logits are" if student else "")
            found[batch.step] = _Finding(what, [batch.micro], student or None)
        elif student:
            found[batch.step] = _Finding("the student's logits are NaN or infinite", [batch.micro], student)
    for step, norm in norms:
        if step not in found and not math.isfinite(value := norm.item()):
            micros = [batch.micro for batch in batches if batch.step == step]
            found[step] = _Finding(
                f"the norm of the gradient is {_kind(value)}, although no loss is", micros, None, True
            )
    return found


def _of_the_cause(everyone: list[dict[int, tuple[bool, str]]]) -> dict[int, str]:
    """What to say of each step: what the first rank found that found more than the norm, which is that of all ranks."""
    chosen: dict[int, tuple[bool, str]] = {}
    for one in everyone:
        for step, (of_norm, words) in one.items():
            if step not in chosen or (chosen[step][0] and not of_norm):
                chosen[step] = (of_norm, words)
    return {step: words for step, (_, words) in chosen.items()}


def _whole(value: torch.Tensor) -> torch.Tensor:
    """Under FSDP2 a norm lies in parts over the ranks, which are put together only when it is looked at."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _places(sums: torch.Tensor | None) -> list[int]:
    return [] if sums is None else (~torch.isfinite(sums)).nonzero().flatten().tolist()


def _kind(value: float) -> str:
    return "NaN" if math.isnan(value) else "infinite"


def rows_of_batch(
    loader: Any, state: Any, accumulation: int, begin_of_epoch: torch.Tensor | None, step: int, micro: int
) -> list[int] | None:
    """The numbers of the rows of a micro-batch on this rank, drawn again as they were; None of data without an order.

    Args:
        loader: of the training, as accelerate has prepared it.
        state: of the trainer, whose epoch some samplers ask for.
        accumulation: micro-batches of a step.
        begin_of_epoch: state of PyTorch's generator as the epoch of the step began.
        step: counted from 0.
        micro: place in the step.
    """
    if getattr(loader, "batch_sampler", None) is None:
        return None
    per_epoch = max(1, -(-len(loader) // accumulation))
    epoch, place = step // per_epoch, step % per_epoch * accumulation + micro
    before, state.epoch = state.epoch, float(epoch)
    try:
        with torch.random.fork_rng(devices=[]):
            if begin_of_epoch is not None:
                torch.random.set_rng_state(begin_of_epoch)
            # The loader draws a seed for its workers first.
            torch.empty((), dtype=torch.int64).random_(generator=getattr(loader, "generator", None))
            if hasattr(loader, "set_epoch"):
                loader.set_epoch(epoch)
            return next((list(rows) for number, rows in enumerate(loader.batch_sampler) if number == place), None)
    finally:
        state.epoch = before
