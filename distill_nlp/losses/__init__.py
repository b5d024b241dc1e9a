"""The losses: one idea a file, each an `nn.Module` that sees tensors only."""

from distill_nlp.losses.attention import AttentionLoss
from distill_nlp.losses.base import DistillationLoss, ModelShape
from distill_nlp.losses.hidden_states import HiddenStateLoss
from distill_nlp.losses.logits import CrossEntropyLoss, KLDivergenceLoss

LOSSES: dict[str, type[DistillationLoss]] = {
    "ce": CrossEntropyLoss,
    "kl": KLDivergenceLoss,
    "hidden": HiddenStateLoss,
    "attention": AttentionLoss,
}
"""Name in a config -> class. A new loss is added here."""

__all__ = [
    "LOSSES",
    "AttentionLoss",
    "CrossEntropyLoss",
    "DistillationLoss",
    "HiddenStateLoss",
    "KLDivergenceLoss",
    "ModelShape",
]
