"""A stage's folder: what is half-done never looks finished, and what changed is said."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from distill_nlp.errors import UsageError
from distill_nlp.stages import StageFolder, differences, write_json

SETTINGS = {"training": {"learning_rate": 0.1, "epochs": 3}, "seed": 1}


def finish(folder: StageFolder, settings=SETTINGS, text: str = "weights") -> None:
    folder.begin(settings)
    folder.result.mkdir()
    (folder.result / "model").write_text(text)
    folder.finish({"fingerprint": settings})


def test_a_finished_stage_is_known_by_its_settings(tmp_path):
    folder = StageFolder(tmp_path / "student")
    assert folder.changes(SETTINGS) is None
    finish(folder)
    assert folder.changes(SETTINGS) == []
    changed = {"training": {"learning_rate": 0.2, "epochs": 3}, "seed": 1, "new": True}
    assert folder.changes(changed) == ["training.learning_rate: 0.1 → 0.2", "new: None → True"]
    assert not folder.work.exists()


def test_an_unfinished_attempt_is_not_finished_and_keeps_the_older_result(tmp_path):
    folder = StageFolder(tmp_path / "student")
    finish(folder, text="old")
    other = SETTINGS | {"seed": 2}
    folder.begin(other)
    folder.result.mkdir()
    (folder.result / "model").write_text("new, half-written")
    assert (folder.path / "model").read_text() == "old"
    assert folder.changes(other) == ["seed: 1 → 2"]
    finish(folder, other, "new")
    assert (folder.path / "model").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["student"]


def checkpoint(folder: StageFolder, step: int, complete: bool = True) -> Path:
    path = folder.checkpoints / f"checkpoint-{step}"
    path.mkdir(parents=True)
    if complete:
        write_json(path / "trainer_state.json", {"global_step": step})
    return path


def test_an_attempt_goes_on_from_its_newest_complete_checkpoint(tmp_path):
    folder = StageFolder(tmp_path / "student")
    folder.begin(SETTINGS)
    assert folder.last_checkpoint() is None
    newest = [checkpoint(folder, 9), checkpoint(folder, 10)][-1]
    checkpoint(folder, 11, complete=False)
    folder.begin(SETTINGS)
    assert folder.last_checkpoint() == newest


def test_an_attempt_with_other_settings_starts_anew(tmp_path):
    folder = StageFolder(tmp_path / "student")
    folder.begin(SETTINGS)
    checkpoint(folder, 10)
    folder.begin(SETTINGS | {"seed": 2})
    assert folder.last_checkpoint() is None


def test_a_torn_record_is_no_record(tmp_path):
    folder = StageFolder(tmp_path / "student")
    finish(folder)
    (folder.path / "stage.json").write_text('{"fingerprint": {')
    assert folder.changes(SETTINGS) is None


def test_differences_are_leaves_by_their_dotted_names():
    assert differences({"a": {"b": 1}}, {"a": {"b": 1.0}}) == []
    assert differences({"a": {"b": 1}, "c": [1]}, {"a": 2, "c": [2]}) == ["a: {'b': 1} → 2", "c: [1] → [2]"]


# ---- one run at a time ----


def test_a_stage_that_is_worked_on_is_refused_to_a_second_run(tmp_path):
    folder, same, other = (StageFolder(tmp_path / "run" / name) for name in ("seed-0", "seed-0", "seed-1"))
    with folder.claimed():
        with pytest.raises(UsageError, match="is at work on .*seed-0; wait until it ends, or give"), same.claimed():
            pass
        with other.claimed():
            pass
    with same.claimed():
        pass


def test_a_stage_that_failed_is_free_again(tmp_path):
    folder = StageFolder(tmp_path / "seed-0")
    with pytest.raises(ZeroDivisionError), folder.claimed():
        raise ZeroDivisionError
    with StageFolder(tmp_path / "seed-0").claimed():
        pass


def test_a_dead_process_holds_no_stage(tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from distill_nlp.stages import StageFolder\n"
        "with StageFolder(Path(sys.argv[1])).claimed():\n print('claimed', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "seed-0")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "claimed\n"
        with pytest.raises(UsageError), StageFolder(tmp_path / "seed-0").claimed():
            pass
    finally:
        process.kill()
        process.communicate()
    with StageFolder(tmp_path / "seed-0").claimed():
        pass


def test_where_files_cannot_be_locked_the_run_goes_on(tmp_path, monkeypatch):
    def acquire(self, timeout):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(FileLock, "acquire", acquire)
    with StageFolder(tmp_path / "seed-0").claimed():
        (tmp_path / "done").touch()
    assert (tmp_path / "done").is_file()
