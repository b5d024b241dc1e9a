"""Fused attention in the precision that a CPU is quickest in: bfloat16 but for the backward pass of short rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

# PyTorch's backward pass in bfloat16 takes five times that in float32 at 20 tokens, twice at 128, the same from 256 on
# (benchmarks/speed, part short).
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
        (B, S, A, D) in the type of `query`; and None in the place of the map.
    """
    if not (
        query.device.type == "cpu"
        and query.dtype == torch.bfloat16
        and query.requires_grad
        and max(query.shape[2], key.shape[2]) < _SHORT
    ):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    # Autocast would take them to bfloat16 again.
    with torch.autocast("cpu", enabled=False):
        output, maps = sdpa_attention_forward(
            module, query.float(), key.float(), value.float(), attention_mask, **settings
        )
    return output.to(query.dtype), maps
