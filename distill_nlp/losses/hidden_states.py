"""Losses of hidden states, with the learned projections that bring the student to the teacher's width."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from distill_nlp.layer_mapping import check_layers, format_pairs, map_layers
from distill_nlp.losses.base import (
    DistillationLoss,
    ModelShape,
    check_choice,
    check_same_tokens,
    mean_over_tokens,
    pooled,
    upcast,
)
from distill_nlp.losses.projections import PROJECTIONS, LeastSquares, Projections
from distill_nlp.outputs import Features

KINDS = ("mse", "cosine", "normalized")
INITS = ("random", "least_squares")


class ProjectedLoss(DistillationLoss):
    """Base of the losses that compare hidden states through learned projections.

    Args:
        layers: "uniform", "last", "first", "every_2" or `[[student, teacher], ...]`; 0 is the embeddings' output, 1
            the first block.
        projection: "auto" (learned where the widths differ), "none", "linear", "shared", "low_rank" or "orthogonal";
            see `Projections`.
        rank: of "low_rank".
        projection_init: "random", or "least_squares": the trainer fits them to a few batches before the first step.
    """

    def __init__(
        self,
        layers: str | Sequence[Sequence[int]] = "uniform",
        projection: str = "auto",
        rank: int = 64,
        projection_init: str = "random",
    ) -> None:
        super().__init__()
        check_layers(layers)
        self.layers = layers
        self.projection = check_choice("projection", projection, PROJECTIONS)
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"rank must be a whole number > 0, got {rank!r}")
        self.rank = rank
        self.projection_init = check_choice("projection_init", projection_init, INITS)

    def bind(self, student: ModelShape, teacher: ModelShape | None) -> None:
        super().bind(student, teacher)
        depths = self._needs_layers(student, teacher)
        for name, shape in (("student", student), ("teacher", teacher)):
            if shape.hidden_size is None and shape.stage_widths is None:
                raise ValueError(
                    f"{type(self).__name__} projects hidden states, but the {name}'s config has no hidden_size; "
                    "use losses of the logits for this pair"
                )
        self.hidden_state_pairs = pairs = map_layers(self.layers, *depths, first_layer=0)
        widths = list(dict.fromkeys((student.width(s), teacher.width(t)) for s, t in pairs))
        if len(widths) > 1 or None in widths[0]:
            raise ValueError(
                f"{type(self).__name__} projects between two widths, and the stages of these models have several: "
                'map one pair of them, e.g. layers "last"'
            )
        self.projections = Projections(self.projection, len(pairs), *widths[0], self.rank)

    def least_squares(self) -> LeastSquares | None:
        """The fit that its projections start with; None where they start at random, or where there are none."""
        wanted = self.projection_init == "least_squares" and len(self.projections) > 0
        return LeastSquares(self.projections) if wanted else None

    def fit(self, fit: LeastSquares, student: Features, teacher: Features, attention_mask: torch.Tensor | None) -> None:
        """Takes the real tokens of one batch into the fit."""
        for i, (x, target) in enumerate(self._states(student, teacher)):
            real = slice(None) if attention_mask is None else attention_mask.bool()
            fit.add(i, x[real].reshape(-1, x.shape[-1]), target[real].reshape(-1, target.shape[-1]))

    def _states(self, student: Features, teacher: Features) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Per pair of layers `(B, S, H_student)` and `(B, S, H_teacher)`, unprojected, the teacher's detached."""
        for student_layer, teacher_layer in self.hidden_state_pairs:
            x = upcast(student.hidden_states[student_layer])
            target = upcast(teacher.hidden_states[teacher_layer].detach())
            check_same_tokens(self, x.shape, target.shape, dim=1)
            yield x, target

    def _projected(self, student: Features, teacher: Features) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The same with the student's brought to the teacher's width."""
        for i, (x, target) in enumerate(self._states(student, teacher)):
            yield self.projections.project(i, x), target

    def describe(self) -> str:
        kind = f"{self.projections.kind} projection, " if self.projections.kind not in ("none", "linear") else ""
        return f"{kind}{format_pairs(self.hidden_state_pairs)}"


class HiddenStateLoss(ProjectedLoss):
    """Brings hidden states of mapped layers together, token by token.

    mse: `mean_h (W x_s - x_t)²`; cosine: `1 - cos(W x_s, x_t)`; normalized: `mean_h (n(W x_s) - n(x_t))²` with `n`
    bringing each state to mean 0 and variance 1 over its width, so that neither scale nor offset counts. Each is a mean
    over the real tokens of a row, over rows and over layer pairs. W is the learned projection from the student's width
    to the teacher's.
    Sources: FitNets (arXiv:1412.6550) and TinyBERT (arXiv:1909.10351) for mse with W; DistilBERT (arXiv:1910.01108)
    for cosine; targets normalized as in data2vec (arXiv:2202.03555).

    Args:
        layers: "uniform", "last", "first", "every_2" or `[[student, teacher], ...]`; 0 is the embeddings' output, 1
            the first block.
        kind: "mse", "cosine" or "normalized".
        projection, rank, projection_init: see `ProjectedLoss`.

    Shapes:
        hidden states `(B, S, H_student)` and `(B, S, H_teacher)`; padding (attention_mask 0) counts nowhere.

    Raises:
        ValueError: unknown setting; layers out of range; models without layers or width, or stages of several widths;
            "none" with different widths; sequences of different lengths (the two models must see the same tokens).

    Example:
        >>> loss = HiddenStateLoss(layers=[[1, 2], [3, 6]], kind="cosine")
    """

    def __init__(
        self,
        layers: str | Sequence[Sequence[int]] = "uniform",
        kind: str = "mse",
        projection: str = "auto",
        rank: int = 64,
        projection_init: str = "random",
    ) -> None:
        super().__init__(layers, projection, rank, projection_init)
        self.kind = check_choice("kind", kind, KINDS)

    def forward(self, student: Features, teacher: Features, labels, attention_mask):
        total = 0.0
        for x, target in self._projected(student, teacher):
            if self.kind == "cosine":
                distance = 1 - F.cosine_similarity(x, target, dim=-1)  # (B, S)
            else:
                if self.kind == "normalized":
                    # PyTorch's own eps, 1e-5, is the size of the variance of narrowly initialized states.
                    x, target = (F.layer_norm(states, states.shape[-1:], eps=1e-12) for states in (x, target))
                distance = (x - target).square().mean(dim=-1)  # (B, S)
            total = total + mean_over_tokens(distance, attention_mask).mean()
        return total / len(self.hidden_state_pairs)

    def describe(self) -> str:
        return f"{self.kind}, {super().describe()}"


class PKDLoss(ProjectedLoss):
    """Patient knowledge distillation: the first token's states of several layers, by direction.

    `Σ_h (x_s / ‖x_s‖ - x_t / ‖x_t‖)²` for the first real token of each row, a mean over rows and layer pairs; x_s is
    the projected state where the widths differ.
    Source: Sun et al. 2019, "Patient Knowledge Distillation for BERT Model Compression" (arXiv:1908.09355). Its
    PKD-skip, for 6 layers from 12, is `layers="every_2"` without the last pair; its PKD-last is the explicit pairs
    1→7 ... 5→11.

    Args:
        layers: "uniform", "last", "first", "every_2" or `[[student, teacher], ...]`; 1 is the first block.
        projection, rank, projection_init: see `ProjectedLoss`.

    Shapes:
        hidden states `(B, S, H_student)` and `(B, S, H_teacher)`, of which the first real token of each row is read;
        the first of all in a row of padding only.

    Raises:
        ValueError: as `HiddenStateLoss`.

    Example:
        >>> loss = PKDLoss(layers="every_2")
    """

    pooling = "first"

    def fit(self, fit: LeastSquares, student: Features, teacher: Features, attention_mask: torch.Tensor | None) -> None:
        """Takes one batch into the fit: all its real tokens, as they lie alike; the first of each row without them."""
        if not teacher.pooled:
            return super().fit(fit, student, teacher, attention_mask)
        for i, pair in enumerate(self.hidden_state_pairs):
            fit.add(i, *pooled(self, student, teacher, pair, attention_mask))
        return None

    def forward(self, student: Features, teacher: Features, labels, attention_mask):
        total = 0.0
        for i, pair in enumerate(self.hidden_state_pairs):
            x, target = pooled(self, student, teacher, pair, attention_mask)
            x = self.projections.project(i, x)
            total = total + (F.normalize(x, dim=-1) - F.normalize(target, dim=-1)).square().sum(dim=-1).mean()
        return total / len(self.hidden_state_pairs)
