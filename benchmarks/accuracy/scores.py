"""What the models of a set are worth on its test rows."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill_nlp.config_file import load_experiment, read_settings
from distill_nlp.inference import predict_logits
from distill_nlp.loading import load_classifier
from distill_nlp.materials import Materials
from distill_nlp.report.build import compare_seeds
from distill_nlp.report.scores import right_rows, scores
from distill_nlp.report.statistics import mcnemar, paired_over_seeds
from distill_nlp.soft_targets import entropies

_RESAMPLES = 2000


@dataclass
class SetScores:
    """Predictions of a set's teacher, baselines and students, each made once and kept beside its model's set.

    Args:
        name: of the set.
        folder: with `base/` and a folder for each recipe.
        seeds: of baselines and students.
        recipes: that are finished for all seeds.
        baselines: folders of the baselines of each budget.
        variant_of: name of a changed recipe -> the recipe, where both are among `recipes`.
    """

    name: str
    folder: Path
    seeds: list[int]
    recipes: list[str]
    baselines: Sequence[str] = ("base/baseline",)
    variant_of: Mapping[str, str] = field(default_factory=dict)

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

    def teacher_answers(self) -> dict[str, tuple[float, float]]:
        """On the students' labeled rows and on test rows: the teacher's score, and the mean entropy of its answers.

        In nats; of several labels per text, the mean over classes of each one's. Where it is next to nothing, soft
        targets say what the labels say.
        """
        splits = self._materials.splits
        rows = {
            "train": (splits.train, self._materials.tokens_alone(splits.train)),
            "test": (splits.test, self._tokens),
        }
        found = {}
        for split, (data, tokens) in rows.items():
            logits, labels = self.logits("base/teacher", split, tokens), np.array(data["labels"][:])
            found[split] = (scores(logits, labels)[self._score], float(entropies(logits, labels.ndim > 1).mean()))
        return found

    def logits(self, model: str, split: str = "test", tokens: Any = None) -> np.ndarray:
        """`(N, C)` of the model in a folder of the set; on test rows, or on `tokens` of another split."""
        kept = self.folder / "logits" / f"{model.replace('/', '-')}{'' if split == 'test' else f'-{split}'}.npz"
        made = (self.folder / model / "stage.json").stat().st_mtime_ns
        if kept.is_file():
            with np.load(kept) as file:
                if int(file["made"]) == made:
                    return file["logits"]
        device = "cuda" if torch.cuda.is_available() else "cpu"
        network = load_classifier(str(self.folder / model)).to(device)
        tokens = self._tokens if tokens is None else tokens
        found = predict_logits(network, self._materials.tokenizer, tokens, description=f"{self.name} {model}")
        kept.parent.mkdir(exist_ok=True)
        partial = kept.with_suffix(f".{os.getpid()}.npz")
        np.savez(partial, logits=found, made=made)
        partial.replace(kept)
        return found

    def right(self, model: str) -> np.ndarray:
        """`(N,)`: the class, or the whole set of labels, is right."""
        return right_rows(self.logits(model), self.labels)

    def score(self, model: str) -> float:
        return scores(self.logits(model), self.labels)[self._score]

    @property
    def _score(self) -> str:
        return "accuracy" if self.labels.ndim == 1 else "f1_macro"

    @cached_property
    def baseline(self) -> str:
        """The folder of the baselines whose validation scores have the best mean."""
        if len(self.baselines) == 1:
            return self.baselines[0]
        found = self.validation(self.baselines)
        return max(found, key=found.__getitem__)

    def validation(self, kinds: Sequence[str]) -> dict[str, float]:
        """The mean of the validation scores over seeds; of each seed that of its best checkpoint.

        What is chosen is chosen by these: baselines, and recipes or their variants, as test scores are for the verdict.
        """
        records = {kind: self.finals(kind) for kind in kinds}
        return {kind: float(np.mean([one["validation"][self._score] for one in own])) for kind, own in records.items()}

    def steps(self, kind: str) -> int:
        """Of one seed, all phases together."""
        return round(sum(record["steps"] for record in self.stages(kind)) / len(self.seeds))

    def interval(self, recipe: str) -> tuple[float, float]:
        """95%, of the recipe's score less the baseline's, over test rows and seeds."""
        logits = {"teacher": self.logits("base/teacher")}
        for seed in self.seeds:
            logits[f"baseline/{seed}"] = self.logits(f"{self.baseline}/seed-{seed}")
            logits[f"student/{seed}"] = self.logits(f"{recipe}/student/seed-{seed}")
        low, high = compare_seeds(logits, self.labels, self.seeds, _RESAMPLES)["difference"]["interval"]
        return low, high

    def of_seeds(self, kind: str) -> list[float]:
        """Of all seeds of `BUDGET/baseline` or `RECIPE/student`."""
        return [self.score(f"{kind}/seed-{seed}") for seed in self.seeds]

    def against_baseline(self, recipe: str) -> tuple[float, list[float]]:
        """The p-value over all seeds, and McNemar's for each seed.

        The first is of `paired_over_seeds`.
        """
        pairs = self._pairs(f"{recipe}/student", self.baseline)
        return paired_over_seeds(pairs), [mcnemar(student, baseline)["p_value"] for student, baseline in pairs]

    def leads(self, recipe: str) -> list[float]:
        """Of each seed, the part of the test rows that the student has right less that of the baseline."""
        return _leads(self._pairs(f"{recipe}/student", self.baseline))

    def against_recipe(self, variant: str) -> tuple[float, float]:
        """By how much of the test rows a variant has more right than its recipe, mean over seeds, and the p-value."""
        pairs = self._pairs(f"{variant}/student", f"{self.variant_of[variant]}/student")
        return float(np.mean(_leads(pairs))), paired_over_seeds(pairs)

    def _pairs(self, one: str, other: str) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each seed, which rows the one has right, and which the other."""
        return [(self.right(f"{one}/seed-{seed}"), self.right(f"{other}/seed-{seed}")) for seed in self.seeds]

    def finals(self, kind: str) -> list[dict[str, Any]]:
        """Of each seed the record of the last stage of `BUDGET/baseline` or `RECIPE/student`."""
        return [self._record(kind, f"seed-{seed}") for seed in self.seeds]

    def stages(self, kind: str) -> list[dict[str, Any]]:
        """The records of all stages, the phases that the recipe has among them."""
        folder, _, stage = kind.partition("/")
        config = self.folder / f"{folder}.yaml"
        phases = (
            len(read_settings(config, "config").get("phases", [])) if config.is_file() and stage == "student" else 0
        )
        before = [f"seed-{seed}-phase-{i}" for seed in self.seeds for i in range(1, phases)]
        return [self._record(kind, name) for name in before] + self.finals(kind)

    def _record(self, kind: str, stage: str) -> dict[str, Any]:
        return json.loads((self.folder / kind / stage / "stage.json").read_text())


def _leads(pairs: list[tuple[np.ndarray, np.ndarray]]) -> list[float]:
    return [float(one.mean() - other.mean()) for one, other in pairs]
