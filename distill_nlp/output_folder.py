"""Whether a folder can be written to, before anything is computed for it."""

from __future__ import annotations

import os
from pathlib import Path

from distill_nlp.errors import UsageError
from distill_nlp.stages import STAGE_FILE


def check_can_be_made(folder: Path, setting: str) -> None:
    """Looks whether a folder is there or can be made; makes nothing.

    Args:
        folder: to be written to.
        setting: that names it, for the message.

    Raises:
        UsageError: a file stands in its place or in its way, or nothing may be written there.
    """
    there = next((path for path in (folder, *folder.absolute().parents) if os.path.lexists(path)), folder)
    if not there.is_dir():
        what = "a link that leads nowhere" if there.is_symlink() else "a file"
        raise UsageError(f"{setting}: {there} is {what}, so {folder} cannot be a folder; name another one")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"{setting}: nothing may be written in {there}; name another folder, or change permissions")


def check_no_way_out(root: Path) -> None:
    """Refuses a run's folder in which a link leads out of it: what is written, renamed and removed there stays inside.

    A link to a finished stage of another run is none: it is read, and where the stage is made again, the link itself
    makes room.

    Args:
        root: of the run; it may be a link itself.

    Raises:
        UsageError: with the link.
    """
    inside = os.path.realpath(root)
    for pattern in ("*", "student/*", "baseline/*"):
        for path in sorted(root.glob(pattern)):
            leads_out = path.is_symlink() and not os.path.realpath(path).startswith(inside + os.sep)
            if leads_out and not (path / STAGE_FILE).is_file():
                raise UsageError(
                    f"output_dir: {path} is a link that leads out of the run's folder; put what it leads to in its "
                    "place, or name another folder"
                )
