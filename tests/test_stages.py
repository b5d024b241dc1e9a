"""A stage's folder: what is half-done never looks finished, and what changed is said."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from distill_nlp.durable_files import write_json
from distill_nlp.errors import DistillError, UsageError
from distill_nlp.manifests import write_manifest
from distill_nlp.stages import StageFolder, differences

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


def checkpoint(folder: StageFolder, step: int, complete: bool = True, best: str | None = None) -> Path:
    path = folder.checkpoints / f"checkpoint-{step}"
    write_json(path / "trainer_state.json", {"global_step": step, "best_model_checkpoint": best})
    (path / "model.safetensors").write_bytes(bytes(range(100)))
    if complete:
        write_manifest(path)
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


def test_a_torn_record_of_an_earlier_version_is_no_record(tmp_path):
    folder = StageFolder(tmp_path / "student")
    finish(folder)
    (folder.path / "manifest.json").unlink()
    (folder.path / "stage.json").write_text('{"fingerprint": {')
    assert folder.changes(SETTINGS) is None


@pytest.mark.parametrize(
    ("damaged", "problem"),
    [
        ({"model": b"weight"}, "model has 6 of 7 bytes"),
        ({"model": b"weighty"}, "model has other bytes than were written"),
        ({"model": None}, "model is missing"),
        ({"stage.json": b"{"}, "stage.json has 1 of"),
        ({"manifest.json": b"{"}, "manifest.json cannot be read"),
        ({"manifest.json": b'{"files": {}}'}, "manifest.json cannot be read"),
        ({"manifest.json": None}, "manifest.json is missing"),
    ],
)
def test_a_result_that_is_not_as_it_was_written_is_refused_by_the_name_of_the_file(tmp_path, damaged, problem):
    folder = StageFolder(tmp_path / "student")
    finish(folder)
    assert folder.changes(SETTINGS) == []
    for name, data in damaged.items():
        (folder.path / name).unlink()
        if data is not None:
            (folder.path / name).write_bytes(data)
    with pytest.raises(
        DistillError, match=f"student is not as it was written: {problem}.*; bring it back .* or delete"
    ):
        folder.changes(SETTINGS)


def test_files_that_came_later_do_not_spoil_a_result(tmp_path):
    folder = StageFolder(tmp_path / "student")
    finish(folder)
    (folder.path / "README.md").write_text("of the user")
    assert folder.changes(SETTINGS) == []


@pytest.mark.parametrize("name", ["trainer_state.json", "model.safetensors", "manifest.json"])
def test_a_checkpoint_with_a_flipped_bit_is_left_out_and_said(tmp_path, name):
    folder, said = StageFolder(tmp_path / "student"), []
    folder.begin(SETTINGS)
    older, newer = checkpoint(folder, 9), checkpoint(folder, 10)
    data = bytearray((newer / name).read_bytes())
    data[len(data) // 2] ^= 1
    (newer / name).write_bytes(data)
    assert folder.last_checkpoint(said.append) == older
    assert len(said) == 1
    assert said[0].startswith("checkpoint-10 is not whole and is left out: ")
    # Nothing can go on from it, and a new one of its step must not be mixed with it.
    assert not newer.exists()


def test_a_checkpoint_is_left_out_where_the_best_one_that_it_names_is_damaged(tmp_path):
    folder, said = StageFolder(tmp_path / "student"), []
    folder.begin(SETTINGS)
    best = checkpoint(folder, 5)
    # The run was moved: the name counts, not the path.
    checkpoint(folder, 10, best="/elsewhere/checkpoint-5")
    assert folder.last_checkpoint(said.append).name == "checkpoint-10"
    assert said == []
    (best / "model.safetensors").write_bytes(bytes(100))
    assert folder.last_checkpoint(said.append) is None
    assert said[0].startswith(
        "checkpoint-10 is not whole and is left out: in checkpoint-5, the best so far, model.safe"
    )


def test_what_a_process_left_that_was_killed_at_its_very_end_is_removed(tmp_path):
    folder = StageFolder(tmp_path / "student")
    finish(folder)
    write_json(folder.work / "stage.json", {"fingerprint": SETTINGS})
    (tmp_path / "student.old").mkdir()
    folder.tidy()
    assert sorted(p.name for p in tmp_path.iterdir() if p.name[0] != ".") == ["student"]
    (folder.work / "checkpoints").mkdir(parents=True)  # killed while it was removed
    folder.tidy()
    assert not folder.work.exists()
    # An attempt with other settings may still be gone on with.
    write_json(folder.work / "stage.json", {"fingerprint": SETTINGS | {"seed": 2}})
    folder.tidy()
    assert folder.work.is_dir()


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


def test_a_worker_that_outlives_its_parent_holds_no_stage(tmp_path):
    """As those of a data loader do for seconds, when the run is killed."""
    reading, writing = os.pipe()
    parent = os.fork()
    if parent == 0:
        with StageFolder(tmp_path / "seed-0").claimed():
            worker = os.fork()
            if worker == 0:
                time.sleep(60)
                os._exit(0)
            os.write(writing, str(worker).encode())
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(parent, 0)
    worker = int(os.read(reading, 20))
    try:
        with StageFolder(tmp_path / "seed-0").claimed():
            os.kill(worker, 0)  # it lives
    finally:
        os.kill(worker, signal.SIGKILL)


def test_where_files_cannot_be_locked_the_run_goes_on(tmp_path, monkeypatch):
    def acquire(self, timeout):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(FileLock, "acquire", acquire)
    with StageFolder(tmp_path / "seed-0").claimed():
        (tmp_path / "done").touch()
    assert (tmp_path / "done").is_file()


def test_all_files_are_on_the_disk_before_the_manifest_counts(tmp_path, monkeypatch):
    from distill_nlp import manifests

    (tmp_path / "work" / "inner").mkdir(parents=True)
    for name in ("weights", "inner/state"):
        (tmp_path / "work" / name).write_bytes(b"x")
    seen = []
    monkeypatch.setattr(manifests, "sync", lambda path: seen.append(path.relative_to(tmp_path / "work").as_posix()))
    monkeypatch.setattr(manifests, "sync_names", lambda folder: seen.append("names"))
    monkeypatch.setattr(manifests, "write_json", lambda path, value: seen.append(sorted(value["files"])))
    write_manifest(tmp_path / "work")
    assert seen[0] == "names"
    assert sorted(seen[1:3]) == ["inner/state", "weights"]
    assert seen[3] == ["inner/state", "weights"]
