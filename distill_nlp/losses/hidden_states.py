"""Losses of hidden states, with the learned projections that bring the student to the teacher's width."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import nn

from distill_nlp.layer_mapping import check_layers, format_pairs, map_layers
from distill_nlp.losses.base import DistillationLoss, ModelShape, check_choice, mean_over_tokens
from distill_nlp.outputs import Features

KINDS = ("mse", "cosine")
PROJECTIONS = ("auto", "linear", "none")


class HiddenStateLoss(DistillationLoss):
    """Brings hidden states of mapped layers together, token by token.

    mse: `mean_h (W x_s - x_t)²`; cosine: `1 - cos(W x_s, x_t)`. Each is a mean over the real tokens of a row, over
    rows and over layer pairs. W is a learned linear map from the student's width to the teacher's, one per pair.
    Sources: FitNets (arXiv:1412.6550) and TinyBERT (arXiv:1909.10351) for mse with W; DistilBERT
    (arXiv:1910.01108) for cosine.

    Args:
        layers: "uniform", "last", "first" or `[[student, teacher], ...]`; 0 is the embeddings' output, 1 the first
            block.
        kind: "mse" or "cosine".
        projection: "auto" learns W where the widths differ; "linear" always; "none" never.

    Shapes:
        hidden states `(B, S, H_student)` and `(B, S, H_teacher)`; padding (attention_mask 0) counts nowhere.

    Raises:
        ValueError: unknown setting; layers out of range; "none" with different widths; sequences of different
            lengths (the two models must see the same tokens).

    Example:
        >>> loss = HiddenStateLoss(layers=[[1, 2], [3, 6]], kind="cosine")
    """

    def __init__(
        self,
        layers: str | Sequence[Sequence[int]] = "uniform",
        kind: str = "mse",
        projection: str = "auto",
    ) -> None:
        super().__init__()
        check_layers(layers)
        self.layers = layers
        self.kind = check_choice("kind", kind, KINDS)
        self.projection = check_choice("projection", projection, PROJECTIONS)
        self.projections = nn.ModuleList()

    def bind(self, student: ModelShape, teacher: ModelShape | None) -> None:
        self.hidden_state_pairs = map_layers(self.layers, *self._needs_layers(student, teacher), first_layer=0)
        same_width = student.hidden_size == teacher.hidden_size
        if self.projection == "none" and not same_width:
            raise ValueError(
                f'projection "none" needs equal widths; the student has {student.hidden_size}, the teacher '
                f'{teacher.hidden_size}: use projection "auto"'
            )
        if self.projection == "none" or (self.projection == "auto" and same_width):
            self.projections = nn.ModuleList()
        else:
            self.projections = nn.ModuleList(
                nn.Linear(student.hidden_size, teacher.hidden_size) for _ in self.hidden_state_pairs
            )

    def forward(self, student: Features, teacher: Features, labels, attention_mask):
        total = 0.0
        for i, (student_layer, teacher_layer) in enumerate(self.hidden_state_pairs):
            x = student.hidden_states[student_layer].float()  # (B, S, H_student)
            target = teacher.hidden_states[teacher_layer].detach().float()  # (B, S, H_teacher)
            if x.shape[:2] != target.shape[:2]:
                raise ValueError(
                    f"HiddenStateLoss compares token by token, but the student saw {tuple(x.shape[:2])} tokens and "
                    f"the teacher {tuple(target.shape[:2])}; use losses of the logits across tokenizers"
                )
            if self.projections:
                x = self.projections[i](x)  # (B, S, H_teacher)
            if self.kind == "mse":
                distance = (x - target).square().mean(dim=-1)  # (B, S)
            else:
                distance = 1 - F.cosine_similarity(x, target, dim=-1)  # (B, S)
            total = total + mean_over_tokens(distance, attention_mask).mean()
        return total / len(self.hidden_state_pairs)

    def describe(self) -> str:
        return f"{self.kind}, {format_pairs(self.hidden_state_pairs)}"
