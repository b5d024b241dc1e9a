"""Splits: read from every kind of file, labels mapped and checked, nothing leaking into the held-out rows."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, DatasetDict

from distill_nlp.config import DataSection
from distill_nlp.data import as_classes, content_hash, load_splits
from distill_nlp.errors import UsageError

ROWS = [("w4 w5", "good"), ("w6", "bad"), ("w7 w8 w9", "good"), ("w10", "bad"), ("w11", "good"), ("w12", "bad")] * 4


def frame(rows=ROWS) -> pd.DataFrame:
    texts = [f"{text} w{20 + i}" for i, (text, _) in enumerate(rows)]
    return pd.DataFrame({"text": texts, "label": [label for _, label in rows]})


def section(folder, **changes) -> DataSection:
    return DataSection(dataset=str(folder), **changes)


WRITERS = {
    "csv": lambda table, path: table.to_csv(path, index=False),
    "tsv": lambda table, path: table.to_csv(path, index=False, sep="\t"),
    "jsonl": lambda table, path: table.to_json(path, orient="records", lines=True),
    "json": lambda table, path: table.to_json(path, orient="records"),
    "parquet": lambda table, path: table.to_parquet(path),
}


@pytest.mark.parametrize("ending", WRITERS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, ending):
    WRITERS[ending](frame(), tmp_path / f"train.{ending}")
    WRITERS[ending](frame(ROWS[:6]), tmp_path / f"test.{ending}")
    splits = load_splits(section(tmp_path, validation_fraction=0.25))
    assert splits.label_names == ["bad", "good"]
    assert len(splits.train) == 18
    assert len(splits.validation) == 6
    assert sorted(splits.validation["labels"]) == [0, 0, 0, 1, 1, 1]
    assert splits.test[0] == {"text": "w4 w5 w20", "labels": 1}
    assert not set(splits.train["text"]) & set(splits.validation["text"])


def test_text_files_in_one_folder_per_label(tmp_path):
    for split, count in (("train", 6), ("test", 2)):
        for label in ("neg", "pos"):
            folder = tmp_path / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f"{i}.txt").write_text(f"w{i} {label} {split}", encoding="utf-8")
    splits = load_splits(section(tmp_path, validation_fraction=0.2))
    assert splits.label_names == ["neg", "pos"]
    assert len(splits.test) == 4
    assert splits.test[0]["text"] == "w0 neg test"


def test_the_unlabeled_folder_of_the_imdb_archive_is_no_class(tmp_path):
    for folder in ("train/neg", "train/pos", "train/unsup", "test/neg", "test/pos"):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(4):
            (tmp_path / folder / f"{i}_0.txt").write_text(f"w{i} {folder}", encoding="utf-8")
    splits = load_splits(section(tmp_path, validation_fraction=0.25))
    assert splits.label_names == ["neg", "pos"]
    assert len(splits.train) + len(splits.validation) == 8
    assert any("unsup has no labels and is left out; --data.unlabeled train/unsup" in note for note in splits.notes)
    splits = load_splits(section(tmp_path, validation_fraction=0.25, unlabeled="train/unsup"))
    assert sorted(splits.unlabeled["text"]) == [f"w{i} train/unsup" for i in range(4)]


def test_a_saved_data_set_keeps_its_label_names(tmp_path):
    rows = Dataset.from_dict({"text": [f"w{i}" for i in range(20)], "label": [i % 2 for i in range(20)]})
    rows = rows.cast_column("label", ClassLabel(names=["no", "yes"]))
    DatasetDict({"train": rows, "test": rows.select(range(4))}).save_to_disk(str(tmp_path / "saved"))
    splits = load_splits(section(tmp_path / "saved"))
    assert splits.label_names == ["no", "yes"]
    with pytest.raises(UsageError, match="no split 'dev' in .*; there is: train, test"):
        load_splits(section(tmp_path / "saved", validation_split="dev"))


def test_unlabeled_rows_that_stand_in_held_out_splits_are_dropped_and_counted(tmp_path):
    frame().to_csv(tmp_path / "train.csv", index=False)
    frame(ROWS[:6]).to_csv(tmp_path / "test.csv", index=False)
    frame(ROWS[:6]).to_csv(tmp_path / "validation.csv", index=False)
    pool = pd.DataFrame({"text": ["w90", "w4 w5 w20", "w91"]})
    pool.to_csv(tmp_path / "pool.csv", index=False)
    splits = load_splits(section(tmp_path, validation_split="validation", unlabeled="pool"))
    assert splits.unlabeled["text"] == ["w90", "w91"]
    assert splits.unlabeled["labels"] == [-100, -100]
    assert any("1 unlabeled rows dropped" in note for note in splits.notes)
    # The same pool as a file that lies elsewhere, and only a part of it.
    elsewhere = tmp_path / "elsewhere.txt"
    elsewhere.write_text("\n".join(pool["text"]), encoding="utf-8")
    changes = {"validation_split": "validation", "unlabeled": str(elsewhere)}
    assert load_splits(section(tmp_path, **changes)).unlabeled["text"] == ["w90", "w91"]
    assert len(load_splits(section(tmp_path, **changes, max_unlabeled_samples=1)).unlabeled) <= 1


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        ([0, 1, 2, 1], ["a", "b"], r"row 2 of the split 'train' has the label 2, outside 0\.\.1"),
        ([0, 1, -1, 1], None, r"row 2 .* has the label -1, outside .* data.unlabeled"),
        ([0.5, 1.5, 0.0, 1.0], None, r"row 0 .* has the label 0\.5 \(float\)"),
        (["x", "y", None, "x"], ["x", "y"], "row 2 of the split 'train' has no label"),
        (["x", "z", "y", "x"], ["x", "y"], r"row 1 .* has the label 'z', which is not among"),
        (["x", "x", "x", "x"], ["x", "y"], "all 4 rows of the split 'train' have the label 'x'"),
        ([1, 1, 1, 1], None, "all 4 rows of the split 'train' have the label"),
    ],
)
def test_wrong_labels_are_refused_with_their_row(tmp_path, labels, names, expected):
    table = pd.DataFrame({"text": ["a", "b", "c", "d"], "label": labels})
    for split in ("train", "validation", "test"):
        table.to_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(UsageError, match=expected):
        load_splits(section(tmp_path, validation_split="validation", label_names=names))


def test_one_missing_label_of_a_csv_is_named_although_it_makes_the_others_floats(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\na,0\nb,1\nc,\nd,1\n", encoding="utf-8")
    (tmp_path / "test.csv").write_text("text,label\na,0\nb,1\n", encoding="utf-8")
    with pytest.raises(UsageError, match="row 2 of the split 'train' has no label in label"):
        load_splits(section(tmp_path))


def test_words_that_pandas_takes_for_missing_are_words(tmp_path):
    for split in ("train", "validation", "test"):
        rows = f"text,label\nN/A,None\nnull {split},NA\nfine {split},None\nnan {split},NA\n"
        (tmp_path / f"{split}.csv").write_text(rows, encoding="utf-8")
    splits = load_splits(section(tmp_path, validation_split="validation"))
    assert splits.label_names == ["NA", "None"]
    assert splits.train["text"][0] == "N/A"
    assert splits.notes == ["1 texts of train stand in test too"]


def test_labels_that_do_not_start_at_0_are_refused(tmp_path):
    table = pd.DataFrame({"text": ["a", "b", "c", "d"], "label": [1, 2, 3, 1]})
    for split in ("train", "validation", "test"):
        table.to_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(UsageError, match=r"labels of train are \[1, 2, 3\], and no row has 0"):
        load_splits(section(tmp_path, validation_split="validation"))


def test_text_labels_that_are_numbers_are_in_the_order_of_numbers(tmp_path):
    """A finished teacher's LABEL_2 is the third class, not the one after "10"."""
    labels = [str(i % 11) for i in range(44)]
    for split in ("train", "test"):
        rows = {"text": [f"{split} {i}" for i in range(44)], "label": labels}
        pd.DataFrame(rows).to_parquet(tmp_path / f"{split}.parquet")
    splits = load_splits(section(tmp_path, label_names=None))
    assert splits.label_names == [str(i) for i in range(11)]
    assert splits.test["labels"][:11] == list(range(11))


def test_the_teachers_own_split_is_cleaned_of_held_out_rows(tmp_path):
    frame().to_csv(tmp_path / "train.csv", index=False)
    frame([(f"other {i}", label) for i, (_, label) in enumerate(ROWS)]).to_csv(tmp_path / "test.csv", index=False)
    pd.concat([pd.read_csv(tmp_path / "train.csv"), pd.read_csv(tmp_path / "test.csv")]).to_csv(
        tmp_path / "big.csv", index=False
    )
    splits = load_splits(section(tmp_path, validation_fraction=0.25), "big")
    held_out = set(splits.validation["text"]) | set(splits.test["text"])
    assert set(splits.teacher_train["text"]) == set(splits.train["text"])
    assert not set(splits.teacher_train["text"]) & held_out
    assert any(f"{len(held_out)} big rows dropped" in note for note in splits.notes)


def test_a_string_label_of_test_that_train_has_not_is_refused(tmp_path):
    frame().to_csv(tmp_path / "train.csv", index=False)
    frame([("a", "good"), ("b", "awful")]).to_csv(tmp_path / "test.csv", index=False)
    with pytest.raises(UsageError, match="row 1 of the split 'test' has the label 'awful'"):
        load_splits(section(tmp_path))


def test_missing_things_are_named(tmp_path):
    with pytest.raises(UsageError, match="no file or folder"):
        load_splits(section(tmp_path / "absent"))
    frame().to_csv(tmp_path / "train.csv", index=False)
    with pytest.raises(UsageError, match="no split 'test' in .*; there is: train.csv"):
        load_splits(section(tmp_path))
    frame().to_csv(tmp_path / "test.csv", index=False)
    with pytest.raises(UsageError, match=r"has no column 'review' \(data.text_column\); there is: text, label"):
        load_splits(section(tmp_path, text_column="review"))
    (tmp_path / "test.csv").write_text("text,label\n", encoding="utf-8")
    with pytest.raises(UsageError, match="test.csv has no rows"):
        load_splits(section(tmp_path))
    (tmp_path / "test.csv").write_bytes(b"")
    with pytest.raises(UsageError, match="test.csv is empty"):
        load_splits(section(tmp_path))


def test_a_file_that_is_not_utf8_is_refused_with_its_line(tmp_path):
    frame().to_csv(tmp_path / "train.csv", index=False)
    (tmp_path / "test.csv").write_bytes("text,label\nfine,good\ncaf\xe9,bad\n".encode("latin-1"))
    with pytest.raises(UsageError, match=r"test.csv is not UTF-8 \(line 3\); .*iconv"):
        load_splits(section(tmp_path))


def test_a_broken_file_is_refused_in_one_line(tmp_path):
    frame().to_parquet(tmp_path / "train.parquet")
    (tmp_path / "test.parquet").write_bytes((tmp_path / "train.parquet").read_bytes()[:-20])
    with pytest.raises(UsageError, match="cannot read .*test.parquet as parquet") as caught:
        load_splits(section(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_missing_text_is_refused_with_its_row(tmp_path):
    table = frame()
    table.loc[3, "text"] = None
    table.to_parquet(tmp_path / "train.parquet")
    table.to_parquet(tmp_path / "test.parquet")
    with pytest.raises(UsageError, match="row 3 of the split 'train' has no text"):
        load_splits(section(tmp_path))


def test_the_hash_of_the_rows_does_not_depend_on_the_file(tmp_path):
    for kind in ("csv", "parquet"):
        (tmp_path / kind).mkdir()
        WRITERS[kind](frame(), tmp_path / kind / f"train.{kind}")
        WRITERS[kind](frame(), tmp_path / kind / f"test.{kind}")
    hashes = {content_hash(load_splits(section(tmp_path / kind)).train) for kind in ("csv", "parquet")}
    assert len(hashes) == 1
    assert content_hash(load_splits(section(tmp_path / "csv", seed=1)).train) not in hashes


def test_rows_are_hashed_once(tmp_path, monkeypatch):
    rows = Dataset.from_dict({"text": ["a", "b"], "labels": [0, 1]})
    found = content_hash(rows)
    monkeypatch.setattr(Dataset, "iter", lambda *_, **__: pytest.fail("they are read again"))
    assert content_hash(rows) == found
    monkeypatch.undo()
    assert content_hash(rows.select([1, 0])) != found


def test_json_with_a_label_of_another_type_in_one_row_is_refused(tmp_path):
    lines = [{"text": "a", "label": 0}, {"text": "b", "label": "one"}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    with pytest.raises(UsageError):
        load_splits(section(tmp_path))


@pytest.mark.parametrize("given", [["positive", "negative"], ["Positive", "other"]])
def test_names_at_another_place_than_in_the_data_set_are_refused(tmp_path, given):
    """Its labels are numbers: renamed, each of the model's answers would be the wrong one."""
    rows = Dataset.from_dict({"text": [f"w{i}" for i in range(20)], "label": [i % 2 for i in range(20)]})
    rows = rows.cast_column("label", ClassLabel(names=["negative", "positive"]))
    DatasetDict({"train": rows, "test": rows.select(range(4))}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(UsageError, match=r"has .*ositive.* in another place than .*\['negative', 'positive'\]"):
        load_splits(section(tmp_path / "saved", label_names=given))
    renamed = ["Negative", "good"]
    assert load_splits(section(tmp_path / "saved", label_names=renamed)).label_names == renamed


def test_decimals_mean_the_classes_of_their_numbers_to_a_finished_model_too(tmp_path):
    rows = Dataset.from_dict({"text": ["a"] * 11, "labels": [str(i) for i in range(11)]})
    names = [f"LABEL_{i}" for i in range(11)]
    found = as_classes(rows, section(tmp_path), "test", names, "single_label_classification")
    assert list(found["labels"]) == list(range(11))


SWALLOWED = 'text\tlabel\n"great film\t1\nbad\t0\nnice" movie\t1\n'


def test_a_tsv_whose_quotation_marks_take_in_rows_is_refused(tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.tsv").write_text("text\tlabel\nfine\t1\n" + SWALLOWED.partition("\n")[2])
    with pytest.raises(UsageError, match=r"row 1 of .*train\.tsv holds lines that look like rows, 'great film.* jsonl"):
        load_splits(section(tmp_path))
    # Quotes that are written as such, be there tabs or line breaks in them.
    texts = ['"a" b', "tab\tin it", "a\nline", "2\n\nlines\tand a tab", "Dear all\n\tnext", "Item:\tPrice\nApple 3"]
    frame = pd.DataFrame({"text": texts * 2, "label": [0, 1] * 6})
    for split in ("train", "test"):
        frame.to_csv(tmp_path / f"{split}.tsv", sep="\t", index=False)
    assert load_splits(section(tmp_path)).test["text"] == list(frame["text"])


def test_a_file_of_just_the_splits_name_is_the_split(tmp_path):
    for name, count in (("train", 12), ("train-small", 6), ("test", 6), ("test-hard", 4)):
        frame(ROWS[:count]).to_csv(tmp_path / f"{name}.csv", index=False)
    splits = load_splits(section(tmp_path, validation_fraction=0.25))
    assert (len(splits.train) + len(splits.validation), len(splits.test)) == (12, 6)
    # Shards are numbered; beside them, another name is another split.
    (tmp_path / "train.csv").rename(tmp_path / "train-00000-of-00002.csv")
    frame(ROWS[:8]).to_csv(tmp_path / "train-00001-of-00002.csv", index=False)
    splits = load_splits(section(tmp_path, validation_fraction=0.25))
    assert len(splits.train) + len(splits.validation) == 20
    assert len(load_splits(section(tmp_path, train_split="train-small", validation_fraction=0.25)).test) == 6


@pytest.mark.parametrize("left", [".ipynb_checkpoints", "__MACOSX", "notes"])
def test_a_folder_beside_the_files_of_a_split_makes_no_labels(tmp_path, left):
    for split, count in (("train", 12), ("test", 6)):
        (tmp_path / split / left).mkdir(parents=True)
        (tmp_path / split / left / "readme.txt").write_text("what this is")
        frame(ROWS[:count]).to_csv(tmp_path / split / "part-0.csv", index=False)
    splits = load_splits(section(tmp_path, validation_fraction=0.25))
    assert len(splits.train) + len(splits.validation) == 12


def test_a_folder_that_an_editor_left_is_no_class(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "._x.csv").write_text("left by macOS")
        for label in ("neg", "pos", ".ipynb_checkpoints"):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(4):
                (tmp_path / split / label / f"{i}.txt").write_text(f"{split} {label} {i}")
        (tmp_path / split / "urls_neg.txt").write_text("http://example.org\n")
    assert load_splits(section(tmp_path, validation_fraction=0.5)).label_names == ["neg", "pos"]


def test_texts_in_folders_and_a_table_beside_them_are_refused(tmp_path):
    for split in ("train", "test"):
        for label in ("neg", "pos"):
            (tmp_path / split / label).mkdir(parents=True)
            (tmp_path / split / label / "0.txt").write_text(f"{split} {label}")
    (tmp_path / "train" / "metadata.json").write_text('[{"text": "a", "label": "neg"}]')
    with pytest.raises(UsageError, match=r"texts in a folder per label \(neg, pos\) and beside them metadata.json"):
        load_splits(section(tmp_path))
