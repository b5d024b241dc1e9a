"""No step of ours waits for the device: what would is found on a CPU, by operations that need numbers on the host."""

import os
import traceback

import pytest
import torch
from helpers import make_dataset
from torch.utils._python_dispatch import TorchDispatchMode

from distill_nlp.losses import LOSSES
from distill_nlp.trainer import DistillationTrainer

aten = torch.ops.aten
# The number of elements of what they give, or the number itself, has to be known on the host.
WAITING = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.unique_consecutive.default,
    aten.equal.default,
}


class Waits(TorchDispatchMode):
    """Notes where in the code an operation waits."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[list[str]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        by_mask = function is aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        if function in WAITING or by_mask:
            self.places.append([f"{f.filename}:{f.lineno} {f.line}" for f in traceback.extract_stack()])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [*LOSSES, "all", "labels missing"])
def test_a_step_waits_for_nothing_but_the_models_look_at_padding(make_trainer, monkeypatch, name):
    names = list(LOSSES) if name in ("all", "labels missing") else [name]
    losses = {n: LOSSES[n]() for n in names}
    data = make_dataset()
    if name == "labels missing":
        data = data.map(lambda row, i: {"labels": -100 if i % 3 else row["labels"]}, with_indices=True)
    trainer = make_trainer(
        losses=losses,
        loss_weights=dict.fromkeys(losses, 1.0),
        data=data,
        max_steps=2,
        logging_steps=10,
        gradient_accumulation_steps=2,
        term_gradient_norm_steps=0,
    )
    mode = Waits()
    for method in ("get_batch_samples", "training_step"):
        original = getattr(DistillationTrainer, method)

        def watched(self, *arguments, original=original, **settings):
            with mode:
                return original(self, *arguments, **settings)

        monkeypatch.setattr(DistillationTrainer, method, watched)
    trainer.train()
    # Rows are put into batches on the host.
    loader = os.path.join("data", "dataloader.py")
    steps = [place for place in mode.places if not any(loader in frame for frame in place)]
    ours = [place[-6:] for place in steps if not any("masking_utils.py" in frame for frame in place)]
    assert not ours, "\n".join(ours[0])
    # A student and a teacher, twice in each of two steps.
    assert len(steps) == (8 if trainer.objective.needs_teacher else 4)
