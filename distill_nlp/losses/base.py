"""The base of every loss, and the reductions that they share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from distill_nlp.layer_mapping import LayerPairs, format_pairs
from distill_nlp.outputs import Features

ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]

SINGLE_LABEL: ProblemType = "single_label_classification"
MULTI_LABEL: ProblemType = "multi_label_classification"
TASKS: tuple[ProblemType, ...] = (SINGLE_LABEL, MULTI_LABEL, "regression")

IGNORE_INDEX = -100
"""A label that says "this row has none": it counts in no loss that needs labels."""


@dataclass(frozen=True)
class ModelShape:
    """What a loss must know of a model to size its own parameters.

    Args:
        num_layers: number of transformer blocks, or of stages where it is built of those; None where the model has no
            such thing.
        hidden_size: width of its hidden states, or None.
        num_attention_heads: or None.
        attention_width: of the queries, all heads together, or None.
        stage_widths: widths of the states after each stage, where these differ; else None.
        num_labels: number of logits.
        problem_type: as in Transformers' configs.
    """

    num_labels: int
    problem_type: ProblemType = "single_label_classification"
    num_layers: int | None = None
    hidden_size: int | None = None
    num_attention_heads: int | None = None
    attention_width: int | None = None
    stage_widths: tuple[int, ...] | None = None

    def width(self, layer: int) -> int | None:
        """Of the states of a layer, 0 being the embeddings' output; None where the config does not say."""
        if self.stage_widths is not None:
            return self.stage_widths[layer - 1] if layer else None
        return self.hidden_size

    @classmethod
    def from_config(cls, config: Any) -> ModelShape:
        """Reads a Transformers config, whatever the names of its model family (through its `attribute_map`)."""
        problem_type = getattr(config, "problem_type", None)
        if problem_type is None:
            problem_type = "regression" if config.num_labels == 1 else "single_label_classification"
        depth, widths = depth_of(config), getattr(config, "hidden_sizes", None)
        of_stages = getattr(config, "hidden_size", None) is None and widths is not None and len(widths) == depth
        return cls(
            num_labels=config.num_labels,
            problem_type=problem_type,
            num_layers=depth,
            hidden_size=getattr(config, "hidden_size", None),
            num_attention_heads=getattr(config, "num_attention_heads", None),
            attention_width=_attention_width(config),
            stage_widths=tuple(widths) if of_stages else None,
        )


def _attention_width(config: Any) -> int | None:
    heads, size = getattr(config, "num_attention_heads", None), getattr(config, "head_dim", None)
    if heads is not None and size is not None:
        return heads * size
    # MobileBERT attends in its bottleneck.
    bottleneck = getattr(config, "use_bottleneck", False)
    return getattr(config, "true_hidden_size" if bottleneck else "hidden_size", None)


def depth_of(config: Any) -> int | None:
    """The layers that a model of this config counts: its blocks, or the stages whose `depths` it lists; or None."""
    depth = getattr(config, "num_hidden_layers", None)
    stages = getattr(config, "depths", None)
    return len(stages) if depth is None and stages is not None else depth


class DistillationLoss(nn.Module):
    """One term of the objective.

    A subclass implements `forward`, and `bind` when it has to know the two models. It sees tensors only.

    Attributes:
        unit: what its mean is taken over, so that parts of a batch can be weighted to give the mean of the whole:
            "rows" (every example) or "labeled_rows" (examples whose label is not -100).
        needs_teacher: False for a loss of the student and the labels alone.
        tasks: the kinds of task that it is defined for; `bind` refuses others.
        hidden_state_pairs: (student layer, teacher layer) whose hidden states it reads; set by `bind`.
        pooling: "first" or "mean" where it reads no more of hidden states than `pooled` gives: then the teacher may
            have read other tokens, or be cached. None: it compares token by token.
        attention_pairs: likewise for queries, keys and values.
        compares_rows: whether it relates the rows of a forward pass to each other, so that a step cut into other
            forward passes has another loss.
    """

    unit: Literal["rows", "labeled_rows"] = "rows"
    needs_teacher: bool = True
    tasks: tuple[ProblemType, ...] = TASKS
    pooling: str | None = None
    compares_rows: bool = False

    def __init__(self) -> None:
        super().__init__()
        self.hidden_state_pairs: LayerPairs = []
        self.attention_pairs: LayerPairs = []

    def bind(self, student: ModelShape, teacher: ModelShape | None) -> None:
        """Sizes parameters and resolves layers for these two models. Called once, by the trainer.

        A subclass that has its own calls this one first.

        Raises:
            ValueError: the loss is not defined for these models or this kind of task.
        """
        if student.problem_type not in self.tasks:
            raise ValueError(
                f"{type(self).__name__} is not defined for {student.problem_type}, only for {', '.join(self.tasks)}"
            )

    def set_progress(self, progress: float) -> None:
        """Tells settings that follow a schedule how far training is, from 0 to 1. Called before each step."""

    def forward(
        self,
        student: Features,
        teacher: Features | None,
        labels: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Gives the mean over the batch's rows (or labeled rows) as a scalar of at least float32.

        Args:
            student: the student's features, with gradient.
            teacher: the teacher's, without; None where no loss needs it.
            labels: `(B,)` integers, or `(B, C)` / `(B,)` floats for multi-label and regression.
            attention_mask: `(B, S)`, 1 for real tokens; None when there is no padding.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement forward")

    def describe(self) -> str:
        """Its own settings in a few characters, for the formula that is logged, e.g. `T=2`."""
        pairs = self.hidden_state_pairs or self.attention_pairs
        return format_pairs(pairs)

    def _needs_layers(self, student: ModelShape, teacher: ModelShape | None) -> tuple[int, int]:
        """Depths of both models, or an error that says which of them has no layers."""
        for name, shape in (("student", student), ("teacher", teacher)):
            if shape is None or shape.num_layers is None:
                raise ValueError(
                    f"{type(self).__name__} reads layers, but the {name}'s config has no num_hidden_layers; "
                    "use losses of the logits for this pair"
                )
        return student.num_layers, teacher.num_layers  # type: ignore[union-attr, return-value]


def check_positive(name: str, value: float) -> float:
    """Returns `value`, or raises a ValueError unless it is a finite number above zero."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ValueError(f"{name} must be > 0, got {value!r}")
    return value


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    """Returns `value`, or raises a ValueError unless it is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    return value


def upcast(tensor: torch.Tensor) -> torch.Tensor:
    """At least float32: a bfloat16 softmax or square has 3 significant digits. float64 stays."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def check_same_tokens(loss: DistillationLoss, student: torch.Size, teacher: torch.Size, dim: int) -> None:
    """Raises a ValueError where the two models did not see the same rows and tokens (`dim` is that of the tokens)."""
    if (student[0], student[dim]) != (teacher[0], teacher[dim]):
        raise ValueError(
            f"{type(loss).__name__} compares token by token, but the student saw {student[0]} x {student[dim]} tokens "
            f"and the teacher {teacher[0]} x {teacher[dim]}; use losses of the logits across tokenizers"
        )


def mean_over_tokens(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Mean over the real tokens of each row: (B, S) -> (B,).

    Taken row by row, so that a long text weighs no more than a short one and the mean over a batch does not
    depend on how it is cut into micro-batches.
    """
    if mask is None:
        return values.mean(dim=1)
    mask = mask.to(values.dtype)
    return (values * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def first_token(states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The state of each row's first real token, also where the padding is on the left: (B, S, H) -> (B, H)."""
    if mask is None:
        return states[:, 0]
    return states[torch.arange(len(states), device=states.device), mask.long().argmax(dim=1)]


def mean_token(states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The mean state of each row's real tokens, in at least float32: (B, S, H) -> (B, H)."""
    return mean_over_tokens(upcast(states), None if mask is None else mask[..., None])


POOLINGS = {"first": first_token, "mean": mean_token}
"""What stands for a text: the state of its first real token, or the mean over its real tokens."""


def pooled(
    loss: DistillationLoss, student: Features, teacher: Features, pair: tuple[int, int], mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """One vector per row, of a pair of layers: `(B, H_student)`, and detached `(B, H_teacher)`, at least float32.

    Raises:
        ValueError: the two models answered different rows, or saw different tokens where the teacher's are not pooled
            and there is a mask.
    """
    pool = POOLINGS[loss.pooling]
    x = upcast(pool(student.hidden_states[pair[0]], mask))
    target = teacher.pooled.get((pair[1], loss.pooling))
    if target is None:
        states = teacher.hidden_states[pair[1]]
        if mask is not None:
            # One mask for both. Without padding, each may have positions of its own.
            check_same_tokens(loss, student.hidden_states[pair[0]].shape, states.shape, dim=1)
        target = pool(states, mask)
    if len(x) != len(target):
        raise ValueError(f"the student answered {len(x)} rows, the teacher {len(target)}")
    return x, upcast(target.detach())


def kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """`KL(p ‖ q) = Σ p (log p - log q)` over the last dimension: (..., K) -> (...)."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)
