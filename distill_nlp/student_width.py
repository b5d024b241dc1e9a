"""Cuts a BERT or one of its kin to a smaller width, fewer or smaller heads and fewer feed-forward neurons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Sizes:
    """Sizes of a block.

    Args:
        width: of the hidden states.
        heads: attention heads.
        intermediate_size: neurons of the feed-forward part.
    """

    width: int
    heads: int
    intermediate_size: int

    @classmethod
    def of(cls, config: Any) -> Sizes:
        """Those of a model, by the common names of its config (through its `attribute_map`)."""
        own = getattr(config, "intermediate_size", None) or getattr(config, "hidden_dim", None)
        return cls(config.hidden_size, config.num_attention_heads, own)


@dataclass(frozen=True)
class _Names:
    """What the linear layers of a family are called: those of a block, and those of the head."""

    blocks: str
    pooled: str
    scores: str = "classifier"
    query: str = "attention.self.query"
    key: str = "attention.self.key"
    value: str = "attention.self.value"
    out: str = "attention.output.dense"
    up: str = "intermediate.dense"
    down: str = "output.dense"


_ROBERTA = _Names("roberta.encoder.layer.", "classifier.dense", "classifier.out_proj")
_FAMILIES = {
    "bert": _Names("bert.encoder.layer.", "bert.pooler.dense"),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "electra": _Names("electra.encoder.layer.", "classifier.dense", "classifier.out_proj"),
    "distilbert": _Names(
        blocks="distilbert.transformer.layer.",
        pooled="pre_classifier",
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        out="attention.out_lin",
        up="ffn.lin1",
        down="ffn.lin2",
    ),
}
# From embeddings of another width to the states, where a family may have such.
_PROJECTED = "electra.embeddings_project"


def choose_sizes(config: Any, width: int | None, heads: int | None, intermediate_size: int | None) -> Sizes:
    """The student's sizes; what is not given follows from the width, and at full width is the teacher's.

    Args:
        config: the teacher's.
        width: of the hidden states, at most the teacher's.
        heads: attention heads. Else as many as keep the size of a head, or, where the width is no multiple of that, as
            few as make none larger.
        intermediate_size: neurons of the feed-forward part. Else 4 · width, at most the teacher's.

    Raises:
        ValueError: a family that cannot be cut, or a size that is out of range.
    """
    teacher = Sizes.of(config)
    if width is heads is intermediate_size is None:
        return teacher
    if config.model_type not in _FAMILIES:
        raise ValueError(
            f"from_teacher.width, heads and intermediate_size cut {', '.join(_FAMILIES)}, this is {config.model_type}: "
            "leave them out"
        )
    full = width in (None, teacher.width)
    chosen = _within("width", width, teacher.width)
    embedded = getattr(config, "embedding_size", teacher.width)
    if embedded != teacher.width and chosen == embedded:
        raise ValueError(
            f"from_teacher.width {chosen} is that of the embeddings, and a {config.model_type} of that width has no "
            "projection from them, as this teacher has one: take another width"
        )
    neurons = teacher.intermediate_size if full else min(4 * chosen, teacher.intermediate_size)
    if intermediate_size is not None:
        neurons = _within("intermediate_size", intermediate_size, teacher.intermediate_size)
    largest = teacher.width // teacher.heads
    fitting = [n for n in range(1, teacher.heads + 1) if chosen % n == 0 and chosen // n <= largest]
    if heads is None:
        if not fitting:
            raise ValueError(
                f"from_teacher.width {chosen} cannot be shared by at most {teacher.heads} heads of at most {largest} "
                f"(the teacher's): take a multiple of {largest}"
            )
        return Sizes(chosen, fitting[0], neurons)
    if not is_whole(heads) or heads not in fitting:
        possible = ", ".join(map(str, fitting)) or "none"
        raise ValueError(
            f"from_teacher.heads must share the width {chosen} among at most {teacher.heads} heads of at most "
            f"{largest} (the teacher's), got {heads}; possible: {possible}"
        )
    return Sizes(chosen, heads, neurons)


def _within(name: str, value: int | None, limit: int) -> int:
    if value is None:
        return limit
    if not is_whole(value) or not 1 <= value <= limit:
        raise ValueError(f"from_teacher.{name} must be in 1..{limit} (the teacher's), got {value!r}")
    return value


def is_whole(value: Any) -> bool:
    """A number of layers, columns or heads; a truth value is none."""
    return isinstance(value, int) and not isinstance(value, bool)


@torch.no_grad()
def cut(state: State, model_type: str, teacher: Sizes, student: Sizes, depth: int) -> State:
    """The weights of the smaller model, by weights alone: no text is read.

    - Hidden states: the columns on which the LayerNorms have the largest mean scale |γ|. These carry most of the
      states' variance. LayerNorm's scale and bias stay exact per column; its mean and variance are over the columns
      kept, which is an approximation. (A basis from the SVD of embeddings and weights keeps no more of the last layer,
      because a rotated LayerNorm has no scale per column: see `docs/students.md`.)
    - Heads of the teacher's size: those with the largest ‖W_o W_v‖. Smaller ones: of each of these heads the truncated
      SVD of W_qᵀ W_k (biases included) and of W_o W_v.
    - Neurons: the largest ‖row of W_1‖ · ‖column of W_2‖; so too those of the pooler under the classifier.

    What keeps its size keeps its weights.

    Args:
        state: weights by their names in the classifier, blocks numbered from 0; the head may be missing.
        model_type: "bert", "roberta", "electra", "distilbert" and so on.
        teacher: sizes of `state`.
        student: sizes wanted, see `choose_sizes`.
        depth: number of blocks.

    Returns:
        A new dict, in float32.
    """
    names = _FAMILIES[model_type]
    state = {key: tensor.float() for key, tensor in state.items()}
    columns = _largest(_column_scales(state, teacher.width), student.width)
    for key, tensor in state.items():
        # Embeddings that are projected to the width, and their norm, have a width of their own.
        if ("_embeddings." in key or _is_norm(key)) and tensor.shape[-1] == teacher.width:
            state[key] = tensor[..., columns]
    if f"{_PROJECTED}.weight" in state:
        _cut_linear(state, _PROJECTED, columns, None)
    for block in range(depth):
        prefix = f"{names.blocks}{block}."
        _cut_attention(state, names, prefix, columns, teacher, student)
        up, down = prefix + names.up, prefix + names.down
        _cut_linear(state, up, None, columns)
        _cut_linear(state, down, columns, None)
        _keep_neurons(state, up, down, student.intermediate_size)
    if f"{names.pooled}.weight" in state:
        _cut_linear(state, names.pooled, None, columns)
        _keep_neurons(state, names.pooled, names.scores, student.width)
    return state


def _is_norm(key: str) -> bool:
    return "layernorm" in key.lower() or "layer_norm" in key


def _column_scales(state: State, width: int) -> torch.Tensor:
    """Mean |γ| of each column over the LayerNorms of the states.  (H,)"""
    scales = [t.abs() for key, t in state.items() if _is_norm(key) and key.endswith(".weight") and len(t) == width]
    return torch.stack(scales).mean(0)


def _largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Where the largest are, in their order; of equal ones the first."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def _cut_linear(state: State, name: str, rows: torch.Tensor | None, columns: torch.Tensor | None) -> None:
    """Keeps these outputs and these inputs; None: all."""
    weight, bias = f"{name}.weight", f"{name}.bias"
    if columns is not None:
        state[weight] = state[weight][:, columns]
    if rows is not None:
        state[weight], state[bias] = state[weight][rows], state[bias][rows]


def _keep_neurons(state: State, up: str, down: str, count: int) -> None:
    """Keeps so many neurons between two linear layers, of which the second may be missing."""
    scores = state[f"{up}.weight"].norm(dim=1)
    below = f"{down}.weight" in state
    if below:
        scores = scores * state[f"{down}.weight"].norm(dim=0)
    kept = _largest(scores, count)
    _cut_linear(state, up, kept, None)
    if below:
        _cut_linear(state, down, None, kept)


def _cut_attention(
    state: State, names: _Names, block: str, columns: torch.Tensor, teacher: Sizes, student: Sizes
) -> None:
    query, key, value, out = (block + name for name in (names.query, names.key, names.value, names.out))
    for name in (query, key, value):
        _cut_linear(state, name, None, columns)
    _cut_linear(state, out, columns, None)
    size, smaller = teacher.width // teacher.heads, student.width // student.heads
    writes = state[f"{out}.weight"].unflatten(1, (teacher.heads, size)).permute(1, 0, 2)  # (heads, width, size)
    reads = state[f"{value}.weight"].unflatten(0, (teacher.heads, size))  # (heads, size, width)
    # ‖W_o W_v‖² = tr(W_oᵀ W_o · W_v W_vᵀ), of the size of a head instead of the width's.
    strength = ((writes.mT @ writes) * (reads @ reads.mT)).sum((1, 2))
    kept = _largest(strength, student.heads)
    rows = (kept[:, None] * size + torch.arange(size)).flatten()
    for name in (query, key, value):
        _cut_linear(state, name, rows, None)
    _cut_linear(state, out, None, rows)
    if smaller == size:
        return
    queries, keys, values = (_with_bias(state, name, student.heads) for name in (query, key, value))
    writes = state[f"{out}.weight"].unflatten(1, (student.heads, size)).permute(1, 0, 2)
    queries, keys = _truncated(queries.mT, keys, smaller)
    # Scores are divided by the root of the head's size.
    _put_with_bias(state, query, queries.mT * (smaller / size) ** 0.5)
    _put_with_bias(state, key, keys)
    writes, values = _truncated(writes, values, smaller)
    _put_with_bias(state, value, values)
    state[f"{out}.weight"] = writes.permute(1, 0, 2).flatten(1)


def _with_bias(state: State, name: str, heads: int) -> torch.Tensor:
    """Weight and bias side by side, by heads.  (heads, size, width + 1)"""
    return torch.cat([state[f"{name}.weight"], state[f"{name}.bias"][:, None]], dim=1).unflatten(0, (heads, -1))


def _put_with_bias(state: State, name: str, both: torch.Tensor) -> None:
    both = both.flatten(0, 1)
    state[f"{name}.weight"], state[f"{name}.bias"] = both[:, :-1], both[:, -1]


def _truncated(left: torch.Tensor, right: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two factors of this rank whose product is closest to `left @ right`; (..., m, n), (..., n, k)."""
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.mT)
    u, values, vh = torch.linalg.svd(r_left @ r_right.mT)
    root = values[..., :rank].sqrt()
    return q_left @ u[..., :rank] * root[..., None, :], root[..., None] * (vh[..., :rank, :] @ q_right.mT)
