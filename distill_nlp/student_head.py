"""Takes over a teacher's classification head, by the names of the labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from distill_nlp.labels import label_order

State = dict[str, torch.Tensor]


def head_state(teacher: PreTrainedModel, config: Any) -> State:
    """The weights of the teacher's head, by their names in the classifier, its logits in the student's order.

    Args:
        teacher: any model.
        config: the student's, whose labels count. A teacher with more labels gives the rows of the student's.

    Returns:
        An empty dict where the teacher is no sequence classifier, or not for these labels.
    """
    if not type(teacher).__name__.endswith("ForSequenceClassification"):
        return {}
    try:
        order = label_order(teacher.config, config, restrict=True)
    except ValueError:
        return {}
    prefix = f"{teacher.base_model_prefix}."
    state = {key: tensor for key, tensor in teacher.state_dict().items() if not key.startswith(prefix)}
    if order is not None:
        for key in _of_labels(teacher, prefix):
            state[key] = state[key][order]
    return state


def _of_labels(teacher: PreTrainedModel, prefix: str) -> list[str]:
    """The parameters with one row for each label: those of the head's last linear layer."""
    modules = teacher.named_modules()
    linear = [name for name, module in modules if isinstance(module, nn.Linear) and not name.startswith(prefix)]
    return [f"{linear[-1]}.{name}" for name, _ in teacher.get_submodule(linear[-1]).named_parameters()]


def distilbert_head(pooler: State, classifier: State) -> State:
    """BERT's pooler and classifier as DistilBERT's pre_classifier and classifier.

    BERT has C tanh(W x + b) + c, DistilBERT C' relu(W' x + b') + c'. With W' = W, b' = b + 1, C' = C and c' = c - C·1
    the student has max(z, -1) in the place of tanh(z): the same slope at 0 and the same bound below, none above.

    Args:
        pooler: "weight" (H, H) and "bias" (H,).
        classifier: "weight" (labels, H) and "bias" (labels,).
    """
    return {
        "pre_classifier.weight": pooler["weight"],
        "pre_classifier.bias": pooler["bias"] + 1,
        "classifier.weight": classifier["weight"],
        "classifier.bias": classifier["bias"] - classifier["weight"].sum(1),
    }
