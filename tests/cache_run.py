"""Fills a cache in several processes; started by test_teacher_cache.py through torchrun, once per rank.

Usage: torchrun --standalone --nproc_per_node 2 tests/cache_run.py FOLDER
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from helpers import make_dataset, make_teacher, make_tokenizer, make_trainer

from distill_nlp import CachedTeacher, CrossEntropyLoss, KLDivergenceLoss, cache_teacher_logits

ROWS = 24


def counted(teacher):
    """The teacher, and a list that gets the token ids of each row that it is asked for."""
    seen = []

    def note(_, args, kwargs):
        for ids, mask in zip(kwargs["input_ids"].tolist(), kwargs["attention_mask"].tolist(), strict=True):
            seen.append(ids[: sum(mask)])

    teacher.register_forward_pre_hook(note, with_kwargs=True)
    return teacher, seen


def fill(folder):
    teacher, seen = counted(make_teacher())
    rows = cache_teacher_logits(teacher, make_dataset(ROWS), make_tokenizer(), folder, batch_size=3)
    return rows, seen


def train(folder, rows):
    trainer = make_trainer(
        folder,
        teacher=CachedTeacher(make_teacher().config),
        losses={"ce": CrossEntropyLoss(), "kl": KLDivergenceLoss(2.0)},
        data=rows,
        optim="sgd",
        max_grad_norm=0.0,
        per_device_train_batch_size=8 // PartialState().num_processes,
    )
    trainer.train()
    return [entry["loss_kl"] for entry in trainer.state.log_history if "loss_kl" in entry]


def main():
    folder = Path(sys.argv[1])
    rank = int(os.environ["RANK"])
    shared, seen = fill(folder / "shared")
    _, again = fill(folder / "shared")
    # Disks that the ranks do not share.
    apart, seen_apart = fill(folder / f"apart-{rank}")
    result = {
        "world_size": torch.distributed.get_world_size(),
        "seen": seen,
        "seen_again": again,
        "seen_apart": seen_apart,
        "logits": shared["teacher_logits"][:],
        "logits_apart": apart["teacher_logits"][:],
        "loss_kl": train(folder / "run", shared),
    }
    (folder / f"results-{rank}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
