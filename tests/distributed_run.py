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


class RecordingCollator(DataCollatorWithPadding):
    """Keeps the second token of each row, which tells the rows of a batch apart from another's."""

    def __call__(self, rows):
        self.seen.append([row["input_ids"][:4] for row in rows])
        return super().__call__(rows)


def build(folder, **settings):
    collator = RecordingCollator(make_tokenizer())
    collator.seen = []
    data = make_dataset(16, unlabeled=UNLABELED)
    trainer = make_trainer(
        folder, data=data, eval_dataset=make_dataset(16, seed=9), data_collator=collator, **(COMMON | settings)
    )
    return trainer, collator


def train(folder, resume_from=None, **settings):
    trainer, collator = build(folder, **settings)
    trainer.train(resume_from_checkpoint=resume_from)
    batches = list(collator.seen)
    return {
        "state": {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()},
        "logs": [entry for entry in trainer.state.log_history if "loss" in entry],
        "metrics": trainer.evaluate(),
        "world_size": trainer.accelerator.num_processes,
        "ddp": isinstance(trainer.model_wrapped, DistributedDataParallel),
        "batches": batches,
    }


def main():
    folder = Path(sys.argv[1])
    results = {name: train(folder / name, **settings) for name, settings in SCENARIOS.items()}
    results["resumed"] = train(folder / "resumed", str(folder / "plain" / "checkpoint-3"), **SCENARIOS["plain"])
    rank = torch.distributed.get_rank()
    torch.save({name: result.pop("state") for name, result in results.items()}, folder / f"states-{rank}.pt")
    (folder / f"results-{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
