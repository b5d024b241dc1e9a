"""Latency, throughput and memory of several models, measured in turns so that a drifting machine favours none."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from distill_nlp.config import ReportSection
from distill_nlp.inference import collate
from distill_nlp.report.memory import pass_memory


class Timed(Protocol):
    """A model of any kind with the rows as it reads them."""

    rows: Sequence[dict[str, Any]]

    def prepare(self, device: Any) -> None:
        """Makes it ready to run there."""

    def seconds(self, part: Sequence[int], device: Any) -> float:
        """The time of one pass over these rows, padded to the longest; padding is not in it."""


@dataclass
class Run:
    """A PyTorch model with the rows as it reads them, and the tokenizer that pads these."""

    model: nn.Module
    tokenizer: Any
    rows: Sequence[dict[str, Any]]

    def prepare(self, device: Any) -> None:
        self.model.eval().to(device)

    def seconds(self, part: Sequence[int], device: Any) -> float:
        batch = collate(self.tokenizer, [self.rows[i] for i in part], self.model, device)
        return _time(self.model, batch, device)


def measure_speed(
    timed: Mapping[str, Sequence[Timed]], settings: ReportSection, device: Any
) -> dict[str, dict[str, Any]]:
    """Times forward passes on real rows at their real lengths; preparing them is not in it. Then their memory.

    Latency: one row at a time, the same rows for each model, in turns. Throughput: batches of
    `throughput_batch_size` rows padded to the longest, in turns. Memory: one batch of that size of the longest rows.

    Args:
        timed: name -> the models behind it, one, or those of an ensemble, whose times add up.
        settings: how much to measure.
        device: where.

    Returns:
        name -> `latency_ms` with p50, p95 and p99, `throughput` in rows per second (the median batch's), and
        `pass_memory`, see `pass_memory`; an ensemble's is that of the one that takes most.
    """
    rng = np.random.default_rng(0)
    count = len(next(iter(timed.values()))[0].rows)
    single = [[i] for i in rng.choice(count, size=min(settings.latency_samples, count), replace=False)]
    size = settings.throughput_batch_size
    batches = [rng.integers(count, size=size) for _ in range(settings.throughput_batches)]
    times: dict[str, dict[str, list[float]]] = {name: {"single": [], "batch": []} for name in timed}
    for run in chain.from_iterable(timed.values()):
        run.prepare(device)
    for kind, inputs in (("single", single), ("batch", batches)):
        # A GPU loads its kernels for a length when it meets it first: whoever comes first would pay for all.
        warming = list(inputs) if torch.device(device).type != "cpu" else inputs[:1]
        for turn, part in enumerate([*warming, *inputs]):
            for name, runs in timed.items():
                seconds = sum(run.seconds(part, device) for run in runs)
                if turn >= len(warming):
                    times[name][kind].append(seconds)
    return {
        name: {
            "latency_ms": {f"p{p}": round(float(np.percentile(t["single"], p)) * 1000, 3) for p in (50, 95, 99)},
            "throughput": round(size / float(np.median(t["batch"])), 1),
            "pass_memory": _most_memory(timed[name], size, device),
        }
        for name, t in times.items()
    }


def _most_memory(runs: Sequence[Timed], size: int, device: Any) -> dict[str, Any]:
    found = []
    for run in runs:
        # Rows that are no texts are all of one length.
        lengths = [len(row.get("input_ids", ())) for row in run.rows]
        longest = sorted(range(len(lengths)), key=lambda i: -lengths[i])[:size]
        found.append(pass_memory(lambda run=run, part=longest: run.seconds(part, device), device))
    return {"rows": min(size, len(runs[0].rows)), **max(found, key=lambda memory: memory["mb"] or 0.0)}


def _time(model: nn.Module, inputs: dict[str, torch.Tensor], device: Any) -> float:
    # An accelerator works on while the program does.
    synchronize = torch.accelerator.synchronize if torch.device(device).type != "cpu" else lambda: None
    with torch.inference_mode():
        synchronize()
        start = time.perf_counter()
        model(**inputs)
        synchronize()
        return time.perf_counter() - start
