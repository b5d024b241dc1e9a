"""Manifests: what makes a folder of files count as whole, and says which of them is not as it was written."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from distill_nlp.durable_files import read_json, sync, sync_names, write_json

MANIFEST_FILE = "manifest.json"
CHECKPOINT_PREFIX = "checkpoint-"
_STATE_FILE = "trainer_state.json"
_CHUNK = 1 << 20
# Hashing lets go of Python's lock; more threads than this wait for memory.
_THREADS = 4

# Of this process: a finished stage is looked at more than once. Manifest, names -> (what they look like, damage).
_verified: dict[tuple[Path, tuple[str, ...]], tuple[Any, str | None]] = {}


def write_manifest(folder: Path, names: Iterable[str] | None = None, file: str = MANIFEST_FILE) -> None:
    """Brings the files of a folder to the disk and, last of all, writes the size and SHA-256 of each.

    Args:
        folder: of files that are complete.
        names: of the files; all under the folder where not given.
        file: of the manifest.

    Raises:
        OSError: something cannot be read or written.

    Example:
        >>> write_manifest(Path("checkpoints/checkpoint-100"))
    """
    names = sorted(files_in(folder, file) if names is None else names)
    sync_names(folder)
    with ThreadPoolExecutor(_THREADS) as pool:
        entries = list(pool.map(lambda name: _entry(folder / name, is_new=True), names))
    write_json(folder / file, {"files": dict(zip(names, entries, strict=True))})


def damage(folder: Path, file: str = MANIFEST_FILE, only: Collection[str] | None = None) -> str | None:
    """What is wrong with a folder that has a manifest, by the name of the first file; None if all is as written.

    Files that the manifest does not name are left out of account.

    Args:
        folder: to look at.
        file: of the manifest.
        only: names of files that matter; all that the manifest names where not given.

    Example:
        >>> damage(Path("checkpoints/checkpoint-100"))
        'optimizer.pt has 4096 of 8192 bytes'
    """
    names = _names_in(folder, file)
    if names is None:
        return f"{file} cannot be read" if (folder / file).exists() else f"{file} is missing"
    if only is not None:
        if lacking := sorted(set(only) - names.keys()):
            return f"{file} does not name {lacking[0]}"
        names = {name: names[name] for name in only}
    looks = tuple(_look(folder / name) for name in (file, *names))
    known = _verified.get((folder / file, tuple(names)))
    if known is not None and known[0] == looks:
        return known[1]
    found = _damage(folder, names)
    _verified[folder / file, tuple(names)] = (looks, found)
    return found


def _damage(folder: Path, names: dict[str, Any]) -> str | None:
    # The cheap look first, at all of them.
    for name, entry in names.items():
        path = folder / name
        try:
            size = path.stat().st_size
        except OSError:
            return f"{name} is missing"
        if size != entry.get("bytes"):
            return f"{name} has {size} of {entry.get('bytes')} bytes"
    with ThreadPoolExecutor(_THREADS) as pool:
        for name, same in zip(names, pool.map(lambda n: _is_the_same(folder / n, names[n]), names), strict=True):
            if not same:
                return f"{name} has other bytes than were written"
    return None


def _names_in(folder: Path, file: str) -> dict[str, Any] | None:
    files = (read_json(folder / file) or {}).get("files")
    if not isinstance(files, dict) or not files or not all(isinstance(entry, dict) for entry in files.values()):
        return None
    # Names that lead out of the folder are nobody's here.
    return None if any(os.path.isabs(name) or ".." in Path(name).parts for name in files) else files


def files_in(folder: Path, file: str = MANIFEST_FILE) -> list[str]:
    """Names of all files under a folder but its manifest."""
    return [
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path != folder / file
    ]


def _entry(path: Path, is_new: bool = False) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    buffer = memoryview(bytearray(_CHUNK))
    with open(path, "rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    if is_new:
        sync(path)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _is_the_same(path: Path, entry: dict[str, Any]) -> bool:
    try:
        return _entry(path) == entry
    except OSError:
        return False


def _look(path: Path) -> Any:
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


# ---- checkpoints ----


def checkpoints(folder: Path) -> list[Path]:
    """The training checkpoints in a folder, whole or not, the oldest first."""
    found = []
    for path in folder.glob(f"{CHECKPOINT_PREFIX}*"):
        step = path.name.removeprefix(CHECKPOINT_PREFIX)
        if step.isdigit() and path.is_dir():
            found.append((int(step), path))
    return [path for _, path in sorted(found)]


def newest_intact(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest training checkpoint that can be gone on from: as it was written, and the best one that it names too.

    Args:
        folder: of checkpoints.
        warn: gets a line for each newer one, with what is wrong with it.

    Example:
        >>> newest_intact(Path("student/checkpoints"), logger.warning)
        PosixPath('student/checkpoints/checkpoint-100')
    """
    for path in reversed(checkpoints(folder)):
        problem = damage(path) or _damage_of_best(path)
        if problem is None:
            return path
        warn(f"{path.name} is not whole and is left out: {problem}")
    return None


def remove_checkpoint(folder: Path) -> None:
    """Removes a checkpoint; it no longer counts from the first moment on.

    Raises:
        OSError: it cannot be removed.
    """
    (folder / MANIFEST_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder)


def best_of(checkpoint: Path) -> Path | None:
    """The best checkpoint that this one names, beside it: the folder may have moved since."""
    best = (read_json(checkpoint / _STATE_FILE) or {}).get("best_model_checkpoint")
    return None if best is None else checkpoint.parent / Path(best).name


def _damage_of_best(checkpoint: Path) -> str | None:
    best = best_of(checkpoint)
    if best is None or best == checkpoint or (problem := damage(best)) is None:
        return None
    return f"in {best.name}, the best so far, {problem}"
