"""Hidden states and attention inputs of chosen layers, with the model on fused (SDPA) attention.

Transformers returns attention maps only in eager mode, and there after dropout. Here the model's attention function is
replaced by one that runs SDPA unchanged and, inside `forward_with_features`, keeps the queries, keys and values of the
layers asked for; a loss computes the maps it needs from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from distill_nlp.outputs import AttentionInputs, Features

ATTENTION_NAME = "distill_nlp_sdpa"


class _Collector:
    """Counts the attention calls of one forward pass: the n-th call is layer n, also where layers share weights."""

    def __init__(self, layers: set[int]) -> None:
        self.layers = layers
        self.calls = 0
        self.attentions: dict[int, AttentionInputs] = {}


_active: ContextVar[_Collector | None] = ContextVar("distill_nlp_collector", default=None)


def _capturing_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    collector = _active.get()
    if collector is not None:
        collector.calls += 1
        if collector.calls in collector.layers:
            inputs = _attention_inputs(module, query, key, value, attention_mask, scaling, **kwargs)
            collector.attentions[collector.calls] = inputs
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


def _attention_inputs(module, query, key, value, mask, scaling, is_causal=None, position_bias=None, **kwargs):
    """What the map can be computed again from: all that SDPA would otherwise do by itself is done here."""
    if position_bias is not None:
        raise ValueError(
            f"{type(module).__name__} adds a position bias to its scores, so that its map does not follow from queries "
            "and keys; use hidden-state losses or losses of the logits for it"
        )
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if mask is None and is_causal:
        mask = query.new_ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()[None, None]
    if key.shape[1] != query.shape[1]:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    return AttentionInputs(query, key, value, mask, query.shape[-1] ** -0.5 if scaling is None else scaling)


AttentionInterface.register(ATTENTION_NAME, _capturing_attention)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


def enable_attention_capture(model: nn.Module) -> None:
    """Puts the model on the capturing attention function. Its outputs stay those of SDPA.

    Raises:
        ValueError: the model does not go through Transformers' attention interface.
    """
    if isinstance(model, PreTrainedModel) and model._can_set_attn_implementation():
        model.set_attn_implementation(ATTENTION_NAME)
    if getattr(getattr(model, "config", None), "_attn_implementation", None) != ATTENTION_NAME:
        raise ValueError(
            f"{type(model).__name__} does not use Transformers' attention interface, so that its queries and keys "
            "cannot be captured; use hidden-state losses or losses of the logits for it"
        )


@contextmanager
def _collecting(layers: set[int]) -> Iterator[_Collector]:
    collector = _Collector(layers)
    token = _active.set(collector)
    try:
        yield collector
    finally:
        _active.reset(token)


def forward_with_features(
    model: Callable[..., Any], inputs: dict[str, Any], hidden_state_layers: set[int], attention_layers: set[int]
) -> Features:
    """Runs the model once and gives its logits with the layers asked for.

    Args:
        model: gives an object with `.logits`, a dict with "logits", or the logits themselves.
        inputs: its keyword arguments.
        hidden_state_layers: 0 is the embeddings' output, n the output of block n.
        attention_layers: n is block n; the model must have gone through `enable_attention_capture`.

    Raises:
        ValueError: the model gave fewer layers than asked for.
    """
    if hidden_state_layers:
        inputs = {**inputs, "output_hidden_states": True}
    with _collecting(attention_layers) as collector:
        outputs = model(**inputs)
    name = type(model).__name__

    hidden_states = {}
    if hidden_state_layers:
        all_states = getattr(outputs, "hidden_states", None) or ()
        if len(all_states) <= max(hidden_state_layers):
            raise ValueError(
                f"{name} returned {len(all_states)} hidden states (embeddings and blocks), but a loss reads layer "
                f"{max(hidden_state_layers)}"
            )
        hidden_states = {layer: all_states[layer] for layer in hidden_state_layers}
    if missing := attention_layers - collector.attentions.keys():
        raise ValueError(
            f"{name} made {collector.calls} calls of its attention function, but a loss reads layers "
            f"{sorted(missing)}; is it on the capturing attention (`enable_attention_capture`)?"
        )
    return Features(logits_of(outputs), hidden_states, collector.attentions)


def logits_of(outputs: Any) -> Any:
    """The logits in what a model returned: a Transformers output, a dict, a tuple (first), or a tensor."""
    if hasattr(outputs, "logits"):
        return outputs.logits
    if isinstance(outputs, dict):
        return outputs["logits"]
    return outputs[0] if isinstance(outputs, tuple) else outputs
