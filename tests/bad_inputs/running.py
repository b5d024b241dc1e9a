"""Runs a case through the command's own `main`, in a folder of its own."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import helpers
import yaml

from bad_inputs import generators
from bad_inputs.cases import Case
from distill_nlp.cli import main

LIMIT = 120
"""Seconds after which a case counts as a hang; beside long trainings everything takes several times as long."""


class Hang(BaseException):
    """Not an `Exception`: the command must not take it for an error of its own."""


@dataclass
class Outcome:
    """What a command did.

    Args:
        exit: the code; None after a hang.
        stderr, stdout: all of it, what libraries write below Python included.
        changed: files that it added, removed or changed in the case's folder.
        seconds: on the clock.
    """

    exit: int | None
    stderr: str
    stdout: str
    changed: list[str]
    seconds: float


def make_models(folder: Path) -> Path:
    """Tiny random checkpoints by name, and data sets, made once for all cases."""
    binary = helpers.label_config(helpers.BINARY)
    several = helpers.label_config(helpers.TOPICS) | {"problem_type": "multi_label_classification"}
    made = {
        "teacher": helpers.make_teacher(**binary),
        "student": helpers.make_student(**binary),
        "three": helpers.make_teacher(),
        "topics": helpers.make_teacher(**several),
        "backbone": helpers.make_teacher(
            id2label={0: "LABEL_0", 1: "LABEL_1"}, label2id={"LABEL_0": 0, "LABEL_1": 1}
        ).bert,
    }
    for name, model in made.items():
        model.save_pretrained(folder / name)
        helpers.make_tokenizer().save_pretrained(folder / name)
    helpers.write_rows(folder / "single")
    helpers.write_rows_of_several_labels(folder / "multi_label")
    return folder


def base_config(case: Case, models: Path) -> dict[str, Any]:
    several = case.base == "multi_label"
    data = {"dataset": "data", "validation_split": "validation", "max_length": 16}
    kind = {"label_column": "labels"} if several else {"label_names": list(helpers.BINARY)}
    return {
        "output_dir": "run",
        "seeds": [0],
        "data": data | kind,
        "teacher": {"model": str(models / ("topics" if several else "teacher"))},
        "student": {"from_teacher": {"layers": 2}},
        "losses": {"kl": {}},
        "training": {"max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True},
    }


def prepare(case: Case, here: Path, models: Path) -> list[str]:
    """Lays out the case's folder; gives the words of its command."""
    shutil.copytree(models / case.base, here / "data")
    filled = {"{here}": str(here), "{models}": str(models), "{words}": "w5 " * 200}

    def fill(value: Any) -> Any:
        if isinstance(value, str):
            for mark, path in filled.items():
                value = value.replace(mark, path)
        if isinstance(value, list):
            return [fill(item) for item in value]
        return {fill(k): fill(v) for k, v in value.items()} if isinstance(value, dict) else value

    for name, text in case.files.items():
        path = here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        for other in path.parent.glob(f"{path.stem}.*"):
            other.unlink()
        path.write_text(text, encoding="utf-8", newline="")
    settings = base_config(case, models)
    for dotted, value in case.config.items():
        *parents, last = dotted.split(".")
        inner = settings
        for name in parents:
            inner = inner.setdefault(name, {})
        if value == "absent":
            inner.pop(last, None)
        else:
            inner[last] = fill(value)
    text = yaml.safe_dump(settings) if case.text is None else fill(case.text)
    (here / "config.yaml").write_text(text, encoding="utf-8", newline="")
    for name, arguments in case.make.items():
        getattr(generators, name)(here, **fill(arguments))
    return shlex.split(fill(case.command))


def run(case: Case, here: Path, models: Path) -> Outcome:
    """Runs one case in the empty folder `here`."""
    words = prepare(case, here, models)
    before, started, working = _contents(here), time.monotonic(), os.getcwd()
    exit_code = None
    with _captured() as written:
        os.chdir(here)
        try:
            with helpers.limited(LIMIT, Hang):
                exit_code = main(words)
        except SystemExit as stop:
            # argparse's own way to refuse.
            exit_code = int(stop.code or 0)
        except Hang:
            print(f"HANG: no answer within {LIMIT} s", file=sys.stderr)
        finally:
            os.chdir(working)
    after = _contents(here)
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    return Outcome(exit_code, written["stderr"], written["stdout"], changed, time.monotonic() - started)


# A run says what it found before it meets the mistake: a name in a column of 20, then text.
_PROGRESS = re.compile(r"(?!error: ).{18} {3}\S")


def complaints(case: Case, outcome: Outcome) -> list[str]:
    """What is wrong with an answer; nothing where it is as the case expects."""
    found = []
    if outcome.exit != case.exit:
        found.append(f"exit code {outcome.exit}, expected {case.exit}")
    if "Traceback" in outcome.stderr + outcome.stdout:
        found.append("a traceback")
    lines = outcome.stderr.splitlines()
    if case.exit == 0:
        # Of a valid input the only thing that must not be there is what malicious ones would write.
        found += [f"it wrote {name}" for name in outcome.changed if name.endswith("pwned")]
        return found + [f"it says {line!r}" for line in lines if re.match(r"error|.*Error\b", line)]
    lines = [line for line in lines if not _PROGRESS.match(line)]
    # argparse shows how the command is used, on several lines, before it says what is wrong.
    said = lines[-1:] if lines and lines[0].startswith("usage: ") else lines
    # Settings that are wrong together are a line each, below their number.
    together = re.search(r"(\d+) settings are wrong$", said[0]) if said else None
    if together and len(said) == 1 + int(together[1]) and all(line.startswith("  ") for line in said[1:]):
        said = [" ".join(said)[:1500]]
    if len(said) != 1:
        found.append(f"{len(said)} lines of error, expected one: {[line[:200] for line in said[:5]]}")
    elif len(said[0]) > 1500:
        found.append(f"a line of {len(said[0])} characters: {said[0][:200]}...")
    elif case.says is not None and not re.search(case.says, said[0]):
        found.append(f"expected {case.says!r}, got {said[0][:400]!r}")
    if "(--debug shows the traceback)" in outcome.stderr:
        found.append("an error that nobody foresaw")
    if outcome.changed:
        found.append(f"it left or changed {', '.join(outcome.changed)}")
    return found


def _contents(folder: Path) -> dict[str, Any]:
    """Name -> what tells that a file was changed; what a case must not leave has no content to compare."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        found[str(path.relative_to(folder))] = (status.st_mode, path.is_file() and (status.st_size, status.st_mtime_ns))
    return found


@contextmanager
def _captured() -> Iterator[dict[str, str]]:
    """Everything that goes to the two streams, also from libraries that write past Python."""
    written: dict[str, str] = {}
    streams = {"stdout": sys.stdout, "stderr": sys.stderr}
    descriptors, files = {"stdout": 1, "stderr": 2}, {}
    kept = {name: os.dup(number) for name, number in descriptors.items()}
    try:
        for name, number in descriptors.items():
            streams[name].flush()
            files[name] = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
            os.dup2(files[name].fileno(), number)
            setattr(sys, name, os.fdopen(os.dup(number), "w", encoding="utf-8", errors="replace"))
        yield written
    finally:
        for name, number in descriptors.items():
            getattr(sys, name).close()
            setattr(sys, name, streams[name])
            os.dup2(kept[name], number)
            os.close(kept[name])
            files[name].seek(0)
            written[name] = files[name].read()
            files[name].close()
