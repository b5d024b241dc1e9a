"""One training stage: from a model and rows to a finished folder, going on where an earlier attempt stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from distill_nlp.arguments import DistillationArguments
from distill_nlp.checkpoints import holds_weights
from distill_nlp.combinations import refuse_unsaved
from distill_nlp.config_training import task_metric
from distill_nlp.durable_files import write_json
from distill_nlp.energy import EnergyMeter, machine_counters
from distill_nlp.ensemble import TeacherEnsemble
from distill_nlp.errors import DistillError, UsageError
from distill_nlp.interruption import Interrupted
from distill_nlp.lengths import most_positions
from distill_nlp.losses import DistillationLoss, ModelShape
from distill_nlp.metrics import compute_metrics
from distill_nlp.nonfinite import NonFiniteError
from distill_nlp.out_of_memory import memory_errors
from distill_nlp.progress import StageProgress
from distill_nlp.rehearsal import passing_folder, rehearsal
from distill_nlp.resumable import CheckpointNotWritten
from distill_nlp.schedules import Setting
from distill_nlp.stages import TRACKER_FOLDER, Fingerprint, StageFolder, few_of
from distill_nlp.teacher import CachedTeacher, Teacher
from distill_nlp.terms import FormulaPrinter
from distill_nlp.trackers import run_name, run_of_its_own
from distill_nlp.trainer import DistillationTrainer
from distill_nlp.training_end import reason_of_early_stop, take_over_the_end
from distill_nlp.training_settings import versions

Say = Callable[[str], None]


@dataclass
class TrainingJob:
    """All that one training takes.

    Args:
        name: of the stage, for messages.
        folder: where work and result go.
        fingerprint: what the result depends on, written beside it.
        model: the one to train.
        losses, weights, teacher: as `DistillationTrainer` takes them.
        train, validation: tokenized rows.
        arguments: of the Trainer.
        tokenizer: or another processor, saved with the model.
        max_length: of the rows, in tokens, where they are texts.
        callbacks: of the Trainer, beside those of the stage.
        settings: the block of the experiment that says how it trains, for messages.
        run_settings: of the whole run, kept beside the result: the run's own record is that of the last one begun.
    """

    name: str
    folder: StageFolder
    fingerprint: Fingerprint
    model: PreTrainedModel
    losses: dict[str, DistillationLoss]
    train: Any
    validation: Any
    arguments: DistillationArguments
    tokenizer: Any = None
    max_length: int = 0
    teacher: Teacher | TeacherEnsemble | CachedTeacher | None = None
    weights: dict[str, Setting] | None = None
    callbacks: Sequence[TrainerCallback] = ()
    settings: str = "training"
    run_settings: dict[str, Any] | None = None

    def run(self, say: Say) -> None:
        """Trains, keeps the best checkpoint by the validation metric, and finishes the folder.

        Raises:
            UsageError: models, losses and lengths do not fit, or another run is at work on this stage.
            DistillError: the device has too little memory.
        """
        self._check_length()
        with self.folder.claimed() if PartialState().is_main_process else nullcontext():
            self._run(say)

    def _run(self, say: Say) -> None:
        state = PartialState()
        if state.is_main_process and (changes := self.folder.begin(self.fingerprint)):
            say(f"{self.name:<20} settings changed since it was interrupted, so it begins anew ({few_of(changes)})")
        state.wait_for_everyone()
        trainer = self._trainer(say, self.arguments, self.validation)
        with run_of_its_own(trainer.callback_handler.callbacks, state.is_main_process):
            self._train_and_finish(trainer, say)

    def _train_and_finish(self, trainer: DistillationTrainer, say: Say) -> None:
        state = PartialState()
        checkpoint = self._last_checkpoint(say)
        parameters = sum(p.numel() for p in self.model.parameters()) / 1e6
        going_on = f", going on from {checkpoint.name}" if checkpoint else ""
        say(f"{self.name:<20} {parameters:.1f}M parameters, loss {trainer.objective.formula()}{going_on}")
        start = time.monotonic()
        with EnergyMeter(machine_counters(gpus=self.arguments.device.type != "cpu")) as meter:
            if checkpoint is None or not take_over_the_end(trainer, checkpoint):
                self._train(trainer, checkpoint)
        seconds = time.monotonic() - start
        reason = reason_of_early_stop(trainer)
        if reason:
            say(f"{self.name:<20} stopped at step {trainer.state.global_step} of {trainer.state.max_steps}: {reason}")
        with self._memory_errors():
            metrics, shown_metric = self._validation(trainer), self._shown_metric
        trainer.save_model(str(self.folder.result))
        self._check_saved()
        if state.is_main_process:
            write_json(self.folder.result / "training_log.json", {"log": trainer.state.log_history})
            # TensorBoard's files, which would go with the checkpoints.
            if (self.folder.checkpoints / TRACKER_FOLDER).is_dir():
                (self.folder.checkpoints / TRACKER_FOLDER).rename(self.folder.result / TRACKER_FOLDER)
            self.folder.finish(
                {
                    "stage": self.name,
                    "fingerprint": self.fingerprint,
                    "objective": trainer.objective.formula(),
                    "steps": trainer.state.global_step,
                    "stopped_early": {"step": trainer.state.global_step, "why": reason} if reason else None,
                    "best_step": trainer.state.best_global_step if self.arguments.load_best_model_at_end else None,
                    "nonfinite_steps": trainer.nonfinite.skipped,
                    "seconds": round(seconds, 1),
                    "energy": meter.record,
                    # Seconds and energy are those of the last attempt.
                    "resumed_from": checkpoint.name if checkpoint else None,
                    "validation": {k.removeprefix("eval_"): v for k, v in metrics.items() if k.startswith("eval_")},
                    "versions": versions(),
                    **({"run_settings": self.run_settings} if self.run_settings else {}),
                }
            )
        state.wait_for_everyone()
        say(
            f"{self.name:<20} {trainer.state.global_step} steps in {seconds:.0f} s, validation {shown_metric} "
            f"{metrics[f'eval_{shown_metric}']:.4f} → {self.folder.path}"
        )

    def _validation(self, trainer: DistillationTrainer) -> dict[str, float]:
        """Metrics of the model that is kept: those of the evaluation at its step; a new one where there was none."""
        state, step = trainer.state, trainer.state.global_step
        if self.arguments.load_best_model_at_end:
            # Without its checkpoint it could not be loaded.
            is_best = state.best_model_checkpoint is not None and Path(state.best_model_checkpoint).is_dir()
            step = state.best_global_step if is_best else None
        logged = [entry for entry in state.log_history if "eval_loss" in entry and entry["step"] == step]
        return logged[-1] if logged else trainer.evaluate()

    def _check_saved(self) -> None:
        """Before the checkpoints go: where models are sharded, the Trainer may write nothing, and say nothing."""
        if not broadcast_object_list([holds_weights(self.folder.result)])[0]:
            raise DistillError(
                f"{self.name}: no weights were written at the end of training; DeepSpeed's ZeRO-3 does so with "
                "zero3_save_16bit_model; with that set, the same command goes on from the last checkpoint"
            )

    def _last_checkpoint(self, say: Say) -> Path | None:
        """To go on from; the main rank looks, and says what it leaves out."""
        found = None
        if PartialState().is_main_process:
            found = self.folder.last_checkpoint(lambda line: say(f"{self.name:<20} {line}"))
        return broadcast_object_list([found])[0]

    @property
    def _shown_metric(self) -> str:
        """What its lines show: the task's own metric."""
        return task_metric(ModelShape.from_config(self.model.config).problem_type)

    def rehearse(self, say: Say) -> None:
        """All that `run` does, in small: two steps, an evaluation of one batch, a checkpoint that is loaded again.

        Nothing is kept of it on disk, and no tracker hears of it; `model` has taken the two steps.

        Raises:
            UsageError: models, losses and lengths do not fit.
            DistillError: the device has too little memory, or a loss is not finite.
        """
        self._check_length()
        state, start = PartialState(), time.monotonic()
        folder = self.folder.path.with_name(self.folder.path.name + ".rehearsal")
        rows = min(len(self.validation), self.arguments.per_device_eval_batch_size * state.num_processes)
        with passing_folder(folder, state):
            trainer = self._trainer(say, rehearsal(self.arguments, folder), self.validation.select(range(rows)))
            self._train(trainer, None)
            trainer.save_model(str(folder / "result"))
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        say(
            f"{self.name:<20} dry run: {trainer.state.global_step} steps with loss "
            f"{' and '.join(f'{loss:.4f}' for loss in losses)}, evaluated on {rows} rows, saved and loaded again in "
            f"{time.monotonic() - start:.0f} s; nothing is kept"
        )

    def _check_length(self) -> None:
        longest = most_positions(getattr(self.model, "config", None))
        if longest is not None and longest < self.max_length:
            raise UsageError(
                f"data.max_length is {self.max_length}, but the model of the stage {self.name} reads at most {longest} "
                "tokens"
            )

    def _train(self, trainer: DistillationTrainer, checkpoint: Path | None) -> None:
        try:
            with self._memory_errors():
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except NonFiniteError as error:
            raise DistillError(f"{self.name}: {error}") from error
        except UsageError as error:
            # A row of a stream; from a loader's worker it comes with that one's traceback.
            raise UsageError(f"{self.name}: {str(error).strip().rpartition('UsageError: ')[2]}") from error
        except CheckpointNotWritten as error:
            raise DistillError(f"{self.name}: {error}; when that is mended, the same command goes on") from error
        except Interrupted as error:
            raise Interrupted(error.signum, f"{self.name}: {error.saved}") from None

    def _memory_errors(self) -> AbstractContextManager[None]:
        rows, more = self.arguments.per_device_train_batch_size, self.arguments.gradient_accumulation_steps
        comparing = [name for name, loss in self.losses.items() if loss.compares_rows]
        unlike = f", but for losses.{comparing[0]}, which compares the rows of a forward pass" if comparing else ""
        lower = (
            f"{self.settings}.per_device_train_batch_size (now {rows}; to {rows // 2}, with "
            f"gradient_accumulation_steps {2 * more}, a step stays what it is{unlike})"
            if rows > 1
            else "the model's size"
        )
        return memory_errors(
            self.name,
            f"lower {lower}, data.max_length, or per_device_eval_batch_size (now "
            f"{self.arguments.per_device_eval_batch_size}); or set {self.settings}.gradient_checkpointing",
        )

    def _trainer(self, say: Say, arguments: DistillationArguments, validation: Any) -> DistillationTrainer:
        arguments.run_name = run_name(arguments.run_name, self.folder.path)
        try:
            # It brings both models to the device.
            with self._memory_errors():
                trainer = DistillationTrainer(
                    model=self.model,
                    teacher=self.teacher,
                    losses=self.losses,
                    loss_weights=self.weights,
                    args=arguments,
                    train_dataset=self.train,
                    eval_dataset=validation,
                    processing_class=self.tokenizer,
                    compute_metrics=compute_metrics,
                    callbacks=[StageProgress(self.name, say, self._shown_metric), *self.callbacks],
                )
            refuse_unsaved(trainer.accelerator)
        except ValueError as error:
            raise UsageError(f"{self.name}: {error}") from error
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(FormulaPrinter)  # the line of the stage has it
        return trainer
