"""Loads models and tokenizers from folders and the Hub; what goes wrong becomes one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from distill_nlp.data_files import first_line
from distill_nlp.errors import DistillError, UsageError


def load_config(name: str, revision: str | None = None) -> Any:
    """The config of a checkpoint."""
    with _one_line(name):
        return AutoConfig.from_pretrained(name, revision=revision)


def is_classifier(config: Any) -> bool:
    """Whether a checkpoint has a trained classification head: its config says what class saved it."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or [])


def load_classifier(name: str, revision: str | None = None, **settings: Any) -> PreTrainedModel:
    """A classifier in float32; a head that is missing in the checkpoint, or of another size, is drawn at random."""
    with _one_line(name):
        # Without dtype, Transformers 5 takes the checkpoint's: a float16 file would be trained in float16.
        return AutoModelForSequenceClassification.from_pretrained(
            name, revision=revision, dtype=torch.float32, ignore_mismatched_sizes=True, **settings
        )


def load_backbone(name: str, revision: str | None = None) -> PreTrainedModel:
    """The encoder of a checkpoint without a head, in float32."""
    with _one_line(name):
        return AutoModel.from_pretrained(name, revision=revision, dtype=torch.float32)


def load_tokenizer(name: str, revision: str | None = None) -> Any:
    """The tokenizer of a checkpoint."""
    with _one_line(name):
        return AutoTokenizer.from_pretrained(name, revision=revision)


@contextmanager
def _one_line(name: str) -> Iterator[None]:
    """Says what and where, when a checkpoint cannot be loaded.

    Raises:
        UsageError: the name is a folder, or looks like one, and there is nothing that loads.
        DistillError: it was looked for on the Hub.
    """
    path = Path(name).expanduser()
    if not path.exists() and (path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise UsageError(f"no model folder {name}")
    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError, RuntimeError) as error:
        if path.is_dir():
            raise UsageError(f"the folder {name} does not hold what is needed: {first_line(error)}") from error
        raise DistillError(
            f"cannot load {name!r}: {first_line(error)}. There is no such local folder, so the Hub was asked; check "
            "the name and the network, or give a local folder"
        ) from error
