"""Whole runs of `distill-nlp run` as a user types it, beside the same distillation by a plain Trainer subclass.

Each stage is a process of its own, timed from its start to its end: imports, the doctor, tokens, the teacher's cache,
training, evaluation and saving are in it. Every seed has a folder and a cache of answers of its own, and every process
one of data sets, so that nothing is found ready but the fine-tuned teacher, which is made once and serves both.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from datasets import load_dataset
from idle import shares
from measuring import Figures, Seconds, compared, cpu_of_children, in_a_process_of_its_own
from plain import half_of
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from distill_nlp.durable_files import read_json, write_json
from distill_nlp.inference import encoded_rows, predict_logits

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPE = REPOSITORY / "configs" / "recipes" / "vanilla_kd.yaml"
PLAIN = "plain Trainer subclass: fp32, teacher live, random batches"
OURS = "distill-nlp run, the student"
SPLITS = ("train", "validation", "test")


def tables(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Figures]]]:
    """Both ways over the seeds; and, where asked for, the stages of the first seed and what its student is busy with.

    Args:
        options: see `WholeRuns`; `stages` and `idle`.
    """
    runs, found = WholeRuns(options), {PLAIN: [], OURS: []}
    teacher = runs.make_teacher()
    for i, seed in enumerate(options.seeds):
        ways = [(PLAIN, runs.plain), (OURS, runs.ours)]
        for name, way in ways[:: -1 if i % 2 else 1]:
            found[name].append(way(seed))
    figures = compared(found)
    for name, place in ((PLAIN, runs.plain_folder), (OURS, runs.student_folder)):
        figures[name]["accuracy"] = [runs.accuracy(place(seed)) for seed in options.seeds]
    figures["teacher"] = {"accuracy": [runs.accuracy(runs.teacher)]}
    yield f"{options.epochs:g} epochs on {runs.title}", figures

    seed = options.seeds[0]
    if options.stages:
        stages = {"teacher, for both": teacher, "student": found[OURS][0]}
        stages |= {stage: runs.ours(seed, stage) for stage in ("baseline", "report")}
        seconds = {name: {"seconds": wall} for name, (wall, _) in stages.items()}
        trained = (read_json(runs.student_folder(seed) / "stage.json") or {})["seconds"]
        seconds["student: training and evaluation alone"] = {"seconds": trained}
        yield f"stages of distill-nlp run, seed {seed}", seconds
    if options.idle:
        yield f"the student's stage of a run of its own, seed {seed}", runs.idle()


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
            # What is set for the students does not change the teacher.
            "teacher.training.precision": "fp32",
            "student.from_teacher.layers": half_of(AutoConfig.from_pretrained(self.checkpoint).num_hidden_layers),
            "losses.ce.weight": 0.3,
            "losses.kl.weight": 0.7,
            "losses.kl.temperature": 2.0,
            "training.num_train_epochs": self.epochs,
        }
        self.settings = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
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
        seconds = self._once("teacher", _distill(run, 0, "teacher", self.settings), lambda: _emptied(run))
        if not self.teacher.exists():
            raise SystemExit(
                f"--teacher {self.checkpoint} is a classifier for these labels already, so that no teacher was made: "
                "give what one is made from"
            )
        return seconds

    def ours(self, seed: int, stage: str = "student") -> Seconds:
        """A stage of the seed's run: the student, or after it "baseline" or "report", which a user gets besides."""
        run = self._run(seed)
        command = _distill(run, seed, stage, [*self.settings, *self.more])
        prepare = self._prepare if stage == "student" else lambda run: _emptied(run / stage)
        return self._once(f"seed-{seed}/{stage}", command, lambda: prepare(run))

    def plain(self, seed: int) -> Seconds:
        """The plain Trainer subclass."""
        given = {"data": self.data, "teacher": self.teacher, "checkpoint": self.checkpoint, "seed": seed}
        given |= {"output": self.plain_folder(seed), "epochs": self.epochs, "max_length": self.longest}
        words = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
        command = [sys.executable, str(Path(__file__).with_name("plain.py")), *words]
        return self._once(f"seed-{seed}/plain", command, lambda: _emptied(self.plain_folder(seed)))

    def idle(self) -> dict[str, Figures]:
        """Where the time of the first seed's student goes, in a run of its own."""
        run = self.work / "idle"
        self._prepare(run)
        command = _distill(run, self.seeds[0], "student", [*self.settings, *self.more])
        # Before PyTorch is loaded: too late for the command to do it, as it does in its own process.
        with tempfile.TemporaryDirectory() as datasets:
            environment = {"OMP_WAIT_POLICY": "passive"} | os.environ | {"HF_DATASETS_CACHE": datasets}
            with mock.patch.dict(os.environ, environment):
                return in_a_process_of_its_own(shares, command[3:])

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

    def _once(self, name: str, command: list[str], prepare: Callable[[], None]) -> Seconds:
        """Seconds of the command, as they are kept in the work folder, or of running it now."""
        path = self.work / f"{name}.json"
        kept = read_json(path)
        if kept is None or kept.get("command") != command:
            path.unlink(missing_ok=True)
            prepare()
            wall, cpu = timed(command)
            kept = {"command": command, "seconds": [wall, cpu]}
            write_json(path, kept)
        return tuple(kept["seconds"])


def timed(command: list[str]) -> Seconds:
    """Runs it to its end, what it says going to stderr.

    Raises:
        SystemExit: it failed.
    """
    with tempfile.TemporaryDirectory() as datasets:
        environment = {"OMP_WAIT_POLICY": "passive"} | os.environ | {"HF_DATASETS_CACHE": datasets}
        busy, start = cpu_of_children(), time.perf_counter()
        code = subprocess.run(command, env=environment, cwd=REPOSITORY, stdout=2, check=False).returncode
        wall, cpu = time.perf_counter() - start, cpu_of_children() - busy
    if code:
        raise SystemExit(f"exit code {code} of: {shlex.join(command)}")
    return wall, cpu


def _distill(run: Path, seed: int, stage: str, settings: list[str]) -> list[str]:
    command = [sys.executable, "-m", "distill_nlp", "run", str(RECIPE), "--stages", stage]
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
