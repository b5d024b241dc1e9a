"""Ways to train over the same rows: bare loops with each lever, and trainers; each gives the seconds of one pass."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from measuring import Pass, Seconds, wait_for
from plain import TEMPERATURE, PlainDistiller, divergence
from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments
from workloads import Pair, batches_of, padder

from distill_nlp import (
    AttentionLoss,
    CachedTeacher,
    DistillationArguments,
    DistillationTrainer,
    HiddenStateLoss,
    KLDivergenceLoss,
    cache_teacher_logits,
)
from distill_nlp.capture import enable_quick_attention

LEARNING_RATE = 1e-5


class Clock:
    """Wall and CPU time from `start` to `stop`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def start(self) -> None:
        wait_for(self.device)
        self._start = time.perf_counter(), time.process_time()

    def stop(self) -> Seconds:
        wait_for(self.device)
        return time.perf_counter() - self._start[0], time.process_time() - self._start[1]


@dataclass(frozen=True)
class Bare:
    """A loop without a trainer: the floor, and each lever on it.

    Args:
        teacher: "live", "cached" (its logits lie in memory), or "none": the labels alone.
        bf16, teacher_bf16: autocast of both; weights of the teacher.
        grouped: batches of like lengths.
        attention_dropout: of the student; above 0, PyTorch's attention on a CPU takes its slow path.
        fused: AdamW in one kernel.
        medium: float32 products in bfloat16, `torch.set_float32_matmul_precision("medium")`.
        parts: each batch is cut into so many, whose gradients add up to the batch's.
        teacher_at_once: the teacher runs once on the batch, not on each part.
        sorted_parts: whether the parts are of a batch in the order of its rows' lengths.
        compiled: the student by `torch.compile`.
        quick_attention: of the student, as a `DistillationModel` has it.
        ready: batches lie on the device before the clock starts.
    """

    teacher: str = "live"
    bf16: bool = False
    teacher_bf16: bool = False
    grouped: bool = False
    attention_dropout: float = 0.1
    fused: bool = False
    medium: bool = False
    parts: int = 1
    teacher_at_once: bool = False
    sorted_parts: bool = True
    compiled: bool = False
    quick_attention: bool = False
    ready: bool = False

    def on(self, pair: Pair, data: Dataset, size: int) -> Pass:
        """The pass over these rows in batches of so many."""
        collate, device = DataCollatorWithPadding(padder()), pair.device
        student = pair.student(self.attention_dropout)
        if self.quick_attention:
            enable_quick_attention(student)
        forward = torch.compile(student) if self.compiled else student
        optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, fused=self.fused)
        teacher = pair.teacher() if self.teacher != "none" else None
        if teacher is not None and self.teacher_bf16:
            teacher = teacher.to(torch.bfloat16)
        lengths = [len(ids) for ids in data["input_ids"]]
        known = torch.randn(len(data), 2, device=device)

        ahead: dict[tuple[int, ...], dict[str, torch.Tensor]] = {}

        def batch_of(rows: list[int]) -> dict[str, torch.Tensor]:
            if (made := ahead.get(tuple(rows))) is not None:
                return made
            return {name: value.to(device) for name, value in collate(data.__getitems__(rows)).items()}

        def autocast() -> torch.autocast:
            return torch.autocast(device.type, torch.bfloat16, enabled=self.bf16)

        def answers(batch: dict[str, torch.Tensor], rows: list[int]) -> torch.Tensor:
            if self.teacher == "cached":
                return known[rows]
            with torch.no_grad(), autocast():
                return teacher(batch["input_ids"], batch["attention_mask"]).logits.float()

        def loss_of(rows: list[int], target: torch.Tensor | None) -> torch.Tensor:
            batch = batch_of(rows)
            # Before the student's activations are in memory, as trainers do.
            if target is None and self.teacher != "none":
                target = answers(batch, rows)
            with autocast():
                logits = forward(batch["input_ids"], batch["attention_mask"]).logits.float()
            return F.cross_entropy(logits, batch["labels"]) if target is None else divergence(logits, target)

        def once(seed: int) -> Seconds:
            batches, clock = batches_of(data, size, self.grouped, seed), Clock(device)
            ahead.clear()
            if self.ready:
                ahead.update({tuple(rows): batch_of(rows) for rows in batches})
            with matmul_precision("medium" if self.medium else "highest"):
                clock.start()
                for rows in batches:
                    if self.parts > 1 and self.sorted_parts:
                        rows = sorted(rows, key=lambda row: lengths[row])
                    target = answers(batch_of(rows), rows) if self.teacher_at_once else None
                    each = -(-len(rows) // self.parts)
                    for first in range(0, len(rows), each):
                        part = slice(first, first + each)
                        loss = loss_of(rows[part], None if target is None else target[part])
                        (loss * (len(rows[part]) / len(rows))).backward()
                    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                return clock.stop()

        return once


@dataclass(frozen=True)
class Trained:
    """A trainer over the rows.

    Args:
        kind: "plain", a Trainer subclass as in tutorials, with its teacher in `compute_loss`; "labels", the stock
            Trainer without a teacher; "ours".
        teacher: "live" or "cached"; of "ours".
        losses: beside the KL divergence; of "ours".
        bf16, attention_dropout: as of `Bare`.
        grouped: batches of like lengths.
    """

    kind: str = "ours"
    teacher: str = "live"
    losses: tuple[str, ...] = ()
    bf16: bool = False
    grouped: bool = False
    attention_dropout: float = 0.1
    more: dict[str, Any] = field(default_factory=dict)

    def on(self, pair: Pair, data: Dataset, size: int) -> Pass:
        """The pass over these rows in batches of so many."""
        student, tokenizer, clock = pair.student(self.attention_dropout), padder(), Clock(pair.device)
        folder = tempfile.TemporaryDirectory()
        arguments = {
            "output_dir": folder.name,
            "per_device_train_batch_size": size,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "num_train_epochs": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "logging_steps": 50,
            "bf16": self.bf16,
            "use_cpu": pair.device.type == "cpu",
            "train_sampling_strategy": "group_by_length" if self.grouped else "random",
            "dataloader_pin_memory": pair.device.type == "cuda",
            "accelerator_config": {"non_blocking": pair.device.type == "cuda"},
            **self.more,
        }
        common = {"model": student, "processing_class": tokenizer, "callbacks": [_Timer(clock)]}
        if self.kind == "ours":
            teacher, rows = pair.teacher(), data
            if self.teacher == "cached":
                rows = cache_teacher_logits(teacher, data, tokenizer, f"{folder.name}/cache")
                teacher = CachedTeacher(teacher.config)
            losses = {"kl": KLDivergenceLoss(TEMPERATURE), **{name: _LOSSES[name]() for name in self.losses}}
            args = DistillationArguments(**arguments)
            trainer = DistillationTrainer(args=args, train_dataset=rows, teacher=teacher, losses=losses, **common)
        else:
            kind, given = (PlainDistiller, {"teacher": pair.teacher()}) if self.kind == "plain" else (Trainer, {})
            args = TrainingArguments(**arguments)
            trainer = kind(args=args, train_dataset=data, **common, **given)

        def once(seed: int) -> Seconds:
            trainer.args.seed = seed
            with matmul_precision("highest"):
                trainer.train()
            return clock.passed

        # The folder lives as long as the pass.
        once.folder = folder
        return once


_LOSSES = {"hidden": HiddenStateLoss, "attention": AttentionLoss}


class _Timer(TrainerCallback):
    """From the first step's beginning to the last one's end: what an epoch takes, without setting up."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_epoch_begin(self, args, state, control, **_):
        self.clock.start()

    def on_epoch_end(self, args, state, control, **_):
        self.clock.passed = self.clock.stop()


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """Of float32 products, for the time being."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


LEVERS: dict[str, Bare] = {
    "fp32, teacher live, random batches": Bare(),
    "grouped by length": Bare(grouped=True),
    "bf16 autocast": Bare(bf16=True),
    "bf16 teacher alone": Bare(teacher_bf16=True),
    "cached logits": Bare(teacher="cached"),
    "no attention dropout": Bare(attention_dropout=0.0),
    "fused AdamW": Bare(fused=True),
    "medium products": Bare(medium=True),
    "4 parts as they come": Bare(parts=4, sorted_parts=False),
    "4 parts sorted by length": Bare(parts=4),
    "4 parts sorted by length, the teacher on the whole batch": Bare(parts=4, teacher_at_once=True),
    "grouped, bf16, cached, no attention dropout, fused": Bare("cached", True, False, True, 0.0, True),
}
"""Each lever alone, and all that go together; ratios are to the first."""
LEVERS["the same with the teacher live"] = replace(
    LEVERS["grouped, bf16, cached, no attention dropout, fused"], teacher="live"
)
LEVERS["the same, the teacher's weights in bf16"] = replace(LEVERS["the same with the teacher live"], teacher_bf16=True)
