"""The teacher: frozen, in eval at every call, its labels in the student's order."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from distill_nlp.capture import enable_attention_capture, forward_with_features
from distill_nlp.modeling import accepted_arguments, bare_model
from distill_nlp.objective import DistillationObjective
from distill_nlp.outputs import Features


class Teacher:
    """A frozen model that answers for the student's batches.

    It is no `nn.Module` on purpose: an attribute that is one would be registered, and find its way into the optimizer
    and into checkpoints.

    Args:
        model: gives logits; its parameters are frozen here.
        student_config: where both configs name their labels, the teacher's logits are brought into the student's order;
            None for a student without config, which takes the teacher's.
        objective: a bound one; says which layers to keep.

    Raises:
        ValueError: the two models do not have the same labels.
    """

    def __init__(self, model: nn.Module, student_config: Any, objective: DistillationObjective) -> None:
        self.model = model.requires_grad_(False).eval()
        self._accepted = accepted_arguments(model)
        self._hidden_state_layers = objective.layers(1, "hidden_state")
        self._attention_layers = objective.layers(1, "attention")
        if self._attention_layers:
            enable_attention_capture(bare_model(model))
        self._label_order = None if student_config is None else label_order(model.config, student_config)

    def __call__(self, inputs: dict[str, Any]) -> Features:
        """Gives the teacher's features for a batch, without gradient.

        `no_grad` and not `inference_mode`, whose tensors autograd refuses to save for the student's backward.
        """
        self.model.eval()
        inputs = {k: v for k, v in inputs.items() if k != "labels" and (self._accepted is None or k in self._accepted)}
        with torch.no_grad():
            features = forward_with_features(self.model, inputs, self._hidden_state_layers, self._attention_layers)
            if self._label_order is not None:
                features.logits = features.logits[:, self._label_order]
        return features


def label_names(config: Any) -> list[str]:
    """The class names of a config, by index."""
    return [str(config.id2label[i]) for i in range(config.num_labels)]


def anonymous(names: list[str]) -> bool:
    """Whether the names say nothing: `LABEL_0` and the like."""
    return all(re.fullmatch(r"LABEL_\d+|\d+", name) for name in names)


def folded(name: str) -> str:
    """A label name without case and separators: `Very-Good` and `very_good` are one."""
    return re.sub(r"[\s_\-]+", "", name).casefold()


def label_order(teacher_config: Any, student_config: Any) -> list[int] | None:
    """For each student label the index of the teacher's logit of that name; None when the order is the same.

    Raises:
        ValueError: another number of labels, or other names, with both lists.
    """
    if teacher_config.num_labels != student_config.num_labels:
        raise ValueError(
            f"the teacher has {teacher_config.num_labels} labels {list(teacher_config.id2label.values())}, the student "
            f"{student_config.num_labels} {list(student_config.id2label.values())}; they must be the same"
        )
    teacher, student = label_names(teacher_config), label_names(student_config)
    if teacher == student:
        return None
    # The names as they are before folded ones, which are one for `-1` and `1`.
    for key in (str, folded):
        position = {key(name): i for i, name in enumerate(teacher)}
        if len(position) == len(teacher) and position.keys() == {key(name) for name in student}:
            order = [position[key(name)] for name in student]
            return None if order == list(range(len(order))) else order
    if anonymous(teacher) or anonymous(student):
        return None
    raise ValueError(
        f"the teacher's labels {teacher} and the student's {student} do not match by name; "
        "rename id2label in the config of one of them"
    )
