"""Training from streams: rows as they come, in the same order after a restart, checked, tokenized late.

Two processes run this file: torchrun --standalone --nproc_per_node 2 tests/test_streaming.py FOLDER
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import helpers
import numpy as np
import pandas as pd
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from safetensors.torch import load_file

from distill_nlp.cli import main
from distill_nlp.config import DataSection
from distill_nlp.config_file import load_experiment
from distill_nlp.data_streams import HEAD_ROWS, StreamedSplit, load_streamed_splits
from distill_nlp.errors import DistillError, UsageError
from distill_nlp.row_numbers import RandomOrder, numbers
from distill_nlp.row_stream import WINDOW, RowStream
from distill_nlp.stream_files import BLOCK, open_source
from distill_nlp.tokenization import encode_texts
from distill_nlp.training_rows import StreamedRows

STREAMED = {"data__streaming": True, "data__shuffle_buffer": 7}


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_rows(count, offset=0):
    return [{"text": f"w{4 + i % 2} w{10 + i % 80} number{offset + i}", "label": i % 2} for i in range(count)]


@pytest.fixture
def folder(tmp_path):
    """A data set of jsonl: 2,500 rows to train on, more than are looked at before."""
    for split, count in (("train", 2500), ("validation", 8), ("test", 8)):
        write_lines(tmp_path / "lines" / f"{split}.jsonl", make_rows(count, offset=10_000 * (split != "train")))
    return tmp_path / "lines"


def section(folder, **changes):
    settings = {"dataset": str(folder), "validation_split": "validation", "streaming": True}
    return DataSection(**(settings | changes))


def texts(rows):
    return [row["text"] for row in rows]


# ---- files ----


def table():
    """More than a block, with what is odd and valid."""
    return {
        "text": ['a, "b"', "None", "é\nline", *(f"t{i}" for i in range(BLOCK + 5))],
        "label": [0, 1, *[1] * (BLOCK + 6)],
    }


WRITERS = {
    "csv": lambda frame, path: frame.to_csv(path, index=False),
    "tsv": lambda frame, path: frame.to_csv(path, index=False, sep="\t"),
    "jsonl": lambda frame, path: frame.to_json(path, orient="records", lines=True),
    "json": lambda frame, path: frame.to_json(path, orient="records", lines=True),
    "parquet": lambda frame, path: frame.to_parquet(path, row_group_size=300),
}


def read(source, columns):
    found = {name: [] for name in columns}
    for block in source.blocks(columns):
        assert list(block) == columns
        assert len({len(values) for values in block.values()}) == 1
        assert len(block[columns[0]]) <= BLOCK
        for name, values in block.items():
            found[name] += values
    return found


@pytest.mark.parametrize("ending", WRITERS)
def test_each_kind_of_file_gives_its_rows_in_order_and_again(ending, tmp_path):
    frame = pd.DataFrame(table())
    WRITERS[ending](frame[:700], tmp_path / f"train-1.{ending}")
    WRITERS[ending](frame[700:], tmp_path / f"train-2.{ending}")
    source = open_source(str(tmp_path), "train")
    assert source.columns == ["text", "label"]
    for _ in range(2):
        assert read(source, ["text", "label"]) == table()
    assert read(source, ["label"]) == {"label": table()["label"]}


def test_a_tsv_whose_quotation_marks_take_in_rows_is_refused(tmp_path):
    lines = ["text\tlabel", *("fine\t1" for _ in range(BLOCK + 3)), '"great film\t1', "bad\t0", 'nice" movie\t1']
    (tmp_path / "train.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    source = open_source(str(tmp_path), "train")
    with pytest.raises(UsageError, match=rf"row {BLOCK + 3} of .*train\.tsv holds lines that look like rows"):
        read(source, ["text"])


def test_lines_of_text_and_saved_data_sets_are_read_too(tmp_path):
    (tmp_path / "pool.txt").write_text("one\n\ntwo \r\nthree", encoding="utf-8")
    assert read(open_source(str(tmp_path / "pool.txt"), "train"), ["text"]) == {"text": ["one", "", "two ", "three"]}
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    DatasetDict(train=Dataset.from_dict(table(), features=features)).save_to_disk(tmp_path / "saved")
    source = open_source(str(tmp_path / "saved"), "train")
    assert read(source, ["label", "text"]) == {name: table()[name] for name in ("label", "text")}
    assert source.features["label"].names == ["bad", "good"]


def test_the_hub_is_streamed(monkeypatch):
    calls = []

    def load(name, config, **settings):
        calls.append((name, config, settings))
        return Dataset.from_dict(table()).to_iterable_dataset()

    monkeypatch.setattr("datasets.load_dataset", load)
    source = open_source("some/reviews", "train", "plain", "abc")
    assert calls == [("some/reviews", "plain", {"split": "train", "revision": "abc", "streaming": True})]
    assert read(source, ["text", "label"]) == table()
    assert source.identity == {"hub": "some/reviews", "config": "plain", "revision": "abc", "split": "train"}


def test_a_stream_of_the_hub_that_breaks_off_says_after_which_row(monkeypatch):
    class Broken:
        column_names, features = ["text"], None

        def select_columns(self, names):
            return self

        def iter(self, batch_size):
            yield {"text": ["a"] * 3}
            raise ConnectionError("reset\nby peer")

    monkeypatch.setattr("datasets.load_dataset", lambda *arguments, **settings: Broken())
    source = open_source("some/reviews", "train")
    with pytest.raises(
        DistillError, match=r"'some/reviews' broke off after row 3 of 'train': reset by peer; the same"
    ) as e:
        read(source, ["text"])
    assert e.value.exit_code == 1


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["0", "1", "", " 1"], [0, 1, None, 1]),
        (["true", "False"], [True, False]),
        (["b", "1", "NA"], ["b", "1", "NA"]),
        (["1", *["0"] * BLOCK, "x"], [1, *[0] * BLOCK, "x"]),
        (["0.5", "1"], ["0.5", "1"]),
    ],
)
def test_labels_of_a_csv_are_numbers_if_the_first_ones_are(values, expected, tmp_path):
    (tmp_path / "train.csv").write_text("text,label\n" + "".join(f"12,{value}\n" for value in values))
    found = read(open_source(str(tmp_path), "train"), ["text", "label"])
    assert found["label"] == expected
    assert found["text"] == ["12"] * len(values)


def test_rows_of_json_may_have_other_keys_later(tmp_path):
    rows = [{"text": "a", "label": []}] * BLOCK + [{"text": "b", "label": [1], "new": 3}, {"label": [0]}]
    source = open_source(str(write_lines(tmp_path / "train.jsonl", rows).parent), "train")
    found = read(source, ["text", "label"])
    assert found["label"] == [row["label"] for row in rows]
    assert found["text"][-2:] == ["b", None]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("train.jsonl", b'{"text": "a"}\n\n{"text": \n', r"cannot read line 3 of .*train\.jsonl as json"),
        ("train.jsonl", b'[{"text": "a"}]', "line 1 of .* holds .*, and no object with columns"),
        ("train.json", b'[\n{"text": "a"}]', "a list of all rows is not streamed: write each on a line"),
        ("train.jsonl", b'{"text": "a"}\n' * 2 + b'{"text": "\xe9"}\n', r"is not UTF-8 \(after row 0\); convert it"),
        ("train.jsonl", b"\n\n", "has no rows"),
        ("train.jsonl", b"", "train.jsonl is empty"),
        (
            "train.csv",
            b"text,label\na,1\nb,0,3\n",
            "cannot read .*csv as csv .*Expected 2 fields in line 3, saw 3",
        ),
        ("train.csv", b"text,label\na\0b,1\n", "has a NUL byte in"),
        ("train.csv", b"text,text\na,1\n", "names the column 'text' twice"),
        ("train.txt", b"a\n\0b\n", "has a NUL byte in"),
        ("train.parquet", b"PAR1 no", "cannot read .*train.parquet as parquet"),
    ],
)
def test_files_that_cannot_be_read_are_refused_in_a_line(name, content, says, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=says) as error:
        read(open_source(str(tmp_path), "train"), ["text"])
    assert "\n" not in str(error.value)


def test_a_folder_per_label_is_not_streamed(tmp_path):
    (tmp_path / "train" / "good").mkdir(parents=True)
    with pytest.raises(
        UsageError, match=r"a folder per label, which is not streamed; write its texts into train\.jsonl"
    ):
        open_source(str(tmp_path), "train")


def test_what_a_file_is_known_by_follows_its_ends_and_not_its_time(tmp_path):
    middle = b"x" * (3 << 20)

    def identity(content, name="train.txt"):
        (tmp_path / name).write_bytes(content)
        os.utime(tmp_path / name, (len(content), 1))
        return open_source(str(tmp_path / name), "train").identity

    first = identity(b"a" + middle + b"b")
    assert identity(b"a" + middle + b"b") == first
    os.utime(tmp_path / "train.txt", (5, 5))
    assert open_source(str(tmp_path / "train.txt"), "train").identity == first
    others = [identity(b"b" + middle + b"b"), identity(b"a" + middle + b"a"), identity(b"a" + middle + b"xb")]
    others.append(identity(b"a" + middle + b"b", "other.txt"))
    assert all(other != first for other in others)


# ---- checked rows ----


def test_the_rows_of_a_stream_are_those_of_the_loaded_split(folder):
    splits = load_streamed_splits(section(folder))
    rows = list(splits.streams.train)
    assert rows == [{"text": row["text"], "labels": row["label"]} for row in make_rows(2500)]
    assert splits.label_names == ["LABEL_0", "LABEL_1"]
    assert splits.train["text"][:] == texts(rows)[:HEAD_ROWS]
    assert splits.teacher_train is splits.train
    assert splits.streams.teacher_train is splits.streams.train
    assert (splits.unlabeled, len(splits.validation), len(splits.test)) == (None, 8, 8)
    assert splits.train.features["labels"].names == splits.label_names


def test_only_so_many_rows_are_taken(folder):
    splits = load_streamed_splits(section(folder, max_train_samples=1200))
    assert texts(splits.streams.train) == texts(make_rows(1200))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"text": 5, "label": 0}, r"row 2100 of the split 'train' has no text in text: 5"),
        ({"label": 0}, r"row 2100 of the split 'train' has no text in text: None"),
        ({"text": "a"}, r"row 2100 of the split 'train' has no label in label"),
        ({"text": "a", "label": 2}, r"row 2100 of the split 'train' has the label 2, outside 0\.\.1"),
        (
            {"text": "a", "label": -100},
            r"row 2100 .* has the label -100, .*without a label go into data\.unlabeled",
        ),
        ({"text": "a", "label": "good"}, r"row 2000 of the split 'train' has the label 0, and row 2100 'good'"),
        ({"text": "a", "label": [1]}, r"row 2100 of the split 'train' has \[1\] \(list\) for a label"),
        ({"text": "a", "label": 0.5}, r"row 2100 of the split 'train' has the label 0\.5 \(float\)"),
    ],
)
def test_a_bad_row_beyond_those_looked_at_ends_the_pass_with_its_number(row, says, folder):
    rows = make_rows(2500)
    rows[2100] = row
    write_lines(folder / "train.jsonl", rows)
    stream = load_streamed_splits(section(folder)).streams.train
    with pytest.raises(UsageError, match=says):
        list(stream)


def test_class_names_come_from_the_settings_or_the_columns_or_the_loaded_splits(folder, tmp_path):
    named = [{"text": f"t{i}", "label": ["no", "yes"][i % 2]} for i in range(8)]
    for split in ("train", "validation", "test"):
        write_lines(folder / f"{split}.jsonl", named)
    assert load_streamed_splits(section(folder)).label_names == ["no", "yes"]
    given = load_streamed_splits(section(folder, label_names=["yes", "no"]))
    assert [row["labels"] for row in given.streams.train] == [1, 0] * 4
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").unlink()
        Dataset.from_list(make_rows(8), features=features).to_parquet(folder / f"{split}.parquet")
    assert load_streamed_splits(section(folder)).label_names == ["bad", "good"]


def test_labels_of_two_kinds_in_the_loaded_splits_are_refused(folder):
    write_lines(folder / "test.jsonl", [{"text": "a", "label": "good"}])
    with pytest.raises(UsageError, match="the labels of validation and test are of different kinds"):
        load_streamed_splits(section(folder))


def test_several_labels_per_text_become_vectors(tmp_path):
    data = helpers.write_rows_of_several_labels(tmp_path / "topics")
    splits = load_streamed_splits(section(data, label_column="labels", unlabeled="pool"))
    assert (splits.problem_type, splits.label_names) == ("multi_label_classification", ["food", "money", "sport"])
    rows = list(splits.streams.train)
    assert [row["labels"] for row in rows] == [[float(i >> c & 1) for c in range(3)] for i in range(48)]
    assert splits.train["labels"][:] == [row["labels"] for row in rows]
    assert {tuple(row["labels"]) for row in splits.streams.unlabeled} == {(-100.0, -100.0, -100.0)}
    write_lines(data / "train.jsonl", [{"text": "a", "labels": []}, {"text": "b", "labels": "food"}])
    with pytest.raises(UsageError, match=r"row 1 of the split 'train' has 'food' in labels, and no list of labels"):
        load_streamed_splits(section(data, label_column="labels"))


@pytest.mark.parametrize("as_file", [False, True])
def test_rows_that_stand_in_validation_or_test_are_left_out_of_pool_and_teacher(as_file, folder, tmp_path):
    held = [*make_rows(1, 10_000), *make_rows(2, 10_000)[1:]]
    more = [{"text": f"pool {i}", "label": i % 2} for i in range(6)]
    write_lines(folder / "validation.jsonl", [held[0], {"text": "else", "label": 1}])
    write_lines(folder / "test.jsonl", [held[1], *({"text": f"other {i}", "label": 0} for i in range(3))])
    write_lines(folder / "own.jsonl", [held[0], *more, held[1]])
    pool = str(write_lines(tmp_path / "pool.jsonl", [held[0], *more, held[1]])) if as_file else "own"
    write_lines(folder / "train.jsonl", [*more, *held])
    splits = load_streamed_splits(section(folder, unlabeled=pool, max_test_samples=2), "own")
    assert texts(splits.streams.unlabeled) == texts(splits.streams.teacher_train) == texts(more)
    assert texts(splits.streams.train) == texts([*more, *held])
    some = section(folder, unlabeled=pool, max_unlabeled_samples=4)
    assert texts(load_streamed_splits(some).streams.unlabeled) == texts(more[:3])
    assert {row["labels"] for row in splits.streams.unlabeled} == {-100}
    write_lines(folder / "own.jsonl", held)
    with pytest.raises(UsageError, match="all rows of the split 'own' stand in validation or test; none is left"):
        load_streamed_splits(section(folder), "own")


def test_the_first_rows_tell_of_a_file_sorted_by_label(folder):
    rows = sorted(make_rows(6000), key=lambda row: row["label"])
    write_lines(folder / "train.jsonl", rows)
    notes = load_streamed_splits(section(folder)).notes
    assert any("first 2,000 rows of train have the same label" in note for note in notes)
    write_lines(folder / "train.jsonl", rows[:50])
    with pytest.raises(UsageError, match="all 50 rows of the split 'train' have the label 'LABEL_0'"):
        load_streamed_splits(section(folder))


# ---- their order ----


def encode(rows):
    return [{"text": row["text"], "input_ids": [0] * len(row["text"])} for row in rows]


def stream(rows, batch_size=4, **settings):
    kinds = rows if isinstance(rows, tuple) else (rows,)
    return RowStream(kinds, encode, ["text"], batch_size, **({"seed": 3, "shuffle_buffer": 50} | settings))


def ragged(count, prefix="r"):
    return [{"text": f"{prefix}{i} " + "x" * (i * 7919 % 97)} for i in range(count)]


@pytest.mark.parametrize("strategy", ["group_by_length", "random", "sequential"])
@pytest.mark.parametrize("count", [3, 130, 401])
def test_each_row_comes_once_in_a_pass(strategy, count):
    rows = ragged(count)
    # Whole windows, in which the passes lie.
    windows = -(-count // (WINDOW * 4)) + 1
    drawn = texts(islice(stream(rows, strategy=strategy), windows * WINDOW * 4))
    counts = Counter(drawn)
    assert set(counts.values()) <= {len(drawn) // count, len(drawn) // count + 1}
    assert len(counts) == count
    if strategy == "sequential":
        assert drawn[:count] == texts(rows)


def test_the_order_follows_the_seed_and_changes_from_pass_to_pass():
    rows = ragged(60)
    one, again, other = (texts(islice(stream(rows, seed=s, strategy="random"), 120)) for s in (1, 1, 2))
    assert one == again != other
    assert one[:60] != one[60:]
    assert sorted(one[:60]) == sorted(one[60:]) == sorted(texts(rows))
    held = texts(islice(stream(rows, shuffle_buffer=1000, strategy="random"), 60))
    # Each row in its old place once in a pass, on average, where the buffer holds all of them.
    assert sum(a == b for a, b in zip(held, texts(rows), strict=True)) < 6


def test_no_more_rows_are_held_than_the_buffer_and_a_window():
    read = []

    def rows():
        for row in ragged(5000):
            read.append(row)
            yield row

    class Rows:
        def __iter__(self):
            return rows()

    next(iter(stream(Rows(), shuffle_buffer=50)))
    assert len(read) <= 50 + WINDOW * 4 + 1
    assert texts(islice(stream(Rows(), shuffle_buffer=1, strategy="random"), 10)) == texts(ragged(10))


def test_batches_are_of_like_lengths_and_the_longest_of_all_comes_first():
    rows = ragged(4000)

    def padding(strategy):
        drawn = list(islice(stream(rows, batch_size=8, shuffle_buffer=500, strategy=strategy), 3200))
        batches = [[len(row["input_ids"]) for row in drawn[i : i + 8]] for i in range(0, 3200, 8)]
        return sum(8 * max(batch) for batch in batches) / sum(map(sum, batches)), batches

    (grouped, batches), (random, _) = padding("group_by_length"), padding("random")
    assert grouped < 1.05 < 1.5 < random
    assert max(batches[0]) == max(map(max, batches[:WINDOW]))
    lengths = [max(batch) for batch in batches[1:WINDOW]]
    assert lengths != sorted(lengths, reverse=True)


@pytest.mark.parametrize("strategy", ["group_by_length", "random"])
@pytest.mark.parametrize(("ratio", "of_batch"), [(0.5, 2), (0.7, 3), (0.01, 1), (0.99, 3)])
def test_each_batch_of_each_rank_keeps_the_ratio(strategy, ratio, of_batch):
    counts = Counter()
    for rank in (0, 1):
        settings = {"ratio": ratio, "strategy": strategy, "rank": rank, "ranks": 2}
        for batch in islice(stream((ragged(30), ragged(70, "u")), **settings)._batches(), 2 * WINDOW):
            assert sum(text.startswith("u") for text in texts(batch)) == of_batch
            counts.update(texts(batch))
    for prefix in "ru":
        own = [n for text, n in counts.items() if text.startswith(prefix)]
        assert max(own) - min(own) <= 1


def batches_of_ranks(ranks, batches):
    from accelerate.data_loader import IterableDatasetShard

    found = []
    for rank in range(ranks):
        shard = IterableDatasetShard(
            stream(ragged(90), rank=rank, ranks=ranks), batch_size=4, num_processes=ranks, process_index=rank
        )
        rows = texts(islice(shard, batches * 4))
        found.append([rows[i : i + 4] for i in range(0, len(rows), 4)])
    return found


def test_ranks_share_the_rows_of_a_pass_and_run_like_lengths_together():
    two = batches_of_ranks(2, WINDOW)
    counts = Counter(text for batches in two for batch in batches for text in batch)
    assert set(counts.values()) == {4, 5}
    longest = [[max(map(len, batch)) for batch in batches] for batches in two]
    apart = [abs(one - other) for one, other in zip(*longest, strict=True)]
    assert np.mean(apart) < np.mean([abs(a - b) for a in longest[0] for b in longest[1]]) / 3
    assert [batches.index(max(batches)) for batches in longest] == [0, 0]


def test_workers_of_a_loader_give_the_same_batches(monkeypatch):
    from types import SimpleNamespace

    alone = texts(islice(stream(ragged(90)), 120))
    found = []
    for worker in range(3):
        info = SimpleNamespace(id=worker, num_workers=3)
        monkeypatch.setattr("distill_nlp.row_stream.get_worker_info", lambda info=info: info)
        rows = texts(islice(stream(ragged(90)), 40))
        found.append([rows[i : i + 4] for i in range(0, 40, 4)])
    assert [text for turn in zip(*found, strict=True) for batch in turn for text in batch] == alone


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"strategy": "longest"}, "rows of a stream are ordered by random, sequential, group_by_length, got longest"),
        ({"ratio": 0.5}, "unlabeled_ratio is needed where unlabeled rows"),
    ],
)
def test_what_a_stream_cannot_do_is_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        stream(ragged(9), **settings)
    with pytest.raises(ValueError, match="unlabeled_ratio is needed where unlabeled rows"):
        stream((ragged(9), ragged(9)))
    with pytest.raises(ValueError, match="at least 2 rows in a batch"):
        stream((ragged(9), ragged(9)), batch_size=1, ratio=0.5)


# ---- trained ----


def token_stream(batch_size=4, rows=40, **settings):
    texts_of_rows = [
        {"text": " ".join([f"w{4 + i % 90}", f"w{4 + i // 90}", *["w50"] * (i % 8)]), "labels": i % 3}
        for i in range(rows)
    ]

    def encode_rows(some):
        columns = encode_texts({"text": texts(some)}, helpers.make_tokenizer(), 12, token_type_ids=True)
        columns["labels"] = [row["labels"] for row in some]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    names = ["input_ids", "token_type_ids", "attention_mask", "labels"]
    return RowStream([texts_of_rows], encode_rows, names, batch_size, shuffle_buffer=9, seed=3, **settings)


def test_a_training_that_goes_on_ends_like_one_that_nobody_touched(make_trainer, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 5, "max_steps": 13, "gradient_accumulation_steps": 2}
    whole = make_trainer("whole", data=token_stream(), student=helpers.make_student(), **saving)
    whole.train()
    resumed = make_trainer("resumed", data=token_stream(), student=helpers.make_student(), **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert helpers.largest_difference(whole.model.state_dict(), resumed.model.state_dict()) == 0.0
    assert [entry["loss"] for entry in helpers.step_logs(whole)] == [
        entry["loss"] for entry in helpers.step_logs(resumed)
    ]


def test_workers_of_a_loader_change_nothing(make_trainer):
    settings = {"max_steps": 5, "losses": {"ce": helpers.all_losses()["ce"]}}
    alone = make_trainer("alone", data=token_stream(), **settings)
    alone.train()
    helped = make_trainer("helped", data=token_stream(), dataloader_num_workers=2, **settings)
    helped.train()
    assert helpers.largest_difference(alone.model.state_dict(), helped.model.state_dict()) == 0.0


def test_projections_start_from_the_first_rows_of_a_stream(make_trainer):
    from distill_nlp import HiddenStateLoss

    losses = {"hidden": HiddenStateLoss(projection_init="least_squares")}
    trainer = make_trainer(data=token_stream(), losses=losses, max_steps=1, projection_init_batches=2)
    trainer.train()
    assert len(token_stream().first(5)) == 5
    assert helpers.step_logs(trainer)[0]["loss"] < 1.0


@pytest.mark.usefixtures("no_doctor")
def test_a_run_over_a_stream_goes_through_and_says_how(experiment, tmp_path, capsys):
    config = str(experiment(**STREAMED))
    assert main(["run", config]) == 0
    said = capsys.readouterr().err
    assert "the first 40 of train" in said
    assert "train is streamed: rows are checked as they come, and mixed within 7" in said
    assert "rows are streamed, evaluated every 2 of 3 steps; the teacher runs in every step: rows of a stream" in said
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["run"]["stages"]["student/seed-0"]["steps"] == 3
    assert main(["run", config]) == 0
    assert capsys.readouterr().err.count("done already") == 4
    assert main(["report", str(tmp_path / "run")]) == 0
    weights = load_file(tmp_path / "run" / "student" / "seed-0" / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    capsys.readouterr()
    assert main(["cache", config]) == 2
    assert "nothing to cache: rows of a stream are not cached" in capsys.readouterr().err


@pytest.mark.usefixtures("no_doctor")
def test_an_interrupted_run_goes_on_in_the_stream_and_ends_like_an_uninterrupted_one(experiment, ends_alike):
    training = {"max_steps": 9, "per_device_train_batch_size": 4, "eval_steps": 3, "unlabeled_ratio": 0.5}
    config = str(experiment(**STREAMED, data__unlabeled="pool", training=training))
    assert "going on from checkpoint-6" in ends_alike(config, interrupted_at=7)


@pytest.mark.usefixtures("no_doctor")
def test_a_bad_row_met_in_a_workers_process_is_one_line(experiment, folder, tmp_path, capsys):
    rows = make_rows(2500)
    rows[2200]["label"] = 7
    write_lines(folder / "train.jsonl", rows)
    training = {"max_steps": 3, "dataloader_num_workers": 1}
    config = str(experiment(data__streaming=True, data__dataset=str(folder), training=training))
    assert main(["run", config, "--stages", "teacher"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert line.startswith("error: teacher: data: row 2200 of the split 'train' has the label 7, outside 0..1")


@pytest.mark.usefixtures("no_doctor")
def test_a_pool_and_several_phases_are_streamed_and_the_baseline_makes_as_many_steps(experiment, tmp_path, capsys):
    phases = [{"losses": {"hidden": {}}, "training": {"max_steps": 2}}, {"training": {"max_steps": 20}}]
    training = {"per_device_train_batch_size": 4, "unlabeled_ratio": 0.5}
    own = {"data__unlabeled": "pool", "phases": phases, "teacher__training": {"max_steps": 4}, "training": training}
    config = str(experiment(**STREAMED, **own))
    stages = ["--stages", "teacher,baseline,student"]
    assert main(["run", config, *stages]) == 0
    said = capsys.readouterr().err
    assert re.search(r"the first \d+ of unlabeled", said)
    for every, steps in ((1, 2), (2, 20), (1, 4), (3, 22)):
        assert f"rows are streamed, evaluated every {every} of {steps} steps" in said
    assert main(["run", config, *stages]) == 0
    assert capsys.readouterr().err.count("done already") == 3


@pytest.mark.usefixtures("no_doctor")
def test_several_labels_per_text_are_streamed_in_a_run(experiment, tmp_path):
    data = helpers.write_rows_of_several_labels(tmp_path / "topics")
    own = {"data__label_names": list(helpers.TOPICS), "data__label_column": "labels", "losses": {"ce": {}, "kl": {}}}
    config = experiment(data__dataset=str(data), **STREAMED, **own)
    assert main(["run", str(config)]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["run"]["stages"]["student/seed-0"]["steps"] == 3


def test_the_doctor_looks_at_the_first_rows(experiment, capsys, tmp_path):
    assert main(["doctor", str(experiment(**STREAMED))]) in (0, 2)
    said = " ".join(capsys.readouterr().out.split())
    assert "training rows are streamed: 40 of them are looked at" in said
    assert "duplicates" in said
    assert "time" in said
    assert not (tmp_path / "run").exists()


def prints_of(config):
    from distill_nlp.fingerprints import Fingerprints
    from distill_nlp.materials import Materials

    loaded = load_experiment(config)
    return Fingerprints(loaded, Materials(loaded)).student(0)["data"]["train"]


def test_what_a_result_depends_on_are_the_files_the_buffer_and_the_columns(experiment, tmp_path):
    first = prints_of(experiment(**STREAMED))
    assert first["streamed"]["files"][0]["name"] == "train.parquet"
    assert prints_of(experiment(**STREAMED)) == first
    others = [
        prints_of(experiment(data__streaming=True, data__shuffle_buffer=8)),
        prints_of(experiment(**STREAMED, data__max_train_samples=9)),
        prints_of(experiment(**STREAMED, data__text_column="other")),
    ]
    table = pd.read_parquet(tmp_path / "data" / "train.parquet")
    table[:30].to_parquet(tmp_path / "data" / "train.parquet")
    others.append(prints_of(experiment(**STREAMED)))
    assert all(other != first for other in others)


def test_evaluations_are_a_tenth_of_the_steps_unless_given(experiment):
    def loaded(**training):
        config = experiment(**STREAMED, training={"max_steps": 95} | training, teacher__training={"max_steps": 7})
        return load_experiment(config)

    plain = loaded()
    assert (plain.training.eval_strategy, plain.training.eval_steps) == ("steps", 10)
    assert plain.teacher_training().eval_steps == 1
    assert loaded(eval_steps=4).training.eval_steps == 4
    assert loaded(eval_strategy="no").training.eval_strategy == "no"
    assert "eval_steps" not in plain.given_training.model_dump(exclude_unset=True)
    # What is settled later counts for all trainings.
    plain.training.weight_decay = 0.5
    assert plain.teacher_training().weight_decay == plain.given_training.weight_decay == 0.5
    assert loaded(eval_steps=4).given_training.eval_steps == 4


def test_a_teacher_that_is_never_trained_needs_no_steps(experiment):
    own = {"phases": [{"training": {"max_steps": 2}}], "training": {}, "teacher__training": {}}
    assert load_experiment(experiment(**STREAMED, **own, teacher__finetune="never")).training.eval_steps == 1
    with pytest.raises(UsageError, match=r"teacher\.training\.max_steps is needed"):
        load_experiment(experiment(**STREAMED, **own))


def test_the_arguments_of_a_streamed_training_leave_its_order_to_the_stream(tmp_path):
    rows = StreamedRows([ragged(9), ragged(9, "u")], [("", helpers.make_tokenizer(), 12)], False, 7)
    given = helpers.make_arguments(tmp_path, unlabeled_ratio=0.5)
    stream_of_rows, changed = rows.for_training(given)
    assert changed.accelerator_config.dispatch_batches is False
    assert (changed.unlabeled_ratio, given.unlabeled_ratio) == (None, 0.5)
    assert given.accelerator_config.dispatch_batches is None
    assert "input_ids" in stream_of_rows.column_names
    assert (changed.save_strategy, changed.save_steps) == (given.save_strategy, given.save_steps)
    # Its only epoch ends with the training.
    _, changed = rows.for_training(
        helpers.make_arguments(tmp_path, unlabeled_ratio=0.5, save_strategy="epoch", max_steps=40)
    )
    assert (changed.save_strategy, changed.save_steps) == ("steps", 4)


# ---- row numbers of large data sets ----


def test_numbers_of_an_array_come_in_order():
    rows = np.random.default_rng(0).permutation(20_000).astype(np.uint32)
    found = list(numbers(rows))
    assert found == rows.tolist()
    assert {type(row) for row in found} == {int}


def test_the_random_order_of_many_rows_is_all_of_them_by_seed_and_epoch(monkeypatch, make_trainer):
    orders = [
        list(RandomOrder(9000, seed, lambda epoch=epoch: epoch)) for seed, epoch in ((1, 0), (1, 0), (2, 0), (1, 1))
    ]
    assert all(sorted(order) == list(range(9000)) for order in orders)
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != orders[3]
    trainer = make_trainer(train_sampling_strategy="random", losses={"ce": helpers.all_losses()["ce"]})
    assert not isinstance(trainer._get_train_sampler(), RandomOrder)
    monkeypatch.setattr("distill_nlp.row_numbers.LARGE", 16)
    assert isinstance(trainer._get_train_sampler(), RandomOrder)
    assert list(trainer._get_train_sampler()) == list(RandomOrder(16, 3))
    trainer.train()


# ---- processes ----

GLOBAL_BATCH = 8


def train_two(folder, name, batch_size, rank, ranks, resume_from=None):
    """A training of this rank; the parameters after it, and the first tokens of the rows that it saw."""
    data = token_stream(batch_size, rows=WINDOW * GLOBAL_BATCH, rank=rank, ranks=ranks)
    trainer = helpers.make_trainer(
        folder / name,
        data=data,
        losses={"ce": helpers.all_losses()["ce"]},
        per_device_train_batch_size=batch_size,
        max_steps=WINDOW,
        save_strategy="steps",
        save_steps=20,
        max_grad_norm=0.0,
        optim="sgd",
        accelerator_config={"dispatch_batches": False},
    )
    seen, collate = [], trainer.data_collator

    def recorded(rows):
        seen.extend(tuple(row["input_ids"]) for row in rows)
        return collate(rows)

    trainer.data_collator = recorded
    trainer.train(resume_from_checkpoint=resume_from)
    return helpers.parameters_of(trainer.model), seen


@pytest.mark.slow
def test_two_ranks_train_each_row_once_and_go_on_exactly(tmp_path):
    tests = Path(__file__).parent
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(tests), os.environ.get("PYTHONPATH", ""), str(tests.parent)]),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    run = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-4000:]
    (one, resumed, first), (other, _, second) = (torch.load(tmp_path / f"rank-{rank}.pt") for rank in (0, 1))
    # Accelerate reads a batch ahead.
    trained = [rows[: WINDOW * GLOBAL_BATCH // 2] for rows in (first, second)]
    assert len({row for rows in trained for row in rows}) == WINDOW * GLOBAL_BATCH
    assert helpers.largest_difference(one, other) == 0.0
    assert helpers.largest_difference(one, resumed) == 0.0


def main_of_a_rank():
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    state, seen = train_two(folder, "both", GLOBAL_BATCH // 2, rank, 2)
    resumed, _ = train_two(folder, "resumed", GLOBAL_BATCH // 2, rank, 2, str(folder / "both" / "checkpoint-20"))
    torch.save((state, resumed, seen), folder / f"rank-{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main_of_a_rank()


def test_the_benchmark_of_memory_passes_over_all_rows(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    bench = importlib.import_module("streaming_memory")
    for split, rows in (("train", 700), ("validation", 20), ("test", 20)):
        bench.write_texts(tmp_path / f"{split}.jsonl", rows)
    read = []
    passed = StreamedSplit.__iter__
    monkeypatch.setattr(StreamedSplit, "__iter__", lambda split: (read.append(row) or row for row in passed(split)))
    found = bench.measure("one pass", tmp_path, 1, 8)
    assert found["peak"] > found["anonymous"] > 0
    # Looked at, counted, looked at again, and passed over.
    assert len(read) >= 4 * 700
