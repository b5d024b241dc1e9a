"""The student and its objective as one module, so that the loss is computed inside one forward call.

DDP, FSDP and DeepSpeed hook that call: only parameters used inside it are synchronised. The projections, being inside,
are synced, clipped, scheduled, zeroed and checkpointed with the rest.
"""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import DistributedType
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import is_peft_available

from distill_nlp.capture import enable_attention_capture, forward_with_features, logits_of
from distill_nlp.losses.base import ModelShape
from distill_nlp.losses.cross_entropy import CrossEntropyLoss
from distill_nlp.objective import DistillationObjective, Shares
from distill_nlp.outputs import DistillationOutput, Features


def is_peft_model(model: nn.Module) -> bool:
    """Whether PEFT wraps this model, e.g. with LoRA."""
    if not is_peft_available():
        return False
    from peft import PeftModel

    return isinstance(model, PeftModel)


def bare_model(model: nn.Module) -> nn.Module:
    """The model inside what PEFT or torch.compile have put around it."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if is_peft_model(model) else model


def autocast_of(accelerator: Any) -> AbstractContextManager[Any]:
    """The mixed precision that a training runs in, for a model beside the trained one.

    DeepSpeed casts what it trains by itself, and leaves accelerate's own autocast out.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    if accelerator.distributed_type == DistributedType.DEEPSPEED and dtype is not None:
        return torch.autocast(accelerator.device.type, dtype)
    return accelerator.autocast()


def shape_of(model: nn.Module, like: ModelShape | None) -> ModelShape:
    """Reads a model's config; a plain module without one is taken to answer as `like` does, and to have no layers.

    Raises:
        ValueError: there is neither.
    """
    config = getattr(model, "config", None)
    if config is not None:
        return ModelShape.from_config(config)
    if like is None:
        raise ValueError(
            f"{type(model).__name__} has no config with num_labels, and there is no teacher to take it from"
        )
    return ModelShape(num_labels=like.num_labels, problem_type=like.problem_type)


def accepted_arguments(model: Any, config: Any = None) -> set[str] | None:
    """Names that the model's forward declares, or None if it takes any (only `**kwargs`).

    Transformers models also swallow unknown names silently: a DistilBERT given `token_type_ids` ignores them. So each
    model gets what it declares. A RoBERTa declares them and knows segment 0 alone: there they say nothing, and those of
    a tokenizer that numbers the second text 1 are refused by its embedding.

    Args:
        model: or its class.
        config: of a class; a model has its own.
    """
    parameters = inspect.signature(bare_model(model).forward).parameters.values()
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    config = getattr(bare_model(model), "config", None) if config is None else config
    if getattr(config, "type_vocab_size", None) == 1:
        named.discard("token_type_ids")
    takes_any = any(p.kind == p.VAR_KEYWORD for p in parameters)
    return None if takes_any and not named else named


class DistillationModel(nn.Module):
    """A student with the objective it is trained on.

    In training, `forward` gives the objective; in evaluation, the plain task loss and the logits of the student.

    Args:
        student: gives logits; a `PreTrainedModel` (or PEFT around one) for anything but losses of the logits.
        objective: bound here to the two models.
        teacher_config: the teacher's config, None where no loss needs a teacher.

    Raises:
        ValueError: a loss is not defined for this pair of models, or the student is compiled already.
    """

    # The Trainer must not hand `num_items_in_batch` to forward.
    accepts_loss_kwargs = False

    def __init__(self, student: nn.Module, objective: DistillationObjective, teacher_config: Any | None = None) -> None:
        super().__init__()
        if is_peft_model(student) and list(student.peft_config) != ["default"]:
            raise ValueError(
                f'a PEFT student must have one adapter named "default", got {", ".join(student.peft_config)}: '
                "checkpoints hold no other"
            )
        if hasattr(student, "_orig_mod"):
            raise ValueError(
                "the student is compiled already; pass it as it was, and torch_compile=True in the arguments"
            )
        teacher_shape = None if teacher_config is None else ModelShape.from_config(teacher_config)
        student_shape = shape_of(student, teacher_shape)
        objective.bind(student_shape, teacher_shape)
        self._task_loss = CrossEntropyLoss()
        self._task_loss.bind(student_shape, None)
        # The objective draws its projections from the global generator after the student is built, on the CPU.
        self.student = student
        self.objective = objective.to(device=next(student.parameters()).device)
        self._accepted = accepted_arguments(student)
        self._hidden_state_layers = objective.layers(0, "hidden_state")
        self._attention_layers = objective.layers(0, "attention")
        if self._attention_layers:
            enable_attention_capture(bare_model(student))

    def forward(
        self,
        labels: torch.Tensor | None = None,
        teacher: Features | None = None,
        shares: Shares | None = None,
        keep_graph: bool = False,
        **inputs: Any,
    ) -> DistillationOutput:
        """Runs the student, and in training the objective.

        Args:
            labels: declared by name, which is how the Trainer finds out that this model takes them.
            teacher: the teacher's features for this batch (training).
            shares, keep_graph: see `DistillationObjective.forward`.
            **inputs: the rest of the batch; the student gets what its own forward declares.

        Raises:
            ValueError: in training, the objective needs a teacher and got none.
        """
        if not self.training:
            logits = logits_of(self.student(**self._student_inputs(inputs)))
            # The same for every student, also for one that computes no loss, or none of a batch without labels.
            loss = None if labels is None else self._task_loss(Features(logits), None, labels, None)
            return DistillationOutput(loss=loss, logits=logits)

        if teacher is None and self.objective.needs_teacher_now:
            raise ValueError("in training the objective needs teacher=Features(...); call .eval() to predict")
        # Without labels the student does not compute a loss of its own, which nobody would read.
        features = self.features(inputs)
        loss, terms = self.objective(features, teacher, labels, inputs.get("attention_mask"), shares, keep_graph)
        return DistillationOutput(loss=loss, logits=features.logits.detach(), terms=terms)

    def features(self, inputs: dict[str, Any]) -> Features:
        """The student's logits for a batch, and the layers that the losses read."""
        return forward_with_features(
            self.student, self._student_inputs(inputs), self._hidden_state_layers, self._attention_layers
        )

    def _student_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in inputs.items() if k != "labels" and (self._accepted is None or k in self._accepted)}

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

    def get_input_embeddings(self) -> nn.Module:
        """Of the student, for noise in them (`neftune_noise_alpha`)."""
        return self.student.get_input_embeddings()

    def num_parameters(self, **kwargs: Any) -> int:
        if isinstance(self.student, PreTrainedModel):
            return self.student.num_parameters(**kwargs)
        return sum(parameter.numel() for parameter in self.student.parameters())

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        self._refuse_reentrant(*args, *kwargs.values())
        # Transformers before the renaming have the old name only.
        name = "activation_checkpointing_enable"
        enable = getattr(self.student, name, None) or self.student.gradient_checkpointing_enable
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
