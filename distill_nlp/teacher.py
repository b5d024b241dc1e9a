"""The teacher: frozen, in eval at every call, its labels in the student's order; or a stand-in for cached logits."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from distill_nlp.capture import enable_attention_capture, forward_with_features
from distill_nlp.modeling import accepted_arguments, bare_model
from distill_nlp.objective import DistillationObjective
from distill_nlp.outputs import Features

TEACHER_LOGITS = "teacher_logits"
"""The column of cached logits, in the teacher's own order of labels."""


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
        self.accepted = accepted_arguments(model)
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
        own = (k for k in inputs if k not in ("labels", TEACHER_LOGITS))
        inputs = {k: inputs[k] for k in own if self.accepted is None or k in self.accepted}
        with torch.no_grad():
            features = forward_with_features(self.model, inputs, self._hidden_state_layers, self._attention_layers)
            if self._label_order is not None:
                features.logits = features.logits[:, self._label_order]
        return features

    def prepare(self, device: torch.device, data: Any) -> None:
        """Goes to the device of the batches."""
        self.model.to(device)


class CachedTeacher:
    """Stands in for a teacher whose logits lie in the data: `cache_teacher_logits` puts them there.

    Args:
        config: of the teacher that gave the logits.

    Example:
        >>> train = cache_teacher_logits(teacher, train, tokenizer, "teacher_cache")
        >>> trainer = DistillationTrainer(
        ...     model=student, teacher=CachedTeacher(teacher.config), losses={"kl": KLDivergenceLoss()},
        ...     args=args, train_dataset=train, processing_class=tokenizer,
        ... )
    """

    accepted = frozenset({TEACHER_LOGITS})

    def __init__(self, config: Any) -> None:
        self.config = config
        self._label_order: list[int] | None = None

    def parameters(self) -> Iterator[nn.Parameter]:
        """None: there is no model."""
        return iter(())

    def bind(self, student_config: Any, objective: DistillationObjective) -> CachedTeacher:
        """One that answers for this student.

        Raises:
            ValueError: a loss reads layers of the teacher, or the two do not have the same labels.
        """
        if reading := reads_layers(objective):
            raise ValueError(
                f"losses {', '.join(reading)} read the teacher's layers, and only its logits are cached; pass the "
                "teacher itself"
            )
        bound = CachedTeacher(self.config)
        bound._label_order = None if student_config is None else label_order(self.config, student_config)
        return bound

    def prepare(self, device: torch.device, data: Any) -> None:
        """Looks whether the data hold the logits.

        Raises:
            ValueError: they have named columns, and not this one.
        """
        names = getattr(data, "column_names", None)
        if names is not None and TEACHER_LOGITS not in names:
            raise ValueError(
                f"a CachedTeacher needs the column {TEACHER_LOGITS} in train_dataset, which `cache_teacher_logits` "
                f"adds; there is: {', '.join(names)}"
            )

    def __call__(self, inputs: dict[str, Any]) -> Features:
        """The logits that came with the batch.

        Raises:
            ValueError: there are none, or not as many as the teacher has labels.
        """
        if TEACHER_LOGITS not in inputs:
            raise ValueError(f"the batch has no {TEACHER_LOGITS}; does the data collator drop them?")
        logits = inputs[TEACHER_LOGITS]
        if logits.dim() != 2 or logits.shape[1] != self.config.num_labels:
            raise ValueError(
                f"{TEACHER_LOGITS} must be of shape (rows, {self.config.num_labels}), got {tuple(logits.shape)}; were "
                "they cached from another teacher?"
            )
        return Features(logits if self._label_order is None else logits[:, self._label_order])


def bind_teacher(
    teacher: nn.Module | CachedTeacher, student_config: Any, objective: DistillationObjective
) -> Teacher | CachedTeacher:
    """The teacher as training asks it; see the two classes."""
    if isinstance(teacher, CachedTeacher):
        return teacher.bind(student_config, objective)
    return Teacher(teacher, student_config, objective)


def reads_layers(objective: DistillationObjective) -> list[str]:
    """Names of the losses of a bound objective that read layers of the teacher."""
    return [name for name, loss in objective.losses.items() if loss.hidden_state_pairs or loss.attention_pairs]


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
