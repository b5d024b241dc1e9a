"""The precision of trainings that name none: bfloat16 where a short measurement finds this machine quick at it."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from distill_nlp.capture import enable_quick_attention
from distill_nlp.config import Experiment
from distill_nlp.out_of_memory import that_fit

# Time of a step in bfloat16, as a part of that in float32, from which on it is worth its rounding.
_WORTH = 0.9
# Smaller students than that, embeddings not counted, are quick in any precision, and their steps hard to time.
_LEAST_PARAMETERS = 1_000_000
_SECONDS_PER_PASS = 0.25


def computes_bf16(device: str) -> bool:
    """Whether a type of device has bfloat16 arithmetic, as far as PyTorch tells."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "cpu":
        # Without instructions for it, oneDNN has no bfloat16 kernels and PyTorch converts back and forth.
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) if torch.backends.mkldnn.is_available() else False
    return True


def is_open(experiment: Experiment) -> bool:
    """Whether neither the settings nor the launcher name a precision; DeepSpeed's own settings do."""
    if os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no":
        return False
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" or getattr(experiment.training, "deepspeed", None):
        return False
    return not {"bf16", "fp16"} & experiment.training.model_fields_set


def settle_precision(experiment: Experiment, bf16: bool) -> None:
    """Writes the precision into the settings, where it is open; a teacher's or a phase's own stays."""
    experiment.training.bf16 = bf16
    for own in (experiment.teacher.training, *(phase.training for phase in experiment.phases)):
        if own.fp16:
            own.bf16 = False


def precision_of(record: dict[str, Any] | None) -> bool:
    """Whether a run began in bfloat16, by its `config.json`; one in float16 has that in its settings."""
    return bool(((record or {}).get("training") or {}).get("bf16", False))


def prefers_bf16(
    make: Callable[[], nn.Module], rows: int, tokens: int, device: torch.device, seconds: float = 1.0
) -> tuple[bool, str | None]:
    """Whether to train in bfloat16 here, and one line that says why; None where there was nothing to find out.

    Args:
        make: gives the student; called only if the device may gain.
        rows: of a batch.
        tokens: of a usual row.
        device: that it trains on.
        seconds: to measure for, roughly.

    Example:
        >>> prefers_bf16(lambda: student, rows=16, tokens=128, device=torch.device("cpu"))
        (True, 'bf16: a step in bf16 takes 0.61 of its time in fp32 on this cpu (16 rows of 128 tokens)')
    """
    if device.type not in ("cpu", "cuda") or not computes_bf16(device.type):
        return False, None
    model = make()
    embeddings = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding))
    if sum(p.numel() for p in model.parameters()) - embeddings < _LEAST_PARAMETERS:
        return False, None
    ratio, rows = bf16_ratio(model.to(device), rows, tokens, seconds)
    chosen = ratio < _WORTH
    measured = f"{rows} row{'s' * (rows > 1)} of {tokens} tokens"
    return chosen, (
        f"{'bf16' if chosen else 'fp32'}: a step in bf16 takes {ratio:.2f} of its time in fp32 on this {device.type} "
        f"({measured})"
    )


def bf16_ratio(model: nn.Module, rows: int, tokens: int, seconds: float = 1.0) -> tuple[float, int]:
    """Time of a forward and backward pass under bfloat16 autocast, as a part of that in float32.

    The two take turns; the median of the turns' ratios counts. Where a pass of the batch would take too long, or does
    not fit into the memory, one of fewer rows is measured.

    Args:
        model: with logits and a `config`; in training mode afterwards, without gradients.
        rows, tokens: of the batch, whose ids are random.
        seconds: to measure for, roughly; three turns at least.

    Returns:
        The ratio, and the rows that it was measured on.
    """
    device = next(model.parameters()).device
    model.train()
    if device.type == "cpu":
        enable_quick_attention(model)

    def timed(rows: int, bf16: bool) -> float:
        ids = torch.randint(model.config.vocab_size, (rows, tokens), device=device)
        _wait(device)
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        logits.float().sum().backward()
        _wait(device)
        passed = time.perf_counter() - start
        model.zero_grad(set_to_none=True)
        return passed

    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        # The first passes allocate and choose kernels.
        for bf16 in (False, True):
            timed(1, bf16)
        # On a GPU one row tells nothing of many: its pass takes what launching kernels takes.
        if device.type == "cpu":
            one = min(timed(1, False) for _ in range(2))
            rows = max(1, min(rows, int(_SECONDS_PER_PASS / one)))
        rows = that_fit(rows, lambda rows: [timed(rows, bf16) for bf16 in (False, True)])
        ratios, end = [], time.perf_counter() + seconds
        while len(ratios) < 3 or time.perf_counter() < end:
            order = (False, True) if len(ratios) % 2 else (True, False)
            passed = {bf16: timed(rows, bf16) for bf16 in order}
            ratios.append(passed[True] / passed[False])
    return statistics.median(ratios), rows


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
