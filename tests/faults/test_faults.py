"""Real runs survive what happens to them: the small form of what `tests/faults/faults.py` does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_runs_end_as_if_nothing_had_been_or_refuse_in_one_line(tmp_path):
    """In a process of its own, which forks a child for each run."""
    script, found = Path(__file__).with_name("faults.py"), tmp_path / "found.json"
    command = [sys.executable, str(script), "--small", "--kills", "25", "--json", str(found)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-3000:]
    outcomes = json.loads(found.read_text())
    assert outcomes["killed or told to stop"]["tried"] >= 25
    # Each kind was tried, or says why it could not be.
    kinds = {
        "file of a finished run cut",
        "file of a finished run flipped",
        "file of an interrupted run cut",
        "file of an interrupted run flipped",
        "disk full (tmpfs)",
        "file size limited",
        "write permission removed (disk read-only)",
        "write permission removed (chattr +i)",
        "one of two ranks killed",
        "SIGTERM to two ranks",
    }
    assert kinds <= outcomes.keys()
    assert [name for name, one in outcomes.items() if not (one["tried"] or one["skipped"])] == []
    assert outcomes["file of a finished run cut"]["refused"] > 0
    assert outcomes["file of an interrupted run flipped"]["right"] > 5
