"""The processes of a sweep: their part of the machine, and how they end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import pytest
import torch

from distill_nlp.errors import DistillError, UsageError
from distill_nlp.sweep.workers import _take_share, first_gpu_alone, refuse_several_gpus, work, work_in_processes


@pytest.mark.parametrize(
    ("visible", "there", "index", "expected"),
    [
        (None, 4, 1, "1"),
        (None, 2, 5, "1"),
        ("3,5", 2, 0, "3"),
        ("3,5", 2, 1, "5"),
        ("3", 1, 1, "3"),
        ("GPU-7f, GPU-a1", 2, 1, "GPU-a1"),
        ("", 0, 1, ""),
        (None, 1, 1, None),
    ],
)
def test_each_worker_has_a_gpu_of_its_own_where_there_are_several(monkeypatch, visible, there, index, expected):
    # That of the process which started it.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    _take_share(index, 2, visible)
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == expected


@pytest.mark.parametrize(
    ("visible", "first"), [(None, "0"), ("3,5", "3"), ("5", "5"), ("GPU-7f, GPU-a1", "GPU-7f"), ("", ""), ("-1", "-1")]
)
def test_the_process_of_a_sweep_sees_its_first_gpu_until_the_end(monkeypatch, visible, first):
    # Set first, so that it is put back afterwards.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    if visible is None:
        del os.environ["CUDA_VISIBLE_DEVICES"]
    with first_gpu_alone() as whole:
        assert (whole, os.environ["CUDA_VISIBLE_DEVICES"]) == (visible, first)
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible


def test_a_process_that_used_cuda_with_several_gpus_before_is_refused(monkeypatch):
    found = [1]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found[-1])
    monkeypatch.setattr(torch.cuda, "init", lambda: found.append(2))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refuse_several_gpus()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UsageError, match="has used CUDA already, with 2 GPUs, and a trial takes one"):
        refuse_several_gpus()
    monkeypatch.setattr(torch.cuda, "init", lambda: found.append(1))
    refuse_several_gpus()


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
        work_in_processes(2, end_badly, (tmp_path,), said.append, None)
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
        work_in_processes(1, wait, (), interrupt, None)
    assert time.monotonic() - start < 300
    assert multiprocessing.active_children() == []
