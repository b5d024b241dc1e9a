"""A Trainer that can be killed at any moment: checkpoints that count when whole, trainings that go on exactly."""

from __future__ import annotations

import logging
import shutil
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from distill_nlp.arguments import setting_of
from distill_nlp.durable_files import read_json, storage_problem
from distill_nlp.hub.publishing import PublishingTrainer
from distill_nlp.interruption import Interrupted, active_watch
from distill_nlp.manifests import (
    CHECKPOINT_PREFIX,
    MANIFEST_FILE,
    checkpoints,
    damage,
    newest_intact,
    remove_checkpoint,
    write_manifest,
)
from distill_nlp.nonfinite import FiniteCheck, rows_of_batch
from distill_nlp.resume_state import ResumeState, state_file
from distill_nlp.terms import TermLog

logger = logging.getLogger(__name__)

# The file of PyTorch that writes files; each of its errors has it.
_TORCH_WRITER = "inline_container"
_ALMOST_NOTHING = 1 << 24  # bytes


class CheckpointNotWritten(OSError):
    """A checkpoint could not be written; those before it are as they were."""


class ResumableTrainer(PublishingTrainer):
    """Writes checkpoints with a manifest, goes on from whole ones alone, stops at a step when it is told to.

    The Trainer names a checkpoint's folder and pushes from it while it writes, so the folder has its name from the
    start; it counts from when its manifest is there, which is written last.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._resume_state = ResumeState(self)
        self.add_callback(self._resume_state)
        self._saving_checkpoint = False
        self._saved: Path | None = None
        self._at = -1
        self._begin_checks()

    def _begin_checks(self) -> None:
        self.terms = TermLog()
        policy, limit = setting_of(self.args, "on_nonfinite"), setting_of(self.args, "max_nonfinite_steps")
        self.nonfinite = FiniteCheck(policy, limit, self.accelerator, self._rows_of)

    def _rows_of(self, step: int, micro: int) -> Any:
        loader, accumulation = self.callback_handler.train_dataloader, self.args.gradient_accumulation_steps
        return rows_of_batch(loader, self.state, accumulation, self._resume_state.begin_of_epoch, step, micro)

    # ---- going on ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`; True goes on from the newest whole checkpoint.

        Raises:
            ValueError: the checkpoint is not whole, or there is none that is.
            NonFiniteError: a loss, a gradient or the teacher's logits are not finite.
            CheckpointNotWritten: the disk refused it.
            Interrupted: a `SignalWatch` took a signal; the checkpoint of the step is written.
        """
        checkpoint = self._checked(resume_from_checkpoint)
        self._resume_state.begin(checkpoint)
        self._saved, self._at = None if checkpoint is None else Path(checkpoint), -1
        watch = active_watch()
        with nullcontext() if watch is None else watch.deferring():
            output = super().train(checkpoint, *args, **kwargs)
        # With the steps before an interruption; the Trainer's own is of this call.
        return output._replace(training_loss=output.metrics["train_loss"])

    def _checked(self, wanted: str | bool | None) -> str | None:
        if not wanted:
            return None
        if wanted is True:
            found = newest_intact(Path(self.args.output_dir), logger.warning)
            if found is None:
                raise ValueError(f"there is no whole checkpoint in {self.args.output_dir}")
            return str(found)
        folder = Path(wanted)
        if not (folder / MANIFEST_FILE).exists():
            logger.warning("%s has no %s: whether it is whole cannot be known", folder, MANIFEST_FILE)
        elif (problem := damage(folder)) is not None:
            raise ValueError(f"the checkpoint {folder} is not whole: {problem}; go on from another one")
        return str(wanted)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        # From the end of an epoch on, the next one's order is drawn from this state.
        if checkpoint is not None and float(self.state.epoch or 0).is_integer():
            self._resume_state.begin_of_epoch = torch.random.get_rng_state()

    # ---- the end of a step ----

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        norm = super()._get_grad_norm(*args, **kwargs)
        self.nonfinite.add_norm(self.state.global_step, norm, self.optimizer)
        return norm

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, model: nn.Module, trial: Any, *args: Any, **kwargs: Any
    ) -> None:
        """The Trainer calls it after each step, and once more after each epoch."""
        is_step, self._at = self._at != self.state.global_step, self.state.global_step
        control = self.control
        asked = control.should_log or control.should_evaluate or control.should_save
        if asked or not is_step or self.nonfinite.is_full:
            self.nonfinite.look()
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        self._stop_if_told(model, trial, is_step)

    def _stop_if_told(self, model: nn.Module, trial: Any, is_step: bool) -> None:
        watch = active_watch()
        if watch is None or not (signum := watch.agreed(self.args.world_size)):
            return
        control = self.control
        ends = control.should_training_stop or control.should_epoch_stop or float(self.state.epoch or 0).is_integer()
        if is_step and ends:
            # An evaluation may come with the end of the epoch, which a checkpoint of now would leave out.
            return
        if self._saved is None or self._saved.name != f"{CHECKPOINT_PREFIX}{self.state.global_step}":
            self._save_checkpoint(model, trial)
        raise Interrupted(signum, f"{self._saved.name} is saved")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what was left out for numbers that were not finite; the mean loss is that of all attempts."""
        if "loss" in logs:
            if self.nonfinite.skipped:
                logs["nonfinite_steps"] = self.nonfinite.skipped
            if self.nonfinite.overflows:
                logs["fp16_overflows"] = self.nonfinite.overflows
        # Only where a training was not run in this process, so that the results of two runs would differ by it.
        logs.pop("eval_model_preparation_time", None)
        if "train_loss" in logs:
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, start_time)

    def log_the_end(self, checkpoint: Path) -> None:
        """The last entry of the log of a training that was over at this checkpoint, where it was not written any more.

        Args:
            checkpoint: whose state the trainer has.
        """
        saved = read_json(state_file(checkpoint, self.args.process_index))
        if saved is None or any("train_loss" in entry for entry in self.state.log_history):
            return
        self._total_loss_scalar = saved["loss_before"] + saved["loss_since_log"]
        self.nonfinite.restore(saved["nonfinite"])
        self.log({"total_flos": self.state.total_flos, "train_loss": 0.0})

    # ---- saving ----

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.nonfinite.look()
        folder = Path(self._get_output_dir(trial=trial)) / f"{CHECKPOINT_PREFIX}{self.state.global_step}"
        # The Trainer would remove older ones before the new one is whole.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        self._saving_checkpoint = True
        try:
            self._make_way(folder)
            super()._save_checkpoint(model, trial)
            self._resume_state.write(folder)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                write_manifest(folder)
        except (OSError, RuntimeError, SafetensorError) as error:
            if not (isinstance(error, OSError) or storage_problem(error) or _TORCH_WRITER in str(error)):
                raise
            raise self._not_written(folder, error) from error
        finally:
            self._saving_checkpoint, self.args.save_total_limit = False, limit
        self._saved = folder
        if self.args.should_save and limit:
            self._rotate(folder, limit)

    def _make_way(self, folder: Path) -> None:
        """What an earlier attempt left under this name must not be counted as part of the new one."""
        if self.args.should_save and folder.exists():
            remove_checkpoint(folder)
        if self.args.world_size > 1:
            self.accelerator.wait_for_everyone()

    def _not_written(self, folder: Path, error: Exception) -> CheckpointNotWritten:
        problem = storage_problem(error) or " ".join(str(error).split())
        # PyTorch says only that its file is not where it should be.
        if _TORCH_WRITER in problem and shutil.disk_usage(folder.parent).free < _ALMOST_NOTHING:
            problem = "no space left on the disk"
        with suppress(OSError):
            remove_checkpoint(folder)
        whole = self._saved if self._saved is not None and self._saved.is_dir() else None
        left = f"{whole.name} is as it was, and training goes on from it" if whole else "none was saved before"
        return CheckpointNotWritten(f"{folder} could not be written: {problem}; {left}")

    def _rotate(self, newest: Path, limit: int) -> None:
        """Removes the oldest, but never the newest or the best; those of later steps are of an attempt given up."""
        best = Path(self.state.best_model_checkpoint).name if self.state.best_model_checkpoint else None
        found = checkpoints(newest.parent)
        place = found.index(newest)
        others = [path for path in found[place + 1 :] + found[:place] if path.name != best]
        kept = len(found) - len(others)
        for path in others[: max(0, len(found) - max(limit, kept))]:
            remove_checkpoint(path)
