"""Relations between the tokens of a text: what MiniLM takes from the teacher instead of its states."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from distill_nlp.layer_mapping import check_layers, format_pairs, map_layers
from distill_nlp.losses.base import DistillationLoss, ModelShape, check_same_tokens
from distill_nlp.losses.map_distance import Scores, map_distance
from distill_nlp.outputs import AttentionInputs, Features

RELATIONS = ("qq", "kk", "vv")
_SOURCES = {"qq": "query", "kk": "key", "vv": "value"}


class TokenRelationLoss(DistillationLoss):
    """Brings the relations among queries, among keys and among values of mapped layers together.

    With all heads of a layer concatenated and cut anew into `R` relation heads, `X` of size `d = width / R`:
    `r = softmax(X Xᵀ / √d)` over the real tokens, and the loss is `Σ_x Σ_k r_t log(r_t / r_s)`, x over the chosen
    relations; a mean over relation heads, over the real tokens of a row, over rows and over layer pairs. Widths and
    head counts may differ, without any projection.
    Sources: MiniLM (arXiv:2002.10957): `relations=["vv"]` beside an `AttentionLoss`, on the last layer; MiniLMv2
    (arXiv:2012.15828): all three, with more relation heads than heads.

    Args:
        layers: "last" (as in both papers), "uniform", "first", "every_2" or `[[student, teacher], ...]`; 1 is the
            first block.
        relations: any of "qq", "kk", "vv".
        relation_heads: R, a divisor of both models' widths; not given, the larger of the two head counts, or the
            smaller where only that one divides both.

    Shapes:
        queries, keys and values `(B, A, S, D)` of each mapped layer; A and D may differ between the models.

    Raises:
        ValueError: unknown setting; R does not divide one of the widths, or is not given and neither head count does;
            layers out of range; sequences of different lengths.

    Example:
        >>> loss = TokenRelationLoss(relations=["qq", "kk", "vv"], relation_heads=48)
    """

    def __init__(
        self,
        layers: str | Sequence[Sequence[int]] = "last",
        relations: Sequence[str] = RELATIONS,
        relation_heads: int | None = None,
    ) -> None:
        super().__init__()
        check_layers(layers)
        self.layers = layers
        if isinstance(relations, str) or not relations or not set(relations) <= set(RELATIONS):
            raise ValueError(f"relations must be a list of {', '.join(RELATIONS)}, got {relations!r}")
        if len(set(relations)) < len(relations):
            raise ValueError(f"relations: one stands twice in {list(relations)}")
        self.relations = tuple(relations)
        if relation_heads is not None and (
            isinstance(relation_heads, bool) or not isinstance(relation_heads, int) or relation_heads < 1
        ):
            raise ValueError(f"relation_heads must be a whole number > 0, got {relation_heads!r}")
        self.relation_heads = self._relation_heads = relation_heads

    def bind(self, student: ModelShape, teacher: ModelShape | None) -> None:
        super().bind(student, teacher)
        self.attention_pairs = map_layers(self.layers, *self._needs_layers(student, teacher))
        if self.relation_heads is not None:
            _check_divides(self.relation_heads, student.attention_width, teacher.attention_width)
        else:
            widths = student.hidden_size, teacher.hidden_size
            counts = {student.num_attention_heads, teacher.num_attention_heads}
            if None in counts or None in widths:
                raise ValueError(
                    "the config of the student or of the teacher names no head count or no width; set relation_heads "
                    "to a number that divides both widths"
                )
            counts = sorted(counts, reverse=True)
            fitting = [count for count in counts if all(width % count == 0 for width in widths)]
            if not fitting:
                raise ValueError(
                    f"neither head count ({' and '.join(map(str, counts))}) divides both widths ({widths[0]} and "
                    f"{widths[1]}); set relation_heads to a number that does"
                )
            self._relation_heads = fitting[0]

    def forward(self, student: Features, teacher: Features, labels, attention_mask):
        total = 0.0
        for student_layer, teacher_layer in self.attention_pairs:
            a, b = student.attentions[student_layer], teacher.attentions[teacher_layer]
            check_same_tokens(self, a.query.shape, b.query.shape, dim=2)
            for relation in self.relations:
                total = total + self._relation_loss(a, b, relation, attention_mask)
        return total / len(self.attention_pairs)

    def _relation_loss(
        self, a: AttentionInputs, b: AttentionInputs, relation: str, mask: torch.Tensor | None
    ) -> torch.Tensor:
        vectors, target = (self._cut(getattr(side, _SOURCES[relation])) for side in (a, b))
        seen = None if mask is None else mask[:, None, None, :].bool()
        student, teacher = (Scores(x, x, x.shape[-1] ** -0.5, seen) for x in (vectors, target))
        return map_distance("kl", student, teacher, mask)

    def _cut(self, heads: torch.Tensor) -> torch.Tensor:
        """`(B, A, S, D)` -> `(B, R, S, A · D / R)`: neighbouring parts of the concatenated heads."""
        batch, count, tokens, size = heads.shape
        if count * size % self._relation_heads:
            raise ValueError(
                f"relation_heads {self._relation_heads} does not divide {count * size}, the width of the queries, keys "
                "or values"
            )
        joined = heads.transpose(1, 2).reshape(batch, tokens, self._relation_heads, -1)
        return joined.transpose(1, 2)

    def describe(self) -> str:
        return (
            f"{'+'.join(self.relations)}, {self._relation_heads} relation heads, {format_pairs(self.attention_pairs)}"
        )


def _check_divides(heads: int, *widths: int | None) -> None:
    """Before a training: where the configs say how wide queries are."""
    known = [width for width in widths if width is not None]
    if any(width % heads for width in known):
        common = math.gcd(*known)
        fitting = [str(number) for number in range(1, common + 1) if common % number == 0]
        raise ValueError(
            f"relation_heads {heads} does not divide the widths of the queries ({' and '.join(map(str, known))}); "
            f"there are {', '.join(fitting)}"
        )
