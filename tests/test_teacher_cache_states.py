"""Pooled states in the cache: as the losses pool them, beside logits that are there, the same training as live."""

import json
import os
import signal

import numpy as np
import pyarrow
import pytest
import torch
from cache_run import cached, counted
from helpers import (
    bert_config,
    largest_difference,
    make_dataset,
    make_student,
    make_teacher,
    make_tokenizer,
    parameters_of,
    seeded,
    step_logs,
)
from torch import nn

from distill_nlp import (
    CachedTeacher,
    CrossEntropyLoss,
    KLDivergenceLoss,
    PKDLoss,
    RKDAngleLoss,
    RKDDistanceLoss,
    SimilarityPreservingLoss,
    cache_rows,
    teacher_filling,
)
from distill_nlp.cache_filling import cached_answers
from distill_nlp.cache_rows import with_column
from distill_nlp.errors import DistillError, UsageError
from distill_nlp.inference import batched_answers
from distill_nlp.teacher import pooled_column
from distill_nlp.teacher_cache import AnswerCache
from distill_nlp.teacher_source import TeacherSource

STATES = [(0, "mean"), (2, "first"), (4, "first"), (4, "mean")]


def reference_states(data, layer, pooling, teacher=None):
    """Each row alone, without padding: the first token's state, or the mean over the tokens."""
    teacher = make_teacher() if teacher is None else teacher
    found = []
    for row in data:
        real = [i for i, m in enumerate(row["attention_mask"]) if m]
        names = ("input_ids", "token_type_ids")
        with torch.no_grad():
            outputs = teacher(
                **{name: torch.tensor([[row[name][i] for i in real]]) for name in names}, output_hidden_states=True
            )
        states = outputs.hidden_states[layer][0].double().numpy()
        found.append(states[0] if pooling == "first" else states.mean(axis=0))
    return np.array(found)


def assert_states(rows, states, teacher=None):
    for layer, pooling in states:
        found = np.array(rows.with_format(None)[pooled_column(layer, pooling)][:])
        np.testing.assert_allclose(found, reference_states(rows, layer, pooling, teacher), rtol=0, atol=1e-5)


def folders_of(folder):
    """The manifest of each cache, by output."""
    manifests = [json.loads(path.read_text()) for path in folder.glob("*/manifest.json")]
    return {manifest.get("output", "logits"): manifest for manifest in manifests}


def cache_folder(folder, output):
    (found,) = [p.parent for p in folder.glob("*/manifest.json") if json.loads(p.read_text()).get("output") == output]
    return found


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_the_columns_hold_the_states_of_each_row(tmp_path, batch_size):
    rows, (line,) = cached(tmp_path, states=STATES, batch_size=batch_size)
    names = [pooled_column(*state) for state in STATES]
    assert rows.column_names == [*make_dataset().column_names, "teacher_logits", *names]
    for name in names:
        assert rows.features[name].feature.dtype == "float32"
        assert {len(row) for row in rows[name]} == {32}
    assert_states(rows, STATES)
    assert rows["teacher_logits"][:] == cached(tmp_path)[0]["teacher_logits"][:]
    assert folders_of(tmp_path).keys() == {"logits", "mean_0", "first_2", "first_4", "mean_4"}
    assert {m["rows"] for m in folders_of(tmp_path).values()} == {16}
    assert line.count("16 rows") == 1 + len(folders_of(tmp_path))
    size = folders_of(tmp_path)["mean_0"]["bytes"]
    assert f"; mean_0: 16 rows, {size / 1000:.1f} kB in {cache_folder(tmp_path, 'mean_0')};" in line


def test_a_mask_with_a_gap_and_padding_in_the_data_count_in_no_mean(tmp_path):
    plain = make_dataset(6)

    def pad(row, index):
        row = {name: row[name] + [0] * (15 - len(row["input_ids"])) for name in plain.column_names if name != "labels"}
        row["attention_mask"][index % 3] = 0
        return row

    data = plain.map(pad, with_indices=True)
    rows, _ = cached(tmp_path, data=data, states=[(0, "mean"), (0, "first")])
    teacher = make_teacher()
    for i, row in enumerate(data):
        with torch.no_grad():
            inputs = {name: torch.tensor([row[name]]) for name in ("input_ids", "token_type_ids", "attention_mask")}
            states = teacher(**inputs, output_hidden_states=True).hidden_states[0][0]
        real = torch.tensor(row["attention_mask"]).bool()
        found = torch.tensor(rows[i]["teacher_mean_0"])
        torch.testing.assert_close(found, states[real].mean(dim=0), rtol=0, atol=1e-5)
        torch.testing.assert_close(torch.tensor(rows[i]["teacher_first_0"]), states[real][0], rtol=0, atol=1e-5)


def test_one_pass_computes_all_and_what_is_there_is_not_computed_again(tmp_path):
    data = make_dataset(12)
    teacher, seen = counted(make_teacher())
    cached(tmp_path, teacher, data, states=[(4, "first")])
    assert sorted(seen) == sorted(data["input_ids"])
    seen.clear()
    rows, (line,) = cached(tmp_path, teacher, data.shuffle(seed=2), states=[(4, "first")])
    assert seen == []
    assert "12 rows, 100.0% there, 0 computed" in line
    assert_states(rows, [(4, "first")])


def test_states_are_added_to_logits_that_are_there_and_logits_are_not_written_again(tmp_path):
    data = make_dataset(12)
    # The longest rows, which are computed first.
    data = data.select(sorted(range(12), key=lambda i: -len(data[i]["input_ids"])))
    before, _ = cached(tmp_path, data=data.select(range(8)))
    teacher, seen = counted(make_teacher())
    rows, (line,) = cached(tmp_path, teacher, data, states=[(4, "first")])
    assert len(seen) == 12
    assert "12 rows, 0.0% there, 12 computed" in line
    assert rows["teacher_logits"][:8] == before["teacher_logits"][:]
    apart, _ = cached(tmp_path / "apart", data=data)
    np.testing.assert_allclose(rows["teacher_logits"][:], apart["teacher_logits"][:], rtol=0, atol=1e-5)
    assert_states(rows, [(4, "first")])
    manifests = folders_of(tmp_path)
    assert (manifests["logits"]["rows"], manifests["logits"]["shards"]) == (12, 2)
    assert (manifests["first_4"]["rows"], manifests["first_4"]["shards"]) == (12, 1)
    size = {output: manifest["bytes"] for output, manifest in manifests.items()}
    # Each shard of logits holds only rows that no other holds.
    assert size["logits"] < 12 * (16 + 3 * 4) + 2 * 200


def test_another_layer_is_added_later_for_the_rows_that_lack_it(tmp_path):
    data = make_dataset(12)
    cached(tmp_path, data=data, states=[(4, "first")])
    cached(tmp_path, data=data.select(range(7)), states=[(2, "mean")])
    teacher, seen = counted(make_teacher())
    wanted = []
    teacher.register_forward_pre_hook(
        lambda _, __, kwargs: wanted.append(kwargs.get("output_hidden_states")), with_kwargs=True
    )
    rows, (line,) = cached(tmp_path, teacher, data, states=[(4, "first"), (2, "mean")])
    assert sorted(seen) == sorted(data["input_ids"][7:])
    assert "58.3% there, 5 computed" in line
    assert all(asked in ([2], True) for asked in wanted)
    assert_states(rows, [(4, "first"), (2, "mean")])
    assert {m["rows"] for m in folders_of(tmp_path).values()} == {12}


def test_logits_alone_do_not_ask_for_states(tmp_path):
    teacher, wanted = make_teacher(), []
    teacher.register_forward_pre_hook(
        lambda _, __, kwargs: wanted.append("output_hidden_states" in kwargs), with_kwargs=True
    )
    cached(tmp_path, teacher)
    assert wanted == [False]


def test_states_come_from_a_checkpoint_that_is_loaded_once_and_then_no_more(tmp_path, monkeypatch):
    from distill_nlp import teacher_source

    make_teacher().save_pretrained(tmp_path / "teacher")
    rows, _ = cached(tmp_path / "cache", tmp_path / "teacher", states=[(3, "first")])
    assert_states(rows, [(3, "first")])
    monkeypatch.setattr(teacher_source, "load_classifier", lambda *_: pytest.fail("the teacher was loaded"))
    again, _ = cached(tmp_path / "cache", tmp_path / "teacher", states=[(3, "first")])
    assert again["teacher_first_3"][:] == rows["teacher_first_3"][:]


def test_another_precision_has_states_of_its_own(tmp_path):
    cached(tmp_path, states=[(4, "mean")])
    rows, (line,) = cached(tmp_path, states=[(4, "mean")], mixed_precision="bf16")
    assert "0.0% there" in line
    found, plain = np.array(rows["teacher_mean_4"][:]), reference_states(rows, 4, "mean")
    assert 1e-4 < np.abs(found - plain).max() < 0.1


def test_a_damaged_shard_of_states_costs_these_states_alone(tmp_path, caplog):
    data = make_dataset(10)
    cached(tmp_path, data=data, states=[(4, "first"), (2, "mean")])
    (shard,) = cache_folder(tmp_path, "first_4").glob("shard-*")
    content = bytearray(shard.read_bytes())
    content[-5] ^= 4
    shard.write_bytes(content)
    teacher, seen = counted(make_teacher())
    rows, (line,) = cached(tmp_path, teacher, data, states=[(4, "first"), (2, "mean")])
    assert "is damaged and set aside" in caplog.text
    assert len(seen) == 10
    assert "0.0% there, 10 computed" in line
    assert_states(rows, [(4, "first"), (2, "mean")])
    assert folders_of(tmp_path)["mean_2"]["shards"] == folders_of(tmp_path)["logits"]["shards"] == 1


@pytest.mark.parametrize("kept", [0, 1, 2, 3])
def test_a_fill_that_is_killed_between_two_outputs_goes_on(tmp_path, monkeypatch, kept):
    monkeypatch.setattr(teacher_filling, "SHARD_ROWS", 4)
    data, add, calls = make_dataset(8), AnswerCache.add, []

    def killed(*args):
        calls.append(1)
        if len(calls) > kept:
            raise KeyboardInterrupt
        add(*args)

    monkeypatch.setattr(AnswerCache, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path, data=data, states=[(4, "first")], batch_size=2)
    monkeypatch.setattr(AnswerCache, "add", add)
    teacher, seen = counted(make_teacher())
    rows, _ = cached(tmp_path, teacher, data, states=[(4, "first")], batch_size=2)
    assert len(seen) == 8 - 4 * (kept // 2)
    assert_states(rows, [(4, "first")])
    assert {m["rows"] for m in folders_of(tmp_path).values()} == {8}


def test_an_interrupt_from_the_keyboard_keeps_what_was_computed(tmp_path):
    data, teacher, calls = make_dataset(16), make_teacher(), []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGINT)

    teacher.register_forward_pre_hook(interrupt)
    # A job in the background of a shell inherits that the signal is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            cached(tmp_path, teacher, data, states=[(4, "first")], batch_size=2)
    finally:
        signal.signal(signal.SIGINT, before)
    teacher, seen = counted(make_teacher())
    rows, _ = cached(tmp_path, teacher, data, states=[(4, "first")], batch_size=2)
    # Of the four batches before, the last one's answer was on its way.
    assert len(seen) == 16 - 6
    assert_states(rows, [(4, "first")])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("output", ["logits", "states"])
def test_answers_that_are_not_finite_are_refused_and_what_was_computed_before_is_kept(tmp_path, bad, output):
    data = make_dataset(16)
    order = sorted(range(16), key=lambda i: -len(data[i]["input_ids"]))
    wrong = [order[9], order[11]]
    teacher = make_teacher()

    def spoil(_, args, kwargs, outputs):
        for i, ids in enumerate(kwargs["input_ids"].tolist()):
            if any(ids[: len(data[row]["input_ids"])] == data[row]["input_ids"] for row in wrong):
                if output == "logits":
                    outputs.logits[i, 1] = bad
                else:
                    outputs.hidden_states[4][i, 0, 5] = bad
        return outputs

    teacher.register_forward_hook(spoil, with_kwargs=True)
    name = "logits" if output == "logits" else "first_4"
    match = f"teacher's {name} of row {min(wrong)} are NaN or infinite, as for 2 of the 4 rows computed together; run "
    with pytest.raises(DistillError, match=match) as caught:
        cached(tmp_path, teacher, data, states=[(4, "first")], batch_size=4)
    assert "\n" not in str(caught.value)
    teacher, seen = counted(make_teacher())
    rows, _ = cached(tmp_path, teacher, data, states=[(4, "first")], batch_size=4)
    assert len(seen) == 16 - 8
    assert_states(rows, [(4, "first")])


# ---- where nothing can be written ----


@pytest.fixture
def read_only(monkeypatch):
    """`read_only()`: from then on, no file or folder can be made, as for a user without the right to."""

    def refuse(*args, **kwargs):
        raise PermissionError(30, "Read-only file system", str(args[0]) if args else "")

    def switch():
        monkeypatch.setattr("distill_nlp.teacher_cache.open", refuse, raising=False)
        monkeypatch.setattr("distill_nlp.teacher_cache.os.replace", refuse)
        monkeypatch.setattr("tempfile.TemporaryFile", refuse)
        monkeypatch.setattr("pathlib.Path.mkdir", refuse)

    return switch


def test_a_complete_cache_serves_where_nothing_can_be_written(tmp_path, read_only):
    before, _ = cached(tmp_path, states=[(4, "first")])
    manifest = cache_folder(tmp_path, "first_4") / "manifest.json"
    manifest.unlink()
    read_only()
    teacher, seen = counted(make_teacher())
    rows, (line,) = cached(tmp_path, teacher, states=[(4, "first")])
    assert seen == []
    assert "100.0% there" in line
    assert rows.to_list() == before.to_list()
    assert not manifest.exists()


def test_rows_that_are_missing_where_nothing_can_be_written_are_refused_before_they_are_computed(tmp_path, read_only):
    cached(tmp_path, data=make_dataset(8))
    read_only()
    teacher, seen = counted(make_teacher())
    with pytest.raises(UsageError, match="the teacher's cache cannot be written: .*Read-only file system"):
        cached(tmp_path, teacher, make_dataset(9))
    assert seen == []


def test_damage_where_nothing_can_be_written_is_said(tmp_path, read_only, caplog):
    cached(tmp_path)
    (shard,) = tmp_path.glob("*/shard-*")
    shard.write_bytes(b"garbage")
    read_only()
    with pytest.raises(UsageError, match="cannot be written"):
        cached(tmp_path)
    assert "is damaged and cannot be set aside: " in caplog.text
    assert shard.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_complete_cache_without_the_right_to_write_serves(tmp_path):
    before, _ = cached(tmp_path / "cache")
    for path in [*(tmp_path / "cache").rglob("*"), tmp_path / "cache"]:
        path.chmod(0o500 if path.is_dir() else 0o400)
    rows, _ = cached(tmp_path / "cache")
    assert rows.to_list() == before.to_list()


def test_a_full_disk_is_one_line_and_what_fits_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_filling, "SHARD_ROWS", 4)
    add, calls = AnswerCache.add, []

    def full(*args):
        calls.append(1)
        if len(calls) > 2:
            raise OSError(28, "No space left on device")
        add(*args)

    monkeypatch.setattr(AnswerCache, "add", full)
    with pytest.raises(UsageError, match="the teacher's cache cannot be written: .*No space left on device"):
        cached(tmp_path, batch_size=4)
    monkeypatch.setattr(AnswerCache, "add", add)
    teacher, seen = counted(make_teacher())
    cached(tmp_path, teacher)
    assert len(seen) == 16 - 8


# ---- settings ----


@pytest.mark.parametrize(
    ("states", "message"),
    [
        ([(5, "first")], "states: the teacher has layers 0 to 4, got 5"),
        ([(-1, "first")], "a whole number >= 0, and a pooling; got layer -1"),
        ([(True, "first")], "got layer True"),
        ([("last", "first")], "got layer 'last'"),
        ([(1, "max")], "the pooling of states must be one of first, mean, got 'max'"),
    ],
)
def test_states_that_there_are_not_are_refused_before_anything_is_computed(tmp_path, states, message):
    teacher, seen = counted(make_teacher())
    with pytest.raises(ValueError, match=message):
        cached(tmp_path, teacher, states=states)
    assert seen == []
    assert list(tmp_path.iterdir()) == []


def test_states_that_are_asked_for_twice_are_kept_once(tmp_path):
    rows, _ = cached(tmp_path, states=iter([(1, "first"), [1, "first"]]))
    assert rows.column_names[-2:] == ["teacher_logits", "teacher_first_1"]
    assert folders_of(tmp_path).keys() == {"logits", "first_1"}


def test_older_columns_are_replaced(tmp_path):
    older, _ = cached(tmp_path, make_teacher(seed=8), states=[(2, "mean")])
    rows, _ = cached(tmp_path, data=older, states=[(2, "mean")])
    assert_states(rows, [(2, "mean")])


def test_no_rows_are_no_problem(tmp_path):
    rows, _ = cached(tmp_path, data=make_dataset(3).select([]), states=[(2, "mean")])
    assert rows.column_names[-2:] == ["teacher_logits", "teacher_mean_2"]
    assert len(rows) == 0
    assert rows.features["teacher_mean_2"].feature.dtype == "float32"


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_rows_in_any_format_stay_in_it(tmp_path, kind):
    rows, _ = cached(tmp_path, data=make_dataset(5).with_format(kind), states=[(2, "mean")])
    assert rows.format["type"] == kind
    assert rows[0]["teacher_mean_2"].shape == (32,)
    assert_states(rows.with_format(None), [(2, "mean")])


def test_a_column_too_large_for_offsets_of_32_bits_is_cut_into_chunks(monkeypatch):
    values = np.arange(7 * 3, dtype=np.float32).reshape(7, 3)
    whole = with_column(make_dataset(7), "x", values)
    for limit, chunks in ((20, 2), (9, 3), (6, 4), (3, 7), (2, 7)):
        monkeypatch.setattr(cache_rows, "CHUNK_VALUES", limit)
        rows = with_column(make_dataset(7), "x", values)
        assert rows.data.column("x").num_chunks == chunks
        assert rows["x"][:] == whole["x"][:] == values.tolist()
        assert rows.features == whole.features
    assert cache_rows.CHUNK_VALUES == 2
    assert whole.data.column("x").num_chunks == 1
    assert whole.data.column("x").type == pyarrow.list_(pyarrow.float32())


def test_the_largest_chunk_is_what_offsets_of_32_bits_can_count():
    assert np.iinfo(np.int32).max == cache_rows.CHUNK_VALUES


def test_pooled_states_of_a_model_that_runs_in_half_precision_are_its_own(tmp_path):
    """The mean is taken in float32, as the losses take it."""
    teacher = make_teacher().to(torch.bfloat16)
    rows, _ = cached(tmp_path, teacher, make_dataset(3), states=[(4, "mean"), (4, "first")], batch_size=1)
    for row in rows:
        with torch.no_grad():
            inputs = {name: torch.tensor([row[name]]) for name in ("input_ids", "token_type_ids", "attention_mask")}
            states = teacher(**inputs, output_hidden_states=True).hidden_states[4][0]
        assert states.dtype == torch.bfloat16
        torch.testing.assert_close(
            torch.tensor(row["teacher_mean_4"]), states.float().mean(dim=0), rtol=1e-6, atol=1e-6
        )
        assert row["teacher_first_4"] == states[0].float().tolist()


def test_answers_of_a_batch_are_logits_and_then_states_in_their_order():
    rows = make_dataset(5).remove_columns("labels").to_list()
    batches = [rows[:2], rows[2:]]
    found = list(batched_answers(make_teacher(), make_tokenizer(), batches, None, [(3, "mean"), (1, "first")]))
    assert [[x.shape for x in answers] for answers in found] == [[(2, 3), (2, 32), (2, 32)], [(3, 3), (3, 32), (3, 32)]]
    mean, first = (np.concatenate([answers[i] for answers in found]) for i in (1, 2))
    np.testing.assert_allclose(mean, reference_states(rows, 3, "mean"), rtol=0, atol=1e-5)
    np.testing.assert_allclose(first, reference_states(rows, 1, "first"), rtol=0, atol=1e-5)


# ---- training on them ----


STATE_LOSSES = {
    "pkd": lambda: PKDLoss(layers=[[1, 2], [2, 4]]),
    "distance_first": lambda: RKDDistanceLoss(layers=[[2, 4]], representation="first"),
    "distance_mean": lambda: RKDDistanceLoss(layers="last", representation="mean"),
    "angle_mean": lambda: RKDAngleLoss(layers=[[0, 0], [2, 4]], representation="mean"),
    "similarity": lambda: SimilarityPreservingLoss(layers=[[1, 3]], representation="first"),
    "distance_logits": lambda: RKDDistanceLoss(representation="logits"),
}
READ = [(2, "first"), (4, "first"), (4, "mean"), (0, "mean"), (3, "first")]


def calm_teacher():
    """States that are not so steep that the rounding of another padding would show."""
    return seeded(1, lambda: type(make_teacher())(bert_config(initializer_range=0.1))).eval()


def trained(make_trainer, name, teacher, data, losses, **settings):
    trainer = make_trainer(
        name,
        student=make_student(initializer_range=0.1),
        teacher=teacher,
        losses=losses,
        data=data,
        # Adam would turn the rounding of a gradient that is zero into whole steps.
        **({"optim": "sgd", "learning_rate": 0.05} | settings),
    )
    seeded(7, trainer.train)
    return step_logs(trainer), parameters_of(trainer.model)


def assert_same_training(live, stored, steps):
    assert len(live[0]) == len(stored[0]) == steps
    names = [name for name in live[0][0] if name.startswith("loss")]
    for one, other in zip(live[0], stored[0], strict=True):
        for name in names:
            assert other[name] == pytest.approx(one[name], rel=1e-6, abs=1e-6), name
    assert largest_difference(live[1], stored[1]) < 1e-6
    return names


@pytest.mark.parametrize(
    "settings",
    [
        {"train_sampling_strategy": "random", "max_steps": 6, "seed": 3},
        {"train_sampling_strategy": "random", "max_steps": 6, "seed": 11, "per_device_train_batch_size": 7},
        {"train_sampling_strategy": "group_by_length", "max_steps": 3, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 5, "max_steps": 5, "remove_unused_columns": False},
    ],
    ids=["shuffled", "larger batches", "accumulated", "ragged"],
)
def test_train_on_cached_states_is_train_live(make_trainer, tmp_path, settings):
    """With dropout, rows without labels, a student of other columns, and a cache filled in another order."""
    data = make_dataset(16, unlabeled=(1, 6))
    cached(tmp_path / "cache", calm_teacher(), data.shuffle(seed=5), batch_size=3, states=READ)
    losses = {"ce": CrossEntropyLoss, "kl": KLDivergenceLoss} | STATE_LOSSES
    live = trained(
        make_trainer, "live", calm_teacher(), data, {name: make() for name, make in losses.items()}, **settings
    )
    teacher, seen = counted(calm_teacher())
    rows, _ = cached(tmp_path / "cache", teacher, data, states=READ)
    assert seen == []
    stored = trained(
        make_trainer,
        "cached",
        CachedTeacher(teacher.config),
        rows,
        {name: make() for name, make in losses.items()},
        **settings,
    )
    assert set(assert_same_training(live, stored, settings["max_steps"])) == {"loss", *(f"loss_{n}" for n in losses)}


def test_train_with_states_alone_on_pads_of_another_width_is_train_live(make_trainer, tmp_path):
    """Rows that come padded to more than they need, which the cache does not compute."""
    data = make_dataset(12)
    wide = data.map(
        lambda row: {
            name: row[name] + [0] * (19 - len(row["input_ids"]))
            for name in ("input_ids", "token_type_ids", "attention_mask")
        }
    )
    cached(tmp_path / "cache", calm_teacher(), data, states=READ)
    losses = {"pkd": STATE_LOSSES["pkd"], "distance": STATE_LOSSES["distance_mean"]}
    live = trained(make_trainer, "live", calm_teacher(), wide, {n: make() for n, make in losses.items()})
    teacher, seen = counted(calm_teacher())
    rows, _ = cached(tmp_path / "cache", teacher, wide, states=[(2, "first"), (4, "first"), (4, "mean")])
    assert seen == []
    stored = trained(
        make_trainer, "cached", CachedTeacher(teacher.config), rows, {n: make() for n, make in losses.items()}
    )
    assert_same_training(live, stored, 4)


def test_a_described_teacher_gives_the_columns_of_the_one_in_memory(tmp_path):
    make_teacher().save_pretrained(tmp_path / "teacher")
    rows, _ = cached(tmp_path / "one", states=STATES)
    described = cached_answers(
        [TeacherSource(tmp_path / "teacher")], make_dataset(), make_tokenizer(), tmp_path / "two", states=STATES
    )
    assert described.to_list() == rows.to_list()
    assert {p.name for p in (tmp_path / "one").iterdir()} == {p.name for p in (tmp_path / "two").iterdir()}


def test_a_model_without_named_layers_keeps_its_logits_and_its_error_on_states_says_why(tmp_path):
    class Shallow(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = make_teacher()
            self.config = self.inner.config

        def forward(self, input_ids, attention_mask=None, token_type_ids=None, output_hidden_states=None):
            return {"logits": self.inner(input_ids, attention_mask, token_type_ids).logits}

    rows, _ = cached(tmp_path, Shallow())
    assert len(rows["teacher_logits"]) == 16
    with pytest.raises(ValueError, match="Shallow returned 0 hidden states"):
        cached(tmp_path, Shallow(), states=[(1, "first")])


@pytest.mark.parametrize("kind", [None, "torch", "numpy"])
def test_the_trainer_reads_states_as_arrays_and_leaves_the_given_rows_alone(make_trainer, tmp_path, kind):
    rows = cached(tmp_path, states=[(4, "first")])[0].with_format(kind)
    losses = {"kl": KLDivergenceLoss(), "pkd": PKDLoss(layers=[(2, 4)])}
    trainer = make_trainer(teacher=CachedTeacher(make_teacher().config), losses=losses, data=rows)
    column = pooled_column(4, "first")
    wanted = {None: np.ndarray, "torch": torch.Tensor, "numpy": np.ndarray}[kind]
    assert isinstance(trainer.train_dataset[0][column], wanted)
    if kind is None:
        assert isinstance(rows[0][column], list)
        assert trainer.train_dataset[0]["input_ids"] == rows[0]["input_ids"]
    np.testing.assert_array_equal(np.asarray(trainer.train_dataset[0][column]), np.asarray(rows[0][column]))
