"""Latency and throughput of several models, measured in turns so that a drifting machine favours none."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from distill_nlp.config import ReportSection
from distill_nlp.inference import collate


@dataclass
class Run:
    """A model with the rows as it reads them, and the tokenizer that pads these."""

    model: nn.Module
    tokenizer: Any
    rows: Sequence[dict[str, Any]]


def measure_speed(
    timed: Mapping[str, Sequence[Run]], settings: ReportSection, device: Any
) -> dict[str, dict[str, Any]]:
    """Times forward passes on real rows at their real lengths; tokenization is not in it.

    Latency: one row at a time, the same rows for each model, in turns. Throughput: batches of
    `throughput_batch_size` rows padded to the longest, in turns.

    Args:
        timed: name -> the models behind it, one, or those of an ensemble, whose times add up.
        settings: how much to measure.
        device: where.

    Returns:
        name -> `latency_ms` with p50 and p95, and `throughput` in rows per second (the median batch's).
    """
    rng = np.random.default_rng(0)
    count = len(next(iter(timed.values()))[0].rows)
    single = [[i] for i in rng.choice(count, size=min(settings.latency_samples, count), replace=False)]
    size = settings.throughput_batch_size
    batches = [rng.integers(count, size=size) for _ in range(settings.throughput_batches)]
    times: dict[str, dict[str, list[float]]] = {name: {"single": [], "batch": []} for name in timed}
    for runs in timed.values():
        for run in runs:
            run.model.eval().to(device)
    for kind, inputs in (("single", single), ("batch", batches)):
        for turn, part in enumerate([inputs[0], *inputs]):
            for name, runs in timed.items():
                seconds = 0.0
                for run in runs:
                    batch = collate(run.tokenizer, [run.rows[i] for i in part], run.model, device)
                    seconds += _time(run.model, batch, device)
                if turn > 0:  # the first pass warms up
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
