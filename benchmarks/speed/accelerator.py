"""Tokens per second, utilisation and memory of a GPU in bfloat16: bare loops and trainers, eager and compiled."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import torch
from loops import Bare, Trained
from measuring import Figures, in_a_process_of_its_own, measured
from memory import begin_peak, peak_since
from workloads import MODELS, Pair, fixed_rows

# Dense bfloat16 FLOP/s by the makers' data sheets; the first pattern that a device's name holds.
PEAK = {
    r"\bH200\b": 989e12,
    r"\bH100 PCIe\b": 756e12,
    r"\bH100 NVL\b": 835e12,
    r"\bH100\b": 989e12,
    r"\bA100\b": 312e12,
    r"\bL40S\b": 362e12,
    r"\bL4\b": 121e12,
}
# Batches of the bare loops lie on the device: what a trainer's loading costs is the difference.
_BARE = Bare(bf16=True, teacher_bf16=True, attention_dropout=0.0, fused=True, ready=True)
_OURS = Trained(bf16=True, attention_dropout=0.0)
WAYS: dict[str, Bare | Trained] = {
    "bare loop, teacher live": _BARE,
    "bare loop, compiled student": replace(_BARE, compiled=True),
    "DistillationTrainer, KL": _OURS,
    "DistillationTrainer, KL, compiled student": replace(_OURS, more={"torch_compile": True}),
    "DistillationTrainer, KL, cached": replace(_OURS, teacher="cached"),
}


def tables(pair: Pair, rows: int, shapes: str, rounds: int) -> Iterator[tuple[str, dict[str, Figures]]]:
    """For each of the shapes, `rows x tokens` of a batch, all ways; utilisation where the device's peak is known."""
    on_gpu = pair.device.type == "cuda"
    peak = peak_of_device(torch.cuda.get_device_name()) if on_gpu else None
    for shape in shapes.split(","):
        size, tokens = map(int, shape.split("x"))
        count = max(size, rows // size * size)
        data = fixed_rows(count, tokens)
        found = measured({name: way.on(pair, data, size) for name, way in WAYS.items()}, rounds)
        for name, way in WAYS.items():
            figures = found[name]
            figures["tokens_per_second"] = count * tokens / figures["seconds"]
            work = flops_of_a_token(pair, tokens, with_teacher=way.teacher == "live") * figures["tokens_per_second"]
            figures["utilisation"] = None if peak is None else work / peak
            figures["peak_gib"] = in_a_process_of_its_own(peak_here, way, pair, size, tokens) / 2**30
        yield f"{pair.name} pair, {count // size} steps of {shape}, bf16", found


def peak_of_device(name: str) -> float | None:
    """Dense bfloat16 FLOP/s; None of a device that is not known here.

    Example:
        >>> peak_of_device("NVIDIA H200")
        989000000000000.0
    """
    return next((value for pattern, value in PEAK.items() if re.search(pattern, name)), None)


def flops_of_a_token(pair: Pair, tokens: int, with_teacher: bool = True) -> float:
    """Multiplications and additions of a step for each token: the teacher forward, the student forward and backward."""
    width, _, teacher, student = MODELS[pair.name]
    # Of a block: 12 H² weights, twice each; scores and their use 4 S H.
    block = 24 * width**2 + 4 * tokens * width
    return block * (teacher * with_teacher + 3 * student)


def peak_here(way: Bare | Trained, pair: Pair, size: int, tokens: int) -> int:
    """Most bytes that this process holds in steps of a way, models and optimizer included; of a GPU those on it."""
    once = way.on(pair, fixed_rows(2 * size, tokens), size)
    # The optimizer's state is made in the first.
    once(0)
    if pair.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        once(1)
        return torch.cuda.max_memory_allocated()
    begin_peak()
    once(1)
    return peak_since()
