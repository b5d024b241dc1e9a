"""A student made of the teacher's own layers: embeddings, chosen blocks and head, as they are or cut to a width."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForSequenceClassification, DistilBertConfig, PreTrainedModel

from distill_nlp.errors import said_in_one_line
from distill_nlp.layer_mapping import map_layers
from distill_nlp.loading import check_settings
from distill_nlp.modeling import is_peft_model
from distill_nlp.student_head import State, distilbert_head, head_state
from distill_nlp.student_width import Sizes, choose_sizes, cut, is_whole

logger = logging.getLogger(__name__)

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
_BLOCK_KEY = re.compile(r"^(.*?\.(?:layers?|blocks?|h)\.)(\d+)(\..*)$")
# DistilBERT's LayerNorms have 1e-12. Where the variance under one is v, another epsilon changes it by ε / 2v: of the
# embeddings, whose v is about 0.004 in BERT, by about 1% at this one.
_LARGEST_EPSILON = 1e-4
# Settings of a config that follow from those of `from_teacher`.
_SIZES = {
    "num_hidden_layers": "layers",
    "hidden_size": "width",
    "num_attention_heads": "heads",
    "intermediate_size": "intermediate_size",
    "hidden_dim": "intermediate_size",
}


def student_from_teacher(
    teacher: PreTrainedModel,
    settings: dict[str, Any],
    layers: int,
    select: str | Sequence[int] = "uniform",
    architecture: str = "distilbert",
    head: str = "auto",
    width: int | None = None,
    heads: int | None = None,
    intermediate_size: int | None = None,
    say: Callable[[str], None] = logger.info,
) -> PreTrainedModel:
    """A shallower student, and a narrower one on demand, whose embeddings and blocks are copies of the teacher's.

    The student's block i starts as the teacher's block it is later compared with.

    Args:
        teacher: a BERT; for architecture "same" any encoder with a list of blocks (BERT, RoBERTa, ELECTRA, XLM-RoBERTa,
            DistilBERT, MPNet, DeBERTa-v2, ModernBERT, ...). A classifier, or the encoder alone.
        settings: of the student's config, `id2label` and `label2id` among them.
        layers: number of blocks, at least 1 and at most the teacher's.
        select: "uniform" (of 6 blocks for 3: 2, 4, 6), "first", "last", or the teacher's block numbers, from 1.
        architecture: "distilbert" (from a BERT; the token-type embedding of segment 0 is added into the positions') or
            "same".
        head: "auto": where the teacher is a classifier for the student's labels, by name, the student starts from its
            head, in the student's order of labels; else it is drawn. From BERT to DistilBERT, tanh(z) in the head
            becomes max(z, -1): see `distilbert_head`. "random": it is drawn. A BERT's pooler is copied in any case.
        width: of the hidden states, of a BERT, RoBERTa, ELECTRA or DistilBERT; see `student_width.cut` for what is
            kept. The teacher's where not given.
        heads: attention heads; not given, as many as keep the size of a head where that divides the width.
        intermediate_size: neurons of the feed-forward part; not given, 4 · width.
        say: gets one line of what was made.

    Raises:
        ValueError: numbers out of range, an unknown choice, a setting that follows from another, a teacher whose
            blocks cannot be taken (ALBERT's layers share one), that PEFT has wrapped, that is no BERT for "distilbert",
            or whose LayerNorm epsilon is far from DistilBERT's.

    Example:
        >>> student = student_from_teacher(teacher, label_arguments(["bad", "good"]), layers=3, architecture="same")
    """
    if is_peft_model(teacher):
        raise ValueError("from_teacher needs a model without adapters: hand over teacher.merge_and_unload()")
    config = teacher.config
    if architecture not in ("distilbert", "same"):
        raise ValueError(f"from_teacher.architecture must be distilbert or same, got {architecture!r}")
    if head not in ("auto", "random"):
        raise ValueError(f"from_teacher.head must be auto or random, got {head!r}")
    renamed = architecture == "distilbert"
    check_settings(DistilBertConfig() if renamed else config, settings, "overrides")
    _refuse_sizes(settings, DistilBertConfig.attribute_map if renamed else config.attribute_map)
    if renamed:
        _check_becomes_distilbert(config)
    chosen = select_layers(select, layers, config.num_hidden_layers)
    own_sizes = Sizes.of(config)
    sizes = choose_sizes(config, width, heads, intermediate_size)

    student_config = _student_config(config, chosen, sizes, renamed, settings)
    prefix = f"{teacher.base_model_prefix}."
    # In float32 before anything is added up: of a teacher in half precision no sum is rounded twice.
    state = {prefix + key: tensor.float() for key, tensor in teacher.base_model.state_dict().items()}
    state = _blocks_renumbered(state, chosen, config)
    if head == "auto":
        state |= {key: tensor.float() for key, tensor in head_state(teacher, student_config).items()}
    if sizes != own_sizes:
        state = cut(state, config.model_type, own_sizes, sizes, layers)
    if renamed:
        state = _distilbert_state(state, layers)
    with said_in_one_line("overrides: no student can be made with them"):
        student = AutoModelForSequenceClassification.from_config(student_config)
    copied = _load(student, state, config.model_type, settings)
    say(_line(config, student.config, chosen, copied, None if sizes == own_sizes else sizes))
    return student


def select_layers(select: str | Sequence[int], layers: int, teacher_depth: int) -> list[int]:
    """The teacher's blocks, counted from 1, that the student starts from.

    Raises:
        ValueError: a number out of range, or an unknown choice.
    """
    if not is_whole(layers) or not 1 <= layers <= teacher_depth:
        raise ValueError(f"from_teacher.layers must be in 1..{teacher_depth} (the teacher's depth), got {layers!r}")
    if select == "last":
        return list(range(teacher_depth - layers + 1, teacher_depth + 1))
    if isinstance(select, str):
        if select not in ("uniform", "first"):
            raise ValueError(f"from_teacher.select must be uniform, first, last or a list, got {select!r}")
        return [t for _, t in map_layers(select, layers, teacher_depth)]
    if len(select) != layers or not all(is_whole(block) and 1 <= block <= teacher_depth for block in select):
        raise ValueError(
            f"from_teacher.select must name {layers} blocks in 1..{teacher_depth}, counted from 1, got {list(select)}"
        )
    return list(select)


def _refuse_sizes(settings: dict[str, Any], aliases: dict[str, str]) -> None:
    """Depth and sizes are settings of `from_teacher`; as overrides they would not follow from the weights."""
    sizes = _SIZES | {aliases[name]: ours for name, ours in _SIZES.items() if name in aliases}
    if given := sorted(settings.keys() & sizes.keys()):
        raise ValueError(f"overrides.{given[0]} is set by from_teacher.{sizes[given[0]]}")


def _check_becomes_distilbert(config: Any) -> None:
    if config.model_type != "bert":
        raise ValueError(
            f'from_teacher.architecture "distilbert" needs a BERT teacher, this is {config.model_type}: '
            'use architecture "same"'
        )
    if config.layer_norm_eps > _LARGEST_EPSILON:
        raise ValueError(
            f'from_teacher.architecture "distilbert" has a LayerNorm epsilon of 1e-12, the teacher '
            f'{config.layer_norm_eps:g}, which would change its states: use architecture "same"'
        )


def _student_config(config: Any, chosen: list[int], sizes: Sizes, renamed: bool, settings: dict[str, Any]) -> Any:
    try:
        if renamed:
            return DistilBertConfig(**(_distilbert_settings(config, len(chosen), sizes) | settings))
        return AutoConfig.for_model(**(_same_settings(config, chosen, sizes) | settings))
    except StrictDataclassError as error:
        # Overrides of a wrong type; or the blocks: some Transformers know no ModernBERT of one kind of attention alone.
        why = " ".join(str(error).split())
        raise ValueError(f"overrides: no valid config for this student: {why}") from error


def _same_settings(config: Any, chosen: list[int], sizes: Sizes) -> dict[str, Any]:
    own = config.to_dict()
    # A list with an entry for each block, such as ModernBERT's layer_types, goes with the blocks.
    depth = config.num_hidden_layers
    for name, value in own.items():
        if "layer" in name and isinstance(value, list) and len(value) == depth:
            own[name] = [value[block - 1] for block in chosen]
    new = {"num_hidden_layers": len(chosen)}
    if sizes != Sizes.of(config):
        new |= {"hidden_size": sizes.width, "num_attention_heads": sizes.heads}
        new |= {"hidden_dim" if "hidden_dim" in own else "intermediate_size": sizes.intermediate_size}
        if own.get("embedding_size") == config.hidden_size:
            new |= {"embedding_size": sizes.width}
    new = {config.attribute_map.get(name, name): value for name, value in new.items()}
    # Without dtype: the weights of a half-precision teacher are trained in float32 too.
    return own | {"dtype": None} | new


def _blocks_renumbered(source: State, chosen: list[int], config: Any) -> State:
    """The weights of the chosen blocks (from 1) as blocks 0, 1, ..., and all that belongs to no block."""
    matches = {key: _BLOCK_KEY.match(key) for key in source}
    lists = {match[1] for match in matches.values() if match}
    numbers = {int(match[2]) for match in matches.values() if match}
    if len(lists) != 1 or numbers != set(range(config.num_hidden_layers)):
        why = "its layers share one block" if config.model_type == "albert" else "its blocks do not stand in one list"
        raise ValueError(
            f"from_teacher cannot take layers of this {config.model_type}: {why}; give student.model or student.config"
        )
    state = {key: tensor for key, tensor in source.items() if not matches[key]}
    for new, block in enumerate(chosen):
        for key, match in matches.items():
            if match and int(match[2]) == block - 1:
                state[f"{match[1]}{new}{match[3]}"] = source[key]
    if config.model_type == "modernbert":
        _fit_first_norm(state, lists.pop(), chosen)
    return state


def _fit_first_norm(state: State, blocks: str, chosen: list[int]) -> None:
    """ModernBERT's first block alone has no norm before its attention.

    The norm of another block in its place is folded into the attention's weights but for the normalization itself: the
    embeddings come normalized.
    """
    if 1 in chosen[1:]:
        raise ValueError(
            "from_teacher.select: block 1 of a modernbert has no norm before its attention, it can only be the first, "
            f"got {chosen}"
        )
    scale = state.pop(f"{blocks}0.attn_norm.weight", None)
    bias = state.pop(f"{blocks}0.attn_norm.bias", None)
    if scale is None:
        return
    weight, own_bias = f"{blocks}0.attn.Wqkv.weight", f"{blocks}0.attn.Wqkv.bias"
    if bias is not None and own_bias in state:
        state[own_bias] = state[own_bias] + state[weight] @ bias
    state[weight] = state[weight] * scale


def _distilbert_state(bert: State, layers: int) -> State:
    source = {key.removeprefix("bert."): tensor for key, tensor in bert.items()}
    positions = source["embeddings.position_embeddings.weight"]
    state = {
        "embeddings.word_embeddings.weight": source["embeddings.word_embeddings.weight"],
        "embeddings.position_embeddings.weight": positions + source["embeddings.token_type_embeddings.weight"][0],
    }
    for kind in ("weight", "bias"):
        state[f"embeddings.LayerNorm.{kind}"] = source[f"embeddings.LayerNorm.{kind}"]
        for block in range(layers):
            for theirs, ours in _BERT_TO_DISTILBERT_BLOCK.items():
                state[f"transformer.layer.{block}.{ours}.{kind}"] = source[f"encoder.layer.{block}.{theirs}.{kind}"]
    state = {f"distilbert.{key}": tensor for key, tensor in state.items()}
    if "classifier.weight" in source:
        pooler, classifier = (
            {kind: source[f"{name}.{kind}"] for kind in ("weight", "bias")} for name in ("pooler.dense", "classifier")
        )
        state |= distilbert_head(pooler, classifier)
    return state


def _distilbert_settings(bert: Any, layers: int, sizes: Sizes) -> dict[str, Any]:
    return {
        "n_layers": layers,
        "dim": sizes.width,
        "n_heads": sizes.heads,
        "hidden_dim": sizes.intermediate_size,
        "activation": bert.hidden_act,
        "vocab_size": bert.vocab_size,
        "max_position_embeddings": bert.max_position_embeddings,
        "dropout": bert.hidden_dropout_prob,
        "attention_dropout": bert.attention_probs_dropout_prob,
        "initializer_range": bert.initializer_range,
        "pad_token_id": bert.pad_token_id,
    }


def _load(student: PreTrainedModel, state: State, model_type: str, settings: dict[str, Any]) -> bool:
    """Puts the weights in their places; whether the whole head was among them.

    A pooler is part of the head: of some families the encoder alone has one, of others only the classifier.
    """
    prefix = f"{student.base_model_prefix}."
    wanted = student.state_dict()
    pooler = f"{prefix}pooler."
    state = {key: tensor for key, tensor in state.items() if key in wanted or not key.startswith(pooler)}
    head = {name for name, _ in student.named_parameters() if not name.startswith(prefix)}
    if any(key not in state or state[key].shape != wanted[key].shape for key in head):
        state = {key: tensor for key, tensor in state.items() if key.startswith(prefix)}
    for key, tensor in state.items():
        if key in wanted and tensor.shape != wanted[key].shape:
            ours, own = tuple(wanted[key].shape), tuple(tensor.shape)
            names = ", ".join(sorted(settings.keys() - {"id2label", "label2id", "problem_type"}))
            raise ValueError(f"overrides ({names}) make {key} {ours}, the teacher has {own}: leave the size out")
    result = student.load_state_dict(state, strict=False)
    # Buffers such as position_ids are made by the student itself; a parameter left at random would be a silent loss.
    parameters = {name for name, _ in student.named_parameters() if not name.startswith(pooler)}
    missing = (parameters & set(result.missing_keys)) - head
    if left := sorted(missing) or sorted(result.unexpected_keys):
        raise ValueError(f"from_teacher cannot copy a {model_type}: {', '.join(left[:3])} has no partner")
    return head <= state.keys()


def _line(teacher: Any, student: Any, chosen: list[int], copied: bool, sizes: Sizes | None) -> str:
    blocks = f"{len(chosen)} of {teacher.num_hidden_layers} blocks ({', '.join(map(str, chosen))})"
    parts = [f"student: {blocks} of {teacher.model_type}", student.model_type]
    if sizes is not None:
        parts.append(f"width {sizes.width}, {sizes.heads} heads, {sizes.intermediate_size} neurons")
    return ", ".join([*parts, "head copied" if copied else "head random"])
