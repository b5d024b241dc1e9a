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

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedTokenizerFast,
)

from distill_nlp import (
    CachedTeacher,
    CrossEntropyLoss,
    DistillationModel,
    DistillationObjective,
    KLDivergenceLoss,
    cache_teacher_logits,
)
from distill_nlp.teacher import bind_teacher

VOCABULARY = 30522
MAX_LENGTH = 256
SHARED = Path(__file__).resolve().parents[2] / "shared"
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
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = {"vocab_size": VOCABULARY, "num_labels": 2, "max_position_embeddings": 512}
    teacher = BertForSequenceClassification(
        BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, **sizes)
    ).to(device)
    # With attention dropout, PyTorch's fused attention falls back to its slow path on a CPU.
    student_config = DistilBertConfig(dim=384, n_layers=3, n_heads=12, hidden_dim=1536, attention_dropout=0.0, **sizes)
    lengths = text_lengths(options.steps * options.batch_size + options.fill_rows)
    data, tokenizer = random_rows(lengths), make_tokenizer()

    figures = {
        "mean_tokens": sum(lengths) / len(lengths),
        "steps": measure_steps(teacher, student_config, data, tokenizer, options, device),
        "fill": measure_fill(teacher, data.select(range(options.fill_rows)), tokenizer, options),
    }
    print(json.dumps(figures, indent=1))
    if options.output:
        Path(options.output).write_text(json.dumps(figures, indent=1) + "\n")


def text_lengths(count: int) -> list[int]:
    """Lengths of reviews in tokens, cut."""
    reviews, vocabulary = SHARED / "data" / "imdb" / "train.parquet", SHARED / "models" / "bert-base-uncased-tokenizer"
    if not (reviews.is_file() and vocabulary.is_dir()):
        drawn = np.random.default_rng(0).lognormal(5.4, 0.65, count).astype(int)
        return np.clip(drawn, 12, MAX_LENGTH).tolist()
    from transformers import AutoTokenizer

    texts = Dataset.from_parquet(str(reviews)).shuffle(seed=0).select(range(count))["text"][:]
    encoded = AutoTokenizer.from_pretrained(vocabulary)(texts, truncation=True, max_length=MAX_LENGTH)
    return [len(ids) for ids in encoded["input_ids"]]


def random_rows(lengths: list[int]) -> Dataset:
    rng = np.random.default_rng(1)
    ids = [rng.integers(1000, VOCABULARY, length).tolist() for length in lengths]
    labels = rng.integers(0, 2, len(lengths)).tolist()
    return Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * n for n in lengths], "labels": labels})


def make_tokenizer() -> PreTrainedTokenizerFast:
    """It pads, and that is all."""
    tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]"))
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_input_names=names
    )


def measure_steps(teacher, student_config, data, tokenizer, options, device) -> dict[str, float]:
    """Seconds of a round by variant, and ratios to plain fine-tuning in the same round."""
    collate = DataCollatorWithPadding(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        cached = cache_teacher_logits(teacher, data, tokenizer, folder)
    steps: dict[str, Step] = {
        "plain": training_step(student_config, None, data, collate, device),
        "live": training_step(student_config, teacher, data, collate, device),
        "cached": training_step(student_config, CachedTeacher(teacher.config), cached, collate, device),
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


def training_step(student_config, teacher, data, collate, device) -> Step:
    """A step of the student: plain without a teacher, else with a KL divergence as well."""
    student = DistilBertForSequenceClassification(student_config).to(device).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)
    if teacher is None:

        def loss_of(batch: dict[str, Any]) -> torch.Tensor:
            return student(**batch).loss

    else:
        objective = DistillationObjective({"ce": CrossEntropyLoss(), "kl": KLDivergenceLoss(2.0)})
        model = DistillationModel(student, objective, teacher.config).train()
        answers = bind_teacher(teacher, student_config, objective)

        def loss_of(batch: dict[str, Any]) -> torch.Tensor:
            return model(teacher=answers(batch), **batch).loss

    def step(rows: list[int]) -> None:
        batch = {name: value.to(device) for name, value in collate(data.__getitems__(rows)).items()}
        loss_of(batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure_fill(teacher, data, tokenizer, options) -> dict[str, float]:
    """Seconds of filling a cache and of the bare forward passes, and the ratio of their speeds."""
    device = next(teacher.parameters()).device
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
