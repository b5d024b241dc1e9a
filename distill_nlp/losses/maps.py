"""Maps over pairs of tokens, recomputed from what a model's attention got: the ground of attention and relations."""

from __future__ import annotations

import torch

from distill_nlp.losses.base import upcast
from distill_nlp.outputs import AttentionInputs

_MASKED = -1e30
"""The score of a token that may not be seen: far below any other, yet such that sums of it stay finite. Not -inf: what
neither model sees gives 0 · (masked - masked) = 0 in a KL, and never NaN."""


def log_map(
    left: torch.Tensor,
    right: torch.Tensor,
    scaling: float,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """`log softmax(left rightᵀ · scaling + bias)` over the tokens that may be seen: `(B, A, S, S)`, at least float32.

    Args:
        left, right: `(B, A, S, D)`.
        scaling: factor on the scores.
        mask: broadcastable to `(B, A, S, S)`, boolean (True = may be seen) or additive, or None.
        bias: broadcastable likewise, or None.
    """
    scores = (upcast(left) * scaling) @ upcast(right).transpose(-1, -2)
    if bias is not None:
        scores = scores + upcast(bias)
    if mask is not None:
        scores = scores + additive(mask, scores.dtype)
    return scores.log_softmax(dim=-1)


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The mask as numbers to add to scores of this type: beside `_MASKED` any score is lost in rounding.

    A mask is one for all heads: adding it takes less time than filling by it.
    """
    if mask.dtype != torch.bool:
        return mask.to(dtype).clamp(min=_MASKED)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, _MASKED)


def log_attention_map(
    inputs: AttentionInputs, rows: slice = slice(None), mask: torch.Tensor | None = None
) -> torch.Tensor:
    """The attention map of these rows of the batch, in logarithms, before dropout: `(rows, A, S, S)`.

    Args:
        mask: of these rows; what it hides is hidden besides what the model's own mask hides.
    """
    mask = both(rows_of(inputs.mask, rows), mask)
    return log_map(inputs.query[rows], inputs.key[rows], inputs.scaling, mask, rows_of(inputs.bias, rows))


def both(one: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor | None:
    """A mask that hides what either of them hides."""
    if one is None or other is None:
        return other if one is None else one
    if one.dtype == other.dtype == torch.bool:
        return one & other
    return sum(torch.where(m, 0.0, _MASKED) if m.dtype == torch.bool else upcast(m) for m in (one, other))


def rows_of(tensor: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    """These rows of a mask or a bias, which may be one for the whole batch."""
    return tensor if tensor is None or len(tensor) == 1 else tensor[rows]
