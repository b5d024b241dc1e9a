"""Loads models and tokenizers from folders and the Hub; what goes wrong becomes one line."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import patch_environment
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from distill_nlp.checkpoint_checks import (
    check_embeddings,
    check_has_safetensors,
    check_sizes,
    check_vocabulary,
    check_weights,
)
from distill_nlp.data_files import local_path
from distill_nlp.errors import DistillError, UsageError, first_line
from distill_nlp.losses.base import SINGLE_LABEL, ModelShape

_trusts_code: ContextVar[bool] = ContextVar("trusts_code", default=False)


def trust_remote_code(trusted: bool, say: Callable[[str], None] = lambda line: None) -> None:
    """Whether models and tokenizers that come with code of their own may run it; not unless this was called.

    Args:
        trusted: from here on, in this context.
        say: gets a line where it is.
    """
    if trusted:
        say("trust_remote_code is on: code that comes with models and tokenizers is run as you")
    _trusts_code.set(trusted)


def load_config(name: str, revision: str | None = None) -> Any:
    """The config of a checkpoint.

    Raises:
        UsageError, DistillError: there is none, or one that no model can be of.
    """
    with _one_line(name):
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=_trusts_code.get())
        check_sizes(config, "config.json")
        return config


def is_classifier(config: Any) -> bool:
    """Whether a checkpoint has a trained classification head: its config says what class saved it."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or [])


def check_classifier(name: str, config: Any) -> None:
    """Refuses a checkpoint that cannot say which class a text has.

    Args:
        name: as the user gave it.
        config: of the checkpoint.

    Raises:
        UsageError: it has no classification head, or one that gives a single number.
    """
    if not is_classifier(config):
        raise UsageError(f"{name} is no classifier (its config names {config.architectures}); train one first")
    problem_type = ModelShape.from_config(config).problem_type
    if problem_type == "regression":
        raise UsageError(f"{name} is a regression (num_labels {config.num_labels}); give a classifier")
    if problem_type == SINGLE_LABEL and config.num_labels < 2:
        raise UsageError(f"{name} has a single class, which every text has; give a classifier of two or more")


def load_classifier(name: str, revision: str | None = None, **settings: Any) -> PreTrainedModel:
    """A classifier in float32, from safetensors.

    Args:
        name: folder or Hub id.
        revision: on the Hub.
        settings: of its config to change. With them, or where the checkpoint is no classifier, a head that is missing
            or of another size is drawn at random; of a finished one, nothing is.

    Raises:
        UsageError, DistillError: it is not there, broken, a pickle, or of other sizes than its config says.
    """
    config = load_config(name, revision)
    if settings:
        try:
            check_settings(config, settings, "overrides")
            check_sizes(type(config)(**(config.to_dict() | settings)), "overrides")
        # A value of the wrong kind is refused by each config in its own way.
        except Exception as error:
            raise UsageError(f"{name}: {_said(error)}") from None
    return _load(
        AutoModelForSequenceClassification, name, revision, bool(settings) or not is_classifier(config), **settings
    )


def load_backbone(name: str, revision: str | None = None) -> PreTrainedModel:
    """The encoder of a checkpoint without a head, in float32, from safetensors."""
    return _load(AutoModel, name, revision, head_may_be_new=True)


def _load(kind: Any, name: str, revision: str | None, head_may_be_new: bool, **settings: Any) -> PreTrainedModel:
    with _one_line(name):
        if (folder := Path(name).expanduser()).is_dir():
            check_has_safetensors(folder)
        # Else, under FSDP, the other ranks' weights would stay empty until training, and look as if they were missing.
        with patch_environment(FSDP_CPU_RAM_EFFICIENT_LOADING="false"):
            # Without dtype, Transformers 5 takes the checkpoint's: a float16 file would be trained in float16.
            model, found = kind.from_pretrained(
                name,
                revision=revision,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                use_safetensors=True,
                trust_remote_code=_trusts_code.get(),
                output_loading_info=True,
                **settings,
            )
        check_weights(model, found, head_may_be_new)
        return model


def load_tokenizer(name: str, revision: str | None = None, config: Any = None) -> Any:
    """The tokenizer of a checkpoint.

    Args:
        name: folder or Hub id.
        revision: on the Hub.
        config: of the model that is to read its tokens: must have an embedding for each.

    Raises:
        UsageError, DistillError: there is none, or it is of another model.
    """
    with _one_line(name):
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=_trusts_code.get())
        check_vocabulary(tokenizer)
        # Of no use here, and saved under names that the checkpoint picks.
        tokenizer.chat_template = None
    if config is not None:
        try:
            check_embeddings(tokenizer, config, name)
        except ValueError as error:
            raise UsageError(str(error)) from None
    return tokenizer


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
    found = sorted([folder / "config.json", *folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")])
    files = [(file, file.stat()) for file in found if file.is_file()]
    return {"content": _content_of(tuple((file, state.st_size, state.st_mtime_ns) for file, state in files))}


@cache
def _content_of(files: tuple[tuple[Path, int, int], ...]) -> str:
    """A hash of files, once for what they are now: path, size and time of the last change."""
    digest = hashlib.sha256()
    for file, _, _ in files:
        with open(file, "rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()[:16]


@contextmanager
def _one_line(name: str) -> Iterator[None]:
    """Says what and where, when a checkpoint cannot be loaded.

    Raises:
        UsageError: the name is a folder, or looks like one, and there is nothing that loads.
        DistillError: it was looked for on the Hub.
    """
    path = local_path(name, "model")
    if path.is_file():
        raise UsageError(f"{name} is a file; a model is a folder or a name on the Hub")
    if not path.exists() and (path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise UsageError(f"no model folder {name}")
    try:
        yield
    # Broken files raise errors of all kinds: of JSON, safetensors, the tokenizers' Rust, configs that check themselves.
    except Exception as error:
        said = _said(error)
        if path.is_dir():
            raise UsageError(f"the folder {name} does not hold what is needed: {said}") from error
        raise DistillError(
            f"cannot load {name!r}: {said}. There is no such local folder, so the Hub was asked; check the name and "
            "the network, or give a local folder"
        ) from error


def _said(error: Exception) -> str:
    said = first_line(error)
    if "trust_remote_code" in str(error):
        return (
            "it comes with code of its own, which is not run unless you say that you trust it, by trust_remote_code: "
            "true in the config or --trust_remote_code"
        )
    return said if isinstance(error, OSError | ValueError | RuntimeError) else f"{type(error).__name__}: {said}"
