"""Trains in several processes; started by test_trainer_distributed.py through torchrun, once per rank.

Usage: torchrun --standalone --nproc_per_node 2 tests/distributed_run.py FOLDER
"""

import json
import sys
from pathlib import Path

import torch
from helpers import checkpointing, make_dataset, make_tokenizer, make_trainer
from torch.nn.parallel import DistributedDataParallel
from transformers import DataCollatorWithPadding

from distill_nlp import trainer
from distill_nlp.losses import LOSSES

GLOBAL_BATCH = 8
# The first rank's whole first batch has no label; the other's has all.
UNLABELED = (0, 1, 2, 3, 9, 14)
SCENARIOS = {
    "plain": {"per_device_train_batch_size": 4},
    "accumulated": {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        **checkpointing(),
    },
}
COMMON = {
    "max_steps": 6,
    "optim": "sgd",
    "learning_rate": 0.02,
    # Clipping would hide a gradient of another size.
    "max_grad_norm": 0.0,
    "logging_steps": 2,
    "save_strategy": "steps",
    "save_steps": 3,
    "per_device_eval_batch_size": 4,
}


RELATIONAL = ("rkd_distance", "rkd_angle", "similarity")
MEANS = tuple(name for name in LOSSES if name not in RELATIONAL)
# Of DIST only the part within each row.
OWN_SETTINGS = {"dist": {"intra_weight": 0.0}}
# All losses that are means over rows, one of them without a weight in the first half of training.
SCHEDULED = {
    "losses": lambda: {name: LOSSES[name](**OWN_SETTINGS.get(name, {})) for name in MEANS},
    "loss_weights": {name: 0.1 for name in MEANS}
    | {
        "hidden": {"schedule": "range", "value": 0.5, "begin": 0.5},
        "kl": {"schedule": "cosine", "start": 1.0, "end": 0.2},
    },
}
HIDDEN = ("hidden", "pkd", "nst", "fsp")
# What is compared with one process on the same rows: name -> settings.
MORE = {
    "scheduled": SCHEDULED,
    "inner": {"losses": lambda: {name: LOSSES[name]() for name in HIDDEN}, "loss_weights": {}},
    "fitted": {
        "losses": lambda: {
            "hidden": LOSSES["hidden"](projection_init="least_squares"),
            "pkd": LOSSES["pkd"](projection="orthogonal", projection_init="least_squares"),
        },
        "loss_weights": {},
        # All 16 rows.
        "projection_init_batches": 2,
    },
}
# Gradient norms are those of each rank's first micro-batch, so that one process weighs the terms a little otherwise.
BALANCED = {"loss_balancing": "gradient_norm", "term_gradient_norm_steps": 2}


class RecordingCollator(DataCollatorWithPadding):
    """Keeps the second token of each row, which tells the rows of a batch apart from another's."""

    def __call__(self, rows):
        self.seen.append([row["input_ids"][:4] for row in rows])
        return super().__call__(rows)


def build(folder, **settings):
    if "losses" in settings:
        settings["losses"] = settings["losses"]()
    collator = RecordingCollator(make_tokenizer())
    collator.seen = []
    data = make_dataset(16, unlabeled=UNLABELED)
    run = make_trainer(
        folder, data=data, eval_dataset=make_dataset(16, seed=9), data_collator=collator, **(COMMON | settings)
    )
    return run, collator


def train(folder, resume_from=None, **settings):
    run, collator = build(folder, **settings)
    run.train(resume_from_checkpoint=resume_from)
    batches = list(collator.seen)
    return {
        "state": {name: tensor.clone() for name, tensor in run.model.state_dict().items()},
        "logs": [entry for entry in run.state.log_history if "loss" in entry],
        "metrics": run.evaluate(),
        "world_size": run.accelerator.num_processes,
        "ddp": isinstance(run.model_wrapped, DistributedDataParallel),
        "batches": batches,
    }


def count_writes() -> list:
    """Grows by one each time that this process writes a student."""
    writes, save = [], trainer.save_student

    def counted(*args):
        writes.append(1)
        save(*args)

    trainer.save_student = counted
    return writes


def main():
    folder = Path(sys.argv[1])
    writes = count_writes()
    results = {name: train(folder / name, **settings) for name, settings in SCENARIOS.items()}
    results["resumed"] = train(folder / "resumed", str(folder / "plain" / "checkpoint-3"), **SCENARIOS["plain"])
    for name, settings in MORE.items():
        results[name] = train(folder / name, per_device_train_batch_size=4, **settings)
    results["balanced"] = train(folder / "balanced", per_device_train_batch_size=4, **BALANCED)
    rank = torch.distributed.get_rank()
    torch.save({name: result.pop("state") for name, result in results.items()}, folder / f"states-{rank}.pt")
    results["writes"] = len(writes)
    (folder / f"results-{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
