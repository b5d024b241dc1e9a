"""The student's weights on disk and back: also where Transformers saves them under other names."""

from __future__ import annotations

import pytest
import torch
from helpers import largest_difference, make_student, parameters_of, seeded
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTForImageClassification

from distill_nlp.checkpoints import load_student, load_weights, save_student
from distill_nlp.losses import CrossEntropyLoss
from distill_nlp.objective import DistillationObjective


def make_vit(seed: int, width: int = 12, layers: int = 1) -> ViTForImageClassification:
    """Transformers from 5.20 or so saves its queries and keys under older names than its own."""
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=16,
    )
    return seeded(seed, lambda: ViTForImageClassification(config))


def save(model, folder):
    save_student(model, model.state_dict(), str(folder))
    return str(folder)


def test_weights_that_were_renamed_on_the_way_to_disk_come_back(tmp_path):
    one, other = make_vit(0), make_vit(1)
    assert largest_difference(parameters_of(one), parameters_of(other)) > 0
    load_student(other, save(one, tmp_path))
    assert largest_difference(parameters_of(one), parameters_of(other)) == 0


@pytest.mark.parametrize("changes", [{"width": 16}, {"layers": 2}])
def test_weights_of_another_model_are_refused_whatever_their_names(changes, tmp_path):
    folder = save(make_vit(0, **changes), tmp_path)
    objective = DistillationObjective({"ce": CrossEntropyLoss()})
    with pytest.raises(ValueError, match="cannot load the checkpoint"):
        load_weights(make_vit(1), objective, folder)


@pytest.mark.parametrize("make", [make_vit, lambda seed: make_student(seed)], ids=["vit", "distilbert"])
def test_a_weight_that_is_missing_on_disk_is_not_drawn_anew(make, tmp_path):
    folder = save(make(0), tmp_path)
    weights = load_file(f"{folder}/model.safetensors")
    weights.pop(next(name for name in weights if name.endswith("classifier.weight")))
    save_file(weights, f"{folder}/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=r"[Mm]issing"):
        load_student(make(1), folder)


def test_a_plain_module_is_loaded_strictly(tmp_path):
    folder = save(torch.nn.Linear(2, 3), tmp_path)
    model = torch.nn.Linear(2, 3)
    load_student(model, folder)
    assert torch.equal(model.weight, load_file(f"{folder}/model.safetensors")["weight"])
    with pytest.raises(RuntimeError):
        load_student(torch.nn.Linear(2, 4), folder)


def test_a_plain_module_with_tied_tensors_is_loaded(tmp_path):
    def tied(value):
        model = torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False))
        model[1].weight = model[0].weight
        torch.nn.init.constant_(model[0].weight, value)
        return model

    folder = save(tied(2.0), tmp_path)
    model = tied(1.0)
    load_student(model, folder)
    assert (model[0].weight == 2).all()
    assert model[1].weight is model[0].weight
