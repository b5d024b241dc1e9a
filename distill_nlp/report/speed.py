"""Latency and throughput of several models, measured in turns so that a drifting machine favours none."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from distill_nlp.config import ReportSection
from distill_nlp.inference import collate


def measure_speed(
    models: Mapping[str, nn.Module],
    tokenizer: Any,
    rows: Sequence[dict[str, Any]],
    settings: ReportSection,
    device: Any,
) -> dict[str, dict[str, Any]]:
    """Times forward passes on real rows at their real lengths; tokenization is not in it.

    Latency: one row at a time, the same rows for each model, in turns. Throughput: batches of
    `throughput_batch_size` rows padded to the longest, in turns.

    Returns:
        name -> `latency_ms` with p50 and p95, and `throughput` in rows per second (the median batch's).
    """
    rng = np.random.default_rng(0)
    single = [[rows[i]] for i in rng.choice(len(rows), size=min(settings.latency_samples, len(rows)), replace=False)]
    size = settings.throughput_batch_size
    batches = [[rows[i] for i in rng.integers(len(rows), size=size)] for _ in range(settings.throughput_batches)]
    times: dict[str, dict[str, list[float]]] = {name: {"single": [], "batch": []} for name in models}
    for model in models.values():
        model.eval().to(device)
    for kind, inputs in (("single", single), ("batch", batches)):
        for i, part in enumerate([inputs[0], *inputs]):
            for name, model in models.items():
                seconds = _time(model, collate(tokenizer, part, model, device), device)
                if i > 0:  # the first pass warms up
                    times[name][kind].append(seconds)
    return {
        name: {
            "latency_ms": {f"p{p}": round(float(np.percentile(t["single"], p)) * 1000, 3) for p in (50, 95)},
            "throughput": round(size / float(np.median(t["batch"])), 1),
        }
        for name, t in times.items()
    }


def _time(model: nn.Module, inputs: dict[str, torch.Tensor], device: Any) -> float:
    synchronize = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    with torch.inference_mode():
        synchronize()
        start = time.perf_counter()
        model(**inputs)
        synchronize()
        return time.perf_counter() - start
