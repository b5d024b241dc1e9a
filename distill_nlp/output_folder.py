"""Whether a folder can be written to, before anything is computed for it."""

from __future__ import annotations

import os
from pathlib import Path

from distill_nlp.errors import UsageError


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
        raise UsageError(f"{setting}: nothing may be written in {there}; name another folder, or change its permissions")
