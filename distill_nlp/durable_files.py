"""Files that are whole or not there: a temporary name, down to the disk itself, then one rename."""

from __future__ import annotations

import errno
import glob
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_LEFTOVER_SECONDS = 3600.0
_REFUSALS = {
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file may not be so large here",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EROFS: "the disk can only be read",
}


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Gives a temporary name beside a file; what is written there takes the file's name when the block ends.

    A reader, and a process that is killed, leaves the old file or the new one. An error in the block leaves the old.

    Args:
        path: of the file; its folder is made.

    Raises:
        OSError: it cannot be written.

    Example:
        >>> with replacing("report.md") as temporary:
        ...     temporary.write_text("# Report")
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Writes a file whole, see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    """Writes a file whole, in UTF-8; what that cannot hold, as half of a surrogate pair, becomes "?"."""
    write_bytes(path, text.encode("utf-8", errors="replace"))


def write_json(path: str | Path, value: Any) -> None:
    """Writes a file whole, as JSON that people can read."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: str | Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None where there is none that can be read."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def sync(path: str | Path) -> None:
    """Brings a file, or the names in a folder, from the system's memory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some file systems cannot sync a folder, or what is open for reading alone.
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Brings all files under a folder to the disk, with their names."""
    for inner, _, names in os.walk(folder):
        for name in names:
            sync(os.path.join(inner, name))
    sync_names(folder)


def sync_names(folder: Path) -> None:
    """Brings the names of all files under a folder, and its own, to the disk."""
    for inner, _, _ in os.walk(folder):
        sync(inner)
    sync(folder.parent)


def remove_leftovers(folder: Path, name: str = "") -> None:
    """Removes temporary files and folders that a killed process left; those of the last hour may be in use.

    Args:
        folder: that they are in.
        name: of what they were to become; all where not given.
    """
    for path in folder.glob(f".{glob.escape(name)}*.tmp"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime <= _LEFTOVER_SECONDS:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


def storage_problem(error: BaseException | None) -> str | None:
    """What the disk refused, in words, where that is what an error comes from; None where it is something else.

    Libraries wrap it: safetensors and PyTorch raise errors of their own with the system's words in the message.

    Example:
        >>> storage_problem(OSError(28, "No space left on device"))
        'no space left on the disk'
    """
    seen = 0
    while error is not None and seen < 10:
        if isinstance(error, OSError):
            if error.errno in _REFUSALS:
                return _REFUSALS[error.errno]
        else:
            text = str(error)
            for number, words in _REFUSALS.items():
                if os.strerror(number) in text:
                    return words
        error, seen = error.__cause__ or error.__context__, seen + 1
    return None
