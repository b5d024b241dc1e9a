"""What the teacher's cache saves in a training step, and what it costs to fill.

    python benchmarks/teacher_cache.py                     # 6 x 384 → 3 x 384, batches of 16, texts cut at 256 tokens
    python benchmarks/teacher_cache.py --steps 4 --fill_rows 128 --rounds 3

Steps: plain fine-tuning of the student, and distillation with the teacher live and from the cache, each with padding,
forward, backward and optimizer, over the same batches in turn; a ratio is that of the sums of one round, and the median
over rounds is reported. Filling, keys and shards included, is compared with a bare loop of forward passes over batches
of like lengths. Weights and token ids are random; lengths are those of IMDB reviews where the data set lies beside the
repository in ../shared/data, else drawn from a log-normal distribution like theirs.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import DataCollatorWithPadding, PreTrainedModel
from workloads import Pair, imdb_rows, padder

from distill_nlp import (
    CachedTeacher,
    CrossEntropyLoss,
    DistillationModel,
    DistillationObjective,
    KLDivergenceLoss,
    cache_teacher_logits,
)
from distill_nlp.teacher import bind_teacher

MAX_LENGTH = 256
Step = Callable[[list[int]], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="batches of a round")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--fill_rows", type=int, default=512)
    parser.add_argument("--fill_batch_size", type=int, default=64)
    parser.add_argument("--output", help="JSON file for the figures")
    options = parser.parse_args()
    pair = Pair("minilm", torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    data, _ = imdb_rows(options.steps * options.batch_size + options.fill_rows, MAX_LENGTH)
    figures = {
        "mean_tokens": sum(map(len, data["input_ids"])) / len(data),
        "steps": measure_steps(pair, data, options),
        "fill": measure_fill(pair.teacher(), data.select(range(options.fill_rows)), options),
    }
    print(json.dumps(figures, indent=1))
    if options.output:
        Path(options.output).write_text(json.dumps(figures, indent=1) + "\n")


def measure_steps(pair: Pair, data: Dataset, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a round by variant, and ratios to plain fine-tuning in the same round."""
    teacher, tokenizer, device = pair.teacher(), padder(), pair.device
    collate = DataCollatorWithPadding(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        cached = cache_teacher_logits(teacher, data, tokenizer, folder)
    steps: dict[str, Step] = {
        "plain": training_step(pair, None, data, collate),
        "live": training_step(pair, teacher, data, collate),
        "cached": training_step(pair, CachedTeacher(teacher.config), cached, collate),
    }
    size = options.batch_size
    rows = random.Random(0).sample(range(len(data)), options.steps * size)
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    for step in steps.values():
        step(batches[0])
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(options.rounds):
        sums = dict.fromkeys(steps, 0.0)
        for batch in batches:
            # Who goes first finds the caches as the one before left them.
            names = list(steps)[turn % 3 :] + list(steps)[: turn % 3]
            for name in names:
                sums[name] += timed(lambda step=steps[name], batch=batch: step(batch), device)
        for name, value in sums.items():
            seconds[name].append(value)
    found = {f"{name}_seconds": statistics.median(values) for name, values in seconds.items()}
    for name in ("live", "cached"):
        ratios = [a / b for a, b in zip(seconds[name], seconds["plain"], strict=True)]
        found |= {f"{name}_to_plain": statistics.median(ratios), f"{name}_to_plain_range": [min(ratios), max(ratios)]}
    return found


def training_step(pair: Pair, teacher: Any, data: Dataset, collate: Any) -> Step:
    """A step of the student: plain without a teacher, else with a KL divergence as well."""
    # With attention dropout, PyTorch's fused attention falls back to its slow path on a CPU.
    student = pair.student(attention_dropout=0.0)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)
    if teacher is None:

        def loss_of(batch: dict[str, Any]) -> torch.Tensor:
            return student(**batch).loss

    else:
        objective = DistillationObjective({"ce": CrossEntropyLoss(), "kl": KLDivergenceLoss(2.0)})
        model = DistillationModel(student, objective, teacher.config).train()
        answers = bind_teacher(teacher, student.config, objective)

        def loss_of(batch: dict[str, Any]) -> torch.Tensor:
            return model(teacher=answers(batch), **batch).loss

    def step(rows: list[int]) -> None:
        batch = {name: value.to(pair.device) for name, value in collate(data.__getitems__(rows)).items()}
        loss_of(batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure_fill(teacher: PreTrainedModel, data: Dataset, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of filling a cache and of the bare forward passes, and the ratio of their speeds."""
    device, tokenizer = teacher.device, padder()
    rows = data.select_columns(["input_ids", "attention_mask"]).to_list()
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
    size = options.fill_batch_size

    def bare() -> None:
        teacher.eval()
        for start in range(0, len(order), size):
            batch = tokenizer.pad([rows[i] for i in order[start : start + size]], return_tensors="pt").to(device)
            with torch.inference_mode():
                teacher(**batch).logits.float().cpu()

    def fill() -> None:
        with tempfile.TemporaryDirectory() as folder:
            cache_teacher_logits(teacher, data, tokenizer, folder, batch_size=size)

    seconds: dict[str, list[float]] = {"bare": [], "fill": []}
    bare()
    for turn in range(options.rounds):
        for name, work in [("bare", bare), ("fill", fill)][:: 1 if turn % 2 else -1]:
            seconds[name].append(timed(work, device))
    ratios = [bare / fill for bare, fill in zip(seconds["bare"], seconds["fill"], strict=True)]
    return {f"{name}_seconds": statistics.median(values) for name, values in seconds.items()} | {
        "speed_to_bare": statistics.median(ratios),
        "speed_to_bare_range": [min(ratios), max(ratios)],
    }


def timed(work: Callable[[], None], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
