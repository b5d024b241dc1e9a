"""Fused attention in the precision that a CPU is quickest in: bfloat16 but for the backward pass of short rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

# PyTorch's backward pass in bfloat16 is slower than that in float32 on short rows (benchmarks/speed, part short); on
# longer ones the two are alike.
_SHORT = 256


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' SDPA attention; what trains on short rows in bfloat16 on a CPU has it in float32.

    Args:
        module: that attends.
        query, key, value: (B, A, S, D).
        attention_mask: (B, 1, S, S), boolean or added to the scores; None for no limits.
        **settings: of `sdpa_attention_forward`.

    Returns:
        (B, S, A, D) in the type that PyTorch would give; and None in the place of the map.
    """
    inputs = query, key, value
    # Under autocast, some of them may be float32 still: rotary positions are.
    autocast = torch.is_autocast_enabled("cpu")
    kind = torch.get_autocast_dtype("cpu") if autocast else query.dtype
    if not (
        query.device.type == "cpu"
        and kind == torch.bfloat16
        and max(query.shape[2], key.shape[2]) < _SHORT
        and any(x.requires_grad for x in inputs)
    ):
        return sdpa_attention_forward(module, *inputs, attention_mask, **settings)
    settings = {name: _in_float32(x) for name, x in settings.items()}
    # Autocast would take them to bfloat16 again.
    with torch.autocast("cpu", enabled=False):
        output, maps = sdpa_attention_forward(
            module, *(x.float() for x in inputs), _in_float32(attention_mask), **settings
        )
    return output.to(kind), maps


def _in_float32(value: Any) -> Any:
    """A mask or bias that is added to the scores has their type; one of truth values, and all else, stays."""
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
