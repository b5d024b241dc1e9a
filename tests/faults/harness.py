"""Real runs of the command in forked children, to be killed; and what a run leaves, to be compared.

The process that uses it imports everything once and forks a child for each attempt: a fresh interpreter would take
seconds. It must be a process of its own, which has computed nothing: a fork keeps no threads.
"""

from __future__ import annotations

import gc
import json
import mmap
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent.parent)]

import helpers
import numpy as np
import torch
import yaml

import distill_nlp.export
import distill_nlp.pipeline
import distill_nlp.report  # noqa: F401
from distill_nlp.cli import main
from distill_nlp.manifests import damage

torch.set_num_threads(1)
# As where matplotlib is not installed: plots are half of the time of such a run, and write nothing of their own.
sys.modules["matplotlib"] = None
# Else each training collects all that was imported, and a child copies the memory of it.
gc.freeze()

PATIENCE = 300.0
# What differs between two runs of the same settings: times, and what follows from them.
_MEASURED = {
    "energy",
    "latency_ms",
    "machine",
    "pass_memory",
    "path",
    "resumed_from",
    "run",
    "seconds",
    "throughput",
    "total_flos",
    "versions",
}
_MEASURED_ENDS = ("runtime", "_per_second", "speedup")

# ---- the experiment ----


def write_experiment(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """The config of a small experiment: a teacher to fine-tune, a baseline, a student in two phases, one of them with
    projections and a live teacher, the other with cached answers; some epochs of some steps each, ordered by length.
    """
    backbone = folder / "backbone"
    labels = {"id2label": {0: "LABEL_0", 1: "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}}
    helpers.make_teacher(**labels).bert.save_pretrained(backbone)
    helpers.make_tokenizer().save_pretrained(backbone)
    helpers.write_rows(folder / "data", words=6)
    settings: dict[str, Any] = {
        "seeds": [seed],
        "data": {
            "dataset": str(folder / "data"),
            "validation_split": "validation",
            "label_names": list(helpers.BINARY),
            "max_length": 16,
        },
        "teacher": {"model": str(backbone), "training": {"max_steps": 7}},
        "student": {"from_teacher": {"layers": 2}},
        "losses": {"ce": {"weight": 0.3}, "kl": {"weight": 0.7}},
        "phases": [
            {
                "losses": {"hidden": {}, "attention": {"layers": "last"}},
                "training": {"loss_balancing": "gradient_norm"},
            },
            {"losses": {"ce": {"weight": 0.3}, "kl": {"weight": 0.7}}},
        ],
        "training": {
            "max_steps": 7,
            "per_device_train_batch_size": 8,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "logging_steps": 3,
            "learning_rate": 0.003,
            "use_cpu": True,
        },
        "report": {
            "latency_samples": 1,
            "throughput_batch_size": 4,
            "throughput_batches": 1,
            "bootstrap_samples": 100,
        },
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings | changes, sort_keys=False), encoding="utf-8")
    return path


# ---- an attempt ----


@dataclass
class Attempt:
    """How an attempt ended.

    Args:
        code: exit code; minus the signal's number where one ended it.
        where: what it was doing last.
        said: all that it wrote.
        seconds: that it took.
    """

    code: int
    where: str
    said: str
    seconds: float

    @property
    def error(self) -> str:
        """The one line that begins with "error"; anything else is no refusal."""
        lines = [line for line in self.said.splitlines() if line.startswith("error")]
        return lines[0] if len(lines) == 1 and "Traceback" not in self.said else ""


class _Board:
    """What a child does now, to be read after its death."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 256)

    def write(self, text: str) -> None:
        self._memory[:] = text.encode()[:255].ljust(256, b"\0")

    def read(self) -> str:
        return self._memory[:].rstrip(b"\0").decode()


def attempt(
    arguments: list[str],
    prepare: Callable[[_Board], None] = lambda board: None,
    watch: Callable[[int], None] = lambda pid: None,
    environment: dict[str, str] | None = None,
) -> Attempt:
    """One run of the command in a child.

    Args:
        arguments: of `distill-nlp`.
        prepare: called in the child before the command.
        watch: called in the parent with the child's number, e.g. to kill it after a while.
        environment: variables of the child.
    """
    return finished(*started(arguments, prepare, environment), watch)


def started(
    arguments: list[str],
    prepare: Callable[[_Board], None] = lambda board: None,
    environment: dict[str, str] | None = None,
) -> tuple[int, _Board, int, float]:
    """The child of an attempt, at work."""
    board, start = _Board(), time.monotonic()
    reading, writing = os.pipe()
    said = os.memfd_create("said")
    child = os.fork()
    if child == 0:
        code = 99
        try:
            os.close(reading)
            os.dup2(said, 1)
            os.dup2(said, 2)
            sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))  # noqa: SIM115
            os.environ.update(environment or {})
            _follow(board)
            prepare(board)
            code = main(arguments)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(reading)
    os.close(writing)
    return child, board, said, start


def finished(
    child: int, board: _Board, said: int, start: float, watch: Callable[[int], None] = lambda pid: None
) -> Attempt:
    """Waits for the child; one that hangs is ended, and its code is None."""
    watch(child)
    deadline = start + PATIENCE
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise AssertionError(f"a run has hung for {PATIENCE:.0f} s in: {board.read()}")
        time.sleep(0.005)
    os.lseek(said, 0, os.SEEK_SET)
    with os.fdopen(said, "rb") as stream:
        text = stream.read().decode(errors="replace")
    return Attempt(os.waitstatus_to_exitcode(status), board.read(), text, time.monotonic() - start)


# Where a run can be, by what is called: attribute of a class or module -> words.
PLACES = {
    ("distill_nlp.stage_training.TrainingJob", "run"): "a stage",
    ("distill_nlp.trainer.DistillationTrainer", "training_step"): "a step",
    ("distill_nlp.trainer.DistillationTrainer", "_save_checkpoint"): "a save",
    ("distill_nlp.resumable.ResumableTrainer", "_rotate"): "the removal of older checkpoints",
    ("distill_nlp.trainer.DistillationTrainer", "evaluate"): "an evaluation",
    ("distill_nlp.trainer.DistillationTrainer", "save_model"): "the writing of weights",
    ("distill_nlp.stages.StageFolder", "begin"): "the start of a stage",
    ("distill_nlp.stages.StageFolder", "finish"): "the end of a stage",
    ("distill_nlp.teacher_filling.TeacherFilling", "run"): "the cache fill",
    ("distill_nlp.report_stage.ReportStage", "make"): "the report",
    ("distill_nlp.report_stage", "write_report"): "the writing of the report",
}


def _follow(board: _Board, entered: Callable[[str], None] = lambda place: None) -> None:
    """Notes on the board where the run is."""
    import importlib

    stack = ["between stages"]
    board.write(stack[-1])
    for (owner, name), place in PLACES.items():
        module, _, inner = owner.rpartition(".")
        target = importlib.import_module(owner) if inner.islower() else getattr(importlib.import_module(module), inner)
        setattr(target, name, _noted(getattr(target, name), place, stack, board, entered))


def _noted(function: Any, place: str, stack: list[str], board: _Board, entered: Callable[[str], None]) -> Any:
    def noted(*arguments: Any, **keywords: Any) -> Any:
        stack.append(place)
        board.write(place)
        for hook in _entered:
            hook(place)
        try:
            return function(*arguments, **keywords)
        finally:
            stack.pop()
            board.write(stack[-1])

    return noted


_entered: list[Callable[[str], None]] = []


def die_in(place: str, number: int, delay: float) -> Callable[[_Board], None]:
    """For `prepare`: ends the child, as SIGKILL would, so long after it has entered this place for the n-th time."""

    def prepare(board: _Board) -> None:
        left = [number]

        def hook(now: str) -> None:
            left[0] -= now == place
            if left[0] == 0 and now == place:
                # At its default, SIGALRM ends a process as SIGKILL does: no handler, no cleaning up.
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.setitimer(signal.ITIMER_REAL, max(delay, 1e-6))

        _entered.append(hook)

    return prepare


def die_at_file_event(folder: Path, number: int, counted: Any = None) -> Callable[[_Board], None]:
    """For `prepare`: kills the child right before it opens, renames or removes its n-th file under this folder.

    Args:
        counted: shared memory of 8 bytes that gets the number of events; for a run that is to be counted only.
    """

    def prepare(board: _Board) -> None:
        left, root = [number], str(folder)

        def hook(event: str, details: tuple) -> None:
            if event == "open":
                path, mode, flags = details
                if not (isinstance(mode, str) and set("wax+") & set(mode)) and not (
                    isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
                ):
                    return
            elif event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"):
                path = details[0]
            else:
                return
            if not (isinstance(path, str | os.PathLike) and str(path).startswith(root)):
                return
            left[0] -= 1
            if counted is not None:
                counted[:8] = (number - left[0]).to_bytes(8, "little")
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)

    return prepare


def limited_files(size: int) -> Callable[[_Board], None]:
    """For `prepare`: the child can write no file larger than this."""
    return lambda board: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


# ---- what a run leaves ----


def results_of(run: Path) -> dict[str, Any]:
    """All that must be the same: weights and logs of each model, predictions, and the report without its times."""
    found: dict[str, Any] = {}
    for record in sorted(run.rglob("stage.json")):
        name = record.parent.relative_to(run).as_posix()
        if ".partial" in name:
            continue
        found[f"{name}: weights"] = (record.parent / "model.safetensors").read_bytes()
        found[f"{name}: log"] = _unmeasured(json.loads((record.parent / "training_log.json").read_text()))
        found[f"{name}: record"] = _unmeasured(json.loads(record.read_text()))
    if (run / "report.json").exists():
        found["report"] = _unmeasured(json.loads((run / "report.json").read_text()))
        with np.load(run / "predictions.npz") as arrays:
            found["predictions"] = {name: arrays[name].tobytes() for name in arrays.files}
    return found


def _unmeasured(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if k not in _MEASURED and not k.endswith(_MEASURED_ENDS)}
        return {k: _unmeasured(v) for k, v in kept.items()}
    return [_unmeasured(v) for v in value] if isinstance(value, list) else value


def differences(run: Path, reference: dict[str, Any]) -> list[str]:
    """What a finished run has otherwise than the reference, or has left lying about."""
    try:
        found = results_of(run)
    except (OSError, ValueError) as error:
        return [f"unreadable: {error}"]
    wrong = [name for name in sorted(reference.keys() | found.keys()) if found.get(name) != reference.get(name)]
    wrong += [f"left over: {path.relative_to(run)}" for path in run.rglob("*") if path.suffix in (".partial", ".old")]
    for record in run.rglob("stage.json"):
        if (problem := damage(record.parent)) is not None:
            wrong.append(f"{record.parent.relative_to(run)}: {problem}")
    return wrong


def copied(run: Path, to: Path) -> Path:
    """A copy of a run's folder, in place of one that was there."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(run, to)
    return to
