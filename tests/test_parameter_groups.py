"""The student part by part: levels of its parameters, learning rates by layer, and what may learn."""

from __future__ import annotations

import re

import pytest
import torch
from helpers import make_student, make_teacher, make_trainer, seeded
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from distill_nlp import CrossEntropyLoss, HiddenStateLoss, KLDivergenceLoss
from distill_nlp.parameter_groups import Freezing, layer_factors, parameter_levels, scale_by_layer

SMALL = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
GPT2 = {"vocab_size": 60, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 20}
T5 = {"vocab_size": 60, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 3, "num_heads": 2}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
RELATIVE = {"relative_attention": True, "position_biased_input": False, "max_relative_positions": 4}
# Family -> settings of its config, and what the names of embeddings and of what lies above the blocks begin with.
FAMILIES = {
    "bert": (SMALL, ("bert.embeddings.",), ("bert.pooler.", "classifier.")),
    "electra": (
        SMALL | {"embedding_size": 8},
        ("electra.embeddings.", "electra.embeddings_project."),
        ("classifier.",),
    ),
    "roberta": (SMALL, ("roberta.embeddings.",), ("classifier.",)),
    "modernbert": (SMALL | SPECIAL, ("model.embeddings.",), ("model.final_norm.", "head.", "classifier.")),
    "deberta-v2": (
        SMALL | RELATIVE,
        ("deberta.embeddings.", "deberta.encoder.rel_embeddings."),
        ("pooler.", "classifier."),
    ),
    "gpt2": (GPT2, ("transformer.wte.", "transformer.wpe."), ("transformer.ln_f.", "score.")),
    "xlnet": (
        {"vocab_size": 60, "d_model": 16, "n_layer": 3, "n_head": 2, "d_inner": 16},
        ("transformer.mask_emb", "transformer.word_embedding."),
        ("sequence_summary.", "logits_proj."),
    ),
}
NO_ONE_LIST = {"albert": SMALL | {"embedding_size": 8}, "t5": T5 | {"decoder_start_token_id": 0}}


def classifier(family: str, settings: dict) -> nn.Module:
    return seeded(0, lambda: AutoModelForSequenceClassification.from_config(AutoConfig.for_model(family, **settings)))


class Plain(nn.Module):
    """Without a config: the names alone tell the parts."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(10, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(blocks))
        self.out = nn.Linear(4, 2)


# ---- levels ----


@pytest.mark.parametrize("family", FAMILIES)
def test_each_parameter_of_each_family_has_its_level(family):
    settings, embeddings, above = FAMILIES[family]
    model = classifier(family, settings)
    levels, depth = parameter_levels(model)
    assert depth == 3
    assert list(levels) == [name for name, _ in model.named_parameters()]
    for name, level in levels.items():
        if name.startswith(embeddings):
            assert level == 0, name
        elif name.startswith(above):
            assert level == 4, name
        else:
            assert level == int(re.findall(r"\d+", name)[0]) + 1, name
    assert set(levels.values()) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("family", NO_ONE_LIST)
def test_where_the_blocks_are_in_no_one_list_only_the_embeddings_are_told(family):
    model = classifier(family, NO_ONE_LIST[family])
    levels, depth = parameter_levels(model)
    assert depth == 0
    assert {name for name, level in levels.items() if level == 0} == {name for name in levels if "embed" in name}
    assert max(levels.values()) == 1


def test_a_plain_module_has_levels_by_its_names():
    assert list(parameter_levels(Plain())[0].values()) == [0, 1, 1, 2, 2, 3, 3]
    assert parameter_levels(nn.Sequential(nn.Embedding(5, 2), nn.Linear(2, 2)))[1] == 0


def test_numbers_with_a_gap_are_no_list_of_blocks():
    model = Plain(3)
    model.layers[1] = nn.Identity()
    assert parameter_levels(model)[1] == 0


def test_numbered_layers_of_the_head_are_no_blocks():
    model = make_student()
    model.classifier = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(24, 24), nn.Linear(24, 3)])})
    levels, depth = parameter_levels(model)
    assert depth == 2
    assert {level for name, level in levels.items() if name.startswith("classifier.")} == {3}


# ---- learning rates ----


def reference_factor(name: str, decay: float) -> float:
    """Of the tiny DistilBERT with two blocks."""
    if "embeddings" in name:
        return decay * decay * decay
    if "layer.0." in name:
        return decay * decay
    return decay if "layer.1." in name else 1.0


def rates_of(trainer) -> dict[str, tuple[float, float]]:
    """Name -> learning rate and weight decay, of every parameter."""
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    groups = trainer.optimizer.param_groups
    found = [(names[p], (group["lr"], group["weight_decay"])) for group in groups for p in group["params"]]
    assert len(found) == len(dict(found)) == len(names)
    return dict(found)


@pytest.mark.parametrize("factor", [1.0, 10.0])
def test_every_parameter_has_the_learning_rate_of_its_layer_and_its_own_weight_decay(tmp_path, factor):
    settings = {"learning_rate": 0.02, "weight_decay": 0.3, "projection_learning_rate_factor": factor}
    trainer = make_trainer(tmp_path, layer_learning_rate_decay=0.5, **settings)
    plain = make_trainer(tmp_path, **settings)
    for each in (trainer, plain):
        each.create_optimizer()
    before = rates_of(plain)
    for name, (rate, decay) in rates_of(trainer).items():
        own = factor if name.startswith("objective.") else reference_factor(name, 0.5)
        assert rate == pytest.approx(0.02 * own, rel=1e-12), name
        assert decay == before[name][1], name
    assert {decay for _, decay in before.values()} == {0.0, 0.3}


def test_an_optimizer_that_is_there_is_not_scaled_again(tmp_path):
    """Each call of `train` asks for the optimizer anew."""
    trainer = make_trainer(tmp_path, layer_learning_rate_decay=0.5)
    trainer.create_optimizer()
    before = rates_of(trainer)
    trainer.create_optimizer()
    assert rates_of(trainer) == before


def test_at_the_default_the_groups_are_the_trainers_own(tmp_path):
    trainer = make_trainer(tmp_path)
    assert len(trainer.create_optimizer().param_groups) == 2


def test_the_head_comes_first_so_that_its_rate_is_logged(tmp_path):
    trainer = make_trainer(tmp_path, layer_learning_rate_decay=0.5, learning_rate=0.02, lr_scheduler_type="linear")
    trainer.train()
    assert trainer.state.log_history[0]["learning_rate"] == pytest.approx(0.02)
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {0.0}
    rates = [group["initial_lr"] for group in trainer.optimizer.param_groups]
    assert rates[0] == 0.02
    assert set(rates) == {0.02 * 0.5**level for level in range(4)}


def test_a_group_without_a_head_is_taken_out():
    model = Plain()
    optimizer = torch.optim.SGD([{"params": model.layers.parameters()}, {"params": model.out.parameters()}], lr=1.0)
    scale_by_layer(optimizer, layer_factors(model, 0.5))
    assert [(len(group["params"]), group["lr"]) for group in optimizer.param_groups] == [(2, 1.0), (2, 0.5), (2, 0.25)]


def test_adapters_have_the_learning_rate_of_their_block(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_lin"])
    student = seeded(1, lambda: peft.get_peft_model(make_student(dropout=0.0), config))
    trainer = make_trainer(tmp_path, student=student, layer_learning_rate_decay=0.5, learning_rate=1.0)
    trainer.create_optimizer()
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    rates = {names[p]: group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    adapters = {name: rate for name, rate in rates.items() if "lora_" in name}
    assert len(adapters) == 4
    assert all(rate == (0.25 if "layer.0." in name else 0.5) for name, rate in adapters.items())


def test_a_decay_that_cannot_be_applied_is_refused(tmp_path):
    albert = classifier("albert", NO_ONE_LIST["albert"])
    with pytest.raises(ValueError, match="needs one list of numbered blocks, which AlbertForSequenceClass.* has not"):
        make_trainer(tmp_path, student=albert, layer_learning_rate_decay=0.5)
    student = make_student()
    given = (torch.optim.SGD(student.parameters(), lr=0.1), None)
    with pytest.raises(ValueError, match="layer_learning_rate_decay is not applied to an optimizer that is given"):
        make_trainer(tmp_path, student=student, optimizers=given, layer_learning_rate_decay=0.5)
    alone = {"losses": {"ce": CrossEntropyLoss()}, "loss_weights": {}}
    assert make_trainer(tmp_path, student=student, optimizers=given, **alone).optimizer is given[0]


def test_an_optimizer_without_the_projections_is_refused(tmp_path):
    """They are made by the trainer, so that what was made before it does not know them: they would never move."""
    student = make_student()
    given = (torch.optim.SGD(student.parameters(), lr=0.1), None)
    hidden = {"losses": {"hidden": HiddenStateLoss()}, "loss_weights": {}}
    with pytest.raises(ValueError, match="the optimizer that is given does not train: the trainer makes them"):
        make_trainer(tmp_path, student=student, optimizers=given, **hidden)
    of_one_width = {"losses": {"kl": KLDivergenceLoss()}, "loss_weights": {}}
    make_trainer(tmp_path, student=student, optimizers=given, **of_one_width)


# ---- frozen parts ----

ALL_OF_BLOCK = "distilbert.transformer.layer.{}."


def frozen_names(student, parts) -> set[str]:
    """What learns no more after `begin`."""
    Freezing(student, parts).begin()
    return {name for name, parameter in student.named_parameters() if not parameter.requires_grad}


@pytest.mark.parametrize(
    ("parts", "prefixes"),
    [
        (["embeddings"], ("distilbert.embeddings.",)),
        (["layer.1"], (ALL_OF_BLOCK.format(0),)),
        (["layer.2"], (ALL_OF_BLOCK.format(1),)),
        (["layer.1-2"], ("distilbert.transformer.",)),
        (["layer.1", "embeddings"], ("distilbert.embeddings.", ALL_OF_BLOCK.format(0))),
        (["body"], ("distilbert.",)),
        (["pre_classifier"], ("pre_classifier.",)),
        (["distilbert.embeddings.LayerNorm.weight"], ("distilbert.embeddings.LayerNorm.weight",)),
        ([], ()),
    ],
)
def test_the_named_parts_are_frozen_and_no_other(parts, prefixes):
    student = make_student()
    assert frozen_names(student, parts) == {name for name, _ in student.named_parameters() if name.startswith(prefixes)}


def test_the_body_is_all_but_the_head():
    model = make_teacher().train()
    assert frozen_names(model, ["body"]) == {name for name, _ in model.named_parameters() if name.startswith("bert.")}
    assert frozen_names(Plain(), ["body"]) == {"tokens.weight"} | {
        f"layers.{n}.{kind}" for n in (0, 1) for kind in ("weight", "bias")
    }


def test_a_name_is_no_part_of_a_longer_name():
    model = Plain(11)
    assert frozen_names(model, ["layers.1"]) == {"layers.1.weight", "layers.1.bias"}


@pytest.mark.parametrize("part", ["layer.0", "layer.3", "layer.1-3", "layer.2-1", "layr.1", "pre_class", "distilbert."])
def test_an_unknown_part_is_refused_with_what_there_is(part):
    expected = (
        rf"freeze: '{re.escape(part)}' is no part of the student; there are body, embeddings, layer.1 to layer.2, and "
        "names of modules such as distilbert.embeddings, distilbert.transformer, pre_classifier, classifier"
    )
    with pytest.raises(ValueError, match=expected):
        Freezing(make_student(), [part])


def test_blocks_that_are_not_there_are_not_offered():
    with pytest.raises(ValueError, match="there are body, embeddings, and names of modules such as albert.embeddings"):
        Freezing(classifier("albert", NO_ONE_LIST["albert"]), ["layer.1"])
    with pytest.raises(ValueError, match="there are body, embeddings, layer.1, and"):
        Freezing(Plain(1), ["layer.2"])


def test_something_must_be_left_to_train():
    with pytest.raises(
        ValueError, match="freeze leaves nothing of the student to train: body, pre_class.*, classifier"
    ):
        Freezing(make_student(), ["body", "pre_classifier", "classifier"])
    student = make_student()
    student.classifier.requires_grad_(False)
    with pytest.raises(ValueError, match="freeze leaves nothing"):
        Freezing(student, ["body", "pre_classifier"])


def test_gradual_unfreezing_needs_numbered_blocks():
    albert = classifier("albert", NO_ONE_LIST["albert"])
    Freezing(albert, ["embeddings"])
    with pytest.raises(ValueError, match="unfreeze_every needs one list of numbered blocks, which AlbertForSequence"):
        Freezing(albert, ["embeddings"], every=2)


def test_a_peft_student_is_refused():
    peft = pytest.importorskip("peft")
    student = peft.get_peft_model(make_student(), peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_lin"]))
    Freezing(student)
    with pytest.raises(ValueError, match="freeze is not for a PEFT student: PEFT has frozen all but its adapters"):
        Freezing(student, ["embeddings"])


def held_names(freezing: Freezing, model, step: int) -> set[str]:
    held = set(map(id, freezing.held(step)))
    return {name for name, parameter in model.named_parameters() if id(parameter) in held}


def test_frozen_parts_are_released_from_the_top_down_the_pooler_with_the_last_block():
    model = make_teacher().train()
    freezing = Freezing(model, ["body"], every=3)
    freezing.begin()
    assert all(parameter.requires_grad for parameter in model.parameters())
    of_body = {name for name, _ in model.named_parameters() if name.startswith("bert.")}
    gone: tuple[str, ...] = ()
    for turn, released in enumerate([(), ("layer.3.", "pooler"), ("layer.2.",), ("layer.1.",), ("layer.0.",)]):
        gone += released
        expected = {name for name in of_body if not any(part in name for part in gone)}
        assert held_names(freezing, model, 3 * turn) == held_names(freezing, model, 3 * turn + 2) == expected
    assert held_names(freezing, model, 14) == {name for name in of_body if "embeddings" in name}
    assert held_names(freezing, model, 15) == set()


def test_parts_that_are_not_frozen_take_no_turn():
    model = make_teacher().train()
    freezing = Freezing(model, ["layer.3", "embeddings"], every=2)
    assert {name.split(".")[1] for name in held_names(freezing, model, 2)} == {"embeddings"}
    assert not held_names(freezing, model, 4)


def test_what_waits_loses_its_gradient_and_nothing_else_does():
    model = Plain()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    freezing = Freezing(model, ["layer.1", "layer.2"], every=1)
    freezing.drop_gradients(1)
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {"layers.0.weight", "layers.0.bias"}


def test_afterwards_the_student_is_as_it_was():
    student = make_student()
    student.distilbert.embeddings.word_embeddings.weight.requires_grad_(False)
    freezing = Freezing(student, ["body"])
    freezing.begin()
    freezing.end()
    still = [name for name, parameter in student.named_parameters() if not parameter.requires_grad]
    assert still == ["distilbert.embeddings.word_embeddings.weight"]
    gradual = Freezing(student, ["body"], every=1)
    assert "distilbert.embeddings.word_embeddings.weight" not in held_names(gradual, student, 0)
