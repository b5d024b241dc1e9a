"""The teachers of an experiment before training: checkpoint or config, tokenizer, length, and what is finished."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedModel

from distill_nlp.config import DataSection, TeacherMember
from distill_nlp.errors import UsageError
from distill_nlp.labels import label_order
from distill_nlp.loading import is_classifier, load_config, load_tokenizer
from distill_nlp.losses.base import SINGLE_LABEL, ModelShape, ProblemType
from distill_nlp.student import label_arguments, load_for_labels, model_from_config, task_settings
from distill_nlp.teacher import TEACHER_PREFIX
from distill_nlp.tokenizers_compared import token_difference


class TeacherPart:
    """One teacher.

    Args:
        settings: all of its own, see `TeacherSection.members`.
        index: 0 for the first.
        data: how texts become tokens.
        data_labels: class names of the data, by index.
        problem_type: of the data.

    Raises:
        UsageError: a checkpoint that cannot be loaded, or whose labels or kind of task are not those of the data.
    """

    def __init__(
        self,
        settings: TeacherMember,
        index: int,
        data: DataSection,
        data_labels: Sequence[str],
        problem_type: ProblemType = SINGLE_LABEL,
    ) -> None:
        self.settings = settings
        self.index = index
        self.name = "teacher" if index == 0 else f"teacher-{index + 1}"
        self.max_length = settings.max_length or data.max_length
        self._data = data
        self._data_labels = list(data_labels)
        self._problem_type = problem_type
        # Before its columns; set by `assign_prefixes`.
        self.prefix = ""

    @property
    def where(self) -> str:
        """Its settings' path."""
        return "teacher" if self.index == 0 else f"teacher.ensemble.{self.index - 1}"

    @cached_property
    def finished(self) -> Any | None:
        """The config of its checkpoint if that is a classifier for these labels already, else None."""
        settings = self.settings
        if settings.model is None or settings.finetune == "always":
            return None
        config = load_config(settings.model, settings.revision)
        if not is_classifier(config):
            if settings.finetune == "never":
                raise UsageError(f"{self.where}.finetune is never, but {settings.model} has no classification head")
            return None
        wanted = type(config)(**label_arguments(self._data_labels))
        try:
            label_order(config, wanted, settings.restrict_labels)
            self._check_task(config)
        except ValueError as error:
            hint = f"set {self.where}.finetune: always to train a new head on it"
            raise UsageError(f"{self.where}.model {settings.model} does not fit the data: {error}; or {hint}") from None
        if settings.overrides:
            raise UsageError(
                f"{self.where}.overrides: {settings.model} is fine-tuned already and used as it is; leave them out, or "
                f"set {self.where}.finetune: always"
            )
        return config

    def _check_task(self, config: Any) -> None:
        """Logits that were trained under a softmax say nothing under a sigmoid, and the other way round."""
        own = ModelShape.from_config(config).problem_type
        if own != self._problem_type:
            said = getattr(config, "problem_type", None)
            raise ValueError(
                f"it is a model for {own} (problem_type in its config: {said}), the labels ask for "
                f"{self._problem_type}; if it was trained for that, write problem_type into its config.json"
            )

    @cached_property
    def own_tokenizer(self) -> Any | None:
        """That of its checkpoint; None for one from scratch, which reads the student's tokens."""
        if self.settings.model is None:
            return None
        name, revision = self.settings.model, self.settings.revision
        tokenizer = load_tokenizer(name, revision, load_config(name, revision))
        return prepared(tokenizer, self._data, self.max_length)

    def config(self, label_names: Sequence[str], sizes: dict[str, Any]) -> Any:
        """The config that it has, or will have."""
        if self.settings.model is not None:
            config = load_config(self.settings.model, self.settings.revision)
            config.problem_type = self._problem_type
            return config
        return self.new_model(label_names, sizes).config

    def new_model(self, label_names: Sequence[str], sizes: dict[str, Any]) -> PreTrainedModel:
        """The model to be fine-tuned.

        Args:
            label_names: of the classes, by index.
            sizes: what a config from scratch takes from the tokenizer.
        """
        settings = self.settings
        try:
            overrides = task_settings(label_names, self._problem_type, settings.overrides)
            if settings.model is None:
                return model_from_config({**sizes, **(settings.config or {})}, overrides)
        except (ValueError, TypeError) as error:
            raise UsageError(f"{self.where}.{error}") from error
        return load_for_labels(settings.model, settings.revision, **overrides)


def prepared(tokenizer: Any, data: DataSection, max_length: int) -> Any:
    """The tokenizer with the experiment's truncation."""
    if tokenizer.pad_token_id is None:
        raise UsageError(f"the tokenizer {tokenizer.name_or_path} has no padding token")
    tokenizer.truncation_side = data.truncation_side
    # What a tokenizer is saved with: the attribute alone is written down by a call that cuts a text, and where tokens
    # are found in the cache of the datasets library there is none.
    tokenizer.init_kwargs["truncation_side"] = data.truncation_side
    tokenizer.model_max_length = max_length
    return tokenizer


def assign_tokenizers(parts: Sequence[TeacherPart], tokenizer: Any, max_length: int) -> dict[str, TeacherPart]:
    """Gives each teacher its tokenizer, and a prefix where it does not read the student's tokens.

    Args:
        tokenizer, max_length: the student's.

    Returns:
        prefix -> a teacher that reads the columns of this prefix; those that read the same share one.
    """
    readers: dict[str, TeacherPart] = {}
    for part in parts:
        own = part.own_tokenizer
        if own is None or token_difference(own, tokenizer) is None:
            # The student's, so that whatever is made of the two is the same file.
            part.tokenizer = tokenizer if part.max_length == max_length else _cut_at(tokenizer, part.max_length)
            if part.max_length == max_length:
                continue
        else:
            part.tokenizer = own
        for prefix, other in readers.items():
            if part.max_length == other.max_length and token_difference(part.tokenizer, other.tokenizer) is None:
                part.prefix, part.tokenizer = prefix, other.tokenizer
                break
        else:
            part.prefix = f"{TEACHER_PREFIX}{len(readers) + 1}_" if readers else TEACHER_PREFIX
            readers[part.prefix] = part
    return readers


def _cut_at(tokenizer: Any, max_length: int) -> Any:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = max_length
    return tokenizer
