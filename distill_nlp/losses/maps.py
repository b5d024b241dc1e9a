"""Maps over pairs of tokens, recomputed from what a model's attention got: the ground of attention and relations."""

from __future__ import annotations

import torch

from distill_nlp.losses.base import upcast
from distill_nlp.outputs import AttentionInputs


def log_map(left: torch.Tensor, right: torch.Tensor, scaling: float, mask: torch.Tensor | None) -> torch.Tensor:
    """`log softmax(left rightᵀ · scaling)` over the tokens that may be seen, in at least float32: `(B, A, S, S)`.

    Args:
        left, right: `(B, A, S, D)`.
        scaling: factor on the scores.
        mask: broadcastable to `(B, A, S, S)`, boolean (True = may be seen) or additive, or None.
    """
    scores = (upcast(left) * scaling) @ upcast(right).transpose(-1, -2)
    if mask is not None:
        # The lowest finite number, not -inf: a masked token gives 0 · (low - low) = 0 in a KL, and never NaN.
        low = torch.finfo(scores.dtype).min
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, low)
        else:
            scores = (scores + mask.to(scores.dtype)).clamp(min=low)
    return scores.log_softmax(dim=-1)


def log_attention_map(inputs: AttentionInputs, rows: slice = slice(None)) -> torch.Tensor:
    """The attention map of these rows of the batch, in logarithms, before dropout: `(rows, A, S, S)`."""
    return log_map(inputs.query[rows], inputs.key[rows], inputs.scaling, rows_of(inputs.mask, rows))


def rows_of(mask: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    """These rows of a mask, which may be one for the whole batch."""
    return mask if mask is None or len(mask) == 1 else mask[rows]
