"""The student's weights on disk, in the form that belongs to its kind, and back, strictly."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import load_sharded_checkpoint
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from distill_nlp.modeling import is_peft_model
from distill_nlp.objective import DistillationObjective

OBJECTIVE_WEIGHTS_NAME = "objective.safetensors"


def save_student(student: nn.Module, state_dict: dict[str, torch.Tensor], folder: str) -> None:
    """Writes a Transformers model as its own checkpoint, a PEFT model as its adapter, any other as one weights file."""
    os.makedirs(folder, exist_ok=True)
    if isinstance(student, PreTrainedModel) or is_peft_model(student):
        student.save_pretrained(folder, state_dict=state_dict)
    else:
        _save(state_dict, os.path.join(folder, SAFE_WEIGHTS_NAME))


def holds_weights(folder: Path) -> bool:
    """Whether there is a file of weights with something in it."""
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            if len(tensors.keys()):
                return True
    return False


def save_objective(state_dict: dict[str, torch.Tensor], folder: str) -> None:
    """Writes projections and balance beside the student, where there are any."""
    if state_dict:
        _save(state_dict, os.path.join(folder, OBJECTIVE_WEIGHTS_NAME))


def _save(state_dict: dict[str, torch.Tensor], path: str) -> None:
    tensors = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in state_dict.items()}
    save_file(tensors, path, metadata={"format": "pt"})


def load_weights(student: nn.Module, objective: DistillationObjective, folder: str) -> None:
    """The one loader, strict: the Trainer's own ignores keys that match nothing, and all would, unprefixed.

    Raises:
        ValueError: weights are missing in the folder, or belong to another student or other losses.
    """
    objective_weights = os.path.join(folder, OBJECTIVE_WEIGHTS_NAME)
    try:
        load_student(student, folder)
        if os.path.isfile(objective_weights):
            objective.load_state_dict(load_file(objective_weights), strict=True)
        elif objective.state_dict():
            raise ValueError(f"no {OBJECTIVE_WEIGHTS_NAME} there; it was saved by `save_model`, not by training")
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"cannot load the checkpoint {folder}: {error}") from error


def load_student(student: Any, folder: str) -> None:
    """Reads what `save_student` wrote, strictly.

    Raises:
        RuntimeError, ValueError: there are no weights, or those of another model.
    """
    weights = os.path.join(folder, SAFE_WEIGHTS_NAME)
    if is_peft_model(student):
        _load_adapter(student, os.path.join(folder, ADAPTER_SAFE_WEIGHTS_NAME))
    elif os.path.isfile(weights) and not isinstance(student, PreTrainedModel):
        # All names are there, also where one tensor has several.
        student.load_state_dict(load_file(weights), strict=True)
    elif os.path.isfile(weights):
        try:
            load_model(student, weights, strict=True)
        except RuntimeError:
            if not _load_renamed(student, folder):
                raise
    elif os.path.isfile(os.path.join(folder, SAFE_WEIGHTS_INDEX_NAME)):
        load_sharded_checkpoint(student, folder, strict=True)
    else:
        raise ValueError(f"no {SAFE_WEIGHTS_NAME} there")


def _load_renamed(student: PreTrainedModel, folder: str) -> bool:
    """Loads by Transformers' own loader; whether all of the weights fitted.

    Where Transformers has renamed a model's parameters, it saves them under their older names, which it alone knows.
    """
    loaded, info = type(student).from_pretrained(
        folder, dtype=student.dtype, output_loading_info=True, ignore_mismatched_sizes=True
    )
    if any(info.values()):
        return False
    student.load_state_dict(loaded.state_dict(), strict=True)
    return True


def _load_adapter(student: Any, path: str) -> None:
    """PEFT's own loading ignores what is missing: the base model's weights always are."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    if not os.path.isfile(path):
        raise ValueError(f"no {ADAPTER_SAFE_WEIGHTS_NAME} there")
    saved = load_file(path)
    expected = get_peft_model_state_dict(student).keys()
    if saved.keys() != expected:
        other = sorted(saved.keys() ^ expected)
        raise ValueError(f"the adapter has other weights than the student's: {', '.join(other[:3])}")
    set_peft_model_state_dict(student, saved)
