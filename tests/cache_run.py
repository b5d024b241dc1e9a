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
from distill_nlp.ensemble import TeacherEnsemble

ROWS = 24
STATES = [(4, "first"), (2, "mean")]
COLUMNS = ["teacher_logits", "teacher_first_4", "teacher_mean_2"]


def counted(teacher):
    """The teacher, and a list that gets the token ids of each row that it is asked for."""
    seen = []

    def note(_, args, kwargs):
        for ids, mask in zip(kwargs["input_ids"].tolist(), kwargs["attention_mask"].tolist(), strict=True):
            seen.append(ids[: sum(mask)])

    teacher.register_forward_pre_hook(note, with_kwargs=True)
    return teacher, seen


def cached(folder, teacher=None, data=None, **settings):
    """The data with the answers beside them, and the lines that were said."""
    lines = []
    teacher = make_teacher() if teacher is None else teacher
    data = make_dataset() if data is None else data
    return cache_teacher_logits(teacher, data, make_tokenizer(), folder, say=lines.append, **settings), lines


def fill(folder, **settings):
    teacher, seen = counted(make_teacher())
    rows, _ = cached(folder, teacher, make_dataset(ROWS), batch_size=3, **settings)
    return rows, seen


def fill_ensemble(folder):
    (one, seen), (two, seen_by_two) = counted(make_teacher()), counted(make_teacher(seed=7))
    rows, lines = cached(folder, TeacherEnsemble([one, two], [2, 1]), make_dataset(ROWS), batch_size=3)
    return rows, [seen, seen_by_two], lines


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
    # Over the logits that are there already, and rounded, with nothing there.
    states, seen_for_states = fill(folder / "shared", states=STATES)
    rounded, seen_rounded = fill(folder / "rounded", states=STATES, storage="bfloat16")
    ensemble, seen_by_members, lines = fill_ensemble(folder / "shared")
    result = {
        "world_size": torch.distributed.get_world_size(),
        "seen": seen,
        "seen_again": again,
        "seen_apart": seen_apart,
        "seen_for_states": seen_for_states,
        "seen_rounded": seen_rounded,
        "seen_by_members": seen_by_members,
        "lines": lines,
        "logits": shared["teacher_logits"][:],
        "logits_apart": apart["teacher_logits"][:],
        "states": {name: states[name][:] for name in COLUMNS},
        "rounded": {name: rounded[name][:] for name in COLUMNS},
        "logits_ensemble": ensemble["teacher_logits"][:],
        "loss_kl": train(folder / "run", shared),
    }
    (folder / f"results-{rank}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
