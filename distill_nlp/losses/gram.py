"""Inner products of hidden states: among the tokens of one layer (NST), and between two layers (FSP)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from distill_nlp.layer_mapping import check_layers, format_pairs, map_layers
from distill_nlp.losses.base import DistillationLoss, ModelShape, check_same_tokens, upcast
from distill_nlp.losses.chunking import rowwise
from distill_nlp.losses.hidden_states import ProjectedLoss
from distill_nlp.outputs import Features


class NSTLoss(DistillationLoss):
    """Neuron selectivity transfer: which tokens excite the neurons of a layer, whatever the neurons are called.

    Each neuron's activations over the real tokens of a text, brought to length 1, are a sample; the loss is the squared
    maximum mean discrepancy between the student's neurons and the teacher's with the kernel `k(f, g) = (fᵀ g)²`. That
    is `‖Fₜ Fₜᵀ / H_teacher - Fₛ Fₛᵀ / H_student‖²` (Frobenius, squared), F of shape (S, H) with columns of length 1: no
    projection, and widths may differ. A mean over rows and layer pairs.
    Source: Huang and Wang 2017, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer"
    (arXiv:1707.01219).

    Args:
        layers: "uniform", "last", "first", "every_2" or `[[student, teacher], ...]`; 0 is the embeddings' output, 1
            the first block.

    Shapes:
        hidden states `(B, S, H_student)` and `(B, S, H_teacher)`; padding (attention_mask 0) counts nowhere.

    Raises:
        ValueError: unknown layers, or out of range; sequences of different lengths.

    Example:
        >>> loss = NSTLoss(layers="last")
    """

    def __init__(self, layers: str | Sequence[Sequence[int]] = "uniform") -> None:
        super().__init__()
        check_layers(layers)
        self.layers = layers

    def bind(self, student: ModelShape, teacher: ModelShape | None) -> None:
        super().bind(student, teacher)
        self.hidden_state_pairs = map_layers(self.layers, *self._needs_layers(student, teacher), first_layer=0)

    def forward(self, student: Features, teacher: Features, labels, attention_mask):
        total = 0.0
        for student_layer, teacher_layer in self.hidden_state_pairs:
            x, target = student.hidden_states[student_layer], teacher.hidden_states[teacher_layer].detach()
            check_same_tokens(self, x.shape, target.shape, dim=1)

            def loss(rows: slice, x: torch.Tensor, target=target) -> torch.Tensor:
                mask = None if attention_mask is None else attention_mask[rows]
                goal = _selectivity(target[rows], mask)
                return (_selectivity(x, mask) - goal).square().sum(dim=(1, 2))

            total = total + rowwise(loss, x.shape[1] ** 2, x)
        return total / len(self.hidden_state_pairs)


def _selectivity(states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """`F Fᵀ / H` of each row, with the columns of F brought to length 1: (B, S, H) -> (B, S, S)."""
    states = upcast(states)
    if mask is not None:
        states = states * mask.to(states.dtype)[..., None]
    states = F.normalize(states, dim=1)
    return states @ states.transpose(1, 2) / states.shape[-1]


class FSPLoss(ProjectedLoss):
    """Flow of solution procedure: how the states of one mapped layer turn into those of the next.

    `mean_hk (G_s - G_t)²` with `G = Σ_tokens x_a[h] x_b[k] / tokens` for each two neighbours (a, b) among the mapped
    layers, over the real tokens of a row; a mean over rows and neighbours. The paper sums over the entries of G; the
    mean keeps its size independent of the width.
    Source: Yim et al. 2017, "A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and Transfer
    Learning" (CVPR 2017).

    Args:
        layers: at least two pairs: "uniform", "first", "every_2" or `[[student, teacher], ...]`; 0 is the embeddings'
            output, 1 the first block.
        projection, rank, projection_init: see `ProjectedLoss`.

    Shapes:
        hidden states `(B, S, H_student)` and `(B, S, H_teacher)`; padding (attention_mask 0) counts nowhere.

    Raises:
        ValueError: as `HiddenStateLoss`; fewer than two pairs of layers.

    Example:
        >>> loss = FSPLoss(layers=[[0, 0], [3, 6]])
    """

    def bind(self, student: ModelShape, teacher: ModelShape | None) -> None:
        super().bind(student, teacher)
        if len(self.hidden_state_pairs) < 2:
            raise ValueError(
                f"FSPLoss relates neighbouring layers and needs two pairs, got {format_pairs(self.hidden_state_pairs)}"
            )

    def forward(self, student: Features, teacher: Features, labels, attention_mask):
        states = list(self._projected(student, teacher))
        total = 0.0
        for i in range(len(states) - 1):
            flows = [_flow(states[i][side], states[i + 1][side], attention_mask) for side in (0, 1)]  # (B, H, H)
            flow = flows[0] - flows[1]
            total = total + flow.square().mean()
        return total / (len(states) - 1)


def _flow(first: torch.Tensor, second: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Mean over real tokens of the outer product of two states: (B, S, H), (B, S, H) -> (B, H, H)."""
    if mask is None:
        return first.transpose(1, 2) @ second / first.shape[1]
    mask = mask.to(first.dtype)
    return (first * mask[..., None]).transpose(1, 2) @ second / mask.sum(dim=1).clamp(min=1)[:, None, None]
