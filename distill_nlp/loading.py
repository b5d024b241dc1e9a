"""Loads models and tokenizers from folders and the Hub; what goes wrong becomes one line."""

from __future__ import annotations

import hashlib
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

from distill_nlp.data_files import first_line, local_path
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
    if settings:
        try:
            check_settings(load_config(name, revision), settings, "overrides")
        except ValueError as error:
            raise UsageError(f"{name}: {error}") from None
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


def check_settings(config: Any, settings: dict[str, Any], where: str) -> None:
    """Refuses names that a config does not have: Transformers keeps them as attributes that nothing reads.

    Raises:
        ValueError: an unknown name, such as `hiden_size`.
    """
    allowed = {*config.to_dict(), *config.attribute_map, "num_labels", "problem_type"}
    if unknown := sorted(settings.keys() - allowed):
        raise ValueError(f"{where}: {config.model_type} does not know {', '.join(unknown)}")


def checkpoint_print(name: str | None, revision: str | None = None) -> dict[str, Any] | None:
    """What tells one checkpoint from another: the content of a local folder, the name and revision on the Hub."""
    if name is None:
        return None
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return {"name": name, "revision": revision}
    digest = hashlib.sha256()
    for file in sorted([folder / "config.json", *folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]):
        if file.is_file():
            with open(file, "rb") as stream:
                while chunk := stream.read(1 << 22):
                    digest.update(chunk)
    return {"content": digest.hexdigest()[:16]}


@contextmanager
def _one_line(name: str) -> Iterator[None]:
    """Says what and where, when a checkpoint cannot be loaded.

    Raises:
        UsageError: the name is a folder, or looks like one, and there is nothing that loads.
        DistillError: it was looked for on the Hub.
    """
    path = local_path(name, "model")
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
