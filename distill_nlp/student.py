"""Builds a student: from a checkpoint, from a config, or from the teacher's own layers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, DistilBertConfig, PreTrainedModel

from distill_nlp.layer_mapping import map_layers
from distill_nlp.loading import check_settings, load_classifier

# Where each part of a BERT block goes in a DistilBERT block (Sanh et al. 2019, arXiv:1910.01108, section 3).
_BERT_TO_DISTILBERT_BLOCK = {
    "attention.self.query": "attention.q_lin",
    "attention.self.key": "attention.k_lin",
    "attention.self.value": "attention.v_lin",
    "attention.output.dense": "attention.out_lin",
    "attention.output.LayerNorm": "sa_layer_norm",
    "intermediate.dense": "ffn.lin1",
    "output.dense": "ffn.lin2",
    "output.LayerNorm": "output_layer_norm",
}
_BLOCK_KEY = re.compile(r"^(.*\blayer\.)(\d+)(\..*)$")


def label_arguments(label_names: Sequence[str]) -> dict[str, Any]:
    """The config arguments for these classes: both directions, always consistent."""
    return {
        "id2label": dict(enumerate(label_names)),
        "label2id": {name: i for i, name in enumerate(label_names)},
    }


def build_student(
    label_names: Sequence[str],
    *,
    model: str | None = None,
    config: dict[str, Any] | None = None,
    from_teacher: dict[str, Any] | None = None,
    teacher: PreTrainedModel | None = None,
    overrides: dict[str, Any] | None = None,
    revision: str | None = None,
) -> PreTrainedModel:
    """Builds a student with a head for these classes, in float32; what is drawn at random follows `torch.manual_seed`.

    Args:
        label_names: names of the classes, by index.
        model: a Hub id or a folder with a checkpoint; or
        config: `{"model_type": "distilbert", "dim": 64, ...}` for one from scratch; or
        from_teacher: `{"layers": 3, "select": "uniform", "architecture": "distilbert"}`, see `student_from_teacher`.
        teacher: the model whose layers `from_teacher` takes.
        overrides: settings of the student's config to change, e.g. `{"attention_dropout": 0.0}`.
        revision: of `model` on the Hub.

    Raises:
        ValueError: not exactly one of the three ways is given, or a setting of theirs does not fit.
    """
    if sum(way is not None for way in (model, config, from_teacher)) != 1:
        raise ValueError("a student needs exactly one of model, config and from_teacher")
    settings = {**label_arguments(label_names), **(overrides or {})}
    if model is not None:
        return load_classifier(model, revision, **settings)
    if config is not None:
        return model_from_config(config, settings)
    if teacher is None:
        raise ValueError("from_teacher needs the teacher's model")
    return student_from_teacher(teacher, settings, **from_teacher)


def model_from_config(config: dict[str, Any], settings: dict[str, Any]) -> PreTrainedModel:
    """A model with random weights from `{"model_type": ..., ...}`.

    Raises:
        ValueError: an unknown model type, a setting that this type does not know, or sizes that do not fit.
    """
    config = {**config, **settings}
    model_type = config.pop("model_type", None)
    try:
        known = AutoConfig.for_model(model_type)
    except ValueError:
        raise ValueError(
            f'config.model_type must name a Transformers model, e.g. "distilbert", got {model_type!r}'
        ) from None
    check_settings(known, config, "config")
    return AutoModelForSequenceClassification.from_config(AutoConfig.for_model(model_type, **config))


def student_from_teacher(
    teacher: PreTrainedModel,
    settings: dict[str, Any],
    layers: int,
    select: str | Sequence[int] = "uniform",
    architecture: str = "distilbert",
) -> PreTrainedModel:
    """A shallower student of the teacher's width, whose embeddings and blocks are copies of the teacher's.

    The student's block i starts as the teacher's block it is later compared with. The head starts at random.

    Args:
        teacher: a BERT (any model with `...layer.N...` blocks for architecture "same").
        settings: of the student's config.
        layers: number of blocks, at least 1 and at most the teacher's.
        select: "uniform" (of 6 blocks for 3: 2, 4, 6), "first", "last", or the teacher's block numbers, from 1.
        architecture: "distilbert" (from a BERT; the token-type embedding of segment 0 is added into the positions',
            the pooler left out) or "same".

    Raises:
        ValueError: numbers out of range, an unknown choice, a teacher that is no BERT for "distilbert".
    """
    check_settings(teacher.config if architecture == "same" else DistilBertConfig(), settings, "overrides")
    chosen = select_layers(select, layers, teacher.config.num_hidden_layers)
    source = teacher.base_model.state_dict()
    if architecture == "same":
        # Without dtype: the weights of a half-precision teacher are trained in float32 too.
        config = AutoConfig.for_model(**(teacher.config.to_dict() | {"dtype": None} | settings))
        config.num_hidden_layers = layers
        student = AutoModelForSequenceClassification.from_config(config)
        state = _blocks_renumbered(source, chosen)
    elif architecture == "distilbert":
        if teacher.config.model_type != "bert":
            raise ValueError(
                f'from_teacher.architecture "distilbert" needs a BERT teacher, this is {teacher.config.model_type}: '
                'use architecture "same"'
            )
        student = AutoModelForSequenceClassification.from_config(
            DistilBertConfig(**(_distilbert_settings(teacher.config, layers) | settings))
        )
        state = _distilbert_state(source, chosen)
    else:
        raise ValueError(f"from_teacher.architecture must be distilbert or same, got {architecture!r}")
    result = student.base_model.load_state_dict(state, strict=False)
    # Buffers such as position_ids are made by the student itself; a parameter left at random would be a silent loss.
    parameters = {name for name, _ in student.base_model.named_parameters()}
    if left := sorted(parameters & set(result.missing_keys)) or sorted(result.unexpected_keys):
        raise ValueError(
            f"from_teacher cannot copy a {teacher.config.model_type}: {', '.join(left[:3])} has no partner"
        )
    return student


def select_layers(select: str | Sequence[int], layers: int, teacher_depth: int) -> list[int]:
    """The teacher's blocks, counted from 1, that the student starts from."""
    if not 1 <= layers <= teacher_depth:
        raise ValueError(f"from_teacher.layers must be in 1..{teacher_depth} (the teacher's depth), got {layers}")
    if select == "last":
        return list(range(teacher_depth - layers + 1, teacher_depth + 1))
    if isinstance(select, str):
        if select not in ("uniform", "first"):
            raise ValueError(f"from_teacher.select must be uniform, first, last or a list, got {select!r}")
        return [t for _, t in map_layers(select, layers, teacher_depth)]
    if len(select) != layers or not all(1 <= block <= teacher_depth for block in select):
        raise ValueError(f"from_teacher.select must name {layers} blocks in 1..{teacher_depth}, got {list(select)}")
    return list(select)


def _blocks_renumbered(source: dict[str, torch.Tensor], chosen: list[int]) -> dict[str, torch.Tensor]:
    """The state of the chosen blocks (from 1) as blocks 0, 1, ..., and all that belongs to no block."""
    state = {}
    for key, tensor in source.items():
        match = _BLOCK_KEY.match(key)
        if match is None:
            state[key] = tensor
            continue
        for new, block in enumerate(chosen):
            if block - 1 == int(match[2]):
                state[f"{match[1]}{new}{match[3]}"] = tensor
    return state


def _distilbert_state(source: dict[str, torch.Tensor], chosen: list[int]) -> dict[str, torch.Tensor]:
    positions = source["embeddings.position_embeddings.weight"]
    state = {
        "embeddings.word_embeddings.weight": source["embeddings.word_embeddings.weight"],
        "embeddings.position_embeddings.weight": positions + source["embeddings.token_type_embeddings.weight"][0],
    }
    for kind in ("weight", "bias"):
        state[f"embeddings.LayerNorm.{kind}"] = source[f"embeddings.LayerNorm.{kind}"]
        for new, block in enumerate(chosen):
            for theirs, ours in _BERT_TO_DISTILBERT_BLOCK.items():
                state[f"transformer.layer.{new}.{ours}.{kind}"] = source[f"encoder.layer.{block - 1}.{theirs}.{kind}"]
    return state


def _distilbert_settings(bert: Any, layers: int) -> dict[str, Any]:
    return {
        "n_layers": layers,
        "dim": bert.hidden_size,
        "n_heads": bert.num_attention_heads,
        "hidden_dim": bert.intermediate_size,
        "activation": bert.hidden_act,
        "vocab_size": bert.vocab_size,
        "max_position_embeddings": bert.max_position_embeddings,
        "dropout": bert.hidden_dropout_prob,
        "attention_dropout": bert.attention_probs_dropout_prob,
        "initializer_range": bert.initializer_range,
        "pad_token_id": bert.pad_token_id,
    }
