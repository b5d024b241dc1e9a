"""Losses of attention maps, recomputed from queries and keys so that both models stay on fused attention."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.utils.checkpoint import checkpoint

from distill_nlp.layer_mapping import check_layers, format_pairs, map_layers
from distill_nlp.losses.base import DistillationLoss, ModelShape, check_choice, mean_over_tokens
from distill_nlp.outputs import AttentionInputs, Features

KINDS = ("kl", "mse")


class AttentionLoss(DistillationLoss):
    """Brings the attention maps of mapped layers together, row by row of each map.

    With `a = softmax(Q Kᵀ / √d)`, before dropout and with padded keys masked: kl is `Σ_k a_t log(a_t / a_s)`, mse is
    `mean_k (a_s - a_t)²` over the real keys. Each is a mean over heads, over the real query tokens of a row, over
    rows and over layer pairs. Where the head counts differ, the maps are averaged over heads first.
    Sources: MiniLM (arXiv:2002.10957) for kl, TinyBERT (arXiv:1909.10351) for mse.

    Args:
        layers: "uniform", "last", "first" or `[[student, teacher], ...]`; 1 is the first block.
        kind: "kl" or "mse".

    Shapes:
        queries and keys `(B, A, S, D)` of each mapped layer; the head counts A and sizes D may differ.

    Raises:
        ValueError: unknown setting; layers out of range; sequences of different lengths.

    Example:
        >>> loss = AttentionLoss(layers="last", kind="kl")
    """

    def __init__(self, layers: str | Sequence[Sequence[int]] = "uniform", kind: str = "kl") -> None:
        super().__init__()
        check_layers(layers)
        self.layers = layers
        self.kind = check_choice("kind", kind, KINDS)
        self.average_heads = False

    def bind(self, student: ModelShape, teacher: ModelShape | None) -> None:
        self.attention_pairs = map_layers(self.layers, *self._needs_layers(student, teacher))
        self.average_heads = student.num_attention_heads != teacher.num_attention_heads

    def forward(self, student: Features, teacher: Features, labels, attention_mask):
        total = 0.0
        for student_layer, teacher_layer in self.attention_pairs:
            a, b = student.attentions[student_layer], teacher.attentions[teacher_layer]
            if a.query.shape[2] != b.query.shape[2]:
                raise ValueError(
                    f"AttentionLoss compares token by token, but the student saw {a.query.shape[2]} tokens and the "
                    f"teacher {b.query.shape[2]}; use losses of the logits across tokenizers"
                )
            # Recomputed in backward: the (B, A, S, S) maps of one layer stand in memory at a time, not of all.
            total = total + checkpoint(self._layer_loss, a, b, attention_mask, use_reentrant=False)
        return total / len(self.attention_pairs)

    def _layer_loss(self, a: AttentionInputs, b: AttentionInputs, mask: torch.Tensor | None) -> torch.Tensor:
        log_a = log_attention_map(a)  # (B, A, S, S)
        with torch.no_grad():
            log_b = log_attention_map(b)
        if self.average_heads:
            log_a = log_a.logsumexp(dim=1, keepdim=True) - math.log(log_a.shape[1])
            log_b = log_b.logsumexp(dim=1, keepdim=True) - math.log(log_b.shape[1])
        if self.kind == "kl":
            distance = (log_b.exp() * (log_b - log_a)).sum(dim=-1)  # (B, A, S)
        else:
            difference = (log_a.exp() - log_b.exp()).square().sum(dim=-1)  # (B, A, S)
            keys = log_a.shape[-1] if mask is None else mask.sum(dim=1).clamp(min=1)[:, None, None]
            distance = difference / keys
        return mean_over_tokens(distance.mean(dim=1), mask).mean()

    def describe(self) -> str:
        heads = ", mean over heads" if self.average_heads else ""
        return f"{self.kind}, {format_pairs(self.attention_pairs)}{heads}"


def log_attention_map(inputs: AttentionInputs) -> torch.Tensor:
    """`log softmax(Q Kᵀ · scaling + mask)` in float32: `(B, A, S, S)`, no dropout."""
    scores = (inputs.query.float() * inputs.scaling) @ inputs.key.float().transpose(-1, -2)
    mask = inputs.mask
    if mask is not None:
        # The lowest finite number, not -inf: a masked key gives 0 · (low - low) = 0 in a KL, and never NaN.
        low = torch.finfo(scores.dtype).min
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, low)
        else:
            scores = (scores + mask.float()).clamp(min=low)
    return scores.log_softmax(dim=-1)
