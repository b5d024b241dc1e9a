"""Files are whole or not there, and what the disk refuses is said in words."""

from __future__ import annotations

import errno
import os
import time

import pytest
from safetensors import SafetensorError

from distill_nlp import durable_files
from distill_nlp.cli_output import interruption_line
from distill_nlp.durable_files import (
    read_json,
    remove_leftovers,
    replacing,
    storage_problem,
    sync,
    sync_tree,
    write_json,
    write_text,
)
from distill_nlp.interruption import Interrupted


def test_a_file_is_the_old_or_the_new_one(tmp_path):
    path = tmp_path / "made" / "report.md"
    write_text(path, "old")
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        _ = temporary.write_text("half") / 0
    assert path.read_text() == "old"
    write_text(path, "new \ud800")
    assert path.read_text() == "new ?"
    assert os.listdir(path.parent) == ["report.md"]


def test_bytes_are_on_the_disk_before_the_name_is_and_the_name_before_it_ends(tmp_path, monkeypatch):
    events = []
    replace = os.replace
    monkeypatch.setattr(durable_files, "sync", lambda path: events.append(("sync", os.path.basename(path))))
    monkeypatch.setattr(
        durable_files.os, "replace", lambda *names: (events.append(("replace", names[1].name)), replace(*names))
    )
    write_json(tmp_path / "a.json", {"é": 1})
    assert events == [("sync", f".a.json.{os.getpid()}.tmp"), ("replace", "a.json"), ("sync", tmp_path.name)]
    assert read_json(tmp_path / "a.json") == {"é": 1}


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, None])
def test_what_is_no_object_is_none(tmp_path, content):
    if content is not None:
        (tmp_path / "x.json").write_bytes(content)
    assert read_json(tmp_path / "x.json") is None


def test_a_folder_that_cannot_be_synced_is_let_be_and_other_errors_are_not(tmp_path, monkeypatch):
    def refuse(number):
        def fsync(handle):
            raise OSError(number, os.strerror(number))

        return fsync

    monkeypatch.setattr(os, "fsync", refuse(errno.EINVAL))
    sync(tmp_path)
    monkeypatch.setattr(os, "fsync", refuse(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        sync(tmp_path)


def test_a_tree_is_synced_with_all_its_files_and_names(tmp_path, monkeypatch):
    (tmp_path / "work" / "inner").mkdir(parents=True)
    (tmp_path / "work" / "inner" / "file").touch()
    seen = []
    monkeypatch.setattr(durable_files, "sync", lambda path: seen.append(os.path.relpath(path, tmp_path)))
    sync_tree(tmp_path / "work")
    assert seen == ["work/inner/file", "work", "work/inner", "."]


def test_leftovers_are_removed_when_nobody_can_be_at_work_on_them(tmp_path):
    old, new, other = tmp_path / ".a.1.tmp", tmp_path / ".b.2.tmp", tmp_path / "c.tmp"
    folder = tmp_path / ".model-onnx.3.tmp"
    for path in (old, new, other):
        path.touch()
    folder.mkdir()
    (folder / "model.onnx").touch()
    for path in (old, other, folder):
        os.utime(path, (time.time() - 7200,) * 2)
    remove_leftovers(tmp_path, "model-onnx.")
    assert sorted(os.listdir(tmp_path)) == [".a.1.tmp", ".b.2.tmp", "c.tmp"]
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".b.2.tmp", "c.tmp"]


def wrapped(error):
    try:
        raise RuntimeError("PytorchStreamWriter failed") from error
    except RuntimeError as outer:
        return outer


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "x"), "no space left on the disk"),
        (OSError(errno.EDQUOT, "x"), "the disk quota is used up"),
        (PermissionError(errno.EACCES, "x"), "permission denied"),
        (OSError(errno.EROFS, "x"), "the disk can only be read"),
        (OSError(errno.EFBIG, "x"), "a file may not be so large here"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "no space left on the disk"),
        (wrapped(OSError(errno.ENOSPC, "x")), "no space left on the disk"),
        (FileNotFoundError(errno.ENOENT, "No space left on device"), None),
        (ValueError("labels"), None),
        (None, None),
    ],
)
def test_what_the_disk_refuses_is_known_however_it_is_wrapped(error, words):
    assert storage_problem(error) == words


# ---- the line after an interruption ----


@pytest.mark.parametrize(
    ("command", "error", "line"),
    [
        ("run", KeyboardInterrupt(), "interrupted; the same command goes on from the last checkpoint"),
        ("run", Interrupted(15), "interrupted (SIGTERM); the same command goes on from the last checkpoint"),
        (
            "run",
            Interrupted(2, "teacher: checkpoint-3 is saved"),
            "interrupted (SIGINT: teacher: checkpoint-3 is saved); go on with: distill-nlp run 'a b.yaml' "
            "--training.hub_token=... --training.hub_token ... --seeds 1",
        ),
        ("predict", Interrupted(15), "interrupted (SIGTERM)"),
    ],
)
def test_an_interruption_says_how_to_go_on_and_no_secret(monkeypatch, command, error, line):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    given = ["run", "a b.yaml", "--training.hub_token=hf_x", "--training.hub_token", "hf_x", "--seeds", "1"]
    assert interruption_line(command, error, given) == line


def test_a_launch_of_several_ranks_is_gone_on_with_by_its_launcher(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert interruption_line("run", Interrupted(15, "saved"), ["run"]).endswith("; the same launch goes on from there")
