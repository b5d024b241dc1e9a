"""The three trainings: the teacher, the student on the labels alone, the distilled student."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import set_seed
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from distill_nlp import DistillationArguments
from distill_nlp.checkpoints import load_student
from distill_nlp.config import LossSection, did_you_mean
from distill_nlp.config_file import read_settings, read_yaml
from distill_nlp.errors import UsageError
from distill_nlp.losses import LOSSES
from distill_nlp.modeling import DistillationModel
from distill_nlp.objective import DistillationObjective
from distill_nlp.stage_training import TrainingJob
from distill_nlp.stages import StageFolder
from distill_nlp.teacher import bind_teacher
from image_classifiers.data import Data
from image_classifiers.files import Images
from image_classifiers.models import Source, one_line

DEVICE = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def say(line: str) -> None:
    """One line of progress, at once, also into a file."""
    print(line, flush=True)


def read_losses(text: str) -> dict[str, LossSection]:
    """Names, weights and settings of losses, as in the configs of distill-nlp: YAML, or a file of it."""
    if text.endswith((".yaml", ".yml")):
        settings = read_settings(Path(text), "losses")
    else:
        try:
            settings = read_yaml(text)
        except Exception as error:
            raise UsageError(f"--losses is not valid YAML: {one_line(error)}") from None
    if not isinstance(settings, dict) or not settings:
        raise UsageError(f'--losses must be such as "{{ce: {{weight: 0.3}}, kl: {{temperature: 4}}}}", got {text}')
    sections = {}
    for name, section in settings.items():
        if name not in LOSSES:
            raise UsageError(
                f"--losses: unknown loss {name}; there are {', '.join(LOSSES)}{did_you_mean(name, LOSSES)}"
            )
        if not isinstance(section, dict | None):
            raise UsageError(f"--losses {name} must be settings such as {{weight: 0.5}}, got {section!r}")
        try:
            sections[name] = LossSection.model_validate(section or {})
            LOSSES[name](**sections[name].arguments())
        except (ValueError, TypeError) as error:
            raise UsageError(f"--losses {name}: {one_line(error)}") from None
    return sections


def make_losses(sections: dict[str, LossSection]) -> dict[str, Any]:
    """New ones: a loss belongs to one pair of models, and may have parameters."""
    return {name: LOSSES[name](**section.arguments()) for name, section in sections.items()}


class Runs:
    """The trainings of one output folder, each in a folder of its own; a finished one is not done again.

    Args:
        options: of the command line.
        data: to learn from.
        teacher, student: where the models come from.
    """

    def __init__(self, options: argparse.Namespace, data: Data, teacher: Source, student: Source) -> None:
        self.options, self.data, self.sources = options, data, {"teacher": teacher, "student": student}
        self.losses = read_losses(options.losses)
        self.epoch = math.ceil(len(data.student) / options.batch_size)
        self.steps = options.max_steps or self.epoch * options.epochs
        self.folders: dict[str, StageFolder] = {}

    def build(self, role: str, seed: int) -> nn.Module:
        """A fresh teacher or student, the same for each seed."""
        set_seed(seed)
        own_labels = role == "teacher" and self.options.teacher_epochs == 0
        return self.sources[role].build(self.data.classes, *self.data.shape, own_labels=own_labels)

    def try_out(self) -> None:
        """One batch through untrained models and the losses, so that what cannot work ends before any training.

        Raises:
            UsageError: what does not fit.
        """
        teacher, student = self.build("teacher", 0), self.build("student", 0)
        rows = [self.data.student[i] for i in range(min(4, len(self.data.student)))]
        batch = {key: torch.as_tensor(np.stack([np.asarray(row[key]) for row in rows])) for key in rows[0]}
        try:
            weights = {name: section.weight for name, section in self.losses.items()}
            objective = DistillationObjective(make_losses(self.losses), weights)
            model = DistillationModel(student, objective, teacher.config)
            answers = bind_teacher(teacher, student.config, objective)(batch)
            logits = model(teacher=answers, **batch).logits
        except (RuntimeError, ValueError) as error:
            names = f"{self.sources['teacher'].name} and {self.sources['student'].name}"
            raise UsageError(f"{names} with --losses {', '.join(self.losses)}: {one_line(error)}") from None
        if logits.shape != (len(rows), len(self.data.classes)):
            raise UsageError(f"the student gives {tuple(logits.shape)} for {len(rows)} images; expected one row each")

    def train_teacher(self) -> nn.Module:
        """The teacher, trained; or the checkpoint as it is."""
        options, model = self.options, self.build("teacher", 0)
        if options.teacher_epochs == 0:
            return model.eval().to(DEVICE)
        epoch = math.ceil(len(self.data.teacher) / options.batch_size)
        steps = options.max_steps or epoch * options.teacher_epochs
        return self._run("teacher", model, self.data.teacher, 0, steps, epoch, options.teacher_learning_rate)

    def train_baseline(self, seed: int) -> nn.Module:
        """The student on the labels alone, for as many steps as the distilled one."""
        return self._student("baseline", seed, self.data.labeled, {})

    def train_student(self, seed: int, teacher: nn.Module) -> nn.Module:
        """The distilled student."""
        settings = {
            "losses": make_losses(self.losses),
            "weights": {name: section.weight for name, section in self.losses.items()},
            "teacher": teacher,
        }
        return self._student("student", seed, self.data.student, settings)

    def _student(self, kind: str, seed: int, rows: Images, settings: dict[str, Any]) -> nn.Module:
        model = self.build("student", seed)
        rate = self.options.learning_rate
        return self._run(f"{kind}/seed-{seed}", model, rows, seed, self.steps, self.epoch, rate, **settings)

    def _run(
        self, name: str, model: nn.Module, rows: Images, seed: int, steps: int, epoch: int, rate: float, **settings: Any
    ) -> nn.Module:
        folder = self.folders[name] = StageFolder(self.options.output_dir / name)
        fingerprint = self._fingerprint(model, rows, seed, steps, rate, "teacher" in settings)
        changes = folder.changes(fingerprint)
        if changes == []:
            say(f"{name:<20} done already: {folder.path}")
        else:
            if changes:
                say(f"{name:<20} again, changed: {one_line(ValueError(', '.join(changes)))}")
            settings = {"losses": {"ce": LOSSES["ce"]()}} | settings
            arguments = self._arguments(folder, seed, steps, epoch, rate)
            job = {"model": model, "train": rows, "validation": self.data.validation, "arguments": arguments}
            TrainingJob(name, folder, fingerprint, tokenizer=self._processor(model), **job, **settings).run(say)
        load_student(model, str(folder.path))
        return model.eval().to(DEVICE)

    def _fingerprint(
        self, model: nn.Module, rows: Images, seed: int, steps: int, rate: float, distilled: bool
    ) -> dict[str, Any]:
        role = "teacher" if rows is self.data.teacher and not distilled else "student"
        found: dict[str, Any] = {
            "model": self.sources[role].facts(),
            "classes": self.data.classes,
            "rows": rows.fingerprint(),
            "validation": self.data.validation.fingerprint(),
            "training": {"seed": seed, "max_steps": steps, "learning_rate": rate},
        }
        found["training"] |= {key: getattr(self.options, key) for key in ("batch_size", "patience", "weight_decay")}
        if distilled:
            found["losses"] = {name: section.model_dump() for name, section in self.losses.items()}
            teacher = self.folders.get("teacher")
            found["teacher"] = self.options.teacher if teacher is None else (teacher.record() or {}).get("fingerprint")
        return json.loads(json.dumps(found))

    def _arguments(self, folder: StageFolder, seed: int, steps: int, epoch: int, rate: float) -> DistillationArguments:
        every = min(epoch, steps)
        return DistillationArguments(
            output_dir=str(folder.checkpoints),
            seed=seed,
            max_steps=steps,
            learning_rate=rate,
            weight_decay=self.options.weight_decay,
            warmup_steps=min(100, steps // 10),
            per_device_train_batch_size=self.options.batch_size,
            per_device_eval_batch_size=4 * self.options.batch_size,
            eval_strategy="steps",
            eval_steps=every,
            save_strategy="steps",
            save_steps=every,
            save_total_limit=1,
            load_best_model_at_end=True,
            metric_for_best_model="accuracy",
            early_stopping_patience=self.options.patience,
            logging_steps=max(1, every // 5),
            use_cpu=DEVICE.type == "cpu",
            dataloader_pin_memory=DEVICE.type == "cuda",
            disable_tqdm=True,
        )

    def _processor(self, model: nn.Module) -> Any:
        """Saved beside a Transformers model, so that a pipeline reads images as they were read here."""
        if not hasattr(model, "save_pretrained"):
            return None
        (_, size), test = self.data.shape, self.data.test
        mean, std = (values.flatten().tolist() for values in (test.mean, test.std))
        return ViTImageProcessorPil(size={"height": size, "width": size}, image_mean=mean, image_std=std)
