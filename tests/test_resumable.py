"""A training that is ended at any step goes on as if nothing had been, from checkpoints that are whole."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from contextlib import nullcontext

import pytest
import torch
from helpers import make_dataset, parameters_of
from safetensors import SafetensorError
from transformers import TrainerCallback

from distill_nlp import resumable
from distill_nlp.interruption import Interrupted, SignalWatch, active_watch
from distill_nlp.manifests import checkpoints, damage, write_manifest
from distill_nlp.resumable import CheckpointNotWritten
from distill_nlp.trainer import DistillationTrainer
from distill_nlp.training_end import take_over_the_end

# Three epochs of four steps, with dropout, projections, balancing, a
# schedule, and a log entry across the end of an epoch.
HARD = {
    "max_steps": 11,
    "train_sampling_strategy": "group_by_length",
    "lr_scheduler_type": "linear",
    "logging_steps": 3,
    "loss_balancing": "gradient_norm",
    "projection_learning_rate_factor": 2.0,
    "save_strategy": "steps",
    "eval_strategy": "steps",
    "save_steps": 4,
    "eval_steps": 4,
    "load_best_model_at_end": True,
    "save_total_limit": 2,
}
TIMES = ("runtime", "per_second")


class Ends(TrainerCallback):
    """Sends this process a signal when a step has begun."""

    def __init__(self, step: int, signum: int = signal.SIGTERM) -> None:
        self.step, self.signum = step, signum

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), self.signum)


def hard_trainer(make_trainer, name, callbacks=(), **changes):
    from helpers import make_student

    data = make_dataset(16, unlabeled=(1, 6))
    trainer = make_trainer(
        name,
        student=make_student(),
        data=data,
        eval_dataset=make_dataset(8, seed=4),
        callbacks=list(callbacks),
        **(HARD | changes),
    )
    # `make_trainer` leaves the global generator as it found it; the order of the rows is drawn from it.
    torch.manual_seed(11)
    return trainer


def without_times(log):
    return [{k: v for k, v in entry.items() if not k.endswith(TIMES)} for entry in log]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Weights and log of the hard training as it is without interruption."""
    import helpers

    def build(name, **settings):
        return helpers.make_trainer(tmp_path_factory.mktemp("whole") / name, **settings)

    trainer = hard_trainer(build, "whole")
    output = trainer.train()
    return parameters_of(trainer.model), without_times(trainer.state.log_history), output.training_loss


def assert_same(trainer, output, uninterrupted):
    weights, log, loss = uninterrupted
    found = parameters_of(trainer.model)
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert without_times(trainer.state.log_history) == log
    assert output.training_loss == loss


# Before, at and after an evaluation; at the end of an epoch; in the last epoch; at the last step.
@pytest.mark.parametrize("step", [1, 2, 4, 5, 8, 9, 11])
def test_a_training_that_is_told_to_stop_goes_on_bit_for_bit(make_trainer, tmp_path, uninterrupted, step):
    trainer = hard_trainer(make_trainer, "run", [Ends(step - 1)])
    with pytest.raises(Interrupted) as error, SignalWatch():
        trainer.train()
    assert (error.value.exit_code, error.value.saved) == (143, f"checkpoint-{step} is saved")
    assert trainer.state.global_step == step
    newest = checkpoints(tmp_path / "run")[-1]
    assert (newest.name, damage(newest)) == (f"checkpoint-{step}", None)
    trainer = hard_trainer(make_trainer, "run")
    if step == HARD["max_steps"]:
        assert take_over_the_end(trainer, newest)
        found = parameters_of(trainer.model)
        assert all(torch.equal(found[name], uninterrupted[0][name]) for name in uninterrupted[0])
        assert without_times(trainer.state.log_history) == uninterrupted[1]
        return
    output = trainer.train(resume_from_checkpoint=True)
    assert_same(trainer, output, uninterrupted)


def test_an_order_drawn_from_the_global_generator_goes_on_after_two_interruptions(make_trainer):
    """One as an epoch ends, the other within the next, whose order comes from the state of the first's checkpoint."""
    from helpers import make_student

    def run(name, stop=None, resume=False):
        trainer = make_trainer(
            name,
            student=make_student(),
            # No `datasets.Dataset`: the Trainer's own sampler draws.
            data=make_dataset(16).to_list(),
            max_steps=11,
            save_strategy="no",
            per_device_train_batch_size=4,
            train_sampling_strategy="group_by_length",
            callbacks=[] if stop is None else [Ends(stop - 1)],
        )
        torch.manual_seed(11 if not resume else 12)
        with nullcontext() if stop is None else pytest.raises(Interrupted), SignalWatch():
            trainer.train(resume_from_checkpoint=resume)
        return parameters_of(trainer.model)

    whole = run("whole")
    run("run", 4)
    run("run", 6, resume=True)
    last = run("run", resume=True)
    assert all(torch.equal(last[name], whole[name]) for name in whole)


def test_the_end_is_taken_over_by_each_rank_as_itself(make_trainer, tmp_path, monkeypatch):
    """Else trackers of all ranks take themselves for the main one's: its state is what the checkpoint has."""
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    make_trainer("run", **settings).train()
    trainer = make_trainer("run", **settings)
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    monkeypatch.setattr(trainer, "is_local_process_zero", lambda: False)
    assert take_over_the_end(trainer, tmp_path / "run" / "checkpoint-2")
    assert (trainer.state.is_world_process_zero, trainer.state.is_local_process_zero) == (False, False)


def test_a_folder_that_was_moved_goes_on_to_the_same_best_model(make_trainer, tmp_path, uninterrupted):
    with pytest.raises(Interrupted), SignalWatch():
        hard_trainer(make_trainer, "run", [Ends(9)]).train()
    (tmp_path / "run").rename(tmp_path / "moved")
    trainer = hard_trainer(make_trainer, "moved")
    assert_same(trainer, trainer.train(resume_from_checkpoint=True), uninterrupted)


def test_the_stock_trainer_would_not_go_on_exactly(make_trainer, tmp_path, uninterrupted):
    """Without the state that is added to its checkpoints; else that state is not what makes these tests pass."""
    with pytest.raises(Interrupted), SignalWatch():
        hard_trainer(make_trainer, "run", [Ends(5)]).train()
    folder = tmp_path / "run" / "checkpoint-6"
    (folder / "resume_state_0.json").unlink()
    write_manifest(folder)
    trainer = hard_trainer(make_trainer, "run")
    with pytest.raises(AssertionError):
        assert_same(trainer, trainer.train(resume_from_checkpoint=True), uninterrupted)


def test_an_evaluation_at_the_end_of_an_epoch_is_not_lost(make_trainer, tmp_path):
    settings = {"save_strategy": "epoch", "eval_strategy": "epoch", "save_steps": 500, "eval_steps": None}
    whole = hard_trainer(make_trainer, "whole", **settings)
    output = whole.train()
    for step in (4, 6):
        trainer = hard_trainer(make_trainer, f"run-{step}", [Ends(step - 1)], **settings)
        with pytest.raises(Interrupted), SignalWatch():
            trainer.train()
        trainer = hard_trainer(make_trainer, f"run-{step}", **settings)
        again = trainer.train(resume_from_checkpoint=True)
        expected = (parameters_of(whole.model), without_times(whole.state.log_history), output.training_loss)
        assert_same(trainer, again, expected)


# ---- which checkpoints count ----


def flip(path, place=0.5):
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 0x10
    path.write_bytes(data)


def test_every_file_of_a_checkpoint_is_looked_at(make_trainer, tmp_path, uninterrupted, caplog):
    with pytest.raises(Interrupted), SignalWatch():
        hard_trainer(make_trainer, "run", [Ends(5)]).train()
    folder = tmp_path / "run" / "checkpoint-6"
    names = {path.name for path in folder.iterdir()}
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "objective.safetensors"} < names
    assert names - {"manifest.json"} == json.loads((folder / "manifest.json").read_text())["files"].keys()
    for name in sorted(names):
        kept = (folder / name).read_bytes()
        flip(folder / name)
        assert damage(folder).startswith(name) or name == "manifest.json"
        (folder / name).write_bytes(kept[: len(kept) // 2])
        assert damage(folder) is not None
        (folder / name).write_bytes(kept)
        assert damage(folder) is None
    flip(folder / "optimizer.pt")
    trainer = hard_trainer(make_trainer, "run")
    output = trainer.train(resume_from_checkpoint=True)
    assert_same(trainer, output, uninterrupted)
    assert [r.message for r in caplog.records if "left out" in r.message] == [
        "checkpoint-6 is not whole and is left out: optimizer.pt has other bytes than were written"
    ]


def test_a_checkpoint_by_name_that_is_not_whole_is_refused(make_trainer, tmp_path):
    make_trainer("run", max_steps=2, save_strategy="steps", save_steps=1).train()
    flip(tmp_path / "run" / "checkpoint-1" / "model.safetensors")
    trainer = make_trainer("run", max_steps=2)
    with pytest.raises(ValueError, match=r"checkpoint-1 is not whole: model.safetensors has other bytes"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    flip(tmp_path / "run" / "checkpoint-2" / "model.safetensors")
    with pytest.raises(ValueError, match="there is no whole checkpoint in"):
        trainer.train(resume_from_checkpoint=True)


def test_older_checkpoints_are_removed_only_when_the_new_one_is_whole(make_trainer, tmp_path, monkeypatch):
    seen = []
    write = resumable.write_manifest

    def watched(folder):
        seen.append([path.name for path in checkpoints(folder.parent) if damage(path) is None])
        write(folder)

    monkeypatch.setattr(resumable, "write_manifest", watched)
    make_trainer("run", max_steps=4, save_strategy="steps", save_steps=1, save_total_limit=1).train()
    assert seen == [[], ["checkpoint-1"], ["checkpoint-2"], ["checkpoint-3"]]
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-4"]


def test_the_best_checkpoint_outlives_the_limit_and_leftovers_of_an_attempt_go_first(make_trainer, tmp_path):
    trainer = hard_trainer(make_trainer, "run", save_steps=2, eval_steps=2, max_steps=10)
    (tmp_path / "run" / "checkpoint-99").mkdir(parents=True)
    trainer.train()
    best = f"checkpoint-{trainer.state.best_global_step}"
    names = [path.name for path in checkpoints(tmp_path / "run")]
    assert best in names
    assert "checkpoint-99" not in names
    assert "checkpoint-10" in names
    assert len(names) == 2


# ---- the disk refuses ----


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file data/3"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 237504 vs 237392"),
        PermissionError(13, "Permission denied"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(make_trainer, tmp_path, monkeypatch, error):
    trainer = make_trainer("run", max_steps=4, save_strategy="steps", save_steps=2, save_total_limit=1)
    save = DistillationTrainer._save_optimizer_and_scheduler

    def full(self, folder):
        if self.state.global_step == 4:
            raise error
        return save(self, folder)

    monkeypatch.setattr(DistillationTrainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(CheckpointNotWritten, match=r"checkpoint-4 could not be written: .*; checkpoint-2 is as it was"):
        trainer.train()
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    assert damage(tmp_path / "run" / "checkpoint-2") is None


def test_an_error_of_another_kind_in_saving_stays_what_it_is(make_trainer, monkeypatch):
    def broken(self, folder):
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(DistillationTrainer, "_save_optimizer_and_scheduler", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        make_trainer("run", max_steps=1, save_strategy="steps", save_steps=1).train()


# ---- signals ----


def tell(signum=signal.SIGTERM) -> None:
    """Sends this process a signal; Python takes it before the next step."""
    os.kill(os.getpid(), signum)
    time.sleep(0.01)


def test_handlers_are_what_they_were_afterwards(make_trainer):
    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    with SignalWatch() as watch:
        assert active_watch() is watch
        assert signal.getsignal(signal.SIGTERM) not in before
    assert active_watch() is None
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_outside_of_a_training_a_signal_ends_at_once(signum, code):
    with pytest.raises(Interrupted) as error, SignalWatch():
        tell(signum)
    assert error.value.exit_code == code


def test_a_signal_that_was_noted_too_late_is_raised_at_the_end():
    reached = []
    with pytest.raises(Interrupted), SignalWatch() as watch, watch.deferring():
        reached.append((tell(), watch.agreed(1)))
    assert reached == [(None, signal.SIGTERM)]


def test_an_error_is_not_hidden_by_a_signal():
    with pytest.raises(ZeroDivisionError), SignalWatch() as watch, watch.deferring():
        _ = tell() or 1 / 0


def test_the_second_signal_ends_the_process(tmp_path):
    """In a child: it does not come back."""
    child = os.fork()
    if child == 0:
        try:
            with SignalWatch(lambda line: (tmp_path / "noted").write_text(line)) as watch, watch.deferring():
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(10)
        finally:
            os._exit(3)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGINT
    assert "once more ends it at once" in (tmp_path / "noted").read_text()


def test_a_launcher_may_repeat_what_the_terminal_has_sent(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(Interrupted), SignalWatch() as watch, watch.deferring():
        _ = [tell(signal.SIGINT) for _ in range(2)]


def test_a_worker_that_was_forked_heeds_its_parent_alone(tmp_path):
    with SignalWatch() as watch, watch.deferring():
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGINT)  # the terminal's, for the parent to act on
            time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
            os._exit(3)
        _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGTERM


def test_in_another_thread_there_is_no_watch():
    def run():
        with SignalWatch():
            found.append(active_watch())

    found: list = []
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [None]


def test_a_training_that_goes_on_logs_as_often_as_it_is_told_now(make_trainer):
    first = hard_trainer(make_trainer, "run", [Ends(5)])
    with pytest.raises(Interrupted), SignalWatch():
        first.train()
    again = hard_trainer(make_trainer, "run", logging_steps=1)
    again.train(resume_from_checkpoint=True)
    logged = [entry["step"] for entry in again.state.log_history if "loss" in entry]
    assert logged[-4:] == [8, 9, 10, 11]
