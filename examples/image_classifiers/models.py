"""Models from checkpoints, from configs, or the two LeNets of the MNIST tutorials as plain modules."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForImageClassification,
    PretrainedConfig,
)
from transformers.utils import cached_file

from distill_nlp.errors import UsageError

LENETS = {"lenet5": ((6, 16), (120, 84)), "lenet5-small": ((6, 12), (90, 64))}
"""Name -> channels of the two convolutions, widths of the two hidden layers."""


class LeNet(nn.Module):
    """Two convolutions with pooling, three linear layers; a plain module that gives logits and computes no loss.

    The name of `forward`'s argument is the column that it gets.
    """

    def __init__(self, config: PretrainedConfig, name: str, channels: int, size: int) -> None:
        super().__init__()
        # Read for the number and the names of the classes.
        self.config = config
        convolutions, widths = LENETS[name]
        side = ((size - 4) // 2 - 4) // 2
        if side < 1:
            raise ValueError(f"a LeNet needs images of at least 16 pixels, got {size}: raise --image_size")
        self.features = nn.Sequential(
            *(nn.Conv2d(channels, convolutions[0], 5), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(*convolutions, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        )
        self.classifier = nn.Sequential(
            *(nn.Linear(convolutions[1] * side * side, widths[0]), nn.ReLU()),
            *(nn.Linear(*widths), nn.ReLU(), nn.Linear(widths[1], config.num_labels)),
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(pixel_values))  # (B, C)


class Source:
    """Where a model comes from: what the images must be like, and the model itself, as often as it is wanted.

    Args:
        role: teacher or student, for messages.
        name: as given on the command line.
    """

    def __init__(self, role: str, name: str) -> None:
        self.role, self.name = role, name
        self.is_config = name.endswith(".json")
        self.config: Any = None if name in LENETS else self._read_config()

    def _read_config(self) -> Any:
        try:
            config = AutoConfig.from_pretrained(self.name)
        except Exception as error:  # of many kinds: no such file, no JSON, no such model, no network
            raise UsageError(
                f"--{self.role} {self.name}: {one_line(error)}; or give one of {', '.join(LENETS)}"
            ) from None
        if type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
            raise UsageError(f"--{self.role} {self.name} is a {config.model_type}, which classifies no images")
        # DeiT has two classifiers, and without this Transformers fails to choose one.
        found = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(config)]
        if not config.architectures:
            config.architectures = [(found[0] if isinstance(found, tuple) else found).__name__]
        return config

    @cached_property
    def normalization(self) -> tuple[list[float], list[float]] | None:
        """Mean and deviation of each channel that a checkpoint was trained with."""
        if self.config is None or self.is_config:
            return None
        try:
            file = cached_file(self.name, "preprocessor_config.json")
            settings = json.loads(Path(file).read_text(encoding="utf-8"))
            return settings["image_mean"], settings["image_std"]
        except (OSError, KeyError, ValueError, TypeError):
            return None

    def side(self) -> int | None:
        """Of the images in the config, where it has one."""
        size = getattr(self.config, "image_size", None)
        if isinstance(size, list | tuple):
            if len(set(size)) > 1:
                raise UsageError(f"--{self.role} {self.name} reads images of {size}; only squares are made here")
            return size[0]
        return size

    def build(self, classes: list[str], channels: int, size: int, own_labels: bool = False) -> nn.Module:
        """A fresh model for these classes; with `own_labels`, as the checkpoint has them."""
        names: dict[str, Any] = {
            "id2label": dict(enumerate(classes)),
            "label2id": {c: i for i, c in enumerate(classes)},
        }
        names["problem_type"] = "single_label_classification"
        try:
            if self.config is None:
                return LeNet(PretrainedConfig(**names), self.name, channels, size)
            config = copy.deepcopy(self.config)
            if not own_labels:
                config.update(names)
            if self.is_config:
                return AutoModelForImageClassification.from_config(config)
            return AutoModelForImageClassification.from_pretrained(
                self.name, config=config, dtype=torch.float32, ignore_mismatched_sizes=not own_labels
            )
        except (OSError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
            raise UsageError(f"--{self.role} {self.name}: {one_line(error)}") from None

    def facts(self) -> dict[str, Any]:
        """What a fingerprint holds of it."""
        return {"name": self.name, "config": None if self.config is None else json.loads(self.config.to_json_string())}


def one_line(error: Exception) -> str:
    """A library's message, however long, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]} …"


def agreed(name: str, found: Sequence[Any], default: Any) -> Any:
    """What teacher and student both say, or the one of them that says something; they read the same pixels."""
    said = [value for value in found if value is not None]
    if any(value != said[0] for value in said):
        raise UsageError(
            f"teacher and student must read the same images, but their {name} differ: {said[0]}, {said[1]}"
        )
    return said[0] if said else default
