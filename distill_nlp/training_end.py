"""How a training ended: at its last step, or early; and a training that goes on from its own end."""

from __future__ import annotations

from pathlib import Path

from transformers import EarlyStoppingCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from distill_nlp.manifests import best_of
from distill_nlp.trainer import DistillationTrainer


def take_over_the_end(trainer: DistillationTrainer, checkpoint: Path) -> bool:
    """Whether training had ended at this checkpoint; if so, the trainer has its state and its weights.

    The Trainer itself takes one step more from there, unless an epoch ends with it.
    """
    ended = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    control = ended.stateful_callbacks.get("TrainerControl", {})
    stopped = control.get("args", {}).get("should_training_stop") or ended.global_step >= ended.max_steps
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or not stopped:
        return False
    best = best_of(checkpoint) if trainer.args.load_best_model_at_end else None
    # The main rank wrote it.
    ended.is_local_process_zero, ended.is_world_process_zero = (
        trainer.is_local_process_zero(),
        trainer.is_world_process_zero(),
    )
    trainer.state = ended
    trainer._load_callback_state()
    # The folder may have moved since.
    trainer.state.best_model_checkpoint = None if best is None else str(best)
    trainer._load_from_checkpoint(str(checkpoint if best is None else best))
    trainer.log_the_end(checkpoint)
    return True


def reason_of_early_stop(trainer: DistillationTrainer) -> str | None:
    """Why training ended before its last step, or None where it did not."""
    state, args = trainer.state, trainer.args
    for callback in trainer.callback_handler.callbacks:
        if not isinstance(callback, EarlyStoppingCallback) or state.global_step >= state.max_steps:
            continue
        if callback.early_stopping_patience_counter >= callback.early_stopping_patience:
            by = f" by more than {callback.early_stopping_threshold:g}" if callback.early_stopping_threshold else ""
            return (
                f"validation {args.metric_for_best_model} has not improved{by} in "
                f"{callback.early_stopping_patience_counter} evaluations; best {state.best_metric:.4f} at step "
                f"{state.best_global_step}"
            )
    return None
