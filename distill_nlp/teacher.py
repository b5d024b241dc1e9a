"""The teacher: frozen, in eval at every call, its labels in the student's order; or a stand-in for cached answers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from distill_nlp.capture import enable_attention_capture, forward_with_features
from distill_nlp.labels import label_order
from distill_nlp.losses.base import POOLINGS
from distill_nlp.modeling import accepted_arguments, bare_model
from distill_nlp.objective import DistillationObjective
from distill_nlp.outputs import Features

TEACHER_PREFIX = "teacher_"
"""What the names of all columns begin with that are the teacher's alone."""
TEACHER_LOGITS = "teacher_logits"
"""The column of cached logits, in the teacher's own order of labels."""


def pooled_column(layer: int, pooling: str) -> str:
    """Name of the column that holds the teacher's `pooling` state of a layer: `teacher_first_6`."""
    return f"{TEACHER_PREFIX}{pooling}_{layer}"


class Teacher:
    """A frozen model that answers for the student's batches.

    It is no `nn.Module` on purpose: an attribute that is one would be registered, and find its way into the optimizer
    and into checkpoints.

    Args:
        model: gives logits; its parameters are frozen when a trainer takes it.
        tokenizer: where it is not the student's, or not cut at the same length: the rows then hold the teacher's tokens
            too, in columns of the usual names with `prefix` before them. It pads them.
        prefix: of those columns; "teacher_" with a tokenizer, none without.
        restrict_labels: a teacher with more labels than the student keeps those of the student, by name.

    Raises:
        ValueError: a prefix that does not begin with "teacher_".

    Example:
        >>> rows = tokenize(rows, teacher_tokenizer, 512, prefix="teacher_", keep_texts=True)
        >>> rows = tokenize(rows, tokenizer, 128)
        >>> trainer = DistillationTrainer(
        ...     model=student, teacher=Teacher(model, teacher_tokenizer), losses={"kl": KLDivergenceLoss()},
        ...     args=args, train_dataset=rows, processing_class=tokenizer,
        ... )
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any = None, prefix: str | None = None, restrict_labels: bool = False
    ) -> None:
        if prefix is None:
            prefix = "" if tokenizer is None else TEACHER_PREFIX
        if prefix and not prefix.startswith(TEACHER_PREFIX):
            raise ValueError(f'prefix must begin with "{TEACHER_PREFIX}", got {prefix!r}')
        self.model = model
        self.config = model.config
        self.prefix = prefix
        self.restrict_labels = restrict_labels
        self.tokenizers = {prefix: tokenizer} if tokenizer is not None and prefix else {}
        inputs = accepted_arguments(model)
        if inputs is None and tokenizer is not None:
            # A model that takes anything takes what its tokenizer makes.
            inputs = set(tokenizer.model_input_names)
        self.accepted = None if inputs is None else {prefix + name for name in inputs - {"labels"}}
        self._label_order: torch.Tensor | None = None
        self._hidden_state_layers: set[int] = set()
        self._attention_layers: set[int] = set()
        self._pooled_states: set[tuple[int, str]] = set()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those of the model."""
        return self.model.parameters()

    def bind(self, student_config: Any, objective: DistillationObjective) -> Teacher:
        """One that answers for this student, its model frozen.

        Args:
            student_config: where both configs name their labels, the logits are brought into the student's order; None
                for a student without config, which takes the teacher's.
            objective: a bound one; says which layers to keep.

        Raises:
            ValueError: the two do not have the same labels, or a loss compares tokens and they read different ones.
        """
        if self.prefix and (reading := objective.token_level()):
            raise ValueError(
                f"losses {', '.join(reading)} compare token by token, but the teacher reads tokens of its own; use "
                "losses of the logits, pkd, or relations between examples"
            )
        bound = copy.copy(self)
        bound.model = self.model.requires_grad_(False).eval()
        bound._hidden_state_layers = objective.layers(1, "hidden_state")
        bound._attention_layers = objective.layers(1, "attention")
        bound._pooled_states = objective.pooled_states() if self.prefix else set()
        if bound._attention_layers:
            enable_attention_capture(bare_model(self.model))
        bound._label_order = _as_index(self.config, student_config, self.restrict_labels)
        return bound

    def __call__(self, inputs: dict[str, Any]) -> Features:
        """Gives the teacher's features for a batch, without gradient.

        `no_grad` and not `inference_mode`, whose tensors autograd refuses to save for the student's backward.
        """
        self.model.eval()
        with torch.no_grad():
            features = forward_with_features(
                self.model, self._own(inputs), self._hidden_state_layers, self._attention_layers
            )
            if self._label_order is not None:
                features.logits = features.logits[:, self._label_order]
            if self._pooled_states:
                mask, states = inputs.get(f"{self.prefix}attention_mask"), features.hidden_states
                features.pooled = {(n, how): POOLINGS[how](states[n], mask) for n, how in self._pooled_states}
                features.hidden_states = {}
        return features

    def _own(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Its columns of a batch, under the names that the model knows."""
        if self.accepted is not None:
            return {name.removeprefix(self.prefix): inputs[name] for name in inputs if name in self.accepted}
        if self.prefix:
            return {k.removeprefix(self.prefix): x for k, x in inputs.items() if k.startswith(self.prefix)}
        return {k: x for k, x in inputs.items() if k != "labels" and not k.startswith(TEACHER_PREFIX)}

    def prepare(self, device: torch.device, data: Any) -> None:
        """Goes to the device of the batches, and looks whether the data hold its tokens.

        Raises:
            ValueError: they have named columns, and not these.
        """
        names, own = getattr(data, "column_names", None), f"{self.prefix}input_ids"
        if self.prefix and names is not None and own not in names:
            raise ValueError(
                f"the teacher reads the column {own}, which train_dataset lacks; tokenize its texts for the teacher "
                f'too: tokenize(rows, teacher_tokenizer, max_length, prefix="{self.prefix}", keep_texts=True)'
            )
        self.model.to(device)
        self._label_order = None if self._label_order is None else self._label_order.to(device)


class CachedTeacher:
    """Stands in for a teacher whose answers lie in the data: `cache_teacher_logits` puts them there.

    Args:
        config: of the teacher that gave the logits; of an ensemble, its own.
        restrict_labels: as in `Teacher`.

    Example:
        >>> train = cache_teacher_logits(teacher, train, tokenizer, "teacher_cache")
        >>> trainer = DistillationTrainer(
        ...     model=student, teacher=CachedTeacher(teacher.config), losses={"kl": KLDivergenceLoss()},
        ...     args=args, train_dataset=train, processing_class=tokenizer,
        ... )
    """

    def __init__(self, config: Any, restrict_labels: bool = False) -> None:
        self.config = config
        self.tokenizers: dict[str, Any] = {}
        self.restrict_labels = restrict_labels
        self._label_order: torch.Tensor | None = None
        self._columns: dict[tuple[int, str], str] = {}

    @property
    def accepted(self) -> set[str]:
        """Columns that it reads."""
        return {TEACHER_LOGITS, *self._columns.values()}

    def parameters(self) -> Iterator[nn.Parameter]:
        """None: there is no model."""
        return iter(())

    def bind(self, student_config: Any, objective: DistillationObjective) -> CachedTeacher:
        """One that answers for this student.

        Raises:
            ValueError: a loss reads states of the teacher token by token, or the two do not have the same labels.
        """
        if reading := objective.token_level():
            raise ValueError(
                f"losses {', '.join(reading)} read the teacher's layers token by token, and these are not cached; pass "
                "the teacher itself"
            )
        bound = copy.copy(self)
        bound._columns = {state: pooled_column(*state) for state in sorted(objective.pooled_states())}
        bound._label_order = _as_index(self.config, student_config, self.restrict_labels)
        return bound

    def quick_to_read(self, data: Any) -> Any:
        """The same rows with the teacher's states as NumPy arrays, where they would come as lists.

        As Python's floats, a batch of them would take longer to read than a small student to train on it.
        """
        states = [name for name in self._columns.values() if name in (getattr(data, "column_names", None) or ())]
        if not states or getattr(data, "format", {}).get("type", "given") is not None:
            return data
        return data.with_format("numpy", columns=states, output_all_columns=True)

    def prepare(self, device: torch.device, data: Any) -> None:
        """Looks whether the data hold the answers.

        Raises:
            ValueError: they have named columns, and not these.
        """
        names = getattr(data, "column_names", None)
        missing = [] if names is None else [name for name in sorted(self.accepted) if name not in names]
        if missing:
            states = [state for state, column in self._columns.items() if column in missing]
            how = f" (with states={states})" if states else ""
            raise ValueError(
                f"a CachedTeacher needs the column {', '.join(missing)} in train_dataset, which `cache_teacher_logits`"
                f"{how} adds; there is: {', '.join(names)}"
            )
        self._label_order = None if self._label_order is None else self._label_order.to(device)

    def __call__(self, inputs: dict[str, Any]) -> Features:
        """The answers that came with the batch.

        Raises:
            ValueError: there are none, or not as many as the teacher has labels.
        """
        if missing := self.accepted - inputs.keys():
            raise ValueError(f"the batch has no {', '.join(sorted(missing))}; does the data collator drop them?")
        logits = inputs[TEACHER_LOGITS]
        if logits.dim() != 2 or logits.shape[1] != self.config.num_labels:
            raise ValueError(
                f"{TEACHER_LOGITS} must be of shape (rows, {self.config.num_labels}), got {tuple(logits.shape)}; were "
                "they cached from another teacher?"
            )
        return Features(
            logits if self._label_order is None else logits[:, self._label_order],
            pooled={state: inputs[column] for state, column in self._columns.items()},
        )


def bind_teacher(teacher: Any, student_config: Any, objective: DistillationObjective) -> Any:
    """The teacher as training asks it: a model, or one of the classes that have `bind`."""
    return (Teacher(teacher) if isinstance(teacher, nn.Module) else teacher).bind(student_config, objective)


def _as_index(teacher_config: Any, student_config: Any, restrict: bool) -> torch.Tensor | None:
    order = None if student_config is None else label_order(teacher_config, student_config, restrict)
    return None if order is None else torch.tensor(order)
