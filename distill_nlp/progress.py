"""What is seen of a training while it goes on: a bar for a person, a line per evaluation for a log file."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback


class StageProgress(TrainerCallback):
    """Takes the place of the Trainer's own bar and printer, which write every log entry in full.

    Args:
        name: of the stage.
        say: gets a line at each evaluation, where nobody watches a bar.
        metric: of validation, that is shown.
    """

    def __init__(self, name: str, say: Callable[[str], None], metric: str = "accuracy") -> None:
        self.name = name
        self.say = say
        self.metric = metric
        self.bar: Any = None
        self.shown: dict[str, str] = {}
        self.training = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.training = True
        if state.is_world_process_zero and sys.stderr.isatty():
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.name, leave=False)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        for key, value in (logs or {}).items():
            if key.startswith("loss"):
                self.shown[key.removeprefix("loss_")] = f"{value:.4f}"
        if self.bar is not None:
            self.bar.set_postfix(self.shown)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        value = (metrics or {}).get(f"eval_{self.metric}")
        if value is None or not state.is_world_process_zero:
            return
        if self.bar is not None:
            self.shown["validation"] = f"{value:.4f}"
            self.bar.set_postfix(self.shown)
        elif self.training and (state.global_step < state.max_steps or not control.should_training_stop):
            losses = ", ".join(f"{name} {loss}" for name, loss in self.shown.items())
            self.say(
                f"{self.name:<20} step {state.global_step}/{state.max_steps}: validation {self.metric} {value:.4f}"
                + (f" ({losses})" if losses else "")
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # An evaluation of the model that is kept, which may follow, is not of this step.
        self.training = False
        if self.bar is not None:
            self.bar.close()
            self.bar = None
