"""What the models of a set are worth on its test rows."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill_nlp.config_file import load_experiment
from distill_nlp.inference import predict_logits
from distill_nlp.loading import load_classifier
from distill_nlp.materials import Materials
from distill_nlp.report.scores import right_rows, scores
from distill_nlp.report.statistics import mcnemar, paired_over_seeds


@dataclass
class SetScores:
    """Predictions of a set's teacher, baselines and students, each made once and kept beside its model's set.

    Args:
        name: of the set.
        folder: with `base/` and a folder for each recipe.
        seeds: of baselines and students.
        recipes: that are finished for all seeds.
    """

    name: str
    folder: Path
    seeds: list[int]
    recipes: list[str]

    @cached_property
    def _materials(self) -> Materials:
        return Materials(load_experiment(self.folder / "base.yaml"))

    @cached_property
    def labels(self) -> np.ndarray:
        """`(N,)` classes, or `(N, C)` of 0 and 1."""
        return np.array(self._materials.splits.test["labels"][:])

    @property
    def metric(self) -> str:
        return "accuracy" if self.labels.ndim == 1 else "macro-F1"

    @cached_property
    def _tokens(self) -> Any:
        return self._materials.tokens_alone(self._materials.splits.test)

    def logits(self, model: str) -> np.ndarray:
        """`(N, C)` of the model in a folder of the set."""
        kept = self.folder / "logits" / f"{model.replace('/', '-')}.npz"
        made = (self.folder / model / "stage.json").stat().st_mtime_ns
        if kept.is_file():
            with np.load(kept) as file:
                if int(file["made"]) == made:
                    return file["logits"]
        device = "cuda" if torch.cuda.is_available() else "cpu"
        network = load_classifier(str(self.folder / model)).to(device)
        found = predict_logits(network, self._materials.tokenizer, self._tokens, description=f"{self.name} {model}")
        kept.parent.mkdir(exist_ok=True)
        partial = kept.with_suffix(f".{os.getpid()}.npz")
        np.savez(partial, logits=found, made=made)
        partial.replace(kept)
        return found

    def right(self, model: str) -> np.ndarray:
        """`(N,)`: the class, or the whole set of labels, is right."""
        return right_rows(self.logits(model), self.labels)

    def score(self, model: str) -> float:
        return scores(self.logits(model), self.labels)["accuracy" if self.labels.ndim == 1 else "f1_macro"]

    def of_seeds(self, kind: str) -> list[float]:
        """Of all seeds of `base/baseline` or `RECIPE/student`."""
        return [self.score(f"{kind}/seed-{seed}") for seed in self.seeds]

    def against_baseline(self, recipe: str) -> tuple[float, list[float]]:
        """The p-value over all seeds, and McNemar's for each seed.

        The first is of `paired_over_seeds`.
        """
        pairs = [
            (self.right(f"{recipe}/student/seed-{seed}"), self.right(f"base/baseline/seed-{seed}"))
            for seed in self.seeds
        ]
        return paired_over_seeds(pairs), [mcnemar(student, baseline)["p_value"] for student, baseline in pairs]

    def stages(self, kind: str) -> list[dict[str, Any]]:
        """The records of all stages, phases too, of `base/baseline` or `RECIPE/student`."""
        folder = self.folder / kind
        return [
            json.loads(path.read_text())
            for seed in self.seeds
            for path in sorted(folder.glob(f"seed-{seed}/stage.json"))
            + sorted(folder.glob(f"seed-{seed}-*/stage.json"))
        ]
