"""What a Trainer's checkpoint lacks to go on exactly: the generator as the epoch began, and the open log window.

An order of rows that is drawn from PyTorch's own generator, as that of the Trainer's `group_by_length` over data that
are no `datasets.Dataset`, is drawn anew when a training goes on in the middle of an epoch. And losses since the last
log entry would be missing from the next one.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from distill_nlp.durable_files import read_json, write_json


def state_file(checkpoint: str | Path, rank: int) -> Path:
    """Where a rank's state lies in a checkpoint."""
    return Path(checkpoint) / f"resume_state_{rank}.json"


class ResumeState(TrainerCallback):
    """Keeps what is needed of a training that goes on, and puts it back.

    Args:
        trainer: whose state it is; of the kind of `ResumableTrainer`.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        # State of the generator on the CPU, which orders rows.
        self.begin_of_epoch: torch.Tensor | None = None
        self._checkpoint: Path | None = None

    def begin(self, checkpoint: str | None) -> None:
        """A training begins, from this checkpoint or anew."""
        self._checkpoint, self.begin_of_epoch = None if checkpoint is None else Path(checkpoint), None

    def write(self, checkpoint: str | Path) -> None:
        """Adds this rank's state to a checkpoint; floats in JSON are exact."""
        trainer, epoch = self._trainer, self.begin_of_epoch
        write_json(
            state_file(checkpoint, trainer.args.process_index),
            {
                "begin_of_epoch": None if epoch is None else base64.b64encode(epoch.numpy().tobytes()).decode(),
                "loss_since_log": trainer._tr_loss.item(),
                "loss_before": trainer._total_loss_scalar,
                "last_logged_step": trainer._globalstep_last_logged,
                "terms": trainer.terms.state(),
                "nonfinite": trainer.nonfinite.state(),
            },
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the Trainer has set its counters to those of a new training."""
        if self._checkpoint is None:
            return
        # The Trainer takes over when the interrupted training logged.
        state.compute_steps(args, state.max_steps)
        trainer = self._trainer
        # Not the Trainer's path, which holds no longer when the folder has moved.
        if state.best_global_step:
            best = self._checkpoint.parent / f"checkpoint-{state.best_global_step}"
            state.best_model_checkpoint = str(best) if best.is_dir() else state.best_model_checkpoint
        saved = read_json(state_file(self._checkpoint, args.process_index))
        if saved is None:
            # A checkpoint of a stock Trainer, or of an earlier version.
            self._checkpoint = None
            return
        trainer._tr_loss = torch.tensor(saved["loss_since_log"], device=args.device)
        trainer._total_loss_scalar = saved["loss_before"]
        trainer._globalstep_last_logged = saved["last_logged_step"]
        trainer.terms.restore(saved["terms"], args.device)
        trainer.nonfinite.restore(saved["nonfinite"])
        epoch = saved["begin_of_epoch"]
        if epoch is not None and state.epoch is not None and state.epoch != int(state.epoch):
            self.begin_of_epoch = torch.frombuffer(bytearray(base64.b64decode(epoch)), dtype=torch.uint8)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the epoch's order is drawn; the Trainer itself brings the generator to where it stopped."""
        if self._checkpoint is not None and self.begin_of_epoch is not None:
            torch.random.set_rng_state(self.begin_of_epoch)
        else:
            self.begin_of_epoch = torch.random.get_rng_state()
        self._checkpoint = None
