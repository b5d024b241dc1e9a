"""The processes of a sweep: their part of the machine, and how they end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import pytest
import torch

from distill_nlp.errors import DistillError
from distill_nlp.sweep.workers import _take_share, work, work_in_processes


@pytest.mark.parametrize(
    ("visible", "there", "index", "expected"),
    [
        (None, 4, 1, "1"),
        (None, 2, 5, "1"),
        ("3,5", 2, 0, "3"),
        ("3,5", 2, 1, "5"),
        ("3", 1, 1, "3"),
        (None, 1, 1, None),
    ],
)
def test_each_worker_has_a_gpu_of_its_own_where_there_are_several(monkeypatch, visible, there, index, expected):
    # Set first, so that it is put back afterwards.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    if visible is None:
        del os.environ["CUDA_VISIBLE_DEVICES"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    _take_share(index, 2)
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == expected


def test_a_worker_that_nobody_waits_for_takes_no_trial():
    # Without a study, a claim would be an error.
    work(None, None, None, None, None, go_on=lambda: False)
    with pytest.raises(AttributeError):
        work(None, None, None, None, None)


def end_badly(say, go_on, folder):
    """The first one to come raises, the other one is killed."""
    say(f"{torch.get_num_threads()} threads")
    try:
        (folder / "first").mkdir()
    except FileExistsError:
        os.kill(os.getpid(), signal.SIGKILL)
    raise DistillError("no more room")


@pytest.mark.slow
def test_processes_share_the_threads_and_those_that_end_badly_are_said(tmp_path):
    said: list[str] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        work_in_processes(2, end_badly, (tmp_path,), said.append)
    finally:
        torch.set_num_threads(threads)
    ends = sorted(line.partition(": ")[2] for line in said)
    assert ends == ["1 threads", "1 threads", "ended with code -9", "ended with code 1", "no more room"]


def wait(say, go_on):
    say("here")
    time.sleep(600)


@pytest.mark.slow
def test_an_interruption_ends_the_processes_too():
    def interrupt(line):
        raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        work_in_processes(1, wait, (), interrupt)
    assert time.monotonic() - start < 300
    assert multiprocessing.active_children() == []
