"""Models to be compared, of any kind: what `compare` needs of one, and the one place that tells kinds apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from distill_nlp.inference import predict_logits
from distill_nlp.labels import label_names
from distill_nlp.lengths import longest_input
from distill_nlp.loading import check_classifier, load_config, load_tokenizer
from distill_nlp.losses.base import ModelShape, ProblemType
from distill_nlp.onnx_model import exported_size, is_exported, load_for_inference
from distill_nlp.report.evaluation import model_size
from distill_nlp.report.speed import Run, Timed
from distill_nlp.tokenization import tokenize


class Candidate(Timed, Protocol):
    """A classifier of any kind. Its times and rows are those of `Timed`, after `read`.

    Attributes:
        config: with `id2label` and `num_labels`.
        problem_type: as in Transformers' configs.
    """

    config: Any
    problem_type: ProblemType

    def read(self, dataset: Any) -> None:
        """Makes `rows` of texts: a `datasets.Dataset` of `text`, maybe `text_pair`, and `labels`."""

    def logits(self, batch_size: int, device: Any) -> np.ndarray:
        """(N, C) of the rows that were read, in the order of its own classes."""

    def size(self) -> dict[str, Any]:
        """`parameters`, `size_mb` on disk and `weights_mb` in memory."""


def open_candidate(name: str, max_length: int | None = None) -> Candidate:
    """Opens a model by what lies there, a checkpoint or an export; another kind of model is added here.

    Args:
        name: folder or Hub id.
        max_length: cut texts at so many tokens; what tokenizer and model allow where not given.

    Raises:
        UsageError: it is no classifier.
        DistillError: it is not to be had.
    """
    return ModelCandidate(name, max_length)


def common_device(names: Sequence[str]) -> str:
    """Where all of them can run, so that their times compare: exports run on the CPU alone."""
    return "cuda" if torch.cuda.is_available() and not any(map(is_exported, names)) else "cpu"


class ModelCandidate:
    """A Transformers checkpoint in float32, or an export of one."""

    def __init__(self, name: str, max_length: int | None = None) -> None:
        self.name = name
        self.config = load_config(name)
        check_classifier(name, self.config)
        self.problem_type: ProblemType = ModelShape.from_config(self.config).problem_type
        self._model, self._tokenizer = load_for_inference(name), load_tokenizer(name, config=self.config)
        self._max_length = longest_input(self.config, self._tokenizer, max_length)
        self.rows: Sequence[dict[str, Any]] = []

    def read(self, dataset: Any) -> None:
        pairs = "text_pair" in dataset.column_names
        tokens = tokenize(dataset, self._tokenizer, self._max_length, token_type_ids=pairs)
        self.rows = tokens.to_list()
        self._run = Run(self._model, self._tokenizer, self.rows)

    def logits(self, batch_size: int, device: Any) -> np.ndarray:
        self.prepare(device)
        return predict_logits(
            self._model, self._tokenizer, list(self.rows), batch_size, description=f"Evaluating {self.name}"
        )

    def size(self) -> dict[str, Any]:
        return exported_size(self.name) if is_exported(self.name) else model_size(self._model, self.name)

    def prepare(self, device: Any) -> None:
        self._run.prepare(device)

    def seconds(self, part: Sequence[int], device: Any) -> float:
        return self._run.seconds(part, device)


def class_names(candidate: Candidate) -> list[str]:
    """Names of a candidate's classes, by index."""
    return label_names(candidate.config)
