"""The student and its objective as one module, so that the loss is computed inside one forward call.

DDP, FSDP and DeepSpeed hook that call: only parameters used inside it are synchronised. The projections, being inside,
are synced, clipped, scheduled, zeroed and checkpointed with the rest.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from distill_nlp.capture import enable_attention_capture, forward_with_features, logits_of
from distill_nlp.losses.base import ModelShape
from distill_nlp.objective import DistillationObjective, Shares
from distill_nlp.outputs import DistillationOutput, Features


def accepted_arguments(model: nn.Module) -> set[str] | None:
    """Names that the model's forward declares, or None if it takes any (only `**kwargs`).

    Transformers models also swallow unknown names silently: a DistilBERT given `token_type_ids` ignores them. So each
    model gets what it declares.
    """
    parameters = inspect.signature(model.forward).parameters.values()
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_any = any(p.kind == p.VAR_KEYWORD for p in parameters)
    return None if takes_any and not named else named


class DistillationModel(nn.Module):
    """A student with the objective it is trained on.

    In training, `forward` gives the objective; in evaluation, the plain task loss and the logits of the student.

    Args:
        student: gives logits; a `PreTrainedModel` for anything but losses of the logits.
        objective: bound here to the two models.
        teacher_config: the teacher's config, None where no loss needs a teacher.

    Raises:
        ValueError: a loss is not defined for this pair of models.
    """

    # The Trainer must not hand `num_items_in_batch` to forward.
    accepts_loss_kwargs = False

    def __init__(self, student: nn.Module, objective: DistillationObjective, teacher_config: Any | None = None) -> None:
        super().__init__()
        teacher_shape = None if teacher_config is None else ModelShape.from_config(teacher_config)
        objective.bind(ModelShape.from_config(student.config), teacher_shape)
        # The objective draws its projections from the global generator after the student is built, on the CPU.
        self.student = student
        self.objective = objective.to(device=next(student.parameters()).device)
        self._accepted = accepted_arguments(student)
        self._hidden_state_layers = objective.layers(0, "hidden_state")
        self._attention_layers = objective.layers(0, "attention")
        if self._attention_layers:
            enable_attention_capture(student)

    def forward(
        self,
        labels: torch.Tensor | None = None,
        teacher: Features | None = None,
        shares: Shares | None = None,
        **inputs: Any,
    ) -> DistillationOutput:
        """Runs the student, and in training the objective.

        Args:
            labels: declared by name, which is how the Trainer finds out that this model takes them.
            teacher: the teacher's features for this batch (training).
            shares: see `DistillationObjective.forward`.
            **inputs: the rest of the batch; the student gets what its own forward declares.

        Raises:
            ValueError: in training, the objective needs a teacher and got none.
        """
        student_inputs = {k: v for k, v in inputs.items() if self._accepted is None or k in self._accepted}
        if not self.training:
            if labels is not None and (self._accepted is None or "labels" in self._accepted):
                student_inputs["labels"] = labels
            outputs = self.student(**student_inputs)
            return DistillationOutput(loss=getattr(outputs, "loss", None), logits=logits_of(outputs))

        if teacher is None and self.objective.needs_teacher:
            raise ValueError("in training the objective needs teacher=Features(...); call .eval() to predict")
        # Without labels the student does not compute a loss of its own, which nobody would read.
        features = forward_with_features(
            self.student, student_inputs, self._hidden_state_layers, self._attention_layers
        )
        loss, terms = self.objective(features, teacher, labels, inputs.get("attention_mask"), shares)
        return DistillationOutput(loss=loss, logits=features.logits.detach(), terms=terms)

    def split_state_dict(
        self, state_dict: dict[str, torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Cuts a state dict of this module into the student's and the objective's, under their own names."""
        parts: tuple[dict[str, torch.Tensor], ...] = ({}, {})
        for key, tensor in state_dict.items():
            for part, prefix in zip(parts, ("student.", "objective."), strict=True):
                if key.startswith(prefix):
                    part[key.removeprefix(prefix)] = tensor
        return parts[0], parts[1]

    # What the Trainer asks of a model and the student knows.

    @property
    def config(self) -> Any:
        return self.student.config

    @property
    def main_input_name(self) -> str:
        return getattr(self.student, "main_input_name", "input_ids")

    @property
    def _no_split_modules(self) -> Any:
        return getattr(self.student, "_no_split_modules", None)

    def num_parameters(self, **kwargs: Any) -> int:
        if isinstance(self.student, PreTrainedModel):
            return self.student.num_parameters(**kwargs)
        return sum(parameter.numel() for parameter in self.student.parameters())

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        self._refuse_reentrant(*args, *kwargs.values())
        # Transformers before the renaming have the old name only.
        enable = getattr(self.student, "activation_checkpointing_enable", self.student.gradient_checkpointing_enable)
        enable(*args, **kwargs)

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        self._refuse_reentrant(*args, *kwargs.values())
        self.student.gradient_checkpointing_enable(*args, **kwargs)

    def _refuse_reentrant(self, *settings: Any) -> None:
        """A reentrant checkpoint runs the blocks without gradient: captured queries and keys would be constants."""
        if self._attention_layers and any(isinstance(s, dict) and s.get("use_reentrant") for s in settings):
            raise ValueError(
                "attention losses need gradient_checkpointing_kwargs={'use_reentrant': False}, got use_reentrant=True"
            )
