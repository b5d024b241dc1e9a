"""A stage's folder: finished or not, with which settings, and nothing half-written that looks finished."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from distill_nlp.durable_files import read_json, remove_leftovers, sync, write_json
from distill_nlp.errors import DistillError, UsageError
from distill_nlp.manifests import (
    MANIFEST_FILE,
    checkpoints,
    damage,
    files_in,
    newest_intact,
    remove_checkpoint,
    write_manifest,
)

STAGE_FILE = "stage.json"
# TensorBoard's, as the Trainer names it.
TRACKER_FOLDER = "runs"

# A lock is held as long as any process has its file open: a forked worker that outlives its parent must not.
_locked: set[int] = set()
os.register_at_fork(after_in_child=lambda: [os.close(handle) for handle in _locked])
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
        """What `finish` wrote, or None where the stage is not finished.

        Raises:
            DistillError: the result is not as it was written.
        """
        record = read_json(self.path / STAGE_FILE)
        # Results of earlier versions have no manifest.
        if (self.path / MANIFEST_FILE).exists() or (record is not None and "manifest" in record):
            problem = damage(self.path)
            if problem is not None:
                raise DistillError(
                    f"{self.path} is not as it was written: {problem}; bring it back from a copy, or delete the folder "
                    "to have it made again"
                )
        return record

    def changes(self, fingerprint: Fingerprint) -> list[str] | None:
        """Settings that differ from those of the finished result, `name: old → new`; None if nothing is finished.

        Raises:
            DistillError: the result is not as it was written.
        """
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
        handle = getattr(getattr(lock, "_context", None), "lock_file_fd", None)
        if handle is not None:
            _locked.add(handle)
        try:
            yield
        finally:
            _locked.discard(handle)
            lock.release()

    def begin(self, fingerprint: Fingerprint) -> list[str]:
        """Makes the work folder; an earlier attempt with the same settings is kept, to go on from.

        Returns:
            What has changed since an attempt whose checkpoints were removed for it; nothing where there was none.
        """
        attempt = read_json(self.work / STAGE_FILE)
        changes = [] if attempt is None else differences(attempt.get("fingerprint", {}), fingerprint)
        lost = changes if checkpoints(self.checkpoints) else []
        if attempt is None or changes:
            shutil.rmtree(self.work, ignore_errors=True)
        shutil.rmtree(self.result, ignore_errors=True)
        self.work.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.work)
        write_json(self.work / STAGE_FILE, {"fingerprint": fingerprint})
        return lost

    def last_checkpoint(self, warn: Callable[[str], None] = lambda line: None) -> Path | None:
        """The newest whole checkpoint; those after it, which nothing can go on from, are removed.

        Args:
            warn: gets a line for each of these.
        """
        found = newest_intact(self.checkpoints, warn)
        for path in reversed(checkpoints(self.checkpoints)):
            if path == found:
                break
            remove_checkpoint(path)
        return found

    def finish(self, record: dict[str, Any]) -> None:
        """Writes record and manifest into the result and puts the result in place of an older one."""
        write_json(self.result / STAGE_FILE, {**record, "manifest": MANIFEST_FILE})
        # A tracker's logs may go or grow: nothing is made of them.
        write_manifest(self.result, [n for n in files_in(self.result) if not n.startswith(f"{TRACKER_FOLDER}/")])
        shutil.rmtree(self._old, ignore_errors=True)
        if self.path.exists():
            self.path.rename(self._old)
        self.result.rename(self.path)
        sync(self.path.parent)
        shutil.rmtree(self._old, ignore_errors=True)
        shutil.rmtree(self.work, ignore_errors=True)

    @property
    def _old(self) -> Path:
        return self.path.with_name(self.path.name + ".old")

    def tidy(self) -> None:
        """Removes what a process left that was killed after it had put its result in place."""
        record = self.record()
        if record is None or not (self.work.exists() or self._old.exists()):
            return
        # Without its file nothing can go on from it: the process was killed while it removed it.
        attempt = read_json(self.work / STAGE_FILE) or record
        is_over = attempt.get("fingerprint") == record.get("fingerprint")
        # Where another run is at work, it is not over.
        with suppress(UsageError), self.claimed():
            shutil.rmtree(self._old, ignore_errors=True)
            if is_over:
                shutil.rmtree(self.work, ignore_errors=True)


def phase_folders(final: Path, phases: int) -> list[Path]:
    """Where the student lies after each phase of its training, the last one under its own name.

    Example:
        >>> phase_folders(Path("run/student/seed-0"), 2)
        [PosixPath('run/student/seed-0-phase-1'), PosixPath('run/student/seed-0')]
    """
    return [*(final.with_name(f"{final.name}-phase-{i}") for i in range(1, phases)), final]


def few_of(changes: Sequence[str]) -> str:
    """The first of them, for a line."""
    return "; ".join(changes[:3]) + (f"; and {len(changes) - 3} more" if len(changes) > 3 else "")


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """Leaves that differ between two nested values, as `dotted.name: old → new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in [*old, *(k for k in new if k not in old)]:
            dotted = f"{name}.{key}" if name else str(key)
            lines += differences(old.get(key), new.get(key), dotted)
        return lines
    return [] if old == new else [f"{name}: {old} → {new}"]
