"""The losses: one idea a file, each an `nn.Module` that sees tensors only."""

from distill_nlp.losses.attention import AttentionLoss
from distill_nlp.losses.base import DistillationLoss, ModelShape
from distill_nlp.losses.correlation import DISTLoss
from distill_nlp.losses.cross_entropy import CrossEntropyLoss
from distill_nlp.losses.decoupled import DecoupledKDLoss
from distill_nlp.losses.example_relations import RKDAngleLoss, RKDDistanceLoss, SimilarityPreservingLoss
from distill_nlp.losses.gram import FSPLoss, NSTLoss
from distill_nlp.losses.hidden_states import HiddenStateLoss, PKDLoss
from distill_nlp.losses.logits import (
    JensenShannonLoss,
    KLDivergenceLoss,
    LogitsMSELoss,
    ReverseKLLoss,
    SoftCrossEntropyLoss,
)
from distill_nlp.losses.token_relations import TokenRelationLoss

LOSSES: dict[str, type[DistillationLoss]] = {
    # responses
    "ce": CrossEntropyLoss,
    "kl": KLDivergenceLoss,
    "reverse_kl": ReverseKLLoss,
    "js": JensenShannonLoss,
    "soft_ce": SoftCrossEntropyLoss,
    "logits_mse": LogitsMSELoss,
    "dkd": DecoupledKDLoss,
    "dist": DISTLoss,
    # features
    "hidden": HiddenStateLoss,
    "pkd": PKDLoss,
    "nst": NSTLoss,
    "fsp": FSPLoss,
    "attention": AttentionLoss,
    # relations
    "token_relation": TokenRelationLoss,
    "rkd_distance": RKDDistanceLoss,
    "rkd_angle": RKDAngleLoss,
    "similarity": SimilarityPreservingLoss,
}
"""Name in a config -> class. A new loss is added here."""

__all__ = ["LOSSES", "DistillationLoss", "ModelShape", *sorted(loss.__name__ for loss in LOSSES.values())]
