"""What reliability costs: hashes against the save, the check for NaN against the step, the agreement of two ranks.

    python benchmarks/reliability_costs.py

Times are medians; those of the step are taken in turns with and without, as other work on the machine changes them.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import DistilBertConfig, DistilBertForSequenceClassification, TrainerCallback

from distill_nlp import CrossEntropyLoss, DistillationArguments, DistillationTrainer, KLDivergenceLoss, resumable
from distill_nlp.interruption import SignalWatch
from distill_nlp.nonfinite import FiniteCheck


def model(layers: int, width: int) -> Any:
    """A DistilBERT of this depth and width, with random weights."""
    config = DistilBertConfig(n_layers=layers, dim=width, hidden_dim=4 * width, n_heads=width // 64, num_labels=2)
    return DistilBertForSequenceClassification(config)


def trainer(folder: str, layers: int, width: int, length: int, callbacks: list, **settings: Any) -> DistillationTrainer:
    """Trains such a student on random tokens."""
    ids = torch.randint(1000, 30000, (64, length)).tolist()
    rows = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * length] * 64, "labels": [0, 1] * 32})
    arguments = DistillationArguments(
        output_dir=folder, use_cpu=not torch.cuda.is_available(), disable_tqdm=True, per_device_train_batch_size=16,
        logging_steps=50, **settings,
    )  # fmt: skip
    return DistillationTrainer(
        model=model(layers, width), teacher=model(layers, width), args=arguments, train_dataset=rows,
        losses={"ce": CrossEntropyLoss(), "kl": KLDivergenceLoss()}, callbacks=callbacks,
    )  # fmt: skip


def saving() -> str:
    """Seconds of whole saves of a DistilBERT with its optimizer, and of the manifests in them."""
    spent = {"save": [], "manifest": []}

    def timed(name: str, function: Any) -> Any:
        def run(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments)
            spent[name].append(time.perf_counter() - start)
            return result

        return run

    resumable.write_manifest = timed("manifest", resumable.write_manifest)
    with tempfile.TemporaryDirectory() as folder:
        one = trainer(folder, 6, 768, 8, [], max_steps=3, save_strategy="steps", save_steps=1, save_total_limit=1)
        one._save_checkpoint = timed("save", one._save_checkpoint)
        one.train()
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    whole, part = (statistics.median(spent[name]) for name in ("save", "manifest"))
    return f"save of {size / 1e6:.0f} MB: {whole:.2f} s, of which hashes and fsync {part:.2f} s ({part / whole:.0%})"


class _InTurns(TrainerCallback):
    """Switches the check off in every other step, and times the steps."""

    def __init__(self) -> None:
        self.seconds: dict[bool, list[float]] = {True: [], False: []}
        self.whole = {name: getattr(FiniteCheck, name) for name in ("add", "add_norm")}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on = state.global_step % 2 == 0
        for name, function in self.whole.items():
            setattr(FiniteCheck, name, function if self.on else lambda *a, **k: None)
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[self.on].append(time.perf_counter() - self.start)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, function in self.whole.items():
            setattr(FiniteCheck, name, function)


def checking(steps: int) -> str:
    """Milliseconds of a small student's step, with and without the check for NaN."""
    turns = _InTurns()
    with tempfile.TemporaryDirectory() as folder:
        trainer(folder, 4, 256, 32, [turns], max_steps=steps, save_strategy="no").train()
    with_it, without = (statistics.median(turns.seconds[on][4:]) * 1e3 for on in (True, False))
    check, start = FiniteCheck("stop", 0, None, lambda step, micro: None), time.perf_counter()
    terms, logits = {"ce": torch.tensor(1.0), "kl": torch.tensor(1.0)}, torch.zeros(16, 2)
    for step in range(500):
        check.add(step, terms, logits, logits)
    alone = (time.perf_counter() - start) / 500 * 1e3
    return (
        f"step of a 4-layer student: {without:.2f} ms, with the check {with_it:.2f} ms; the check alone {alone:.3f} ms "
        f"({alone / without:.2%})"
    )


def agreeing(times: int) -> str:
    """Microseconds of one agreement on a signal between two gloo ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    reading, writing = os.pipe()
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            store = torch.distributed.TCPStore("127.0.0.1", port, 2, rank == 0)
            torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
            with SignalWatch() as watch:
                spent = []
                for _ in range(times):
                    start = time.perf_counter()
                    watch.agreed(2)
                    spent.append(time.perf_counter() - start)
            if rank == 0:
                os.write(writing, f"{statistics.median(spent) * 1e6:.0f}".encode())
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    return f"agreement of two ranks on a signal: {os.read(reading, 99).decode()} µs"


def main() -> None:
    """Prints a line for each cost."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200, help="of the small student [200]")
    known = parser.parse_args()
    # First: a fork keeps no threads.
    print(agreeing(500), flush=True)
    print(checking(known.steps), flush=True)
    print(saving(), flush=True)


if __name__ == "__main__":
    main()
