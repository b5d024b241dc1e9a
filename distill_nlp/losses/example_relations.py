"""Relations between the examples of a batch: which texts the teacher holds alike.

They are computed within a micro-batch of one rank: the relations of 8 x 1 rows are others than those of 1 x 8.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from distill_nlp.layer_mapping import check_layers, format_pairs, map_layers
from distill_nlp.losses.base import (
    DistillationLoss,
    ModelShape,
    check_choice,
    pooled,
    upcast,
)
from distill_nlp.outputs import Features

REPRESENTATIONS = ("first", "mean", "logits")


class ExampleRelationLoss(DistillationLoss):
    """Base of the losses that compare the geometry of a batch; widths may differ, without any projection.

    A subclass gives `_relations(student, teacher)` for two `(B, H)` of different widths. Batches too small to have
    relations give 0.

    Args:
        layers: "last", "uniform", "first", "every_2" or `[[student, teacher], ...]`; 0 is the embeddings' output, 1
            the first block. Not read with representation "logits".
        representation: what stands for an example: the state of its "first" real token, the "mean" over its real
            tokens, or its "logits".
    """

    smallest_batch = 2
    compares_rows = True

    def __init__(self, layers: str | Sequence[Sequence[int]] = "last", representation: str = "first") -> None:
        super().__init__()
        check_layers(layers)
        self.layers = layers
        self.representation = check_choice("representation", representation, REPRESENTATIONS)
        self.pooling = None if representation == "logits" else representation

    def bind(self, student: ModelShape, teacher: ModelShape | None) -> None:
        super().bind(student, teacher)
        if self.representation != "logits":
            self.hidden_state_pairs = map_layers(self.layers, *self._needs_layers(student, teacher), first_layer=0)

    def forward(self, student: Features, teacher: Features, labels, attention_mask):
        values = []
        for x, target in self._examples(student, teacher, attention_mask):
            if len(x) != len(target):
                raise ValueError(f"the student answered {len(x)} rows, the teacher {len(target)}")
            # Too few rows to relate: zero, but within the graph.
            values.append(self._relations(x, target) if len(x) >= self.smallest_batch else x.sum() * 0.0)
        return torch.stack(values).mean()

    def _examples(
        self, student: Features, teacher: Features, mask: torch.Tensor | None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Per pair of layers `(B, H_student)` and `(B, H_teacher)` in at least float32, the teacher's detached."""
        if self.representation == "logits":
            yield upcast(student.logits), upcast(teacher.logits.detach())
        for pair in self.hidden_state_pairs:
            yield pooled(self, student, teacher, pair, mask)

    def _relations(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError(f"{type(self).__name__} must implement _relations")

    def describe(self) -> str:
        pairs = format_pairs(self.hidden_state_pairs)
        return f"{self.representation}, {pairs}" if pairs else self.representation


class RKDDistanceLoss(ExampleRelationLoss):
    """Relational knowledge distillation of distances: texts as far apart as the teacher has them.

    `mean_{i≠j} huber(d_s[i, j], d_t[i, j])` with `d[i, j] = ‖x_i - x_j‖ / μ`, μ the mean distance of the batch, and
    huber with δ = 1; a mean over layer pairs.
    Source: Park et al. 2019, "Relational Knowledge Distillation" (arXiv:1904.05068).

    Args:
        layers, representation: see `ExampleRelationLoss`.

    Shapes:
        hidden states `(B, S, H)` or logits `(B, C)` of different widths; B >= 2, else 0.

    Raises:
        ValueError: unknown setting; layers out of range; models without layers; different numbers of rows or tokens.

    Example:
        >>> loss = RKDDistanceLoss(layers="last", representation="first")
    """

    def _relations(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return F.smooth_l1_loss(_relative_distances(student), _relative_distances(teacher))


def _relative_distances(x: torch.Tensor) -> torch.Tensor:
    """Distances of all pairs i≠j over their mean: (B, H) -> (B · (B - 1),)."""
    # Not by matrix product, which loses the small distances; the gradient of cdist at distance 0 is 0, not infinite.
    distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    # Without the diagonal, by its places: a mask would wait for the device to be counted.
    distances = distances.flatten()[1:].view(len(x) - 1, len(x) + 1)[:, :-1].flatten()
    return distances / distances.mean().clamp(min=torch.finfo(x.dtype).tiny)


class RKDAngleLoss(ExampleRelationLoss):
    """Relational knowledge distillation of angles: triangles of texts of the same shape as the teacher's.

    `mean huber(cos_s[i, j, k], cos_t[i, j, k])` over all triplets of different examples, with `cos[i, j, k]` the cosine
    of the angle at j between `x_i - x_j` and `x_k - x_j` (0 where one of them is 0: the same text twice), huber with
    δ = 1; a mean over layer pairs. Takes B² · H and B³ numbers.
    Source: Park et al. 2019, "Relational Knowledge Distillation" (arXiv:1904.05068).

    Args:
        layers, representation: see `ExampleRelationLoss`.

    Shapes:
        hidden states `(B, S, H)` or logits `(B, C)` of different widths; B >= 3, else 0.

    Raises:
        ValueError: unknown setting; layers out of range; models without layers; different numbers of rows or tokens.

    Example:
        >>> loss = RKDAngleLoss(layers="last", representation="mean")
    """

    smallest_batch = 3

    def _relations(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        batch = len(student)
        total = F.smooth_l1_loss(_cosines(student), _cosines(teacher), reduction="sum")
        return total / (batch * (batch - 1) * (batch - 2))


def _cosines(x: torch.Tensor) -> torch.Tensor:
    """Cosine of the angle at j between i and k: (B, H) -> (B at j, B, B).

    0 where i or k is at the same place as j, and for i = k, which is no triplet.
    """
    differences = x[None, :] - x[:, None]  # (j, i, H)
    squares = differences.square().sum(dim=-1, keepdim=True)
    # The root of 0 has an infinite gradient, and rows may hold the same text twice.
    lengths = torch.where(squares > 0, squares, 1.0).sqrt()
    directions = differences / lengths
    # i = k would be 1 in one model and 0 in another that has i and j at the same place.
    same = torch.eye(len(x), dtype=torch.bool, device=x.device)
    return (directions @ directions.transpose(1, 2)).masked_fill(same, 0.0)


class SimilarityPreservingLoss(ExampleRelationLoss):
    """Pairs of texts that are alike to the teacher shall be alike to the student.

    `Σ_ij (G_s[i, j] - G_t[i, j])² / B²` with `G = x xᵀ`, each row brought to length 1; a mean over layer pairs. The
    paper flattens whole activation maps; texts have different lengths, so an example is one vector here.
    Source: Tung and Mori 2019, "Similarity-Preserving Knowledge Distillation" (arXiv:1907.09682).

    Args:
        layers, representation: see `ExampleRelationLoss`.

    Shapes:
        hidden states `(B, S, H)` or logits `(B, C)` of different widths; B >= 2, else 0.

    Raises:
        ValueError: unknown setting; layers out of range; models without layers; different numbers of rows or tokens.

    Example:
        >>> loss = SimilarityPreservingLoss(layers="last", representation="mean")
    """

    def _relations(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        similarities = [F.normalize(x @ x.T, dim=-1) for x in (student, teacher)]
        return (similarities[0] - similarities[1]).square().mean()
