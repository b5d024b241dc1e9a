"""The teacher's cache: rows by content, teachers by identity, nothing computed twice, the same training as live."""

import hashlib
import json
import logging
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import cache_run
import numpy as np
import pytest
import safetensors.numpy
import torch
from cache_run import cached, counted
from datasets import Dataset, concatenate_datasets
from helpers import (
    LABELS,
    bert_config,
    label_config,
    largest_difference,
    make_batch,
    make_dataset,
    make_student,
    make_teacher,
    make_tokenizer,
    parameters_of,
    seeded,
    step_logs,
)
from torch import nn
from transformers import BartConfig, BartForSequenceClassification, BertForSequenceClassification

from distill_nlp import (
    CachedTeacher,
    CrossEntropyLoss,
    DistillationObjective,
    HiddenStateLoss,
    KLDivergenceLoss,
    cache_teacher_logits,
    teacher_filling,
    teacher_source,
)
from distill_nlp.cache_filling import TeacherSource
from distill_nlp.cache_rows import row_keys
from distill_nlp.errors import UsageError
from distill_nlp.losses import ModelShape
from distill_nlp.teacher_cache import AnswerCache, weights_hash

TESTS = Path(__file__).parent


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def fill(folder):
    """`fill(teacher, data, **settings)`: the data with the logits beside them; the lines that were said in `lines`."""

    def fill(teacher=None, data=None, **settings):
        fill.lines = []
        data = make_dataset() if data is None else data
        teacher = make_teacher() if teacher is None else teacher
        return cache_teacher_logits(teacher, data, make_tokenizer(), folder, say=fill.lines.append, **settings)

    return fill


def reference_logits(teacher, data):
    """Each row alone, without any padding."""
    rows = []
    for row in data:
        real = [i for i, m in enumerate(row.get("attention_mask", [1] * len(row["input_ids"]))) if m]
        names = ("input_ids", "token_type_ids", "attention_mask")
        inputs = {name: torch.tensor([[row[name][i] for i in real]]) for name in names if name in row}
        with torch.no_grad():
            rows.append(teacher.eval()(**inputs).logits[0].tolist())
    return rows


def assert_logits(data, teacher=None):
    expected = reference_logits(make_teacher() if teacher is None else teacher, data)
    np.testing.assert_allclose(data["teacher_logits"][:], expected, rtol=0, atol=2e-5)


def only_shard(folder):
    (shard,) = folder.glob("*/shard-*.safetensors")
    return shard


def padded(data, width=20, garbage=False):
    """The same rows, padded at their end before they come to the trainer."""
    rng = np.random.default_rng(4)

    def pad(row):
        missing = width - len(row["input_ids"])
        fill = {name: [0] * missing for name in ("input_ids", "token_type_ids", "attention_mask")}
        if garbage:
            fill |= {"input_ids": rng.integers(4, 99, missing).tolist(), "token_type_ids": [1] * missing}
        return {name: row[name] + fill[name] for name in fill}

    return data.map(pad)


# ---- rows, by content ----


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_the_column_holds_the_teachers_logits_of_each_row(fill, batch_size):
    rows = fill(batch_size=batch_size)
    assert_logits(rows)
    assert rows.column_names == [*make_dataset().column_names, "teacher_logits"]
    assert rows.features["teacher_logits"].feature.dtype == "float32"
    assert rows.remove_columns("teacher_logits").to_list() == make_dataset().to_list()


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.shuffle(seed=3),
        lambda data: data.select([5, 1, 5, 9]),
        lambda data: concatenate_datasets([data.select(range(8, 16)), data.select(range(8))]),
        lambda data: padded(data),
        lambda data: padded(data, garbage=True),
        lambda data: data.remove_columns("attention_mask"),
        lambda data: data.remove_columns("labels").add_column("labels", [-100] * 16),
        lambda data: data.select_columns(["labels", "token_type_ids", "attention_mask", "input_ids"]),
        lambda data: data.with_format("torch"),
        lambda data: data.add_column("text", ["some text"] * 16),
    ],
    ids=[
        "shuffled",
        "some rows",
        "two parts",
        "padded",
        "garbage in padding",
        "no mask",
        "no labels",
        "other order of columns",
        "tensors",
        "more columns",
    ],
)
def test_the_same_rows_are_found_in_another_dress(fill, change):
    fill(batch_size=5)
    changed = change(make_dataset())
    teacher, seen = counted(make_teacher())
    rows = fill(teacher, changed, batch_size=2)
    assert seen == []
    assert f"{len(changed)} rows, 100.0% there, 0 computed" in fill.lines[0]
    assert_logits(rows.with_format(None))
    assert rows.format["type"] == changed.format["type"]


@pytest.mark.parametrize("kind", ["torch", "numpy", "pandas", "arrow"])
def test_rows_in_any_format_are_read_and_stay_in_it(fill, kind):
    rows = fill(data=make_dataset().with_format(kind))
    assert rows.format["type"] == kind
    assert_logits(rows.with_format(None))


@pytest.mark.parametrize("first", ["padded", "plain"])
def test_padding_is_not_computed_and_not_kept(fill, first):
    data = make_dataset()
    teacher, seen = counted(make_teacher())
    widths = []
    teacher.register_forward_pre_hook(
        lambda _, __, inputs: widths.append(inputs["input_ids"].shape[1]), with_kwargs=True
    )
    rows = fill(teacher, padded(data, 30, garbage=True) if first == "padded" else data)
    assert max(widths) == max(map(len, data["input_ids"]))
    assert sorted(seen) == sorted(data["input_ids"])
    assert_logits(rows)


def test_two_tokenizations_of_a_text_are_two_rows(fill):
    data = make_dataset(4)
    fill(data=data)
    one_segment = data.map(lambda row: {"token_type_ids": [0] * len(row["input_ids"])})
    cut = data.map(lambda row: {name: row[name][:-1] for name in ("input_ids", "token_type_ids", "attention_mask")})
    for other in (one_segment, cut):
        teacher, seen = counted(make_teacher())
        assert_logits(fill(teacher, other))
        assert len(seen) == 4
        assert "0.0% there, 4 computed" in fill.lines[0]


def test_token_types_that_the_teacher_does_not_read_make_no_difference(fill):
    data = make_dataset(4)
    fill(make_student(), data)
    teacher, seen = counted(make_student())
    fill(teacher, data.map(lambda row: {"token_type_ids": [0] * len(row["input_ids"])}))
    assert seen == []


def test_a_row_that_stands_twice_is_computed_once(fill):
    data = make_dataset(5)
    teacher, seen = counted(make_teacher())
    rows = fill(teacher, concatenate_datasets([data, data, data]), batch_size=2)
    assert sorted(seen) == sorted(data["input_ids"])
    assert "15 rows, 0.0% there, 5 computed" in fill.lines[0]
    assert "; 5 rows, " in fill.lines[0]
    assert_logits(rows)


def test_only_what_is_missing_is_computed(fill):
    data = make_dataset(16)
    fill(data=data.select(range(12)))
    teacher, seen = counted(make_teacher())
    assert_logits(fill(teacher, data.shuffle(seed=1)))
    assert sorted(seen) == sorted(data["input_ids"][12:])
    assert "16 rows, 75.0% there, 4 computed" in fill.lines[0]


def test_rows_are_computed_longest_first(fill):
    teacher, seen = counted(make_teacher())
    fill(teacher, batch_size=4)
    lengths = [len(ids) for ids in seen]
    assert lengths == sorted(lengths, reverse=True)
    assert len(set(lengths)) > 2


def flat(rows, **others):
    columns = {"input_ids": rows, **others}
    values = {name: np.concatenate([np.asarray(row, dtype=np.int64) for row in x]) for name, x in columns.items()}
    return values, np.cumsum([len(row) for row in rows])


@pytest.mark.parametrize(
    "others",
    [
        [[1, 2, 4]],
        [[1, 2]],
        [[1, 2, 3, 0]],
        [[3, 2, 1]],
        [[0, 1, 2, 3]],
        [[1 + 2**8, 2, 3]],
        [[1 + 2**24, 2, 3]],
    ],
)
def test_other_token_ids_are_another_key(others):
    (key,), _ = row_keys(*flat([[1, 2, 3]]))
    assert row_keys(*flat(others))[0] != [key]
    assert len(key) == 16


def test_a_key_is_a_hash_of_the_names_and_the_numbers():
    """Written out: what is on disk must be found by other processes, machines and versions."""
    types, ids, mask = [0, 1, 1], [7, 300, 9], [1, 0, 1]
    (plain,), _ = row_keys(*flat([ids], token_type_ids=[types]))
    numbers = struct.pack("<6i", *ids, *types)
    assert plain == hashlib.blake2b(b"input_ids,token_type_ids" + numbers, digest_size=16).digest()
    (masked,), _ = row_keys(*flat([ids], token_type_ids=[types], attention_mask=[mask]))
    numbers += bytes(mask)
    assert masked == hashlib.blake2b(b"input_ids,token_type_ids,attention_mask" + numbers, digest_size=16).digest()


def test_keys_of_rows_do_not_depend_on_their_neighbours():
    together, lengths = row_keys(*flat([[1, 2], [3], [4, 5, 6], [7]], token_type_ids=[[0, 1], [1], [0, 0, 1], [0]]))
    assert lengths.tolist() == [2, 1, 3, 1]
    alone = [
        row_keys(*flat([[4, 5, 6]], token_type_ids=[[0, 0, 1]]))[0][0],
        row_keys(*flat([[3]], token_type_ids=[[1]]))[0][0],
    ]
    assert [together[2], together[1]] == alone
    assert len(set(together)) == 4


def test_names_of_columns_are_part_of_a_key():
    keys = {
        row_keys(*flat([[1, 2]]))[0][0],
        row_keys(*flat([[1, 2]], token_type_ids=[[0, 0]]))[0][0],
        row_keys(*flat([[1, 2]], position_ids=[[0, 0]]))[0][0],
        row_keys(*flat([[1, 2, 0, 0]]))[0][0],
        row_keys(*flat([[0, 0]], token_type_ids=[[1, 2]]))[0][0],
    }
    assert len(keys) == 5


def test_a_mask_counts_but_for_padding_at_the_end():
    rows = [[7, 8, 9]] * 6
    masks = [[1, 1, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1], [0, 0, 0], [0, 1, 0]]
    keys, lengths = row_keys(*flat(rows, attention_mask=masks))
    assert lengths.tolist() == [3, 2, 3, 3, 3, 2]
    assert len(set(keys)) == 6
    assert keys[0] == row_keys(*flat([[7, 8, 9]]))[0][0]
    assert keys[1] == row_keys(*flat([[7, 8]]))[0][0]
    # The mask is about which tokens are seen, not about the number that says so.
    assert row_keys(*flat([[7, 8, 9]], attention_mask=[[5, 0, 5]]))[0][0] == keys[2]


def test_a_mask_with_a_gap_reaches_the_teacher(fill):
    data = Dataset.from_dict(
        {"input_ids": [[2, 8, 9, 3], [2, 8, 9, 3]], "attention_mask": [[1, 0, 1, 1], [1, 1, 1, 1]]}
    )
    rows = fill(data=data)
    with torch.no_grad():
        expected = make_teacher()(**{name: torch.tensor(data[name][:]) for name in data.column_names}).logits
    torch.testing.assert_close(torch.tensor(rows["teacher_logits"][:]), expected, rtol=0, atol=1e-5)
    assert (expected[0] - expected[1]).abs().max() > 0.1


# ---- teachers, by identity ----


def identity(teacher, mixed_precision="no"):
    return TeacherSource(teacher).identity(mixed_precision)


def with_one_weight_changed(teacher):
    with torch.no_grad():
        teacher.bert.encoder.layer[2].output.dense.bias[5] += 1e-3
    return teacher


def with_labels(teacher, labels):
    for key, value in label_config(labels).items():
        setattr(teacher.config, key, value)
    return teacher


def with_setting(teacher, name, value):
    setattr(teacher.config, name, value)
    return teacher


OTHER_TEACHERS = {
    "weight": lambda: with_one_weight_changed(make_teacher()),
    "labels": lambda: with_labels(make_teacher(), ("neutral", "negative", "positive")),
    "dtype": lambda: make_teacher().to(torch.bfloat16),
    "epsilon": lambda: make_teacher(layer_norm_eps=0.1),
    "task": lambda: with_setting(make_teacher(), "problem_type", "multi_label_classification"),
    "shape": lambda: make_teacher(num_attention_heads=2),
}


@pytest.mark.parametrize("name", OTHER_TEACHERS)
def test_another_teacher_has_a_cache_of_its_own(fill, folder, name):
    plain = fill()
    other, seen = counted(OTHER_TEACHERS[name]())
    rows = fill(other)
    assert len(seen) == 16
    assert len(list(folder.iterdir())) == 2
    if name in ("weight", "epsilon", "shape"):
        assert_logits(rows, other)
        assert rows["teacher_logits"][:] != plain["teacher_logits"][:]


def test_another_precision_has_a_cache_of_its_own_and_its_own_logits(fill, folder):
    plain, half = fill(), fill(mixed_precision="bf16")
    assert len(list(folder.iterdir())) == 2
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        row = {name: torch.tensor([value]) for name, value in make_dataset()[0].items() if name != "labels"}
        expected = make_teacher()(**row).logits.float()
    found = torch.tensor(half["teacher_logits"][0])
    assert (found - expected[0]).abs().max() < 0.05
    assert torch.equal(found.bfloat16().float(), found)
    assert not torch.equal(
        torch.tensor(plain["teacher_logits"][0]).bfloat16().float(), torch.tensor(plain["teacher_logits"][0])
    )
    with pytest.raises(ValueError, match="mixed_precision must be one of no, bf16, fp16, got 'half'"):
        fill(mixed_precision="half")


def test_what_does_not_change_the_answers_does_not_change_the_identity():
    plain = identity(make_teacher())
    used = make_teacher()
    used(**make_batch())
    assert used.config.problem_type == "single_label_classification"
    assert identity(used) == plain
    for change in ({"output_hidden_states": True}, {"output_attentions": False}):
        assert identity(make_teacher(**change)) == plain
    eager = make_teacher()
    eager.set_attn_implementation("eager")
    assert identity(eager) == plain
    assert identity(make_teacher().requires_grad_(False).train()) == plain
    assert identity(torch.compile(make_teacher())) == plain


def test_the_class_is_part_of_the_identity():
    class Other(BertForSequenceClassification):
        pass

    other = seeded(1, lambda: Other(bert_config())).eval()
    assert largest_difference(parameters_of(other), parameters_of(make_teacher())) == 0
    assert identity(other) != identity(make_teacher())


def bart():
    config = BartConfig(
        vocab_size=100,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_position_embeddings=40,
        **label_config(),
    )
    return BartForSequenceClassification(config)


@pytest.mark.parametrize("make", [make_teacher, make_student, bart], ids=["bert", "distilbert", "tied weights"])
@pytest.mark.parametrize("settings", [{}, {"max_shard_size": "10KB"}], ids=["one file", "several files"])
def test_a_teacher_in_memory_and_its_checkpoint_have_one_identity(tmp_path, monkeypatch, make, settings):
    teacher = make()
    teacher.save_pretrained(tmp_path, **settings)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or not settings
    monkeypatch.setattr(teacher_source, "load_classifier", _not_to_be_called)
    assert identity(tmp_path) == identity(teacher)


def test_a_checkpoint_in_half_precision_is_the_float32_model_that_it_is_loaded_as(tmp_path):
    make_teacher().half().save_pretrained(tmp_path)
    source = TeacherSource(tmp_path)
    assert source.model.dtype == torch.float32
    assert source.identity("no") == identity(source.model)
    assert source.identity("no") != identity(make_teacher())


def test_a_checkpoint_that_is_a_pickle_alone_is_refused(tmp_path):
    teacher = make_teacher()
    teacher.config.architectures = ["BertForSequenceClassification"]
    teacher.config.save_pretrained(tmp_path)
    torch.save(teacher.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UsageError, match="a pickle alone"):
        identity(tmp_path)


def test_a_missing_part_of_a_checkpoint_is_not_taken_for_the_whole(tmp_path):
    make_teacher().save_pretrained(tmp_path, max_shard_size="10KB")
    sorted(tmp_path.glob("model-*.safetensors"))[0].unlink()
    assert teacher_source.weight_files(str(tmp_path)) is None
    with pytest.raises(UsageError, match="does not hold what is needed"):
        identity(tmp_path)


def test_the_hash_of_weights_is_over_names_dtypes_shapes_and_values():
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2), "c": torch.tensor(3)}
    plain = weights_hash(tensors.items())
    assert weights_hash(reversed(list(tensors.items()))) == plain
    assert weights_hash((tensors | {"a": tensors["a"].t().contiguous().t()}).items()) == plain
    others = [
        {"a": tensors["a"], "d": tensors["b"], "c": tensors["c"]},
        tensors | {"a": tensors["a"].view(3, 2)},
        tensors | {"b": torch.ones(2).view(torch.int32)},
        tensors | {"b": torch.tensor([1.0, 1.0000001])},
        tensors | {"a": tensors["b"], "b": tensors["a"]},
        tensors | {"c": torch.tensor(4)},
        {"a": tensors["a"], "b": tensors["b"]},
    ]
    assert len({plain, *(weights_hash(other.items()) for other in others)}) == 1 + len(others)


# ---- the teacher is not asked twice, nor loaded ----


def _not_to_be_called(*args, **kwargs):
    raise AssertionError("the teacher was loaded")


def test_a_full_cache_does_not_load_the_teacher(fill, tmp_path, monkeypatch):
    make_teacher().save_pretrained(tmp_path / "teacher")
    fill(make_teacher())
    monkeypatch.setattr(teacher_source, "load_classifier", _not_to_be_called)
    rows = fill(str(tmp_path / "teacher"))
    assert "100.0% there" in fill.lines[0]
    assert_logits(rows)
    with pytest.raises(AssertionError, match="was loaded"):
        fill(str(tmp_path / "teacher"), make_dataset(17))


def test_a_folder_is_loaded_when_rows_are_missing(fill, tmp_path):
    make_teacher().save_pretrained(tmp_path / "teacher")
    assert_logits(fill(tmp_path / "teacher"))
    assert "0.0% there, 16 computed" in fill.lines[0]


def test_a_teacher_is_loaded_in_its_revision_onto_its_device(tmp_path, monkeypatch):
    make_teacher().save_pretrained(tmp_path)
    asked, load = [], teacher_source.load_classifier
    monkeypatch.setattr(teacher_source, "load_classifier", lambda *which: asked.append(which) or load(which[0]))
    assert TeacherSource(tmp_path, "v2", device="meta").model.device.type == "meta"
    assert TeacherSource(tmp_path).model.device == teacher_source.launch().device
    assert asked == [(str(tmp_path), "v2"), (str(tmp_path), None)]


def test_the_revision_of_a_teacher_reaches_its_source(fill, tmp_path, monkeypatch):
    make_teacher().save_pretrained(tmp_path / "teacher")
    asked, load = [], teacher_source.load_config
    monkeypatch.setattr(teacher_source, "load_config", lambda *which: asked.append(which) or load(which[0]))
    fill(tmp_path / "teacher", revision="v3")
    assert asked == [(str(tmp_path / "teacher"), "v3")]


def interrupt_after(calls, error=KeyboardInterrupt):
    """A teacher that fails at a later call, and the rows that it was asked for before."""
    teacher, seen = counted(make_teacher())
    count = []

    def fail(*_):
        count.append(1)
        if len(count) > calls:
            raise error

    teacher.register_forward_pre_hook(fail)
    return teacher, seen


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("shard_rows", [4, 8192])
def test_an_interrupted_fill_goes_on_where_it_was(fill, folder, monkeypatch, error, shard_rows):
    monkeypatch.setattr(teacher_filling, "SHARD_ROWS", shard_rows)
    teacher, _ = interrupt_after(5, error)
    with pytest.raises(error):
        fill(teacher, batch_size=2)
    assert not list(folder.glob("*/manifest.json"))
    assert not list(folder.glob("*/.*"))
    assert len(list(folder.glob("*/shard-*"))) == (2 if shard_rows == 4 else 1)
    teacher, seen = counted(make_teacher())
    assert_logits(fill(teacher, batch_size=2))
    # Of five calls the last one's answer was on its way.
    assert len(seen) == 16 - 8
    assert "16 rows, 50.0% there, 8 computed" in fill.lines[0]


def test_a_killed_fill_loses_no_more_than_a_shard(fill, folder, monkeypatch):
    """Nothing runs after a kill: the write at the end does not come."""
    monkeypatch.setattr(teacher_filling, "SHARD_ROWS", 4)
    write, count = AnswerCache.add, []

    def add(*args, **kwargs):
        count.append(1)
        if len(count) > 2:
            raise KeyboardInterrupt
        write(*args, **kwargs)

    monkeypatch.setattr(AnswerCache, "add", add)
    with pytest.raises(KeyboardInterrupt):
        fill(batch_size=2)
    monkeypatch.setattr(AnswerCache, "add", write)
    teacher, seen = counted(make_teacher())
    assert_logits(fill(teacher))
    assert len(seen) == 16 - 8


def test_a_slow_fill_writes_shards_by_time(fill, folder, monkeypatch):
    monkeypatch.setattr(teacher_filling, "SHARD_SECONDS", -1.0)
    fill(batch_size=4)
    assert len(list(folder.glob("*/shard-*"))) == 4
    monkeypatch.setattr(teacher_filling, "SHARD_SECONDS", 1e9)
    fill(data=make_dataset(30, seed=2), batch_size=4)
    assert len(list(folder.glob("*/shard-*"))) == 5


# ---- shards ----


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "a flipped bit": flip,
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-8]),
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(b"garbage"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_shard_is_set_aside_and_its_rows_are_computed_again(fill, folder, caplog, damage):
    data = make_dataset()
    fill(data=data.select(range(10)))
    shard = only_shard(folder)
    fill(data=data)
    DAMAGE[damage](shard)
    teacher, seen = counted(make_teacher())
    with caplog.at_level(logging.WARNING, logger="distill_nlp"):
        rows = fill(teacher, data)
    assert sorted(seen) == sorted(data["input_ids"][:10])
    assert "37.5% there, 10 computed" in fill.lines[0]
    assert_logits(rows)
    (message,) = [record.message for record in caplog.records]
    assert str(shard) in message
    assert "\n" not in message
    assert shard.with_suffix(".damaged").exists()
    teacher, seen = counted(make_teacher())
    fill(teacher, data)
    assert seen == []


def test_a_shard_that_another_process_takes_away_is_computed_again(fill, folder, monkeypatch):
    fill()
    shard, read = only_shard(folder), Path.read_bytes

    def gone(path):
        path.unlink(missing_ok=True)
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", gone)
    cache = AnswerCache(folder, identity(make_teacher()))
    cache.read()
    assert len(cache) == 0
    assert not shard.exists()
    monkeypatch.setattr(Path, "read_bytes", read)
    assert_logits(fill())


def test_two_that_find_the_same_damage_do_not_trip_over_each_other(fill, folder, caplog):
    fill()
    shard = only_shard(folder)
    flip(shard)
    cache = AnswerCache(folder, identity(make_teacher()))
    cache._set_aside(shard)
    cache._set_aside(shard)
    assert len(caplog.records) == 1


def test_what_others_add_meanwhile_is_seen_and_nothing_is_lost(fill, folder):
    """Another process fills the same folder with other rows, and with some of the same."""
    data = make_dataset()
    teacher, _ = counted(make_teacher())
    once = []

    def meanwhile(*_):
        if not once:
            once.append(1)
            cache_teacher_logits(make_teacher(), data.select(range(4, 12)), make_tokenizer(), folder)

    teacher.register_forward_pre_hook(meanwhile)
    assert_logits(fill(teacher, data.select(range(8)), batch_size=3))
    assert_logits(fill(make_teacher(), data))
    assert "75.0% there, 4 computed" in fill.lines[0]


def test_rows_added_are_found_after_the_next_read(folder):
    logits = np.arange(6, dtype=np.float32).reshape(2, 3)
    one, other = (AnswerCache(folder, identity(make_teacher())) for _ in range(2))
    one.add([b"a" * 16, b"\0" * 16], logits)
    one.add([b"b" * 16], logits[:1] + 10, rank=1)
    assert len(one) == 0
    for cache in (one, other, one):
        cache.read()
        assert len(cache) == 3
        assert b"\0" * 16 in cache
        assert b"c" * 16 not in cache
        found = cache.values_of([b"b" * 16, b"\0" * 16, b"b" * 16])
        assert found.tolist() == [[10, 11, 12], [3, 4, 5], [10, 11, 12]]
        assert found.dtype == np.float32
    with pytest.raises(KeyError):
        one.values_of([b"c" * 16])
    names = sorted(path.name for path in one.shards())
    assert [name[:12] for name in names] == ["shard-00000-", "shard-00001-"]
    assert one.size() == sum(path.stat().st_size for path in one.folder.iterdir())
    one.add([b"a" * 16, b"\0" * 16], logits)
    assert len(one.shards()) == 2


def test_a_shard_is_read_once(folder, monkeypatch):
    cache, read, names = AnswerCache(folder, identity(make_teacher())), Path.read_bytes, []
    monkeypatch.setattr(Path, "read_bytes", lambda path: names.append(path.name) or read(path))
    for i in range(3):
        cache.add([bytes([i] * 16)], np.full((1, 3), i, dtype=np.float32))
        cache.read()
    assert len(cache) == len(names) == len(set(names)) == 3
    assert cache.values_of([bytes([1] * 16)]).tolist() == [[1, 1, 1]]


def test_a_write_that_fails_leaves_nothing(folder, monkeypatch):
    cache = AnswerCache(folder, identity(make_teacher()))
    monkeypatch.setattr(os, "replace", _not_to_be_called)
    with pytest.raises(AssertionError):
        cache.add([b"a" * 16], np.zeros((1, 3), dtype=np.float32))
    assert list(cache.folder.iterdir()) == []


def test_a_shard_is_on_the_disk_before_it_has_its_name(folder, monkeypatch):
    events = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: events.append("sync") or sync(number))
    monkeypatch.setattr(os, "replace", lambda *names: events.append("rename") or replace(*names))
    AnswerCache(folder, identity(make_teacher())).add([b"a" * 16], np.zeros((1, 3), dtype=np.float32))
    # The file, its name, and the folder that holds the name.
    assert events == ["sync", "rename", "sync"]


def test_a_folder_is_known_by_a_hash_of_the_teacher_and_its_shards_by_their_names(fill, folder):
    """Written out: what earlier versions and other machines have put there is served."""
    teacher, data = make_teacher(), make_dataset(6)
    fill(teacher, data)
    name = hashlib.blake2b(json.dumps(identity(teacher), sort_keys=True).encode(), digest_size=16).hexdigest()
    assert [path.name for path in folder.iterdir()] == [name]
    assert sorted(identity(teacher)) == [
        "class",
        "config",
        "format",
        "labels",
        "mixed_precision",
        "problem_type",
        "weights",
    ]
    shard = safetensors.numpy.load_file(only_shard(folder))
    assert {name: (array.dtype, array.shape) for name, array in shard.items()} == {
        "keys": (np.uint8, (6, 16)),
        "logits": (np.float32, (6, 3)),
    }
    content = safetensors.numpy.save({"keys": shard["keys"], "logits": shard["logits"] + 1})
    only_shard(folder).unlink()
    digest = hashlib.blake2b(content, digest_size=16).hexdigest()
    (folder / name / f"shard-00003-{digest}.safetensors").write_bytes(content)
    teacher, seen = counted(teacher)
    rows = fill(teacher, data)
    assert seen == []
    np.testing.assert_allclose(rows["teacher_logits"][:], np.array(reference_logits(teacher, data)) + 1, atol=2e-5)


def test_half_written_files_are_not_read(fill, folder):
    fill()
    shard = only_shard(folder)
    shard.with_name(f".{shard.name}.123.tmp").write_bytes(b"half")
    teacher, seen = counted(make_teacher())
    fill(teacher)
    assert seen == []


def test_the_manifest_says_what_the_folder_holds(fill, folder, tmp_path):
    make_teacher().save_pretrained(tmp_path / "teacher")
    fill(data=make_dataset(5))
    fill(tmp_path / "teacher", make_dataset(16, seed=1))
    (path,) = folder.glob("*/manifest.json")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    assert manifest["teacher"] == str(tmp_path / "teacher")
    assert manifest["labels"] == list(LABELS)
    assert manifest["class"] == "BertForSequenceClassification"
    assert (manifest["rows"], manifest["shards"], manifest["mixed_precision"]) == (21, 2, "no")
    assert manifest["bytes"] == sum(shard.stat().st_size for shard in folder.glob("*/shard-*"))
    assert f"; 21 rows, {manifest['bytes']} B in {path.parent}" in fill.lines[0]
    # People may lose it.
    path.unlink()
    fill(data=make_dataset(5))
    assert "100.0% there" in fill.lines[0]
    assert path.exists()


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2.34e6, "2.3 MB"), (5e12, "5000.0 GB")]
)
def test_sizes_are_for_people(count, text):
    assert teacher_filling._bytes(count) == text


# ---- what is refused ----


def test_data_without_token_ids_are_refused(fill):
    with pytest.raises(ValueError, match=r"no token ids \(input_ids\) in the data, only text, labels"):
        fill(data=Dataset.from_dict({"text": ["a"], "labels": [0]}))
    with pytest.raises(ValueError, match="or the folder or Hub id of one, got CachedTeacher"):
        fill(CachedTeacher(make_teacher().config))
    with pytest.raises(ValueError, match="beside the rows of a datasets.Dataset, got list; .*from_list"):
        fill(data=make_dataset().to_list())
    with pytest.raises(ValueError, match="column input_ids must hold lists of whole numbers, got .*double"):
        fill(data=Dataset.from_dict({"input_ids": [[0.5, 1.5]]}))
    with pytest.raises(ValueError, match="column input_ids must hold lists of whole numbers, got int32"):
        fill(data=Dataset.from_dict({"input_ids": [1, 2]}))
    with pytest.raises(ValueError, match="rows of token_type_ids are not as long as those of input_ids"):
        fill(data=Dataset.from_dict({"input_ids": [[1, 2], [3]], "token_type_ids": [[0], [0, 1]]}))


def test_a_folder_that_cannot_be_one_is_refused(fill, folder):
    folder.write_text("a file")
    with pytest.raises(UsageError, match="the teacher's cache cannot be written: .*cache"):
        fill()


def test_no_rows_are_no_problem(fill):
    rows = fill(data=make_dataset(3).select([]))
    assert len(rows) == 0
    assert "teacher_logits" in rows.column_names
    assert "0 rows, 100.0% there, 0 computed" in fill.lines[0]


def test_an_older_column_is_replaced(fill):
    older = fill(make_teacher(seed=8))
    assert_logits(fill(data=older))


def test_a_teacher_that_takes_anything_gets_what_the_tokenizer_makes(fill):
    class Anything(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = make_teacher().config
            self.weight = nn.Parameter(torch.ones(1))
            self.seen = set()

        def forward(self, **inputs):
            self.seen |= set(inputs)
            return {"logits": inputs["token_type_ids"][:, :3].float() * self.weight}

    teacher = Anything()
    data = make_dataset(4).add_column("text", ["a"] * 4)
    rows = fill(teacher, data)
    assert teacher.seen == {"input_ids", "attention_mask", "token_type_ids"}
    assert rows["teacher_logits"][:] == [row[:3] for row in data["token_type_ids"]]


# ---- the stand-in ----


def bound(*losses, student=None, teacher_config=None):
    student = make_student() if student is None else student
    teacher_config = make_teacher().config if teacher_config is None else teacher_config
    objective = DistillationObjective(dict(losses))
    objective.bind(ModelShape.from_config(student.config), ModelShape.from_config(teacher_config))
    return CachedTeacher(teacher_config).bind(student.config, objective)


def test_gives_the_logits_of_the_batch_in_the_students_order():
    logits = torch.arange(6.0).view(2, 3)
    teacher_config = with_labels(make_teacher(), ("positive", "negative", "neutral")).config
    stand_in = bound(("kl", KLDivergenceLoss()), teacher_config=teacher_config)
    found = stand_in({"teacher_logits": logits})
    assert found.logits.tolist() == [[1, 2, 0], [4, 5, 3]]
    assert found.hidden_states == found.attentions == {}
    same = bound(("kl", KLDivergenceLoss()))
    assert torch.equal(same({"teacher_logits": logits}).logits, logits)


def test_one_stand_in_serves_students_of_several_orders():
    logits = torch.arange(3.0)[None]
    stand_in, objective = CachedTeacher(make_teacher().config), DistillationObjective({"kl": KLDivergenceLoss()})
    turned = stand_in.bind(with_labels(make_student(), ("positive", "negative", "neutral")).config, objective)
    same = stand_in.bind(make_student().config, objective)
    unnamed = stand_in.bind(None, objective)
    assert turned({"teacher_logits": logits}).logits.tolist() == [[2, 0, 1]]
    for found in (same, unnamed, stand_in):
        assert found({"teacher_logits": logits}).logits.tolist() == [[0, 1, 2]]


def test_losses_of_layers_are_refused_by_name():
    losses = [("kl", KLDivergenceLoss()), ("inner", HiddenStateLoss())]
    with pytest.raises(ValueError, match="^losses inner read the teacher's layers token by token, and these are not"):
        bound(*losses)


def test_other_labels_are_refused():
    with pytest.raises(ValueError, match="do not match by name"):
        bound(("kl", KLDivergenceLoss()), student=make_student(**label_config(("a", "b", "c"))))


def test_logits_of_another_width_are_refused():
    stand_in = bound(("kl", KLDivergenceLoss()))
    with pytest.raises(ValueError, match=r"must be of shape \(rows, 3\), got \(2, 4\)"):
        stand_in({"teacher_logits": torch.zeros(2, 4)})
    with pytest.raises(ValueError, match=r"must be of shape \(rows, 3\), got \(3,\)"):
        stand_in({"teacher_logits": torch.zeros(3)})
    with pytest.raises(ValueError, match="the batch has no teacher_logits; does the data collator drop them"):
        stand_in({"input_ids": torch.zeros(2, 4)})


LOGIT_LOSSES = {"ce": CrossEntropyLoss, "kl": lambda: KLDivergenceLoss(2.0)}


def logit_losses():
    return {name: make() for name, make in LOGIT_LOSSES.items()}


def test_a_trainer_refuses_data_without_the_column(make_trainer):
    with pytest.raises(ValueError, match="needs the column teacher_logits in train_dataset.*input_ids, token_type_ids"):
        make_trainer(teacher=CachedTeacher(make_teacher().config), losses=logit_losses())


def test_a_trainer_refuses_losses_of_layers(make_trainer, fill):
    with pytest.raises(ValueError, match="losses hidden, attention read the teacher's layers"):
        make_trainer(teacher=CachedTeacher(make_teacher().config), data=fill())


def test_the_column_does_not_reach_the_student(make_trainer, fill):
    class Anything(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = make_student(dropout=0.0)
            self.config = self.inner.config
            self.seen = set()

        def forward(self, **inputs):
            self.seen |= set(inputs)
            return self.inner(inputs["input_ids"], inputs["attention_mask"])

    student, rows = Anything(), fill()
    trainer = make_trainer(
        student=student,
        teacher=CachedTeacher(make_teacher().config),
        losses=logit_losses(),
        data=rows,
        eval_dataset=rows,
        max_steps=1,
    )
    trainer.train()
    trainer.evaluate()
    assert student.seen == {"input_ids", "attention_mask", "token_type_ids"}


def test_a_live_teacher_is_not_given_the_column(make_trainer, fill):
    class Anything(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = make_teacher()
            self.config = self.inner.config
            self.seen = set()

        def forward(self, **inputs):
            self.seen |= set(inputs)
            return self.inner(**inputs)

    teacher = Anything()
    settings = {"losses": logit_losses(), "max_steps": 1, "remove_unused_columns": False}
    make_trainer(teacher=teacher, data=fill(), **settings).train()
    assert teacher.seen == {"input_ids", "attention_mask", "token_type_ids"}


# ---- training on it ----


def calm_teacher(**changes):
    """Answers that are not so steep that the rounding of another padding would show."""
    return make_teacher(initializer_range=0.1, **changes)


def trained(make_trainer, name, teacher, data, resume=None, **settings):
    trainer = make_trainer(
        name,
        student=make_student(initializer_range=0.1),
        teacher=teacher,
        losses=logit_losses(),
        data=data,
        # Adam would turn the rounding of a gradient that is zero into whole steps.
        **({"optim": "sgd", "learning_rate": 0.05} | settings),
    )
    seeded(7, lambda: trainer.train(resume_from_checkpoint=resume))
    return step_logs(trainer), parameters_of(trainer.student)


def assert_same_training(live, cached):
    assert len(live[0]) == len(cached[0])
    for one, other in zip(live[0], cached[0], strict=True):
        for name in ("loss", "loss_ce", "loss_kl"):
            assert other[name] == pytest.approx(one[name], rel=1e-6, abs=1e-6), name
    assert largest_difference(live[1], cached[1]) < 1e-6


@pytest.mark.parametrize(
    "settings",
    [
        {"train_sampling_strategy": "random", "max_steps": 6},
        {"train_sampling_strategy": "group_by_length", "max_steps": 3, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 5, "max_steps": 5, "remove_unused_columns": False},
    ],
    ids=["shuffled", "accumulated", "ragged"],
)
def test_train_on_the_cache_is_train_live(make_trainer, fill, settings):
    """With dropout, rows without labels, a student of other columns, and a cache filled in another order."""
    data = make_dataset(16, unlabeled=(1, 6))
    fill(calm_teacher(), data.shuffle(seed=5), batch_size=3)
    live = trained(make_trainer, "live", calm_teacher(), data, **settings)
    teacher, seen = counted(calm_teacher())
    cached = trained(make_trainer, "cached", CachedTeacher(teacher.config), fill(teacher, data), **settings)
    assert seen == []
    assert_same_training(live, cached)


def test_train_resumed_on_the_cache_is_train_live(make_trainer, fill, tmp_path):
    data = make_dataset(16, unlabeled=(1, 6))
    settings = {"train_sampling_strategy": "random", "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    live = trained(make_trainer, "live", calm_teacher(), data, **settings)
    stand_in, rows = CachedTeacher(calm_teacher().config), fill(calm_teacher(), data)
    trained(make_trainer, "first", stand_in, rows, **(settings | {"max_steps": 3}))
    resumed = trained(
        make_trainer, "second", stand_in, rows, resume=str(tmp_path / "first" / "checkpoint-3"), **settings
    )
    assert_same_training(live, resumed)


def test_one_cache_serves_students_of_either_order_of_labels(make_trainer, fill):
    """The data's labels are numbered by the student, so each has its own."""
    turned = [LABELS[i] for i in (2, 0, 1)]
    data = make_dataset(16)
    renumbered = data.map(lambda row: {"labels": [1, 2, 0][row["labels"]]})
    fill(calm_teacher(), data)

    def student():
        model = make_student(initializer_range=0.1)
        with torch.no_grad():
            model.classifier.weight.copy_(model.classifier.weight[[2, 0, 1]])
        return with_labels(model, turned)

    logs = []
    for name, model, rows in (("same", make_student(initializer_range=0.1), data), ("turned", student(), renumbered)):
        teacher, seen = counted(calm_teacher())
        rows = fill(teacher, rows)
        trainer = make_trainer(
            name,
            student=model,
            teacher=CachedTeacher(teacher.config),
            losses=logit_losses(),
            data=rows,
            learning_rate=1e-3,
        )
        seeded(7, trainer.train)
        logs.append([entry["loss_kl"] for entry in step_logs(trainer)])
        assert seen == []
    assert logs[1] == pytest.approx(logs[0], rel=1e-4)


def test_the_teacher_is_left_as_it_was_but_for_eval(fill):
    teacher = make_teacher(dropout=0.5).train()
    before = parameters_of(teacher)
    assert_logits(fill(teacher))
    assert largest_difference(before, parameters_of(teacher)) == 0
    assert all(parameter.grad is None and parameter.requires_grad for parameter in teacher.parameters())


def test_filling_draws_no_random_numbers(fill):
    torch.manual_seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    assert_logits(fill())
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()


# ---- several ranks ----


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two gloo ranks has seen and found."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run = subprocess.run(
        [*command, str(TESTS / "cache_run.py"), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads((folder / f"results-{rank}.json").read_text()) for rank in (0, 1)], folder


@pytest.mark.slow
def test_two_ranks_compute_each_row_once_and_both_see_all(ranks):
    (one, other), folder = ranks
    assert one["world_size"] == other["world_size"] == 2
    rows = make_dataset(cache_run.ROWS)
    assert sorted(one["seen"] + other["seen"]) == sorted(rows["input_ids"])
    assert abs(len(one["seen"]) - len(other["seen"])) <= 3
    assert one["seen_again"] == other["seen_again"] == []
    assert one["logits"] == other["logits"]
    np.testing.assert_allclose(one["logits"], reference_logits(make_teacher(), rows), rtol=0, atol=2e-5)
    assert {path.name[:11] for path in (folder / "shared").glob("*/shard-*")} == {"shard-00000", "shard-00001"}


@pytest.mark.slow
def test_ranks_without_a_common_disk_each_end_with_all_rows(ranks):
    (one, other), _ = ranks
    for result in (one, other):
        assert sorted(result["seen_apart"]) == sorted(make_dataset(cache_run.ROWS)["input_ids"])
        np.testing.assert_allclose(result["logits_apart"], result["logits"], rtol=0, atol=2e-5)


@pytest.mark.slow
def test_two_ranks_compute_states_once_and_both_see_all(ranks, tmp_path):
    (one, other), folder = ranks
    data = make_dataset(cache_run.ROWS)
    alone, _ = cached(tmp_path, data=data, states=cache_run.STATES)
    for seen in ("seen_for_states", "seen_rounded"):
        assert sorted(one[seen] + other[seen]) == sorted(data["input_ids"])
        assert abs(len(one[seen]) - len(other[seen])) <= 3
    for name in cache_run.COLUMNS:
        assert one["states"][name] == other["states"][name]
        np.testing.assert_allclose(one["states"][name], alone[name][:], rtol=0, atol=2e-5)
        assert one["rounded"][name] == other["rounded"][name]
        np.testing.assert_allclose(one["rounded"][name], alone[name][:], rtol=2**-8, atol=2e-5)
        assert not np.allclose(one["rounded"][name], alone[name][:], rtol=2**-12, atol=2e-5)
    assert one["states"]["teacher_logits"] == one["logits"]
    # Both ranks' rounding, though each knows only its own.
    for path in (folder / "rounded").glob("*/manifest.json"):
        manifest = json.loads(path.read_text())
        name = f"teacher_{manifest.get('output', 'logits')}"
        error = np.abs(np.array(one["rounded"][name]) - np.array(one["states"][name])).max()
        assert manifest["largest_error"] == pytest.approx(error, rel=1e-2)


@pytest.mark.slow
def test_two_ranks_fill_the_caches_of_an_ensemble(ranks, tmp_path):
    (one, other), _ = ranks
    data = make_dataset(cache_run.ROWS)
    # The first member's logits are there from before.
    assert one["seen_by_members"][0] == other["seen_by_members"][0] == []
    second = [result["seen_by_members"][1] for result in (one, other)]
    assert sorted(second[0] + second[1]) == sorted(data["input_ids"])
    assert abs(len(second[0]) - len(second[1])) <= 3
    assert one["logits_ensemble"] == other["logits_ensemble"]
    alone, _, _ = cache_run.fill_ensemble(tmp_path)
    np.testing.assert_allclose(one["logits_ensemble"], alone["teacher_logits"][:], rtol=0, atol=2e-5)
    assert len(one["lines"]) == 2
    assert other["lines"] == []


@pytest.mark.slow
def test_two_ranks_train_on_the_cache_as_one_process(ranks, fill, tmp_path):
    (one, _), _ = ranks
    assert len(one["loss_kl"]) == 4
    alone = cache_run.train(tmp_path / "alone", fill(data=make_dataset(cache_run.ROWS)))
    assert one["loss_kl"] == pytest.approx(alone, rel=1e-4)


def test_what_a_killed_fill_left_goes_with_the_next(fill, folder):
    data = make_dataset()
    fill(data=data.select(range(8)))
    old, new = (only_shard(folder).with_name(f".shard-x.{number}.tmp") for number in (1, 2))
    for path in (old, new):
        path.touch()
    os.utime(old, (time.time() - 7200,) * 2)
    fill(data=data)
    assert (old.exists(), new.exists()) == (False, True)
