"""distill_nlp: distils Hugging Face text classifiers, and proves what it did."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "DistillationArguments": "distill_nlp.arguments",
    "DistillationModel": "distill_nlp.modeling",
    "DistillationObjective": "distill_nlp.objective",
    "DistillationTrainer": "distill_nlp.trainer",
    "Features": "distill_nlp.outputs",
    "CachedTeacher": "distill_nlp.teacher",
    "Teacher": "distill_nlp.teacher",
    "TeacherEnsemble": "distill_nlp.ensemble",
    "DistillationCollator": "distill_nlp.collation",
    "AttentionLoss": "distill_nlp.losses",
    "CrossEntropyLoss": "distill_nlp.losses",
    "DISTLoss": "distill_nlp.losses",
    "DecoupledKDLoss": "distill_nlp.losses",
    "DistillationLoss": "distill_nlp.losses",
    "FSPLoss": "distill_nlp.losses",
    "HiddenStateLoss": "distill_nlp.losses",
    "JensenShannonLoss": "distill_nlp.losses",
    "KLDivergenceLoss": "distill_nlp.losses",
    "LogitsMSELoss": "distill_nlp.losses",
    "NSTLoss": "distill_nlp.losses",
    "PKDLoss": "distill_nlp.losses",
    "RKDAngleLoss": "distill_nlp.losses",
    "RKDDistanceLoss": "distill_nlp.losses",
    "ReverseKLLoss": "distill_nlp.losses",
    "SimilarityPreservingLoss": "distill_nlp.losses",
    "SoftCrossEntropyLoss": "distill_nlp.losses",
    "TokenRelationLoss": "distill_nlp.losses",
    "add_pseudo_labels": "distill_nlp.pool",
    "build_student": "distill_nlp.student",
    "cache_teacher_logits": "distill_nlp.cache_filling",
    "drop_unconfident": "distill_nlp.pool",
    "tokenize": "distill_nlp.tokenization",
}

__all__ = ["__version__", *_EXPORTS]

if TYPE_CHECKING:
    from distill_nlp.arguments import DistillationArguments
    from distill_nlp.cache_filling import cache_teacher_logits
    from distill_nlp.collation import DistillationCollator
    from distill_nlp.ensemble import TeacherEnsemble
    from distill_nlp.losses import (
        AttentionLoss,
        CrossEntropyLoss,
        DecoupledKDLoss,
        DistillationLoss,
        DISTLoss,
        FSPLoss,
        HiddenStateLoss,
        JensenShannonLoss,
        KLDivergenceLoss,
        LogitsMSELoss,
        NSTLoss,
        PKDLoss,
        ReverseKLLoss,
        RKDAngleLoss,
        RKDDistanceLoss,
        SimilarityPreservingLoss,
        SoftCrossEntropyLoss,
        TokenRelationLoss,
    )
    from distill_nlp.modeling import DistillationModel
    from distill_nlp.objective import DistillationObjective
    from distill_nlp.outputs import Features
    from distill_nlp.pool import add_pseudo_labels, drop_unconfident
    from distill_nlp.student import build_student
    from distill_nlp.teacher import CachedTeacher, Teacher
    from distill_nlp.tokenization import tokenize
    from distill_nlp.trainer import DistillationTrainer


def __getattr__(name: str) -> Any:
    """Imports on first use: `distill-nlp --help` must not wait for PyTorch."""
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
