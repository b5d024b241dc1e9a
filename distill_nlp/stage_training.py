"""One training stage: from a model and rows to a finished folder, going on where an earlier attempt stopped."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

import distill_nlp
from distill_nlp.arguments import DistillationArguments
from distill_nlp.config import TrainingSection
from distill_nlp.config_training import task_metric
from distill_nlp.energy import EnergyMeter
from distill_nlp.ensemble import TeacherEnsemble
from distill_nlp.errors import DistillError, UsageError
from distill_nlp.lengths import most_positions
from distill_nlp.losses import DistillationLoss, ModelShape
from distill_nlp.losses.base import SINGLE_LABEL
from distill_nlp.metrics import compute_metrics
from distill_nlp.progress import StageProgress
from distill_nlp.rehearsal import passing_folder, rehearsal
from distill_nlp.schedules import Setting
from distill_nlp.stages import Fingerprint, StageFolder, write_json
from distill_nlp.teacher import CachedTeacher, Teacher
from distill_nlp.terms import FormulaPrinter
from distill_nlp.trainer import DistillationTrainer
from distill_nlp.training_end import reason_of_early_stop, take_over_the_end

Say = Callable[[str], None]

# Settings that change how a run looks or where it runs, not what comes out.
_COSMETIC = {
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "disable_tqdm",
    "logging_first_step",
    "logging_steps",
    "per_device_eval_batch_size",
    "report_to",
    "run_name",
    "save_total_limit",
}

# Settings that mean something only where there are projections, or terms to weigh: in the distilled student.
_OF_SEVERAL_TERMS = {
    "loss_balancing",
    "projection_init_batches",
    "projection_learning_rate_factor",
    "projection_weight_decay",
    "term_gradient_norm_steps",
}

# Settings that count only where they are not at their default: what is new must not make old results stale.
_NEW = {
    "early_stopping_patience",
    "early_stopping_threshold",
    "freeze",
    "layer_learning_rate_decay",
    "unfreeze_every",
    "unlabeled_ratio",
} | _OF_SEVERAL_TERMS


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
        if state.is_main_process:
            self.folder.begin(self.fingerprint)
        state.wait_for_everyone()
        trainer = self._trainer(say, self.arguments, self.validation)
        checkpoint = self.folder.last_checkpoint()
        parameters = sum(p.numel() for p in self.model.parameters()) / 1e6
        going_on = f", going on from {checkpoint.name}" if checkpoint else ""
        say(f"{self.name:<20} {parameters:.1f}M parameters, loss {trainer.objective.formula()}{going_on}")
        start = time.monotonic()
        with EnergyMeter() as meter:
            if checkpoint is None or not take_over_the_end(trainer, checkpoint):
                self._train(trainer, checkpoint)
        seconds = time.monotonic() - start
        reason = reason_of_early_stop(trainer)
        if reason:
            say(f"{self.name:<20} stopped at step {trainer.state.global_step} of {trainer.state.max_steps}: {reason}")
        metrics, shown_metric = trainer.evaluate(), self._shown_metric
        trainer.save_model(str(self.folder.result))
        if state.is_main_process:
            write_json(self.folder.result / "training_log.json", {"log": trainer.state.log_history})
            # TensorBoard's files, which would go with the checkpoints.
            if (self.folder.checkpoints / "runs").is_dir():
                (self.folder.checkpoints / "runs").rename(self.folder.result / "runs")
            self.folder.finish(
                {
                    "stage": self.name,
                    "fingerprint": self.fingerprint,
                    "objective": trainer.objective.formula(),
                    "steps": trainer.state.global_step,
                    "stopped_early": {"step": trainer.state.global_step, "why": reason} if reason else None,
                    "best_step": trainer.state.best_global_step,
                    "seconds": round(seconds, 1),
                    "energy": meter.record,
                    # Seconds and energy are those of the last attempt.
                    "resumed_from": checkpoint.name if checkpoint else None,
                    "validation": {k.removeprefix("eval_"): v for k, v in metrics.items() if k.startswith("eval_")},
                    "versions": versions(),
                }
            )
        state.wait_for_everyone()
        say(
            f"{self.name:<20} {trainer.state.global_step} steps in {seconds:.0f} s, validation {shown_metric} "
            f"{metrics[f'eval_{shown_metric}']:.4f} → {self.folder.path}"
        )

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
        if not all(map(math.isfinite, losses)):
            shown = " and ".join(f"{loss:g}" for loss in losses)
            raise DistillError(
                f"{self.name}: the loss of the first steps is {shown}; check the precision "
                "(training.bf16, training.fp16) and the losses' settings"
            )
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
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except torch.OutOfMemoryError as error:
            raise DistillError(
                f"{self.name}: out of memory; lower training.per_device_train_batch_size (and raise "
                "gradient_accumulation_steps by as much) or data.max_length, or set training.gradient_checkpointing"
            ) from error

    def _trainer(self, say: Say, arguments: DistillationArguments, validation: Any) -> DistillationTrainer:
        # Else a tracker names each stage by chance.
        arguments.run_name = arguments.run_name or self.name
        try:
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
        except ValueError as error:
            raise UsageError(f"{self.name}: {error}") from error
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(FormulaPrinter)  # the line of the stage has it
        return trainer


def training_arguments(
    section: TrainingSection, output_dir: Path, seed: int, problem_type: str = SINGLE_LABEL
) -> DistillationArguments:
    """The Trainer's arguments for these settings and this kind of task.

    Raises:
        ValueError: settings that contradict each other, or that this machine cannot serve.
    """
    values = section.model_dump() | {"metric_for_best_model": section.best_metric(problem_type)}
    if values.pop("gradient_checkpointing"):
        # The argument is being renamed; a deprecation warning per stage helps nobody.
        known = DistillationArguments.__dataclass_fields__
        new = "activation_checkpointing"
        values[new if new in known else "gradient_checkpointing"] = True
    # bf16 without an accelerator is refused by TrainingArguments unless the CPU is asked for by name.
    values["use_cpu"] = values["use_cpu"] or not torch.accelerator.is_available()
    strategy = values["eval_strategy"]
    return DistillationArguments(
        **{
            "save_total_limit": 1,
            "disable_tqdm": not sys.stderr.isatty(),
            "dataloader_pin_memory": torch.cuda.is_available(),
            **values,
            "output_dir": str(output_dir),
            "seed": seed,
            "save_strategy": strategy,
            "save_steps": values["eval_steps"] or 500,
            "load_best_model_at_end": strategy != "no",
            "greater_is_better": values["metric_for_best_model"] != "loss",
        }
    )


def mixed_precision(section: TrainingSection) -> str:
    """The autocast of a training, as accelerate names it: by its settings, else by the launcher."""
    if section.bf16 or section.fp16:
        return "bf16" if section.bf16 else "fp16"
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def same_budget(section: TrainingSection, arguments: DistillationArguments, rows: int) -> TrainingSection:
    """The settings for a baseline on fewer rows: as many steps, and evaluations, as `rows` rows give the student."""
    whole = math.floor if arguments.dataloader_drop_last else math.ceil
    per_epoch = whole(rows / arguments.per_device_train_batch_size / arguments.world_size)
    per_epoch = math.ceil(per_epoch / arguments.gradient_accumulation_steps)
    steps = arguments.max_steps if arguments.max_steps > 0 else math.ceil(per_epoch * arguments.num_train_epochs)
    changes: dict[str, Any] = {"max_steps": steps}
    if section.eval_strategy == "epoch":
        changes |= {"eval_strategy": "steps", "eval_steps": per_epoch}
    return section.model_copy(update=changes)


def effective(section: TrainingSection, of_student: bool, problem_type: str = SINGLE_LABEL) -> dict[str, Any]:
    """The settings of a section that change what comes out in this kind of task; some are the distilled student's."""
    left_out = _COSMETIC if of_student else _COSMETIC | _OF_SEVERAL_TERMS | {"unlabeled_ratio"}
    if section.loss_balancing == "none":
        left_out = left_out | {"term_gradient_norm_steps"}
    if section.early_stopping_patience is None:
        left_out = left_out | {"early_stopping_threshold"}
    fields = TrainingSection.model_fields
    left_out = left_out | {k for k in _NEW if getattr(section, k) == fields[k].default}
    values = section.model_dump(mode="json") | {"metric_for_best_model": section.best_metric(problem_type)}
    return {k: v for k, v in values.items() if k not in left_out}


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    import accelerate
    import transformers

    return {
        "distill_nlp": distill_nlp.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "python": sys.version.split()[0],
    }
