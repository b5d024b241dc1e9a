"""What is kept of each term of the objective between two log entries, on the device until it is read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback

logger = logging.getLogger(__name__)


class TermLog:
    """Sums of term values and of gradient norms, and the warnings that their means call for."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._steps: dict[str, int] = {}
        self._norms: dict[str, list[torch.Tensor]] = {}
        self._warned: set[str] = set()

    def begin_step(self, names: Sequence[str]) -> None:
        """A step begins, in which these terms are computed."""
        for name in names:
            self._steps[name] = self._steps.get(name, 0) + 1

    def add(self, name: str, value: torch.Tensor) -> None:
        """The part of one micro-batch in a term's mean over the global batch."""
        # In bfloat16, as FSDP may give it, a sum would soon stop growing.
        self._sums[name] = self._sums.get(name, 0.0) + value.detach().float()

    def add_norm(self, name: str, norm: torch.Tensor) -> None:
        """The norm of a term's gradient, measured in this step."""
        self._norms.setdefault(name, []).append(norm)

    def read(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """Log entries since the last reading, which this one ends: `loss_<name>`, the mean of a term over the steps in
        which it was computed, and `gradient_norm_<name>`. The one place that waits for the device.

        Args:
            reduce: mean over ranks.
        """
        values = {f"loss_{name}": total / self._steps[name] for name, total in self._sums.items()}
        norms = {f"gradient_norm_{name}": torch.stack(found).mean() for name, found in self._norms.items()}
        self._sums, self._steps, self._norms = {}, {}, {}
        if not values:
            return {}
        together = torch.stack([value.float() for value in (*values.values(), *norms.values())])
        entries = dict(zip((*values, *norms), reduce(together).tolist(), strict=True))
        for name in values:
            self._warn(name.removeprefix("loss_"), entries[name])
        return entries

    def state(self) -> dict[str, Any]:
        """What has come together since the last reading, as numbers; waits for the device."""
        sums = {name: float(total) for name, total in self._sums.items()}
        norms = {name: [norm.item() for norm in found] for name, found in self._norms.items()}
        return {"sums": sums, "steps": dict(self._steps), "norms": norms}

    def restore(self, state: dict[str, Any], device: Any) -> None:
        """Goes on from what `state` gave."""
        self._sums = {name: torch.tensor(total, device=device) for name, total in state["sums"].items()}
        self._steps = dict(state["steps"])
        self._norms = {n: [torch.tensor(norm, device=device) for norm in found] for n, found in state["norms"].items()}

    def _warn(self, name: str, value: float) -> None:
        """Once for each term: a loss that is exactly zero, and so teaches nothing."""
        if value != 0 or name in self._warned:
            return
        self._warned.add(name)
        logger.warning(
            "the loss %r is exactly zero: it teaches nothing. Were all rows unlabeled, had batches one row and so "
            "nothing to relate, or are student and teacher the same?",
            name,
        )


class FormulaPrinter(TrainerCallback):
    """Shows once, where training begins, what is minimised; the counterpart of the Trainer's own `PrinterCallback`.

    Args:
        formula: gives the line.
    """

    def __init__(self, formula: Callable[[], str]) -> None:
        self.formula = formula

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            tqdm.write(f"objective: {self.formula()}")
