"""A teacher as the cache asks it: known by its config and weights, loaded only where rows are missing."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForSequenceClassification
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from distill_nlp.durable_files import read_json
from distill_nlp.loading import load_classifier, load_config
from distill_nlp.modeling import accepted_arguments, bare_model
from distill_nlp.teacher_cache import model_tensors, teacher_identity, weights_hash


def launch() -> PartialState:
    """The processes of this launch."""
    # As TrainingArguments do it: a launcher may have asked for the CPU, which PartialState alone does not look at.
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


class TeacherSource:
    """A teacher that is loaded only when it has to answer, and how it reads and answers.

    Args:
        teacher: a model, run where it is, or the folder or Hub id of one.
        revision: on the Hub.
        device: where a model that is loaded here goes; the launch's own where not given.
        prefix: before the names of the columns that it reads; "" for the student's.
        tokenizer: pads them.
        restrict_labels: as in `Teacher`; of a member of an ensemble.

    Raises:
        ValueError: neither a model nor the name of one.

    Example:
        >>> TeacherSource("runs/large/teacher", prefix="teacher_", tokenizer=tokenizer).identity("no")["labels"]
        ['negative', 'positive']
    """

    def __init__(
        self,
        teacher: nn.Module | str | Path,
        revision: str | None = None,
        device: Any = None,
        prefix: str = "",
        tokenizer: Any = None,
        restrict_labels: bool = False,
    ) -> None:
        if not isinstance(teacher, nn.Module | str | Path):
            raise ValueError(
                "a teacher to be cached is a model, a Teacher, a TeacherEnsemble, or the folder or Hub id of one, "
                f"got {type(teacher).__name__}"
            )
        self._given = teacher if isinstance(teacher, nn.Module) else None
        self.name = type(bare_model(teacher)).__name__ if isinstance(teacher, nn.Module) else str(teacher)
        self.prefix = prefix
        self.tokenizer = tokenizer
        self.restrict_labels = restrict_labels
        self._revision = revision
        self._device = device

    @cached_property
    def model(self) -> nn.Module:
        if self._given is not None:
            return self._given
        return load_classifier(self.name, self._revision).to(launch().device if self._device is None else self._device)

    def unload(self) -> None:
        """Lets go of a model that was loaded here; it is loaded again when it has to answer again."""
        vars(self).pop("model", None)

    @cached_property
    def config(self) -> Any:
        return self._given.config if self._given is not None else load_config(self.name, self._revision)

    @cached_property
    def _class(self) -> type[nn.Module]:
        """The model's class; read from the config where that says it."""
        if self._given is None:
            known = AutoModelForSequenceClassification._model_mapping.get(type(self.config), None)
            if inspect.isclass(known):
                return known
        return type(bare_model(self.model))

    @property
    def accepted(self) -> set[str] | None:
        """Names that the teacher's forward takes, None if it takes any."""
        return accepted_arguments(self._class if self._given is None else self._given, self.config)

    @cached_property
    def _weights(self) -> str:
        files = None if self._given is not None else weight_files(self.name, self._revision)
        return weights_hash(model_tensors(self.model) if files is None else _as_loaded(files))

    def identity(self, mixed_precision: str) -> dict[str, Any]:
        """See `teacher_identity`."""
        return teacher_identity(self.config, self._class.__name__, self._weights, mixed_precision)


def weight_files(name: str, revision: str | None = None) -> list[Path] | None:
    """The safetensors files of a checkpoint, or None where it has none (a pickle, an adapter)."""

    def find(file: str) -> Path | None:
        path = cached_file(
            name,
            file,
            revision=revision,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return None if path is None else Path(path)

    if (single := find(SAFE_WEIGHTS_NAME)) is not None:
        return [single]
    index = find(SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        return None
    found = [find(file) for file in sorted(set((read_json(index) or {}).get("weight_map", {}).values()))]
    return [path for path in found if path is not None] if found and None not in found else None


def _as_loaded(files: Sequence[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a checkpoint in the dtype in which `load_classifier` gives them."""
    for path in files:
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                tensor = tensors.get_tensor(name)
                yield name, tensor.float() if tensor.is_floating_point() else tensor
