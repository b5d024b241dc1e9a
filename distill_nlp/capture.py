"""Hidden states and attention inputs of chosen layers, with the model on fused attention (SDPA or flash).

Transformers returns attention maps only in eager mode, and there after dropout. Here the model's attention function is
wrapped by one that runs it unchanged and, inside `forward_with_features`, keeps the queries, keys and values of the
layers asked for; a loss computes the maps it needs from them. MPNet, which calls no such function, has hooks instead.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial, reduce, wraps
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask
from transformers.models.mpnet.modeling_mpnet import MPNetSelfAttention
from transformers.utils import output_capturing

from distill_nlp.cpu_attention import attend
from distill_nlp.losses.base import depth_of
from distill_nlp.outputs import AttentionInputs, Features

ATTENTION_NAME = "distill_nlp_sdpa"

# `output_hidden_states=[0, 3]` keeps those two, in their places. Transformers before this function either keep all, or
# count a list in another way.
_SELECTS_HIDDEN_STATES = hasattr(output_capturing, "selected_hidden_states")


class _Collector:
    """Counts the attention calls of one forward pass: the n-th call is layer n, also where layers share weights."""

    def __init__(self, layers: set[int]) -> None:
        self.layers = layers
        self.calls = 0
        self.attentions: dict[int, AttentionInputs] = {}
        # What MPNet's linears gave in the call that is under way.
        self.projections: dict[str, torch.Tensor] = {}


class _Active(threading.local):
    """The collectors of the forward passes that this thread is in, the innermost last.

    torch.compile traces a list of a thread. A `ContextVar` it does not, nor does PyTorch 2.8 a single collector.
    """

    def __init__(self) -> None:
        self.collectors: list[_Collector] = []


_active = _Active()


def _capturing(function: Callable[..., Any]) -> Callable[..., Any]:
    """The attention function, which hands what it gets to the collector as well."""

    @wraps(function)
    def attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
        if _active.collectors:
            collector = _active.collectors[-1]
            collector.calls += 1
            if collector.calls in collector.layers:
                inputs = _attention_inputs(module, query, key, value, attention_mask, scaling, **kwargs)
                collector.attentions[collector.calls] = inputs
        return function(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)

    attention.is_capturing = True
    return attention


def _attention_inputs(module, query, key, value, mask, scaling, is_causal=None, sliding_window=None, **kwargs):
    """What the map can be computed again from: all that the attention function would do by itself is done here."""
    for name in ("position_bias", "softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__} changes its scores by {name}, so that its map does not follow from queries "
                "and keys; use hidden-state losses or losses of the logits for it"
            )
    if mask is None or mask.dim() == 2:
        # Only a mask of 4 dimensions spells causality and the window out; that of flash attention is (B, S).
        limits = [] if mask is None else [mask[:, None, None, :].bool()]
        positions = torch.arange(query.shape[2], device=query.device)
        distance = (positions[:, None] - positions)[None, None]
        if getattr(module, "is_causal", True) if is_causal is None else is_causal:
            limits.append(distance >= 0)
        if sliding_window is not None:
            limits.append(distance.abs() < sliding_window)
        mask = reduce(torch.logical_and, limits) if limits else None
    if key.shape[1] != query.shape[1]:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    return AttentionInputs(query, key, value, mask, query.shape[-1] ** -0.5 if scaling is None else scaling)


def _keep_projection(name: str, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
    """Forward hook of MPNet's linears for queries, keys and values."""
    if _active.collectors:
        collector = _active.collectors[-1]
        if collector.calls + 1 in collector.layers:
            collector.projections[name] = output


_KEEP_PROJECTION = {attribute: partial(_keep_projection, attribute) for attribute in ("q", "k", "v")}


def _keep_mpnet_attention(module: MPNetSelfAttention, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    """Forward hook of MPNet's attention."""
    if not _active.collectors:
        return
    collector = _active.collectors[-1]
    collector.calls += 1
    if collector.calls not in collector.layers:
        return
    mask, bias = _mask_and_bias(*args, **kwargs)
    size = module.attention_head_size
    query, key, value = (collector.projections.pop(name).unflatten(-1, (-1, size)).transpose(1, 2) for name in "qkv")
    # One bias for all rows, which MPNet repeats for each: a view would keep all of them.
    bias = None if bias is None else bias[:1].clone()
    collector.attentions[collector.calls] = AttentionInputs(query, key, value, mask, size**-0.5, bias)


def _mask_and_bias(hidden_states, attention_mask=None, position_bias=None, *_, **__):
    return attention_mask, position_bias


AttentionInterface.register(ATTENTION_NAME, _capturing(attend))
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


def enable_quick_attention(model: nn.Module) -> None:
    """Has a model on Transformers' SDPA attend by `cpu_attention`, to train on a CPU; leaves any other as it is."""
    if not isinstance(model, PreTrainedModel) or model.config._attn_implementation != "sdpa":
        return
    if model._can_set_attn_implementation():
        model.set_attn_implementation(ATTENTION_NAME)


def enable_attention_capture(model: nn.Module) -> None:
    """Makes the model's queries, keys and values available to `forward_with_features`.

    A model on flash attention stays on it; any other goes to SDPA, whose outputs are those of eager attention. MPNet
    stays as it is.

    Raises:
        ValueError: the model does not go through Transformers' attention interface, and is no MPNet.
    """
    if mpnet := [module for module in model.modules() if isinstance(module, MPNetSelfAttention)]:
        for module in mpnet:
            for attribute, hook in _KEEP_PROJECTION.items():
                _hook_once(getattr(module, attribute), hook)
            _hook_once(module, _keep_mpnet_attention, with_kwargs=True)
        return
    functions = AttentionInterface()
    if isinstance(model, PreTrainedModel) and model._can_set_attn_implementation():
        name = model.config._attn_implementation
        if "flash" not in str(name):
            model.set_attn_implementation(ATTENTION_NAME)
        elif not hasattr(functions[name], "is_capturing"):
            # Under its own name: Transformers finds the kernel, and makes the mask, by the name in the config.
            AttentionInterface.register(name, _capturing(functions[name]))
    name = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if not hasattr(functions.get(name), "is_capturing"):
        raise ValueError(
            f"{type(model).__name__} does not use Transformers' attention interface, so that its queries and keys "
            f"cannot be captured{_why(model)}; use hidden-state losses or losses of the logits for it"
        )


def _hook_once(module: nn.Module, hook: Callable[..., None], **settings: bool) -> None:
    if hook not in module._forward_hooks.values():
        module.register_forward_hook(hook, **settings)


def _why(model: nn.Module) -> str:
    """What stands in the way of hooks as MPNet has them, where it is known."""
    if getattr(getattr(model, "config", None), "model_type", None) in ("deberta", "deberta-v2"):
        return " (DeBERTa adds terms of relative positions to its scores, computed from the hidden states inside)"
    return ""


def forward_with_features(
    model: Callable[..., Any], inputs: dict[str, Any], hidden_state_layers: set[int], attention_layers: set[int]
) -> Features:
    """Runs the model once and gives its logits with the layers asked for.

    Args:
        model: gives an object with `.logits`, a dict with "logits", or the logits themselves.
        inputs: its keyword arguments.
        hidden_state_layers: 0 is the embeddings' output, n the output of block n; the last as Transformers gives it,
            after the final norm of a model that has one.
        attention_layers: n is block n; the model must have gone through `enable_attention_capture`.

    Raises:
        ValueError: the model gave fewer layers than asked for, or another number than its config says.
    """
    if hidden_state_layers:
        # A model with a loop of its own over its layers takes the list for True, and keeps all.
        wanted = sorted(hidden_state_layers) if _SELECTS_HIDDEN_STATES else True
        inputs = {**inputs, "output_hidden_states": wanted}
    collector = _Collector(attention_layers)
    _active.collectors.append(collector)
    try:
        outputs = model(**inputs)
    finally:
        _active.collectors.pop()
    name = type(model).__name__

    hidden_states = {}
    if hidden_state_layers:
        all_states = getattr(outputs, "hidden_states", None) or ()
        if len(all_states) <= max(hidden_state_layers):
            raise ValueError(
                f"{name} returned {len(all_states)} hidden states (embeddings and blocks), but a loss reads layer "
                f"{max(hidden_state_layers)}"
            )
        _check_depth(model, len(all_states) - 1, "hidden states after that of the embeddings")
        hidden_states = {layer: _as_positions(all_states[layer]) for layer in hidden_state_layers}
    if missing := attention_layers - collector.attentions.keys():
        raise ValueError(
            f"{name} made {collector.calls} calls of its attention function, but a loss reads layers "
            f"{sorted(missing)}; is it on the capturing attention (`enable_attention_capture`)?"
        )
    if attention_layers:
        _check_depth(model, collector.calls, "calls of its attention function")
    return Features(logits_of(outputs), hidden_states, collector.attentions)


def _as_positions(states: torch.Tensor) -> torch.Tensor:
    """States as a sequence: (B, H, rows, columns), channels first as convolutions give them -> (B, S, H)."""
    return states.flatten(2).transpose(1, 2) if states.dim() > 3 else states


def _check_depth(model: Callable[..., Any], count: int, what: str) -> None:
    """The n-th hidden state or call is taken for layer n, as the layer mapping counts them: by the config."""
    depth = depth_of(getattr(model, "config", None))
    if depth is not None and count != depth:
        raise ValueError(
            f"{type(model).__name__} made {count} {what}, but its config says num_hidden_layers={depth}, so that its "
            "layers cannot be told by number; use losses of the logits for it"
        )


def logits_of(outputs: Any) -> Any:
    """The logits in what a model returned: a Transformers output, a dict, a tuple (first), or a tensor."""
    if hasattr(outputs, "logits"):
        return outputs.logits
    if isinstance(outputs, dict):
        return outputs["logits"]
    return outputs[0] if isinstance(outputs, tuple) else outputs
