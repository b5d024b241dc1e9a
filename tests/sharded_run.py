"""Trains under FSDP2 or DeepSpeed; started by test_trainer_sharded.py through `accelerate launch`, once per rank.

Usage: accelerate launch --config_file configs/accelerate/fsdp2.yaml tests/sharded_run.py FOLDER
"""

import functools
import json
import os
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, DistributedType
from helpers import ALL_WEIGHTS, all_losses, make_dataset, make_trainer, step_logs

from distill_nlp import FSPLoss

GLOBAL_BATCH = 8
UNLABELED = (0, 1, 2, 3, 9, 14)
COMMON = {
    "max_steps": 4,
    "num_train_epochs": 2,
    # FSDP2 cannot resume an optimizer without state; a large epsilon keeps the steps smooth in the gradient.
    "optim": "adamw_torch",
    "learning_rate": 1e-3,
    "adam_epsilon": 1e-2,
    # Clipping would hide a gradient of another size.
    "max_grad_norm": 0.0,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "metric_for_best_model": "score",
    "greater_is_better": True,
    "use_cpu": not torch.cuda.is_available() and "ACCELERATE_USE_DEEPSPEED" not in os.environ,
}


def enter_fsdp_on_the_cpu() -> None:
    """Accelerate enters FSDP on accelerators only; PyTorch's FSDP2 itself runs on the CPU, over gloo."""
    plain = AcceleratorState.__init__

    @functools.wraps(plain)
    def init(state, *args, fsdp_plugin=None, **kwargs):
        plain(state, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        state.fsdp_plugin = fsdp_plugin or getattr(state, "fsdp_plugin", None)
        if state.fsdp_plugin is not None:
            state.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = init


def scheduled() -> dict:
    """A projection that has no gradient in the first half of training, and one that is computed from other weights."""
    return {
        "losses": all_losses() | {"fsp": FSPLoss(projection="orthogonal")},
        "loss_weights": ALL_WEIGHTS | {"hidden": {"schedule": "range", "value": 1.0, "begin": 0.5}},
        "eval_strategy": "no",
        "save_strategy": "no",
    }


def build(folder, world_size: int, **settings):
    """The metric falls, so that the model of step 2 is the best."""
    scores = iter([0.9, 0.5])
    return make_trainer(
        folder,
        data=make_dataset(16, unlabeled=UNLABELED),
        eval_dataset=make_dataset(16, seed=9),
        compute_metrics=lambda _: {"score": next(scores, 0.0)},
        **(COMMON | {"per_device_train_batch_size": GLOBAL_BATCH // world_size} | settings),
    )


def main():
    folder, world_size = Path(sys.argv[1]), int(sys.argv[2])
    if not torch.cuda.is_available():
        enter_fsdp_on_the_cpu()
    whole = build(folder / "whole", world_size, load_best_model_at_end=True)
    whole.train()
    whole.save_model(str(folder / "best"))
    resumed = build(folder / "resumed", world_size)
    resumed.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-2"))
    resumed.save_model(str(folder / "saved"))
    late = build(folder / "late", world_size, **scheduled())
    late.train()
    late.save_model(str(folder / "scheduled"))
    results = {
        "world_size": resumed.accelerator.num_processes,
        "distributed_type": str(resumed.accelerator.distributed_type),
        "sharded": any(hasattr(p, "device_mesh") or hasattr(p, "ds_id") for p in resumed.model_wrapped.parameters()),
        "best": whole.state.best_model_checkpoint,
        "logs": {"whole": step_logs(whole), "resumed": step_logs(resumed), "scheduled": step_logs(late)},
        "metrics": resumed.evaluate(),
    }
    (folder / f"results-{resumed.args.process_index}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()
    # One exit in twenty of two gloo ranks under FSDP2 dies in C++ after the interpreter's end ("terminate called
    # without an active exception"); all is written by now.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
