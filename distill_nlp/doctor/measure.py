"""One training step on models of its own: the bytes that it keeps for backward, and the seconds that it takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from distill_nlp.modeling import DistillationModel
from distill_nlp.out_of_memory import that_fit
from distill_nlp.outputs import Features

Batch = dict[str, Any]
Collate = Callable[[Sequence[dict[str, Any]]], Batch]
Answer = Callable[[Batch], Features]
"""What gives a teacher's features for a batch."""

POSITIONS = (1 / 2, 5 / 6, 1 / 6)
"""Where in the order of lengths batches are taken from: their mean stands for an epoch."""
ROUNDS = 5
"""Times that each is timed, where there is time: the load of a machine comes and goes."""


class Step:
    """Forward, backward and AdamW as the trainer makes them; the model is trained by it, so it must be a copy.

    Args:
        model: student and bound objective, put into training.
        answer: the teacher, None where no loss needs one.
        autocast: dtype of the forward passes, None for float32.
    """

    def __init__(self, model: DistillationModel, answer: Answer | None, autocast: torch.dtype | None = None) -> None:
        self.model = model.train()
        self.answer = answer
        self.device = next(model.parameters()).device
        self._autocast = autocast
        self._optimizer: torch.optim.Optimizer | None = None

    def precision(self) -> AbstractContextManager:
        """The autocast of forward passes."""
        return torch.autocast(self.device.type, self._autocast, enabled=self._autocast is not None)

    def ask(self, batch: Batch) -> Features | None:
        """The teacher's features for a batch, without gradient."""
        if self.answer is None:
            return None
        with torch.no_grad(), self.precision():
            return self.answer(batch)

    def loss(self, batch: Batch, teacher: Features | None) -> torch.Tensor:
        """The objective of a batch, with its graph."""
        own = {name: x for name, x in batch.items() if not name.startswith("teacher_")}
        with self.precision():
            return self.model(teacher=teacher, **own).loss

    def gradient(self, batch: Batch, teacher: Features | None) -> None:
        """Forward and backward."""
        self.loss(batch, teacher).backward()

    def update(self) -> None:
        """The optimizer's part; a learning rate of 0 costs as much as any other."""
        if self._optimizer is None:
            self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0)
        self._optimizer.step()
        self._optimizer.zero_grad()


def saved_bytes(step: Step, batch: Batch) -> int:
    """Bytes of the tensors that one forward pass keeps for backward.

    Each storage counts once, however many views of it are kept; parameters and the batch itself count nothing.
    """
    teacher = step.ask(batch)
    known = {x.untyped_storage().data_ptr() for x in [*step.model.parameters(), *step.model.buffers()]}
    known |= {x.untyped_storage().data_ptr() for x in batch.values() if isinstance(x, torch.Tensor)}
    known |= {x.untyped_storage().data_ptr() for x in tensors_of(teacher)}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        # The storage is held, so that its address is not given to another while we count.
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = step.loss(batch, teacher)
    total = sum(storage.nbytes() for storage in kept.values())
    del loss
    return total


def activation_bytes(step: Step, row: dict[str, Any], collate: Collate, rows: int) -> int:
    """Bytes that a batch of `rows` rows of this length keeps for backward, from batches of two and of three.

    What does not grow with the batch, such as weights that autocast has converted, is told apart by that.

    Args:
        row: an encoded row, the longest that training meets.
        collate: encoded rows to a batch on the step's device.
        rows: of the batch.
    """
    two, three = (saved_bytes(step, collate([row] * count)) for count in (2, 3))
    return max(two + (three - two) * (rows - 2), 0)


def features_bytes(step: Step, row: dict[str, Any], collate: Collate, rows: int) -> int:
    """Bytes of what the teacher hands over for a batch of `rows` rows: logits, layers, queries and keys."""
    storages = {x.untyped_storage().data_ptr(): x for x in tensors_of(step.ask(collate([row] * 2)))}
    return sum(x.untyped_storage().nbytes() for x in storages.values()) * rows // 2


def tensors_of(features: Features | None) -> list[torch.Tensor]:
    """All tensors of a model's features."""
    if features is None:
        return []
    found = [features.logits, *features.hidden_states.values(), *features.pooled.values()]
    for inputs in features.attentions.values():
        found += [x for x in (inputs.query, inputs.key, inputs.value, inputs.mask, inputs.bias) if x is not None]
    return found


@dataclass(frozen=True)
class StepTime:
    """What a step takes.

    Args:
        answers: seconds of the teacher for one full batch.
        gradient: of forward and backward.
        update: of the optimizer.
        batches: that were timed.
        rows: of each of them.
    """

    answers: float
    gradient: float
    update: float
    batches: int
    rows: int

    def of_step(self, accumulation: int) -> float:
        """Seconds of one optimizer step."""
        return (self.answers + self.gradient) * accumulation + self.update


def time_step(
    step: Step,
    batch_of: Callable[[float, int], Batch],
    rows: int,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> StepTime:
    """Times real steps, on as many rows as the time allows; what is left out is scaled by its tokens.

    Args:
        batch_of: position in the order of lengths (0 to 1) and number of rows -> batch.
        rows: of one full batch; smaller ones are timed where one would take longer than half of the time, on a CPU. An
            accelerator takes as long for two rows as for many: full ones are timed there, or what its memory takes.
        seconds: for all of it, roughly; one batch is timed in any case.
        clock: in seconds.
    """

    def timed(run: Callable[[], Any]) -> tuple[float, Any]:
        _synchronize(step.device)
        start = clock()
        result = run()
        _synchronize(step.device)
        return clock() - start, result

    def once(batch: Batch) -> tuple[float, float, float]:
        answers, teacher = timed(lambda: step.ask(batch))
        gradient, _ = timed(lambda: step.gradient(batch, teacher))
        update, _ = timed(step.update)
        return answers, gradient, update

    begin = clock()
    if step.device.type == "cpu":
        few = min(rows, 2)
        # Twice: the first pass warms up.
        for _ in range(2):
            small = sum(once(batch_of(POSITIONS[0], few))[:2])
        left = max(seconds - (clock() - begin), 0.0)
        count = rows if small / few * rows <= left / 2 else min(max(int(left / 2 / small * few), few), rows)
    else:
        # It loads its kernels for a shape when it meets it first.
        count = that_fit(rows, lambda size: [once(batch_of(position, size)) for position in POSITIONS])
        begin = clock()
    whole = sum(_tokens(batch_of(position, rows)) for position in POSITIONS) / len(POSITIONS)
    taken: list[tuple[float, float, float]] = []
    tokens = 0
    for position in POSITIONS * ROUNDS:
        batch = batch_of(position, count)
        taken.append(once(batch))
        tokens += _tokens(batch)
        if clock() - begin + sum(taken[-1]) > seconds:
            break
    answers, gradient, _ = (sum(column) for column in zip(*taken, strict=True))
    update = min(times[2] for times in taken)
    return StepTime(answers / tokens * whole, gradient / tokens * whole, update, len(taken), count)


def _tokens(batch: Batch) -> int:
    return batch["input_ids"].numel()


def time_answers(answer: Answer, batch: Batch, rows: int, device: torch.device) -> float:
    """Seconds of the teacher alone for one row, from one batch."""
    with torch.no_grad():
        answer(batch)
        _synchronize(device)
        start = time.perf_counter()
        answer(batch)
        _synchronize(device)
    return (time.perf_counter() - start) / rows


def batches_by_length(
    rows: Sequence[dict[str, Any]], collate: Collate, grouped: bool, seed: int = 0
) -> Callable[[float, int], Batch]:
    """Gives batches as training draws them from these rows.

    Args:
        rows: encoded ones, a sample of the training rows.
        grouped: batches of like lengths; else of random rows.
        seed: of the random ones.
    """
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
    if not grouped:
        import numpy as np

        ordered = [ordered[i] for i in np.random.default_rng(seed).permutation(len(ordered))]

    def batch_of(position: float, count: int) -> Batch:
        start = min(max(int(position * len(ordered)) - count // 2, 0), max(len(ordered) - count, 0))
        chosen = ordered[start : start + count]
        # A sample smaller than a batch is repeated.
        return collate([chosen[i % len(chosen)] for i in range(count)])

    return batch_of


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
