"""Losses of attention maps, recomputed from queries and keys so that both models stay on fused attention."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from distill_nlp.layer_mapping import check_layers, format_pairs, map_layers
from distill_nlp.losses.base import DistillationLoss, ModelShape, check_choice, check_same_tokens, kl, mean_over_tokens
from distill_nlp.losses.chunking import rowwise
from distill_nlp.losses.map_distance import Scores, map_distance
from distill_nlp.losses.maps import log_attention_map, log_map, rows_of
from distill_nlp.outputs import AttentionInputs, Features

KINDS = ("kl", "mse")
HEADS = ("auto", "each", "mean", "sum")


class AttentionLoss(DistillationLoss):
    """Brings the attention maps of mapped layers together, row by row of each map.

    With `a = softmax(Q Kᵀ / √d)`, before dropout and with padded keys masked: kl is `Σ_k a_t log(a_t / a_s)`, mse is
    `mean_k (a_s - a_t)²` over the real keys. Each is a mean over heads, over the real query tokens of a row, over
    rows and over layer pairs.
    Where a model adds a bias of relative positions to `Q Kᵀ / √d` (MPNet), it is part of the map and learns as well.
    Sources: MiniLM (arXiv:2002.10957) for kl; mse after TinyBERT (arXiv:1909.10351), which fits the scores before the
    softmax, where this fits the maps; maps averaged or summed over heads first as in TextBrewer (arXiv:2002.12620).
    Where the student may look at fewer tokens than the teacher (a sliding window), the teacher's map is cut to those
    and sums to 1 over them.

    Args:
        layers: "uniform", "last", "first", "every_2" or `[[student, teacher], ...]`; 1 is the first block.
        kind: "kl" or "mse".
        heads: "each": head i learns from head i; "mean": the maps are averaged over heads first, so that head counts
            may differ; "sum": summed (mse only, equal head counts); "auto": each where the counts are equal, else mean.

    Shapes:
        queries and keys `(B, A, S, D)` of each mapped layer; the head counts A and sizes D may differ.

    Raises:
        ValueError: unknown setting; "each" or "sum" with different head counts; layers out of range; sequences of
            different lengths.

    Example:
        >>> loss = AttentionLoss(layers="last", kind="kl")
    """

    def __init__(
        self, layers: str | Sequence[Sequence[int]] = "uniform", kind: str = "kl", heads: str = "auto"
    ) -> None:
        super().__init__()
        check_layers(layers)
        self.layers = layers
        self.kind = check_choice("kind", kind, KINDS)
        self.heads = self._heads = check_choice("heads", heads, HEADS)
        if kind == "kl" and heads == "sum":
            raise ValueError('heads "sum" is for kind "mse": sums of maps are no distributions; use "mean"')

    def bind(self, student: ModelShape, teacher: ModelShape | None) -> None:
        super().bind(student, teacher)
        self.attention_pairs = map_layers(self.layers, *self._needs_layers(student, teacher))
        counts = student.num_attention_heads, teacher.num_attention_heads
        if self.heads == "auto":
            self._heads = "each" if counts[0] == counts[1] else "mean"
        elif self.heads in ("each", "sum") and counts[0] != counts[1]:
            raise ValueError(
                f'heads "{self.heads}" needs equal head counts; the student has {counts[0]}, the teacher '
                f'{counts[1]}: use heads "mean"'
            )

    def forward(self, student: Features, teacher: Features, labels, attention_mask):
        total = 0.0
        for student_layer, teacher_layer in self.attention_pairs:
            a, b = student.attentions[student_layer], teacher.attentions[teacher_layer]
            check_same_tokens(self, a.query.shape, b.query.shape, dim=2)
            total = total + self._layer_loss(a, b, attention_mask)
        return total / len(self.attention_pairs)

    def _layer_loss(self, a: AttentionInputs, b: AttentionInputs, mask: torch.Tensor | None) -> torch.Tensor:
        if self._heads == "each":
            student, teacher = (Scores(side.query, side.key, side.scaling, side.mask, side.bias) for side in (a, b))
            return map_distance(self.kind, student, teacher, mask)

        def loss(rows: slice, query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            seen = rows_of(a.mask, rows)
            log_a = self._over_heads(log_map(query, key, a.scaling, seen, bias))  # (rows, S, S)
            with torch.no_grad():
                log_b = self._over_heads(log_attention_map(b, rows, seen))
            tokens = None if mask is None else mask[rows]
            if self.kind == "kl":
                distance = kl(log_b, log_a)  # (rows, S)
            else:
                difference = (log_a.exp() - log_b.exp()).square().sum(dim=-1)  # (rows, S)
                keys = log_a.shape[-1] if tokens is None else tokens.sum(dim=1).clamp(min=1)[:, None]
                distance = difference / keys
            return mean_over_tokens(distance, tokens)

        _, heads, tokens, _ = a.query.shape
        learned = (a.query, a.key) if a.bias is None else (a.query, a.key, a.bias)
        return rowwise(loss, max(heads, b.query.shape[1]) * tokens**2, *learned)

    def _over_heads(self, logs: torch.Tensor) -> torch.Tensor:
        """Logarithms of the mean or sum of a row's maps: (rows, A, S, S) -> (rows, S, S)."""
        count = logs.shape[1] if self._heads == "mean" else 1
        return logs.logsumexp(dim=1) - math.log(count)

    def describe(self) -> str:
        heads = f", {self._heads} of heads" if self._heads in ("mean", "sum") else ""
        return f"{self.kind}, {format_pairs(self.attention_pairs)}{heads}"
