"""What a model hands to a loss: plain containers of tensors, with no knowledge of Trainer or YAML."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers.utils import ModelOutput


@dataclass
class AttentionInputs:
    """Queries, keys and values of one attention layer, from which its map and its relations can be computed again.

    Args:
        query: `(B, A, S, D)`, before scaling.
        key: `(B, A, S, D)`.
        value: `(B, A, S, D_value)`.
        mask: `(B, 1, 1 or S, S)`, boolean (True = may be attended) or additive, or None.
        scaling: factor on `query @ key.T`.
        bias: `(1 or B, A, S, S)`, added to the scaled scores, with its graph where it is learned; or None.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    scaling: float
    bias: torch.Tensor | None = None


@dataclass
class Features:
    """All that the losses may look at of one model's forward pass.

    Layers are numbered as people count them: 0 is the output of the embeddings (hidden states only), 1 the
    first transformer block, up to the depth of the model.

    Args:
        logits: `(B, C)`.
        hidden_states: layer -> `(B, S, H)`, only the layers that some loss asked for.
        attentions: layer -> `AttentionInputs`, likewise.
        pooled: (layer, "first" or "mean") -> `(B, H)`: what stands in for the hidden states of a teacher that reads
            tokens of its own, or whose answers are cached.
    """

    logits: torch.Tensor
    hidden_states: dict[int, torch.Tensor] = field(default_factory=dict)
    attentions: dict[int, AttentionInputs] = field(default_factory=dict)
    pooled: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)


@dataclass
class DistillationOutput(ModelOutput):
    """Output of `DistillationModel`. DDP rebuilds it by keyword, so that every key is declared.

    Args:
        loss: scalar to call `backward` on (training), or the plain task loss (evaluation).
        logits: `(B, C)`, the student's.
        terms: name -> scalar, unweighted (training only); detached unless the caller asked for their graph.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    terms: dict[str, torch.Tensor] | None = None
