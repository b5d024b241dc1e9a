"""Takes over a teacher's classification head, by the names of the labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from distill_nlp.errors import UsageError
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


def order_head(model: PreTrainedModel, saved: Any) -> None:
    """Moves the rows of a finished classifier's head to where its labels are now.

    Args:
        model: loaded with other labels than it was saved with.
        saved: its config as it was. The head stays as it is where the labels differ by more than their order.
    """
    try:
        order = label_order(saved, model.config)
    except ValueError:
        return
    if order is None:
        return
    state = model.state_dict()
    rows = [state[key] for key in _of_labels(model, f"{model.base_model_prefix}.")]
    if not rows or any(len(tensor) != len(order) for tensor in rows):
        raise UsageError(
            f"{type(model).__name__}: its head gives {list(saved.id2label.values())}, and cannot be put into the order "
            f"of the data's labels, {list(model.config.id2label.values())}; give data.label_names in the first order, "
            "where the data leave it open, or a model without a head"
        )
    for tensor in rows:
        tensor.copy_(tensor[order])


def _of_labels(teacher: PreTrainedModel, prefix: str) -> list[str]:
    """The parameters with one row for each label: those of the head's last linear layer; none where it has no such."""
    modules = teacher.named_modules()
    linear = [name for name, module in modules if isinstance(module, nn.Linear) and not name.startswith(prefix)]
    if not linear:
        return []
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
