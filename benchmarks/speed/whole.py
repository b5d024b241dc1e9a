"""Whole runs of `distill-nlp run` as a user types it, beside the same distillation by a plain Trainer subclass.

A training is a process of its own, timed from its start to its end: imports, the doctor, tokens, the teacher's cache,
training, evaluation and saving are in it; of the part `stages`, a whole run is one. The two ways of a seed take turns
of half a minute, one being stopped while the other runs, and only its own turns count. Every seed has a folder and a
cache of answers of its own, and every process one of data sets, so that nothing is found ready but the fine-tuned
teacher, which is made once and serves both.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datasets import load_dataset
from idle import piece_figures, stage_figures
from measuring import Figures, Seconds, compared
from plain import half_of
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from turns import timed_in_turns

from distill_nlp.durable_files import read_json, write_json
from distill_nlp.inference import encoded_rows, predict_logits

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPE = REPOSITORY / "configs" / "recipes" / "vanilla_kd.yaml"
PLAIN = "plain Trainer subclass: fp32, teacher live, random batches"
OURS = "distill-nlp run, the student"
SPLITS = ("train", "validation", "test")


def tables(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Figures]]]:
    """Both ways over the seeds.

    Args:
        options: see `WholeRuns`.
    """
    runs, found = WholeRuns(options), {PLAIN: [], OURS: []}
    runs.make_teacher()
    for i, seed in enumerate(options.seeds):
        for name, seconds in runs.both(seed, ours_first=bool(i % 2)).items():
            found[name].append(seconds)
    figures = compared(found)
    for name, place in ((PLAIN, runs.plain_folder), (OURS, runs.student_folder)):
        figures[name]["accuracy"] = [runs.accuracy(place(seed)) for seed in options.seeds]
    figures["teacher"] = {"accuracy": [runs.accuracy(runs.teacher)]}
    yield f"{options.epochs:g} epochs on {runs.title}", figures


def stage_tables(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Figures]]]:
    """The stages of one run with its defaults, all in one process, and what this one is busy with.

    Args:
        options: see `WholeRuns`; the first of its seeds is run.
    """
    runs = WholeRuns(options)
    found, seconds = runs.stages()
    yield f"stages of distill-nlp run, {options.epochs:g} epochs on {runs.title}", stage_figures(found, seconds)
    yield "the pieces of all stages", piece_figures(found, seconds)


class WholeRuns:
    """All trainings of the part; what is finished with the same command is not done again, what was killed begins anew.

    Args:
        options: `data`, a folder with train, validation and test of `text` and `label`; `teacher`, the checkpoint that
            the teacher is made from; `work`, a folder; `seeds`; `epochs`; `longest`, tokens of a text;
            `settings`, more of `distill-nlp run`.

    Raises:
        SystemExit: there are no such rows, or no such checkpoint.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.data, self.checkpoint, self.work = (
            Path(path).expanduser().resolve() for path in (options.data, options.teacher, options.work)
        )
        self.seeds, self.epochs, self.longest = options.seeds, options.epochs, options.longest
        self.title = (
            f"{self.data.name}: {_counted(self.data)}, cut at {self.longest} tokens, seeds "
            f"{', '.join(map(str, self.seeds))}"
        )
        if not (self.checkpoint / "config.json").is_file():
            raise SystemExit(f"--teacher {self.checkpoint}: expected the folder of a checkpoint, found no config.json")
        settings: dict[str, Any] = {
            "data.dataset": self.data,
            "data.validation_split": "validation",
            "data.max_length": self.longest,
            "teacher.model": self.checkpoint,
            "student.from_teacher.layers": half_of(AutoConfig.from_pretrained(self.checkpoint).num_hidden_layers),
            "losses.ce.weight": 0.3,
            "losses.kl.weight": 0.7,
            "losses.kl.temperature": 2.0,
            "training.num_train_epochs": self.epochs,
        }
        self.settings = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
        # One teacher for both ways, whatever is set for the students.
        self.shared = [*self.settings, "--teacher.training.precision", "fp32"]
        self.more = shlex.split(options.settings)
        self.teacher = self.work / "teacher" / "run" / "teacher"

    def student_folder(self, seed: int) -> Path:
        return self._run(seed) / "student" / f"seed-{seed}"

    def plain_folder(self, seed: int) -> Path:
        return self.work / f"seed-{seed}" / "plain"

    def _run(self, seed: int) -> Path:
        return self.work / f"seed-{seed}" / "run"

    def make_teacher(self) -> Seconds:
        """Fine-tunes it, where it is not there.

        Raises:
            SystemExit: there is nothing to fine-tune.
        """
        run = self.teacher.parent
        (seconds,) = self._once(("teacher", _distill(run, 0, "teacher", self.shared), lambda: _emptied(run)))
        if not self.teacher.exists():
            raise SystemExit(
                f"--teacher {self.checkpoint} is a classifier for these labels already, so that no teacher was made: "
                "give what one is made from"
            )
        return seconds

    def both(self, seed: int, ours_first: bool = False) -> dict[str, Seconds]:
        """The plain Trainer subclass and the student of `distill-nlp run`, by turns."""
        folder, run = self.plain_folder(seed), self._run(seed)
        given = {"data": self.data, "teacher": self.teacher, "checkpoint": self.checkpoint, "seed": seed}
        given |= {"output": folder, "epochs": self.epochs, "max_length": self.longest}
        words = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
        plain = [sys.executable, str(Path(__file__).with_name("plain.py")), *words]
        ours = _distill(run, seed, "student", [*self.shared, *self.more])
        ways = {
            PLAIN: (f"seed-{seed}/plain", plain, lambda: _emptied(folder)),
            OURS: (f"seed-{seed}/student", ours, lambda: self._prepare(run)),
        }
        names = list(ways)[:: -1 if ours_first else 1]
        return dict(zip(names, self._once(*(ways[name] for name in names)), strict=True))

    def stages(self) -> tuple[dict[str, dict[str, float]], float]:
        """Seconds of the pieces of each stage of a run with the first seed, its teacher's too, and of the process."""
        run = self.work / "stages" / "run"
        # Outside the run's folder, which is emptied first.
        path = self.work / "stages" / "pieces.json"
        command = [*_distill(run, self.seeds[0], None, self.settings), *self.more]
        command = [sys.executable, str(Path(__file__).with_name("idle.py")), str(path), *command[3:]]
        ((seconds, _),) = self._once(("stages/run-times", command, lambda: _emptied(run)))
        return read_json(path), seconds

    def accuracy(self, folder: Path) -> float:
        """Of the checkpoint there, on the test rows."""
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        rows = load_dataset(str(self.data), split="test")
        encoded = encoded_rows(tokenizer, rows["text"][:], None, self.longest)
        logits = predict_logits(model, tokenizer, encoded, description=f"Testing {folder.name}")
        return float((logits.argmax(-1) == np.array(rows["label"])).mean())

    def _prepare(self, run: Path) -> None:
        """A fresh run that finds its teacher finished."""
        _emptied(run)
        run.mkdir(parents=True)
        (run / "teacher").symlink_to(self.teacher)

    def _once(self, *pieces: tuple[str, list[str], Callable[[], None]]) -> list[Seconds]:
        """Seconds of each command, as they are kept in the work folder; or of running all of them now, by turns.

        Args:
            pieces: for each the name that its seconds are kept under, the command, and what comes before it.
        """
        paths, commands = [self.work / f"{name}.json" for name, _, _ in pieces], [command for _, command, _ in pieces]
        kept = [read_json(path) or {} for path in paths]
        if [found.get("command") for found in kept] != commands:
            for path, (_, _, prepare) in zip(paths, pieces, strict=True):
                path.unlink(missing_ok=True)
                prepare()
            found = timed_in_turns(commands, REPOSITORY)
            kept = [{"command": command, "seconds": list(s)} for command, s in zip(commands, found, strict=True)]
            for path, seconds in zip(paths, kept, strict=True):
                write_json(path, seconds)
        return [tuple(found["seconds"]) for found in kept]


def _distill(run: Path, seed: int, stage: str | None, settings: list[str]) -> list[str]:
    command = [sys.executable, "-m", "distill_nlp", "run", str(RECIPE)]
    command += [] if stage is None else ["--stages", stage]
    return [*command, "--output_dir", str(run), "--seeds", str(seed), *settings]


def _emptied(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _counted(data: Path) -> str:
    """Rows of each split, in words."""
    found = load_dataset(str(data)) if all(any(data.glob(f"{split}.*")) for split in SPLITS) else {}
    for split in SPLITS:
        features = found[split].features if split in found else {}
        if "text" not in features or getattr(features.get("label"), "dtype", None) != "int64":
            raise SystemExit(
                f"--data {data}: expected a folder with files {', '.join(SPLITS)} of the columns text and label, whole "
                "numbers from 0"
            )
    return ", ".join(f"{len(found[split]):,} {split}" for split in SPLITS)
