"""A stage's folder: finished or not, with which settings, and nothing half-written that looks finished."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from distill_nlp.errors import UsageError

STAGE_FILE = "stage.json"
Fingerprint = dict[str, Any]
"""Everything that the result depends on, as nested plain values."""


class StageFolder:
    """Work goes on in `NAME.partial`; when it is done, that folder's result takes the name in one rename.

    Args:
        path: of the finished result.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.work = path.with_name(path.name + ".partial")
        self.result = self.work / "result"
        self.checkpoints = self.work / "checkpoints"

    def record(self) -> dict[str, Any] | None:
        """What `finish` wrote, or None where the stage is not finished."""
        return read_json(self.path / STAGE_FILE)

    def changes(self, fingerprint: Fingerprint) -> list[str] | None:
        """Settings that differ from those of the finished result, `name: old → new`; None if nothing is finished."""
        record = self.record()
        if record is None:
            return None
        return differences(record.get("fingerprint", {}), fingerprint)

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keeps other runs out of this stage while it is worked on; a process that dies lets go of it.

        Runs of other seeds may share the folder of the experiment.

        Raises:
            UsageError: another process is at work on it.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path.with_name(f".{self.path.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UsageError(
                f"another run is at work on {self.path}; wait until it ends, or give another --output_dir"
            ) from None
        except NotImplementedError:
            # A file system that knows no locks; there a second run is the user's care.
            pass
        try:
            yield
        finally:
            lock.release()

    def begin(self, fingerprint: Fingerprint) -> None:
        """Makes the work folder; an earlier attempt with the same settings is kept, to go on from."""
        attempt = read_json(self.work / STAGE_FILE)
        if attempt is None or differences(attempt.get("fingerprint", {}), fingerprint):
            shutil.rmtree(self.work, ignore_errors=True)
        shutil.rmtree(self.result, ignore_errors=True)
        self.work.mkdir(parents=True, exist_ok=True)
        write_json(self.work / STAGE_FILE, {"fingerprint": fingerprint})

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint whose last file was written."""
        found = []
        for folder in self.checkpoints.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
            step = folder.name.rpartition("-")[2]
            if step.isdigit() and read_json(folder / "trainer_state.json") is not None:
                found.append((int(step), folder))
        return max(found)[1] if found else None

    def finish(self, record: dict[str, Any]) -> None:
        """Writes the record into the result and puts the result in place of an older one."""
        write_json(self.result / STAGE_FILE, record)
        old = self.path.with_name(self.path.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        if self.path.exists():
            self.path.rename(old)
        self.result.rename(self.path)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(self.work, ignore_errors=True)


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """Leaves that differ between two nested values, as `dotted.name: old → new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in [*old, *(k for k in new if k not in old)]:
            dotted = f"{name}.{key}" if name else str(key)
            lines += differences(old.get(key), new.get(key), dotted)
        return lines
    return [] if old == new else [f"{name}: {old} → {new}"]


def write_json(path: Path, value: Any) -> None:
    """Writes to a temporary name and renames, so that a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None where there is none that can be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
